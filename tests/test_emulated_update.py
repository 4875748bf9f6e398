"""Whole steps of the CUDA engine on the emulator, in every order of threads.

Kernels run checked (tests/emulator), so each case also says that no access is out of bounds or
misaligned, that there are no races, and that every barrier is met by all.
"""

from __future__ import annotations

import itertools

import emulator
import numpy as np
import pytest
import torch
from oracle import Oracle, bits, hot_batch, relative_error, slot_of, within_one_ulp
from test_update import Table, step

from cupy_sparse_adamw import functional
from cupy_sparse_adamw._slots import Slot
from cupy_sparse_adamw._types import MISSING, Hyperparams

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("emulated")]

SEEDS = [0, 1, 2]
TILE = 128  # sparse_adamw.cu
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
#: Every pair of a table's dtype and its gradients'.
PAIRS = [(F32, F32), (F64, F64), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)]


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
        rows = hot_batch(size, counts)
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


def test_streams_of_chunks():
    """More chunks than the 32 streams, so that each adds several; all chunks differ."""
    integer_sums([3, 67 * TILE + 11, 8 * TILE, 9 * TILE, 32 * TILE, 33 * TILE])


@pytest.mark.parametrize("dim", [40, 132])
def test_long_runs_of_wide_rows(dim):
    """More columns than a warp takes at a time, and chunks for a second warp."""
    for seed in SEEDS:
        with emulator.using(seed=seed):
            integer_sums([5, 11 * TILE, 0, 2 * TILE + 1], dim)


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


def coalesced_group(dtype, dim, coalesced):
    """Three tables, each with one gradient of rows that ascend: the tables, and what is pending.

    As many rows as a few tiles hold, none, and so many that a tile has those of two tables.
    """
    torch.manual_seed(dim)
    tables, pending = [], []
    for size, count in ((900, 3 * TILE + 7), (5, 0), (400, 150)):
        table = Table(torch.randn(size, dim).to(dtype), 64)
        rows = torch.randperm(size)[:count].sort().values
        grads = torch.randn(count, dim).to(dtype)
        tables.append(table)
        pending.append(table.pending((rows, grads), coalesced=coalesced, grad_scale=0.5))
    return tables, pending


@pytest.mark.parametrize("dim", [1, 4, 33])
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_coalesced_gradients_are_not_sorted(dtype, dim, monkeypatch):
    """The same bits as if they were, in every order of threads."""
    expected, pending = coalesced_group(dtype, dim, coalesced=False)
    step(expected, pending)
    monkeypatch.setattr(torch, "sort", None)
    for seed in SEEDS:
        with emulator.using(seed=seed):
            tables, pending = coalesced_group(dtype, dim, coalesced=True)
            step(tables, pending)
        for ours, theirs in zip(tables, expected, strict=True):
            for x, y in zip(ours.values(), theirs.values(), strict=True):
                assert torch.equal(bits(x), bits(y))


def test_sums_of_coalesced_gradients():
    _, (first, *_) = coalesced_group(F32, 4, coalesced=True)
    rows, values = functional.coalesce(first)
    assert torch.equal(rows, first.pieces[0].rows)
    assert torch.equal(values, first.pieces[0].grad * 0.5)


@pytest.mark.parametrize("bad", [[], [-3], [-1, 3], [5], [5, 9], [-7, -2, 5, 2**40]], ids=str)
def test_coalesced_rows_out_of_range_part_nothing(bad):
    """The key of a dropped gradient is greater than all, and stands between others here."""
    rows = torch.tensor([r for r in bad if r < 0] + [0, 2, 4] + [r for r in bad if r >= 5])
    if 3 in bad:
        rows = torch.tensor([-1, 0, 2, 3, 4])
    grads = torch.randn(rows.numel(), 3)
    tables = [Table(torch.ones(5, 3)) for _ in range(3)]
    oracles = [Oracle(table.values()[0]) for table in tables]
    pending = [
        table.pending((rows, grads), coalesced=True, name=f"t{i}") for i, table in enumerate(tables)
    ]
    if any(not 0 <= r < 5 for r in rows.tolist()):
        with pytest.raises(IndexError, match="table 't0': a gradient names row"):
            step(tables, pending)
    else:
        step(tables, pending)
    kept = (rows >= 0) & (rows < 5)
    for table, oracle in zip(tables, oracles, strict=True):
        oracle.step(rows[kept], grads[kept])
        for x, exact in zip(
            table.values(), (oracle.param, oracle.exp_avg, oracle.exp_avg_sq), strict=True
        ):
            assert relative_error(x, exact) <= 2e-6


@pytest.mark.parametrize("case", ["two pieces", "a table that is not"])
def test_what_is_not_all_coalesced_is_sorted(case):
    rows, grads = torch.tensor([0, 2, 4]), torch.randn(3, 2)
    tables = [Table(torch.ones(5, 2)) for _ in range(2)]
    first = [(rows, grads)] * (2 if case == "two pieces" else 1)
    pending = [
        tables[0].pending(*first, coalesced=True),
        tables[1].pending((rows.flip(0), grads), coalesced=case == "two pieces"),
    ]
    if case == "two pieces":
        pending[1] = tables[1].pending((rows, grads.flip(0)), coalesced=True)
    oracles = [Oracle(table.values()[0]) for table in tables]
    step(tables, pending)
    oracles[0].step(rows.repeat(len(first)), grads.repeat(len(first), 1))
    oracles[1].step(rows.flip(0), grads)
    for table, oracle in zip(tables, oracles, strict=True):
        assert relative_error(table.values()[0], oracle.param) <= 2e-6


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
        slab = values.clone() if block == first >> 30 else torch.zeros_like(values)
        slot._memory.append(slab[:, None])
    slot._memory.rows = 3 * 2**30
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
    """Rows off 16 bytes: by their stride, by their first address, by both, by their width alone."""
    memory = torch.randn(40).to(dtype)
    wide, even = memory[:36].view(4, 9), memory[:32].view(4, 8)
    for grad in (wide[:, :8], memory[1:33].view(4, 8), wide[:, 1:], even[:, :7]):
        one, other = (Table(torch.ones(3, grad.shape[1], dtype=dtype)) for _ in range(2))
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
