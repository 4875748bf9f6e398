"""Which runs a case needs next: first those that choose its learning rate, then the test runs.

Learning rates are powers of two. From the plan's first guess the search moves on until the best
rate has a worse one on both sides; rate and number of epochs have the least mean validation error
over the tuning seeds. The test runs train with these on the training and validation parts, with
seeds of their own, and are measured once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .runs import Results, Setting

TIMING_SEEDS = (200, 201, 202)  # of runs that are made to see how long an epoch takes
LEAST_EXPONENT, MOST_EXPONENT = -15, -1  # of a learning rate as a power of two


@dataclass(frozen=True)
class Case:
    """One cell of the study: a mode, batch size and decay on the data set of that name."""

    data: str
    mode: str
    batch: int
    decay: float


@dataclass(frozen=True)
class Plan:
    """How a case is studied.

    exponent: 2 to its power is the first learning rate tried. epochs: the most of a tuning run.
    tuning_seeds, test_seeds: disjoint.
    """

    exponent: int
    epochs: int
    tuning_seeds: tuple[int, ...]
    test_seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        both = set(self.tuning_seeds) & set(self.test_seeds)
        if both:
            raise ValueError(f"a seed must be for tuning or for the test, got both for {both}")


@dataclass(frozen=True)
class Choice:
    """What tuning chose. error, auc: means over the tuning seeds on the validation part."""

    exponent: int
    epochs: int
    error: float
    auc: float

    @property
    def lr(self) -> float:
        """The learning rate."""
        return 2.0**self.exponent


def wanted(case: Case, plan: Plan, results: Results) -> list[Setting]:
    """The runs that can be made next and are not in the results; none if the case is finished."""
    exponents = _exponents(case, plan, results)
    missing = [
        setting
        for exponent in exponents
        for setting in _tuning_settings(case, plan, exponent)
        if results.get(setting) is None
    ]
    if missing:
        return missing
    best = choice(case, plan, results)
    if best is None:
        raise RuntimeError(f"no learning rate is finite for {case}")
    return [setting for setting in test_settings(case, plan, best) if results.get(setting) is None]


def choice(case: Case, plan: Plan, results: Results) -> Choice | None:
    """The best learning rate and number of epochs, or None while the search goes on."""
    scores = [_score(case, plan, results, e) for e in _exponents(case, plan, results)]
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return None
    best = min(known, key=lambda score: score.error)
    return best if math.isfinite(best.error) else None


def tried(case: Case, plan: Plan, results: Results) -> dict[int, Choice]:
    """What each learning rate tried has come to, by its exponent."""
    scores = {e: _score(case, plan, results, e) for e in range(LEAST_EXPONENT, MOST_EXPONENT + 1)}
    return {exponent: score for exponent, score in scores.items() if score is not None}


def timing_settings(cases: Iterable[Case]) -> list[Setting]:
    """Single epochs of every mode and batch size, in turns, with the largest decay of each."""
    decays: dict[tuple[str, str, int], float] = {}
    for case in cases:
        key = case.data, case.mode, case.batch
        decays[key] = max(case.decay, decays.get(key, 0))
    return [
        Setting(data, mode, batch, decay, 2.0**-10, seed, 1, False)
        for seed in TIMING_SEEDS
        for (data, mode, batch), decay in decays.items()
    ]


def test_settings(case: Case, plan: Plan, best: Choice) -> list[Setting]:
    """The test runs with what tuning chose."""
    return [
        Setting(case.data, case.mode, case.batch, case.decay, best.lr, seed, best.epochs, True)
        for seed in plan.test_seeds
    ]


def _tuning_settings(case: Case, plan: Plan, exponent: int) -> list[Setting]:
    lr = 2.0**exponent
    return [
        Setting(case.data, case.mode, case.batch, case.decay, lr, seed, plan.epochs, False)
        for seed in plan.tuning_seeds
    ]


def _exponents(case: Case, plan: Plan, results: Results) -> list[int]:
    """Exponents to try as far as the results so far say: the best one's neighbours are in it."""
    tried = [plan.exponent - 1, plan.exponent, plan.exponent + 1]
    while True:
        scores = {exponent: _score(case, plan, results, exponent) for exponent in tried}
        errors = {e: score.error for e, score in scores.items() if score is not None}
        if len(errors) < len(tried):
            return tried
        # Among rates that all blew up the least is the best: the search goes on below it.
        best = min(errors, key=lambda exponent: (errors[exponent], exponent))
        beyond = [e for e in (best - 1, best + 1) if e not in tried]
        beyond = [e for e in beyond if LEAST_EXPONENT <= e <= MOST_EXPONENT]
        if not beyond:
            return tried
        tried += beyond


def _score(case: Case, plan: Plan, results: Results, exponent: int) -> Choice | None:
    """The best epoch of a learning rate, or None while runs are missing."""
    runs = [results.get(setting) for setting in _tuning_settings(case, plan, exponent)]
    found = [run for run in runs if run is not None]
    if len(found) < len(runs):
        return None
    # Runs end when they get no better: only epochs that all of them have can be compared.
    errors = [_mean(values) for values in zip(*(run["error"] for run in found), strict=False)]
    aucs = [_mean(values) for values in zip(*(run["auc"] for run in found), strict=False)]
    best = min(range(len(errors)), key=lambda epoch: errors[epoch])
    return Choice(exponent, best + 1, errors[best], aucs[best])


def _mean(values: tuple[float, ...]) -> float:
    """The mean; infinity in place of NaN, which compares with nothing."""
    mean = math.fsum(values) / len(values)
    return mean if math.isfinite(mean) else math.inf
