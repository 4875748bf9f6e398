"""What it costs that rows which no batch touched miss nothing: modes "decay" and "dense"."""

from __future__ import annotations

import statistics
import time

import pytest
import timing
import torch
from cases import SETS, Case, Workload, lookup_bytes
from conftest import note
from rivals import BETA1, BETA2, DECAY, EPS, LR
from test_hash_table import new_hash_table

from cupy_sparse_adamw import HashTable, SparseAdamW
from cupy_sparse_adamw._types import Hyperparams
from cupy_sparse_adamw.missed_steps import MAX_ENTRIES, MissedSteps, step_scalars

CASE = Case("untouched", dim=64, count=65_536)
HYPER = Hyperparams(LR, BETA1, BETA2, EPS, DECAY)
#: Steps that the rows of a batch have missed.
BEHIND = (10, 1_000, MAX_ENTRIES - 600)


def log_of(mode: str) -> MissedSteps:
    """A log that is all but full."""
    log = MissedSteps(mode == "dense")
    for t in range(1, MAX_ENTRIES - 500):
        log.advance(step_scalars(HYPER, t))
    return log


class Table:
    """A HashTable and its optimizer in one mode, with moments in all rows."""

    def __init__(self, work: Workload, mode: str) -> None:
        self.mode = mode
        self.table = new_hash_table(work)
        self.optimizer = SparseAdamW(
            {"table": self.table}, LR, BETA1, BETA2, EPS, DECAY, untouched=mode
        )
        self.table(torch.arange(work.case.rows)).backward(torch.ones(work.case.rows, CASE.dim))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if mode != "skip":
            log = log_of(mode)
            state = self.optimizer.state[self.table]
            state["step"].fill_(log.t)
            self.table.begin_to_miss(state, log)


class Step:
    """A step of such a table whose rows are so many steps behind.

    Several are steps of one table. One after another they take different gradient sets, or a large
    cache would have the rows of the one before.
    """

    def __init__(self, work: Workload, table: Table, behind: int = 0) -> None:
        self.name = table.mode if not behind else f"{table.mode}, {behind} steps behind"
        self.work, self.of, self.behind = work, table, behind
        self.first_set = BEHIND.index(behind) if behind else 0

    def load(self, turn: int) -> None:
        table = self.of.table
        if self.behind:
            assert table.missed is not None
            table.get_slot("sparse_adamw_last_step").fill(table.missed.t - self.behind)
        number = (self.first_set + turn) % SETS
        self.ids, self.grad = self.work.ids[number][0], self.work.values[number][0]
        self.look_up()

    def look_up(self) -> None:
        self.of.table(self.ids).backward(self.grad)

    def step(self) -> None:
        self.of.optimizer.step()
        self.of.optimizer.zero_grad()


class Training(Step):
    """Lookup, backward and step."""

    def load(self, turn: int) -> None:
        super().load(turn)
        self.of.optimizer.zero_grad()

    def step(self) -> None:
        self.look_up()
        super().step()


@pytest.fixture(scope="module")
def tables(request: pytest.FixtureRequest) -> tuple[Workload, dict[str, Table]]:
    tiny = request.config.getoption("--tiny")
    work = Workload(CASE._replace(rows=CASE.rows // 64, count=CASE.count // 64) if tiny else CASE)
    found = {mode: Table(work, mode) for mode in ("skip", "decay", "dense")}
    work.release()
    return work, found


@pytest.mark.parametrize("kind", [Step, Training])
def test_modes(benchmark, request, copy, rounds, tables, kind):
    """Each mode beside mode "skip", rows 10 to 65,000 steps behind."""
    work, of = tables
    ours = kind(work, of["skip"])
    others = [kind(work, of[mode], behind) for mode in ("decay", "dense") for behind in BEHIND]
    race = timing.Race(ours, [copy, *others], rounds=rounds)
    seconds = race.run(benchmark)
    lookup = lookup_bytes(work.case.count, work.case.dim) if kind is Training else 0
    figures = timing.summary(race, seconds, work.floor + lookup)
    figures["figures"] = {
        f"{other.name}: of skip": figures["rivals"][other.name]["ratio"] for other in others
    }
    figures["rivals"] = {}  # they are ourselves: nothing to compare with the baseline
    note(benchmark, request, f"untouched-{kind.__name__.lower()}", figures)


class Reading:
    """A lookup in eval mode of rows that are a thousand steps behind."""

    def __init__(self, name: str, dtype: torch.dtype, beta1: float, beta2: float) -> None:
        self.name, self.ids = name, torch.arange(8_192)
        self.table = HashTable([CASE.dim], dtype=dtype)
        optimizer = SparseAdamW({"table": self.table}, LR, beta1, beta2, untouched="dense")
        self.table(self.ids).backward(torch.ones(len(self.ids), CASE.dim, dtype=dtype))
        optimizer.step()
        optimizer.zero_grad()
        log = self.table.missed
        assert log is not None
        hyper = HYPER._replace(beta1=beta1, beta2=beta2)
        while log.t - log.first <= 1_000:
            log.advance(step_scalars(hyper, log.t + 1))
        self.kind = log.kind(dtype)
        self.table.eval()

    def load(self, turn: int) -> None:
        pass

    @torch.no_grad()
    def step(self) -> None:
        self.table(self.ids)


def test_replaying(benchmark, request, rounds):
    """Where rules are not exact enough, missed steps are replayed: what a lookup costs then."""
    ours = Reading("rules", torch.float32, 0.9, 0.999)
    others = [
        Reading("fp32, betas .95, .95", torch.float32, 0.95, 0.95),
        Reading("fp64, betas .9, .999", torch.float64, 0.9, 0.999),
    ]
    assert [ours.kind, *(other.kind for other in others)] == ["dense", "replay", "replay"]
    race = timing.Race(ours, others, rounds=rounds)
    figures = timing.summary(race, race.run(benchmark))
    figures["figures"] = {
        f"{other.name}: of rules": figures["rivals"][other.name]["ratio"] for other in others
    }
    figures["rivals"] = {}
    note(benchmark, request, "untouched-replay", figures)


@pytest.mark.quick
def test_upkeep(benchmark, request):
    """The host's work for a step: a log that goes on by one, its rules by a node each.

    The more steps momentum lasts, the more rules are open: 176 at least with the default beta1,
    363 with 0.95, 1,929 with 0.99.
    """
    figures = {}
    for beta1 in (BETA1, 0.95, 0.99):
        log, hyper = MissedSteps(dense=True), HYPER._replace(beta1=beta1)

        def go_on(log: MissedSteps = log, hyper: Hyperparams = hyper) -> float:
            step = step_scalars(hyper, log.t + 1)
            begin = time.perf_counter()
            log.advance(step)
            return time.perf_counter() - begin

        for _ in range(3_000):
            go_on()
        seconds = [go_on() for _ in range(2_000)]
        figures[f"µs a step, beta1 {beta1}"] = 1e6 * statistics.median(seconds)
        if beta1 == BETA1:
            benchmark.pedantic(go_on, rounds=200, warmup_rounds=20)
    note(benchmark, request, "untouched-upkeep", {"figures": figures})
