"""An AdamW step but for its kernel (``update``): what that is told of tables, and when it runs."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..._types import MOMENT_DTYPE, Hyperparams, Pending, Update
from ._compile import BYTE, INT64, TAGS, at, jit, reciprocal_of, view
from ._threads import cuts, num_parts, run_parts, start_threads
from .missed import TAGS_OF, log_numbers, make_tails
from .segment import Segments
from .sums import GRAIN_ELEMENTS, with_chunks_summed
from .update import update_runs


@jit
def _read_steps(steps, ts, num_tables):  # type: ignore[no-untyped-def]
    """Fill ts [T] int64 with the tables' numbers of updates, whose addresses are steps [T]."""
    numbers = view(ts, num_tables, INT64)
    for table in range(num_tables):
        numbers[table] = at(at(steps, table, INT64), 0, INT64)


@jit
def _advance_steps(steps, num_tables):  # type: ignore[no-untyped-def]
    """Count an update of each table. To add 1 to one tensor takes torch 0.7 µs."""
    for table in range(num_tables):
        view(at(steps, table, INT64), 1, INT64)[0] += 1


def _log(x: float) -> float:
    return math.log(x) if x else -math.inf


def _scalars(hyper: Hyperparams, t: int, pending: Pending) -> tuple[float, ...]:
    """What the t-th update of a table needs, in double precision: ``Tables.scalars`` has it."""
    lr = float(hyper.lr)
    is_tf = hyper.eps_mode == "tf"
    inv_sqrt_correction2 = 1.0 / math.sqrt(1.0 - hyper.beta2**t)
    per_row = pending.kind.per_row
    eps_is_final = per_row or not is_tf  # else it is corrected here
    return (
        1.0 - hyper.beta1,
        1.0 - hyper.beta2,
        lr / (1.0 - hyper.beta1**t),
        inv_sqrt_correction2,
        hyper.eps if eps_is_final else hyper.eps * inv_sqrt_correction2,
        lr * hyper.weight_decay,
        -pending.grad_scale if hyper.maximize else pending.grad_scale,
        float(pending.mean),
        lr,
        _log(hyper.beta1) if per_row else 0.0,
        _log(hyper.beta2) if per_row else 0.0,
        float(is_tf),
    )


#: Types that ``update_runs`` has been compiled for in this process.
_compiled: set[tuple[Any, ...]] = set()


def prepare_sparse_adamw(updates: Sequence[Update], segments: Segments) -> Callable[[], None]:
    """One AdamW step on the rows that ``segments`` names, all but done: nothing is written.

    Args:
        updates: the tables of one group (one dtype, one D, one kind), in the order of ``segments``.
        segments: their gradients, from ``segment``.

    Returns:
        A function that writes the rows and advances each table's t. What may fail, like memory,
        threads or a compiler, has been tried before.
    """
    dtype, kind = updates[0].pending.param.dtype, updates[0].pending.kind
    moment_dtype = MOMENT_DTYPE[dtype]
    steps = array("q", [update.step.data_ptr() for update in updates])
    ts = array("q", steps)
    steps_at, num_tables = steps.buffer_info()
    _read_steps(steps_at, ts.buffer_info()[0], num_tables)
    rows: list[int] = []
    places: dict[tuple[Any, ...], int] = {}  # of scalars, which hundreds of tables may share
    scalars: list[float] = []
    for update, t in zip(updates, ts, strict=True):
        pending = update.pending
        param = pending.param
        key = id(update.hyper), t, pending.grad_scale, pending.mean
        place = places.get(key)
        if place is None:
            place = places[key] = len(places)
            scalars += _scalars(update.hyper, t + 1, pending)
        rows += (
            param.block_size(),
            reciprocal_of(param.block_size()),
            param.addresses_at(),
            param.row_bytes,
            update.exp_avg.addresses_at(),
            update.exp_avg.row_bytes,
            update.exp_avg_sq.addresses_at(),
            update.exp_avg_sq.row_bytes,
            place,
        )
    rows_array, scalars_array = array("q", rows), array("d", scalars)
    logs, logs_at = _logs(updates, kind.untouched)
    row_steps, row_steps_at = _row_steps(updates, kind.per_row)
    size, dim = segments.words.size, segments.dim
    parts = num_parts(size, GRAIN_ELEMENTS // dim)
    room_bytes = 8 * dim if kind.untouched != "replay" else 32 * dim
    room = array("b", bytes(parts * room_bytes))
    numbers = (
        rows_array.buffer_info()[0],
        scalars_array.buffer_info()[0],
        room.buffer_info()[0],
        room_bytes,
        dim,
        logs_at,
        row_steps_at,
    )
    per_row = BYTE if kind.per_row else None
    tags = TAGS[dtype], TAGS[moment_dtype], TAGS_OF[kind.untouched], per_row
    grads, grad_args = with_chunks_summed(segments)
    tables = array("q", numbers)
    args = *grad_args, tables.buffer_info()[0], tags
    variant = dtype, segments.grad_dtype, kind
    if variant not in _compiled:
        update_runs(0, 0, 0, *args)  # of no runs
        _advance_steps(steps_at, 0)
        _compiled.add(variant)
    if parts > 1:
        start_threads(parts)
    part_cuts = _cuts(segments, parts)
    # Kernels know addresses: what is there lives as long as the function.
    arrays = steps, rows_array, scalars_array, room, grads, tables
    kept = arrays, logs, row_steps, segments, updates

    def apply(kept: Any = kept) -> None:
        run_parts(update_runs, part_cuts, *args)
        _advance_steps(steps_at, num_tables)

    return apply


def _cuts(segments: Segments, parts: int) -> list[int]:
    """Where to cut sorted positions into parts of equal work.

    A long run counts as none: its chunks have been summed before.
    """
    size = segments.words.size
    if parts == 1 or len(segments.long_runs) == 0:
        return cuts(size, parts)
    places, left_out = [], [0]  # of long runs, where these are left out; positions left out so far
    for begin, end, _ in segments.long_runs.tolist():
        places.append(begin - left_out[-1])
        left_out.append(left_out[-1] + end - begin)
    result = [cut + left_out[bisect_left(places, cut)] for cut in cuts(size - left_out[-1], parts)]
    result[-1] = size  # a long run may be the last
    return result


def _logs(updates: Sequence[Update], untouched: str) -> tuple[list[Any], int]:
    """What is to be kept for ``Tables.logs``, and that address."""
    if untouched == "skip":
        return [], 0
    numbers: list[int] = []
    tails: dict[int, np.ndarray[Any, Any]] = {}  # of a ``Missed`` that tables may share
    for update in updates:
        missed, last_step = update.missed, update.last_step
        assert missed is not None
        assert last_step is not None
        if id(missed) not in tails:
            tails[id(missed)] = make_tails(missed, untouched)
        numbers += log_numbers(missed, tails[id(missed)], last_step)
    logs = array("q", numbers)
    return [logs, *tails.values()], logs.buffer_info()[0]


def _row_steps(updates: Sequence[Update], per_row: bool) -> tuple[list[Any], int]:
    """What is to be kept for ``Tables.row_steps``, and that address."""
    if not per_row:
        return [], 0
    slots = [update.row_step for update in updates]
    row_steps = array("q", [slot.addresses_at() for slot in slots if slot is not None])
    return [row_steps], row_steps.buffer_info()[0]
