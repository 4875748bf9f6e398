"""What only a fresh process can tell: the first step, and the memory that a step takes.

    python benchmarks/fresh.py first-step
    python benchmarks/fresh.py memory D COUNT ZIPF

Prints one JSON object. ``run`` starts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROWS = 1 << 20


def run(*arguments: str, **environment: str) -> tuple[dict[str, Any], str]:
    """Run this file in a process of its own. Returns what it found, and its standard error."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path())), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"fresh.py {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1]), done.stderr + done.stdout


def path() -> list[Path]:
    """Where a process of its own finds this package: where this process found it."""
    import cupy_sparse_adamw

    return [Path(cupy_sparse_adamw.__file__).resolve().parents[1], HERE]


def first_step() -> dict[str, Any]:
    """Seconds of the first step and of the imports before it."""
    begin = time.perf_counter()
    import torch

    from cupy_sparse_adamw import SparseAdamW

    imported = time.perf_counter() - begin
    table = torch.nn.Embedding(1000, 64, sparse=True)
    table(torch.arange(100)).sum().backward()
    optimizer = SparseAdamW({"table": table})
    begin = time.perf_counter()
    optimizer.step()
    return {"first_step_s": time.perf_counter() - begin, "import_s": imported}


def memory(dim: int, count: int, zipf: float) -> dict[str, Any]:
    """The highest memory during a step above what it was before, in bytes.

    The process's resident memory, which sees what Python, NumPy, torch and compiled kernels take
    alike. glibc is told to ask the system anew for each larger piece, so that pieces freed before
    hide nothing; NumPy is told to round nothing up to huge pages.
    """
    import torch
    from cases import Case, Workload
    from rivals import Ours, SparseAdam

    from cupy_sparse_adamw.engines.cpu.segment import _free_buffers

    work = Workload(Case("memory", dim, count, ROWS, zipf=zipf))
    found: dict[str, Any] = {}
    for kind in (Ours, SparseAdam):
        contender = kind(work)
        for weight in contender.weights():
            weight.zero_()
        peaks = []
        for turn in range(6):
            contender.load(turn)
            if turn == 0:
                contender.step()
                for state in contender.optimizer.state.values():
                    for value in state.values():
                        if isinstance(value, torch.Tensor) and value.dim() == 2:
                            value.fill_(0.0)  # every page of the moments is there from now on
                continue
            _free_buffers.clear()  # a step that finds none takes the most
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
            before = _status("VmRSS")
            contender.step()
            peaks.append(_status("VmHWM") - before)
        found[contender.name] = sorted(peaks)[len(peaks) // 2]
        del contender
    return found


def _status(key: str) -> int:
    """Bytes that the system names under ``key``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    if sys.argv[1] == "first-step":
        print(json.dumps(first_step()))
    else:
        print(json.dumps(memory(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))
