"""The benchmarks' own parts: what is counted, who is timed, what is compared and shown."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import goals  # noqa: E402
import report  # noqa: E402
import rivals  # noqa: E402
import timing  # noqa: E402
from cases import Case, Workload, draw_ids, floor_bytes  # noqa: E402

from cupy_sparse_adamw import functional  # noqa: E402

# ---------------------------------------------------------------------- what is counted


def test_floor_bytes_by_hand():
    """Two rows of three elements, five gradients of them.

    Rows: 2 rows × 3 elements × 4 bytes × (weights and two moments, each read and written: 6) = 144.
    Gradients: 5 × 3 × 4 = 60. Row numbers: 5 × 8 = 40.
    """
    assert floor_bytes(touched=2, count=5, dim=3) == 144 + 60 + 40


def test_a_workloads_floor_counts_each_touched_row_once():
    work = Workload(Case("one row", dim=4, count=10, rows=1, tables=2))
    assert work.floor == 2 * (24 * 4 + 4 * 10 * 4 + 8 * 10)


def test_distinct_ids_are_distinct_and_in_range():
    ids = draw_ids(Case("", 1, 500, rows=600, distinct=True), torch.Generator().manual_seed(0))
    assert ids.unique().numel() == 500
    assert 0 <= ids.min() <= ids.max() < 600


def test_a_hot_id_replaces_a_tenth_and_leaves_the_rest():
    plain = Case("", 1, 1000, rows=100_000)
    ids = draw_ids(plain, torch.Generator().manual_seed(0))
    hot = draw_ids(plain._replace(hot=0.1), torch.Generator().manual_seed(0))
    changed = ids != hot
    assert hot[changed].unique().numel() == 1
    assert 99 <= int(changed.sum()) <= 100  # one may have been the hot row by chance


def test_zipf_ids_have_the_shares_of_the_law():
    """With exponent 1.2 over 1,000 rows, the first rank has 1 / Σ k^-1.2 = 23.1% of the ids."""
    ids = draw_ids(Case("", 1, 100_000, rows=1000, zipf=1.2), torch.Generator().manual_seed(0))
    shares = ids.bincount().sort(descending=True).values / len(ids)
    weights = torch.arange(1, 1001).double() ** -1.2
    exact = weights / weights.sum()
    assert shares[0].item() == pytest.approx(exact[0].item(), abs=0.005)
    assert shares[1].item() == pytest.approx(exact[1].item(), abs=0.005)


# ---------------------------------------------------------------------- who is timed

TINY = Case("tiny", dim=8, count=60, rows=40)
WIDE_KINDS = [rivals.Ours, *rivals.RIVALS]


@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize("kind", WIDE_KINDS, ids=lambda kind: kind.name)
def test_rivals_compute_what_they_claim(kind, tables):
    """Two steps against float64: duplicates, rows met in one step only, untouched rows."""
    work = Workload(TINY._replace(tables=tables))
    try:
        contender = kind(work)
    except rivals.NotPossible as reason:
        pytest.skip(str(reason))
    rivals.check(contender)


def test_expected_values_are_torchs():
    """The oracle of the check against torch.optim.AdamW in float64, on rows met in both steps."""
    work = Workload(TINY._replace(count=400))  # every row in every set
    rows, untouched = work.sample(0)
    exact = rivals.expected(work, rows, 0, "adamw", rivals.DECAY)
    weight = torch.nn.Parameter(work.initial().double())
    optimizer = torch.optim.AdamW([weight], lr=rivals.LR, weight_decay=rivals.DECAY)
    for turn in range(2):
        weight.grad = work.grads[turn][0].double().to_dense()
        optimizer.step()
    assert (rows.tolist(), untouched.tolist()) == (list(range(40)), [])
    torch.testing.assert_close(exact, weight.detach(), rtol=1e-12, atol=1e-12)


class Lazy(rivals.Ours):
    name = "lazy"

    def step(self):
        pass


class Sloppy(rivals.Ours):
    name = "sloppy"

    def step(self):
        super().step()
        with torch.no_grad():
            self.params[0] += 1e-3


@pytest.mark.parametrize("kind", [Lazy, Sloppy])
def test_a_wrong_rival_is_named(kind):
    with pytest.raises(AssertionError, match=f"{kind.name} is wrong on tiny"):
        rivals.enter(Workload(TINY._replace(count=10)), (kind,), 1e9)


def test_changed_untouched_rows_are_found():
    class Neighbour(rivals.Ours):
        name = "neighbour"

        def step(self):
            super().step()
            touched = torch.cat([ids[0] for ids in self.work.ids[:2]])
            free = next(row for row in range(40) if row not in touched)
            with torch.no_grad():
                self.params[0][free] += 1e-7

    with pytest.raises(AssertionError, match="that no gradient names"):
        rivals.enter(Workload(TINY._replace(count=10)), (Neighbour,), 1e9)


def test_who_does_not_fit_into_memory_is_listed_with_the_reason():
    work = Workload(TINY)
    entered, missing = rivals.enter(work, (rivals.Ours, rivals.DenseFused), 4 * work.table_bytes)
    assert [contender.name for contender in entered] == ["SparseAdamW"]
    assert "needs 0.0 GB" in missing["AdamW fused"]


# ---------------------------------------------------------------------- how it is timed


class Rounds:
    """pytest-benchmark's fixture as far as a race uses it, without its table at the end."""

    def pedantic(self, target, setup, rounds, warmup_rounds):
        seconds = []
        for _ in range(warmup_rounds + rounds):
            setup()
            begin = time.perf_counter()
            target()
            seconds.append(time.perf_counter() - begin)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=seconds[warmup_rounds:]))


class Sleeper:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def load(self, turn):
        self.log.append((self.name, "load", turn))

    def step(self):
        self.log.append((self.name, "step"))


def test_a_race_interleaves_and_begins_with_another_rival_each_round():
    log = []
    ours, first, second = (Sleeper(name, log) for name in ("ours", "a", "b"))
    race = timing.Race(ours, [first, second], rounds=4, warmup=2, wait=0.0)
    seconds = race.run(Rounds())
    steps = [entry[0] for entry in log if entry[1] == "step"]
    assert steps == ["a", "b", "ours", "b", "a", "ours"] * 3
    assert [entry[2] for entry in log if entry[:2] == ("ours", "load")] == [0, 1, 2, 3, 4, 5]
    assert len(seconds) == 4
    assert set(race.seconds["a"]) == set(race.seconds["b"]) == {0, 1, 2, 3}


def test_a_slow_rival_takes_part_in_fewer_rounds():
    log = []
    ours, slow = Sleeper("ours", log), Sleeper("slow", log)
    slow.step = lambda: (log.append(("slow", "step")), timing.settle(0.16))
    race = timing.Race(ours, [slow], rounds=10, warmup=3, wait=0.0)
    race.run(Rounds())
    assert sorted(race.seconds["slow"]) == [0, 3, 6, 9]
    assert log.count(("slow", "step")) == 1 + 4


def test_a_rival_that_is_known_to_be_slow_is_not_warmed_up():
    log = []
    ours, slow = Sleeper("ours", log), Sleeper("slow", log)
    race = timing.Race(ours, [slow], rounds=10, warmup=2, met=2, known={"slow": 0.6}, wait=0.0)
    race.run(Rounds())
    assert sorted(race.seconds["slow"]) == [0, 4, 8]
    assert [entry[2] for entry in log if entry[:2] == ("slow", "load")] == [4, 8, 12]
    assert [entry[2] for entry in log if entry[:2] == ("ours", "load")] == list(range(2, 14))


def test_one_slow_step_before_the_race_does_not_make_a_rival_slow():
    log = []
    ours, rival = Sleeper("ours", log), Sleeper("rival", log)
    race = timing.Race(ours, [rival], rounds=10, warmup=2, known={"rival": 0.2}, wait=0.0)
    race.run(Rounds())
    assert len(race.seconds["rival"]) == 10


def test_a_dense_rival_has_one_gradient_in_all_timed_steps():
    contender = rivals.DenseFused(Workload(TINY))
    for turn in range(2, 12):
        contender.load(turn)
        assert torch.equal(contender.params[0].grad, contender.work.grads[1][0].to_dense())


def test_the_ratio_is_the_median_over_rounds():
    """Not the ratio of medians, which would be 2 / 1: here a round was slow for both alike."""
    ours = [1.0, 1.0, 10.0]
    assert timing.ratio({0: 2.0, 1: 3.0, 2: 30.0}, ours)[0] == 3.0
    assert timing.ratio({2: 20.0}, ours) == (2.0, 0.0)


def test_the_engines_clock_counts_the_engine_and_nothing_else():
    contender = rivals.Ours(Workload(TINY))
    contender.load(0)
    clock = timing.EngineClock()
    with clock.running():
        contender.step()
    assert clock.seconds > 0
    with pytest.raises(RuntimeError, match="must follow"), clock.running():
        pass
    assert functional.segment.__module__ == "cupy_sparse_adamw.functional"  # put back


# ---------------------------------------------------------------------- comparison


def a_case(name="D64-uniform", ratio=5.0, percent=50.0, quick=True, **more):
    return {
        "case": name,
        "quick": quick,
        "not_timed": {},
        "rounds": 20,
        "ours_ms": 8.0,
        "rivals": {"SparseAdam": {"ms": 8.0 * ratio, "ratio": ratio, "spread": 0.1, "rounds": 20}},
        "floor": {
            "bytes": 1e8,
            "ms": 8.0 * percent / 100,
            "percent": percent,
            "spread": 0.1,
            "GB_per_s": 12.5,
            "copy_GB_per_s": 25.0,
        },
        **more,
    }


def save(path, cases, selection="all"):
    machine = {
        "cpu": {"brand_raw": "A CPU"},
        "cores": 2,
        "threads": 2,
        "last_level_cache": "32768K",
        "omp_wait_policy": "unset",
        "versions": {"torch": "2.13.0"},
        "selection": selection,
    }
    content = {
        "benchmarks": [{"extra_info": case} for case in cases],
        "machine_info": machine,
        "datetime": "2026-11-24T10:00:00",
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def compare(tmp_path, capsys):
    """Compare cases with a baseline of others. Returns the exit status and what was printed."""

    def run(now, before, selection="all", earlier=()):
        baseline = tmp_path / "baseline.json"
        old = tmp_path / "old.json"
        option = ["--baseline", str(baseline)]
        assert report.main([str(save(old, before)), "--write-baseline", *option]) == 0
        capsys.readouterr()
        runs = [
            str(save(tmp_path / f"new-{number}.json", cases, selection))
            for number, cases in enumerate([*earlier, now])
        ]
        status = report.main([*runs, "--compare", *option])
        return status, "".join(capsys.readouterr())

    return run


def test_a_fall_of_16_percent_fails_and_is_named(compare):
    status, said = compare([a_case(ratio=4.2, percent=42.0)], [a_case()])
    assert status == 1
    assert "WORSE: D64-uniform: -16%, the median of 2: " in said
    assert "SparseAdam / ours from 5.00 to 4.20 (-16%)" in said
    assert "floor / ours from 0.50 to 0.42 (-16%)" in said


def test_a_fall_of_14_percent_passes(compare):
    status, said = compare([a_case(ratio=4.3, percent=43.0)], [a_case()])
    assert (status, "WORSE" in said) == (0, False)


def test_a_single_ratio_that_falls_is_told(compare):
    """A rival got faster, or was slow when the baseline was made: the floor knows nothing of it."""
    status, said = compare([a_case(ratio=4.0)], [a_case()])
    assert status == 0
    assert "alone in its case: D64-uniform: SparseAdam / ours from 5.00 to 4.00 (-20%)" in said


def test_a_case_with_one_ratio_depends_on_it(compare):
    before, now = a_case(), a_case(ratio=4.2)
    del before["floor"], now["floor"]
    status, said = compare([now], [before])
    assert status == 1
    assert "D64-uniform: -16%, the median of 1" in said


def test_seconds_do_not_count(compare):
    assert compare([a_case(ours_ms=80.0)], [a_case(ours_ms=8.0)])[0] == 0


def test_not_a_number_fails(compare):
    assert compare([a_case(ratio=float("nan"))], [a_case()])[0] == 1


def test_quick_allows_what_noise_does_and_finds_twice_as_slow(compare):
    assert compare([a_case(ratio=3.5, percent=35.0)], [a_case()], "quick")[0] == 0
    status, said = compare([a_case(ratio=2.5, percent=25.0)], [a_case()], "quick")
    assert status == 1
    assert "SparseAdam / ours from 5.00 to 2.50 (-50%)" in said


def test_of_several_runs_a_case_must_be_worse_in_all(compare):
    before = [a_case(), a_case("one-id")]
    slow, slow_id = a_case(ratio=2.5, percent=25.0), a_case("one-id", ratio=2.5, percent=25.0)
    first = [slow, a_case("one-id")]

    status, said = compare([a_case(), slow_id], before, "quick", earlier=[first])
    assert status == 0
    assert "not in every run: D64-uniform: -50%" in said
    assert "not in every run: one-id: -50%" in said
    assert "(run 2)" in said
    assert "benchmarks: 2 runs of 4 ratios, falls of 35% allowed: none fell by more" in said

    status, said = compare([slow, slow_id], before, "quick", earlier=[first, first])
    assert status == 1
    assert "WORSE: D64-uniform: -50%" in said
    assert "not in every run: one-id: -50%" in said
    assert "benchmarks: 3 runs of 4 ratios, falls of 35% allowed: 1 findings" in said


@pytest.mark.parametrize("broken", [[a_case(ratio=float("nan"))], [a_case("one-id")]])
def test_what_is_broken_in_one_of_several_runs_fails(compare, broken):
    status, said = compare([a_case()], [a_case()], "quick", earlier=[broken])
    assert status == 1
    assert "WORSE: D64-uniform: " in said


def test_runs_that_differ_in_kind_are_not_mixed(tmp_path, capsys):
    baseline = tmp_path / "baseline.json"
    option = ["--baseline", str(baseline)]
    whole = str(save(tmp_path / "all.json", [a_case()]))
    quick = str(save(tmp_path / "quick.json", [a_case()], "quick"))
    assert report.main([whole, "--write-baseline", *option]) == 0
    assert report.main([whole, quick, "--compare", *option]) == 2
    assert "runs of all and quick are not to be mixed" in capsys.readouterr().err


def test_a_baseline_of_several_runs_has_the_least_of_each_ratio(tmp_path):
    runs = [
        save(tmp_path / "calm.json", [a_case(ratio=5.0, percent=70.0)]),
        save(tmp_path / "other.json", [a_case(ratio=6.0, percent=50.0), a_case("one-id")]),
    ]
    baseline = tmp_path / "baseline.json"
    option = ["--write-baseline", "--baseline", str(baseline)]
    assert report.main([*map(str, runs), *option]) == 0
    written = report.read_baseline(baseline)
    assert written["cases"]["D64-uniform"]["ratios"] == {"SparseAdam": 5.0, "floor": 0.5}
    assert written["cases"]["one-id"]["ratios"] == {"SparseAdam": 5.0, "floor": 0.5}
    assert len(written["environments"]) == 2


@pytest.mark.parametrize("first", [False, True])
def test_no_baseline_of_runs_one_of_which_has_a_ratio_that_is_no_number(tmp_path, capsys, first):
    runs = [
        save(tmp_path / "good.json", [a_case()]),
        save(tmp_path / "bad.json", [a_case(ratio=float("nan"))]),
    ]
    baseline = tmp_path / "baseline.json"
    option = ["--write-baseline", "--baseline", str(baseline)]
    assert report.main([*map(str, reversed(runs) if first else runs), *option]) == 2
    assert "D64-uniform: SparseAdam" in capsys.readouterr().err
    assert not baseline.exists()


def test_models_of_one_brand_are_told_apart():
    assert report.cpu_name({"brand_raw": "A CPU"}) == "A CPU"
    known = {"brand_raw": "A CPU", "family": 25, "model": 1}
    assert report.cpu_name(known) == "A CPU (family 25, model 1)"


def test_a_table_is_of_one_run(tmp_path, capsys):
    run = str(save(tmp_path / "run.json", [a_case()]))
    with pytest.raises(SystemExit):
        report.main([run, run])
    assert "a table is of one run" in capsys.readouterr().err


def test_a_case_that_vanished_is_named(compare):
    status, said = compare([a_case()], [a_case(), a_case("hot-id")])
    assert status == 1
    assert "hot-id: is in the baseline but not in this run" in said


def test_quick_expects_the_quick_cases_only(compare):
    before = [a_case(), a_case("hot-id", quick=False), a_case("one-id")]
    status, said = compare([a_case()], before, "quick")
    assert status == 1
    assert "one-id: is in the baseline" in said
    assert "hot-id" not in said


def test_quick_with_none_of_the_ratios_fails(compare):
    now = a_case(rivals={})
    del now["floor"]
    status, said = compare([now], [a_case()], "quick")
    assert status == 1
    assert "D64-uniform: none of the baseline's ratios was measured" in said


def test_a_rival_that_vanished_is_named_with_the_reason(compare):
    now = a_case(rivals={}, not_timed={"SparseAdam": "it cannot be imported"})  # the floor is left
    status, said = compare([now], [a_case()])
    assert status == 1
    assert "D64-uniform: the ratio to SparseAdam is gone: it cannot be imported" in said


def test_new_cases_and_ratios_are_listed(compare):
    rivals_now = {
        **a_case()["rivals"],
        "new one": {"ms": 1.0, "ratio": 2.0, "spread": 0, "rounds": 5},
    }
    status, said = compare([a_case(rivals=rivals_now), a_case("brand-new")], [a_case()])
    assert status == 0
    assert "new: D64-uniform: new one" in said
    assert "new: brand-new" in said


def test_another_machine_is_said(compare, tmp_path, capsys):
    compare([a_case()], [a_case()])
    baseline = json.loads((tmp_path / "baseline.json").read_text())
    baseline["environments"][0]["cpu"] = "Another CPU"
    (tmp_path / "baseline.json").write_text(json.dumps(baseline))
    option = ["--baseline", str(tmp_path / "baseline.json")]
    report.main([str(tmp_path / "new-0.json"), "--compare", *option])
    assert "note: cpu was Another CPU, here it is A CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no"),
        ("{", "cannot be read"),
        ("[]", "holds no JSON object"),
        ('{"cases": {"a": {}}, "environments": []}', "is no baseline"),
        (
            '{"cases": {"a": {"quick": true, "ratios": {"b": -1}}}, "environments": []}',
            "a ratio is -1",
        ),
    ],
)
def test_a_bad_baseline_says_the_way_out(tmp_path, capsys, content, said):
    baseline = tmp_path / "baseline.json"
    if content is not None:
        baseline.write_text(content)
    run = save(tmp_path / "run.json", [a_case()])
    assert report.main([str(run), "--compare", "--baseline", str(baseline)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "make bench-baseline" in error


@pytest.mark.parametrize("content", [None, "{", '{"benchmarks": [{}]}'])
def test_a_bad_run_says_the_way_out(tmp_path, capsys, content):
    run = tmp_path / "run.json"
    if content is not None:
        run.write_text(content)
    assert report.main([str(run)]) == 2
    assert "run make bench first" in capsys.readouterr().err


@pytest.mark.parametrize("selection", ["quick", "tiny"])
def test_a_partial_run_is_no_baseline(tmp_path, capsys, selection):
    run = save(tmp_path / "run.json", [a_case()], selection)
    baseline = tmp_path / "baseline.json"
    option = ["--baseline", str(baseline)]
    assert report.main([str(run), "--write-baseline", *option]) == 2
    assert f"this one is {selection}" in capsys.readouterr().err
    assert not baseline.exists()


def test_the_reference_is_not_compared():
    figures = a_case(rivals={"reference": {"ratio": 50.0}, "SparseAdam": {"ratio": 5.0}})
    assert report.ratios_of(figures) == {"SparseAdam": 5.0, "floor": 0.5}


def test_the_committed_baseline_is_one():
    baseline = report.read_baseline(report.BASELINE)
    assert {environment["selection"] for environment in baseline["environments"]} == {"all"}
    assert {goal.case for goal in goals.GOALS if goal.figure[0] in ("rivals", "floor")} <= set(
        baseline["cases"]
    )


# ---------------------------------------------------------------------- what is shown


def test_the_table_has_everybodys_time_and_ratio(tmp_path, capsys):
    others = {
        "SparseAdam": {"ms": 40.0, "ratio": 5.1, "spread": 0.1, "rounds": 20},
        "reference": {"ms": 200.0, "ratio": 25.0, "spread": 0.1, "rounds": 5},
    }
    once = a_case("hot-id", not_timed={"FBGEMM": "it is not installed"})
    once["rivals"] = {"without it": {"ms": 7.0, "ratio": 0.9, "spread": 0.1, "rounds": 20}}
    run = save(tmp_path / "run.json", [a_case(rivals=others), a_case("other", rivals=others), once])
    assert report.main([str(run)]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("D64-uniform"))
    assert line.split("  ")[0] == "D64-uniform"
    for cell in ("8", "50%", "12.5", "25.0", "40 (5.10×)", "200 (25.00×, 5 rounds)"):
        assert f"  {cell}" in line
    assert "hot-id: without it 7 (0.90×)" in said
    assert "hot-id: FBGEMM not timed: it is not installed" in said
    assert "A CPU, 2 cores" in said
    assert "torch 2.13.0" in said


def test_a_disturbed_case_is_marked():
    calm, busy = a_case(others=0.01), a_case("busy", others=0.3)
    said = report.table({"D64-uniform": calm, "busy": busy})
    assert "busy: DISTURBED, 30% of the CPU's work was others'" in said
    assert said.count("DISTURBED") == 1


def test_goals_are_reached_missed_or_not_measured():
    cases = {
        "D64-uniform": a_case(ratio=10.0, percent=69.9),
        "one-id": a_case("one-id", ours_ms=0.151),
    }
    lines = report.goals_table(cases).splitlines()
    found = {line.split("  ")[0]: line for line in lines}
    assert found["D = 64, 65,536 uniform ids: SparseAdam's time over ours"].endswith(" reached")
    assert found["D = 64, 65,536 uniform ids: of the floor"].endswith(" missed")
    assert found["1 table × 1 id"].endswith(" missed")
    assert found["first step, warm disk cache"].endswith("not measured")
    assert len(lines) == 1 + len(goals.GOALS)


def test_plots_are_written(tmp_path):
    cases = [
        a_case(f"{axis} {x}", sweep=axis, x=x)
        for axis in ("touched rows", "table rows", "tables", "Zipf exponent")
        for x in (0.5, 1.0)
    ]
    run = save(tmp_path / "run.json", cases)
    assert report.main([str(run), "--plots"]) == 0
    names = ["table-rows.png", "tables.png", "touched-rows.png", "zipf-exponent.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    for name in names:
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
