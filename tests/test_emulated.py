"""The CUDA engine on the emulator: whole steps and lookups, in every order of threads, and what a
GPU would have to wait for.

Kernels run checked (tests/emulator), so each case also says that no access is out of bounds or
misaligned, that there are no races, and that every barrier is met by all.
"""

from __future__ import annotations

import importlib
import itertools
import sys

import emulator
import numpy as np
import pytest
import torch
from oracle import Oracle, bits, relative_error, slot_of, within_one_ulp
from test_initializers import ANY_IDS, CASES, draw
from test_update import Table, step
from torch.overrides import TorchFunctionMode

from cupy_sparse_adamw import (
    AdmitHook,
    HashTable,
    NormalInitializer,
    SparseAdamW,
    _checks,
    functional,
)
from cupy_sparse_adamw._types import MISSING, Hyperparams, RowIndex, Slot
from cupy_sparse_adamw.row_bound import RowBound

pytestmark = pytest.mark.emulated

SEEDS = [0, 1, 2]
TILE = 128  # sparse_adamw.cu
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
#: Every pair of a table's dtype and its gradients'.
PAIRS = [(F32, F32), (F64, F64), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)]


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    # As on a GPU, where reading the number of rows waits.
    monkeypatch.setattr(RowBound, "reading_waits", lambda bound: True)
    emulator.load_engine()
    with emulator.active(), functional.use_engine("emulated"):
        yield


# ---------------------------------------------------------------------- whole steps


def group(dtype, grad_dtype, dim):
    """Three tables in blocks of several sizes and their gradients: tables, pending, plain tensors.

    Between them: rows that occur once, twice, as often as a tile and its neighbours hold, and in
    three tiles; dropped gradients; several pieces a table; a table whose rows are few.
    """
    torch.manual_seed(dim)
    hot = [TILE - 1, TILE, TILE + 1, 3 * TILE + 5] if dim < 1000 else [TILE + 1]
    tables, pending, plain = [], [], []
    for number, (size, block_size) in enumerate([(40, 7), (3, 64), (25, 1)]):
        table = Table(torch.randn(size, dim).to(dtype), block_size)
        counts = hot if number == 0 else [2 * TILE] if number == 1 else []
        rows = [torch.full((n,), row) for row, n in enumerate(counts)]
        rows.append(torch.randint(0, size - 1, (50,)))  # the last row is never touched
        rows.append(torch.full((9,), MISSING))
        rows = torch.cat(rows)
        rows = rows[torch.randperm(rows.numel())]
        grads = (torch.randn(rows.numel(), dim) + 0.5).to(grad_dtype)
        cuts = sorted(torch.randint(0, rows.numel(), (2,)).tolist())
        pieces = [(rows[a:b], grads[a:b]) for a, b in itertools.pairwise([0, *cuts, rows.numel()])]
        options = {"grad_scale": 0.5} if number == 0 else {"mean": number == 1}
        tables.append(table)
        pending.append(table.pending(*pieces, drop_missing=True, name=f"t{number}", **options))
        kept = rows != MISSING
        plain.append((rows[kept], grads[kept], options))
    return tables, pending, plain


@pytest.mark.parametrize("dim", [1, 3, 4, 17, 64, 130, 1024])
@pytest.mark.parametrize(("dtype", "grad_dtype"), PAIRS, ids=str)
def test_steps_against_float64_in_every_order(dtype, grad_dtype, dim):
    results = []
    for seed in SEEDS:
        with emulator.using(seed=seed):
            tables, pending, plain = group(dtype, grad_dtype, dim)
            before = [table.values() for table in tables]
            for _ in range(2):
                step(tables, pending)
        results.append([values for table in tables for values in table.values()])
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(bits(x), bits(y))

    for table, values, (rows, grads, options) in zip(tables, before, plain, strict=True):
        oracle = Oracle(values[0])
        for _ in range(2):
            oracle.step(rows, grads.double(), options.get("grad_scale", 1), options.get("mean"))
        param, exp_avg, exp_avg_sq = table.values()
        limit = 1e-14 if dtype == F64 else 1e-6
        assert relative_error(exp_avg, oracle.exp_avg) <= limit
        assert relative_error(exp_avg_sq, oracle.exp_avg_sq) <= limit
        if dtype.itemsize == 2:  # the second step begins with weights that were rounded
            assert relative_error(param, oracle.param) <= 2 * torch.finfo(dtype).eps
        else:
            assert relative_error(param, oracle.param) <= 2 * limit
        for old, new in zip(values, table.values(), strict=True):
            assert torch.equal(bits(old[-1]), bits(new[-1]))
        for slot in table.slots:
            assert not slot.value()[table.size :].any()
        assert table.t.item() == 2


@pytest.mark.parametrize(("dtype", "grad_dtype"), [p for p in PAIRS if p[0].itemsize == 2], ids=str)
def test_a_16_bit_step_is_the_rounded_one(dtype, grad_dtype):
    tables, pending, plain = group(dtype, grad_dtype, 12)
    oracles = [Oracle(table.values()[0]) for table in tables]
    step(tables, pending)
    for table, oracle, (rows, grads, options) in zip(tables, oracles, plain, strict=True):
        oracle.step(rows, grads.double(), options.get("grad_scale", 1), options.get("mean"))
        assert within_one_ulp(table.values()[0], oracle.param)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_every_setting_of_every_table(dtype):
    """Settings so far apart that none can stand for another, eps as large as the gradients."""
    settings = [(0.1, 0.5, 0.75, 0.25, 0.5), (0.2, 0.25, 0.875, 0.5, 0.125), (0.4, 0, 0, 1, 0)]
    tables = [Table(torch.randn(5, 3, dtype=dtype), 2, Hyperparams(*x)) for x in settings]
    oracles = [Oracle(t.values()[0], *x) for t, x in zip(tables, settings, strict=True)]
    for _ in range(3):
        rows, grads = torch.randint(0, 5, (8,)), torch.randn(8, 3, dtype=dtype)
        step(tables, [table.pending((rows, grads)) for table in tables])
        for oracle in oracles:
            oracle.step(rows, grads)
    limit = 1e-6 if dtype == F32 else 1e-14
    for table, oracle in zip(tables, oracles, strict=True):
        expected = (oracle.param, oracle.exp_avg, oracle.exp_avg_sq)
        for x, exact in zip(table.values(), expected, strict=True):
            assert relative_error(x, exact) <= limit


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_16_bit_numbers_are_rounded_to_nearest_even(dtype):
    """Sums of two: any bits, then halfway between two numbers, above an even one and an odd one."""
    pairs = torch.randint(-(2**15), 2**15, (2, 3000), dtype=torch.int16).view(dtype)
    odd = 1 + torch.finfo(dtype).eps * torch.arange(8)
    halves = torch.stack([odd, torch.full((8,), torch.finfo(dtype).eps / 2)]).to(dtype)
    pairs = torch.cat([pairs, halves, -halves], 1)
    count = pairs.shape[1]
    table = Table(torch.zeros(count, 1, dtype=dtype))
    _, sums = functional.coalesce(table.pending((torch.arange(count).repeat(2), pairs.view(-1, 1))))
    expected = (pairs[0].float() + pairs[1].float()).to(dtype)
    known = ~expected.isnan()
    assert torch.equal(bits(sums[known, 0]), bits(expected[known]))
    assert sums[~known].isnan().all()


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_nan_stays_nan(dtype):
    """The GPU's own NaN has all bits set; rounded like a number it would come out as -0."""
    nan = torch.tensor([[2**31 - 1], [-1]], dtype=torch.int32).view(F32)
    table = Table(torch.ones(2, 1, dtype=dtype))
    step([table], [table.pending(([0, 1], nan.double() if dtype == F64 else nan))])
    for values in table.values():
        assert values.isnan().all()


def integer_sums(lengths: list[int], dim: int = 1) -> None:
    """Coalesce runs of these lengths, rows in order, gradients whose every sum is exact."""
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    order = torch.randperm(rows.numel())
    grads = torch.randint(-9, 10, (rows.numel(), dim)).float()
    table = Table(torch.zeros(len(lengths) + 1, dim))
    touched, values = functional.coalesce(table.pending((rows[order], grads[order])))
    expected = torch.zeros(len(lengths), dim).index_add_(0, rows, grads)
    present = torch.tensor(lengths) > 0
    assert torch.equal(touched, torch.arange(len(lengths))[present])
    assert torch.equal(values, expected[present])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, *range(126, 131), *range(254, 259), 1300])
@pytest.mark.parametrize("offset", [0, 1, 5, 126, 127])
def test_runs_of_every_length_at_every_place(offset, length):
    """A run that begins anywhere in a tile, with a row before and a long run behind it."""
    integer_sums([offset, length, 2 * TILE + 3, 1])


def test_random_runs():
    generator = torch.Generator().manual_seed(3)
    for case in range(20):
        ends = [1, 3, 140, 500]
        lengths = [
            int(torch.randint(0, ends[(case + i) % 4] + 1, (), generator=generator))
            for i in range(12)
        ]
        integer_sums(lengths, dim=1 + 3 * (case % 2))


def test_eight_streams_of_chunks():
    """More chunks than streams, so that each stream adds several; all chunks differ."""
    integer_sums([3, 19 * TILE + 11, 8 * TILE, 9 * TILE, 16 * TILE])


@pytest.mark.parametrize("length", [TILE, TILE + 1, 2 * TILE, 2 * TILE + 1, 8 * TILE + 1])
@pytest.mark.parametrize("mean", [False, True])
def test_the_last_run_ends_with_the_gradients(length, mean):
    """Behind it there is nothing, or, in the other case, one dropped gradient."""
    for rows in ([1] * length, [1] * length + [MISSING]):
        grads = torch.randint(-9, 10, (len(rows), 2), dtype=F64)
        table = Table(torch.zeros(2, 2, dtype=F64))
        _, values = functional.coalesce(table.pending((rows, grads), drop_missing=True, mean=mean))
        total = grads[:length].sum(0, keepdim=True)
        assert torch.equal(values, total / length if mean else total)


@pytest.mark.parametrize("junk", [0, 1, TILE - 1, -1])
def test_scratch_memory_may_hold_anything(junk, monkeypatch):
    """Tiles in which no run begins, none but that of dropped gradients, or short ones alone."""
    rows = torch.cat([torch.tensor([0, 1]), torch.full((4 * TILE,), 2), torch.tensor([3, 3])])
    rows = torch.cat([rows, torch.full((3 * TILE,), MISSING)])
    grads = torch.randn(rows.numel(), 2)
    one, other = (Table(torch.ones(5, 2)) for _ in range(2))
    step([one], [one.pending((rows, grads), drop_missing=True)])
    empty = torch.empty

    def filled(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan if x.is_floating_point() else junk)

    monkeypatch.setattr(torch, "empty", filled)
    step([other], [other.pending((rows, grads), drop_missing=True)])
    for x, y in zip(one.values(), other.values(), strict=True):
        assert torch.equal(bits(x), bits(y))


@pytest.mark.parametrize("length", [TILE, 3 * TILE])
def test_sums_lose_nothing(length):
    """1 + tiny + tiny + ..., each of which float32 alone would round away."""
    tiny = 2.0**-25
    grads = torch.full((length, 1), tiny)
    grads[0] = 1.0
    table = Table(torch.zeros(3, 1))
    for values in (grads, grads.flip(0)):
        _, total = functional.coalesce(table.pending(([2] * length, values)))
        assert total.item() == pytest.approx(1.0 + (length - 1) * tiny, abs=2.0**-24)


def test_keys_beyond_32_bits():
    """Tables of 2**40 rows, as far as keys know: those of the second do not fit 32 bits."""
    tables = [Table(torch.randn(30, 3)) for _ in range(2)]
    expected = [Table(table.values()[0]) for table in tables]
    rows, grads = torch.randint(0, 30, (200,)), torch.randn(200, 3)
    step(
        tables,
        [t.pending((rows, grads), num_rows=2**40, row_count=torch.tensor([30])) for t in tables],
    )
    step(expected, [t.pending((rows, grads)) for t in expected])
    for ours, theirs in zip(tables, expected, strict=True):
        for x, y in zip(ours.values(), theirs.values(), strict=True):
            assert torch.equal(bits(x), bits(y))


def test_rows_beyond_4_gib():
    """Row numbers times bytes a row exceed 32 bits. Memory that nobody touches is not there."""
    size, dim = 2_200_000, 512
    row = size - 2
    pages = [
        torch.from_numpy(np.zeros((size, dim), dtype=kind))
        for kind in (np.float16, np.float32, np.float32)
    ]
    for tensor in pages:
        emulator.register(tensor)
    table = Table(torch.zeros(2, dim, dtype=F16))
    table.slots, table.size = [Slot.over("big", x) for x in pages], size
    grads = torch.randn(3, dim).half()
    step([table], [table.pending(([row, 1, row], grads))])
    oracle = Oracle(torch.zeros(3, dim))
    oracle.step([2, 1, 2], grads)
    assert relative_error(pages[1][row], oracle.exp_avg[2]) <= 1e-6
    assert relative_error(pages[1][1], oracle.exp_avg[1]) <= 1e-6
    values = functional.gather(table.slots[1], torch.tensor([row, 0]))
    assert torch.equal(values, torch.stack([pages[1][row], torch.zeros(dim)]))
    functional.scatter_(table.slots[0], torch.tensor([row + 1]), grads[:1])
    assert torch.equal(pages[0][row + 1], grads[0])


def rows_behind(first: int, values: torch.Tensor) -> Slot:
    """A slot of three blocks of 2**30 rows, of which memory is held for a few: ``first`` and on."""
    slot = Slot("big", values.shape[1], 2**30, values.dtype, values.device)
    for block in range(3):
        slot._append(values.clone() if block == first >> 30 else torch.zeros_like(values))
    slot._held = 3 * 2**30
    return slot


def test_row_numbers_beyond_32_bits():
    first = 2**31
    table = Table(torch.randn(4, 3))
    big = Table(table.values()[0])
    big.slots = [rows_behind(first, slot.value()[:4]) for slot in table.slots]
    rows, grads = torch.tensor([3, 0, 3]), torch.randn(3, 3)
    step([big], [big.pending((first + rows, grads), num_rows=3 * 2**30)])
    step([table], [table.pending((rows, grads))])
    for slot, values in zip(big.slots, table.values(), strict=True):
        assert torch.equal(bits(slot.values()[2]), bits(values))
        assert torch.equal(functional.gather(slot, first + rows), values[rows])
    functional.scatter_(big.slots[0], torch.tensor([first + 1]), grads[:1])
    assert torch.equal(big.slots[0].values()[2][1], grads[0])


@pytest.mark.parametrize("strides", [(2**30 + 1, 1), (1, 2**30 + 1)])
def test_gradients_whose_strides_exceed_32_bits(strides):
    """The third element is 2**31 + 2 elements behind the first. Few pages are ever touched."""
    shape = (3, 1) if strides[0] > 1 else (1, 3)
    memory = torch.from_numpy(np.zeros(2**31 + 3, dtype=np.float16))
    emulator.register(memory)
    grad = memory.as_strided(shape, strides)
    grad.copy_(torch.randn(shape))
    rows = torch.tensor([2, 0, 2][: shape[0]])
    one, other = (Table(torch.ones(3, shape[1], dtype=F16)) for _ in range(2))
    step([one], [one.pending((rows, grad))])
    step([other], [other.pending((rows, grad.contiguous()))])
    for x, y in zip(one.values(), other.values(), strict=True):
        assert torch.equal(bits(x), bits(y))


@pytest.mark.parametrize("num_rows", [2**31 - 1, 2**31])
def test_the_key_of_a_dropped_gradient_is_the_greatest(num_rows):
    """It is the number of rows of all tables: 2**31 of them need 64 bits."""
    table, other = Table(torch.ones(4, 2)), Table(torch.ones(4, 2))
    grads = torch.randn(3, 2)
    counted = {"num_rows": num_rows, "row_count": torch.tensor([4]), "drop_missing": True}
    step([table], [table.pending(([MISSING, 3, MISSING], grads), **counted)])
    step([other], [other.pending(([3], grads[1:2]))])
    assert torch.equal(bits(table.values()[0]), bits(other.values()[0]))


def test_a_row_count_on_the_device_is_the_limit():
    table = Table(torch.randn(10, 2))
    before = table.values()
    pending = table.pending(
        ([3, 4], torch.ones(2, 2)), num_rows=10, row_count=torch.tensor([4]), name="counted"
    )
    with pytest.raises(IndexError, match=r"table 'counted'.*row 4.*has 4 rows"):
        step([table], [pending])
    assert torch.equal(bits(table.values()[0][4:]), bits(before[0][4:]))
    assert not torch.equal(table.values()[0][3], before[0][3])


def test_rows_behind_what_a_slot_holds():
    """What a captured launch may find once the table has grown: keys and blocks have no room."""
    tables = [Table(torch.ones(4, 2)), Table(torch.ones(4, 2))]
    counted = {"num_rows": 4, "row_count": torch.tensor([9])}
    pending = [tables[0].pending(([4], torch.ones(1, 2)), **counted)]
    pending.append(tables[1].pending(([1], torch.ones(1, 2))))
    with pytest.raises(IndexError, match="names row 4, which the table did not have"):
        step(tables, pending)
    assert not tables[1].values()[1][0].any()
    slot = tables[0].slots[0]
    held = slot.num_rows()
    rows = torch.tensor([held - 1, held, held + 1, 2**40, 0])
    expected = torch.stack([slot.value()[-1], *torch.zeros(3, 2), slot.value()[0]])
    assert torch.equal(functional.gather(slot, rows), expected)


def test_misaligned_weights_take_the_narrow_path():
    """A weight that begins 4 bytes into an allocation: 16-byte accesses would be misaligned."""
    memory = torch.randn(1 + 6 * 8)
    weight = memory[1:].view(6, 8)
    table, plain = Table(weight.clone()), Table(weight.clone(), block_size=6)
    plain.slots[0] = Slot.over("narrowed", weight)
    rows, grads = [4, 1, 4], torch.randn(3, 8)
    for t in (table, plain):
        step([t], [t.pending((rows, grads))])
    assert torch.equal(bits(plain.values()[0]), bits(table.values()[0]))
    assert torch.equal(bits(plain.values()[2]), bits(table.values()[2]))


@pytest.mark.parametrize("dtype", [F32, F64, F16], ids=str)
def test_misaligned_gradients_take_the_narrow_path(dtype):
    """Rows of 8 that begin off 16 bytes: by their stride, by their first address, by both."""
    memory = torch.randn(40).to(dtype)
    wide = memory[:36].view(4, 9)
    for grad in (wide[:, :8], memory[1:33].view(4, 8), wide[:, 1:]):
        one, other = (Table(torch.ones(3, 8, dtype=dtype)) for _ in range(2))
        step([one], [one.pending(([2, 0, 2, 2], grad))])
        step([other], [other.pending(([2, 0, 2, 2], grad.clone()))])
        for x, y in zip(one.values(), other.values(), strict=True):
            assert torch.equal(bits(x), bits(y))


def test_rows_move_between_misaligned_places():
    memory, values = torch.randn(1 + 3 * 4), torch.randn(1 + 2 * 4)
    weight, given = memory[1:].view(3, 4), values[1:].view(2, 4)
    slot = Slot.over("narrowed", weight)
    assert torch.equal(functional.gather(slot, torch.tensor([2, 0])), weight[[2, 0]])
    functional.scatter_(slot, torch.tensor([0, 1]), given)
    assert torch.equal(weight[:2], given)
    slot = slot_of(torch.zeros(3, 4), 3)
    functional.scatter_(slot, torch.tensor([0, 2]), given)
    assert torch.equal(slot.value()[[0, 2]], given)


# ---------------------------------------------------------------------- launches and waits


def tables_of_one_kind(count: int) -> tuple[SparseAdamW, list[torch.nn.Embedding]]:
    embeddings = [torch.nn.Embedding(5 + i % 7, 4, sparse=True) for i in range(count)]
    return SparseAdamW({f"e{i}": e for i, e in enumerate(embeddings)}), embeddings


@pytest.mark.parametrize("count", [1, 10, 300])
def test_launches_do_not_count_tables(count):
    optimizer, embeddings = tables_of_one_kind(count)
    sum(e(torch.tensor([1, 3, 1])).sum() for e in embeddings).backward()
    optimizer.step()
    emulator.launches.clear()
    optimizer.step()
    assert [x.kernel for x in emulator.launches] == [
        "make_keys_32",
        "advance_float",
        "update",
        "finish",
    ]


def test_each_of_many_tables_is_updated():
    """More tables than threads in a block, each with a count of steps of its own."""
    size = 300
    tables = [Table(torch.randn(2, 1, dtype=F64)) for _ in range(size)]
    oracles = [Oracle(table.values()[0]) for table in tables]
    for i, table in enumerate(tables):
        table.t += i
    grads = torch.randn(size, 1, dtype=F64)
    pending = [table.pending(([1], grads[i : i + 1])) for i, table in enumerate(tables)]
    step(tables, pending)
    for i, (table, oracle) in enumerate(zip(tables, oracles, strict=True)):
        oracle.t = i
        oracle.step([1], grads[i : i + 1])
        assert table.t.item() == i + 1
        assert relative_error(table.values()[0], oracle.param) <= 1e-14
    pending[200] = tables[200].pending(([2], grads[:1]), name="t200")
    with pytest.raises(IndexError, match="table 't200': a gradient names row 2,"):
        step(tables, pending)


def test_a_lookup_is_three_launches():
    table = HashTable([4], initializer=NormalInitializer())
    ids = torch.arange(50)
    table(ids)
    emulator.launches.clear()
    table(ids + 20)
    kernels = [x.kernel for x in emulator.launches if x.kernel != "insert"]  # growth's
    assert kernels[-3:] == ["find_or_claim", "settle", "gather"]
    table.eval()
    emulator.launches.clear()
    table(ids)
    assert [x.kernel for x in emulator.launches] == ["find", "gather"]


class NoWaits(TorchFunctionMode):
    """Refuses what would make the host wait for a GPU; the emulator's own code may."""

    WAITS = frozenset((
        "item", "tolist", "cpu", "numpy", "nonzero", "unique", "unique_consecutive", "equal",
        "allclose", "masked_select", "argwhere", "synchronize", "bincount",
        "__bool__", "__int__", "__float__", "__index__", "__contains__",
    ))  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith("emulator"):
            masks = [
                x
                for index in args[1:2]
                for x in (index if isinstance(index, tuple) else (index,))
                if isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
            ]
            by_mask = name in ("__getitem__", "__setitem__", "index_put_", "index_put") and masks
            assert name not in self.WAITS, f"{caller} waits in {name}"
            assert not by_mask, f"{caller} indexes by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.nonzero(x),
        lambda x: bool(x.any()),
        lambda x: int(x[0]),
        lambda x: float(x[0]),
        lambda x: 1 if x.any() else 0,
        lambda x: x.unique(),
        lambda x: x.numpy(),
        lambda x: [1, 2, 3][x[0].long()],
        lambda x: x.masked_fill_(x > 0, 0) and torch.masked_select(x, x > 0),
    ],
)
def test_the_trap_catches_a_wait(wait):
    x = torch.ones(2)
    with NoWaits(), pytest.raises(AssertionError, match=r"waits in|by a mask"):
        wait(x)


def test_nothing_on_the_steps_path_waits(monkeypatch):
    """Lookup, backward, step."""
    monkeypatch.setattr(
        emulator.interop.HostCopy, "values", lambda copy: pytest.fail("waits for a copy")
    )
    table = HashTable([6], initializer=NormalInitializer(), block_size=16)
    by_id = HashTable([6], dtype=BF16, grad_reduce_by="id")
    embedding = torch.nn.Embedding(20, 6, sparse=True)
    bag = torch.nn.EmbeddingBag(20, 4, sparse=True, mode="sum")
    optimizer = SparseAdamW({"t": table, "i": by_id, "e": embedding, "b": bag})
    for t in (table, by_id):
        t.reserve(1000)

    def train(ids):
        y = table(ids) + by_id(ids).float() + embedding(ids % 20) + bag(ids % 20).sum()
        y.pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    with emulator.using(copies_complete=False):
        train(torch.arange(30).view(5, 6))  # moments appear; they may be allocated, not waited for
        with NoWaits():
            train(torch.arange(10, 40).view(5, 6))
            train(torch.randint(0, 40, (5, 6)))
            table.eval()
            table(torch.arange(1000))
    assert len(table) == 40


# ---------------------------------------------------------------------- rows out of range


def test_a_row_out_of_range_is_raised_when_the_copy_has_come():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    good = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = SparseAdamW({"good": good, "bad": embedding})

    def give(row):
        for e, r in ((good, 1), (embedding, row)):
            e.weight.grad = torch.sparse_coo_tensor(
                torch.tensor([[r, 2]]), torch.ones(2, 2), (4, 2), check_invariants=False
            )

    give(7)
    before = embedding.weight.detach().clone()
    with emulator.using(copies_complete=False):
        optimizer.step()
        give(1)
        optimizer.step()  # the first report is not there yet
    assert torch.equal(embedding.weight[[0, 3]], before[[0, 3]])
    with pytest.raises(IndexError, match=r"table 'bad': a gradient names row 7.*has 4 rows"):
        optimizer.step()
    optimizer.step()
    assert optimizer.state_dict()["state"]["bad"]["step"] == 3

    give(-1)
    optimizer.step()
    with pytest.raises(IndexError, match=r"table 'bad': a gradient names row -1"):
        optimizer.state_dict()
    assert optimizer.state_dict()["state"]["good"]["step"] == 4


def test_of_many_rows_out_of_range_one_is_noted():
    """The one that was first, in whatever order threads run; and the first fault stays."""
    rows = torch.tensor([-5, 1, 99, MISSING, 6] * 100)
    for seed in SEEDS:
        with emulator.using(seed=seed):
            table, fault = Table(torch.zeros(6, 2)), torch.zeros(2, dtype=torch.int64)
            options = {"drop_missing": True, "fault": fault}
            for batch in (rows, torch.full((500,), -7)):
                with pytest.raises(IndexError, match=r"row (-5|99|6),"):
                    step([table], [table.pending((batch, torch.ones(500, 2)), **options)])
                assert fault.tolist() in ([1, -5], [1, 99], [1, 6])


def test_rows_below_missing_are_never_dropped():
    for drop_missing in (True, False):
        table = Table(torch.zeros(6, 2))
        pending = table.pending(([-2], torch.ones(1, 2)), drop_missing=drop_missing)
        with pytest.raises(IndexError, match="row -2,"):
            step([table], [pending])


def test_row_0_of_an_empty_table_is_out_of_range():
    table = Table(torch.zeros(2, 2))
    counted = {"num_rows": 2, "row_count": torch.tensor([0])}
    with pytest.raises(IndexError, match="row 0, but the table has 0 rows"):
        step([table], [table.pending(([0], torch.ones(1, 2)), **counted)])
    assert not table.values()[1].any()


# ---------------------------------------------------------------------- graph capture


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01), torch.tensor(0.01, dtype=F64)], ids=str)
def test_replays_are_eager_steps(lr, monkeypatch):
    """K replays of a captured step equal K steps, bit for bit; an lr tensor is followed."""
    # As if it were on a GPU, where the host does not read it.
    monkeypatch.setattr(_checks, "require_lr", lambda lr: lr)

    def model():
        torch.manual_seed(0)
        table = HashTable([5], initializer=NormalInitializer())
        embeddings = [torch.nn.Embedding(6, d, sparse=True) for d in (5, 4, 4)]
        rate = lr.clone() if isinstance(lr, torch.Tensor) else lr
        names = {f"e{i}": e for i, e in enumerate(embeddings)}
        optimizer = SparseAdamW({"t": table, **names}, lr=rate)
        return table, embeddings, optimizer, rate

    def backward(table, embeddings):
        ids = torch.tensor([1, 4, 4, 2])
        loss = table(ids).pow(2).sum() + sum(e(ids).pow(2).sum() for e in embeddings)
        loss.backward()

    results = []
    for captured in (False, True):
        table, embeddings, optimizer, rate = model()
        backward(table, embeddings)
        optimizer.step()
        graph = None
        if captured:
            before = [e.weight.detach().clone() for e in embeddings]
            with emulator.capture() as graph:
                optimizer.step()
            assert all(torch.equal(e.weight, x) for e, x in zip(embeddings, before, strict=True))
        for k in range(4):
            if isinstance(rate, torch.Tensor):
                rate.fill_(0.01 / (k + 1))
            graph.replay() if graph else optimizer.step()
        saved = optimizer.state_dict()["state"]
        assert all(state["step"] == 5 for state in saved.values())
        results.append(
            [table.embeddings(), *(e.weight for e in embeddings)]
            + [state[key] for state in saved.values() for key in ("exp_avg", "exp_avg_sq")]
        )
    for x, y in zip(*results, strict=True):
        assert torch.equal(bits(x), bits(y))


def test_a_captured_step_with_many_tables_holds_its_own_descriptors():
    """More words than one launch takes by value."""
    optimizer, embeddings = tables_of_one_kind(60)
    sum(e(torch.tensor([1, 3, 1])).sum() for e in embeddings).backward()
    optimizer.step()
    emulator.launches.clear()
    with emulator.capture() as graph:
        optimizer.step()
    assert sum(x.kernel == "store_words" for x in emulator.launches) >= 3
    weights = [e.weight.detach().clone() for e in embeddings]
    graph.replay()
    for e, before in zip(embeddings, weights, strict=True):
        changed = (e.weight != before).any(1)
        assert changed.tolist() == [i in (1, 3) for i in range(before.shape[0])]


def test_replays_report_rows_out_of_range():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = SparseAdamW({"e": embedding})
    indices = torch.tensor([[1]])
    embedding.weight.grad = torch.sparse_coo_tensor(
        indices, torch.ones(1, 2), (4, 2), check_invariants=False
    )
    optimizer.step()
    with emulator.capture() as graph:
        optimizer.step()
    graph.replay()
    embedding.weight.grad._indices().fill_(9)
    graph.replay()
    embedding.weight.grad._indices().fill_(1)
    graph.replay()
    optimizer.step()  # collects what replays noted
    with pytest.raises(IndexError, match="table 'e': a gradient names row 9"):
        optimizer.step()
    optimizer.step()


def test_what_cannot_be_captured_says_so():
    table = HashTable([4])
    optimizer = SparseAdamW({"t": table})
    table(torch.tensor([1, 2])).sum().backward()
    with emulator.using(capturing=True):
        with pytest.raises(RuntimeError, match=r"'t'.*run one step before capturing"):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"cannot be captured.*eval mode"):
            table(torch.tensor([3]))
        with pytest.raises(RuntimeError, match="has grown or is new since the last"):
            functional.gather(Slot("new", 2, 4, F32, torch.device("cpu")), torch.tensor([MISSING]))
        table(torch.tensor([1, 2, 9]), AdmitHook("ReadOnly"))


def test_a_replay_knows_the_rows_of_its_capture_only():
    """Rows that a table got since would have the keys of the next table's: they are reported."""

    def normal(name):
        return HashTable([4], 16, initializer=NormalInitializer(), name=name)

    tables = [normal("a"), normal("b")]
    optimizer = SparseAdamW({t.name: t for t in tables}, lr=0.1)
    read_only, ids = AdmitHook("ReadOnly"), torch.arange(10)
    for table in tables:
        table.reserve(500)

    def backward():
        sum(table(ids, read_only).pow(2).sum() for table in tables).backward()

    for table in tables:
        table(torch.arange(10))
    for _ in range(2):
        backward()
        optimizer.step()
        optimizer.zero_grad()
    with emulator.capture() as graph:
        backward()
        optimizer.step()
    graph.replay()
    tables[0](torch.arange(10, 400))  # memory was held, so nothing grows
    before = tables[1].embeddings()
    ids += 380
    graph.replay()
    assert torch.equal(tables[1].embeddings(), before)
    with pytest.raises(IndexError, match="table 'a': a step captured in a CUDA graph names row"):
        optimizer.state_dict()


def test_a_capture_asks_after_no_copy():
    """The number of rows is on its way when the step is captured, as it is after most lookups."""
    table = HashTable([4], 16, initializer=NormalInitializer())
    optimizer = SparseAdamW({"t": table}, lr=0.1)
    table(torch.arange(10)).sum().backward()
    optimizer.step()
    table._store._bound.send_copy()
    with emulator.capture() as graph:  # HostCopy.ready raises here
        optimizer.step()
    graph.replay()
    assert optimizer.state_dict()["state"]["t"]["step"] == 2


def test_what_a_graph_reads_stays_when_the_table_changes():
    table = HashTable([4], 16, initializer=NormalInitializer())
    table(torch.arange(10))
    read_only = AdmitHook("ReadOnly")
    ids = torch.arange(10)
    with torch.no_grad():
        table(ids, read_only)
        with emulator.capture() as graph:
            out = table(ids, read_only)
    graph.replay()
    expected = out.clone()
    kept = importlib.import_module("cupy_sparse_adamw.engines.emulated._group")._kept_for_graphs
    store = table._store
    assert any(x is store._index.entries for x in kept)
    assert any(isinstance(x, tuple) and x[0] is store.embedding.block_table() for x in kept)
    with pytest.warns(UserWarning, match="captured in a CUDA graph grows, or is replaced"):
        table(torch.arange(10, 1000))
    graph.replay()
    assert torch.equal(out, expected)
    table.clear()
    graph.replay()  # of memory that is still there
    assert torch.equal(out, expected)


def test_a_kernel_that_is_not_loaded_breaks_no_capture():
    table = Table(torch.randn(4, 6))
    grads = torch.randn(2, 6)
    step([table], [table.pending(([1, 2], grads))])
    compiled = importlib.import_module("cupy_sparse_adamw.engines.emulated._compile")
    compiled._function.cache_clear()
    with (
        emulator.using(capturing=True),
        pytest.raises(RuntimeError, match=r"kernel store_words.*not loaded yet.*run one such step"),
    ):
        step([table], [table.pending(([1, 2], grads))])


# ---------------------------------------------------------------------- hash tables


def trained(seed: int, engine: str = "emulated", dtype=F32, dim=5, **options):
    """A table after steps with new and known ids, duplicates and growth: id -> [row, m, v]."""
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(1)
    with functional.use_engine(engine), emulator.using(seed=seed):
        initializer = NormalInitializer(generator=torch.Generator().manual_seed(2))
        table = HashTable([dim], 8, dtype, initializer=initializer, **options)
        optimizer = SparseAdamW({"t": table}, lr=0.05)
        for size in (3, 40, 300, 300):
            ids = torch.randint(-size, size, (2 * size,), generator=generator) * 2**33
            table(ids).float().pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state_dict()["state"]["t"]
        columns = [table.embeddings(), state["exp_avg"], state["exp_avg_sq"]]
        assert torch.equal(state["ids"], table.ids())
        order = table.ids().argsort()
        return table.ids()[order], [x[order] for x in columns]


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_training_does_not_depend_on_the_order_of_threads(dtype):
    ids, values = trained(0, dtype=dtype)
    for seed in (1, 2, 3):
        other_ids, others = trained(seed, dtype=dtype)
        assert torch.equal(ids, other_ids)
        for x, y in zip(values, others, strict=True):
            assert torch.equal(bits(x), bits(y))


@pytest.mark.parametrize(("dtype", "limit"), [(F32, 2e-6), (F64, 1e-12), (F16, 2e-3), (BF16, 2e-2)])
def test_training_agrees_with_the_cpu_engine(dtype, limit):
    for options in ({}, {"grad_reduce_by": "id"}):
        ids, values = trained(0, dtype=dtype, **options)
        cpu_ids, expected = trained(0, "cpu", dtype=dtype, **options)
        assert torch.equal(ids, cpu_ids)
        for x, y in zip(values, expected, strict=True):
            assert relative_error(x, y.double().numpy()) <= limit


def test_many_threads_claim_few_ids():
    """The claims of one launch, hundreds of threads for each id, in many orders."""
    ids = torch.randint(0, 40, (700,)) * 2**20
    for seed in range(6):
        with emulator.using(seed=seed):
            table = HashTable([3], 16, initializer=NormalInitializer(), name="claims")
            table.reserve(64)
            rows = table._store.find_or_insert(ids)
            by_id = dict(zip(ids.tolist(), rows.tolist(), strict=True))
            assert all(by_id[i] == r for i, r in zip(ids.tolist(), rows.tolist(), strict=True))
            assert sorted(by_id.values()) == list(range(len(by_id)))
            assert table._store._index.counters.tolist() == [len(by_id), 0, 0]
            assert [by_id[i] for i in table.ids().tolist()] == list(range(len(by_id)))
            assert torch.equal(table._store.find(ids), rows)


def test_an_index_that_is_nearly_full_wraps_around():
    """Searches run over the end of the index, past entries that others claim meanwhile."""
    for seed in SEEDS:
        with emulator.using(seed=seed):
            entries = torch.full((64, 2), MISSING)
            index = RowIndex(entries, torch.zeros(3, dtype=torch.int64), torch.empty(0).long())
            slots = [Slot("ids", 1, 64, torch.int64, torch.device("cpu"))]
            slots.append(Slot("x", 2, 64, F32, torch.device("cpu")))
            for slot in slots:
                slot.reserve(64)
            ids = torch.randint(-(2**62), 2**62, (60,)).repeat(3)[torch.randperm(180)]
            distribution = NormalInitializer().distribution(2, 2)
            rows = functional.find_or_insert_(index, ids, *slots, 3, distribution)
            assert int(index.counters[0]) == 60
            assert sorted(set(rows.tolist())) == list(range(60))
            assert torch.equal(functional.find(entries, ids), rows)
            assert functional.find(entries, ids + 1).tolist() == [MISSING] * 180
            assert torch.equal(functional.gather(slots[0], rows).flatten(), ids)
            again = functional.find_or_insert_(index, ids, *slots, 3, distribution)
            assert torch.equal(again, rows)
            copy = torch.full((128, 2), MISSING)
            functional.insert_(copy, ids.unique(), functional.find(entries, ids.unique()))
            assert torch.equal(functional.find(copy, ids), rows)


def test_an_index_is_the_same_on_every_engine():
    """What the CPU engine entered is found, and the other way round, wherever searches begin."""
    ids = torch.cat([torch.arange(-40, 40), torch.arange(1, 40) << 40, torch.tensor([2**63 - 1])])
    rows = torch.randperm(ids.numel())
    for writer, reader in (("cpu", "emulated"), ("emulated", "cpu")):
        entries = torch.full((256, 2), MISSING)
        with functional.use_engine(writer):
            functional.insert_(entries, ids, rows)
        with functional.use_engine(reader):
            assert torch.equal(functional.find(entries, ids), rows)


@pytest.mark.parametrize("dim", [33, 64, 130, 1000])
@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=str)
def test_rows_of_more_units_than_threads(dtype, dim):
    """Gathered, scattered, and read as zeros where there is no row."""
    values = torch.randn(9, dim).to(dtype)
    slot = slot_of(values, 4)
    rows = torch.tensor([8, MISSING, 0, 3, 8])
    expected = values[rows]
    expected[1] = 0
    assert torch.equal(bits(functional.gather(slot, rows)), bits(expected))
    new = torch.randn(3, dim).to(dtype)
    functional.scatter_(slot, torch.tensor([7, 2, 7]), new)
    values[2], values[7] = new[1], new[2]
    assert torch.equal(bits(slot.value()[:9]), bits(values))


@pytest.mark.parametrize("dim", [1, 6, 130])
@pytest.mark.parametrize("name", CASES)
def test_initial_values_are_those_of_the_reference(name, dim):
    """To the accuracy of two good quantile functions, in every part of the distribution."""
    ids = torch.cat([torch.tensor(ANY_IDS), torch.arange(1200 // dim)])
    values = [
        draw(functional.load_engine(engine), CASES[name], ids, dim)
        for engine in ("emulated", "reference")
    ]
    _, loc, scale, low, high = CASES[name].distribution(16, 64)
    size = abs(loc) + scale or high - low
    torch.testing.assert_close(*values, rtol=0, atol=1e-13 * size)


def test_growing_moves_no_row():
    table = HashTable([4], 8, initializer=NormalInitializer())
    table(torch.arange(30))
    values, addresses = table.embeddings(), table._store.embedding.addresses().tolist()
    ids = table.ids()
    table(torch.arange(2000))
    assert table._store.embedding.addresses().tolist()[: len(addresses)] == addresses
    assert torch.equal(table.embeddings()[:30], values)
    assert torch.equal(table.ids()[:30], ids)
    assert len(table) == 2000


def test_a_full_table_resumes_bitwise_in_other_rows():
    """Saved, loaded in another order of threads, trained on: as if never stopped."""

    def model(seed):
        initializer = NormalInitializer(generator=torch.Generator().manual_seed(2))
        table = HashTable([4], 8, initializer=initializer)
        with emulator.using(seed=seed):
            table(torch.arange(-20, 20))
        return table, SparseAdamW({"t": table}, lr=0.1)

    def train(table, optimizer, batches):
        for i in batches:
            table(torch.tensor([i, 3, 3, -i, 100 + i])).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    table, optimizer = model(0)
    train(table, optimizer, range(3))
    saved = table.state_dict(), optimizer.state_dict()
    train(table, optimizer, range(3, 6))
    other, other_optimizer = model(9)
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    train(other, other_optimizer, range(3, 6))
    ids = table.ids()
    table.eval(), other.eval()
    assert torch.equal(bits(table(ids)), bits(other(ids)))
