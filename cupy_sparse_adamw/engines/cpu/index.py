"""The hash index from ids to rows, and moving rows in and out of a table's blocks.

Open addressing with linear probing over ``entries`` [C, 2] int64 (id, row). A free entry's row is
``MISSING``, that of one whose id was taken out ``DELETED``. An id and its row share a cache line.
Ids are mixed by the finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom
number generators", 2014), so sequential ids and ids that agree in their low bits spread like random
ones. The mixed id is scaled to the capacity (Lemire, "Fast random integer generation in an
interval", 2019): so entries stand in its order, and ``rehash_`` is one pass over both indices.
"""

from __future__ import annotations

import numpy as np
import torch

from ..._memory import empty
from ..._slots import Slot
from ..._types import DELETED, MISSING, Distribution, RowIndex
from ._compile import (
    BYTE,
    INT64,
    at,
    copy_bytes,
    inline,
    jit,
    multiply_high,
    prefetch,
    prefetch_bytes,
    reciprocal_of,
    row_address,
    view,
)
from ._interop import array_of
from ._threads import num_parts, parallel_for
from .random import init_rows_

#: Ids a thread takes at the least, and entries of the index asked for ahead.
GRAIN = 8192
AHEAD = 16
#: Rows of a lookup between asking for one and copying it.
ROWS_AHEAD = 32


@inline
def _home(id_, capacity):  # type: ignore[no-untyped-def]
    """The entry at which the search for an id begins."""
    z = np.uint64(id_)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.int64(multiply_high(z, np.uint64(capacity)))


@inline
def _search(entries, id_, entry):  # type: ignore[no-untyped-def]
    """The entry that holds an id, or the free one where it would go, from its home on."""
    first, capacity = entries.ctypes.data, entries.shape[0]
    while True:
        row = at(first, 2 * entry + 1, INT64)
        if row == MISSING or (at(first, 2 * entry, INT64) == id_ and row != DELETED):
            return entry
        entry += 1
        if entry == capacity:
            entry = 0


@inline
def _entry_of(entries, id_):  # type: ignore[no-untyped-def]
    """The entry that holds an id, or the free one where it would go."""
    return _search(entries, id_, _home(id_, entries.shape[0]))


@inline
def _prefetch_home(entries, ids, i):  # type: ignore[no-untyped-def]
    if i < ids.size:
        prefetch(entries.ctypes.data + _home(ids[i], entries.shape[0]) * 16)


@jit
def _find(part, begin, end, entries, ids, rows):  # type: ignore[no-untyped-def]
    """Fill rows [begin, end). Returns how many ids are absent."""
    first, capacity = entries.ctypes.data, entries.shape[0]
    homes = np.empty(AHEAD, np.int64)  # of the next ids, in a ring
    for i in range(begin, min(begin + AHEAD, end)):
        homes[i % AHEAD] = _home(ids[i], capacity)
        prefetch(first + homes[i % AHEAD] * 16)
    absent = 0
    for i in range(begin, end):
        home = homes[i % AHEAD]
        if i + AHEAD < end:
            homes[i % AHEAD] = _home(ids[i + AHEAD], capacity)
            prefetch(first + homes[i % AHEAD] * 16)
        row = at(first, 2 * _search(entries, ids[i], home) + 1, INT64)
        rows[i] = row
        absent += row == MISSING
    return absent


@jit
def _insert(entries, ids, rows):  # type: ignore[no-untyped-def]
    for i in range(ids.size):
        _prefetch_home(entries, ids, i + AHEAD)
        entry = _entry_of(entries, ids[i])
        entries[entry, 0] = ids[i]
        entries[entry, 1] = rows[i]


@jit
def _rehash(entries, target):  # type: ignore[no-untyped-def]
    for i in range(entries.shape[0]):
        if entries[i, 1] >= 0:
            entry = _entry_of(target, entries[i, 0])
            target[entry, 0] = entries[i, 0]
            target[entry, 1] = entries[i, 1]


@jit
def _delete(entries, ids, rows, counters, free_rows):  # type: ignore[no-untyped-def]
    for i in range(ids.size):
        _prefetch_home(entries, ids, i + AHEAD)
        entry = _entry_of(entries, ids[i])
        rows[i] = entries[entry, 1]
        if rows[i] != MISSING:
            entries[entry, 1] = DELETED
            free_rows[counters[1]] = rows[i]
            counters[1] += 1


@jit
def _insert_absent(entries, ids, new_rows, rows, new_ids):  # type: ignore[no-untyped-def]
    """Give ids without a row the next of ``new_rows``; returns how many got one."""
    inserted = 0
    for i in range(ids.size):
        if i + AHEAD < ids.size and rows[i + AHEAD] == MISSING:
            _prefetch_home(entries, ids, i + AHEAD)
        if rows[i] != MISSING:
            continue
        entry = _entry_of(entries, ids[i])
        if entries[entry, 1] < 0:
            entries[entry, 0] = ids[i]
            entries[entry, 1] = new_rows[inserted]
            new_ids[inserted] = ids[i]
            inserted += 1
        rows[i] = entries[entry, 1]
    return inserted


@jit
def _gather(  # type: ignore[no-untyped-def]
    part, begin, end, blocks, block_size, reciprocal, row_bytes, value_bytes, rows, target
):
    for i in range(begin, end):
        if i + ROWS_AHEAD < end and rows[i + ROWS_AHEAD] >= 0:
            ahead = row_address(blocks, block_size, reciprocal, rows[i + ROWS_AHEAD], row_bytes)
            prefetch_bytes(ahead, value_bytes)
        if rows[i] >= 0:
            source = row_address(blocks, block_size, reciprocal, rows[i], row_bytes)
            copy_bytes(target + i * value_bytes, source, value_bytes)
        else:
            view(target + i * value_bytes, value_bytes, BYTE)[:] = 0
    return 0


@jit
def _scatter(blocks, block_size, reciprocal, row_bytes, value_bytes, rows, source):  # type: ignore[no-untyped-def]
    for i in range(rows.size):
        if rows[i] >= 0:
            target = row_address(blocks, block_size, reciprocal, rows[i], row_bytes)
            copy_bytes(target, source + i * value_bytes, value_bytes)


def find(entries: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The row of each id, or ``MISSING``.

    Args:
        entries: the index, [C, 2] int64, at least one entry free.
        ids: [N] int64.

    Returns:
        rows [N] int64.
    """
    rows, _ = _find_all(entries, ids)
    return rows


def _find_all(entries: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The row of each id, or ``MISSING``, and how many are missing."""
    rows, size = torch.empty_like(ids), ids.numel()
    arrays = map(array_of, (entries, ids, rows))
    absent = sum(parallel_for(_find, size, num_parts(size, GRAIN), *arrays))
    return rows, absent


def insert_(entries: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> None:
    """Put ids with their rows into the index.

    Args:
        entries: the index, [C, 2] int64, changed in place; at least one entry stays free.
        ids: [n] int64, distinct and absent.
        rows: [n] int64.
    """
    _insert(array_of(entries), array_of(ids), array_of(rows))


def rehash_(entries: torch.Tensor, target: torch.Tensor) -> None:
    """Put all ids of one index, with their rows, into an empty one.

    Args:
        entries: the one, [C, 2] int64.
        target: the other, [C', 2] int64; at least one entry stays free.
    """
    _rehash(array_of(entries), array_of(target))


def delete_(index: RowIndex, ids: torch.Tensor) -> torch.Tensor:
    """Take ids out; their rows are free.

    Args:
        index: changed in place; its list of free rows has room.
        ids: [N] int64, duplicates allowed.

    Returns:
        rows [N] int64: the row that an id had; ``MISSING`` where it had none, and at all
        occurrences of an id but one.
    """
    rows = torch.empty_like(ids)
    _delete(*map(array_of, (index.entries, ids, rows, index.counters, index.free_rows)))
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
    rows, num_absent = _find_all(index.entries, ids)
    if not num_absent:
        return rows
    new_rows, new_ids = index.next_rows(num_absent), torch.empty_like(ids[:num_absent])
    inserted = _insert_absent(*map(array_of, (index.entries, ids, new_rows, rows, new_ids)))
    new_rows, new_ids = new_rows[:inserted], new_ids[:inserted]
    scatter_(ids_by_row, new_rows, new_ids[:, None])
    if last_step is not None:
        scatter_(last_step, new_rows, torch.full_like(new_ids[:, None], now, dtype=torch.int32))
    init_rows_(embedding, new_rows, new_ids, seed, distribution)
    index.take_rows(inserted)
    return rows


def gather(slot: Slot, rows: torch.Tensor) -> torch.Tensor:
    """Copies of the named rows.

    Args:
        slot: weights or moments of width D.
        rows: [N] int64, in range or ``MISSING``, which reads as zeros.

    Returns:
        values [N, D] of the slot's dtype.
    """
    values = empty((rows.numel(), slot.dim), slot.dtype, slot.device)
    value_bytes = slot.dim * slot.dtype.itemsize
    parallel_for(
        _gather,
        rows.numel(),
        num_parts(rows.numel(), GRAIN * 64 // value_bytes),
        slot.addresses(),
        slot.block_size(),
        reciprocal_of(slot.block_size()),
        slot.row_bytes,
        value_bytes,
        array_of(rows),
        values.data_ptr(),
    )
    return values


def scatter_(slot: Slot, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Overwrite the named rows; of a row that is named twice the last value stays.

    Args:
        slot: changed in place.
        rows: [N] int64, in range or ``MISSING``, whose value goes nowhere.
        values: [N, D] of the slot's dtype.
    """
    values = values.contiguous()
    _scatter(
        slot.addresses(),
        slot.block_size(),
        reciprocal_of(slot.block_size()),
        slot.row_bytes,
        slot.dim * slot.dtype.itemsize,
        array_of(rows),
        values.data_ptr(),
    )
