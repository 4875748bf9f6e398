"""Does a HashTable hold at scale? Lookup time, memory and pauses up to 50 million rows.

    python benchmarks/scale.py            # 50 million rows of D = 8: 7 GB, some minutes
    python benchmarks/scale.py --rows 4e6

Rows are inserted in batches of which half the ids are new. Then the same number of ids of patterns
that a weak hash would pile up, beside random ones. Exit code 1 if a goal is missed; it is named.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch

from cupy_sparse_adamw import HashTable, SparseAdamW, functional
from cupy_sparse_adamw.row_store import MAX_LOAD

DIM = 8
BATCH = 1 << 18
LOOKUP = 1 << 16
ROUNDS = 21
FIRST = 1_000_000
PATTERN_ROWS = 4_000_000
#: What a number n becomes as an id: injective each, up to 2**28.
PATTERNS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "random": lambda n: (n * -0x61C8864680B583EB) ^ (n << 17),
    "sequential": lambda n: n,
    "equal modulo 2^20": lambda n: n << 20,
    "equal modulo 2^35": lambda n: n << 35,
    "high bits alone differ": lambda n: n << 36,
}
GOALS = {
    "lookup, largest table against 1 million rows": 2.0,
    "bytes held against bytes needed": 1.3,
    "worst pattern of ids against random ones": 1.5,
}


def median(action: Callable[[], object]) -> float:
    """Seconds of an action that is done again and again; the first rounds do not count."""
    seconds = []
    for _ in range(ROUNDS + 3):
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[3:])


def some_of(rows: int, pattern: str, size: int = LOOKUP) -> torch.Tensor:
    """Ids, each of them one of the first ``rows``."""
    return PATTERNS[pattern](torch.randint(0, rows, (size,)))


def bytes_needed(table: HashTable) -> float:
    """Of rows, their ids and moments, and keys at the load factor."""
    widths = sum(slot.dim * slot.dtype.itemsize for slot in table.slot_group().slots())
    return len(table) * (widths + 8 + 16 / MAX_LOAD)


def cache_misses(entries: torch.Tensor) -> float:
    """Seconds per random read of as many bytes at as many places: what no hash table is below."""
    places = torch.randint(0, entries.shape[0], (LOOKUP,))
    with torch.inference_mode():
        return median(lambda: entries.index_select(0, places)) / LOOKUP


def grow(table: HashTable, rows: int, pattern: str) -> Iterator[tuple[int, float]]:
    """Insert rows, in batches half of which are hits: (rows so far, seconds of the batch)."""
    half = BATCH // 2
    for first in range(0, rows, half):
        new = PATTERNS[pattern](torch.arange(first, min(first + half, rows)))
        ids = torch.cat([new, some_of(max(first, 1), pattern, half)])
        ids = ids[torch.randperm(ids.numel())]
        begin = time.perf_counter()
        with torch.no_grad():
            table(ids)
        yield min(first + half, rows), time.perf_counter() - begin


def run_growth(rows: int) -> dict[str, float]:
    """Grow one table with moments; a line at each doubling."""
    print(f"HashTable([{DIM}]), batches of {BATCH} ids, half of them new; {ROUNDS} rounds\n")
    print(
        "|  rows | find ns/id | lookup ns/id | read of its index, ns | rows/s | batch ms, median "
        "| slowest | held/needed |\n|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    table = HashTable([DIM])
    optimizer = SparseAdamW({"table": table})
    table(torch.arange(4)).sum().backward()
    optimizer.step()  # from here on there are moments
    table.clear()
    marks = [FIRST]
    while marks[-1] < rows:
        marks.append(min(2 * marks[-1], rows))
    find: dict[int, float] = {}
    held, seconds = 0.0, []
    for count, batch in grow(table, rows, "random"):
        seconds.append(batch)
        held = max(held, table.nbytes / bytes_needed(table)) if count >= FIRST else held
        if count < marks[0]:
            continue
        del marks[0]
        ids = some_of(count, "random")
        table.eval()
        entries = table._store._index.entries
        find[count] = median(lambda e=entries, ids=ids: functional.find(e, ids)) / LOOKUP
        with torch.no_grad():
            lookup = median(lambda ids=ids: table(ids)) / LOOKUP
        table.train()
        print(
            f"| {count / 1e6:.1f}M | {find[count] * 1e9:.1f} | {lookup * 1e9:.1f} "
            f"| {cache_misses(entries) * 1e9:.1f} | {len(seconds) * BATCH / 2 / sum(seconds):.3g} "
            f"| {statistics.median(seconds) * 1e3:.0f} | {max(seconds) * 1e3:.0f} "
            f"| {table.nbytes / bytes_needed(table):.2f} |",
            flush=True,
        )
        seconds = []
    ratios = list(find.values())
    return {
        "lookup, largest table against 1 million rows": ratios[-1] / ratios[0],
        "bytes held against bytes needed": held,
    }


def run_patterns(rows: int) -> dict[str, float]:
    """Insertion and lookup of each pattern, over those of random ids measured right before."""
    print(f"\n{rows / 1e6:g} million ids of each pattern, against random ones measured in turn\n")
    print("| ids | insertion | find |\n|---|--:|--:|")
    worst = 0.0
    for pattern in list(PATTERNS)[1:]:
        inserted, found = {}, {}
        for name in ("random", pattern):
            table = HashTable([DIM])
            table.reserve(rows)
            inserted[name] = sum(seconds for _, seconds in grow(table, rows, name))
            entries, ids = table._store._index.entries, some_of(rows, name)
            found[name] = median(lambda e=entries, ids=ids: functional.find(e, ids))
        ratios = [times[pattern] / times["random"] for times in (inserted, found)]
        print(f"| {pattern} | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)
        worst = max(worst, *ratios)
    return {"worst pattern of ids against random ones": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=float, default=50e6)
    given = parser.parse_args()
    torch.manual_seed(0)
    HashTable([DIM])(torch.arange(1000))  # compiled, or read from disk
    reached = run_growth(int(given.rows))
    reached |= run_patterns(min(int(given.rows), PATTERN_ROWS))
    print()
    for goal, most in GOALS.items():
        verdict = "reached" if reached[goal] <= most else "MISSED"
        print(f"{goal}: {reached[goal]:.2f}, to reach {most}: {verdict}")
    sys.exit(any(reached[goal] > most for goal, most in GOALS.items()))


if __name__ == "__main__":
    main()
