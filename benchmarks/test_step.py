"""One optimizer step beside everybody else who updates the touched rows of a table.

make bench
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict

import pytest
import timing
import torch
from cases import Case, Workload
from conftest import free_memory, note
from rivals import Ours, SparseAdam, enter

#: The cases of the goals (goals.py). Weights and moments take 200 MB (D = 16) to 1.6 GB.
CASES = [
    Case("D64-uniform", dim=64, count=65_536),
    Case("D128-uniform", dim=128, count=65_536),
    Case("D16-uniform", dim=16, count=262_144),
    Case("D64-zipf1.2", dim=64, count=262_144, zipf=1.2),
]


def sweep(name, cases):
    """Test parameters: cases with the x of their plot."""
    return [pytest.param(case, name, x, id=case.name) for x, case in cases]


TOUCHED = sweep(
    "touched rows",
    [
        (n, Case(f"touched-{n}", dim=16, count=n, rows=1 << 21, distinct=True))
        for n in (1_000, 10_000, 100_000, 1_000_000)
    ],
)
SIZES = sweep(
    "table rows",
    [
        (rows, Case(f"rows-{rows}", dim=8, count=65_536, rows=rows))
        for rows in (10**4, 10**5, 10**6, 10**7, 10**8)
    ],
)
TABLES = sweep(
    "tables",
    [
        (tables, Case(f"tables-{tables}", 16, 19_200 // tables, 1_048_800 // tables, tables))
        for tables in (1, 100, 300, 1200)
    ],
)
DUPLICATES = sweep(
    "Zipf exponent",
    [
        (alpha, Case(f"zipf-{alpha}", dim=64, count=65_536, rows=1 << 18, zipf=alpha))
        for alpha in (0.0, 0.8, 1.2, 1.5)
    ],
)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.quick] if case.dim < 128 else [])
        for case in CASES
    ],
)
def test_step(run_case, case):
    run_case(case)


@pytest.mark.parametrize(("case", "axis", "x"), [*TOUCHED, *SIZES, *TABLES, *DUPLICATES])
def test_sweep(run_case, case, axis, x):
    run_case(case, sweep=(axis, x))


@pytest.mark.quick
def test_one_id(run_case):
    """What a step costs before it has anything to do."""
    run_case(Case("one-id", dim=64, count=1, rows=1000), cold=False)


def test_after_backward(benchmark, request, copy, shrink, rounds):
    """The step right after one of torch's parallel operations, whose threads still spin."""
    x, y = torch.zeros(1 << 20), torch.ones(1 << 20)
    work = Workload(shrink(Case("after-torch-op", dim=64, count=65_536)))
    (ours, rested, theirs), _ = enter(work, (Ours, Rested, RestedSparseAdam), free_memory())
    race = timing.Race(ours, [copy, rested, theirs], rounds=rounds, before=lambda: x.add_(y))
    seconds = race.run(benchmark)
    figures = timing.summary(race, seconds, work.floor)
    figures["figures"] = {"of a step at rest": 1 / figures["rivals"][Rested.name]["ratio"]}
    note(benchmark, request, work.case.name, figures)


class Rested(Ours):
    name = "the same at rest"


class RestedSparseAdam(SparseAdam):
    name = "SparseAdam at rest"


class Scaled:
    """Us, or a rival, on another workload."""

    def __init__(self, name, case, kind=Ours):
        self.name, self.case = name, case
        (self.ours,), _ = enter(Workload(case), (kind,), free_memory())
        self.ours.work.release()
        self.load, self.step = self.ours.load, self.ours.step


def race_of_ours(benchmark, request, copy, rounds, name, case, others):
    """Time a case beside other cases of ours. Returns the figures, with the case's own floor."""
    ours = Scaled(name, case)
    race = timing.Race(ours, [copy, *(Scaled(*other) for other in others)], rounds=rounds)
    seconds = race.run(benchmark)
    figures = timing.summary(race, seconds, ours.ours.work.floor)
    figures["figures"] = {}
    note(benchmark, request, name, figures)
    return {other: 1 / found["ratio"] for other, found in figures["rivals"].items()}


def test_hot_id(benchmark, request, copy, shrink, rounds):
    """A tenth of the batch is one id, beside the same batch without it."""
    plain = shrink(Case("without it", dim=64, count=262_144))
    hot = plain._replace(hot=0.1)
    found = race_of_ours(benchmark, request, copy, rounds, "hot-id", hot, [("without it", plain)])
    benchmark.extra_info["figures"]["of the batch without it"] = found["without it"]


def test_table_size(benchmark, request, copy, shrink, rounds):
    """A table of 10^8 rows beside one of 10^7, the same number of ids, per touched row."""
    large = shrink(Case("rows-10^8", dim=8, count=65_536, rows=10**8))
    small = large._replace(rows=large.rows // 10)
    touched = [sum(len(ids[0].unique()) for ids in Workload(case).ids) for case in (large, small)]
    found = race_of_ours(
        benchmark, request, copy, rounds, "table-size", large, [("10^7 rows", small)]
    )
    per_row = found["10^7 rows"] * touched[1] / touched[0]
    benchmark.extra_info["figures"]["per row, of 10^7 rows"] = per_row


def test_linear(benchmark, request, copy, shrink, rounds):
    """10^6 touched rows beside 10^5 and 3 × 10^5, per row."""
    many = shrink(Case("10^6", dim=64, count=1_000_000, rows=1 << 21, distinct=True))
    fewer = {f"{k} × 10^5 rows": many._replace(count=many.count * k // 10) for k in (1, 3)}
    found = race_of_ours(
        benchmark, request, copy, rounds, "touched-linear", many, list(fewer.items())
    )
    for name, case in fewer.items():
        per_row = found[name] * case.count / many.count
        benchmark.extra_info["figures"][f"per row, of {name}"] = per_row


@pytest.mark.quick
def test_many_tables(benchmark, request, shrink, rounds):
    """300 tables × 64 ids beside one table × 19,200 ids; engine and host apart."""
    many = shrink(Case("300 tables", dim=16, count=64, rows=3496, tables=300))
    one = many._replace(count=many.count * many.tables, rows=many.rows * many.tables, tables=1)
    many_tables, one_table = Scaled("300 tables", many), Scaled("one table", one)
    theirs = Scaled(SparseAdam.name, many, SparseAdam)
    race = timing.Race(many_tables, [one_table, theirs], rounds=rounds)
    seconds = race.run(benchmark)
    figures = timing.summary(race, seconds)
    del figures["rivals"][one_table.name]  # ourselves: nothing to compare with the baseline
    # In rounds of their own, since the clock itself takes time.
    clock, engine, host = timing.EngineClock(), defaultdict(list), defaultdict(list)
    for turn in range(3 * rounds):
        for who in (many_tables, one_table):
            who.load(turn)
            timing.settle(timing.SETTLE_S)
            with clock.running():
                begin = time.perf_counter()
                who.step()
                seconds = time.perf_counter() - begin
            engine[who.name].append(clock.seconds)
            host[who.name].append(seconds - clock.seconds)
    name = many_tables.name
    figures["figures"] = {
        "engine, of one table": timing.ratio(engine[name], engine["one table"])[0],
        "engine ms": 1e3 * statistics.median(engine[name]),
        "engine ms, one table": 1e3 * statistics.median(engine["one table"]),
        "host µs a table": 1e6 * statistics.median(host[name]) / many.tables,
        "host µs, one table": 1e6 * statistics.median(host["one table"]),
    }
    note(benchmark, request, "many-tables", figures)
