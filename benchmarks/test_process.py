"""What is measured in a process of its own: the first step, and the memory that a step takes."""

from __future__ import annotations

import statistics
import sys

import fresh
import pytest
from conftest import note


def test_first_step(benchmark, request, tmp_path):
    """Kernels are compiled in the first process; the next three find them in the disk cache."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "empty")}
    cold, said = fresh.run("first-step", **cache)
    warm = benchmark.pedantic(
        lambda: [fresh.run("first-step", **cache)[0] for _ in range(3)], rounds=1
    )
    figures = {
        "no cache, s": cold["first_step_s"],
        "lines that say it compiles": said.lower().count("compil"),
        "warm, s": statistics.median(found["first_step_s"] for found in warm),
        "import, s": statistics.median(found["import_s"] for found in warm),
    }
    note(benchmark, request, "first-step", {"figures": figures})


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from Linux's /proc")
@pytest.mark.parametrize(
    ("dim", "count", "zipf"),
    [(64, 65_536, 0.0), (16, 262_144, 0.0), (64, 262_144, 1.2)],
    ids=["D64-uniform", "D16-uniform", "D64-zipf1.2"],
)
def test_memory(benchmark, request, dim, count, zipf):
    """The most that a step takes beside tables, moments and gradients."""
    found, _ = benchmark.pedantic(
        lambda: fresh.run(
            "memory",
            str(dim),
            str(count),
            str(zipf),
            MALLOC_MMAP_THRESHOLD_="16384",
            MALLOC_TRIM_THRESHOLD_="0",
            NUMPY_MADVISE_HUGEPAGE="0",
        ),
        rounds=1,
    )
    figures = {f"{name}, bytes a gradient row": taken / count for name, taken in found.items()}
    # The goal allows 1 MiB whatever the batch.
    figures["bytes a gradient row beyond 1 MiB"] = (found["SparseAdamW"] - (1 << 20)) / count
    note(benchmark, request, "memory-" + request.node.callspec.id, {"figures": figures})
