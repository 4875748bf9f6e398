"""The hash index from ids to rows, and moving rows in and out of a table's blocks.

Open addressing with linear probing over ``entries`` [C, 2] int64 (id, row), C a power of two; a
row below 0 marks a free entry.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._types import MISSING, Slot


def _unsigned_shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right int64 that is read as unsigned."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _home(ids: torch.Tensor, capacity: int) -> torch.Tensor:
    """The entry at which the search for an id begins: SplitMix64's finalizer (Steele 2014)."""
    z = ids
    z = (z ^ _unsigned_shift(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ _unsigned_shift(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    z = z ^ _unsigned_shift(z, 31)
    return z & (capacity - 1)


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
        searching = searching[(row >= 0) & ~found]
        entry[searching] = (entry[searching] + 1) & (capacity - 1)
    return rows


def find_or_insert_(
    entries: torch.Tensor, ids: torch.Tensor, new_rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find each id, giving those that are absent the next of ``new_rows``, in order.

    Args:
        entries: the index, [C, 2] int64, changed in place; the caller keeps it part empty.
        ids: [N] int64, duplicates allowed.
        new_rows: [M] int64, at least as many as there are absent ids.

    Returns:
        rows [N] int64, and the inserted ids [n] int64: the i-th has row ``new_rows[i]``.
    """
    capacity = entries.shape[0]
    rows: list[int] = []
    new_ids: list[int] = []
    for id_, entry in zip(ids.tolist(), _home(ids, capacity).tolist(), strict=True):
        while True:
            key, row = entries[entry].tolist()
            if row < 0:
                row = int(new_rows[len(new_ids)])
                entries[entry] = ids.new_tensor([id_, row])
                new_ids.append(id_)
                break
            if key == id_:
                break
            entry = (entry + 1) & (capacity - 1)
        rows.append(row)
    return ids.new_tensor(rows), ids.new_tensor(new_ids)


def by_block(
    slot: Slot, rows: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each block [block_size, D], which of ``rows`` [N] lie in it (bool [N]), and where in it."""
    block_of = rows.div(slot.block_size(), rounding_mode="floor")
    for number, block in enumerate(slot.values()):
        here = block_of == number
        yield block, here, rows[here] - number * slot.block_size()


def gather(slot: Slot, rows: torch.Tensor) -> torch.Tensor:
    """Copies of the named rows.

    Args:
        slot: weights or moments of width D.
        rows: [N] int64, in range or ``MISSING``, which reads as zeros.

    Returns:
        values [N, D] of the slot's dtype.
    """
    values = torch.zeros(rows.numel(), slot.dim, dtype=slot.dtype, device=slot.device)
    for block, here, places in by_block(slot, rows):
        values[here] = block[places]
    return values


def scatter_(slot: Slot, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Overwrite the named rows; of a row that is named twice the last value stays.

    Args:
        slot: changed in place.
        rows: [N] int64, in range.
        values: [N, D] of the slot's dtype.
    """
    blocks = slot.values()
    for row, value in zip(rows.tolist(), values, strict=True):
        blocks[row // slot.block_size()][row % slot.block_size()] = value
