"""The committed baseline: what runs of ``make bench`` found, for each CPU, and a run beside it.

Ratios are compared, not seconds: how many times as long a rival takes as we do, and the floor's
time over ours. If we get slower, all ratios of a case fall; if a rival has a good day (new memory
alone makes torch's times differ by a fifth from process to process), its own falls. So a case is
worse if the median of its ratios' changes is, and one ratio that falls alone is told, no more.
Of several runs, a case is worse if it is in each: what disturbs a machine passes, a slower step
stays. What is missing or no number is wrong in any.

CPUs differ in ratios as well, by half. A run is compared with runs on its own CPU; on a CPU that
has none, with the least that any machine had of each ratio.

Where others use the machine's memory, everybody is slower, and we most, who do nothing but wait for
memory: three times as slow was seen. A copy tells: a case in whose rounds it ran at less than
``UNDISTURBED`` of what the baseline has for this CPU is not judged in this run, and named. (Cases
without a copy in their rounds, and CPUs that the baseline does not know, always are.)
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from runs import COPY, FLOOR, Cases, Run, Unreadable, read_json

BASELINE = Path(__file__).resolve().parent / "baseline.json"

#: How far a ratio may fall before ``--compare`` fails.
TOLERANCE = 0.15
#: With ``--quick``, which CI runs on machines that are never quite at rest: twice as slow is a
#: fall of 50%.
QUICK_TOLERANCE = 0.35

#: Share of the baseline's copy bandwidth below which a case is not judged.
UNDISTURBED = 0.75

#: Exit status where nothing is worse, but no run could judge some case.
NOT_JUDGED = 3

#: Made to be read, not to be fast: shown, not compared.
NOT_COMPARED = ("reference",)


class Measured(NamedTuple):
    """Some runs, as the baseline keeps them.

    Attributes:
        environments: where and when.
        cases: name -> {"quick": whether ``--quick`` runs it, "ratios": name -> the least of them,
            "copy_GB_per_s": of a copy in the same rounds, the least, if all of them had one}.
    """

    environments: list[dict[str, Any]]
    cases: Cases

    def cpus(self) -> set[str]:
        """The CPUs that they ran on."""
        return {str(environment.get("cpu")) for environment in self.environments}


# ---------------------------------------------------------------------- what is kept


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


def least_of(several: list[Measured]) -> Measured:
    """All of them as one, with the least of each ratio."""
    cases: Cases = {}
    for measured in several:
        for name, case in measured.cases.items():
            entry = cases.setdefault(name, {**case, "ratios": {}})
            for key, value in case["ratios"].items():
                entry["ratios"][key] = min(value, entry["ratios"].get(key, math.inf))
            speeds = entry.pop(COPY, None), case.get(COPY)
            if None not in speeds:
                entry[COPY] = min(speeds)
    return Measured([x for measured in several for x in measured.environments], cases)


def measured_in(run: Run) -> Measured:
    """What the baseline keeps of a run.

    Raises:
        Unreadable: it is not whole, or a ratio is no positive number.
    """
    selection = run.environment["selection"]
    if selection != "all":
        raise Unreadable(f"a baseline needs a whole run, this one is {selection}; run make bench")
    cases: Cases = {}
    for name, figures in sorted(run.cases.items()):
        if ratios := ratios_of(figures):
            for key, value in ratios.items():
                if not (math.isfinite(value) and value > 0):
                    raise Unreadable(f"{name}: {key} is {value}: no baseline; run make bench")
            ratios = {key: float(f"{value:.4g}") for key, value in ratios.items()}
            cases[name] = {"quick": figures["quick"], "ratios": ratios}
            if COPY in figures:
                cases[name][COPY] = float(f"{figures[COPY]:.4g}")
    return Measured([run.environment], cases)


def of_cpu(cpu: str, baseline: list[Measured]) -> Measured:
    """What a run on ``cpu`` is compared with: runs on this CPU, or else all of them."""
    return least_of([measured for measured in baseline if measured.cpus() == {cpu}] or baseline)


def with_runs(baseline: list[Measured], runs: list[Run]) -> list[Measured]:
    """The baseline with these runs in the place of earlier ones on the same CPUs."""
    new = [measured_in(run) for run in runs]
    cpus = set[str]().union(*(measured.cpus() for measured in new))
    alone = cpus.union(*(x.cpus() for x in baseline if len(x.cpus()) == 1))
    kept = [x for x in baseline if not x.cpus() <= (cpus if len(x.cpus()) == 1 else alone)]
    return kept + [of_cpu(cpu, new) for cpu in sorted(cpus)]


def read_baseline(path: Path) -> list[Measured]:
    """The committed baseline.

    Raises:
        Unreadable: the file is missing or is none.
    """
    way_out = "write one with make bench-baseline"
    if path.exists():
        way_out = f"delete it, then {way_out}"
    content = read_json(path, way_out)
    try:
        baseline = [Measured(x["environments"], x["cases"]) for x in content["measured"]]
        if not baseline:
            raise ValueError("it is empty")
        for measured in baseline:
            if not all(isinstance(x, dict) for x in measured.environments):
                raise TypeError("an environment is no object")
            for case in measured.cases.values():
                bool(case["quick"])
                for value in (*case["ratios"].values(), case.get(COPY, 1.0)):
                    if not value > 0:
                        raise ValueError(f"a ratio or speed is {value}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Unreadable(f"{path} is no baseline: {error!r}; {way_out}") from error
    return baseline


def write_baseline(runs: list[Run], path: Path) -> None:
    """Put whole runs into the baseline, in the place of earlier ones on the same CPUs.

    Raises:
        Unreadable: a run is not whole or has a ratio that is no number, or the file that is there
            is no baseline. Nothing is written then.
    """
    baseline = with_runs(read_baseline(path) if path.exists() else [], runs)
    content = {"measured": [measured._asdict() for measured in baseline]}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for measured in baseline:
        print(f"{path.name}: {len(measured.cases)} cases of {', '.join(sorted(measured.cpus()))}")


# ---------------------------------------------------------------------- comparison


class Comparison(NamedTuple):
    """A run beside the baseline.

    Attributes:
        broken: what is missing or no number.
        worse: case -> how far it fell, of those that fell by more than they may.
        not_judged: case -> why, where others used the memory.
        told: what else is worth telling.
    """

    broken: list[str]
    worse: dict[str, str]
    not_judged: dict[str, str]
    told: list[str]


def compare(cases: Cases, before: Cases, quick: bool, tolerance: float) -> Comparison:
    """Compare a run's ratios with earlier ones.

    Args:
        cases: of the run.
        before: of the baseline.
        quick: the run is of the quick cases, so only those of the baseline are expected, with the
            rivals that were timed.
        tolerance: the part that ratios may lose.

    Returns:
        What was found.
    """
    found = Comparison([], {}, {}, [])
    for name, entry in before.items():
        if quick and not entry["quick"]:
            continue
        if name not in cases:
            found.broken.append(f"{name}: is in the baseline but not in this run")
            continue
        _compare_case(name, cases[name], entry, quick, tolerance, found)
    new = [name for name in cases if name not in before and ratios_of(cases[name])]
    found.told.extend(f"new: {name}" for name in new)
    return found


def _compare_case(
    name: str,
    figures: dict[str, Any],
    entry: dict[str, Any],
    quick: bool,
    tolerance: float,
    found: Comparison,
) -> None:
    """See ``compare``; what is found about one case is added."""
    now = ratios_of(figures)
    ratios = entry["ratios"]
    found.told.extend(f"new: {name}: {key}" for key in now if key not in ratios)
    before = {key: value for key, value in ratios.items() if key in now}
    if not before:
        found.broken.append(f"{name}: none of the baseline's ratios was measured")
        return
    if not quick:
        reasons = figures.get("not_timed", {})
        found.broken.extend(
            f"{name}: the ratio to {key} is gone: {reasons.get(key, 'it was not timed')}"
            for key in ratios
            if key not in now
        )
    changes = {key: now[key] / value - 1 for key, value in before.items()}
    if not all(map(math.isfinite, changes.values())):
        found.broken.append(f"{name}: a ratio is no number: {now}")
        return
    copy = figures.get(COPY, math.inf)
    if copy < UNDISTURBED * entry.get(COPY, 0.0):
        found.not_judged[name] = (
            f"others used the memory: a copy ran at {copy:.1f} GB/s, in the baseline at "
            f"{entry[COPY]:.1f}"
        )
        return
    lines = [
        f"{key} / ours from {before[key]:.2f} to {now[key]:.2f} ({100 * change:+.0f}%)"
        for key, change in changes.items()
        if change < -tolerance
    ]
    middle = statistics.median(changes.values())
    if middle < -tolerance:
        found.worse[name] = (
            f"{100 * middle:+.0f}%, the median of {len(changes)}: {'; '.join(lines)}"
        )
    else:
        found.told.extend(f"alone in its case: {name}: {line}" for line in lines)


def print_comparison(runs: list[Run], baseline: list[Measured]) -> int:
    """Print what is wrong in all runs, and of the last what is new.

    Returns:
        The exit status: 1 if something is wrong, ``NOT_JUDGED`` if no run could judge a case.
    """
    selections = {run.environment["selection"] for run in runs}
    if "tiny" in selections:
        raise Unreadable("times of --tiny mean nothing; run make bench")
    if len(selections) > 1:
        raise Unreadable(f"runs of {' and '.join(sorted(selections))} are not to be mixed")
    quick = "quick" in selections
    tolerance = QUICK_TOLERANCE if quick else TOLERANCE
    compared: list[Comparison] = []
    notes: list[str] = []
    for run in runs:
        cpu = run.environment["cpu"]
        before = of_cpu(cpu, baseline)
        cases = before.cases
        if cpu not in before.cpus():  # where a copy may be as slow without anybody's doing
            cases = {name: {**case, COPY: 0.0} for name, case in cases.items()}
        compared.append(compare(run.cases, cases, quick, tolerance))
        notes += _other_machine(run, before)
    for line in [*dict.fromkeys(notes), *compared[-1].told]:
        print(line)
    broken = list(dict.fromkeys(line for found in compared for line in found.broken))
    worse: dict[str, str] = {}
    for found in compared:
        worse |= found.worse
    for found in compared:  # worse in each run that judged it
        for name in worse.keys() - found.worse.keys() - found.not_judged.keys():
            del worse[name]
    for number, found in enumerate(compared, 1):
        for name, line in found.worse.items():
            if name not in worse:
                print(f"not in every run: {name}: {line} (run {number})")
        for name, line in found.not_judged.items():
            print(f"not judged: {name}: {line} (run {number})")
    lines = [*broken, *(f"{name}: {line}" for name, line in worse.items())]
    for line in lines:
        print(f"WORSE: {line}")
    count = sum(len(ratios_of(figures)) for figures in runs[-1].cases.values())
    verdict = f"worse or wrong: {len(lines)}" if lines else "none fell by more"
    if never := set.intersection(*(set(found.not_judged) for found in compared)):
        verdict += f"; cases that no run could judge: {len(never)}"
    runs_of = f"{len(runs)} runs of " if len(runs) > 1 else ""
    print(
        f"benchmarks: {runs_of}{count} ratios, falls of {100 * tolerance:.0f}% allowed: {verdict}"
    )
    if lines:
        return 1
    return NOT_JUDGED if never else 0


def _other_machine(run: Run, before: Measured) -> list[str]:
    """In what a run's machine is another one than those that it is compared with."""
    notes = []
    cpu = run.environment["cpu"]
    if before.cpus() != {cpu}:
        others = ", ".join(sorted(before.cpus()))
        notes.append(
            f"note: the baseline has no run of its own on {cpu}; compared with the least of each "
            f"ratio on {others}"
        )
    for key in ("cores", "threads"):
        known = list(dict.fromkeys(str(x.get(key)) for x in before.environments))
        if str(run.environment[key]) not in known:
            notes.append(f"note: {key} was {' or '.join(known)}, here it is {run.environment[key]}")
    return notes
