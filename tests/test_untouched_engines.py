"""What rows missed while no batch touched them, on every engine, against a literal replay.

The replay is dense AdamW with zero gradients in NumPy float64, step by step as its definition
says. It shares no code with the package on purpose.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from oracle import DTYPES, bits, moments_of, relative_error, slot_of, within_one_ulp

from cupy_sparse_adamw import functional
from cupy_sparse_adamw._slots import Slot
from cupy_sparse_adamw._types import (
    MISSING,
    MOMENT_DTYPE,
    RULE_CHUNK,
    RULE_NODES,
    RULE_WIDTH,
    STEP_WIDTH,
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

MODES = ["decay", "dense", "replay"]


class Setting(NamedTuple):
    """What one step is made with."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2


# ---------------------------------------------------------------- the literal replay


def step_numbers(setting: Setting, j: int) -> list[float]:
    """A row of ``Missed.steps``."""
    lr, beta1, beta2, eps, weight_decay = setting
    correction1, correction2 = 1 - beta1**j, 1 - beta2**j
    return [lr * weight_decay, lr / correction1, 1 / math.sqrt(correction2), eps, beta1, beta2]


def replayed(row, s: int, settings: list[Setting], mode: str, window: float = math.inf):
    """A row (param, exp_avg, exp_avg_sq), each [D], after steps s + 1 to the last of ``settings``.

    Momentum stops after ``window`` steps.
    """
    param, m, v = (np.array(x, dtype=np.float64) for x in row)
    for j in range(s + 1, len(settings) + 1):
        lr, beta1, beta2, eps, weight_decay = settings[j - 1]
        if mode == "decay":
            param = param - lr * weight_decay * param
            continue
        m = beta1 * m if j <= s + window else 0.0 * m
        v = beta2 * v
        m_hat, v_hat = m / (1 - beta1**j), v / (1 - beta2**j)
        with np.errstate(invalid="ignore"):  # 0 / 0 where eps is 0
            moved = np.where(m == 0, 0.0, m_hat / (np.sqrt(v_hat) + eps))
        param = param - lr * (moved + weight_decay * param)
    return param, m, v


def updated(row, grad, setting: Setting, n: int, eps_mode: str = "torch"):
    """A row after one AdamW step, the n-th."""
    lr, beta1, beta2, eps, weight_decay = setting
    param, m, v = row
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad * grad
    m_hat, v_hat = m / (1 - beta1**n), v / (1 - beta2**n)
    if eps_mode == "tf":
        eps = eps / math.sqrt(1 - beta2**n)
    return param - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * param), m, v


# ---------------------------------------------------------------- logs and tables


class Log:
    """A ``Missed`` that grows step by step, as the optimizer keeps it."""

    def __init__(self, first: int, room: int, window: int) -> None:
        self.first, self.window = first, window
        self.state = torch.zeros(4 + 2 * RULE_NODES, room, dtype=torch.float64, device="cpu")
        self.state[:3] = 1
        self.rules = torch.zeros(room, RULE_WIDTH, dtype=torch.float64, device="cpu")
        self.steps = torch.zeros(room, STEP_WIDTH, dtype=torch.float64, device="cpu")
        self.factors = torch.zeros(room // RULE_CHUNK + 1, 2, dtype=torch.float64, device="cpu")
        self.factors[:, 1] = 1
        self.t = first

    def add(self, setting: Setting) -> None:
        """One more step. Chunks that the window has left get it through their factor."""
        self.t += 1
        step = self.steps[self.t - 1 - self.first]
        step.copy_(torch.tensor(step_numbers(setting, self.t), dtype=torch.float64))
        frozen = max(self.t - 1 - self.window - self.first, 0) // RULE_CHUNK
        self.factors[:frozen, 0] -= step[0] * (1 + self.factors[:frozen, 0])
        self.factors[:frozen, 1] *= setting.beta2
        begin, end = frozen * RULE_CHUNK, self.t - self.first
        functional.prepare_extend_rules(self.state, self.rules, begin, end, step)()

    def missed(self, device) -> Missed:
        """The log so far."""
        tensors = (self.rules, self.factors, self.steps)
        return Missed(self.t, self.first, self.window, *(x.to(device, copy=True) for x in tensors))


def logged(settings: list[Setting], first: int = 0, window: int = 176) -> Missed:
    """The ``Missed`` after ``settings``, of which those from ``first`` on are logged."""
    is_reference = functional.load_engine("reference") is functional._engine(torch.device("cpu"))
    log = _log(tuple(settings), first, window, is_reference)
    return log.missed(torch.zeros(0).device)


@functools.cache
def _log(settings: tuple[Setting, ...], first: int, window: int, is_reference: bool) -> Log:
    log = Log(first, len(settings) - first + 1, window)
    for setting in settings[first:]:
        log.add(setting)
    return log


class Table:
    """A table whose rows may be behind, in slots."""

    def __init__(self, param, exp_avg, exp_avg_sq, last_step, missed, block_size=5) -> None:
        self.size, self.missed = len(param), missed
        last = torch.as_tensor(last_step, dtype=torch.int32).view(-1, 1)
        moment = MOMENT_DTYPE[param.dtype]
        moments = moments_of(exp_avg.to(moment), exp_avg_sq.to(moment), block_size)
        self.slots = [slot_of(param, block_size), *moments, slot_of(last, block_size)]
        self.t = torch.tensor(missed.t)

    def lagging(self, mode: str) -> Lagging:
        return Lagging(*self.slots, self.missed, mode)

    def values(self) -> list[torch.Tensor]:
        """Copies of weights, exp_avg, exp_avg_sq and last_step of all rows."""
        return [slot.value()[: self.size].clone() for slot in self.slots]

    def row(self, row: int) -> list[np.ndarray]:
        """Weights and moments of a row in float64."""
        return [slot.value()[row].double().cpu().numpy() for slot in self.slots[:3]]

    def update(self, rows, grads, hyper: Hyperparams, kind: Kind, row_step=None, **options):
        """(Update, Pending) of one step."""
        pieces = [PendingGrad(torch.as_tensor(rows), grads)]
        pending = Pending("table", self.slots[0], self.size, pieces, kind=kind, **options)
        lagging = kind.untouched != "skip"
        return Update(
            pending,
            *self.slots[1:3],
            self.t,
            hyper,
            self.slots[3] if lagging else None,
            self.missed if lagging else None,
            row_step,
        )


def apply(*updates: Update) -> None:
    segments = functional.segment([update.pending for update in updates])
    for report in functional.prepare_sparse_adamw(updates, segments)():
        assert report.error() is None


def random_table(missed: Missed, last_step, dtype, dim=6, block_size=5) -> Table:
    """Weights as small as what they missed; roots of exp_avg_sq from far below eps to far above."""
    size = len(last_step)
    exponents = torch.linspace(-12, 0, size * dim).view(size, dim)[torch.randperm(size)]
    root = 10**exponents
    exp_avg = root * (torch.rand(size, dim) - 0.5) * 2
    param = torch.randn(size, dim).div(100).to(dtype)
    return Table(param, exp_avg, root**2, last_step, missed, block_size)


def assert_close(got, exact, dtype, limit: float) -> None:
    """Weights, exp_avg and exp_avg_sq of the same rows; 16-bit weights within one unit."""
    got, exact = got[:3], [np.stack(x) for x in zip(*exact, strict=True)]
    for number, (ours, x64) in enumerate(zip(got, exact, strict=True)):
        if number == 0 and dtype.itemsize == 2:
            assert within_one_ulp(ours, x64)
        else:
            assert relative_error(ours, x64) <= limit


def limit_of(dtype: torch.dtype, mode: str) -> float:
    """Of the norm of SPEC §1. A rule is not exact; a replay rounds in every step."""
    if dtype != torch.float64:
        return 2e-6 if mode == "replay" else 1e-6
    return 1e-8 if mode == "dense" else 1e-13


# ---------------------------------------------------------------- reading and catching up


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_one_missed_step_by_hand(engine, mode, dtype):
    """s = 1, t = 2, beta1 = 0.5, beta2 = 0.75, lr = 0.1, decay 0.5, eps = 1/2, m = 3, v = 7/12.

    m = 1.5, m^ = 1.5 / 0.75 = 2; v = 7/16, v^ = (7/16) / (7/16) = 1; the decay is 0.05.
    p = 8 - 0.1 * 2 / (1 + 1/2) - 0.05 * 8 = 8 - 2/15 - 0.4.
    """
    missed = logged([Setting(0.1, 0.5, 0.75, 0.5, 0.5)] * 2)
    param, m, v = (torch.tensor([[x]], dtype=dtype) for x in (8.0, 3.0, 7 / 12))
    table = Table(param, m, v, [1], missed)
    expected = [7.6, 3.0, 7 / 12] if mode == "decay" else [8 - 2 / 15 - 0.4, 1.5, 7 / 16]
    limit = {"rel": 3e-7 if dtype == torch.float32 else 1e-15}
    current = functional.gather_current(table.lagging(mode), torch.tensor([0, MISSING]))
    assert current.flatten().tolist() == pytest.approx([expected[0], 0.0], **limit)
    assert [x.item() for x in table.values()] == [8.0, 3.0, v.item(), 1]
    functional.catch_up_(table.lagging(mode), torch.tensor([0]))
    assert [x.item() for x in table.values()] == pytest.approx([*expected, 2], **limit)


@pytest.mark.parametrize("block_size", [1, 7, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_every_age(engine, mode, dtype, block_size):
    """Read, then caught up, in any order, with repeats; others stay bit for bit."""
    settings = [Setting(lr=1e-3 * (1 + math.sin(j))) for j in range(100)]
    missed = logged(settings)
    last_step = [*range(10, 100, 3), 99, 100, 100]
    table = random_table(missed, last_step, dtype, block_size=block_size)
    before, size = table.values(), table.size
    exact = [replayed(table.row(r), last_step[r], settings, mode) for r in range(size)]
    rows = torch.randperm(size)

    named = torch.cat([rows, torch.tensor([MISSING, 3, MISSING, 3])])
    current = functional.gather_current(table.lagging(mode), named)
    assert current.dtype == dtype
    assert not current[[size, size + 2]].any()
    assert torch.equal(bits(current[size + 1]), bits(current[size + 3]))
    for old, new in zip(before, table.values(), strict=True):
        assert torch.equal(bits(old), bits(new))

    caught = rows[: size // 2]
    named = torch.cat([caught, caught.flip(0), torch.tensor([MISSING, 2**40, -5])])
    functional.catch_up_(table.lagging(mode), named)
    after, others = table.values(), rows[size // 2 :]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(bits(old[others]), bits(new[others]))
    assert (after[3][caught] == 100).all()
    assert torch.equal(bits(after[0][caught]), bits(current[: caught.numel()]))
    exact_caught = [exact[row] for row in caught.tolist()]
    assert_close([x[caught] for x in after], exact_caught, dtype, limit_of(dtype, mode))

    functional.catch_up_(table.lagging(mode), rows)
    functional.catch_up_(table.lagging(mode), rows)  # nothing is left to do
    assert torch.equal(bits(table.values()[0][rows]), bits(current[:size]))
    assert_close(table.values(), exact, dtype, limit_of(dtype, mode))
    now = torch.tensor([size - 1, size - 2])  # s = t
    for old, new in zip(before, table.values(), strict=True):
        assert torch.equal(bits(old[now]), bits(new[now]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_rows_older_than_the_window(engine, mode, dtype):
    """Frozen rules with a factor, in several chunks; a replay that stops, and goes on decaying."""
    settings = [Setting(lr=1e-4 * (2 + math.cos(j)), weight_decay=0.1) for j in range(900)]
    missed = logged(settings, first=3, window=176)
    assert (missed.factors[:2] != torch.tensor([0.0, 1.0])).all()
    last_step = [*range(3, 900, 23), 899, 900]
    table = random_table(missed, last_step, dtype)
    window = 176 if mode == "replay" else math.inf
    exact = [replayed(table.row(r), s, settings, mode, window) for r, s in enumerate(last_step)]
    current = functional.gather_current(table.lagging(mode), torch.arange(table.size))
    functional.catch_up_(table.lagging(mode), torch.arange(table.size))
    assert torch.equal(bits(current), bits(table.values()[0]))
    assert_close(table.values(), exact, dtype, 2 * limit_of(dtype, mode))
    assert (table.values()[3] == 900).all()
    if mode == "replay":
        old = torch.tensor(last_step) + 176 < 900
        assert not table.values()[1][old].any()
        assert table.values()[1][~old].any()


@pytest.mark.parametrize(
    ("betas", "limits"),
    [
        ((0.9, 0.999), {0: 3e-6, 3: 2e-7, 10: 5e-9, 100: 1e-12}),
        ((0.95, 0.999), {0: 2e-5, 3: 2e-6, 10: 1e-7, 100: 4e-12}),
        ((0.99, 0.999), {0: 5e-4, 3: 1e-4, 10: 2e-5, 100: 1e-7}),
        ((0.9, 0.99), {0: 1e-5, 3: 8e-7, 10: 5e-8, 100: 2e-11}),
    ],
    ids=str,
)
def test_rules_are_within_the_published_bounds(engine, betas, limits):
    """The missed motion's largest relative error over all √v: the table of docs/untouched.md."""
    setting = Setting(beta1=betas[0], beta2=betas[1])
    log = Log(0, 300, window=300)
    root = torch.cat([torch.zeros(1), torch.logspace(-14, 4, 60)]).double()[None]
    for t in range(1, 277):
        log.add(setting)
        for s, limit in limits.items():
            if t - s in (5, 20, 176):
                missed = log.missed(root.device)
                table = Table(torch.zeros_like(root), torch.ones_like(root), root**2, [s], missed)
                moved = functional.gather_current(table.lagging("dense"), torch.tensor([0]))
                exact, _, _ = replayed(table.row(0), s, [setting] * t, "dense")
                assert np.abs(moved[0].cpu().numpy() / exact - 1).max() <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["dense", "replay"])
def test_momentum_below_the_normal_numbers_is_zero(engine, mode, dtype):
    tiny = torch.finfo(dtype).tiny
    missed = logged([Setting()] * 40)
    exp_avg = torch.tensor([[tiny * 2, -tiny * 2, tiny * 1e3, 0.0, -1.0, torch.nan]], dtype=dtype)
    table = Table(torch.ones(1, 6, dtype=dtype), exp_avg, exp_avg.abs(), [20], missed)
    functional.catch_up_(table.lagging(mode), torch.tensor([0]))
    param, m, _, _ = table.values()
    assert m[0, :2].tolist() == [0.0, 0.0]  # 0.9**20 is 0.12
    expected = [tiny * 1e3 * 0.9**20, 0.0, -(0.9**20)]
    assert m[0, 2:5].tolist() == pytest.approx(expected, rel=1e-5, abs=0)
    assert m[0, 5].isnan()
    assert param[0, :5].isfinite().all()
    assert param[0, 5].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["dense", "replay"])
def test_extreme_elements(engine, mode, dtype):
    """No momentum; no variance, where eps alone divides; an infinite one, which moves nothing."""
    settings = [Setting(weight_decay=0.1)] * 130
    missed = logged(settings)
    exp_avg = torch.tensor([[0.0, 0.0, 1e-9, 1.0]], dtype=dtype)
    exp_avg_sq = torch.tensor([[0.0, 4.0, 0.0, torch.inf]], dtype=dtype)
    table = Table(torch.ones(1, 4, dtype=dtype), exp_avg, exp_avg_sq, [100], missed)
    param, m, v = replayed(table.row(0), 100, settings, mode)
    current = functional.gather_current(table.lagging(mode), torch.tensor([0]))
    assert current.flatten().tolist() == pytest.approx(param.tolist(), rel=2e-7)
    functional.catch_up_(table.lagging(mode), torch.tensor([0]))
    assert table.values()[1].flatten().tolist() == pytest.approx(m.tolist(), rel=1e-6)
    assert table.values()[2].flatten().tolist() == pytest.approx(v.tolist(), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [9, 16, 33])  # cache lines of moments: a part, one, two and a part
def test_many_rows_and_repeats(engine, mode, dtype, dim):
    """Enough for every thread; each row's repeats fall to several of them; some are current."""
    settings = [Setting()] * 60
    missed = logged(settings)
    size = 400 if engine == "emulated" else 20_000
    last_step = torch.randint(30, 61, (size,)).tolist()
    table = random_table(missed, last_step, dtype, dim, block_size=1024)
    rows = torch.randint(0, size, (2 * size,))
    rows[torch.rand(2 * size) < 0.1] = MISSING
    before, current = table.values(), functional.gather_current(table.lagging(mode), rows)
    functional.catch_up_(table.lagging(mode), rows)
    after = table.values()
    assert not current[rows == MISSING].any()
    current, rows = current[rows != MISSING], rows[rows != MISSING]
    assert torch.equal(bits(after[0][rows]), bits(current))
    untouched = torch.ones(size, dtype=torch.bool)
    untouched[rows] = False
    for old, new in zip(before, after, strict=True):
        assert torch.equal(bits(old[untouched]), bits(new[untouched]))
    assert (after[3][~untouched] == 60).all()
    some = rows[:200]
    table.slots = [slot_of(x, 1024) for x in before]  # apart
    exact = [replayed(table.row(r), last_step[r], settings, mode) for r in some.tolist()]
    assert_close([x[some] for x in after], exact, dtype, 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_not_behind_keep_every_bit(engine, mode):
    values = torch.tensor([[torch.inf, -0.0, torch.nan, 1e-40, -torch.inf]])
    table = Table(values, values, values, [5], logged([Setting()] * 5))
    before = table.values()
    current = functional.gather_current(table.lagging(mode), torch.tensor([0]))
    functional.catch_up_(table.lagging(mode), torch.tensor([0]))
    assert torch.equal(bits(current), bits(values))
    for old, new in zip(before, table.values(), strict=True):
        assert torch.equal(bits(old), bits(new))


def test_each_row_falls_to_one_thread(monkeypatch):
    from cupy_sparse_adamw.engines.cpu import untouched

    parts, size = 4, 700
    taken = torch.zeros(size, dtype=torch.int64)
    monkeypatch.setattr(untouched, "num_parts", lambda size, grain: parts)
    with functional.use_engine("cpu"):
        for part in range(parts):
            table = random_table(logged([Setting()] * 9), [4] * size, torch.float32)
            monkeypatch.setattr(
                untouched,
                "parallel_for",
                lambda kernel, size, parts, *args, part=part: kernel(part, part, part + 1, *args),
            )
            functional.catch_up_(table.lagging("decay"), torch.arange(size).repeat(2))
            caught = table.values()[3].flatten() == 9
            assert 100 < int(caught.sum()) < 250
            taken += caught
    assert (taken == 1).all()


# ---------------------------------------------------------------- steps


KINDS = [Kind("skip"), *(Kind(mode) for mode in MODES), Kind("skip", True), Kind("decay", True)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_on_rows_of_every_age(engine, kind, dtype):
    """Touched rows: what they missed, then the update, with duplicates; the others: nothing."""
    settings = [Setting(weight_decay=0.05)] * 120
    missed = logged(settings)
    last_step = [*range(20, 120, 3), 119, 120, 120]
    table = random_table(missed, last_step, dtype, dim=5)
    counts = torch.randint(0, 9, (table.size, 1), dtype=torch.int32)
    row_step = slot_of(counts, 5)
    touched = torch.cat([torch.arange(0, table.size, 2), torch.tensor([4, 0, 4])])
    grads = torch.randn(touched.numel(), 5).to(dtype)
    hyper = Hyperparams(2e-3, 0.9, 0.999, 1e-8, 0.03)
    before = table.values()
    exact = {}
    for row in sorted(set(touched.tolist())):
        grad = grads[touched == row].double().sum(0).cpu().numpy()
        start = table.row(row)
        if kind.untouched != "skip":
            start = replayed(start, last_step[row], settings, kind.untouched)
        n = counts[row].item() + 1 if kind.per_row else 121
        exact[row] = updated(start, grad, Setting(*hyper[:5]), n)
    apply(table.update(touched, grads, hyper, kind, row_step if kind.per_row else None))
    after, rows = table.values(), torch.tensor([*exact])
    assert_close([x[rows] for x in after], [*exact.values()], dtype, limit_of(dtype, "dense"))
    expected_step = 121 if kind.untouched != "skip" else before[3][rows]
    assert (after[3][rows] == expected_step).all()
    assert table.t.item() == 121
    untouched = torch.tensor([row for row in range(table.size) if row not in exact])
    for old, new in zip(before, after, strict=True):
        assert torch.equal(bits(old[untouched]), bits(new[untouched]))
    if kind.per_row:
        got = row_step.value()[: table.size].clone()
        assert torch.equal(got[rows], counts[rows] + 1)
        assert torch.equal(got[untouched], counts[untouched])


@pytest.mark.parametrize("mode", ["dense", "replay"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_training_is_dense_adamw(engine, mode, dtype):
    """40 steps of a few rows each, caught up at the end: torch.optim.AdamW with zero gradients."""
    size, dim = 12, 3
    start = torch.randn(size, dim, dtype=dtype)
    weight = torch.nn.Parameter(start.double())
    dense = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1)
    zeros = torch.zeros(size, dim)
    log = Log(0, 41, 1000)
    table = Table(start, zeros, zeros, [0] * size, log.missed(start.device))
    hyper, setting = Hyperparams(1e-2, 0.9, 0.999, 1e-8, 0.1), Setting(1e-2, weight_decay=0.1)
    for _ in range(40):
        rows = torch.randint(0, size, (4,))
        grads = torch.randn(4, dim, dtype=dtype)
        apply(table.update(rows, grads, hyper, Kind(mode)))
        weight.grad = torch.zeros_like(weight).index_add_(0, rows, grads.double())
        dense.step()
        log.add(setting)
        table.missed = log.missed(start.device)
    functional.catch_up_(table.lagging(mode), torch.arange(size))
    state = dense.state[weight]
    limit = 2e-6 if dtype == torch.float32 else 1e-12 if mode == "replay" else 1e-8
    for ours, theirs in zip(
        table.values(), (weight.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=False
    ):
        assert relative_error(ours, theirs.cpu().numpy()) <= limit


@pytest.mark.parametrize("mode", MODES)
def test_tables_of_one_group_have_missed_different_things(engine, mode):
    """Another t, first step, window and factor each; one of them has missed nothing."""
    logs = [
        ([Setting()] * 50, 0, 176),
        ([Setting(lr=0.1, weight_decay=0.2)] * 20, 5, 176),
        ([Setting(lr=0.01, beta1=0.5, eps=1e-3)] * 400, 0, 29),
        ([Setting()] * 50, 50, 176),
    ]
    tables, updates, exact = [], [], []
    for settings, first, window in logs:
        missed, t = logged(settings, first, window), len(settings)
        last_step = [first, (first + t) // 2, t - (t > first), t, first, first]
        table = random_table(missed, last_step, torch.float32, dim=4)
        grads = torch.randn(4, 4)
        hyper = Hyperparams(*settings[-1])
        updates.append(table.update(torch.tensor([3, 1, 0, 2]), grads, hyper, Kind(mode)))
        results = []
        for number, row in enumerate([3, 1, 0, 2]):
            start = replayed(table.row(row), last_step[row], settings, mode)
            grad = grads[number].double().cpu().numpy()
            results.append(updated(start, grad, settings[-1], t + 1))
        exact.append(results)
        tables.append(table)
    before = [table.values() for table in tables]
    apply(*updates)
    for table, old, results in zip(tables, before, exact, strict=True):
        after = table.values()
        assert_close([x[[3, 1, 0, 2]] for x in after], results, torch.float32, 1e-6)
        assert after[3].flatten().tolist() == [table.missed.t + 1] * 4 + [table.missed.first] * 2
        for x, y in zip(old, after, strict=True):
            assert torch.equal(bits(x[4:]), bits(y[4:]))


@pytest.mark.parametrize("eps_mode", ["torch", "tf"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.5, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_bias_corrected_by_rows_own_counts(engine, dtype, betas, eps_mode):
    """A row's n-th update is AdamW's n-th, whatever t is; ε large enough to matter."""
    size, dim, setting = 15, 4, Setting(0.01, *betas, 1e-2, 0.1)
    hyper = Hyperparams(*setting, eps_mode=eps_mode)
    zeros = torch.zeros(size, dim)
    table = Table(torch.randn(size, dim).to(dtype), zeros, zeros, [0] * size, logged([Setting()]))
    row_step = slot_of(torch.zeros(size, 1, dtype=torch.int32), 5)
    exact = {row: table.row(row) for row in range(size)}
    counts = [0] * size
    for _ in range(1 if dtype.itemsize == 2 else 20):
        rows = torch.randperm(size - 1)[:6]
        grads = (1 + torch.rand(6, dim)).to(dtype)  # none of them small beside v, where beta2 = 0
        apply(table.update(rows, grads, hyper, Kind("skip", True), row_step))
        for row, grad in zip(rows.tolist(), grads.double().cpu().numpy(), strict=True):
            counts[row] += 1
            exact[row] = updated(exact[row], grad, setting, counts[row], eps_mode)
    assert_close(table.values(), exact.values(), dtype, 1e-12 if dtype == torch.float64 else 2e-6)
    assert row_step.value()[:size].flatten().tolist() == counts
    assert len(set(counts)) > 1


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 4e-6), (torch.float64, 1e-12)])
def test_eps_mode_tf_is_torchs_sparse_adam(engine, dtype, limit):
    """torch.optim.SparseAdam adds ε to √v. Large enough here that √v̂ would show."""
    start = torch.randn(9, 3, dtype=dtype)
    zeros, missed = torch.zeros(9, 3), logged([Setting()])
    table = Table(start.clone(), zeros, zeros, [0] * 9, missed)
    table.t.zero_()
    weight = torch.nn.Parameter(start.clone())
    theirs = torch.optim.SparseAdam([weight], lr=1e-2, eps=1e-2)
    hyper = Hyperparams(1e-2, 0.9, 0.999, 1e-2, 0.0, eps_mode="tf")
    for _ in range(20):
        rows = torch.randperm(9)[:5]
        grads = torch.randn(5, 3, dtype=dtype)
        weight.grad = torch.sparse_coo_tensor(rows[None], grads, (9, 3), check_invariants=True)
        theirs.step()
        apply(table.update(rows, grads, hyper, Kind()))
    state = theirs.state[weight]
    for ours, expected in zip(
        table.values(), (weight.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=False
    ):
        assert relative_error(ours, expected.double().cpu().numpy()) <= limit


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_maximize_turns_the_sign(engine, kind, scale):
    missed = logged([Setting()] * 30)
    one = random_table(missed, range(10, 30), torch.float32)
    other = Table(*one.values(), missed)
    counts = [slot_of(torch.ones(20, 1, dtype=torch.int32), 5) for _ in range(2)]
    rows, grads = torch.tensor([3, 7, 3, 19]), torch.randn(4, 6)
    for table, maximize, sign, count in ((one, True, 1, counts[0]), (other, False, -1, counts[1])):
        hyper = Hyperparams(*Setting(), maximize=maximize)
        own = count if kind.per_row else None
        apply(table.update(rows, sign * grads, hyper, kind, own, grad_scale=scale))
    for ours, theirs in zip(one.values(), other.values(), strict=True):
        assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_preparing_writes_nothing(engine, kind):
    """Two groups of one step: neither is touched before what was prepared is called."""
    missed = logged([Setting()] * 30)
    tables = [random_table(missed, range(10, 30), dtype) for dtype in DTYPES[:2]]
    counts = [slot_of(torch.ones(20, 1, dtype=torch.int32), 5) for _ in tables]
    updates = [
        table.update(
            torch.tensor([3, 7, 3]),
            torch.randn(3, 6).to(table.slots[0].dtype),
            Hyperparams(*Setting()),
            kind,
            count if kind.per_row else None,
        )
        for table, count in zip(tables, counts, strict=True)
    ]
    before = [table.values() for table in tables]
    segments = functional.segment([update.pending for update in updates])
    apply_all = functional.prepare_sparse_adamw(updates, segments)
    for table, values in zip(tables, before, strict=True):
        for old, new in zip(values, table.values(), strict=True):
            assert torch.equal(bits(old), bits(new))
        assert table.t.item() == 30
    assert all((count.value()[:20] == 1).all() for count in counts)
    apply_all()
    for table, values in zip(tables, before, strict=True):
        for old, new in zip(values[:3], table.values(), strict=False):
            assert (old[[3, 7]] != new[[3, 7]]).any(1).all()
        assert table.t.item() == 31


@pytest.mark.parametrize("what", ["thread", "kernel"])
def test_what_cannot_start_or_compile_fails_before_anything_is_written(monkeypatch, what):
    """Two groups: the first could have been written when the second fails."""
    from cupy_sparse_adamw.engines.cpu import _threads, adamw

    def fail(*args):
        raise RuntimeError(f"no {what}")

    with functional.use_engine("cpu"):
        tables = [
            Table(*torch.randn(3, 2000, dim), torch.zeros(2000), logged([Setting()]), 64)
            for dim in (3, 64)
        ]
        updates = [
            table.update(
                torch.arange(2000), torch.randn(2000, dim), Hyperparams(*Setting()), Kind()
            )
            for table, dim in zip(tables, (3, 64), strict=True)
        ]
        before = [table.values() for table in tables]
        segments = functional.segment([update.pending for update in updates])
        if what == "thread":  # 2,000 rows are enough for two threads in the second group alone
            monkeypatch.setattr(_threads, "_threads", [])
            monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
            monkeypatch.setattr(_threads.threading.Thread, "start", fail)
        else:
            monkeypatch.setattr(adamw, "_compiled", set())
            monkeypatch.setattr(adamw, "update_runs", fail)
        with pytest.raises(RuntimeError, match=f"no {what}"):
            functional.prepare_sparse_adamw(updates, segments)
        assert what == "kernel" or _threads._threads == []
        for table, values in zip(tables, before, strict=True):
            for old, new in zip(values, table.values(), strict=True):
                assert torch.equal(bits(old), bits(new))
            assert table.t.item() == 1


# ---------------------------------------------------------------- rules

#: betas, s, and the largest relative error allowed of what a row moves in 1, 5, 20 and as many
#: missed steps as the window has: about three times what six nodes have in exact arithmetic.
ERRORS = [
    ((0.9, 0.999), 0, 3e-6),
    ((0.9, 0.999), 10, 1e-8),
    ((0.9, 0.999), 100, 1e-13),
    ((0.9, 0.99), 100, 2e-11),
    ((0.95, 0.999), 10, 1e-7),
    ((0.99, 0.999), 100, 1e-7),
    ((0.99, 0.999), 10_000, 3e-12),
    ((0.99, 0.995), 3, 2e-3),
    ((0.99, 0.995), 100, 1e-4),
    ((0.9, 0.95), 3, 2e-4),
    ((0.9, 0.95), 100, 4e-5),
]


def motion_error(settings: list[Setting], s: int) -> float:
    """Largest relative error of what rows with m = 1 move after step s, over all √v / eps."""
    roots = np.array([0.0, *np.logspace(-14, 4, 90)])
    zeros = torch.zeros(roots.size, 1, dtype=torch.float64)
    variance = torch.from_numpy(roots**2)[:, None].to(zeros.device)
    missed = logged(settings, first=s, window=len(settings))
    table = Table(zeros, zeros + 1, variance, [s] * roots.size, missed, 64)
    moved = functional.gather_current(table.lagging("dense"), torch.arange(roots.size))
    exact, _, _ = replayed((0 * roots, 1 + 0 * roots, roots**2), s, settings, "dense")
    return float(np.abs(moved.cpu().numpy().flatten() / exact - 1).max())


@pytest.mark.parametrize(("betas", "s", "limit"), ERRORS)
def test_error_of_a_rule(engine, betas, s, limit):
    window = math.ceil(math.log(1e-8) / math.log(betas[0] / math.sqrt(betas[1])))
    if engine == "emulated":
        window = min(window, 200)
    for missed_steps in (1, 5, 20, window):
        error = motion_error([Setting(1e-3, *betas)] * (s + missed_steps), s)
        assert error <= (limit if missed_steps > RULE_NODES else 1e-13)


HOST_ENGINES = ["reference", "cpu"]


@pytest.fixture(params=HOST_ENGINES)
def host_engine(request):
    """Engines that extend rules."""
    with functional.use_engine(request.param):
        yield request.param


def schedule(number: int, j: int) -> Setting:
    """Schedules of which every setting changes, in leaps and to 0."""
    if number == 0:  # warmup from 0, and 0 now and then
        return Setting(lr=0.0 if j < 5 or j % 3 == 0 else 1e-3 * j)
    if number == 1:  # OneCycleLR's betas
        return Setting(lr=1e-3, beta1=0.85 + 0.1 * abs(math.sin(j / 9)), beta2=0.999)
    if number == 2:
        return Setting(lr=1e-3, eps=1e-8 if j < 80 else 1e-7, weight_decay=0.5 * (j % 2))
    return Setting(lr=0.9, weight_decay=1.0, beta2=0.99 + 0.009 * (j % 2))


@pytest.mark.parametrize(("number", "limit"), [(0, 3e-8), (1, 3e-8), (2, 1e-5), (3, 1e-14)])
def test_rules_under_changing_settings(host_engine, number, limit):
    settings = [schedule(number, j) for j in range(1, 160)]
    for s in (8, 60, 157):
        assert motion_error(settings, s) <= (limit if s < 150 else 1e-12)


def test_steps_that_move_nothing(host_engine):
    """lr = 0 has no weight: no node, no NaN; moments go on fading."""
    missed = logged([Setting(lr=0.0)] * 5)
    identity = [0.0, 0.9**3, 0.999**3, 0.0, 1.0] + [0.0] * (RULE_WIDTH - 5)
    assert missed.rules[2].tolist() == pytest.approx(identity, rel=1e-15)
    param = torch.tensor([[1.0, -0.0]])
    table = Table(param, torch.ones(1, 2), torch.ones(1, 2), [2], missed)
    functional.catch_up_(table.lagging("dense"), torch.tensor([0]))
    assert torch.equal(bits(table.values()[0]), bits(param))
    assert table.values()[1].flatten().tolist() == pytest.approx([0.9**3] * 2)


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.0)])
def test_betas_of_0(host_engine, betas):
    """beta1 = 0: momentum is gone at once. beta2 = 0: no node is finite. Only decay is left."""
    missed = logged([Setting(0.1, *betas, weight_decay=0.5)] * 3)
    assert missed.rules.isfinite().all()
    assert missed.rules[0].tolist()[:4] == pytest.approx(
        [0.95**3 - 1, betas[0] ** 3, betas[1] ** 3, 0.0]
    )


def test_no_eps_leaves_decay(host_engine):
    """eps = 0 has no node either: for mode "decay"."""
    missed = logged([Setting(0.1, eps=0.0, weight_decay=0.5)] * 3)
    assert missed.rules.isfinite().all()
    assert missed.rules[:3, 0].tolist() == pytest.approx([0.95**k - 1 for k in (3, 2, 1)])
    assert not missed.rules[:, 3].any()


def test_a_tiny_eps(host_engine):
    """c stays a normal float32 where √v is 0."""
    missed = logged([Setting(eps=1e-38)] * 4)
    assert (missed.rules[:4, 4] >= torch.finfo(torch.float32).tiny).all()
    table = Table(torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), [1], missed)
    assert functional.gather_current(table.lagging("dense"), torch.tensor([0])).isfinite().all()


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (0, 64), (3, 130), (65, 200), (9, 9)])
def test_rules_are_extended_where_asked(begin, end):
    """Both engines: the same numbers in [begin, end), others bit for bit."""
    results = []
    for name in HOST_ENGINES:
        with functional.use_engine(name):
            log = Log(0, 200, 176)
            for j in range(1, 12):
                step = torch.tensor(step_numbers(schedule(1, j), j), dtype=torch.float64)
                functional.prepare_extend_rules(log.state, log.rules, 10 * j, 200, step)()
            state, rules = log.state.clone(), log.rules.clone()
            step = torch.tensor(step_numbers(Setting(), 12), dtype=torch.float64)
            functional.prepare_extend_rules(log.state, log.rules, begin, end, step)()
            outside = [*range(begin), *range(end, 200)]
            assert torch.equal(bits(log.state[:, outside]), bits(state[:, outside]))
            assert torch.equal(bits(log.rules[outside]), bits(rules[outside]))
            assert begin == end or (log.rules[begin:end, 1] != rules[begin:end, 1]).all()
            results.append((log.state, log.rules))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- new rows


def test_new_rows_begin_now(engine):
    """Fresh rows, and freed ones that are reused; rows that were there keep their step."""
    entries = torch.full((64, 2), MISSING)
    index = RowIndex(entries, torch.zeros(3, dtype=torch.int64), torch.zeros(8, dtype=torch.int64))
    slots = [
        Slot(str(number), dim, 4, dtype, entries.device)
        for number, (dim, dtype) in enumerate(
            [(1, torch.int64), (3, torch.float32), (1, torch.int32)]
        )
    ]
    for slot in slots:
        slot.reserve(16)
    ids_by_row, embedding, last_step = slots
    rest = 7, Distribution(DistributionKind.CONSTANT, 0.5)

    def insert(ids, now):
        return functional.find_or_insert_(
            index, torch.tensor(ids), ids_by_row, embedding, *rest, last_step, now
        )

    first = insert([5, 9, 5, 1], 3)
    assert functional.gather(last_step, first).flatten().tolist() == [3, 3, 3, 3]
    freed = functional.delete_(index, torch.tensor([9]))
    again = insert([9, 2, 5], 8)
    assert again[0] in freed or again[1] in freed
    assert functional.gather(last_step, again).flatten().tolist() == [8, 8, 3]
    functional.find_or_insert_(index, torch.tensor([77]), ids_by_row, embedding, *rest)
    assert int((last_step.value() != 0).sum()) == 4
