"""One optimizer step on a table of 1M rows, ours beside torch's, with pytest-benchmark.

Every case is checked for correctness before it is timed. Compilation and first touches happen in
warm-up rounds. Steps rotate among four gradient sets, and table, moments and gradients are larger
than the last-level cache, so rows come from memory. Sorting and summing duplicates is part of the
step for everybody. ``extra_info`` has the bytes that an ideal step moves (DESIGN: 24 U D + 4 N D +
8 N for fp32), the machine's copy bandwidth, and what share of it the step reaches.

    make bench
"""

from __future__ import annotations

import time

import pytest
import torch

from cupy_sparse_adamw import SparseAdamW

ROWS = 1 << 20
SETS = 4

#: name -> (D, gradient rows N, Zipf exponent or None for uniform ids)
CASES = {
    "D64-uniform": (64, 65_536, None),
    "D128-uniform": (128, 65_536, None),
    "D16-uniform": (16, 262_144, None),
    "D64-zipf": (64, 262_144, 1.2),
}


def draw_rows(count: int, exponent: float | None) -> torch.Tensor:
    """Rows [count] int64: uniform, or Zipf over shuffled rows, so that hot rows lie apart."""
    if exponent is None:
        return torch.randint(0, ROWS, (count,))
    weights = torch.arange(1, ROWS + 1, dtype=torch.float64) ** -exponent
    ranks = torch.searchsorted(weights.cumsum(0) / weights.sum(), torch.rand(count).double())
    return torch.randperm(ROWS)[ranks.clamp_(max=ROWS - 1)]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    dim, count, exponent = CASES[request.param]
    torch.manual_seed(0)
    grads = [
        torch.sparse_coo_tensor(
            draw_rows(count, exponent)[None],
            torch.randn(count, dim),
            (ROWS, dim),
            check_invariants=True,
        )
        for _ in range(SETS)
    ]
    touched = grads[0]._indices().unique().numel()
    return {"dim": dim, "grads": grads, "bytes": 24 * touched * dim + 4 * count * dim + 8 * count}


@pytest.fixture(scope="module")
def copy_bandwidth() -> float:
    """Bytes read and written per second by ``copy_`` of 256 MiB, the median of nine."""
    source, target = torch.zeros(1 << 26), torch.zeros(1 << 26)
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begin)
    return 2 * 4 * source.numel() / sorted(seconds[1:])[4]


def ours(weight: torch.Tensor) -> torch.optim.Optimizer:
    return SparseAdamW({"table": weight}, weight_decay=0.0)


def sparse_adam(weight: torch.Tensor) -> torch.optim.Optimizer:
    return torch.optim.SparseAdam([weight], eps=1e-8)


def dense_adamw(weight: torch.Tensor) -> torch.optim.Optimizer:
    return torch.optim.AdamW([weight], fused=True)


@pytest.mark.parametrize("make", [ours, sparse_adam, dense_adamw])
def test_step(benchmark, case, copy_bandwidth, make):
    weight = torch.nn.Parameter(torch.randn(ROWS, case["dim"]))
    optimizer, grads = make(weight), case["grads"]
    if make is dense_adamw:  # it needs the whole table's gradient, which autograd would build
        grads = [grad.to_dense() for grad in grads[:1]]
    turn = iter(range(1 << 30))

    def step():
        weight.grad = grads[next(turn) % len(grads)]
        optimizer.step()

    if make is ours:
        check_first_update(weight, grads[0])
    rounds = 5 if make is not ours else 20
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "ideal_bytes": case["bytes"],
        "copy_GB_per_s": round(copy_bandwidth / 1e9, 1),
        "percent_of_copy_bandwidth": round(100 * case["bytes"] / seconds / copy_bandwidth, 1),
    }


def check_first_update(weight: torch.Tensor, grad: torch.Tensor) -> None:
    """Ours, on a copy, against torch.optim.AdamW on the touched rows; other rows bit for bit."""
    updated = torch.nn.Parameter(weight.detach().clone())
    updated.grad = grad
    ours(updated).step()
    coalesced = grad.coalesce()
    touched = coalesced.indices()[0]
    rows = torch.nn.Parameter(weight.detach()[touched])
    rows.grad = coalesced.values()
    torch.optim.AdamW([rows], weight_decay=0.0).step()
    torch.testing.assert_close(updated[touched], rows, rtol=1e-5, atol=1e-6)
    changed = (updated != weight).any(1).nonzero().flatten()
    assert torch.equal(changed, touched)
