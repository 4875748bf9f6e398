"""Rows that no batch touched, read as they would be now or brought up to date (see ``missed``).

``gather_current`` and ``catch_up_`` ask for rows some time before they use them, as the update does
(``adamw``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types

from ..._memory import empty
from ..._types import MOMENT_DTYPE, Lagging
from ._compile import (
    BYTE,
    EXP_AVG,
    EXP_AVG_SQ,
    INT64,
    PARAM,
    TAGS,
    TURN,
    VALUES,
    address_of,
    at,
    block_of,
    compiled_overload,
    copy_bytes,
    in_whole_turns,
    inline,
    itemsize_of,
    jit,
    load,
    prefetch,
    prefetch_bytes,
    prefetch_row_rest,
    prefetch_row_turn,
    reciprocal_of,
    store,
    view,
)
from ._interop import array_of
from ._threads import num_parts, parallel_for
from .missed import (
    DECAY,
    DENSE,
    INT32,
    REPLAY,
    TAGS_OF,
    Log,
    caught_up,
    cell_address,
    kind_of,
    last_step_of,
    log_numbers,
    make_tails,
    missed_since,
    prefetch_missed,
    replay_row,
    set_last_step,
    store_row,
    two_nodes_do,
    with_two_nodes,
)
from .sums import GRAIN_ELEMENTS

#: Rows asked for ahead: a power of two.
AHEAD = 16
#: Neighbouring rows that one thread catches up (a cache line of last steps), and how many rows it
#: collects before it does.
BAND, COLLECTED = 16, 256


class _Table(NamedTuple):
    """A table whose rows may be behind, for kernels. Slots are addresses of block addresses."""

    log: Log
    params: int
    exp_avgs: int
    exp_avg_sqs: int
    param_bytes: int  # from a row to the next
    exp_avg_bytes: int
    exp_avg_sq_bytes: int
    dim: int
    work: int  # [parts, 3, dim] of the moments' type, if there is anything to replay
    tags: Any  # of weights and of moments


class _Place(NamedTuple):
    """Addresses of a row, and the step of its last update.

    Where moments do not matter, in mode "decay" and of a row that is up to date, theirs are the
    weights'.
    """

    param: int
    exp_avg: int
    exp_avg_sq: int
    last_step: int


def _place_of(table: Any, block: int, row: int, param: int, last_step: int) -> Any:
    """The ``_Place`` of a row that is behind, the ``row``-th of a block."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(_place_of)
def _place_of_in(table, block, row, param, last_step):  # type: ignore[no-untyped-def]
    if kind_of(table.types[0]) == DECAY:
        return lambda table, block, row, param, last_step: _Place(param, param, param, last_step)
    return lambda table, block, row, param, last_step: _Place(
        param,
        at(table.exp_avgs, block, INT64) + row * table.exp_avg_bytes,
        at(table.exp_avg_sqs, block, INT64) + row * table.exp_avg_sq_bytes,
        last_step,
    )


@inline
def _find_place(table, row):  # type: ignore[no-untyped-def]
    """The ``_Place`` of a row; reads its last step."""
    log, block = table.log, np.int64(0)
    if row >= log.block_size:  # never so in an Embedding
        block = block_of(row, log.reciprocal)
        row -= block * log.block_size
    last_step = np.int64(at(at(log.last_steps, block, INT64), row, INT32))
    param = at(table.params, block, INT64) + row * table.param_bytes
    if last_step == log.t:
        return _Place(param, param, param, last_step)
    return _place_of(table, block, row, param, last_step)


@inline
def _prefetch_last_step(table, row):  # type: ignore[no-untyped-def]
    log = table.log
    prefetch(cell_address(log.last_steps, log.block_size, log.reciprocal, row))


@inline
def _prefetch_place(table, place):  # type: ignore[no-untyped-def]
    """Ask for what will be read of a row, and for what it missed."""
    param_tag, moment_tag = table.tags
    prefetch_bytes(place.param, table.dim * itemsize_of(param_tag))
    if place.exp_avg != place.param:
        prefetch_bytes(place.exp_avg, table.dim * itemsize_of(moment_tag))
        prefetch_bytes(place.exp_avg_sq, table.dim * itemsize_of(moment_tag))
    if place.last_step != table.log.t:
        prefetch_missed(table.log, place.last_step)


def _store_weight(target: Any, place: Any, j: int, weight: Any, tag: Any) -> None:
    """Store an element's weight at the address ``target``, or in place if that is None."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(_store_weight)
def _store_weight_in(target, place, j, weight, tag):  # type: ignore[no-untyped-def]
    if target == types.none:
        return lambda target, place, j, weight, tag: store(place.param, j, weight, tag, PARAM)
    return lambda target, place, j, weight, tag: store(target, j, weight, tag, VALUES)


@inline
def _decay_element(target, place, j, missed, tag):  # type: ignore[no-untyped-def]
    w = load(place.param, j, tag, PARAM)
    _store_weight(target, place, j, w + missed.decay * w, tag)


@inline
def _move_element(target, place, j, missed, tags):  # type: ignore[no-untyped-def]
    w, m, v = caught_up(
        missed,
        load(place.param, j, tags[0], PARAM),
        load(place.exp_avg, j, tags[1], EXP_AVG),
        load(place.exp_avg_sq, j, tags[1], EXP_AVG_SQ),
    )
    _store_weight(target, place, j, w, tags[0])
    if target is None:
        store(place.exp_avg, j, m, tags[1], EXP_AVG)
        store(place.exp_avg_sq, j, v, tags[1], EXP_AVG_SQ)


@inline
def _move_row(target, place, dim, missed, ahead, tags):  # type: ignore[no-untyped-def]
    """Bring a row up to date, and ask for the row at ``ahead`` while that is computed."""
    whole = in_whole_turns(dim)
    for first in range(0, whole, TURN):
        prefetch_row_turn(ahead, first, tags)
        for j in range(first, first + TURN):
            _move_element(target, place, j, missed, tags)
    if whole < dim:
        prefetch_row_rest(ahead, whole, dim, tags)
    for j in range(whole, dim):
        _move_element(target, place, j, missed, tags)


def _store_work(target: Any, place: Any, work: int, table: Any) -> None:
    """Move a row from ``work``: its weights to ``target``, or all of it in place if None."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(_store_work)
def _store_work_in(target, place, work, table):  # type: ignore[no-untyped-def]
    def in_place(target, place, work, table):  # type: ignore[no-untyped-def]
        store_row(place, work, table.dim, table.tags[0], table.tags[1])

    def weights(target, place, work, table):  # type: ignore[no-untyped-def]
        param = view(work, table.dim, table.tags[1])
        for j in range(table.dim):
            store(target, j, param[j], table.tags[0], VALUES)

    return in_place if target == types.none else weights


def _bring_up_to_date(target: Any, table: Any, place: Any, part: int, ahead: Any) -> None:
    """Bring a row that is behind up to date, and ask for the row at ``ahead``.

    Its weights go to the address ``target``; if that is None, weights and moments change in place.
    """
    raise NotImplementedError("only inside compiled code")


@compiled_overload(_bring_up_to_date)
def _bring_up_to_date_in(target, table, place, part, ahead):  # type: ignore[no-untyped-def]
    def decay(target, table, place, part, ahead):  # type: ignore[no-untyped-def]
        missed = missed_since(table.log, place.last_step, table.tags[1])
        _prefetch_place(table, ahead)  # at once: there is next to nothing to compute meanwhile
        for j in range(table.dim):
            _decay_element(target, place, j, missed, table.tags[0])

    def dense(target, table, place, part, ahead):  # type: ignore[no-untyped-def]
        missed = missed_since(table.log, place.last_step, table.tags[1])
        if ahead.last_step != table.log.t:
            prefetch_missed(table.log, ahead.last_step)
        else:  # its weights alone will be read
            _prefetch_place(table, ahead)
            ahead = place
        if two_nodes_do(missed):
            _move_row(target, place, table.dim, with_two_nodes(missed), ahead, table.tags)
        else:
            _move_row(target, place, table.dim, missed, ahead, table.tags)

    def replay(target, table, place, part, ahead):  # type: ignore[no-untyped-def]
        param_tag, tag = table.tags
        _prefetch_place(table, ahead)
        work = table.work + part * 3 * table.dim * itemsize_of(tag)
        replay_row(place, work, place.last_step, table.dim, param_tag, tag, table.log)
        _store_work(target, place, work, table)

    return {DECAY: decay, DENSE: dense, REPLAY: replay}[kind_of(table.types[0])]


@inline
def _note_place(places, k, place):  # type: ignore[no-untyped-def]
    places[k, 0], places[k, 1] = place.param, place.exp_avg
    places[k, 2], places[k, 3] = place.exp_avg_sq, place.last_step


@inline
def _noted_place(places, k):  # type: ignore[no-untyped-def]
    return _Place(places[k, 0], places[k, 1], places[k, 2], places[k, 3])


@jit
def _gather_current(part, begin, end, table, rows, target):  # type: ignore[no-untyped-def]
    row_bytes = table.dim * itemsize_of(table.tags[0])
    places = np.empty((AHEAD, 4), np.int64)  # of the AHEAD rows from i on: row k's is k % AHEAD
    for i in range(begin, min(begin + 2 * AHEAD, end)):
        if rows[i] >= 0:
            _prefetch_last_step(table, rows[i])
    for i in range(begin, min(begin + AHEAD, end)):
        if rows[i] >= 0:
            place = _find_place(table, rows[i])
            _note_place(places, i & (AHEAD - 1), place)
            _prefetch_place(table, place)
    for i in range(begin, end):
        if i + 2 * AHEAD < end and rows[i + 2 * AHEAD] >= 0:
            _prefetch_last_step(table, rows[i + 2 * AHEAD])
        place = _noted_place(places, i & (AHEAD - 1))  # of no use if the row is missing
        is_behind = rows[i] >= 0 and place.last_step != table.log.t
        ahead = place
        if i + AHEAD < end and rows[i + AHEAD] >= 0:
            ahead = _find_place(table, rows[i + AHEAD])
            _note_place(places, i & (AHEAD - 1), ahead)
            if not is_behind:
                _prefetch_place(table, ahead)
        if is_behind:
            _bring_up_to_date(target + i * row_bytes, table, place, part, ahead)
        elif rows[i] >= 0:
            copy_bytes(target + i * row_bytes, place.param, row_bytes)
        else:
            view(target + i * row_bytes, row_bytes, BYTE)[:] = 0
    return 0


@inline
def _part_of(row, parts):  # type: ignore[no-untyped-def]
    """Which of the parts catches up a row: a multiplicative hash of its band, scaled to them."""
    band = np.uint64(row) // np.uint64(BAND)
    mixed = (band * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    return np.int64((mixed * np.uint64(parts)) >> np.uint64(32))


@jit
def _catch_up(part, begin, end, table, rows, parts, num_rows):  # type: ignore[no-untyped-def]
    """Catch up those of all ``rows`` that parts [begin, end) have."""
    t = table.log.t
    mine, places = np.empty(COLLECTED, np.int64), np.empty((COLLECTED, 4), np.int64)
    i = 0
    while i < rows.size:
        count = 0
        while i < rows.size and count < COLLECTED:
            row = rows[i]
            i += 1
            if 0 <= row < num_rows:
                number = _part_of(row, parts)
                if begin <= number < end:
                    mine[count] = row
                    count += 1
                    _prefetch_last_step(table, row)
        for k in range(min(AHEAD, count)):
            place = _find_place(table, mine[k])
            _note_place(places, k, place)
            _prefetch_place(table, place)
        for k in range(count):
            place = _noted_place(places, k)
            ahead = place
            if k + AHEAD < count:
                ahead = _find_place(table, mine[k + AHEAD])
                _note_place(places, k + AHEAD, ahead)
            if last_step_of(table.log, mine[k]) != t:  # a row named twice is current by now
                _bring_up_to_date(None, table, place, part, ahead)
                set_last_step(table.log, mine[k], t)
            else:
                _prefetch_place(table, ahead)
    return 0


def _table(lagging: Lagging, parts: int) -> tuple[_Table, list[Any]]:
    """A table for kernels, and what must be kept while they run."""
    param, dtype = lagging.param, MOMENT_DTYPE[lagging.param.dtype]
    tails = make_tails(lagging.missed, lagging.untouched)
    room = 3 * parts * param.dim if lagging.untouched == "replay" else 0
    work = np.empty(room)
    numbers = log_numbers(lagging.missed, tails, lagging.last_step)
    block_size = param.block_size()
    table = _Table(
        Log(TAGS_OF[lagging.untouched], *numbers, block_size, reciprocal_of(block_size)),
        param.addresses_at(),
        lagging.exp_avg.addresses_at(),
        lagging.exp_avg_sq.addresses_at(),
        param.row_bytes,
        lagging.exp_avg.row_bytes,
        lagging.exp_avg_sq.row_bytes,
        param.dim,
        address_of(work),
        (TAGS[param.dtype], TAGS[dtype]),
    )
    return table, [tails, work]


def gather_current(lagging: Lagging, rows: torch.Tensor) -> torch.Tensor:
    """The weights of the named rows, brought up to date; nothing is written.

    Args:
        lagging: the table.
        rows: [N] int64, in range or ``MISSING``, which reads as zeros.

    Returns:
        values [N, D] of the weights' dtype.
    """
    param = lagging.param
    values = empty((rows.numel(), param.dim), param.dtype, param.device)
    parts = num_parts(rows.numel(), GRAIN_ELEMENTS // param.dim)
    table, _kept = _table(lagging, parts)
    parallel_for(_gather_current, rows.numel(), parts, table, array_of(rows), values.data_ptr())
    return values


def catch_up_(lagging: Lagging, rows: torch.Tensor) -> None:
    """Bring the named rows up to date: weights, moments and ``last_step``.

    Each part takes the rows in bands of its own, so that no two write to one row.

    Args:
        lagging: changed in place.
        rows: [N] int64; may repeat. ``MISSING`` and rows out of range are passed over.
    """
    parts = num_parts(rows.numel(), GRAIN_ELEMENTS // lagging.param.dim)
    table, _kept = _table(lagging, parts)
    num_rows = min(lagging.param.num_rows(), lagging.last_step.num_rows())
    parallel_for(_catch_up, parts, parts, table, array_of(rows), parts, num_rows)
