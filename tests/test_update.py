"""Every operation on gradients, on every engine, on the same cases."""

from __future__ import annotations

import gc
import math
from array import array

import numpy as np
import pytest
import torch
from oracle import (
    DTYPES,
    TOLERANCE,
    Oracle,
    bits,
    moments_of,
    relative_error,
    slot_of,
    within_one_ulp,
)

from cupy_sparse_adamw import functional
from cupy_sparse_adamw._types import (
    MISSING,
    MOMENT_DTYPE,
    Hyperparams,
    Pending,
    PendingGrad,
    Update,
)

#: Engines that skip a row out of range, and say so in the report of the step.
REPORT_LATE = {"cuda", "emulated"}

HYPER = Hyperparams(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2)


class Table:
    """A table in slots, stepped through ``functional`` as the optimizer does."""

    def __init__(self, values: torch.Tensor, block_size: int = 5, hyper: Hyperparams = HYPER):
        zeros = torch.zeros(values.shape, dtype=MOMENT_DTYPE[values.dtype])
        self.size = values.shape[0]
        self.slots = [slot_of(values, block_size), *moments_of(zeros, zeros, block_size)]
        self.hyper, self.t = hyper, torch.tensor(0)

    def pending(self, *pieces, **options) -> Pending:
        return Pending(
            options.pop("name", "table"),
            self.slots[0],
            options.pop("num_rows", self.size),
            [PendingGrad(torch.as_tensor(rows), grads) for rows, grads in pieces],
            **options,
        )

    def values(self) -> list[torch.Tensor]:
        """Copies of weights, exp_avg, exp_avg_sq, each [R, D]."""
        return [slot.value()[: self.size].clone() for slot in self.slots]


def step(tables: list[Table], pending: list[Pending]) -> None:
    """One update, then whatever its reports say is raised."""
    segments = functional.segment(pending)
    updates = [
        Update(gradients, *table.slots[1:], table.t, table.hyper)
        for table, gradients in zip(tables, pending, strict=True)
    ]
    for report in functional.prepare_sparse_adamw(updates, segments)():
        if error := report.error():
            assert report.ready()
            raise error


def test_by_hand(engine):
    """One element, worked out on paper: beta1 = 0.5, beta2 = 0.75, lr = 0.1, decay 0.5, eps 0.

    t = 1, gradients 1 and 2 of row 1: g = 3, m = 1.5, v = 9/4, m^ = 3, v^ = 9,
    w = 1 - 0.1 (3/3 + 0.5) = 0.85. t = 2, g = -1: m = 0.25, v = 31/16, m^ = 1/3, v^ = 31/7.
    """
    hyper = Hyperparams(0.1, 0.5, 0.75, 0.0, 0.5)
    table = Table(torch.ones(3, 1, dtype=torch.float64), 2, hyper)
    step([table], [table.pending(([1, 1], torch.tensor([[1.0], [2.0]], dtype=torch.float64)))])
    param, exp_avg, exp_avg_sq = table.values()
    assert exp_avg.flatten().tolist() == [0.0, 1.5, 0.0]
    assert exp_avg_sq.flatten().tolist() == [0.0, 2.25, 0.0]
    assert param.flatten().tolist() == pytest.approx([1.0, 0.85, 1.0], abs=1e-15)
    assert table.t.item() == 1

    step([table], [table.pending(([1], torch.tensor([[-1.0]], dtype=torch.float64)))])
    param, exp_avg, exp_avg_sq = table.values()
    assert exp_avg[1].item() == 0.25
    assert exp_avg_sq[1].item() == 31 / 16
    expected = 0.85 - 0.1 * ((1 / 3) / math.sqrt(31 / 7) + 0.5 * 0.85)
    assert param[1].item() == pytest.approx(expected, abs=1e-15)
    assert param[0].item() == param[2].item() == 1.0
    assert table.t.item() == 2


@pytest.mark.parametrize("dim", [1, 3, 17, 64, 130])  # 1 and 3: no vector; 17, 130: a tail
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hundred_steps_against_float64(engine, dtype, dim):
    torch.manual_seed(dim)
    table = Table(torch.randn(23, dim).to(dtype))
    oracle = Oracle(table.values()[0])
    for i in range(100 if dtype.itemsize > 2 else 1):
        rows = torch.randint(0, 20, (0 if i == 50 else 31,))  # rows 20 to 22 are never touched
        grads = torch.randn(rows.numel(), dim).to(dtype)
        step([table], [table.pending((rows, grads))])
        oracle.step(rows, grads.double())
    param, exp_avg, exp_avg_sq = table.values()
    param_tolerance, moment_tolerance = TOLERANCE[dtype]
    assert relative_error(exp_avg, oracle.exp_avg) <= moment_tolerance
    assert relative_error(exp_avg_sq, oracle.exp_avg_sq) <= moment_tolerance
    if param_tolerance is None:
        assert within_one_ulp(param, oracle.param)
    else:
        assert relative_error(param, oracle.param) <= param_tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_rows_touched_is_torch_adamw(engine, dtype):
    table = Table(torch.randn(11, 7, dtype=dtype))
    weight = torch.nn.Parameter(table.values()[0])
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=1e-2)
    for _ in range(100):
        weight.grad = torch.randn_like(weight)
        step([table], [table.pending((torch.arange(11), weight.grad))])
        optimizer.step()
    limit = 4e-6 if dtype == torch.float32 else 1e-12
    state = optimizer.state[weight]
    expected = [weight.detach(), state["exp_avg"], state["exp_avg_sq"]]
    for ours, theirs in zip(table.values(), expected, strict=True):
        assert relative_error(ours, theirs.double().numpy()) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_untouched_rows_keep_every_bit(engine, dtype):
    values = torch.randn(40, 3).to(dtype)
    values[:, 0], values[30, 1], values[31, 1] = -0.0, torch.nan, torch.inf
    table = Table(values)
    step([table], [table.pending((torch.arange(40), torch.randn(40, 3).to(dtype)))])
    before = table.values()
    step([table], [table.pending(([4, 9, 4], torch.randn(3, 3).to(dtype)))])
    untouched = [row for row in range(40) if row not in (4, 9)]
    for old, new in zip(before, table.values(), strict=True):
        assert torch.equal(bits(old[untouched]), bits(new[untouched]))
        assert not torch.equal(old[[4, 9]], new[[4, 9]])


def test_many_tables_in_one_step(engine):
    """Other widths, dtypes, settings and counts of steps: each table is on its own."""
    cases = [(30, 4, torch.float32), (1, 4, torch.float32), (9, 4, torch.float64)]
    cases += [(50, 6, torch.float32), (7, 4, torch.float32)]
    hypers = [
        HYPER._replace(lr=10**-i, beta1=0.8 + 0.03 * i, weight_decay=0.1 * i) for i in range(5)
    ]
    tables, oracles = [], []
    for (size, dim, dtype), hyper in zip(cases, hypers, strict=True):
        tables.append(Table(torch.randn(size, dim, dtype=dtype), 3, hyper))
        oracles.append(Oracle(tables[-1].values()[0], *hyper[:5]))
    for i in range(20):
        chosen = [n for n in range(5) if (i + n) % 3]  # counts of steps drift apart
        pending = []
        for n in chosen:
            size, dim, dtype = cases[n]
            rows = torch.randint(0, size, (2 * n,))
            pieces = [
                (rows, torch.randn(2 * n, dim, dtype=dtype)),
                (rows[:1], torch.ones(rows[:1].numel(), dim, dtype=dtype)),
            ]
            oracles[n].step(torch.cat([r for r, _ in pieces]), torch.cat([g for _, g in pieces]))
            pending.append(tables[n].pending(*pieces))
        step([tables[n] for n in chosen], pending)
    for table, oracle, (_, _, dtype) in zip(tables, oracles, cases, strict=True):
        limit = TOLERANCE[dtype][0]
        for ours, exact in zip(
            table.values(), (oracle.param, oracle.exp_avg, oracle.exp_avg_sq), strict=True
        ):
            if table is not tables[0]:  # table 0 never gets a gradient row
                assert relative_error(ours, exact) <= limit
    assert not tables[0].values()[1].any()


def test_tables_share_settings_but_not_their_number_of_updates(engine):
    tables = [Table(torch.randn(5, 3)) for _ in range(4)]
    oracles = [Oracle(table.values()[0]) for table in tables]
    rows, grads = torch.tensor([3, 1, 3]), torch.randn(2, 4, 3, 3)
    for i, chosen in enumerate(([1, 3], [0, 1, 2, 3])):  # counts are 1, 2, 1, 2
        step([tables[n] for n in chosen], [tables[n].pending((rows, grads[i, n])) for n in chosen])
        for n in chosen:
            oracles[n].step(rows, grads[i, n].double())
    for table, oracle in zip(tables, oracles, strict=True):
        assert relative_error(table.values()[0], oracle.param) <= TOLERANCE[torch.float32][0]


def test_a_prepared_step_keeps_what_it_needs(engine):
    """Between preparing and applying a step others come and go in memory."""
    torch.manual_seed(0)
    rows, grads = torch.arange(9000) % 3, torch.randn(9000, 6)
    tables = [Table(torch.ones(5, 6)) for _ in range(2)]
    others: list[object] = []
    for number, table in enumerate(tables):
        pending = [table.pending((rows, grads))]
        segments = functional.segment(pending)
        apply = functional.prepare_sparse_adamw(
            [Update(pending[0], *table.slots[1:], table.t, table.hyper)], segments
        )
        del pending, segments
        if number:
            gc.collect()
            other = Table(torch.ones(7, 6))
            step([other], [other.pending((6 - rows, -grads))])
            for size in range(8, 2000, 8):
                others += [np.full(size, 255, dtype=np.uint8) for _ in range(9)]
                others += [array("B", b"\xff" * size) for _ in range(9)]
        apply()
    for ours, theirs in zip(tables[1].values(), tables[0].values(), strict=True):
        assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("copies", [2, 9, 2048, 2049, 10_000])  # around the CPU engine's chunk
def test_duplicates_are_summed(engine, copies):
    """A row's duplicates, spread over a batch, equal one gradient that is their sum."""
    torch.manual_seed(copies)
    rows = torch.randint(0, 50, (3 * copies,))
    rows[torch.randperm(3 * copies)[:copies]] = 50
    grads = torch.randn(3 * copies, 6)
    summed = torch.zeros(51, 6, dtype=torch.float64).index_add_(0, rows, grads.double()).float()
    values = torch.randn(51, 6)
    one, other = Table(values), Table(values)
    step([one], [one.pending((rows, grads))])
    touched = rows.unique()
    step([other], [other.pending((touched, summed[touched]))])
    for ours, theirs in zip(one.values()[1:], other.values()[1:], strict=True):
        assert relative_error(ours, theirs.double().numpy()) <= 1e-6


def test_several_hot_rows(engine):
    """Runs of one chunk, of just over one, of three and of four, between ordinary rows."""
    hot = {3: 2048, 7: 2049, 11: 5000, 12: 7000}
    rows = torch.cat([torch.full((n,), row) for row, n in hot.items()] + [torch.arange(20)])
    rows = rows[torch.randperm(rows.numel())]
    grads = torch.randn(rows.numel(), 3) + 1  # sums that differ from row to row
    table, oracle = Table(torch.ones(20, 3)), Oracle(torch.ones(20, 3))
    step([table], [table.pending((rows, grads))])
    oracle.step(rows, grads)
    assert relative_error(table.values()[1], oracle.exp_avg) <= 1e-6
    touched, values = functional.coalesce(table.pending((rows, grads)))
    assert touched.tolist() == list(range(20))
    assert relative_error(values, oracle.exp_avg / 0.1) <= 1e-6


def test_a_rows_sum_depends_on_that_row_alone(engine):
    """Other rows, row numbers, blocks, pieces, threads: a row's bits stay (SPEC §1)."""
    copies = 5000
    grads = torch.randn(copies, 3)
    results = []
    for case in range(6):
        torch.manual_seed(case)
        size, row = 100 + 37 * case, 11 * case
        table = Table(torch.ones(size, 3), block_size=7 + case)
        others = torch.randint(0, size, (case * 6000,))
        others[others == row] = row + 1
        is_ours = torch.zeros(copies + others.numel(), dtype=torch.bool)
        is_ours[torch.randperm(is_ours.numel())[:copies]] = True
        rows = torch.full(is_ours.shape, row)
        rows[~is_ours] = others
        values = torch.randn(is_ours.numel(), 3)
        values[is_ours] = grads
        cut = case * 1000 + 1
        threads = torch.get_num_threads()
        torch.set_num_threads(1 + case % 3)
        try:
            step([table], [table.pending((rows[:cut], values[:cut]), (rows[cut:], values[cut:]))])
        finally:
            torch.set_num_threads(threads)
        results.append([x[row] for x in table.values()])
    for result in results[1:]:
        for first, other in zip(results[0], result, strict=True):
            assert torch.equal(bits(first), bits(other))


def test_a_hot_row_is_summed_accurately(engine):
    """100,000 gradients of one row: float32 sums in order would be off by far more."""
    grads = torch.randn(100_000, 2) + 0.1
    table = Table(torch.ones(4, 2))
    oracle = Oracle(torch.ones(4, 2))
    rows = torch.full((100_000,), 2)
    step([table], [table.pending((rows, grads))])
    oracle.step([2], grads.double().sum(0, keepdim=True))
    assert relative_error(table.values()[1], oracle.exp_avg) <= 1e-6
    assert relative_error(table.values()[2], oracle.exp_avg_sq) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [[1, 2, 3], [3, 1, 3]])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])  # the second rounds
def test_strides_of_gradients(engine, dtype, rows, scale):
    """Expanded, transposed and sliced gradients: the same bits as a contiguous copy."""
    base = torch.randn(12, 12).to(dtype)
    views = [
        base.t()[:3, :4],
        base[::4, ::3],
        base[0, 0].expand(3, 4),
        base[:3, :1].expand(3, 4),
        base[:1, :4].expand(3, 4),
        base[2:5, 4:8],
    ]
    values = torch.randn(5, 4).to(dtype)
    for grad in views:
        strided, plain = Table(values), Table(values)
        options = {"grad_scale": scale}
        step([strided], [strided.pending((rows, grad), **options)])
        step([plain], [plain.pending((rows, grad.contiguous()), **options)])
        for ours, theirs in zip(strided.values(), plain.values(), strict=True):
            assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize(("scale", "mean"), [(1.0, True), (1 / 3, False), (0.5, True)])
def test_scale_and_mean(engine, scale, mean):
    table = Table(torch.randn(6, 3, dtype=torch.float64))
    oracle = Oracle(table.values()[0])
    rows, grads = [4, 2, 4, 4], torch.randn(4, 3, dtype=torch.float64)
    pending = table.pending((rows, grads), grad_scale=scale, mean=mean)
    step([table], [pending])
    oracle.step(rows, grads, scale, mean)
    for ours, exact in zip(
        table.values(), (oracle.param, oracle.exp_avg, oracle.exp_avg_sq), strict=True
    ):
        assert relative_error(ours, exact) <= 1e-14

    touched, values = functional.coalesce(pending)
    assert touched.tolist() == [2, 4]
    expected = torch.stack([grads[1], grads[[0, 2, 3]].sum(0)]) * scale
    if mean:
        expected /= torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("strided_first", [False, True])
def test_pieces_of_different_strides(engine, strided_first):
    """A run over a contiguous and a strided piece: the bits of one contiguous piece."""
    wide = torch.randn(9, 8)
    pieces = [([2, 1, 2, 2, 2], torch.randn(5, 4)), ([2, 2, 0, 2, 2, 2, 2, 2, 2], wide[:, ::2])]
    if strided_first:
        pieces.reverse()
    values = torch.randn(3, 4)
    apart, together = Table(values), Table(values)
    step([apart], [apart.pending(*pieces)])
    rows = [row for piece_rows, _ in pieces for row in piece_rows]
    grads = torch.cat([grad for _, grad in pieces])
    step([together], [together.pending((rows, grads))])
    for ours, theirs in zip(apart.values(), together.values(), strict=True):
        assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("copies", [2048, 2049, 5000])  # around a chunk of the CPU engine
@pytest.mark.parametrize(("scale", "mean"), [(1 / 3, False), (0.5, True)])
def test_scale_and_mean_of_a_hot_row(engine, scale, mean, copies):
    table = Table(torch.randn(4, 2, dtype=torch.float64))
    oracle = Oracle(table.values()[0])
    rows = [1, *[2] * copies, 3]
    grads = torch.randn(copies + 2, 2, dtype=torch.float64)
    step([table], [table.pending((rows, grads), grad_scale=scale, mean=mean)])
    oracle.step(rows, grads, scale, mean)
    for ours, exact in zip(
        table.values(), (oracle.param, oracle.exp_avg, oracle.exp_avg_sq), strict=True
    ):
        assert relative_error(ours, exact) <= 1e-12


def test_tables_of_a_group_differ_in_scale_and_mean(engine):
    grads = torch.randn(3, 2, dtype=torch.float64)
    options = [(1.0, False), (1.0, True), (0.5, False), (0.5, True)]
    tables = [Table(torch.ones(2, 2, dtype=torch.float64)) for _ in options]
    step(
        tables,
        [
            table.pending(([1, 0, 1], grads), grad_scale=scale, mean=mean)
            for table, (scale, mean) in zip(tables, options, strict=True)
        ],
    )
    for table, (scale, mean) in zip(tables, options, strict=True):
        oracle = Oracle(torch.ones(2, 2, dtype=torch.float64))
        oracle.step([1, 0, 1], grads, scale, mean)
        assert relative_error(table.values()[1], oracle.exp_avg) <= 1e-14


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coalesce(engine, dtype):
    torch.manual_seed(0)
    rows = torch.randint(0, 1000, (70_000,))
    rows[::7] = 5  # a run of more than one chunk
    grads = torch.randint(-8, 9, (70_000, 3)).to(dtype)  # integers: every order has the same sum
    table = Table(torch.zeros(1000, 3).to(dtype), 64)
    touched, values = functional.coalesce(table.pending((rows, grads)))
    expected = torch.zeros(1000, 3, dtype=torch.float64).index_add_(0, rows, grads.double())
    assert torch.equal(touched, rows.unique())
    assert values.dtype == dtype
    assert torch.equal(values, expected[touched].to(dtype))


def test_missing_rows_are_dropped(engine):
    table = Table(torch.randn(6, 2))
    grads = torch.randn(4, 2)
    other = Table(table.values()[0])
    step([table], [table.pending(([MISSING, 3, MISSING, 5], grads), drop_missing=True)])
    step([other], [other.pending(([3, 5], grads[[1, 3]]))])
    for ours, theirs in zip(table.values(), other.values(), strict=True):
        assert torch.equal(bits(ours), bits(theirs))
    for slot in table.slots:  # six rows in blocks of five: nothing behind the last row either
        assert not slot.value()[6:].any()
    rows, _ = functional.coalesce(table.pending(([MISSING], grads[:1]), drop_missing=True))
    assert rows.numel() == 0


@pytest.mark.parametrize("bound", [6, 10])  # exact, or with ``row_count`` beside it
@pytest.mark.parametrize("row", [-1, -5, 6, 9, 2**40, -(2**63), 2**63 - 1])
def test_row_out_of_range(engine, row, bound):
    """The IndexError names table and row, and comes before anything is written.

    Where nothing may wait for the device it comes late: that gradient is skipped, no other is.
    """
    values = torch.randn(6, 2)
    tables = good, bad = Table(values), Table(values)
    options = {"num_rows": bound, "row_count": torch.tensor([6])} if bound > 6 else {}
    pending = [
        good.pending(([1], torch.ones(1, 2)), name="good"),
        bad.pending(([1, row], torch.ones(2, 2)), name="bad", **options),
    ]
    for gradients in pending:
        gradients.fault = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(IndexError, match=rf"table 'bad'.*row {row}\b.*has 6 rows"):
        step([good, bad], pending)
    late, expected = engine in REPORT_LATE, Table(values)
    if late:
        step([expected], [expected.pending(([1], torch.ones(1, 2)))])
    for table in tables:
        assert table.t.item() == expected.t.item()
        for old, new in zip(expected.values(), table.values(), strict=True):
            assert torch.equal(bits(old), bits(new))
        for slot in table.slots:  # nor is anything written behind the last row
            assert not slot.value()[6:].any()
    assert pending[0].fault.tolist() == [0, 0]
    assert not late or pending[1].fault.tolist() == [1, row]


def test_coalesce_raises_at_once(engine):
    table = Table(torch.zeros(6, 2))
    pending = table.pending(([1, 6], torch.ones(2, 2)), name="bad")
    with pytest.raises(IndexError, match=r"table 'bad'.*row 6\b.*has 6 rows"):
        functional.coalesce(pending)


def test_empty_gradients(engine):
    table = Table(torch.randn(3, 2))
    before = table.values()
    step([table], [table.pending((torch.empty(0, dtype=torch.int64), torch.empty(0, 2)))])
    for old, new in zip(before, table.values(), strict=True):
        assert torch.equal(bits(old), bits(new))
    assert table.t.item() == 1


def test_a_tensor_for_lr(engine):
    """Read anew in each step: the same bits as the float that it holds."""
    lr, values = torch.tensor(0.5), torch.randn(3, 2)
    one = Table(values, hyper=HYPER._replace(lr=lr))
    other = Table(values)
    for rate in (0.5, 0.125):
        lr.fill_(rate)
        other.hyper = HYPER._replace(lr=rate)
        grads = torch.randn(2, 2)
        for table in (one, other):
            step([table], [table.pending(([2, 0], grads))])
    for ours, theirs in zip(one.values(), other.values(), strict=True):
        assert torch.equal(bits(ours), bits(theirs))


def test_small_epsilon_works_in_fp16(engine):
    """eps = 1e-8 is 0 in fp16; in an fp32 update a zero gradient must not divide 0 by 0."""
    table = Table(torch.ones(2, 3, dtype=torch.float16))
    step([table], [table.pending(([0], torch.zeros(1, 3, dtype=torch.float16)))])
    assert torch.isfinite(table.values()[0]).all()


def test_engines_agree_on_a_large_step():
    """Every digit of the sort and both threads at work: 40,000 gradients in 3 million rows."""
    torch.manual_seed(1)
    size, count, dim = 3_000_000, 40_000, 2
    rows = torch.randint(0, size, (count,))
    rows[: count // 4] = torch.randint(0, 10, (count // 4,))
    grads = torch.randn(count, dim)
    results = {}
    for name in ("reference", "cpu"):
        with functional.use_engine(name):
            table = Table(torch.ones(size, dim), block_size=1 << 20)
            step([table], [table.pending((rows, grads))])
            results[name] = table.values()
    for ours, exact in zip(results["cpu"], results["reference"], strict=True):
        assert relative_error(ours, np.asarray(exact.double())) <= 1e-6


def test_too_many_rows_for_a_sort_key():
    with functional.use_engine("cpu"):
        table = Table(torch.zeros(4, 1))
        pending = table.pending(([0] * 4, torch.zeros(4, 1)))
        pending.num_rows = 2**62
        with pytest.raises(OverflowError, match="4611686018427387904 rows and 4 gradient rows"):
            functional.segment([pending])
