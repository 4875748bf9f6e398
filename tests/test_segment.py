"""The CPU engine's sort: what ``segment`` returns, in every way that it can go about it."""

from __future__ import annotations

import copy
import gc
import importlib
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cupy_sparse_adamw import SparseAdamW, functional
from cupy_sparse_adamw._slots import Slot
from cupy_sparse_adamw._types import MISSING, Pending, PendingGrad

pytest.importorskip("numba")
cpu = importlib.import_module("cupy_sparse_adamw.engines.cpu.segment")


@pytest.fixture
def threads_set_to() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pending_of(num_rows: int, *pieces: torch.Tensor, drop_missing: bool = False) -> Pending:
    """A table of D = 1 with these rows of gradients; only their numbers matter here."""
    grads = [PendingGrad(rows, torch.zeros(1, 1).expand(rows.numel(), 1)) for rows in pieces]
    slot = Slot.over("embedding", torch.zeros(1, 1).expand(num_rows, 1))
    return Pending("table", slot, num_rows, grads, drop_missing)


def expected_words(tables: list[Pending]) -> tuple[np.ndarray, int]:
    """The sorted (key, position) words, by NumPy's own sort, and how many are kept."""
    first_keys = np.cumsum([0, *(table.num_rows for table in tables)])
    keys = [
        torch.where(piece.rows == MISSING, int(first_keys[-1]), piece.rows + int(first_key))
        for table, first_key in zip(tables, first_keys, strict=False)
        for piece in table.pieces
    ]
    keys = torch.cat(keys).numpy()
    bits = max(keys.size - 1, 0).bit_length()
    return np.sort((keys << bits) | np.arange(keys.size)), int((keys < first_keys[-1]).sum())


def check(tables: list[Pending]) -> None:
    segments = cpu.segment(tables)
    words, num_kept = expected_words(tables)
    assert np.array_equal(segments.words, words)
    assert segments.num_kept == num_kept
    keys = words[:num_kept] >> segments.position_bits
    _, begins, counts = np.unique(keys, return_index=True, return_counts=True)
    is_long = counts > cpu.CHUNK
    chunks = -(-counts[is_long] // cpu.CHUNK)
    assert segments.partials.shape[0] == chunks.sum()
    begins, counts = begins[is_long], counts[is_long]
    runs = np.stack([begins, begins + counts, np.cumsum(chunks) - chunks], axis=1)
    assert np.array_equal(segments.long_runs, runs.reshape(-1, 3))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("num_rows", [1, 2, 200, 5_000, 2**20, 2**34])
@pytest.mark.parametrize("size", [1, 2, 31, 33, 700, 20_000, 100_000])
def test_uniform_rows(num_rows, size, threads, threads_set_to):
    threads_set_to(threads)
    torch.manual_seed(size)
    check([pending_of(num_rows, torch.randint(0, num_rows, (size,)))])


@pytest.mark.parametrize("size", [700, 70_000])
@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda n: torch.zeros(n, dtype=torch.int64), id="one row"),
        pytest.param(lambda n: torch.randint(0, 40, (n,)) * 2**28, id="few rows, far apart"),
        pytest.param(lambda n: 2**33 + torch.randint(0, 9, (n,)), id="one bucket"),
        pytest.param(lambda n: (torch.rand(n) ** 12 * 2**33).long(), id="skewed"),
        pytest.param(lambda n: torch.arange(n), id="ascending"),
        pytest.param(lambda n: torch.arange(n) // 3, id="ascending, repeated"),
        pytest.param(lambda n: torch.arange(n).flip(0), id="descending"),
        pytest.param(lambda n: torch.arange(n).roll(n // 2), id="descends once, in the middle"),
        pytest.param(lambda n: torch.arange(n).roll(-1), id="descends once, at the end"),
    ],
)
def test_rows_that_are_not_uniform(draw, size, threads_set_to):
    threads_set_to(2)
    check([pending_of(2**34, draw(size))])


def test_rows_in_order_are_not_sorted(monkeypatch, threads_set_to):
    threads_set_to(2)
    monkeypatch.setattr(cpu, "_sort", None)
    check([pending_of(100_000, torch.arange(100_000))])
    with pytest.raises(TypeError):
        check([pending_of(100_000, torch.arange(100_000).flip(0))])


def test_tables_pieces_and_missing_rows(threads_set_to):
    threads_set_to(2)
    torch.manual_seed(0)
    tables = []
    for number in range(40):
        num_rows = 1 + 37 * number
        low = MISSING if number % 3 == 0 else 0
        pieces = [torch.randint(low, num_rows, (n,)) for n in (number, 0, 900, 3)]
        tables.append(pending_of(num_rows, *pieces, drop_missing=low == MISSING))
    check(tables)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(
    "bad", [MISSING, 7], ids=["missing where none are dropped", "beyond the last"]
)
def test_the_piece_and_table_of_a_row_out_of_range_are_found(bad, second):
    """In a later piece of a table, behind or before one whose missing rows are dropped."""
    dropping = pending_of(9, torch.tensor([MISSING, 8]), torch.tensor([MISSING]), drop_missing=True)
    wrong = pending_of(7, torch.tensor([], dtype=torch.int64), torch.arange(3), torch.tensor([bad]))
    wrong.name = "wrong"
    tables = [dropping, wrong] if second else [wrong, dropping]
    with pytest.raises(IndexError, match=f"table 'wrong': .* row {bad}, but the table has 7 rows"):
        cpu.segment(tables)


@pytest.mark.parametrize("num_rows", [1, 2, 1024])
def test_the_key_of_missing_rows_fits(num_rows, threads_set_to):
    """It is the number of rows: at a power of two it needs one more bit than any row."""
    threads_set_to(2)
    rows = torch.randint(MISSING, num_rows, (20_000,))
    check([pending_of(num_rows, rows, drop_missing=True)])


def test_a_sort_key_has_63_bits():
    check([pending_of(2**61 - 1, torch.tensor([2**61 - 2, 0, 5]))])  # 61 bits and 2
    with pytest.raises(OverflowError, match="2305843009213693952 rows and 3 gradient rows"):
        cpu.segment([pending_of(2**61, torch.tensor([2**61 - 1, 0, 5]))])


def test_a_small_step_gives_a_large_buffer_up():
    large = [pending_of(1 << 20, torch.randint(0, 1 << 20, (200_000,)))]
    check(large)  # compiling leaves frames behind, until they are collected
    gc.collect()
    cpu._free_buffers.clear()
    check(large)
    assert [words.size for words in cpu._free_buffers] == [400_000]
    for _ in range(2):
        check([pending_of(9, torch.tensor([8, 1, 8]))])
    assert sum(words.size for words in cpu._free_buffers) < 100_000


def test_segments_that_live_at_once_share_no_memory():
    torch.manual_seed(0)
    tables = [pending_of(1000, torch.randint(0, 1000, (5000,))) for _ in range(6)]
    alive = [cpu.segment([table]) for table in tables]
    for segments, table in zip(alive, tables, strict=True):
        assert np.array_equal(segments.words, expected_words([table])[0])
    del segments
    alive.clear()
    check([tables[0]])  # in a buffer that another had


def test_words_are_free_when_no_copy_of_the_segments_is_left():
    cpu._free_buffers.clear()
    segments = cpu.segment([pending_of(9, torch.tensor([8, 1, 8]))])
    twin = copy.copy(segments)
    del segments
    assert not cpu._free_buffers
    del twin
    assert len(cpu._free_buffers) == 1


@pytest.mark.parametrize(
    ("count", "draw"),
    [
        pytest.param(262_144, lambda n: torch.randint(0, 1 << 16, (n,)), id="uniform"),
        pytest.param(262_144, lambda n: torch.arange(n) % 7, id="hot rows"),
        pytest.param(1, lambda n: torch.zeros(n, dtype=torch.int64), id="one"),
    ],
)
def test_memory_of_a_step(count, draw):
    """At most 24 bytes per gradient row and a MiB beside them; no (N, D) temporary."""
    dim = 32
    weight = torch.nn.Parameter(torch.zeros(1 << 16, dim))
    optimizer = SparseAdamW({"table": weight})
    weight.grad = torch.sparse_coo_tensor(
        draw(count)[None], torch.ones(count, dim), weight.shape, check_invariants=False
    )
    optimizer.step()  # the moments appear
    cpu._free_buffers.clear()
    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as torch_memory:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            optimizer.step()
            numpy_peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    torch_bytes = sum(max(e.self_cpu_memory_usage, 0) for e in torch_memory.key_averages())
    assert numpy_peak >= 16 * count  # it is seen at all
    assert numpy_peak + torch_bytes <= 24 * count + 2**20


@pytest.mark.parametrize("dim", [1, 16, 17, 40])
@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [(torch.float64, 40), (torch.float32, 40), (torch.bfloat16, 40), (torch.float16, 4)],
    ids=str,
)
def test_gradients_of_a_row_are_added_in_their_order(dtype, exponents, dim):
    """Bitwise, in double, where most other orders give other sums; chunks likewise."""
    draw = torch.Generator().manual_seed(dim)
    lengths = [*range(1, 10), cpu.CHUNK, cpu.CHUNK + 1, 2 * cpu.CHUNK + 7]
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    rows = rows[torch.randperm(rows.numel(), generator=draw)]
    size = rows.numel(), dim
    scales = 2.0 ** torch.randint(-exponents, exponents, size, generator=draw).double()
    grads = (torch.randn(size, generator=draw).double() * scales).to(dtype)
    strided = grads[:1000].t().contiguous().t()
    slot = Slot.over("embedding", torch.zeros(len(lengths), dim, dtype=dtype))
    pieces = [PendingGrad(rows[:1000], strided), PendingGrad(rows[1000:], grads[1000:])]

    touched, sums = functional.coalesce(Pending("table", slot, len(lengths), pieces))
    assert torch.equal(touched, torch.arange(len(lengths)))
    zero = torch.zeros(dim, dtype=torch.float64)
    for row, sum_ in enumerate(sums):
        chunks = grads[rows == row].double().split(cpu.CHUNK)
        expected = sum((sum(chunk, zero) for chunk in chunks), zero)
        if dtype in (torch.float16, torch.bfloat16):
            expected = expected.float()
        assert torch.equal(sum_, expected.to(dtype))
