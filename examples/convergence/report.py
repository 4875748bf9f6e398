"""The study's tables and plots, made of the results alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from matplotlib.figure import Figure

from .model import MODES
from .runs import BUCKETS, Results
from .tuning import TIMING_SEEDS, Case, Choice, Plan, choice, test_settings, tried

BEGIN, END = "<!-- make study writes from here -->", "<!-- to here -->"

# Quantiles 0.975 of Student's t for 1 … 30 degrees of freedom.
T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)

LABELS = {
    "skip": "skip",
    "decay": "decay",
    "dense": "dense",
    "adamw": "torch AdamW",
    "sparse_adam": "torch SparseAdam",
}

# Okabe and Ito's palette, as in the example's plot.
STYLES = {
    "skip": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "decay": {"color": "#CC79A7", "marker": "v", "linestyle": "-."},
    "dense": {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    "adamw": {"color": "#009E73", "marker": "^", "linestyle": ":"},
    "sparse_adam": {"color": "#000000", "marker": "x", "linestyle": ""},
}

# Differences between modes that share seeds: what is compared, and with what.
PAIRS = (("dense", "skip"), ("decay", "skip"), ("adamw", "skip"))


def confidence(values: Iterable[float]) -> tuple[float, float]:
    """The mean and half of its 95% confidence interval (Student's t), for 2 to 31 values."""
    values = list(values)
    if not 2 <= len(values) <= len(T_975) + 1:
        raise ValueError(f"an interval needs 2 to {len(T_975) + 1} values, got {len(values)}")
    return fmean(values), T_975[len(values) - 2] * stdev(values) / math.sqrt(len(values))


def interval(values: Iterable[float]) -> tuple[float, float] | None:
    """`confidence`, or None where a value is NaN or there are too few."""
    values = list(values)
    if len(values) < 2 or any(math.isnan(value) for value in values):
        return None
    return confidence(values)


class Tables:
    """What is known of the cases of one data set."""

    def __init__(self, plans: dict[Case, Plan], results: Results) -> None:
        self.plans = plans
        self.batches = sorted({case.batch for case in plans})
        self.decays = sorted({case.decay for case in plans})
        self.choices: dict[Case, Choice] = {}
        self.tried: dict[Case, dict[int, Choice]] = {}  # by exponent of the learning rate
        self.runs: dict[Case, dict[int, dict[str, Any]]] = {}  # of the test, by seed
        for case, plan in plans.items():
            best = choice(case, plan, results)
            if best is None:
                continue
            settings = test_settings(case, plan, best)
            found = {setting.seed: results.get(setting) for setting in settings}
            self.choices[case] = best
            self.tried[case] = tried(case, plan, results)
            self.runs[case] = {seed: run for seed, run in found.items() if run is not None}
        name = next(iter(plans)).data
        self.all = {wish: run for wish, run in results.items() if wish.data == name}

    def find(self, mode: str, batch: int, decay: float) -> Case | None:
        """The case with a result that stands in a cell. Decay 0 of "decay" is that of "skip"."""
        if mode == "decay" and decay == 0:
            mode = "skip"
        for case in self.plans:
            if (case.mode, case.batch, case.decay) == (mode, batch, decay):
                return case if len(self.runs.get(case, {})) > 1 else None
        return None

    def best(self, mode: str, batch: int) -> Case | None:
        """The case with the decay that has the least validation error."""
        found = [self.find(mode, batch, decay) for decay in self.decays]
        known = [case for case in found if case is not None]
        return min(known, key=lambda case: self.choices[case].error, default=None)

    def values(self, case: Case, read: Callable[[dict[str, Any]], float]) -> dict[int, float]:
        """A number of each test run by seed."""
        return {seed: read(run) for seed, run in self.runs[case].items()}

    def difference(
        self, case: Case | None, other: Case | None, read: Callable[[dict[str, Any]], float]
    ) -> str:
        """Mean and interval of the differences between runs with the same seed, × 10⁴."""
        if case is None or other is None:
            return "–"
        return _text([10_000 * gap for gap in self.gaps(case, other, read)], _signed)

    def gaps(self, case: Case, other: Case, read: Callable[[dict[str, Any]], float]) -> list[float]:
        """The differences between runs with the same seed."""
        ours, theirs = self.values(case, read), self.values(other, read)
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def auc(run: dict[str, Any]) -> float:
    """The test AUC of a run."""
    return float(run["auc"][-1])


def error(run: dict[str, Any]) -> float:
    """The test RMSE or log loss of a run."""
    return float(run["error"][-1])


def bucket(name: str) -> Callable[[dict[str, Any]], float]:
    """Reads the test AUC of one of BUCKETS."""
    return lambda run: float(run["bucket_auc"][name])


def write(document: Path, plans: dict[Case, Plan], results: Results) -> None:
    """Write the tables between the document's two marks, and the plots into a folder beside it."""
    plots = document.with_suffix("")
    plots.mkdir(parents=True, exist_ok=True)
    parts = []
    for clicks in (False, True):
        chosen = {case: p for case, p in plans.items() if case.data.startswith("clicks") is clicks}
        tables = Tables(chosen, results) if chosen else None
        if tables is None or not any(tables.runs.values()):
            continue
        if clicks:
            plot_buckets(plots / "clicks.png", tables)
            parts.append(clicks_report(tables, f"{plots.name}/clicks.png"))
        else:
            plot_decays(plots / "movielens.png", tables)
            parts.append(ratings_report(tables, f"{plots.name}/movielens.png"))
    parts.append(total(results))
    text = document.read_text(encoding="utf-8") if document.exists() else f"{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document} must have the lines {BEGIN!r} and {END!r}")
    document.write_text(before + "\n\n".join([BEGIN, *parts, END]) + after, encoding="utf-8")


def ratings_report(tables: Tables, plot: str) -> str:
    """The tables of MovieLens."""
    return "\n\n".join(
        [
            "## MovieLens-100K",
            f"![Test AUC and RMSE by weight decay]({plot})",
            "Each mode with the decay that had the least validation RMSE:",
            best_table(tables, "RMSE"),
            "Differences between runs of the same seed, × 10⁴, AUC (more is better):",
            difference_table(tables, auc),
            "and RMSE (less is better):",
            difference_table(tables, error),
            *in_full(tables, "RMSE"),
        ]
    )


def in_full(tables: Tables, error_name: str) -> list[str]:
    """Every case: its figures, what tuning chose, and what it takes."""
    return [
        "Test AUC:",
        grid(tables, lambda case: _interval(tables, case, auc)),
        f"Test {error_name}:",
        grid(tables, lambda case: _interval(tables, case, error)),
        "What tuning chose, learning rate and epochs:",
        grid(tables, lambda case: _chosen(tables, case)),
        "Least validation error of each learning rate at decay 0, and after how many epochs:",
        rate_table(tables),
        likeness(tables),
        "Seconds an epoch, medians of three, in turns and one process at a time:",
        seconds_table(tables),
    ]


def clicks_report(tables: Tables, plot: str) -> str:
    """The tables of the click model."""
    (batch,) = tables.batches
    planted = next(run for runs in tables.runs.values() for run in runs.values())
    said = f"the planted logits have an AUC of {planted['planted_auc']:.4f}"
    names = list(BUCKETS)
    head = ["", *names]
    ceiling = ["planted logits", *(f"{planted['planted_bucket_auc'][n]:.4f}" for n in names)]
    by_bucket, differences = [ceiling], []
    for mode in MODES:
        best = tables.best(mode, batch)
        if best is not None:
            cells = [_interval(tables, best, bucket(name)) for name in names]
            by_bucket.append([f"{LABELS[mode]}, {best.decay:g}", *cells])
    for one, other in PAIRS:
        for decay in tables.decays:
            pair = tables.find(one, batch, decay), tables.find(other, batch, decay)
            if None not in pair and pair[0] != pair[1]:
                cells = [tables.difference(*pair, bucket(name)) for name in names]
                differences.append([f"{LABELS[one]} − {LABELS[other]}, {decay:g}", *cells])
    return "\n\n".join(
        [
            "## Clicks",
            f"![Test AUC over that of skip, by how often training showed the item]({plot})",
            f"Each mode with the decay that had the least validation log loss; {said}:",
            best_table(tables, "log loss"),
            "The same by how often training showed the item, AUC within each group of examples:",
            markdown(head, by_bucket),
            "Differences between runs of the same seed, × 10⁴, AUC (more is better):",
            difference_table(tables, auc),
            "log loss (less is better):",
            difference_table(tables, error),
            "and AUC by decay and how often training showed the item:",
            markdown(head, differences),
            *in_full(tables, "log loss"),
        ]
    )


def best_table(tables: Tables, error_name: str) -> str:
    """Each mode with its best decay, by batch."""
    rows = []
    for batch in tables.batches:
        for mode in MODES:
            case = tables.best(mode, batch)
            if case is not None:
                chosen = f"{case.decay:g}, {_chosen(tables, case)}"
                cells = [_interval(tables, case, read) for read in (auc, error)]
                rows.append([f"{batch:,}", LABELS[mode], chosen, *cells])
    return markdown(
        ["batch", "mode", "decay, learning rate, epochs", "test AUC", f"test {error_name}"], rows
    )


def difference_table(tables: Tables, read: Callable[[dict[str, Any]], float]) -> str:
    """Differences of PAIRS by batch and decay, and between the modes' best decays."""
    rows = []
    for batch in tables.batches:
        for decay in tables.decays:
            pairs = [[tables.find(mode, batch, decay) for mode in pair] for pair in PAIRS]
            rows.append([f"{batch:,}", f"{decay:g}", *(_pair(tables, p, read) for p in pairs)])
        pairs = [[tables.best(mode, batch) for mode in pair] for pair in PAIRS]
        rows.append([f"{batch:,}", "each its best", *(_pair(tables, p, read) for p in pairs)])
    return markdown(["batch", "decay", *(f"{LABELS[a]} − {LABELS[b]}" for a, b in PAIRS)], rows)


def grid(tables: Tables, cell: Callable[[Case], str]) -> str:
    """A cell for every case: batch and mode down, decay across."""
    rows = []
    for batch in tables.batches:
        for mode in MODES:
            found = [tables.find(mode, batch, decay) for decay in tables.decays]
            if any(case is not None for case in found):
                cells = ["–" if case is None else cell(case) for case in found]
                rows.append([f"{batch:,}", LABELS[mode], *cells])
    return markdown(["batch", "mode", *(f"decay {decay:g}" for decay in tables.decays)], rows)


def seconds_table(tables: Tables) -> str:
    """Time of an epoch by mode and batch: what `timing_settings` asks for."""
    rows = []
    for mode in MODES:
        cells = []
        for batch in tables.batches:
            runs = [
                run
                for wish, run in tables.all.items()
                if wish.seed in TIMING_SEEDS and (wish.mode, wish.batch) == (mode, batch)
            ]
            seconds = [second for run in runs for second in run["seconds"]]
            cells.append(f"{median(seconds):.2f}" if seconds else "–")
        rows.append([LABELS[mode], *cells])
    return markdown(["mode", *(f"batch {batch:,}" for batch in tables.batches)], rows)


def rate_table(tables: Tables) -> str:
    """The least validation error of each learning rate at decay 0, by batch and mode."""
    found: dict[tuple[int, str], dict[int, Choice]] = {}
    for batch in tables.batches:
        for mode in MODES:
            case = tables.find(mode, batch, 0.0)
            if case is not None and case.mode == mode:
                found[batch, mode] = tables.tried[case]
    exponents = sorted({exponent for rates in found.values() for exponent in rates})
    rows = []
    for (batch, mode), rates in found.items():
        cells = [
            f"{rates[e].error:.4f}, {rates[e].epochs}" if e in rates else "–" for e in exponents
        ]
        rows.append([f"{batch:,}", LABELS[mode], *cells])
    return markdown(["batch", "mode", *(_power(exponent) for exponent in exponents)], rows)


def likeness(tables: Tables) -> str:
    """How far runs of mode "dense" are from those of AdamW with the same settings."""
    gaps = []
    for wish, run in tables.all.items():
        twin = tables.all.get(dataclasses.replace(wish, mode="adamw"))
        if wish.mode == "dense" and twin is not None and wish.seed not in TIMING_SEEDS:
            gaps.append((abs(auc(run) - auc(twin)), abs(error(run) - error(twin))))
    if not gaps:
        return "No run of dense and torch AdamW has the same settings."
    of_auc, of_error = (max(column) for column in zip(*gaps, strict=True))
    return (
        f"{len(gaps)} runs of dense and of torch AdamW have the same settings and seed; the "
        f"largest difference between two is {of_auc:.1e} in AUC, {of_error:.1e} in the error."
    )


def total(results: Results) -> str:
    """How much was run."""
    seconds = sum(sum(result["cpu_seconds"]) for _, result in results.items())
    made = sorted({f"torch {result['torch']}" for _, result in results.items()})
    return (
        f"{len(results.items()):,} runs, whose training took {seconds / 60:.0f} minutes of one "
        f"core, with {', '.join(made)}."
    )


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot_decays(path: Path, tables: Tables) -> None:
    """Test AUC and RMSE with intervals: a column of panels for each batch, decay across."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    panels = figure.subplots(2, len(tables.batches), squeeze=False, sharex=True, sharey="row")
    for column, batch in enumerate(tables.batches):
        for row, (read, name) in enumerate(((auc, "test AUC"), (error, "test RMSE"))):
            axis = panels[row][column]
            for shift, mode in enumerate(MODES):
                points = []
                for place, decay in enumerate(tables.decays):
                    case = tables.find(mode, batch, decay)
                    if case is not None:
                        found = confidence(tables.values(case, read).values())
                        points.append((place + (shift - 2) * 0.07, *found))
                _draw(axis, points, mode)
            axis.set_xticks(range(len(tables.decays)), [f"{decay:g}" for decay in tables.decays])
            if column == 0:
                axis.set_ylabel(name)
        panels[0][column].set_title(f"batch {batch:,}")
        panels[1][column].set_xlabel("weight decay")
    _finish(figure, panels[0][0], path)


def plot_buckets(path: Path, tables: Tables) -> None:
    """Test AUC over that of "skip" by how often training showed the item, at the best decays."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    (batch,) = tables.batches
    base = tables.best("skip", batch)
    for shift, mode in enumerate(MODES):
        case = tables.best(mode, batch)
        points = []
        for place, name in enumerate(BUCKETS):
            if case is not None and base is not None and mode != "skip":
                found = interval(tables.gaps(case, base, bucket(name)))
                if found:
                    points.append((place + (shift - 2) * 0.07, *found))
        _draw(axis, points, mode)
    axis.axhline(0, color=STYLES["skip"]["color"], linewidth=1)
    axis.set_xticks(range(len(BUCKETS)), list(BUCKETS))
    axis.set_xlabel("how often training showed the item")
    axis.set_ylabel("test AUC − that of skip")
    _finish(figure, axis, path)


def _draw(axis: Any, points: list[tuple[float, float, float]], mode: str) -> None:
    if points:
        x, mean, half = zip(*points, strict=True)
        style = {**STYLES[mode], "markersize": 4, "linewidth": 1.2, "capsize": 2}
        axis.errorbar(x, mean, yerr=half, label=LABELS[mode], **style)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _finish(figure: Figure, axis: Any, path: Path) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=90)


def _pair(tables: Tables, pair: list[Case | None], read: Callable[[dict[str, Any]], float]) -> str:
    one, other = pair
    return "0" if one is not None and one == other else tables.difference(one, other, read)


def _interval(tables: Tables, case: Case, read: Callable[[dict[str, Any]], float]) -> str:
    return _text(
        tables.values(case, read).values(), lambda *found: "{:.4f} ± {:.4f}".format(*found)
    )


def _signed(mean: float, half: float) -> str:
    """Bold where the interval leaves out 0."""
    text = f"{mean:+.1f} ± {half:.1f}".replace("-", "−")
    return f"**{text}**" if abs(mean) > half else text


def _text(values: Iterable[float], form: Callable[[float, float], str]) -> str:
    """An interval in words; an AUC is NaN where all examples are of one class."""
    found = interval(values)
    return "–" if found is None else form(*found)


def _chosen(tables: Tables, case: Case) -> str:
    best = tables.choices[case]
    most = " (the most)" if best.epochs == tables.plans[case].epochs else ""
    return f"{_power(best.exponent)}, {best.epochs}{most}"


def _power(exponent: int) -> str:
    return f"2^{exponent}".replace("-", "−")
