"""What gpu_check.py and gpu_bench.py share: parts that run in a process each, times, the machine.

A part is a function without arguments that returns its figures, or raises CheckFailed or NotRun.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
#: Where the parts' tensors live. The tests set another one, and play the GPU.
DEVICE = "cuda"

Figures = dict[str, Any]


class CheckFailed(Exception):
    """A part's finding: something is not as it must be. ``figures`` tell what is known anyway."""

    def __init__(self, text: str, figures: Figures | None = None) -> None:
        super().__init__(text)
        self.figures = figures or {}


class NotRun(Exception):
    """A part has nothing to run on this machine."""


def require(condition: object, text: str) -> None:
    """Raise CheckFailed with ``text`` unless ``condition`` holds."""
    if not condition:
        raise CheckFailed(text)


def sparse(rows: torch.Tensor, values: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The gradient [num_rows, D] that a sparse embedding gets; nothing is checked or waited for."""
    size = (num_rows, values.shape[1])
    return torch.sparse_coo_tensor(rows[None], values, size, check_invariants=False)


# ---------------------------------------------------------------------- the machine


def environment() -> Figures:
    """What this machine is and what is installed."""

    def told(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:  # a figure that is missing fails nothing
            return f"unknown ({type(error).__name__}: {error})"

    def nvidia_smi() -> str:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    def commit() -> str:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    import cupy

    card = torch.cuda.get_device_properties(0)
    return {
        "card": card.name,
        "compute_capability": f"{card.major}.{card.minor}",
        "memory_GiB": round(card.total_memory / 2**30, 1),
        "multiprocessors": card.multi_processor_count,
        "devices": torch.cuda.device_count(),
        "driver": told(nvidia_smi),
        "cuda_of_driver": told(lambda: cupy.cuda.runtime.driverGetVersion()),
        "cuda_of_torch": torch.version.cuda,
        "nvrtc": told(lambda: ".".join(map(str, cupy.cuda.nvrtc.getVersion()))),
        "torch": torch.__version__,
        "cupy": cupy.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": told(commit),
    }


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """Within the block, an operation of torch's that waits for the GPU raises RuntimeError."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def recorded_waits() -> Iterator[Counter[str]]:
    """Within the block, records where an operation of torch's waits for the GPU."""
    texts: Counter[str] = Counter()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield texts
    finally:
        torch.cuda.set_sync_debug_mode("default")
        texts.update(f"{Path(w.filename).name}:{w.lineno}: {w.message}" for w in said)


def warm_up(work: Callable[[], object]) -> None:
    """Do it three times on a side stream, as torch asks for before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The graph of it; it does not run."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


# ---------------------------------------------------------------------- times


class Work(NamedTuple):
    """What is timed: ``run``, and what has to be done before each time."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    may_wait: bool = True  # False: within ``run`` an operation that waits for the GPU raises


def copy_bandwidth(nbytes: int = 1 << 30) -> float:
    """Bytes read and written per second by a copy of so many bytes."""
    source = torch.zeros(nbytes // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu_seconds(lambda: target.copy_(source))


def gpu_seconds(work: Callable[[], object], rounds: int = 20) -> float:
    """Time of ``work`` on the GPU, the median of rounds, see ``gpu_times``."""
    return statistics.median(gpu_times({"work": Work(work)}, rounds, is_cold=False)["work"])


def gpu_times(
    works: Mapping[str, Work], rounds: int = 20, is_cold: bool = True
) -> dict[str, list[float]]:
    """Seconds that each work takes on the GPU, one number a round, all of them in every round.

    The GPU is kept busy while the host puts a work in its queue, so no time of the host's is in it,
    unless the work waits for the GPU. The first 5 rounds are not counted.

    Args:
        works: by name.
        rounds: how many are counted.
        is_cold: read a buffer of several times the L2 cache before each, so that nothing of an
            earlier work is left there and nothing has still to be written back.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    host = dict.fromkeys(works, 0.0)
    junk = torch.zeros(4 * _cache_bytes() // 4, device=DEVICE) if is_cold else None
    for i in range(rounds + 5):
        for name, work in works.items():
            work.prepare()
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if junk is not None:
                junk.sum()
            # 5 ms, or what the host took in the rounds before; a GPU makes some 2 cycles a ns.
            torch.cuda._sleep(int(2e9 * min(max(5e-3, 2 * host[name]), 0.1)))
            started = time.perf_counter()
            torch.cuda.set_sync_debug_mode("default" if work.may_wait else "error")
            try:
                begin.record()
                work.run()
                end.record()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if 0 < i < 5:
                host[name] = time.perf_counter() - started
            end.synchronize()
            if i >= 5:
                seconds[name].append(begin.elapsed_time(end) / 1e3)
    return seconds


def _cache_bytes() -> int:
    """Bytes of the GPU's L2 cache; 64 MiB where torch does not say."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 << 20


def kernel_times(work: Work, rounds: int = 10) -> dict[str, tuple[float, float]]:
    """What runs on the GPU in a work, by name: (how often, seconds), means of rounds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            work.prepare()
            work.run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e6)
    return {name: (len(x) / rounds, sum(x) / rounds) for name, x in found.items()}


def peak_bytes(work: Work) -> int:
    """Bytes of the GPU's memory that a work takes for a time, beyond what is there before it."""
    work.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work.run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def host_seconds(work: Work, rounds: int = 30) -> float:
    """Time until the host is done with a work, the median of rounds; the GPU is idle before."""
    seconds = []
    for _ in range(rounds + 3):
        work.prepare()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work.run()
        seconds.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(seconds[3:])


def host_us(work: Callable[[], object], calls: int, rounds: int = 30) -> float:
    """Host time of a call, the median of rounds; the GPU has nothing else to do at their begin."""
    seconds = []
    for _ in range(rounds + 3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        seconds.append((time.perf_counter() - begin) / calls)
    torch.cuda.synchronize()
    return round(1e6 * statistics.median(seconds[3:]), 2)


# ---------------------------------------------------------------------- running the parts


def run_command(command: Sequence[str], seconds: float, **variables: str) -> tuple[int | None, str]:
    """(exit status, output) of a program; None for one that took too long, with all it started."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables},
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(seconds)
        except BaseException as error:  # Ctrl-C reaches only this process
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = None
        log.seek(0)
        return status, log.read()


def tail(text: str, lines: int = 15) -> str:
    """The last lines of an output."""
    return "\n".join(text.rstrip().splitlines()[-lines:])


class Outcome(NamedTuple):
    """What became of a part: "passed", "failed" or "not run"; figures, or why not."""

    result: str
    seconds: float
    figures: Figures
    error: str = ""


def in_a_process(script: str, name: str, limit: float) -> Callable[[], Figures]:
    """The part of that name of a script, to be run by another Python within seconds."""

    def part() -> Figures:
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder, "answer.json")
            command = [sys.executable, script, "--part", name, "--output", str(answer)]
            status, output = run_command(command, limit)
            require(status is not None, f"no end after {limit:.0f} s: {tail(output)}")
            require(answer.exists(), f"ended with status {status}: {tail(output)}")
            return read_answer(answer)

    return part


def answer_part(work: Callable[[], Figures], output: Path) -> None:
    """Run a part here; write its figures, or its error."""
    try:
        answer: Figures = {"figures": work()}
    except CheckFailed as error:
        answer = {"error": str(error), "figures": error.figures}
    except Exception:
        answer = {"error": traceback.format_exc()}
    write_json(output, answer)


def read_answer(path: Path) -> Figures:
    """The figures that ``answer_part`` has written; CheckFailed if it wrote an error."""
    answer = json.loads(path.read_text(encoding="utf-8"))
    if "error" in answer:
        raise CheckFailed(answer["error"], answer.get("figures"))
    figures: Figures = answer["figures"]
    return figures


def run_part(part: Callable[[], Figures]) -> Outcome:
    """What becomes of a part; whatever it raises is its outcome."""
    begin = time.perf_counter()
    result, figures, text = "passed", {}, ""
    try:
        figures = part()
    except NotRun as error:
        result, text = "not run", str(error)
    except CheckFailed as error:
        result, text, figures = "failed", str(error), error.figures
    except Exception:
        result, text = "failed", traceback.format_exc()
    return Outcome(result, round(time.perf_counter() - begin, 1), figures, text)


def run_parts(parts: Mapping[str, Callable[[], Figures]], output: Path) -> dict[str, Any]:
    """Run all parts in order; print each outcome, and write the report after each."""
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "result": "incomplete",
        "parts": {},
    }
    for name, part in parts.items():
        print(f"{name:<24}", end="", flush=True)
        outcome = run_part(part)
        report["parts"][name] = outcome._asdict()
        write_json(output, report)
        print(f"{outcome.result:<8}{outcome.seconds:7.1f} s", flush=True)
        if outcome.error:
            print(indented(outcome.error), flush=True)
        elif outcome.figures:
            print(indented(json.dumps(outcome.figures, ensure_ascii=False)[:2000]), flush=True)
    failed = [name for name, x in report["parts"].items() if x["result"] == "failed"]
    report["result"] = "failed" if failed else "passed"
    write_json(output, report)
    return report


def indented(text: str) -> str:
    """Every line four spaces in."""
    return "\n".join("    " + line for line in text.splitlines())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
