"""What benchmarks are to reach on two cores: the goals of docs/performance.md, as data."""

from __future__ import annotations

from typing import Any, NamedTuple

from cupy_sparse_adamw.missed_steps import MAX_ENTRIES


class Goal(NamedTuple):
    """One line of the table of goals.

    ``figure`` is where the figure stands among a case's results: ("rivals", "SparseAdam",
    "ratio"), say. It must be at least ``limit``, or at most if ``at_most``.
    """

    what: str
    case: str
    figure: tuple[str, ...]
    limit: float
    at_most: bool = False
    unit: str = "×"

    def found(self, cases: dict[str, dict[str, Any]]) -> float | None:
        """The figure, or None if it was not measured."""
        value: Any = cases.get(self.case, {})
        for key in self.figure:
            if not isinstance(value, dict) or key not in value:
                return None
            value = value[key]
        return float(value)

    def reached(self, value: float) -> bool:
        """Is ``value`` on the right side of the limit?"""
        return value <= self.limit if self.at_most else value >= self.limit


def _step(name: str, case: str, ratio: float, percent: float) -> list[Goal]:
    return [
        Goal(
            f"{name}: SparseAdam's time over ours", case, ("rivals", "SparseAdam", "ratio"), ratio
        ),
        Goal(f"{name}: of the floor", case, ("floor", "percent"), percent, unit="%"),
    ]


def _at_most(what: str, case: str, figure: str, limit: float, unit: str = "×") -> Goal:
    return Goal(what, case, ("figures", figure), limit, True, unit)


_MEMORY = "bytes a gradient row beyond 1 MiB"

GOALS = [
    *_step("D = 64, 65,536 uniform ids", "D64-uniform", 10, 70),
    *_step("D = 128, 65,536 uniform ids", "D128-uniform", 18, 80),
    *_step("D = 16, 262,144 uniform ids", "D16-uniform", 14, 50),
    *_step("D = 64, 262,144 Zipf(1.2) ids", "D64-zipf1.2", 12, 60),
    _at_most(
        "10% of 262,144 ids the same: of the batch without it",
        "hot-id",
        "of the batch without it",
        1.3,
    ),
    _at_most(
        "10^8 rows, D = 8: per touched row, of 10^7 rows",
        "table-size",
        "per row, of 10^7 rows",
        1.4,
    ),
    *(
        _at_most(
            f"10^6 touched rows: per row, of {fewer} × 10^5",
            "touched-linear",
            f"per row, of {fewer} × 10^5 rows",
            1.15,
        )
        for fewer in (1, 3)
    ),
    _at_most(
        "300 tables × 64 ids: engine, of one table", "many-tables", "engine, of one table", 1.5
    ),
    _at_most("300 tables × 64 ids: host, a table", "many-tables", "host µs a table", 4, "µs"),
    Goal("1 table × 1 id", "one-id", ("ours_ms",), 0.150, True, "ms"),
    Goal(
        "1 table × 1 id: SparseAdam's time over ours",
        "one-id",
        ("rivals", "SparseAdam", "ratio"),
        1,
    ),
    *(
        _at_most(
            f"memory of a step, {case}: beyond 1 MiB", f"memory-{case}", _MEMORY, 24, "B a row"
        )
        for case in ("D64-uniform", "D16-uniform", "D64-zipf1.2")
    ),
    Goal(
        "HashTable forward + backward + step: nn.Embedding + SparseAdam's time over ours",
        "hash-train",
        ("rivals", "nn.Embedding + SparseAdam", "ratio"),
        5,
    ),
    _at_most(
        "HashTable lookup, 65,536 ids: of index_select", "hash-lookup", "of index_select", 1.5
    ),
    *(
        _at_most(
            f"untouched={mode!r}, rows {behind:,} steps behind: {what}, of 'skip'",
            f"untouched-{case}",
            f"{mode}, {behind} steps behind: of skip",
            limit,
        )
        for what, case, limits in (
            ("a step", "step", {"decay": 1.1, "dense": 1.2}),
            ("lookup, backward and step", "training", {"decay": 1.2, "dense": 1.45}),
        )
        for mode, limit in limits.items()
        for behind in (10, 1_000, MAX_ENTRIES - 600)
    ),
    *(
        _at_most(
            f"rules of untouched='dense', beta1 {beta1}: upkeep",
            "untouched-upkeep",
            f"µs a step, beta1 {beta1}",
            40,
            "µs",
        )
        for beta1 in (0.9, 0.95, 0.99)
    ),
    _at_most("first step, warm disk cache", "first-step", "warm, s", 2, "s"),
    _at_most("first step, no cache", "first-step", "no cache, s", 20, "s"),
    Goal(
        "first step, no cache: lines that say it compiles",
        "first-step",
        ("figures", "lines that say it compiles"),
        1,
        unit="",
    ),
]
