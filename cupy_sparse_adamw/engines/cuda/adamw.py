"""The fused update of a group of tables: ``cuda_src/sparse_adamw.cu``, which says how.

Whatever the number of tables, a step is four launches of ours (make_keys, advance, update, finish)
around one sort of torch's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..._checks import lr_error, row_error
from ..._slots import Slot
from ..._types import MOMENT_DTYPE, Pending, Update
from . import _interop
from ._compile import (
    GROUP,
    SKIP,
    WARP,
    Variant,
    adamw_variant,
    blocks_for,
    log_lanes,
    prepare_launch,
    widest_vec,
)
from ._group import (
    MISSED,
    PIECE,
    TABLE,
    block_table,
    divisor,
    is_aligned,
    keep_for_graph,
    missed_fields,
    slots_are_aligned,
    upload,
)
from .segment import TILE, Segments, segment

#: Threads per block: one for each position of a tile.
THREADS = TILE


class RowReport:
    """What the GPU will have found about the rows of one step's gradients, once it is asked."""

    def __init__(self, pending: Sequence[Pending], faults: torch.Tensor) -> None:
        # Not the gradients, whose memory the next step may need.
        self._tables = [(p.name, p.num_rows, p.row_count) for p in pending]
        self._faults = _interop.HostCopy(faults)

    def send(self) -> None:
        """Ask, behind what the stream has to do."""
        self._faults.send()

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


def _vec(segments: Segments, slots: Sequence[Slot]) -> int:
    """Columns that can move together: the widest that D and all addresses allow, or 1."""
    vec = widest_vec(segments.pending[0].param.dtype)
    fits = segments.dim % vec == 0 and slots_are_aligned(slots, vec)
    for table in segments.pending:
        for _, grad in table.pieces:
            fits &= grad.stride(1) == 1 and grad.stride(0) % vec == 0
            fits &= is_aligned(grad.data_ptr(), grad.dtype, vec)
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
        -pending.grad_scale if update.hyper.maximize else pending.grad_scale,
        pending.mean,
        update.hyper.eps_mode == "tf",
    )


def _prepare_walk(
    segments: Segments, variant: Variant, vec: int, names: tuple[str, str], sink: tuple[Any, ...]
) -> list[Callable[[], None]]:
    """Two launches that go over all runs: short ones and chunks of long ones, then long ones."""
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
    second = (*sorted_args, *sink, dim, *room)
    few = blocks_for(tiles, THREADS // WARP)
    return [
        prepare_launch(device, variant, names[0], tiles, THREADS, first),
        prepare_launch(device, variant, names[1], few, THREADS, second),
    ]


@dataclasses.dataclass
class PreparedStep:
    """A step that is all but done: calling it launches, and returns what to ask of it later.

    Attributes:
        launches: what there is to launch, in order.
        report: None under capture, where ``fault`` of each table keeps it.
        alive: what the launches have the addresses of.
    """

    launches: list[Callable[[], None]]
    report: RowReport | None
    alive: tuple[object, ...]

    def __call__(self) -> RowReport | None:
        """Launch. Nothing that may fail is left to do."""
        for launch in self.launches:
            launch()
        if self.report is not None:
            self.report.send()
        return self.report


def _require_no_capture(update: Update, device: torch.device) -> None:
    """What a row has missed is in a log that the host keeps, and a replay would not follow."""
    untouched = "decay" if update.pending.kind.untouched == "decay" else "dense"
    if update.pending.kind.untouched != "skip" and _interop.is_capturing(device):
        raise RuntimeError(
            f"table {update.pending.name!r}: a step with untouched={untouched!r} cannot be "
            f"captured into a CUDA graph, since the host counts its steps; step outside of the "
            f"capture, or use untouched='skip'"
        )


def prepare_sparse_adamw(updates: Sequence[Update], segments: Segments) -> PreparedStep:
    """One AdamW step on the rows that ``segments`` names, all but done. Writes to no table.

    Args:
        updates: the tables of one group (one dtype, one D, one kind), in the order of ``segments``.
        segments: their gradients, from ``segment``.

    Returns:
        What carries the step out when it is called; it returns what the GPU will have found about
        rows, or None under capture.

    Raises:
        RuntimeError: something cannot be captured into a CUDA graph.
    """
    param, kind = updates[0].pending.param, updates[0].pending.kind
    dtype, device = param.dtype, param.device
    _require_no_capture(updates[0], device)
    slots = [slot for u in updates for slot in (u.pending.param, u.exp_avg, u.exp_avg_sq)]
    each = zip(updates, segments.first_keys, segments.faults, strict=True)
    structs = [np.array([_table(*of_table) for of_table in each], dtype=TABLE)]
    if kind != SKIP:
        rows = [missed_fields(u.missed, u.last_step, u.row_step) for u in updates]
        structs.append(np.array(rows, dtype=MISSED))
    vec, acc = _vec(segments, slots), MOMENT_DTYPE[dtype]
    variant = adamw_variant(dtype, segments.grad_dtype, segments.keys.dtype, vec, kind)
    is_captured = _interop.is_capturing(device)
    if is_captured:
        tensors = [x for u in updates for x in (u.step, u.hyper.lr, u.pending.row_count)]
        counts = [u.row_step for u in updates if u.row_step is not None]
        kept = [*slots, *counts, *segments.faults, *filter(torch.is_tensor, tensors)]
        keep_for_graph(kept, device)
    (tables, *missed), count = upload(device, *structs), len(updates)
    scalars = torch.empty(count, 8, dtype=acc, device=device)
    faults = torch.empty(count, 2, dtype=torch.int64, device=device)
    address_of = _interop.address_of
    arguments = (address_of(tables), np.int64(count), address_of(scalars))
    results = (*arguments, address_of(faults))
    name = "advance_float" if acc == torch.float32 else "advance_double"
    advance = prepare_launch(device, GROUP, name, blocks_for(count, THREADS), THREADS, results)
    sink = (*arguments, *map(address_of, missed))
    return PreparedStep(
        launches=[advance, *_prepare_walk(segments, variant, vec, ("update", "finish"), sink)],
        report=None if is_captured else RowReport(segments.pending, faults),
        alive=(updates, segments, tables, missed, scalars, faults),
    )


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
    for launch in _prepare_walk(segments, variant, vec, ("coalesce", "coalesce_finish"), sink):
        launch()
    return rows, values
