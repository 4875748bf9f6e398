"""What the benchmarks saved: compared with the baseline, and shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import baseline  # noqa: E402
import goals  # noqa: E402
import report  # noqa: E402
import runs  # noqa: E402

# ---------------------------------------------------------------------- comparison


def a_case(name="D64-uniform", ratio=5.0, percent=50.0, quick=True, **more):
    return {
        "case": name,
        "quick": quick,
        "not_timed": {},
        "ours_ms": 8.0,
        "rivals": {"SparseAdam": {"ms": 8.0 * ratio, "ratio": ratio, "spread": 0.1}},
        "floor": {
            "bytes": 1e8,
            "ms": 8.0 * percent / 100,
            "percent": percent,
            "spread": 0.1,
            "GB_per_s": 12.5,
        },
        "copy_GB_per_s": 25.0,
        **more,
    }


def save(path, cases, selection="all", cpu="A CPU"):
    machine = {
        "cpu": {"brand_raw": cpu},
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
        path = tmp_path / "baseline.json"
        old = tmp_path / "old.json"
        option = ["--baseline", str(path)]
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
    assert "benchmarks: 3 runs of 4 ratios, falls of 35% allowed: worse or wrong: 1" in said


@pytest.mark.parametrize("broken", [[a_case(ratio=float("nan"))], [a_case("one-id")]])
def test_what_is_broken_in_one_of_several_runs_fails(compare, broken):
    status, said = compare([a_case()], [a_case()], "quick", earlier=[broken])
    assert status == 1
    assert "WORSE: D64-uniform: " in said


def test_runs_that_differ_in_kind_are_not_mixed(tmp_path, capsys):
    path = tmp_path / "baseline.json"
    option = ["--baseline", str(path)]
    whole = str(save(tmp_path / "all.json", [a_case()]))
    quick = str(save(tmp_path / "quick.json", [a_case()], "quick"))
    assert report.main([whole, "--write-baseline", *option]) == 0
    assert report.main([whole, quick, "--compare", *option]) == 2
    assert "runs of all and quick are not to be mixed" in capsys.readouterr().err


@pytest.fixture
def write(tmp_path):
    """Write cases of a CPU's runs into a baseline, and read it back."""

    def run(*runs_of):
        paths = [
            str(save(tmp_path / f"run-{number}.json", cases, cpu=cpu))
            for number, (cpu, cases) in enumerate(runs_of)
        ]
        path = tmp_path / "baseline.json"
        assert report.main([*paths, "--write-baseline", "--baseline", str(path)]) == 0
        return baseline.read_baseline(path)

    return run


def ratios_on(cpu, kept, case="D64-uniform"):
    return baseline.of_cpu(cpu, kept).cases[case]["ratios"]


def test_of_several_runs_on_a_cpu_the_least_of_each_ratio_is_kept(write):
    calm, busy = a_case(ratio=5.0, percent=70.0), a_case(ratio=6.0, percent=50.0)
    kept = write(("A CPU", [calm]), ("A CPU", [busy, a_case("one-id")]))
    assert ratios_on("A CPU", kept) == {"SparseAdam": 5.0, "floor": 0.5}
    assert ratios_on("A CPU", kept, "one-id") == {"SparseAdam": 5.0, "floor": 0.5}
    assert [len(measured.environments) for measured in kept] == [2]


def test_a_run_is_compared_with_runs_on_its_own_cpu_or_else_with_the_least_of_all(write):
    kept = write(
        ("Fast", [a_case(ratio=9.0, percent=50.0)]), ("Slow", [a_case(ratio=6.0, percent=70.0)])
    )
    assert ratios_on("Fast", kept) == {"SparseAdam": 9.0, "floor": 0.5}
    assert ratios_on("Slow", kept) == {"SparseAdam": 6.0, "floor": 0.7}
    assert ratios_on("Unknown", kept) == {"SparseAdam": 6.0, "floor": 0.5}


def test_a_fall_on_a_fast_cpu_is_not_excused_by_a_slow_one(write, tmp_path, capsys):
    write(("Fast", [a_case(ratio=9.0)]), ("Slow", [a_case(ratio=6.0)]))
    option = ["--compare", "--baseline", str(tmp_path / "baseline.json")]
    fallen = [a_case(ratio=7.0, percent=40.0)]
    runs_on = [str(save(tmp_path / f"{cpu}.json", fallen, cpu=cpu)) for cpu in ("Fast", "Slow")]
    assert [report.main([run, *option]) for run in runs_on] == [1, 0]
    assert "SparseAdam / ours from 9.00 to 7.00 (-22%)" in capsys.readouterr().out


def test_a_case_is_not_judged_where_a_copy_was_slower_too(compare):
    slow = a_case(ratio=2.0, percent=20.0)
    disturbed = {**slow, "copy_GB_per_s": 18.0}  # of 25
    status, said = compare([disturbed], [a_case()])
    assert (status, "WORSE" in said) == (3, False)
    assert "not judged: D64-uniform: others used the memory: a copy ran at 18.0 GB/s" in said
    assert "allowed: none fell by more; cases that no run could judge: 1" in said
    assert compare([{**slow, "copy_GB_per_s": 19.0}], [a_case()])[0] == 1


@pytest.mark.parametrize("disturbed_first", [False, True])
def test_a_run_that_judges_nothing_does_not_acquit(compare, disturbed_first):
    slow = a_case(ratio=2.0, percent=20.0)
    several = [[slow], [{**slow, "copy_GB_per_s": 18.0}]]
    earlier, now = several[::-1] if disturbed_first else several
    status, said = compare(now, [a_case()], "quick", earlier=[earlier])
    assert status == 1
    assert "WORSE: D64-uniform: -60%" in said
    assert compare([a_case()], [a_case()], "quick", earlier=[earlier, now])[0] == 0


@pytest.mark.parametrize(("cpu", "status"), [("Known", 3), ("Unknown", 1)])
def test_how_slow_a_copy_is_says_nothing_on_a_cpu_that_is_not_known(write, tmp_path, cpu, status):
    write(("Known", [a_case()]))
    run = [{**a_case(ratio=2.0, percent=20.0), "copy_GB_per_s": 10.0}]
    path = str(save(tmp_path / "run.json", run, cpu=cpu))
    assert report.main([path, "--compare", "--baseline", str(tmp_path / "baseline.json")]) == status


def test_a_copy_on_other_cpus_disturbs_nothing(write):
    """Of machines of which one has no figure, none is kept: what is slow on one is not on all."""
    fast = a_case()
    fast["copy_GB_per_s"] = 100.0
    kept = write(("Fast", [fast]), ("Slow", [a_case()]))
    assert baseline.of_cpu("Fast", kept).cases["D64-uniform"]["copy_GB_per_s"] == 100.0
    assert baseline.of_cpu("Unknown", kept).cases["D64-uniform"]["copy_GB_per_s"] == 25.0
    del kept[0].cases["D64-uniform"]["copy_GB_per_s"]
    for several in (kept, kept[::-1]):
        assert "copy_GB_per_s" not in baseline.least_of(several).cases["D64-uniform"]


def test_a_new_run_replaces_those_on_its_cpu_and_no_others(write):
    write(("A", [a_case(ratio=9.0), a_case("gone")]), ("B", [a_case(ratio=6.0)]))
    kept = write(("A", [a_case(ratio=8.0)]))
    assert ratios_on("A", kept)["SparseAdam"] == 8.0
    assert "gone" not in baseline.of_cpu("A", kept).cases
    assert ratios_on("B", kept)["SparseAdam"] == 6.0


def test_runs_of_several_cpus_kept_as_one_serve_those_without_their_own(write, tmp_path):
    mixed = baseline.least_of(write(("A", [a_case(ratio=9.0)]), ("B", [a_case(ratio=6.0)])))
    content = {"measured": [mixed._asdict()]}
    (tmp_path / "baseline.json").write_text(json.dumps(content))
    kept = write(("A", [a_case(ratio=8.0)]))
    assert ratios_on("A", kept)["SparseAdam"] == 8.0
    assert ratios_on("B", kept)["SparseAdam"] == 6.0
    kept = write(("B", [a_case(ratio=7.0)]))  # now each of them has its own
    assert [measured.cpus() for measured in kept] == [{"A"}, {"B"}]


def test_small_ratios_are_kept_as_exactly_as_large_ones(write):
    kept = write(("A", [a_case(ratio=12.34567, percent=0.0123456)]))
    assert ratios_on("A", kept) == {"SparseAdam": 12.35, "floor": 0.0001235}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_no_baseline_of_runs_one_of_which_has_a_ratio_that_is_no_number(
    tmp_path, capsys, first, value
):
    good = save(tmp_path / "good.json", [a_case()])
    bad = save(tmp_path / "bad.json", [a_case(ratio=value)])
    path = tmp_path / "baseline.json"
    option = ["--write-baseline", "--baseline", str(path)]
    order = [bad, good] if first else [good, bad]
    assert report.main([*map(str, order), *option]) == 2
    assert f"D64-uniform: SparseAdam is {value}" in capsys.readouterr().err
    assert not path.exists()


def test_a_baseline_that_is_none_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "baseline.json"
    path.write_text("{")
    run = save(tmp_path / "run.json", [a_case()])
    assert report.main([str(run), "--write-baseline", "--baseline", str(path)]) == 2
    assert "delete it, then write one with make bench-baseline" in capsys.readouterr().err
    assert path.read_text() == "{"


def test_models_of_one_brand_are_told_apart():
    assert runs.cpu_name({"brand_raw": "A CPU"}) == "A CPU"
    known = {"brand_raw": "A CPU", "family": 25, "model": 1}
    assert runs.cpu_name(known) == "A CPU (family 25, model 1)"


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
        "new one": {"ms": 1.0, "ratio": 2.0, "spread": 0},
    }
    status, said = compare([a_case(rivals=rivals_now), a_case("brand-new")], [a_case()])
    assert status == 0
    assert "new: D64-uniform: new one" in said
    assert "new: brand-new" in said


def test_another_machine_is_said(write, tmp_path, capsys):
    write(("Another CPU", [a_case()]))
    content = json.loads((tmp_path / "baseline.json").read_text())
    content["measured"][0]["environments"][0]["threads"] = 8
    (tmp_path / "baseline.json").write_text(json.dumps(content))
    run = str(save(tmp_path / "run.json", [a_case()]))
    report.main([run, "--compare", "--baseline", str(tmp_path / "baseline.json")])
    said = capsys.readouterr().out
    assert (
        "no run of its own on A CPU; compared with the least of each ratio on Another CPU" in said
    )
    assert "note: threads was 8, here it is 2" in said


def with_ratio(value):
    cases = {"a": {"quick": True, "ratios": {"b": value}}}
    return json.dumps({"measured": [{"environments": [], "cases": cases}]})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no"),
        ("{", "cannot be read"),
        ("[]", "holds no JSON object"),
        ('{"measured": []}', "it is empty"),
        ('{"measured": [{"cases": {"a": {}}, "environments": []}]}', "is no baseline"),
        (with_ratio(-1), "a ratio or speed is -1"),
    ],
)
def test_a_bad_baseline_says_the_way_out(tmp_path, capsys, content, said):
    path = tmp_path / "baseline.json"
    if content is not None:
        path.write_text(content)
    run = save(tmp_path / "run.json", [a_case()])
    assert report.main([str(run), "--compare", "--baseline", str(path)]) == 2
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
    path = tmp_path / "baseline.json"
    option = ["--baseline", str(path)]
    assert report.main([str(run), "--write-baseline", *option]) == 2
    assert f"this one is {selection}" in capsys.readouterr().err
    assert not path.exists()


def test_the_reference_is_not_compared():
    figures = a_case(rivals={"reference": {"ratio": 50.0}, "SparseAdam": {"ratio": 5.0}})
    assert baseline.ratios_of(figures) == {"SparseAdam": 5.0, "floor": 0.5}


def test_the_committed_baseline_is_one():
    kept = baseline.read_baseline(baseline.BASELINE)
    every = baseline.least_of(kept)
    assert {environment["selection"] for environment in every.environments} == {"all"}
    compared = {goal.case for goal in goals.GOALS if goal.figure[0] in ("rivals", "floor")}
    for measured in kept:
        assert compared <= set(measured.cases), measured.cpus()
        if len(measured.cpus()) == 1:  # the others are older than the copy that tells
            known = [name for name in compared if "floor" in measured.cases[name]["ratios"]]
            assert all("copy_GB_per_s" in measured.cases[name] for name in known)


# ---------------------------------------------------------------------- what is shown


def test_the_table_has_everybodys_time_and_ratio(tmp_path, capsys):
    others = {
        "SparseAdam": {"ms": 40.0, "ratio": 5.1, "spread": 0.1},
        "reference": {"ms": 200.0, "ratio": 25.0, "spread": 0.1},
    }
    once = a_case("hot-id", not_timed={"FBGEMM": "it is not installed"})
    once["rivals"] = {"without it": {"ms": 7.0, "ratio": 0.9, "spread": 0.1}}
    run = save(tmp_path / "run.json", [a_case(rivals=others), a_case("other", rivals=others), once])
    assert report.main([str(run)]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("D64-uniform"))
    assert line.split("  ")[0] == "D64-uniform"
    for cell in ("8", "50%", "12.5", "25.0", "40 (5.10×)", "200 (25.00×)"):
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


def test_a_curve_says_where_it_has_no_point():
    cases = [a_case(x=1_000), a_case(x=10_000, rivals={})]
    curves = report.curves_of(cases)
    assert curves["SparseAdam (not timed at 10,000)"] == [(1_000, 40.0)]
    assert curves["SparseAdamW"] == [(1_000, 8.0), (10_000, 8.0)]
    assert len(curves) == 3


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
