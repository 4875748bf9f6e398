"""The log of a table's steps: its rules beside the sums they stand for, and how it forgets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_allocation import Shortage

from cupy_sparse_adamw import functional, missed_steps
from cupy_sparse_adamw._types import RULE_CHUNK, Hyperparams, Missed
from cupy_sparse_adamw.missed_steps import MissedSteps, step_scalars

HYPER = Hyperparams(1e-3, 0.9, 0.999, 1e-8, 0.1)
#: √v of rows: 0, and far below and above ε.
ROOTS = np.concatenate([[0.0], np.logspace(-14, 4, 60)])


def setting(t: int) -> Hyperparams:
    """A learning rate that changes with every step."""
    return HYPER._replace(lr=1e-3 * (1 + t % 5))


def logged(steps: int, dense: bool = True, setting=setting, t: int = 0) -> MissedSteps:
    log = MissedSteps(dense, t)
    for _ in range(steps):
        log.advance(step_scalars(setting(log.t + 1), log.t + 1))
    return log


def on_host(log: MissedSteps, dtype: torch.dtype = torch.float32) -> Missed:
    return log.on(torch.device("cpu"), dtype)


def motion(log: MissedSteps, s: int) -> np.ndarray:
    """What ``Missed`` says that S is at ROOTS for rows whose last update was at step s."""
    missed = on_host(log)
    _, _, _, weight, c, *rest = missed.rules[s - missed.first].tolist()
    factor = missed.factors[(s - missed.first) // RULE_CHUNK].tolist()
    d, e = [0.0, *rest[:5]], [0.0, *rest[5:10]]
    u = ROOTS / (c + ROOTS)
    above, here = np.ones_like(u), 1 + d[5] * u
    for k in range(4, 0, -1):
        above, here = here, (1 + d[k] * u) * here - e[k + 1] * u * u * above
    share = (here - e[1] * u * above) / (here - e[1] * u * u * above)
    return weight * (1 + factor[0]) / (c + ROOTS) * share


def expected(log: MissedSteps, s: int, setting=setting) -> dict[str, object]:
    """The same, step by step, as torch.optim.AdamW would: what is left of 1, and of moments."""
    param, exp_avg, exp_avg_sq, moved = 1.0, 1.0, 1.0, np.zeros_like(ROOTS)
    for j in range(s + 1, log.t + 1):
        hyper = setting(j)
        exp_avg, exp_avg_sq = exp_avg * hyper.beta1, exp_avg_sq * hyper.beta2
        keep = 1 - hyper.lr * hyper.weight_decay
        param *= keep
        root = ROOTS * math.sqrt(exp_avg_sq / (1 - hyper.beta2**j))
        moved = keep * moved + hyper.lr * exp_avg / (1 - hyper.beta1**j) / (root + hyper.eps)
    return {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "moved": moved}


def kept(log: MissedSteps, s: int) -> tuple[float, float, float]:
    """What ``Missed`` says is left of a weight and of both moments."""
    missed = on_host(log)
    a, b1, b2 = missed.rules[s - missed.first, :3].tolist()
    f, f2 = missed.factors[(s - missed.first) // RULE_CHUNK].tolist()
    return 1 + a + f + a * f, b1, b2 * f2


@pytest.mark.parametrize(
    ("s", "limit"), [(0, 3e-6), (3, 2e-7), (10, 5e-9), (100, 1e-12), (520, 1e-13), (899, 1e-13)]
)
def test_rules_stand_for_the_sum(s, limit):
    """Within better than the bounds of docs/untouched.md, whatever √v is."""
    log = logged(900)
    wanted = expected(log, s)
    assert np.max(np.abs(motion(log, s) / wanted["moved"] - 1)) <= limit
    param, exp_avg, exp_avg_sq = kept(log, s)
    assert param == pytest.approx(wanted["param"], rel=1e-12)
    assert exp_avg_sq == pytest.approx(wanted["exp_avg_sq"], rel=1e-12)
    is_over = wanted["exp_avg"] <= missed_steps.MOMENTUM_ENDS * math.sqrt(wanted["exp_avg_sq"])
    if s < 512:  # its chunk is closed
        assert is_over
        assert exp_avg == 0.0
    else:
        assert exp_avg == pytest.approx(wanted["exp_avg"], rel=1e-12)


@pytest.mark.parametrize(
    ("betas", "s", "limit"),
    [
        ((0.95, 0.999), 0, 2e-5),
        ((0.95, 0.999), 10, 1e-7),
        ((0.99, 0.999), 10, 2e-5),
        ((0.99, 0.999), 100, 1e-7),
        ((0.9, 0.99), 10, 5e-8),
        ((0.99, 0.995), 100, 1e-4),
        ((0.9, 0.95), 10, 1e-4),
        ((0.25, 0.5), 10, 1e-5),
        ((0.04, 0.2), 10, 1e-6),  # beta2 to the power of 300 is no number
        ((0.0, 0.999), 10, 0.0),
    ],
)
def test_rules_of_other_betas(betas, s, limit):
    def setting(t):
        return HYPER._replace(beta1=betas[0], beta2=betas[1])

    log = logged(700, setting=setting)
    wanted = expected(log, s, setting)["moved"]
    found = motion(log, s)
    if betas[0]:
        assert np.max(np.abs(found / wanted - 1)) <= limit
    else:  # without momentum there is nothing to miss
        assert not found.any()
        assert not wanted.any()


def test_by_hand():
    """One step, two steps: lr 0.1, decay 0.5, beta1 0.5, beta2 0.75, eps 0.25."""
    hyper = Hyperparams(0.1, 0.5, 0.75, 0.25, 0.5)
    log = MissedSteps(dense=True)
    log.advance(step_scalars(hyper, 1))
    # s = 0, t = 1: 0.95 left; m 0.5, v 0.75; 0.1 / 0.5 * 0.5 / (sqrt(0.75 v / 0.25) + 0.25)
    assert kept(log, 0) == pytest.approx((0.95, 0.5, 0.75), rel=1e-15)
    one = 0.1 / (ROOTS * math.sqrt(3.0) + 0.25)
    assert motion(log, 0) == pytest.approx(one, rel=1e-13)
    log.advance(step_scalars(hyper, 2))
    # the second: 1 - beta1^2 = 0.75, 1 - beta2^2 = 0.4375, m 0.25, v 0.5625
    two = 0.95 * one + 0.1 / 0.75 * 0.25 / (ROOTS * math.sqrt(0.5625 / 0.4375) + 0.25)
    assert motion(log, 0) == pytest.approx(two, rel=1e-13)
    assert kept(log, 0) == pytest.approx((0.9025, 0.25, 0.5625), rel=1e-15)
    assert kept(log, 2) == (1.0, 1.0, 1.0)


def test_decay_alone_has_no_moments():
    log = logged(700, dense=False)
    for s in (0, 300, 699):
        wanted = expected(log, s)["param"]
        assert kept(log, s)[0] == pytest.approx(wanted, rel=1e-12)
    assert log.kind(torch.float64) == log.kind(torch.float32) == "decay"


def test_where_rules_are_not_exact_enough():
    def replayed(**changes):
        log = logged(20)
        log.advance(step_scalars(HYPER._replace(**changes), 21))
        return log.kind(torch.float32) == "replay"

    assert not replayed()
    assert not replayed(lr=0.5, beta1=0.5, weight_decay=0.0)
    assert not replayed(eps=1.4e-8)
    assert replayed(eps=1.6e-8)
    assert replayed(eps=6e-9)
    assert replayed(beta2=0.94)
    assert logged(3).kind(torch.float64) == "replay"
    assert logged(3).kind(torch.float16) == "dense"
    tf = logged(500, setting=lambda t: HYPER._replace(eps_mode="tf"))
    assert tf.kind(torch.float32) == "dense"


@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, 176), (torch.float64, 396)])
def test_a_window_beyond_which_replaying_moves_nothing(dtype, window):
    """The first k with (0.9 / sqrt(0.999))^k at most 1e-8, or 1e-18."""
    log = logged(30)
    assert log.window(dtype) == on_host(log, dtype).window == window
    log.advance(step_scalars(HYPER._replace(beta1=0.5), 31))
    assert log.window(dtype) == window  # rows from before still move


@pytest.mark.parametrize(
    ("betas", "kind"),
    [
        ((0.9, 0.999), "dense"),
        ((0.9, 0.95), "dense"),
        ((0.99, 0.995), "dense"),
        ((0.0, 0.5), "dense"),
        ((0.95, 0.95), "replay"),
        ((0.981, 0.99), "replay"),
        ((0.99, 0.9802), "replay"),
    ],
)
def test_rules_need_betas_for_which_they_are_exact_enough(betas, kind):
    log = logged(3, setting=lambda t: HYPER._replace(beta1=betas[0], beta2=betas[1]))
    assert log.kind(torch.float32) == kind


def test_forgetting_changes_nothing_that_is_left():
    log, other = logged(1100), logged(1100)
    log.forget_before(512)
    assert (log.first, other.first) == (512, 0)
    for _ in range(300):
        for each in (log, other):
            each.advance(step_scalars(setting(each.t + 1), each.t + 1))
    for s in (512, 767, 768, 1000, 1100, 1399):
        assert np.array_equal(motion(log, s), motion(other, s))
        assert kept(log, s) == kept(other, s)
    steps = on_host(log).steps[: log.t - log.first]
    assert torch.equal(steps, on_host(other).steps[512 : other.t])


def test_a_log_that_forgot_is_as_one_that_is_loaded():
    log = logged(5, setting=lambda t: HYPER._replace(beta2=0.95, beta1=0.95))
    assert log.is_exact_only
    for _ in range(1000):
        log.advance(step_scalars(HYPER, log.t + 1))
    log.forget_before(512)
    again = MissedSteps.replayed(log.export())
    assert log.is_exact_only is again.is_exact_only is False
    assert log.window(torch.float32) == again.window(torch.float32)


def test_forgetting_rules_that_are_still_open():
    slow = [
        logged(800, setting=lambda t: HYPER._replace(beta1=0.99)),
        logged(800, setting=lambda t: HYPER._replace(beta1=0.99)),
    ]
    slow[0].forget_before(512)
    for log in slow:
        log.advance(step_scalars(HYPER, 801))
    assert np.array_equal(motion(slow[0], 600), motion(slow[1], 600))


def test_a_full_log_says_what_to_bring_up_to_date(monkeypatch):
    monkeypatch.setattr(missed_steps, "MAX_ENTRIES", 1024)
    log = logged(1000)
    assert log.oldest_to_keep() is None
    while log.oldest_to_keep() is None:
        log.advance(step_scalars(HYPER, log.t + 1))
    assert (log.t, log.oldest_to_keep()) == (1022, 512)
    assert on_host(log).rules.shape[0] == 1024  # and it takes no more memory
    log.forget_before(512)
    assert log.oldest_to_keep() is None


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_a_prepared_step_takes_no_memory(engine, dense):
    """Through the steps at which arrays grow and chunks of rules are closed."""
    with functional.use_engine(engine):
        log = MissedSteps(dense)
        while log._open < 2 * RULE_CHUNK:
            advance = log.prepare(step_scalars(HYPER, log.t + 1))
            with Shortage(1, MemoryError):
                advance()
    other = logged(log.t, dense, setting=lambda t: HYPER)
    assert np.allclose(log._rules.numpy(), other._rules.numpy(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_memory_that_runs_out_changes_no_log(engine, dense):
    log = logged(1023, dense)  # arrays are full: the next step makes longer ones
    before = log.t, log.first, log._open, *motion(log, 600), *kept(log, 600)
    acts = lambda: log.prepare(step_scalars(HYPER, 1024)), lambda: log.forget_before(512)
    for act in acts:
        for at in range(1, 1000):
            try:
                with functional.use_engine(engine), Shortage(at, MemoryError):
                    act()
                break
            except MemoryError:
                assert before == (log.t, log.first, log._open, *motion(log, 600), *kept(log, 600))
        assert 2 < at < 999


def test_a_clone_goes_its_own_way():
    log = logged(50)
    other = log.clone()
    other.advance(step_scalars(HYPER, 51))
    assert (log.t, other.t) == (50, 51)
    assert np.array_equal(motion(log, 3), motion(logged(50), 3))


@pytest.mark.parametrize("dense", [True, False])
def test_saved_and_replayed(dense):
    log = logged(900, dense, t=37)
    saved = log.export()
    assert (saved["dense"], saved["first"], list(saved["steps"].shape)) == (dense, 37, [900, 6])
    again = MissedSteps.replayed(saved)
    mine, its = on_host(log), on_host(again)
    assert (mine.t, mine.first, mine.window) == (its.t, its.first, its.window) == (937, 37, 176)
    for key in ("rules", "factors", "steps"):
        assert torch.equal(getattr(mine, key), getattr(its, key)), key


@pytest.mark.parametrize(
    "forge",
    [
        lambda saved: None,
        lambda saved: {**saved, "dense": 1},
        lambda saved: {**saved, "first": -1},
        lambda saved: {**saved, "first": 2**31},
        lambda saved: {**saved, "steps": saved["steps"].float()},
        lambda saved: {**saved, "steps": saved["steps"][:, :5]},
        lambda saved: {**saved, "steps": saved["steps"].new_zeros(1 << 17, 6)},
        *[
            lambda saved, column=column, value=value: {
                **saved,
                "steps": saved["steps"].index_put(
                    (torch.tensor(2), torch.tensor(column)), torch.tensor(value).double()
                ),
            }
            for column, value in [
                (0, 1.0),
                (0, -0.1),
                (1, math.inf),
                (2, 0.9),
                (3, 0.0),
                (4, 1.0),
                (4, 0.9999),
                (5, 0.5),
                (5, math.nan),
            ]
        ],
    ],
)
def test_what_is_no_log_is_refused(forge):
    with pytest.raises(ValueError, match="a saved log of missed steps is none"):
        MissedSteps.replayed(forge(logged(5).export()))


def test_what_a_gpu_has_is_what_the_host_has(monkeypatch):
    """Only what may have changed is sent; it must be all that has."""
    sent = []
    monkeypatch.setattr(missed_steps, "_sent", lambda tensor, device: tensor.clone())
    monkeypatch.setattr(
        missed_steps,
        "_send",
        lambda tensor, target: (sent.append(tensor.numel()), target.copy_(tensor)),
    )
    gpu = torch.device("cuda")
    log = MissedSteps(dense=True)
    random = torch.Generator().manual_seed(1)
    for step in range(1500):
        hyper = setting(step) if step < 1000 else HYPER._replace(beta1=0.1)
        log.advance(step_scalars(hyper, log.t + 1))
        if step == 1400:
            log.forget_before(512)
        if torch.rand((), generator=random) < 0.3:
            mine, its = on_host(log), log.on(gpu, torch.float32)
            assert (mine.t, mine.first, mine.window) == (its.t, its.first, its.window)
            used = mine.t - mine.first + 1
            assert torch.equal(mine.rules[:used], its.rules[:used])
            assert torch.equal(mine.factors, its.factors)
            assert torch.equal(mine.steps[: used - 1], its.steps[: used - 1])
    assert max(sent) <= 16 * (3 * RULE_CHUNK + 200)  # not all of 1,500 entries
