"""The hash index from ids to rows, and moving rows in and out of a table's blocks.

Kernels: ``cuda_src/hash_table.cu``, ``cuda_src/rows.cu``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..._slots import Slot
from ..._types import Distribution, RowIndex
from . import _interop
from ._compile import (
    THREADS,
    UNITS,
    blocks_for,
    hash_table_variant,
    launch,
    log_lanes,
    rows_variant,
)
from ._group import block_table, divisor_struct, keep_for_graph
from .random import plan_struct

#: The kernels that do not touch rows are the same for every dtype.
_ANY = hash_table_variant(torch.float32)


def find(entries: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The row of each id, or ``MISSING``.

    Args:
        entries: the index, [C, 2] int64, at least one entry free.
        ids: [N] int64.

    Returns:
        rows [N] int64.
    """
    ids, size = ids.contiguous(), ids.numel()
    rows = torch.empty_like(ids)
    keep_for_graph([entries], ids.device)
    args = (entries, np.int64(entries.shape[0]), ids, rows, np.int64(size))
    launch(ids.device, _ANY, "find", blocks_for(size, THREADS), THREADS, args)
    return rows


def insert_(entries: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> None:
    """Put distinct ids that are not in the index, with their rows.

    Args:
        entries: the index, [C, 2] int64, changed in place; the caller keeps it part empty.
        ids: [n] int64, distinct.
        rows: [n] int64.
    """
    size = ids.numel()
    args = (
        entries,
        np.int64(entries.shape[0]),
        ids.contiguous(),
        rows.contiguous(),
        np.int64(size),
    )
    launch(ids.device, _ANY, "insert", blocks_for(size, THREADS), THREADS, args)


def rehash_(entries: torch.Tensor, target: torch.Tensor) -> None:
    """Put all ids of one index, with their rows, into an empty one.

    Args:
        entries: the one, [C, 2] int64.
        target: the other, [C', 2] int64; at least one entry stays free.
    """
    size, capacity = np.int64(entries.shape[0]), np.int64(target.shape[0])
    args = (entries, size, target, capacity)
    launch(entries.device, _ANY, "rehash", blocks_for(int(size), THREADS), THREADS, args)


def delete_(index: RowIndex, ids: torch.Tensor) -> torch.Tensor:
    """Take ids out; their rows are free. Does not wait.

    Args:
        index: changed in place; its list of free rows has room.
        ids: [N] int64, duplicates allowed.

    Returns:
        rows [N] int64: the row that an id had; ``MISSING`` where it had none, and at all
        occurrences of an id but one.
    """
    ids, size = ids.contiguous(), ids.numel()
    rows = torch.empty_like(ids)
    args = (
        index.entries,
        np.int64(index.entries.shape[0]),
        ids,
        rows,
        np.int64(size),
        index.counters,
        index.free_rows,
    )
    launch(ids.device, _ANY, "remove_ids", blocks_for(size, THREADS), THREADS, args)
    index.counters[1:2] += index.counters[2:]
    index.counters[2:] = 0
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
    """Find each id's row; give absent ids a row, with their initial values. Does not wait.

    Args:
        index: changed in place; the caller keeps its entries part empty.
        ids: [N] int64, duplicates allowed.
        ids_by_row: becomes the id of each new row.
        embedding: new rows are filled; both slots hold memory for all rows that may be new.
        seed: with the id, decides a new row's values.
        distribution: what they are drawn from.
        last_step: if given, becomes ``now`` in each new row; of width 1, int32.
        now: any int32.

    Returns:
        rows [N] int64. Which new id has which new row is not determined.
    """
    ids, size = ids.contiguous(), ids.numel()
    rows, places = torch.empty_like(ids), torch.empty_like(ids)
    num_blocks, variant = blocks_for(size, THREADS), hash_table_variant(embedding.dtype)
    claim = (
        index.entries,
        np.int64(index.entries.shape[0]),
        ids,
        rows,
        places,
        np.int64(size),
        index.counters,
        index.free_rows,
    )
    settle = (
        index.entries,
        ids,
        rows,
        places,
        np.int64(size),
        index.counters,
        block_table(ids_by_row),
        block_table(embedding),
        divisor_struct(embedding.block_size()),
        np.int64(embedding.dim),
        plan_struct(distribution, embedding.dtype, seed),
        _interop.address_of(None if last_step is None else block_table(last_step)),
        np.int32(now),
    )
    # Nothing between the two may fail: the first leaves claims that only the second resolves.
    launch(ids.device, variant, "find_or_claim", num_blocks, THREADS, claim)
    launch(ids.device, variant, "settle", num_blocks, THREADS, settle)
    return rows


def _unit(row_bytes: int, *addresses: int) -> int:
    """Bytes of the widest access that a row's size and all addresses allow."""
    return next(
        unit for unit in UNITS if row_bytes % unit == 0 and all(a % unit == 0 for a in addresses)
    )


def _move(name: str, slot: Slot, rows: tuple[Any, ...], values: torch.Tensor) -> None:
    """Run a kernel of rows.cu on rows of a slot and of ``values`` [N, D].

    Args:
        name: the kernel.
        slot: where rows are.
        rows: which, [N] int64, and what else the kernel wants to know of them.
        values: [N, D], contiguous.
    """
    size, row_bytes = rows[0].numel(), slot.dim * slot.dtype.itemsize
    if size == 0:
        return
    held = [int(slot.addresses()[0])] if slot.num_rows() else []
    unit = _unit(row_bytes, values.data_ptr(), *held)
    units = row_bytes // unit
    lanes = log_lanes(units)
    args = (
        block_table(slot),
        divisor_struct(slot.block_size()),
        np.int64(units),
        *rows,
        values,
        np.int64(size),
        np.int32(lanes),
    )
    num_blocks = blocks_for(size << lanes, THREADS)
    keep_for_graph([slot], slot.device)
    launch(slot.device, rows_variant(unit), name, num_blocks, THREADS, args)


def gather(slot: Slot, rows: torch.Tensor) -> torch.Tensor:
    """Copies of the named rows.

    Args:
        slot: weights or moments of width D.
        rows: [N] int64, in range or ``MISSING``, which reads as zeros.

    Returns:
        values [N, D] of the slot's dtype.
    """
    values = torch.empty(rows.numel(), slot.dim, dtype=slot.dtype, device=slot.device)
    _move("gather", slot, (rows.contiguous(), np.int64(slot.num_rows())), values)
    return values


def scatter_(slot: Slot, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Overwrite the named rows; of a row that is named twice the last value stays.

    Args:
        slot: changed in place.
        rows: [N] int64; of ``MISSING`` or a row out of range the value goes nowhere.
        values: [N, D] of the slot's dtype.
    """
    ascending = (*torch.sort(rows, stable=True), np.int64(slot.num_rows()))
    _move("scatter", slot, ascending, values.contiguous())
