"""The fused update of a group of tables: ``cuda_src/sparse_adamw.cu``, which says how.

Whatever the number of tables, a step is four launches of ours (make_keys, advance, update, finish)
around one sort of torch's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..._checks import lr_error, row_error
from ..._types import MOMENT_DTYPE, Pending, Slot, Update
from . import _interop
from ._compile import (
    GROUP,
    WARP,
    Variant,
    adamw_variant,
    blocks_for,
    launch,
    load,
    log_lanes,
    widest_vec,
)
from ._group import PIECE, TABLE, block_table, divisor, keep_for_graph, upload
from .segment import TILE, Segments, segment

#: Threads per block: one for each position of a tile.
THREADS = TILE


class RowReport:
    """What the GPU will have found about the rows of one step's gradients."""

    def __init__(self, pending: Sequence[Pending], faults: torch.Tensor) -> None:
        # Not the gradients, whose memory the next step may need.
        self._tables = [(p.name, p.num_rows, p.row_count) for p in pending]
        self._faults = _interop.HostCopy(faults)

    def ready(self) -> bool:
        """Whether it is known by now. Does not wait."""
        return self._faults.ready()

    def error(self) -> IndexError | None:
        """For the first table with a row out of range. Waits until it is known."""
        found = self._faults.values().tolist()
        for (name, num_rows, row_count), (flag, row) in zip(self._tables, found, strict=True):
            if flag:
                return row_error(name, row, num_rows if row_count is None else int(row_count))
        return None


def _is_aligned(address: int, dtype: torch.dtype, vec: int) -> bool:
    return address % (vec * dtype.itemsize) == 0


def _vec(segments: Segments, slots: Sequence[Slot]) -> int:
    """Columns that can move together: the widest that D and all addresses allow, or 1.

    Only the first block of a slot is looked at: the others follow in its slab, or begin slabs of
    their own, which are aligned.
    """
    vec = widest_vec(segments.pending[0].param.dtype)
    fits = segments.dim % vec == 0
    for slot in slots:
        if slot.num_rows():
            fits &= _is_aligned(int(slot.addresses()[0]), slot.dtype, vec)
    for table in segments.pending:
        for _, grad in table.pieces:
            fits &= grad.stride(1) == 1 and grad.stride(0) % vec == 0
            fits &= _is_aligned(grad.data_ptr(), grad.dtype, vec)
    return vec if fits else 1


def _table(update: Update, first_key: int, fault: torch.Tensor) -> tuple[Any, ...]:
    """The fields of ``Table``.

    Raises:
        RuntimeError: under capture, ``lr`` is a tensor that a replay would not follow.
    """
    pending, lr = update.pending, update.hyper.lr
    lr_address = lr_bytes = 0
    if isinstance(lr, torch.Tensor):
        if lr.device == pending.param.device and lr.dtype in (torch.float32, torch.float64):
            lr_address, lr_bytes, lr = lr.data_ptr(), lr.itemsize, 0.0
        elif _interop.is_capturing(pending.param.device):
            raise lr_error(pending.name, lr, pending.param.device)
        else:
            lr = float(lr)
    return (
        first_key,
        *divisor(pending.param.block_size()),
        block_table(pending.param).data_ptr(),
        block_table(update.exp_avg).data_ptr(),
        block_table(update.exp_avg_sq).data_ptr(),
        update.step.data_ptr(),
        fault.data_ptr(),
        lr_address,
        lr_bytes,
        lr,
        update.hyper.beta1,
        update.hyper.beta2,
        update.hyper.eps,
        update.hyper.weight_decay,
        pending.grad_scale,
        pending.mean,
    )


def _walk(
    segments: Segments, variant: Variant, vec: int, names: tuple[str, str], sink: tuple[Any, ...]
) -> None:
    """Run both kernels over all runs: short runs and chunks of long ones, then long ones."""
    device, dim, tiles = segments.keys.device, np.int64(segments.dim), segments.long_begin.numel()
    address_of = _interop.address_of
    sorted_args = (
        address_of(segments.keys),
        address_of(segments.order),
        np.int64(segments.keys.numel()),
        np.int64(segments.num_keys),
        address_of(segments.pieces),
        np.int64(segments.pieces.nbytes // PIECE.itemsize),
    )
    room = (address_of(segments.partials), address_of(segments.long_begin))
    lanes = np.int32(log_lanes(-(-segments.dim // vec)))
    first = (*sorted_args, *sink, dim, lanes, *room)
    launch(device, variant, names[0], tiles, THREADS, first)
    second = (*sorted_args, *sink, dim, *room)
    launch(device, variant, names[1], blocks_for(tiles, THREADS // WARP), THREADS, second)


def sparse_adamw_(updates: Sequence[Update], segments: Segments) -> RowReport | None:
    """Apply one AdamW step to the rows that ``segments`` names. Nothing else is written.

    Args:
        updates: the tables of one group (one dtype, one D), in the order of ``segments``.
        segments: their gradients, from ``segment``.

    Returns:
        What the GPU will have found about their rows; None under capture, where ``fault`` of each
        table keeps it.

    Raises:
        RuntimeError: something cannot be captured into a CUDA graph; then nothing has run.
    """
    param = updates[0].pending.param
    dtype, device = param.dtype, param.device
    slots = [slot for u in updates for slot in (u.pending.param, u.exp_avg, u.exp_avg_sq)]
    descriptors = np.array(
        [
            _table(update, first_key, fault)
            for update, first_key, fault in zip(
                updates, segments.first_keys, segments.faults, strict=True
            )
        ],
        dtype=TABLE,
    )
    vec = _vec(segments, slots)
    acc = MOMENT_DTYPE[dtype]
    variant = adamw_variant(dtype, segments.grad_dtype, segments.keys.dtype, vec)
    advance = "advance_float" if acc == torch.float32 else "advance_double"
    # Whatever may fail comes before the first launch, which counts the step.
    load(device, (GROUP, advance), (variant, "update"), (variant, "finish"))
    is_captured = _interop.is_capturing(device)
    if is_captured:
        tensors = [x for u in updates for x in (u.step, u.hyper.lr, u.pending.row_count)]
        keep_for_graph([*slots, *segments.faults, *filter(torch.is_tensor, tensors)], device)
    (tables,), count = upload(device, descriptors), len(updates)
    scalars = torch.empty(count, 8, dtype=acc, device=device)
    faults = torch.empty(count, 2, dtype=torch.int64, device=device)
    address_of = _interop.address_of
    arguments = (address_of(tables), np.int64(count), address_of(scalars))
    results = (*arguments, address_of(faults))
    launch(device, GROUP, advance, blocks_for(count, THREADS), THREADS, results)
    _walk(segments, variant, vec, ("update", "finish"), arguments)
    return None if is_captured else RowReport(segments.pending, faults)


def coalesce(pending: Pending) -> tuple[torch.Tensor, torch.Tensor]:
    """The touched rows of one table and the sums of their gradients. Waits for the GPU.

    Returns:
        rows [U] int64, ascending, and values [U, D] of the gradients' dtype.

    Raises:
        IndexError: a row is outside the table.
    """
    pending = dataclasses.replace(pending, fault=None)  # its rows are known in time to raise here
    segments = segment([pending])
    flag, row = segments.faults[0].tolist()
    if flag:
        raise row_error(pending.name, row, pending.count_rows())
    keys = segments.keys
    is_begin = torch.ones_like(keys, dtype=torch.bool)
    is_begin[1:] = keys[1:] != keys[:-1]
    is_begin &= keys < segments.num_keys
    rows = keys[is_begin].long()
    values = torch.empty(
        rows.numel(), segments.dim, dtype=segments.grad_dtype, device=pending.param.device
    )
    vec = _vec(segments, [])
    variant = adamw_variant(pending.param.dtype, segments.grad_dtype, keys.dtype, vec)
    ranks = is_begin.cumsum(0) - 1
    address_of = _interop.address_of
    sink = (
        address_of(values),
        address_of(ranks),
        np.float64(pending.grad_scale),
        np.int64(pending.mean),
    )
    _walk(segments, variant, vec, ("coalesce", "coalesce_finish"), sink)
    return rows, values
