"""The hash index from ids to rows.

Open addressing with linear probing over ``entries`` [C, 2] int64 (id, row). The row of a free entry
is ``MISSING``, that of one whose id was taken out ``DELETED``.
"""

from __future__ import annotations

import torch

from .._slots import Slot
from .._types import DELETED, MISSING, Distribution, RowIndex
from .blocks import scatter_
from .random import init_rows_


def _unsigned_shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right int64 that is read as unsigned."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _multiply_high(x: torch.Tensor, y: int) -> torch.Tensor:
    """The upper 64 bits of x * y, x read as unsigned: from the products of 32-bit halves."""
    low = (1 << 32) - 1
    x_high, x_low, y_high, y_low = _unsigned_shift(x, 32), x & low, y >> 32, y & low
    middle, cross = x_high * y_low, x_low * y_high
    carry = _unsigned_shift(x_low * y_low, 32) + (middle & low) + (cross & low)
    high = x_high * y_high + _unsigned_shift(middle, 32) + _unsigned_shift(cross, 32)
    return high + (carry >> 32)


def _home(ids: torch.Tensor, capacity: int) -> torch.Tensor:
    """The entry at which the search for an id begins.

    Ids are mixed by SplitMix64's finalizer (Steele 2014) and scaled to the capacity (Lemire, "Fast
    random integer generation in an interval", 2019).
    """
    z = ids
    z = (z ^ _unsigned_shift(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ _unsigned_shift(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    z = z ^ _unsigned_shift(z, 31)
    return _multiply_high(z, capacity)


def find(entries: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The row of each id, or ``MISSING``.

    Args:
        entries: the index, [C, 2] int64, at least one entry free.
        ids: [N] int64.

    Returns:
        rows [N] int64.
    """
    capacity = entries.shape[0]
    rows = torch.full_like(ids, MISSING)
    entry = _home(ids, capacity)
    searching = torch.arange(ids.numel(), device=ids.device)
    while searching.numel():
        key, row = entries[entry[searching]].unbind(1)
        found = (row >= 0) & (key == ids[searching])
        rows[searching[found]] = row[found]
        searching = searching[(row != MISSING) & ~found]
        entry[searching] = (entry[searching] + 1) % capacity
    return rows


def insert_(entries: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> None:
    """Put ids with their rows into the index.

    Args:
        entries: the index, [C, 2] int64, changed in place; at least one entry stays free.
        ids: [n] int64, distinct and absent.
        rows: [n] int64.
    """
    capacity = entries.shape[0]
    homes = _home(ids, capacity).tolist()
    for id_, row, entry in zip(ids.tolist(), rows.tolist(), homes, strict=True):
        while entries[entry, 1] != MISSING:
            entry = (entry + 1) % capacity
        entries[entry] = entries.new_tensor([id_, row])


def rehash_(entries: torch.Tensor, target: torch.Tensor) -> None:
    """Put all ids of one index, with their rows, into an empty one.

    Args:
        entries: the one, [C, 2] int64.
        target: the other, [C', 2] int64; at least one entry stays free.
    """
    ids, rows = entries[entries[:, 1] >= 0].unbind(1)
    insert_(target, ids, rows)


def delete_(index: RowIndex, ids: torch.Tensor) -> torch.Tensor:
    """Take ids out; their rows are free.

    Args:
        index: changed in place; its list of free rows has room.
        ids: [N] int64, duplicates allowed.

    Returns:
        rows [N] int64: the row that an id had; ``MISSING`` where it had none, and at all
        occurrences of an id but one.
    """
    rows = torch.full_like(ids, MISSING)
    first = {id_: i for i, id_ in reversed(list(enumerate(ids.tolist())))}
    firsts = torch.tensor(sorted(first.values()), dtype=torch.int64, device=ids.device)
    rows[firsts] = find(index.entries, ids[firsts])
    freed = rows[rows != MISSING]
    index.entries[torch.isin(index.entries[:, 1], freed), 1] = DELETED
    free = int(index.counters[1])
    index.free_rows[free : free + freed.numel()] = freed
    index.counters[1] += freed.numel()
    return rows


def find_or_insert_(
    index: RowIndex,
    ids: torch.Tensor,
    ids_by_row: Slot,
    embedding: Slot,
    seed: int,
    distribution: Distribution,
    last_step: Slot | None = None,
    now: int = 0,
) -> torch.Tensor:
    """Find each id; one that is absent gets a row, in order of first occurrence.

    Args:
        index: changed in place; it has room for all that are absent.
        ids: [N] int64, duplicates allowed.
        ids_by_row: width 1, int64: a new row's id is written here.
        embedding: a new row's initial values are written here.
        seed: any int64.
        distribution: what the values are drawn from.
        last_step: width 1, int32: of a new row it becomes ``now``. May be left out.
        now: the table's number of updates so far.

    Returns:
        rows [N] int64.
    """
    absent = ids[find(index.entries, ids) == MISSING]
    new_ids = ids.new_tensor(list(dict.fromkeys(absent.tolist())))
    new_rows = index.next_rows(new_ids.numel())
    insert_(index.entries, new_ids, new_rows)
    scatter_(ids_by_row, new_rows, new_ids[:, None])
    if last_step is not None:
        scatter_(last_step, new_rows, torch.full_like(new_ids[:, None], now, dtype=torch.int32))
    init_rows_(embedding, new_rows, new_ids, seed, distribution)
    index.take_rows(new_ids.numel())
    return find(index.entries, ids)
