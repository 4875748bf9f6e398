"""What a step is made of, in ms: the profiles of docs/performance.md.

    PYTHONPATH=. python benchmarks/profile_step.py

First kernels, each by the call that hands out its parts and waits for them, and what is left, which
is Python, beside the floor; each step follows a copy and a pause. Then, where a step has little
else to do, functions of the host, with what they call, kernels as well.
"""

from __future__ import annotations

import importlib
import inspect
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import timing
import torch
from cases import SETS, Case, Workload
from conftest import cache_bytes
from rivals import Ours, SparseAdam
from test_hash_table import CASE, HashLookup, IndexSelect
from test_step import CASES

from cupy_sparse_adamw import SparseAdamW, SparseOptimizer, functional
from cupy_sparse_adamw.embedding_table import EmbeddingTable

ROUNDS, WARMUP = 40, 6
CPU = "cupy_sparse_adamw.engines.cpu."
#: Who hands out the parts of kernels, which come first among the arguments.
KERNELS = [
    ("segment", "parallel_for"),
    ("sums", "parallel_for"),
    ("index", "parallel_for"),
    ("adamw", "run_parts"),
]
HOST = [
    (SparseOptimizer, "_update"),
    (SparseOptimizer, "_settings_of"),
    (SparseOptimizer, "_named_tables"),
    (EmbeddingTable, "pending"),
    (functional, "segment"),
    (SparseOptimizer, "_update_of"),
    (SparseAdamW, "_prepare_updates"),
]

#: What was clocked -> seconds in this step.
seconds: defaultdict[str, float] = defaultdict(float)


def clock(owner: Any, name: str, label: Callable[..., str]) -> None:
    """Have a function's calls counted from now on, under what ``label`` makes of the arguments."""
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    function = getattr(owner, name)

    def clocked(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[label(*args)] += time.perf_counter() - begin

    setattr(owner, name, staticmethod(clocked) if static else clocked)


def medians(timed: Any, before: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of a step, and of what is clocked in it."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for turn in range(WARMUP + ROUNDS):
        timed.load(turn % SETS)
        before()
        seconds.clear()
        begin = time.perf_counter()
        timed.step()
        taken = time.perf_counter() - begin
        if turn >= WARMUP:
            found["step"].append(1e3 * taken)
            for name, value in seconds.items():
                found[name].append(1e3 * value)
    return {name: statistics.median(values) for name, values in found.items()}


def show(name: str, parts: dict[str, float], digits: int = 2) -> None:
    """One line."""
    print(f"{name}: " + ", ".join(f"{key} {value:.{digits}f}" for key, value in parts.items()))


def main() -> None:
    """Print both profiles."""
    copy = timing.Copy(cache_bytes())
    copies: list[float] = []

    def others() -> None:
        copy.load(len(copies))
        begin = time.perf_counter()
        copy.step()
        copies.append(time.perf_counter() - begin)
        timing.settle(timing.SETTLE_S)

    for module, name in KERNELS:
        clock(importlib.import_module(CPU + module), name, lambda kernel, *_: kernel.__name__)
    for case in CASES:
        work = Workload(case)
        ours = Ours(work)
        copies.clear()
        found = medians(ours, others)
        speed = timing.COPY_BYTES / statistics.median(copies)
        kernels = sum(value for name, value in found.items() if name != "step")
        floor = {f"floor at {speed / 1e9:.1f} GB/s": 1e3 * work.floor / speed}
        show(case.name, floor | found | {"Python": found["step"] - kernels})
    lookup = HashLookup(Workload(CASE))
    show("HashTable lookup", medians(lookup, others))
    show("index_select", medians(IndexSelect(lookup.work, lookup), others))
    for owner, name in HOST:
        clock(owner, name, lambda *_, name=name: name)
    for case in (
        Case("one id", dim=64, count=1, rows=1000),
        Case("300 tables", dim=16, count=64, rows=3496, tables=300),
    ):
        work = Workload(case)
        show(case.name, medians(Ours(work), others), 3)
        show("SparseAdam", medians(SparseAdam(work), others), 3)


if __name__ == "__main__":
    with torch.no_grad():
        main()
