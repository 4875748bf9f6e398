"""Shows what ``make bench`` saved: prints the table, draws the plots, compares with the baseline.

    python benchmarks/report.py bench-results/all.json [--plots]
    python benchmarks/report.py bench-results/all.json [more.json ...] --compare
    python benchmarks/report.py bench-results/all.json [more.json ...] --write-baseline

Exit status: 1 if a case is worse by more than it may, or a case or ratio is gone; 2 if a file
cannot be read; 3 if others used the memory so that a case could not be judged. ``baseline.py`` says
what is compared.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from baseline import BASELINE, print_comparison, read_baseline, write_baseline
from goals import GOALS
from runs import FLOOR, Cases, Unreadable, read_run

#: Share of the CPU's work that may be others' before the report says so.
DISTURBED = 0.05


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
                f"{figures['copy_GB_per_s']:.1f}",
            ]
            if floor
            else ["", "", ""]
        )
        for column in columns:
            rival = figures["rivals"].get(column)
            row.append(_cell(rival) if rival else "-")
        rows.append(row)
        others = [
            f"{other} {_cell(rival)}"
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


def _cell(rival: dict[str, Any]) -> str:
    return f"{rival['ms']:.3g} ({rival['ratio']:.2f}×)"


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


def curves_of(found: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Label -> (x, ms) of everybody in the cases of a sweep. A label says what is missing."""
    curves: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for figures in found:
        x = figures["x"]
        curves["SparseAdamW"].append((x, figures["ours_ms"]))
        for name, rival in figures["rivals"].items():
            curves[name].append((x, rival["ms"]))
        curves["floor: ideal bytes at copy bandwidth"].append((x, figures[FLOOR]["ms"]))
    labelled = {}
    for name, points in curves.items():
        met = {x for x, _ in points}
        missed = [f"{figures['x']:,}" for figures in found if figures["x"] not in met]
        labelled[f"{name} (not timed at {'; '.join(missed)})" if missed else name] = points
    return labelled


#: axis -> what the plot's title says that the axis does not.
SETTINGS = {
    "touched rows": "D = 16, table of 2^21 rows",
    "table rows": "D = 8, 65,536 uniform ids",
    "tables": "D = 16, 19,200 ids in all, 1M rows in all",
    "Zipf exponent": "D = 64, 65,536 ids, table of 2^18 rows",
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
        for name, points in curves_of(found).items():
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
    parser.add_argument(
        "--write-baseline", action="store_true", help="make this run the baseline of its CPU"
    )
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    chosen = parser.parse_args(arguments)
    if len(chosen.run) > 1 and not (chosen.compare or chosen.write_baseline):
        parser.error("a table is of one run")
    try:
        runs = [read_run(path) for path in chosen.run]
        if chosen.compare:
            return print_comparison(runs, read_baseline(chosen.baseline))
        if chosen.write_baseline:
            write_baseline(runs, chosen.baseline)
            return 0
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


if __name__ == "__main__":
    sys.exit(main())
