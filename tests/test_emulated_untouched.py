"""Rows that no batch touched, on the CUDA engine: steps, lookups and catching up, in every order.

Kernels run checked (tests/emulator). What is expected is a literal replay in float64 of the steps
that each row missed. The rules come from their definition here, by the Lanczos process on all
missed steps at once, so nothing of the package takes part in either.
"""

from __future__ import annotations

import itertools

import emulator
import numpy as np
import pytest
import torch
from oracle import bits, hot_batch, relative_error, slot_of

from cupy_sparse_adamw import functional
from cupy_sparse_adamw._slots import Slot
from cupy_sparse_adamw._types import (
    MISSING,
    MOMENT_DTYPE,
    RULE_CHUNK,
    RULE_NODES,
    RULE_WIDTH,
    Distribution,
    DistributionKind,
    Hyperparams,
    Kind,
    Lagging,
    Missed,
    Pending,
    PendingGrad,
    RowIndex,
    Update,
)

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("emulated")]

SEEDS = [0, 1, 2]
TILE = 128  # sparse_adamw.cu
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
#: Every pair of a table's dtype and its gradients'.
PAIRS = [(F32, F32), (F64, F64), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)]
KINDS = ["decay", "dense", "replay"]


# ---------------------------------------------------------------------- the log


def schedule(count: int) -> list[Hyperparams]:
    """Settings of steps 1, 2, ...: none of them stays as it is."""
    return [
        Hyperparams(
            lr=0.01 * (1 + j % 4),
            beta1=0.9 - 0.02 * (j % 2),
            beta2=0.999 - 0.004 * (j % 3 == 0),
            eps=1e-4 * (1 + j % 2),
            weight_decay=0.1 + 0.1 * (j % 5 == 0),
        )
        for j in range(1, count + 1)
    ]


def rule(nodes: np.ndarray, weights: np.ndarray) -> list[float]:
    """Columns W, c, d, e of an entry: the Jacobi matrix of a measure, by the Lanczos process."""
    nodes, weights = nodes.astype(np.longdouble), weights.astype(np.longdouble)
    total = weights.sum()
    if total == 0:
        return [0.0, 1.0] + [0.0] * 10
    basis, diagonal, squares = [np.sqrt(weights / total)], [], []
    for _ in range(min(RULE_NODES, nodes.size)):
        rest = nodes * basis[-1]
        diagonal.append(basis[-1] @ rest)
        for _ in range(2):  # once more, for what rounding left
            for q in basis:
                rest = rest - q * (q @ rest)
        squares.append(rest @ rest)
        if squares[-1] <= (1e-15 * nodes.max()) ** 2:
            break
        basis.append(rest / np.sqrt(squares[-1]))
    size, first = len(diagonal), diagonal[0]
    rest = [0.0] * (RULE_NODES - size)
    d = [float((x - first) / first) for x in diagonal[1:]] + rest
    e = [float(x / first**2) for x in squares[: size - 1]] + rest
    return [float(total), float(1 / first), *d, *e]


def log_of(steps: list[Hyperparams], first: int = 0, window: int = 10_000) -> Missed:
    """``Missed`` after these steps. Half of what happened is in the chunks' factors."""
    t = len(steps)
    numbers = []
    for j, h in enumerate(steps, 1):
        correction1, correction2 = 1 - h.beta1**j, 1 - h.beta2**j
        of_step = (h.lr * h.weight_decay, h.lr / correction1, correction2**-0.5, h.eps)
        numbers.append((*of_step, h.beta1, h.beta2))
    table = np.array(numbers).reshape(t, 6)
    rules = np.zeros((t - first + 1, RULE_WIDTH))
    factors = np.array([[-0.01 * (k + 1), 0.9**k] for k in range(t // RULE_CHUNK + 1)])
    for s in range(first, t + 1):
        decay, step_size, isc2, eps, beta1, beta2 = table[s:].T
        power1, power2 = np.cumprod(beta1), np.cumprod(beta2)
        still = np.cumprod((1 - decay)[::-1])[::-1]  # of steps j, ..., t
        later = np.append(still[1:], 1.0)  # of those behind j
        rho = 1 / (isc2 * np.sqrt(power2))
        f, f2 = factors[(s - first) // RULE_CHUNK]
        of_rule = rule(1 / (eps * rho), later * step_size * power1 * rho)
        of_rule[0] /= 1 + f
        kept = still[0] if s < t else 1.0
        powers = (power1[-1], power2[-1]) if s < t else (1.0, 1.0)
        rules[s - first] = [kept / (1 + f) - 1, powers[0], powers[1] / f2, *of_rule, 7e77]
    return Missed(
        t,
        first,
        window,
        torch.from_numpy(rules).clone(),
        torch.from_numpy(factors).clone(),
        torch.from_numpy(table[first:].copy()).clone(),
    )


# ---------------------------------------------------------------------- tables, and what to expect


class Behind:
    """A table some of whose rows are behind: row r was last updated in step ``last[r]``."""

    def __init__(self, size, dim, dtype, last, block_size=7):
        acc = MOMENT_DTYPE[dtype]
        # Roots of the second moments lie far above eps and far below.
        exp_avg = torch.randn(size, dim, dtype=acc) * 10 ** (-7 * torch.rand(size, dim, dtype=acc))
        exp_avg_sq = exp_avg**2 * (1 + 3 * torch.rand(size, dim, dtype=acc))
        values = [torch.randn(size, dim).to(dtype), exp_avg, exp_avg_sq]
        self.size, last = size, torch.as_tensor(last, dtype=torch.int32).reshape(size, 1)
        self.slots = [slot_of(x, block_size) for x in values]
        self.last_step, self.row_step = slot_of(last, block_size), slot_of(2 * last, block_size)
        self.t = torch.tensor(0)

    def pending(self, rows, grads, kind, **options) -> Pending:
        pieces = [PendingGrad(torch.as_tensor(rows), grads)]
        return Pending("table", self.slots[0], self.size, pieces, kind=kind, **options)

    def values(self) -> list[torch.Tensor]:
        return [slot.value()[: self.size].clone() for slot in self.slots]

    def last(self) -> list[int]:
        return self.last_step.value()[: self.size, 0].tolist()

    def lagging(self, missed: Missed, untouched: str) -> Lagging:
        slots = list(self.slots)
        if untouched == "decay":  # moments that are not there
            none = Slot("none", slots[0].dim, slots[0].block_size(), F32, slots[0].device)
            slots[1:] = [none, none]
        return Lagging(*slots, self.last_step, missed, untouched)


class Exact:
    """The same table in float64, each missed step done one by one."""

    def __init__(self, table: Behind) -> None:
        self.w, self.m, self.v = (x.double().numpy().copy() for x in table.values())
        self.last = list(table.last())

    def catch_up(self, row: int, steps: list[Hyperparams], untouched: str, window: int) -> None:
        for j in range(self.last[row] + 1, len(steps) + 1):
            h = steps[j - 1]
            if untouched == "decay":
                self.w[row] -= h.lr * h.weight_decay * self.w[row]
            elif untouched != "skip":
                if j > self.last[row] + window:
                    self.m[row] = 0
                self.update(row, h, j, 0.0)
        self.last[row] = len(steps)

    def update(self, row: int, h: Hyperparams, n: int, grad, eps: float | None = None) -> None:
        m, v, w = self.m[row], self.v[row], self.w[row]
        m += (1 - h.beta1) * (grad - m)
        v += (1 - h.beta2) * (grad * grad - v)
        denom = np.sqrt(v / (1 - h.beta2**n)) + (h.eps if eps is None else eps)
        w -= h.lr * (m / (1 - h.beta1**n) / denom + h.weight_decay * w)

    def arrays(self) -> list[np.ndarray]:
        return [self.w, self.m, self.v]


def step(tables, pending, missed, hypers) -> None:
    """One step of tables of one kind."""
    segments = functional.segment(pending)
    updates = []
    for table, gradients, log, hyper in zip(tables, pending, missed, hypers, strict=True):
        kind = gradients.kind
        update = Update(gradients, *table.slots[1:], table.t, hyper)
        if kind.untouched != "skip":
            update.last_step, update.missed = table.last_step, log
        if kind.per_row:
            update.row_step = table.row_step
        updates.append(update)
    for report in functional.prepare_sparse_adamw(updates, segments)():
        if error := report.error():
            raise error


def require_close(table: Behind, exact: Exact, limit: float) -> None:
    """Within the limit; numbers of 16 bits are what some number within it is rounded to."""
    for x, expected in zip(table.values(), exact.arrays(), strict=True):
        if x.dtype.itemsize == 2:
            spread = limit * np.abs(expected).max()
            low, high = (torch.from_numpy(expected + s).to(x.dtype) for s in (-spread, spread))
            assert bool(((low <= x) & (x <= high)).all())
        else:
            assert relative_error(x, expected) <= limit


def require_same(some: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for x, y in zip(some, others, strict=True):
        assert torch.equal(bits(x), bits(y))


def limit_of(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == F64 else 1e-6


# ---------------------------------------------------------------------- steps


def group(dtype, grad_dtype, dim, kind):
    """Three tables with logs of their own, whose rows are behind by all that their logs have.

    Rows occur once, as often as a tile and its neighbours hold, and in several tiles.
    """
    torch.manual_seed(dim)
    hot = [TILE - 1, TILE, TILE + 1, 3 * TILE + 5]
    tables, pending, missed, hypers, plain = [], [], [], [], []
    for number, (size, block_size, t, first) in enumerate(
        [(40, 7, 40, 3), (3, 64, 1, 0), (25, 1, 14, 0)]
    ):
        # A rule is exact where no more steps were missed than it has nodes.
        least = max(first, 1, t - RULE_NODES if dtype == F64 and kind.untouched == "dense" else 0)
        last = [least + r % (t - least + 1) for r in range(size)]
        table = Behind(size, dim, dtype, last, block_size)
        steps = schedule(t + 1)
        counts = hot if number == 0 else [2 * TILE] if number == 1 else []
        rows = hot_batch(size, counts)
        grads = (torch.randn(rows.numel(), dim) + 0.5).to(grad_dtype)
        options = {"grad_scale": 0.5} if number == 0 else {"mean": number == 1}
        table.t += t
        tables.append(table)
        pending.append(table.pending(rows, grads, kind, drop_missing=True, **options))
        missed.append(log_of(steps[:t], first))
        hypers.append(steps[t])
        plain.append((rows, grads.double().numpy(), options, steps))
    return tables, pending, missed, hypers, plain


def expect(table, rows, grads, options, steps, kind, window=10_000) -> Exact:
    """The table after the last of ``steps``, whose gradients are given."""
    exact = Exact(table)
    h = steps[-1]
    for row in sorted(set(rows.tolist()) - {MISSING}):
        of_row = grads[(rows == row).numpy()]
        grad = of_row.sum(0) * options.get("grad_scale", 1)
        grad = grad / len(of_row) if options.get("mean") else grad
        grad = -grad if h.maximize else grad
        exact.catch_up(row, steps[:-1], kind.untouched, window)
        n = 2 * table.last()[row] + 1 if kind.per_row else len(steps)  # as Behind counts
        eps = h.eps / (1 - h.beta2**n) ** 0.5 if h.eps_mode == "tf" else h.eps
        exact.update(row, h, n, grad, eps)
        exact.last[row] = len(steps)
    return exact


@pytest.mark.parametrize("dim", [1, 4, 130, 132])
@pytest.mark.parametrize("untouched", KINDS)
@pytest.mark.parametrize(("dtype", "grad_dtype"), PAIRS, ids=str)
def test_steps_against_float64_in_every_order(dtype, grad_dtype, untouched, dim):
    kind, results = Kind(untouched), []
    for seed in SEEDS:
        with emulator.using(seed=seed):
            tables, pending, missed, hypers, plain = group(dtype, grad_dtype, dim, kind)
            before = [(table.values(), table.last()) for table in tables]
            exact = [
                expect(table, *of_table, kind)
                for table, of_table in zip(tables, plain, strict=True)
            ]
            step(tables, pending, missed, hypers)
        results.append([x for table in tables for x in table.values()])
    for other in results[1:]:
        require_same(results[0], other)

    for table, expected, (values, last), (rows, *_) in zip(
        tables, exact, before, plain, strict=True
    ):
        require_close(table, expected, limit_of(dtype))
        assert table.last() == expected.last
        untouched_rows = sorted(set(range(table.size)) - set(rows.tolist()))
        assert untouched_rows
        require_same(
            [x[untouched_rows] for x in values], [x[untouched_rows] for x in table.values()]
        )
        assert [last[r] for r in untouched_rows] == [table.last()[r] for r in untouched_rows]
        for slot in (*table.slots, table.last_step):
            assert not slot.value()[table.size :].any()


@pytest.mark.parametrize("untouched", KINDS)
def test_a_row_that_is_not_behind_is_updated_as_ever(untouched):
    """Bit for bit as in mode "skip", whatever its entry holds."""
    steps = schedule(9)
    tables = [Behind(200, 8, F32, [8] * 200) for _ in range(2)]
    for slot, same in zip(tables[1].slots, tables[0].slots, strict=True):
        for block, values in zip(slot.values(), same.values(), strict=True):
            block.copy_(values)
    rows, grads = torch.randint(0, 200, (600,)), torch.randn(600, 8)
    missed = log_of(steps[:8])
    missed.rules[8] = missed.factors[0] = torch.nan
    for table, kind in zip(tables, (Kind(), Kind(untouched)), strict=True):
        table.t += 8
        step([table], [table.pending(rows, grads, kind)], [missed], steps[8:])
    require_same(tables[0].values(), tables[1].values())


@pytest.mark.parametrize("lr_dtype", [None, F32, F64], ids=str)
@pytest.mark.parametrize("untouched", ["skip", "decay"])
@pytest.mark.parametrize("eps_mode", ["torch", "tf"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_bias_by_the_rows_own_count(dtype, eps_mode, untouched, lr_dtype):
    kind = Kind(untouched, per_row=True)
    steps = schedule(12)
    steps[-1] = hyper = steps[-1]._replace(eps=0.3, eps_mode=eps_mode, lr=0.03125)
    if lr_dtype is not None:
        hyper = hyper._replace(lr=torch.tensor(hyper.lr, dtype=lr_dtype))
    table = Behind(20, 6, dtype, [r % 12 for r in range(20)])
    table.t += 11
    rows = torch.cat([torch.randint(0, 19, (40,)), torch.full((2 * TILE + 3,), 3)])
    grads = torch.randn(rows.numel(), 6).to(dtype)
    counts = table.row_step.value()[:20, 0].tolist()
    exact = expect(table, rows, grads.double().numpy(), {}, steps, kind)
    step([table], [table.pending(rows, grads, kind)], [log_of(steps[:-1])], [hyper])
    require_close(table, exact, limit_of(dtype))
    touched = set(rows.tolist())
    assert table.row_step.value()[:20, 0].tolist() == [
        n + (r in touched) for r, n in enumerate(counts)
    ]


def test_a_rows_own_count_with_beta_0():
    kind = Kind("skip", per_row=True)
    hyper = Hyperparams(0.1, 0.0, 0.0, 0.5, 0.2)
    table = Behind(3, 2, F64, [0, 1, 2])
    rows, grads = torch.tensor([0, 1]), torch.randn(2, 2, dtype=F64)
    exact = expect(table, rows, grads.numpy(), {}, [hyper] * 3, kind)
    step([table], [table.pending(rows, grads, kind)], [None], [hyper])
    require_close(table, exact, 1e-14)


@pytest.mark.parametrize("untouched", ["skip", *KINDS])
@pytest.mark.parametrize("eps_mode", ["torch", "tf"])
@pytest.mark.parametrize("maximize", [False, True])
def test_eps_and_sign(maximize, eps_mode, untouched):
    """eps as large as the moments, and a step at whose t the bias is large."""
    kind, steps = Kind(untouched), schedule(3)
    steps[-1] = steps[-1]._replace(eps=0.4, maximize=maximize, eps_mode=eps_mode)
    table = Behind(10, 4, F64, [1, 2] * 5)
    table.t += 2
    rows, grads = torch.randint(0, 10, (30,)), torch.randn(30, 4, dtype=F64)
    exact = expect(table, rows, grads.numpy(), {"grad_scale": 0.25}, steps, kind)
    pending = table.pending(rows, grads, kind, grad_scale=0.25)
    step([table], [pending], [log_of(steps[:-1])], steps[-1:])
    require_close(table, exact, 1e-12)


def test_a_run_of_steps_is_dense_adamw():
    """Fifteen steps on few rows each, then all are brought up to date: as if all were touched."""
    steps = schedule(15)
    for untouched, dtype, limit in [("dense", F32, 2e-6), ("replay", F64, 1e-12)]:
        table = Behind(12, 4, dtype, [0] * 12)
        for slot in table.slots[1:]:
            for block in slot.values():
                block.zero_()
        exact = Exact(table)
        for j, hyper in enumerate(steps, 1):
            rows = torch.randint(0, 12, (4,))
            grads = torch.randn(4, 4).to(dtype)
            sums = torch.zeros(12, 4, dtype=F64).index_add_(0, rows, grads.double())
            for row in range(12):
                exact.update(row, hyper, j, sums[row].numpy())
            pending = table.pending(rows, grads, Kind(untouched))
            step([table], [pending], [log_of(steps[: j - 1])], [hyper])
            lagging = table.lagging(log_of(steps[:j]), untouched)
            current = functional.gather_current(lagging, torch.arange(12))
            assert relative_error(current, exact.w) <= limit
        functional.catch_up_(lagging, torch.arange(12))
        require_close(table, exact, limit)
        assert table.last() == [15] * 12


# ---------------------------------------------------------------------- lookups and catching up


def batch_of(size: int, held: int) -> torch.Tensor:
    """Every row but the last, some of them often, and rows that there are not."""
    rows = torch.cat(
        [torch.arange(size - 1), torch.randint(0, size - 1, (150,)), torch.full((9,), MISSING)]
    )
    rows = torch.cat([rows, torch.tensor([held, 2**40, -5])])
    return rows[torch.randperm(rows.numel())]


@pytest.mark.parametrize("dim", [1, 3, 4, 130, 132])
@pytest.mark.parametrize("untouched", KINDS)
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_rows_are_brought_up_to_date(dtype, untouched, dim):
    """By reading them, which changes nothing, then in place."""
    size, t, first = 60, 40, 3
    steps = schedule(t)
    least = t - RULE_NODES if dtype == F64 and untouched == "dense" else first
    results = []
    for seed in SEEDS:
        torch.manual_seed(dim)
        table = Behind(size, dim, dtype, [least + r % (t - least + 1) for r in range(size)])
        lagging = table.lagging(log_of(steps, first), untouched)
        rows = batch_of(size, table.slots[0].num_rows())
        exact, before, last = Exact(table), table.values(), table.last()
        for row in range(size - 1):
            exact.catch_up(row, steps, untouched, 10_000)
        with emulator.using(seed=seed):
            current = functional.gather_current(lagging, rows)
            require_same(table.values(), before)
            assert table.last() == last
            functional.catch_up_(lagging, rows)
        require_close(table, exact, limit_of(dtype))
        assert table.last() == exact.last == [t] * (size - 1) + last[-1:]
        there = (rows >= 0) & (rows < size)
        assert not current[~there].any()
        require_same([current[there]], [table.values()[0][rows[there]]])
        now = [r for r in range(size) if last[r] == t]
        assert now
        for old, new in zip(before, table.values(), strict=True):
            require_same([old[now], old[-1:]], [new[now], new[-1:]])
        results.append(table.values())
        again = table.values()
        functional.catch_up_(lagging, rows)  # nobody is behind
        require_same(table.values(), again)
    for other in results[1:]:
        require_same(results[0], other)


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
@pytest.mark.parametrize("untouched", KINDS)
def test_rows_that_are_not_behind_are_read_bit_for_bit(untouched, dtype):
    """NaN, whose bits arithmetic may change, infinity and -0.0; a NaN spreads to no other row."""
    table = Behind(4, 5, dtype, [2, 5, 2, 5])
    strange = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, torch.nan]).to(dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    strange[4:].view(integers).bitwise_xor_(1)  # a NaN of other bits
    for row in (0, 1):
        table.slots[0].values()[0][row] = strange
    before, lagging = table.values(), table.lagging(log_of(schedule(5)), untouched)
    current = functional.gather_current(lagging, torch.arange(4))
    functional.catch_up_(lagging, torch.arange(4))
    require_same([before[0][1], before[0][3]], [current[1], current[3]])
    require_same([current], [table.values()[0]])
    assert current[0].isnan()[[0, 4]].all()
    assert current[2].isfinite().all()


@pytest.mark.parametrize("untouched", ["dense", "replay"])
def test_an_infinite_second_moment_moves_nothing(untouched):
    """As in dense AdamW, where m / (sqrt(inf) + eps) is 0."""
    steps = schedule(5)
    table = Behind(2, 4, F32, [1, 1])
    table.slots[2].values()[0].fill_(torch.inf)
    exact = Exact(table)
    exact.v[:] = 1e300
    for row in (0, 1):
        exact.catch_up(row, steps, untouched, 100)
    functional.catch_up_(table.lagging(log_of(steps), untouched), torch.arange(2))
    assert relative_error(table.values()[0], exact.w) <= 1e-6
    assert relative_error(table.values()[1], exact.m) <= 1e-6


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("untouched", ["dense", "replay"])
def test_a_first_moment_that_is_no_normal_number_becomes_zero(untouched, dtype):
    steps = schedule(5)
    table = Behind(2, 4, dtype, [1, 1])
    tiny = torch.finfo(dtype).tiny
    m = torch.tensor([tiny, -tiny, 2 * tiny, -2 * tiny], dtype=dtype)
    table.slots[1].values()[0][:2] = m
    functional.catch_up_(table.lagging(log_of(steps), untouched), torch.tensor([1]))
    power = np.prod([h.beta1 for h in steps[1:]])
    assert 0.5 < power < 1
    found = table.values()[1]
    expected = [0, 0, 2 * tiny * power, -2 * tiny * power]
    assert found[1].tolist() == pytest.approx(expected, rel=1e-6, abs=0)
    assert torch.equal(found[0], m)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("window", [1, 5, 39, 40])
def test_behind_the_window_there_is_decay_alone(dtype, window):
    steps = schedule(41)
    tables = [Behind(42, 5, dtype, range(42)) for _ in range(2)]
    log = log_of(steps, window=window)
    exact = [Exact(table) for table in tables]
    for row in range(42):
        exact[0].catch_up(row, steps, "replay", window)
        if 41 - tables[0].last()[row] > window:
            exact[0].m[row] = 0
    functional.catch_up_(tables[0].lagging(log, "replay"), torch.arange(42))
    require_close(tables[0], exact[0], limit_of(dtype))

    hyper = schedule(42)[41]
    rows, grads = torch.arange(1, 40), torch.randn(39, 5, dtype=dtype)
    for row in rows.tolist():
        exact[1].catch_up(row, steps, "replay", window)
        exact[1].m[row] *= 41 - tables[1].last()[row] <= window
        exact[1].update(row, hyper, 42, grads[row - 1].double().numpy())
    tables[1].t += 41
    step([tables[1]], [tables[1].pending(rows, grads, Kind("replay"))], [log], [hyper])
    require_close(tables[1], exact[1], limit_of(dtype))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("missed", range(1, RULE_NODES + 1))
def test_each_node_of_a_rule_counts(missed, dtype):
    """eps of the missed steps so far apart that no node can stand for another."""
    steps = [h._replace(eps=1e-4 * 4**j) for j, h in enumerate(schedule(8))]
    table = Behind(3, 40, dtype, [8 - missed] * 3)
    exact = Exact(table)
    for row in range(3):
        exact.catch_up(row, steps, "dense", 100)
    functional.catch_up_(table.lagging(log_of(steps), "dense"), torch.arange(3))
    require_close(table, exact, limit_of(dtype))


@pytest.mark.parametrize("untouched", ["decay", "dense"])
def test_each_chunk_of_entries_has_its_factor(untouched):
    """More entries than share a factor, the first of them of a later step."""
    t, first = 2 * RULE_CHUNK + 70, 30
    steps = [Hyperparams(1e-3, 0.9, 0.999, 1e-6, 0.1)] * t
    last = [first, first + 255, first + 256, first + 511, first + 512, t - 1, t]
    table = Behind(len(last), 4, F32, last)
    exact = Exact(table)
    for row in range(len(last)):
        exact.catch_up(row, steps, untouched, t)
    lagging = table.lagging(log_of(steps, first), untouched)
    functional.catch_up_(lagging, torch.arange(len(last)))
    require_close(table, exact, 1e-6)


def test_a_misaligned_weight_takes_the_narrow_path():
    steps, memory = schedule(6), torch.randn(1 + 6 * 8)
    table = Behind(6, 8, F32, [1, 2, 3, 4, 5, 6], block_size=6)
    table.slots[0] = Slot.over("narrowed", memory[1:].view(6, 8))
    exact = Exact(table)
    for row in range(6):
        exact.catch_up(row, steps, "dense", 100)
    lagging = table.lagging(log_of(steps), "dense")
    current = functional.gather_current(lagging, torch.arange(6))
    functional.catch_up_(lagging, torch.arange(6))
    require_close(table, exact, 1e-6)
    require_same([current], [table.values()[0]])


def test_no_rows_at_all():
    table = Behind(3, 4, F32, [1, 1, 1])
    before, lagging = table.values(), table.lagging(log_of(schedule(3)), "dense")
    none = torch.empty(0, dtype=torch.int64)
    assert functional.gather_current(lagging, none).shape == (0, 4)
    functional.catch_up_(lagging, none)
    require_same(before, table.values())


def test_new_rows_are_of_now():
    """Also rows whose ids come several times, and rows that were free."""
    for seed, now in itertools.product(SEEDS, [0, 41]):
        device = torch.device("cpu")
        slots = [
            Slot("ids", 1, 4, torch.int64, device),
            Slot("weights", 3, 4, F32, device),
            Slot("last_step", 1, 4, torch.int32, device),
        ]
        for slot in slots:
            slot.reserve(20)
        for block in slots[2].values():
            block.fill_(-7)
        entries = torch.full((64, 2), MISSING)
        index = RowIndex(entries, torch.tensor([3, 2, 0]), torch.tensor([0, 2, 0, 0]))
        distribution = Distribution(DistributionKind.CONSTANT, 1.0)
        with emulator.using(seed=seed):
            ids = torch.tensor([5, 9, 5, 11, 9])
            rows = functional.find_or_insert_(
                index, ids, *slots[:2], 1, distribution, slots[2], now
            )
            again = functional.find_or_insert_(
                index, ids, *slots[:2], 1, distribution, slots[2], 1000
            )
        assert torch.equal(rows, again)
        assert set(rows.tolist()) == {0, 2, 3}
        found = slots[2].value()[:, 0].tolist()
        assert found == [now if r in (0, 2, 3) else -7 for r in range(len(found))]


# ---------------------------------------------------------------------- prepared, and captured


@pytest.mark.parametrize("untouched", ["skip", *KINDS])
def test_a_prepared_step_has_written_nothing(untouched, monkeypatch):
    """And once it is prepared, it takes no memory and loads no kernel: there are three launches."""
    steps, kind = schedule(6), Kind(untouched)
    table = Behind(10, 4, F32, [5, 3] * 5)
    table.t += 5
    pending = table.pending(torch.tensor([1, 2, 1]), torch.randn(3, 4), kind)
    update = Update(pending, *table.slots[1:], table.t, steps[5])
    if untouched != "skip":
        update.last_step, update.missed = table.last_step, log_of(steps[:5])
    before, last = table.values(), table.last()
    apply = functional.prepare_sparse_adamw([update], functional.segment([pending]))
    require_same(before, table.values())
    assert table.last() == last
    assert table.t.item() == 5

    compiled = emulator.engine_module("_compile")
    for owner, name in [(torch, "empty"), (torch, "zeros"), (compiled, "_function")]:
        monkeypatch.setattr(owner, name, None)
    emulator.launches.clear()
    (report,) = apply()
    assert [x.kernel for x in emulator.launches] == ["advance_float", "update", "finish"]
    assert report.error() is None
    assert table.t.item() == 6
    assert not torch.equal(table.values()[0], before[0])


@pytest.mark.parametrize("untouched", KINDS)
def test_what_cannot_be_captured_says_so(untouched):
    steps = schedule(6)
    table = Behind(10, 4, F32, [5, 3] * 5)
    missed = log_of(steps[:5])
    pending = table.pending(torch.tensor([1]), torch.randn(1, 4), Kind(untouched))
    step([table], [pending], [missed], steps[5:])
    before, shown = table.values(), "decay" if untouched == "decay" else "dense"
    with emulator.capture():
        with pytest.raises(RuntimeError, match=f"a step with untouched='{shown}' cannot be captu"):
            step([table], [pending], [missed], steps[5:])
        lagging = table.lagging(missed, untouched)
        for operation in (functional.gather_current, functional.catch_up_):
            with pytest.raises(RuntimeError, match=f"untouched='{shown}' cannot be brought up"):
                operation(lagging, torch.tensor([1]))
    require_same(before, table.values())


def test_replays_count_rows():
    """bias_correction="row" needs nothing of the host: replays are steps."""
    kind, hyper = Kind("skip", per_row=True), Hyperparams(0.1, 0.9, 0.99, 1e-3, 0.1)
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        table = Behind(6, 4, F32, [0] * 6)
        pending = table.pending(torch.tensor([1, 4, 1]), torch.randn(3, 4), kind)
        step([table], [pending], [None], [hyper])
        graph = None
        if captured:
            with emulator.capture() as graph:
                step([table], [pending], [None], [hyper])
        for _ in range(3):
            graph.replay() if graph else step([table], [pending], [None], [hyper])
        assert table.row_step.value()[:6, 0].tolist() == [0, 4, 0, 0, 4, 0]
        results.append(table.values())
    require_same(*results)
