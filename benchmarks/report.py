"""Reads what ``make bench`` saved: prints the table, draws the plots, compares with the baseline.

    python benchmarks/report.py bench-results/all.json [--plots]
    python benchmarks/report.py bench-results/all.json [more.json ...] --compare
    python benchmarks/report.py bench-results/all.json [more.json ...] --write-baseline

Ratios are compared, not seconds: how many times as long a rival takes as we do, and the floor's
time over ours. If we get slower, all ratios of a case fall; if a rival has a good day (new memory
alone makes torch's times differ by a fifth from process to process), its own falls. So a case is
worse if the median of its ratios' changes is, and one ratio that falls alone is told, no more.
Of several runs, a case is worse if it is in each: what disturbs a machine passes, a slower step
stays. What is missing or no number is wrong in any. A baseline of several runs, on several
machines say, has the least of each ratio.

Exit status: 1 if a case is worse by more than it may, or a case or ratio is gone; 2 if a file
cannot be read.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from goals import GOALS

BASELINE = Path(__file__).resolve().parent / "baseline.json"

#: How far a ratio may fall before ``--compare`` fails.
TOLERANCE = 0.15
#: With ``--quick``, which CI runs on machines that are never quite at rest: twice as slow is a
#: fall of 50%.
QUICK_TOLERANCE = 0.35

FLOOR = "floor"

#: Too slow for enough rounds, and nobody's rival in speed: shown, not compared.
NOT_COMPARED = ("reference",)

#: Share of the CPU's work that may be others' before the report says so.
DISTURBED = 0.05

Cases = dict[str, dict[str, Any]]


class Unreadable(Exception):
    """A file is not what it must be; the text says which and what to do."""


# ---------------------------------------------------------------------- files


def read_json(path: Path, way_out: str) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        Unreadable: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Unreadable(f"there is no {path}; {way_out}") from None
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path} cannot be read: {error}; {way_out}") from error
    if not isinstance(content, dict):
        raise Unreadable(f"{path} holds no JSON object; {way_out}")
    return content


def read_run(path: Path) -> tuple[Cases, dict[str, Any]]:
    """Cases of a run by name, and its environment.

    Raises:
        Unreadable: the file is not one that the benchmarks saved.
    """
    way_out = "run make bench first"
    content = read_json(path, way_out)
    cases: Cases = {}
    try:
        for benchmark in content["benchmarks"]:
            figures = benchmark["extra_info"]
            cases[figures["case"]] = figures
        machine = content["machine_info"]
        environment = {
            "date": content["datetime"][:10],
            "cpu": cpu_name(machine["cpu"]),
            **{
                key: machine[key]
                for key in (
                    "cores",
                    "threads",
                    "last_level_cache",
                    "omp_wait_policy",
                    "versions",
                    "selection",
                )
            },
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise Unreadable(
            f"{path} is no result of these benchmarks: {error!r}; {way_out}"
        ) from error
    return cases, environment


def cpu_name(cpu: dict[str, Any]) -> str:
    """A CPU, by what pytest-benchmark found out: a brand has models that differ in speed."""
    name: str = cpu.get("brand_raw", "unknown")
    if "family" in cpu and "model" in cpu:
        name += f" (family {cpu['family']}, model {cpu['model']})"
    return name


def ratios_of(figures: dict[str, Any]) -> dict[str, float]:
    """A case's ratios that are compared: each rival's time over ours, and the floor's."""
    ratios = {
        name: rival["ratio"]
        for name, rival in figures.get("rivals", {}).items()
        if name not in NOT_COMPARED
    }
    if FLOOR in figures:
        ratios[FLOOR] = figures[FLOOR]["percent"] / 100
    return ratios


def baseline_of(runs: list[tuple[Cases, dict[str, Any]]]) -> dict[str, Any]:
    """What is committed: the least of each case's ratios, and where they were measured."""
    cases: dict[str, dict[str, Any]] = {}
    for found, _ in runs:
        for name, figures in sorted(found.items()):
            if now := ratios_of(figures):
                case = cases.setdefault(name, {"quick": figures["quick"], "ratios": {}})
                least = case["ratios"]
                for key, value in now.items():
                    least[key] = min(round(value, 3), least.get(key, math.inf))
    return {"environments": [environment for _, environment in runs], "cases": cases}


def read_baseline(path: Path) -> dict[str, Any]:
    """The committed baseline.

    Raises:
        Unreadable: the file is missing or is none.
    """
    way_out = "write one with make bench-baseline"
    baseline = read_json(path, way_out)
    try:
        for case in baseline["cases"].values():
            bool(case["quick"])
            for value in case["ratios"].values():
                if not value > 0:
                    raise ValueError(f"a ratio is {value}")
        if not all(isinstance(x, dict) for x in baseline["environments"]):
            raise TypeError("an environment is no object")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Unreadable(f"{path} is no baseline: {error!r}; {way_out}") from error
    return baseline


# ---------------------------------------------------------------------- comparison


class Comparison(NamedTuple):
    """A run beside the baseline.

    Attributes:
        broken: what is missing or no number.
        worse: case -> how far it fell, of those that fell by more than they may.
        told: what else is worth telling.
    """

    broken: list[str]
    worse: dict[str, str]
    told: list[str]


def compare(cases: Cases, baseline: dict[str, Any], quick: bool, tolerance: float) -> Comparison:
    """Compare a run's ratios with the baseline's.

    Args:
        quick: the run is of the quick cases, so only those of the baseline are expected, with the
            rivals that were timed.
        tolerance: the part that ratios may lose.

    Returns:
        What was found.
    """
    broken: list[str] = []
    worse: dict[str, str] = {}
    told: list[str] = []
    for name, entry in baseline["cases"].items():
        if quick and not entry["quick"]:
            continue
        if name not in cases:
            broken.append(f"{name}: is in the baseline but not in this run")
            continue
        now = ratios_of(cases[name])
        told += [f"new: {name}: {key}" for key in now if key not in entry["ratios"]]
        before = {key: value for key, value in entry["ratios"].items() if key in now}
        if not before:
            broken.append(f"{name}: none of the baseline's ratios was measured")
            continue
        if not quick:
            reasons = cases[name].get("not_timed", {})
            broken += [
                f"{name}: the ratio to {key} is gone: {reasons.get(key, 'it was not timed')}"
                for key in entry["ratios"]
                if key not in now
            ]
        changes = {key: now[key] / value - 1 for key, value in before.items()}
        if not all(map(math.isfinite, changes.values())):
            broken.append(f"{name}: a ratio is no number: {now}")
            continue
        fallen = [key for key, change in changes.items() if change < -tolerance]
        lines = [
            f"{key} / ours from {before[key]:.2f} to {now[key]:.2f} ({100 * changes[key]:+.0f}%)"
            for key in fallen
        ]
        middle = statistics.median(changes.values())
        if middle < -tolerance:
            worse[name] = f"{100 * middle:+.0f}%, the median of {len(changes)}: {'; '.join(lines)}"
        else:
            told += [f"alone in its case: {name}: {line}" for line in lines]
    told += [
        f"new: {name}" for name in cases if name not in baseline["cases"] and ratios_of(cases[name])
    ]
    return Comparison(broken, worse, told)


# ---------------------------------------------------------------------- table


def table(cases: Cases) -> str:
    """All cases: our time, each rival's time and ratio, the floor.

    Whoever takes part in one case only stands below the table.
    """
    met = Counter(name for figures in cases.values() for name in figures.get("rivals", {}))
    columns = [name for name, times in met.items() if times > 1 or len(cases) == 1]
    header = ["case", "ours ms", "of the floor", "GB/s", "copy GB/s", *columns]
    rows, notes = [header], []
    for name, figures in cases.items():
        if "ours_ms" not in figures:
            continue
        floor = figures.get(FLOOR)
        row = [name, f"{figures['ours_ms']:.3g}"]
        row += (
            [
                f"{floor['percent']:.0f}%",
                f"{floor['GB_per_s']:.1f}",
                f"{floor['copy_GB_per_s']:.1f}",
            ]
            if floor
            else ["", "", ""]
        )
        for column in columns:
            rival = figures["rivals"].get(column)
            row.append(_cell(rival, figures["rounds"]) if rival else "-")
        rows.append(row)
        others = [
            f"{other} {_cell(rival, figures['rounds'])}"
            for other, rival in figures["rivals"].items()
            if other not in columns
        ]
        if others:
            notes.append(f"{name}: " + ", ".join(others))
        notes += [
            f"{name}: {other} not timed: {why}" for other, why in figures["not_timed"].items()
        ]
        if figures.get("others", 0.0) > DISTURBED:
            notes.append(
                f"{name}: DISTURBED, {100 * figures['others']:.0f}% of the CPU's work was others'"
            )
    lines = ["time of one step in ms, and how many times ours that is"]
    return "\n".join([*lines, *_aligned(rows), "", *notes])


def _cell(rival: dict[str, Any], all_rounds: int) -> str:
    rounds = f", {rival['rounds']} rounds" if rival["rounds"] != all_rounds else ""
    return f"{rival['ms']:.3g} ({rival['ratio']:.2f}×{rounds})"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def goals_table(cases: Cases) -> str:
    """The goals and whether they are reached; a goal whose case was not run says so."""
    rows = [["goal", "to reach", "here", ""]]
    for goal in GOALS:
        value = goal.found(cases)
        limit = f"{'≤' if goal.at_most else '≥'} {goal.limit:g} {goal.unit}"
        if value is None:
            rows.append([goal.what, limit, "-", "not measured"])
        else:
            verdict = "reached" if goal.reached(value) else "missed"
            rows.append([goal.what, limit, f"{value:.3g} {goal.unit}".rstrip(), verdict])
    return "\n".join(_aligned(rows))


def other_figures(cases: Cases) -> str:
    """What is neither a time nor a ratio."""
    return "\n".join(
        f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in figures["figures"].items())
        for name, figures in cases.items()
        if figures.get("figures")
    )


def environment_line(environment: dict[str, Any]) -> str:
    """Where and when."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        f"{environment['date']}, {environment['cpu']}, {environment['cores']} cores, "
        f"{environment['threads']} threads, last-level cache {environment['last_level_cache']}, "
        f"OMP_WAIT_POLICY {environment['omp_wait_policy']}; {versions}; "
        f"cases: {environment['selection']}"
    )


# ---------------------------------------------------------------------- plots


def sweeps_of(cases: Cases) -> dict[str, list[dict[str, Any]]]:
    """Axis -> its cases, ascending."""
    sweeps: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for figures in cases.values():
        if "sweep" in figures:
            sweeps[figures["sweep"]].append(figures)
    return {axis: sorted(found, key=lambda figures: figures["x"]) for axis, found in sweeps.items()}


#: axis -> what the plot's title says that the axis does not.
SETTINGS = {
    "touched rows": "D = 16, table of 2^21 rows",
    "table rows": "D = 8, 65,536 uniform ids",
    "tables": "D = 16, 19,200 ids in all, 1M rows in all",
    "Zipf exponent": "D = 64, 65,536 ids, table of 2^20 rows",
}


def draw_plots(cases: Cases, environment: dict[str, Any], folder: Path) -> list[Path]:
    """One PNG for each sweep: time over its axis, everybody, and the floor.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for axis, found in sweeps_of(cases).items():
        figure, axes = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
        lines: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for figures in found:
            lines["SparseAdamW"].append((figures["x"], figures["ours_ms"]))
            for name, rival in figures["rivals"].items():
                lines[name].append((figures["x"], rival["ms"]))
            lines["floor: ideal bytes at copy bandwidth"].append(
                (figures["x"], figures[FLOOR]["ms"])
            )
        for name, points in lines.items():
            style = {"marker": "o", "linewidth": 1.2, "markersize": 4}
            if name == "SparseAdamW":
                style |= {"linewidth": 2.5, "color": "black", "zorder": 5}
            elif name.startswith("floor"):
                style |= {"linestyle": "--", "color": "grey", "marker": ""}
            axes.plot(*zip(*points, strict=True), label=name, **style)
        axes.set_yscale("log")
        if axis != "Zipf exponent":  # it begins at 0
            axes.set_xscale("log")
        axes.set_xlabel(axis)
        axes.set_ylabel("one step, ms")
        axes.set_title(
            f"{SETTINGS.get(axis, '')}, fp32\n{environment['cpu']}, {environment['cores']} cores, "
            f"torch {environment['versions']['torch']}, {environment['date']}",
            fontsize=9,
        )
        axes.grid(which="both", alpha=0.25)
        axes.legend(fontsize=8)
        path = folder / f"{axis.lower().replace(' ', '-')}.png"
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
        written.append(path)
    return written


# ---------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "run", type=Path, nargs="+", help="what pytest-benchmark saved; one for a table"
    )
    parser.add_argument("--plots", action="store_true", help="write PNGs beside the run")
    parser.add_argument("--compare", action="store_true", help="with the baseline, nothing else")
    parser.add_argument("--write-baseline", action="store_true", help="make this run the baseline")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    chosen = parser.parse_args(arguments)
    if len(chosen.run) > 1 and not (chosen.compare or chosen.write_baseline):
        parser.error("a table is of one run")
    try:
        runs = [read_run(path) for path in chosen.run]
        if chosen.compare:
            return print_comparison(runs, read_baseline(chosen.baseline))
        if chosen.write_baseline:
            return write_baseline(runs, chosen.baseline)
    except Unreadable as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    cases, environment = runs[0]
    print(environment_line(environment), table(cases), goals_table(cases), sep="\n\n")
    print("", other_figures(cases), sep="\n")
    if chosen.plots:
        for path in draw_plots(cases, environment, chosen.run[0].parent):
            print(f"wrote {path}")
    return 0


def print_comparison(runs: list[tuple[Cases, dict[str, Any]]], baseline: dict[str, Any]) -> int:
    """Print what is wrong in all runs, and of the last what is new; returns the exit status."""
    selections = {environment["selection"] for _, environment in runs}
    if "tiny" in selections:
        raise Unreadable("times of --tiny mean nothing; run make bench")
    if len(selections) > 1:
        raise Unreadable(f"runs of {' and '.join(sorted(selections))} are not to be mixed")
    quick = "quick" in selections
    tolerance = QUICK_TOLERANCE if quick else TOLERANCE
    compared = [compare(cases, baseline, quick, tolerance) for cases, _ in runs]
    for key in ("cpu", "cores", "threads"):
        before = [str(environment.get(key)) for environment in baseline["environments"]]
        for now in dict.fromkeys(str(environment[key]) for _, environment in runs):
            if now not in before:
                print(f"note: {key} was {' or '.join(dict.fromkeys(before))}, here it is {now}")
    for line in compared[-1].told:
        print(line)
    broken = list(dict.fromkeys(line for found in compared for line in found.broken))
    worse = [name for name in compared[-1].worse if all(name in found.worse for found in compared)]
    for number, found in enumerate(compared, 1):
        for name, line in found.worse.items():
            if name not in worse:
                print(f"not in every run: {name}: {line} (run {number})")
    lines = [*broken, *(f"{name}: {compared[-1].worse[name]}" for name in worse)]
    for line in lines:
        print(f"WORSE: {line}")
    count = sum(len(ratios_of(figures)) for figures in runs[-1][0].values())
    verdict = f"{len(lines)} findings" if lines else "none fell by more"
    runs_of = f"{len(runs)} runs of " if len(runs) > 1 else ""
    print(
        f"benchmarks: {runs_of}{count} ratios, falls of {100 * tolerance:.0f}% allowed: {verdict}"
    )
    return 1 if lines else 0


def write_baseline(runs: list[tuple[Cases, dict[str, Any]]], path: Path) -> int:
    """Make whole runs the baseline; returns the exit status."""
    for _, environment in runs:
        if environment["selection"] != "all":
            raise Unreadable(
                f"a baseline needs a whole run, this one is {environment['selection']}; run make "
                f"bench"
            )
    baseline = baseline_of(runs)
    broken = [
        f"{name}: {key}"
        for run in runs  # a lesser number of another run would hide one that is none
        for name, case in baseline_of([run])["cases"].items()
        for key, value in case["ratios"].items()
        if not (math.isfinite(value) and value > 0)
    ]
    if broken:
        raise Unreadable(f"these ratios make no baseline: {', '.join(broken)}; run make bench")
    path.write_text(json.dumps(baseline, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}: {len(baseline['cases'])} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
