"""The fused update: each run of sorted gradients is summed and applied in one pass.

Per touched row: each of its gradients is read once from where backward left it; weights and
moments are read once and written once; the sum stays in a thread's buffer. Sums are float64, so
they are exact for all practical purposes and their order hardly shows; the order is fixed all the
same (SPEC §1): occurrences in order, in chunks of ``CHUNK`` counted from the run's start.

Rows and gradients lie scattered in memory, so each is asked for ``ahead`` rows before it is used:
into the second-level cache, which can have many more lines on their way than the first, and line
by line between the elements of the row that is computed. All lines at once would fill what a core
keeps requests in, and computing would wait for memory, then memory for computing
(docs/performance.md).

What a table does about steps that a row missed, and how it corrects bias, is known when the kernel
is compiled (``_Tables``): a table that skips what it missed pays for none of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types

from ..._types import MOMENT_DTYPE, Hyperparams, Pending, Update
from ._compile import (
    BYTE,
    EXP_AVG,
    EXP_AVG_SQ,
    FLOAT64,
    INT64,
    PARAM,
    TAGS,
    VALUES,
    at,
    block_of,
    cast,
    compiled_overload,
    inline,
    itemsize_of,
    jit,
    load,
    per_line,
    prefetch,
    prefetch_bytes,
    reciprocal_of,
    store,
    view,
)
from ._threads import cuts, num_parts, parallel_for, run_parts, start_threads
from .segment import CHUNK, Segments, segment
from .untouched import (
    INT32,
    REPLAY,
    TAGS_OF,
    caught_up,
    cell_address,
    kind_of,
    last_step_of,
    log_at,
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

#: Gradient elements a thread takes at the least.
GRAIN_ELEMENTS = 32768
#: Rows between asking for one and using it, at least and at most.
MIN_AHEAD, MAX_AHEAD = 4, 16
#: Numbers of ``_Tables.rows`` for a table.
ROWS_WIDTH = 8
#: Numbers of ``_scalars``.
SCALARS = 12
#: Bytes to ask for and not yet use between those two: an eighth of a small second-level cache.
BYTES_AHEAD = 1 << 16


class _Grads(NamedTuple):
    """``Segments`` for kernels; see there. Arrays are addresses, which cost nothing to pass on."""

    words: int
    position_bits: int
    num_kept: int
    piece_starts: int
    pieces: int
    first_pieces: int
    first_keys: int
    num_tables: int
    long_runs: int
    num_long_runs: int
    partials: int  # [chunks, D] float64: sums of the chunks of long runs
    dim: int
    ahead: int
    tag: Any


class _Tables(NamedTuple):
    """Where the tables of a group are, and the scalars of their update, as addresses."""

    rows: int  # [T, ROWS_WIDTH] int64: block size, its reciprocal, then of each slot the address of
    # its block addresses and the bytes from a row to the next
    scalars: int  # [T, SCALARS] float64, see _scalars
    room: int  # [parts, room_bytes]: a sum [D] float64, then a row to replay [3, D]
    room_bytes: int
    dim: int
    param_tag: Any
    moment_tag: Any
    untouched: Any  # one of TAGS_OF
    logs: int  # [T, LOG_WIDTH] int64, see Log; unless untouched is None
    per_row: Any  # whether bias is corrected by rows' own counts: BYTE or None
    row_steps: int  # [T] int64: of each table's block addresses of its counts; unless None


# What a loop over the runs of one table needs of the above, read once per table: as far as the
# compiler knows a loop may write to what it reads, so it would read it anew for each row.


class _Pieces(NamedTuple):
    """Where one table's gradients are."""

    end: int  # of its sorted positions
    first: int
    num: int
    # of the first piece, if it is the only one
    base: int  # the address of position 0, as it were
    row_bytes: int
    column_stride: int
    contiguous: bool  # whether all column strides are 1


class _Rows(NamedTuple):
    """Where one table's rows are: block addresses of each slot, and the first block itself."""

    log: Any  # Log, or None
    row_steps: int  # block addresses, or 0
    first_key: int
    block_size: int
    reciprocal: int  # of the block size
    params: int
    exp_avgs: int
    exp_avg_sqs: int
    param_bytes: int  # from a row to the next
    exp_avg_bytes: int
    exp_avg_sq_bytes: int
    first_params: int
    first_exp_avgs: int
    first_exp_avg_sqs: int


class _Ahead(NamedTuple):
    """Addresses of what to ask for while a row is updated: a row that comes, and a gradient."""

    param: int
    exp_avg: int
    exp_avg_sq: int
    grad: int


@inline
def _word(grads, i):  # type: ignore[no-untyped-def]
    return at(grads.words, i, INT64)


@inline
def _key(grads, i):  # type: ignore[no-untyped-def]
    return _word(grads, i) >> grads.position_bits


@inline
def _is_head(grads, i):  # type: ignore[no-untyped-def]
    """Does a run begin at sorted position i?"""
    return i == 0 or _key(grads, i - 1) != _key(grads, i)


@inline
def _run_end(grads, begin):  # type: ignore[no-untyped-def]
    """Where the run ends that sorted position ``begin`` is in."""
    key, end = _key(grads, begin), begin + 1
    while end < grads.num_kept and _key(grads, end) == key:
        end += 1
    return end


@inline
def _next_head(grads, i):  # type: ignore[no-untyped-def]
    """Where the first run begins that begins at i or later; ``num_kept`` if none does."""
    if i >= grads.num_kept:
        return grads.num_kept
    return i if _is_head(grads, i) else _run_end(grads, i)


@inline
def _last_at_most(value, first, stride, count):  # type: ignore[no-untyped-def]
    """Index of the last of ``count`` ascending int64 that is at most ``value``; the first one is.

    They begin at address ``first`` and are ``stride`` elements apart.
    """
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) >> 1
        if at(first, middle * stride, INT64) <= value:
            low = middle
        else:
            high = middle
    return low


@inline
def _table_at(grads, i):  # type: ignore[no-untyped-def]
    """The number of the table that the gradient at sorted position i belongs to."""
    return _last_at_most(_key(grads, i), grads.first_keys, 1, grads.num_tables)


@inline
def _pieces_of(grads, number, i):  # type: ignore[no-untyped-def]
    """``_Pieces`` of a table; sorted position i is one of its."""
    last_word = (at(grads.first_keys, number + 1, INT64) << grads.position_bits) - 1
    end = i + 1 + _last_at_most(last_word, grads.words + 8 * i, 1, grads.num_kept - i)
    first = at(grads.first_pieces, number, INT64)
    count = at(grads.first_pieces, number + 1, INT64) - first
    contiguous = True
    for piece in range(first, first + count):
        contiguous &= at(grads.pieces, 3 * piece + 2, INT64) == 1
    row_bytes = at(grads.pieces, 3 * first + 1, INT64) * itemsize_of(grads.tag)
    return _Pieces(
        end,
        first,
        count,
        at(grads.pieces, 3 * first, INT64) - at(grads.piece_starts, first, INT64) * row_bytes,
        row_bytes,
        at(grads.pieces, 3 * first + 2, INT64),
        contiguous,
    )


def _lagging_at(untouched: Any, per_row: Any, tables: _Tables, number: int) -> Any:
    """``log`` and ``row_steps`` of ``_Rows``."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(_lagging_at)
def _lagging_at_in(untouched, per_row, tables, number):  # type: ignore[no-untyped-def]
    if untouched == types.none and per_row == types.none:
        return lambda untouched, per_row, tables, number: (None, 0)
    if untouched == types.none:
        return lambda untouched, per_row, tables, number: (
            None,
            at(tables.row_steps, number, INT64),
        )
    if per_row == types.none:
        return lambda untouched, per_row, tables, number: (
            log_at(untouched, tables.logs, number),
            0,
        )
    return lambda untouched, per_row, tables, number: (
        log_at(untouched, tables.logs, number),
        at(tables.row_steps, number, INT64),
    )


@inline
def _rows_of(grads, tables, number):  # type: ignore[no-untyped-def]
    """``_Rows`` of a table."""
    numbers = tables.rows + 8 * ROWS_WIDTH * number
    params, exp_avgs, exp_avg_sqs = (
        at(numbers, 2, INT64),
        at(numbers, 4, INT64),
        at(numbers, 6, INT64),
    )
    log, row_steps = _lagging_at(tables.untouched, tables.per_row, tables, number)
    return _Rows(
        log,
        row_steps,
        at(grads.first_keys, number, INT64),
        at(numbers, 0, INT64),
        at(numbers, 1, INT64),
        params,
        exp_avgs,
        exp_avg_sqs,
        at(numbers, 3, INT64),
        at(numbers, 5, INT64),
        at(numbers, 7, INT64),
        at(params, 0, INT64),
        at(exp_avgs, 0, INT64),
        at(exp_avg_sqs, 0, INT64),
    )


@inline
def _grad_at(grads, i, pieces):  # type: ignore[no-untyped-def]
    """Address and column stride of the gradient at sorted position i."""
    position = _word(grads, i) & ((1 << grads.position_bits) - 1)
    if pieces.num == 1:
        return pieces.base + position * pieces.row_bytes, pieces.column_stride
    starts = grads.piece_starts + 8 * pieces.first
    piece = pieces.first + _last_at_most(position, starts, 1, pieces.num)
    place = position - at(grads.piece_starts, piece, INT64)
    row_bytes = at(grads.pieces, 3 * piece + 1, INT64) * itemsize_of(grads.tag)
    address = at(grads.pieces, 3 * piece, INT64) + place * row_bytes
    return address, at(grads.pieces, 3 * piece + 2, INT64)


@inline
def _row_at(grads, i, rows):  # type: ignore[no-untyped-def]
    """Addresses of weights, exp_avg and exp_avg_sq of the row at sorted position i."""
    row = _key(grads, i) - rows.first_key
    param, exp_avg, exp_avg_sq = rows.first_params, rows.first_exp_avgs, rows.first_exp_avg_sqs
    if row >= rows.block_size:  # never so in an Embedding
        block = block_of(row, rows.reciprocal)
        row -= block * rows.block_size
        param = at(rows.params, block, INT64)
        exp_avg = at(rows.exp_avgs, block, INT64)
        exp_avg_sq = at(rows.exp_avg_sqs, block, INT64)
    return (
        param + row * rows.param_bytes,
        exp_avg + row * rows.exp_avg_bytes,
        exp_avg_sq + row * rows.exp_avg_sq_bytes,
    )


@inline
def _grad_ahead(grads, i, pieces):  # type: ignore[no-untyped-def]
    """What to ask for while the gradient at sorted position i is used: the address of another."""
    address, _ = _grad_at(grads, min(i + grads.ahead, pieces.end - 1), pieces)
    return address


def _prefetch_steps(per_row: Any, grads: _Grads, i: int, rows: _Rows, end: int) -> None:
    """Ask for a row's count, what it missed, and ``ahead`` positions before that its last step."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(_prefetch_steps)
def _prefetch_steps_in(per_row, grads, i, rows, end):  # type: ignore[no-untyped-def]
    def count(per_row, grads, i, rows, end):  # type: ignore[no-untyped-def]
        row = _key(grads, i) - rows.first_key
        prefetch(cell_address(rows.row_steps, rows.block_size, rows.reciprocal, row))

    if rows.types[0] == types.none:
        return count if per_row != types.none else lambda per_row, grads, i, rows, end: None

    def lagging(per_row, grads, i, rows, end):  # type: ignore[no-untyped-def]
        log = rows.log
        last_step = last_step_of(log, _key(grads, i) - rows.first_key)
        if last_step != log.t:
            prefetch_missed(log, last_step)
        if i + grads.ahead < end:
            row = _key(grads, i + grads.ahead) - rows.first_key
            prefetch(cell_address(log.last_steps, log.block_size, log.reciprocal, row))

    return lagging


@inline
def _prefetch_rows(grads, tables, i, rows, end):  # type: ignore[no-untyped-def]
    """Ask for the first ``ahead`` rows and gradients from the run on that begins at i.

    Returns where the run of the next row begins; ``end`` if there is none.
    """
    coming = i
    for _ in range(grads.ahead):
        if coming < end:
            _prefetch_steps(tables.per_row, grads, coming, rows, end)
            param, exp_avg, exp_avg_sq = _row_at(grads, coming, rows)
            moment_bytes = grads.dim * itemsize_of(tables.moment_tag)
            prefetch_bytes(param, grads.dim * itemsize_of(tables.param_tag))
            prefetch_bytes(exp_avg, moment_bytes)
            prefetch_bytes(exp_avg_sq, moment_bytes)
            coming = _run_end(grads, coming)
    return coming


@inline
def _prefetch_grads(grads, begin, end, pieces):  # type: ignore[no-untyped-def]
    for i in range(begin, min(end, pieces.end)):
        address, _ = _grad_at(grads, i, pieces)
        prefetch_bytes(address, grads.dim * itemsize_of(grads.tag))


@inline
def _add_strided(total, address, stride, tag):  # type: ignore[no-untyped-def]
    """``_add`` where a gradient's columns are apart."""
    for j in range(total.size):
        total[j] += load(address, j * stride, tag, VALUES)


@inline
def _add(total, address, ahead, tag):  # type: ignore[no-untyped-def]
    """Add a gradient to total [D] float64, and ask for the one at ``ahead``."""
    dim, elements = total.size, per_line(tag)
    whole = dim & -elements
    for first in range(0, whole, elements):
        prefetch(ahead + first * itemsize_of(tag))
        for j in range(first, first + elements):
            total[j] += load(address, j, tag, VALUES)
    if whole < dim:
        prefetch(ahead + whole * itemsize_of(tag))
    for j in range(whole, dim):
        total[j] += load(address, j, tag, VALUES)


@inline
def _add_four_elements(total, j, four, tag):  # type: ignore[no-untyped-def]
    sum_ = total[j] + load(four[0], j, tag, VALUES)
    sum_ += load(four[1], j, tag, VALUES)
    sum_ += load(four[2], j, tag, VALUES)
    total[j] = sum_ + load(four[3], j, tag, VALUES)


@inline
def _prefetch_four(ahead, offset):  # type: ignore[no-untyped-def]
    prefetch(ahead[0] + offset)
    prefetch(ahead[1] + offset)
    prefetch(ahead[2] + offset)
    prefetch(ahead[3] + offset)


@inline
def _add_four(total, four, ahead, tag):  # type: ignore[no-untyped-def]
    """Add four gradients to total [D] float64, one after the other, and ask for four others."""
    dim, elements = total.size, per_line(tag)
    whole = dim & -elements
    for first in range(0, whole, elements):
        _prefetch_four(ahead, first * itemsize_of(tag))
        for j in range(first, first + elements):
            _add_four_elements(total, j, four, tag)
    if whole < dim:
        _prefetch_four(ahead, whole * itemsize_of(tag))
    for j in range(whole, dim):
        _add_four_elements(total, j, four, tag)


@inline
def _sum_chunk(total, begin, end, grads, pieces):  # type: ignore[no-untyped-def]
    """Sum the gradients at sorted positions [begin, end), in order, into total [D] float64."""
    total[:] = 0.0
    i = begin
    while i < end:
        address, stride = _grad_at(grads, i, pieces)
        if i + 4 <= end and pieces.contiguous:
            second, _ = _grad_at(grads, i + 1, pieces)
            third, _ = _grad_at(grads, i + 2, pieces)
            fourth, _ = _grad_at(grads, i + 3, pieces)
            ahead = (
                _grad_ahead(grads, i, pieces),
                _grad_ahead(grads, i + 1, pieces),
                _grad_ahead(grads, i + 2, pieces),
                _grad_ahead(grads, i + 3, pieces),
            )
            _add_four(total, (address, second, third, fourth), ahead, grads.tag)
            i += 4
        elif stride == 1:
            _add(total, address, _grad_ahead(grads, i, pieces), grads.tag)
            i += 1
        else:
            _add_strided(total, address, stride, grads.tag)
            i += 1


@jit
def _sum_chunks(part, begin, end, grads):  # type: ignore[no-untyped-def]
    """Fill the partial sums of chunks [begin, end) of the long runs."""
    for chunk in range(begin, end):
        run = _last_at_most(chunk, grads.long_runs + 16, 3, grads.num_long_runs)
        number = chunk - at(grads.long_runs, 3 * run + 2, INT64)
        start = at(grads.long_runs, 3 * run, INT64) + number * CHUNK
        stop = min(start + CHUNK, at(grads.long_runs, 3 * run + 1, INT64))
        partial = view(grads.partials + chunk * grads.dim * 8, grads.dim, FLOAT64)
        _sum_chunk(partial, start, stop, grads, _pieces_of(grads, _table_at(grads, start), start))
    return 0


@inline
def _sum_partials(total, begin, end, grads):  # type: ignore[no-untyped-def]
    """Sum a long run into total [D] float64: its chunks' sums, in order."""
    run = _last_at_most(begin, grads.long_runs, 3, grads.num_long_runs)
    first = at(grads.long_runs, 3 * run + 2, INT64)
    total[:] = 0.0
    for chunk in range(first, first + (end - begin + CHUNK - 1) // CHUNK):
        partial = grads.partials + chunk * grads.dim * 8
        _add(total, partial, partial, FLOAT64)


@jit  # called, not compiled in: the loop that mostly has no use for it runs better without
def _sum_run(total, begin, end, scale, grads, pieces):  # type: ignore[no-untyped-def]
    """The sum of a run times ``scale``, into total [D] float64."""
    if end - begin > CHUNK:
        _sum_partials(total, begin, end, grads)
    else:
        _sum_chunk(total, begin, end, grads, pieces)
    if scale != 1.0:
        total *= scale


def _corrections(per_row: Any, scalars: Any, rows: _Rows, row: int) -> Any:
    """The three numbers lr / (1 - beta1^n), 1 / sqrt(1 - beta2^n) and ε beside √v̂, in double.

    n is the table's t, or the row's own count, which then rises by 1.
    """
    raise NotImplementedError("only inside compiled code")


@compiled_overload(_corrections)
def _corrections_in(per_row, scalars, rows, row):  # type: ignore[no-untyped-def]
    if per_row == types.none:
        return lambda per_row, scalars, rows, row: (scalars[2], scalars[3], scalars[4])

    def own(per_row, scalars, rows, row):  # type: ignore[no-untyped-def]
        cell = cell_address(rows.row_steps, rows.block_size, rows.reciprocal, row)
        count = view(cell, 1, INT32)
        count[0] += 1
        step_size = scalars[8] / -math.expm1(count[0] * scalars[9])
        inv_sqrt_correction2 = 1.0 / math.sqrt(-math.expm1(count[0] * scalars[10]))
        eps = scalars[4] * (inv_sqrt_correction2 if scalars[11] != 0.0 else 1.0)
        return step_size, inv_sqrt_correction2, eps

    return own


@inline
def _update_element(place, grad, j, factors, missed, tags):  # type: ignore[no-untyped-def]
    """SPEC §1 for element j of a row, after what it missed."""
    one_minus_beta1, one_minus_beta2, step_size, inv_sqrt_correction2, eps, decay = factors
    param_tag, tag, grad_tag = tags
    g = cast(load(grad, j, grad_tag, VALUES), tag)
    w, m, v = caught_up(
        missed,
        load(place[0], j, param_tag, PARAM),
        load(place[1], j, tag, EXP_AVG),
        load(place[2], j, tag, EXP_AVG_SQ),
    )
    m += one_minus_beta1 * (g - m)
    v += one_minus_beta2 * (g * g - v)
    store(place[1], j, m, tag, EXP_AVG)
    store(place[2], j, v, tag, EXP_AVG_SQ)
    denom = cast(math.sqrt(v), tag) * inv_sqrt_correction2 + eps
    store(place[0], j, w - (step_size * m / denom + decay * w), param_tag, PARAM)


@inline
def _prefetch_line(ahead, j, tags):  # type: ignore[no-untyped-def]
    """Ask for element j, and what is in a cache line with it, of an ``_Ahead``."""
    prefetch(ahead.param + j * itemsize_of(tags[0]))
    prefetch(ahead.exp_avg + j * itemsize_of(tags[1]))
    prefetch(ahead.exp_avg_sq + j * itemsize_of(tags[1]))
    prefetch(ahead.grad + j * itemsize_of(tags[2]))


@inline
def _update_row(place, grad, dim, scalars, corrections, missed, ahead, tags):  # type: ignore[no-untyped-def]
    """SPEC §1 for one row [D]: weights, exp_avg and exp_avg_sq are at the addresses ``place``.

    The sum of its gradients is at ``grad``, ``corrections`` are of ``_corrections``, ``missed`` is
    what the row missed (``caught_up``), ``ahead`` an ``_Ahead``, and the tags are of weights,
    moments and ``grad``.
    """
    tag = tags[1]
    factors = (
        cast(scalars[0], tag),  # 1 - beta1
        cast(scalars[1], tag),  # 1 - beta2
        cast(corrections[0], tag),
        cast(corrections[1], tag),
        cast(corrections[2], tag),
        cast(scalars[5], tag),  # lr * weight_decay
    )
    elements = per_line(tag)
    whole = dim & -elements
    for first in range(0, whole, elements):
        _prefetch_line(ahead, first, tags)
        for j in range(first, first + elements):
            _update_element(place, grad, j, factors, missed, tags)
    if whole < dim:
        _prefetch_line(ahead, whole, tags)
    for j in range(whole, dim):
        _update_element(place, grad, j, factors, missed, tags)


def _step_row(
    log: Any,
    place: Any,
    row: int,
    grad: Any,
    scalars: Any,
    corrections: Any,
    work: int,
    ahead: Any,
    tables: Any,
) -> None:
    """Bring the row ``row``, which is at the addresses ``place``, up to date and update it.

    ``grad`` is the address of the sum of its gradients and the tag of that, ``work`` of room for a
    row to replay; see ``_update_row`` for the rest.
    """
    raise NotImplementedError("only inside compiled code")


@compiled_overload(_step_row)
def _step_row_in(log, place, row, grad, scalars, corrections, work, ahead, tables):  # type: ignore[no-untyped-def]
    @inline
    def update(place, param_tag, grad, scalars, corrections, missed, ahead, tables):  # type: ignore[no-untyped-def]
        tags = param_tag, tables.moment_tag, grad[1]
        _update_row(place, grad[0], tables.dim, scalars, corrections, missed, ahead, tags)

    def skip(log, place, row, grad, scalars, corrections, work, ahead, tables):  # type: ignore[no-untyped-def]
        update(place, tables.param_tag, grad, scalars, corrections, None, ahead, tables)

    if log == types.none:
        return skip

    def rules(log, place, row, grad, scalars, corrections, work, ahead, tables):  # type: ignore[no-untyped-def]
        last_step, param_tag = last_step_of(log, row), tables.param_tag
        if last_step == log.t:
            update(place, param_tag, grad, scalars, corrections, None, ahead, tables)
        else:
            missed = missed_since(log, last_step, tables.moment_tag)
            if two_nodes_do(missed):
                short = with_two_nodes(missed)
                update(place, param_tag, grad, scalars, corrections, short, ahead, tables)
            else:
                update(place, param_tag, grad, scalars, corrections, missed, ahead, tables)
        set_last_step(log, row, log.t + 1)

    if kind_of(log) != REPLAY:
        return rules

    def replay(log, place, row, grad, scalars, corrections, work, ahead, tables):  # type: ignore[no-untyped-def]
        last_step, tag, param_tag = last_step_of(log, row), tables.moment_tag, tables.param_tag
        if last_step == log.t:
            update(place, param_tag, grad, scalars, corrections, None, ahead, tables)
        else:  # in the buffer, so that a 16-bit weight is rounded once
            row_bytes = tables.dim * itemsize_of(tag)
            current = work, work + row_bytes, work + 2 * row_bytes
            replay_row(place, work, last_step, tables.dim, param_tag, tag, log)
            update(current, tag, grad, scalars, corrections, None, ahead, tables)
            store_row(place, work, tables.dim, param_tag, tag)
        set_last_step(log, row, log.t + 1)

    return replay


@jit
def _update_runs(part, begin, end, grads, tables):  # type: ignore[no-untyped-def]
    """Update the rows whose runs begin at sorted positions [begin, end)."""
    room = tables.room + part * tables.room_bytes
    total, work = view(room, grads.dim, FLOAT64), room + 8 * grads.dim
    i, stop = _next_head(grads, begin), _next_head(grads, end)
    while i < stop:
        number = _table_at(grads, i)
        pieces, rows = _pieces_of(grads, number, i), _rows_of(grads, tables, number)
        last = min(pieces.end, stop)
        scalars = view(tables.scalars + 8 * SCALARS * number, SCALARS, FLOAT64)
        grad_scale, is_mean = scalars[6], scalars[7] != 0.0
        _prefetch_grads(grads, i, i + grads.ahead, pieces)
        coming = _prefetch_rows(grads, tables, i, rows, last)
        while i < last:
            place, row = _row_at(grads, i, rows), _key(grads, i) - rows.first_key
            corrections = _corrections(tables.per_row, scalars, rows, row)
            address, stride = _grad_at(grads, i, pieces)
            run_end = _run_end(grads, i)
            next_place = place
            if coming < last:
                _prefetch_steps(tables.per_row, grads, coming, rows, last)
                next_place = _row_at(grads, coming, rows)
                coming = _run_end(grads, coming)
            if run_end == i + 1 and stride == 1 and grad_scale == 1.0:  # needs no buffer
                next_grad = _grad_ahead(grads, i, pieces)
                ahead = _Ahead(next_place[0], next_place[1], next_place[2], next_grad)
                grad = address, grads.tag
                _step_row(rows.log, place, row, grad, scalars, corrections, work, ahead, tables)
            else:
                scale = grad_scale / (run_end - i) if is_mean else grad_scale
                _sum_run(total, i, run_end, scale, grads, pieces)
                ahead = _Ahead(next_place[0], next_place[1], next_place[2], address)
                grad = room, FLOAT64
                _step_row(rows.log, place, row, grad, scalars, corrections, work, ahead, tables)
            i = run_end
    return 0


@jit
def _read_steps(steps, ts):  # type: ignore[no-untyped-def]
    """Fill ``ts`` with the tables' numbers of updates, given their addresses."""
    for table in range(steps.size):
        ts[table] = at(steps[table], 0, INT64)


@jit
def _advance_steps(steps):  # type: ignore[no-untyped-def]
    """Count an update of each table. To add 1 to one tensor takes torch 0.7 µs."""
    for table in range(steps.size):
        view(steps[table], 1, INT64)[0] += 1


@jit
def _count_runs(part, begin, end, grads):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(begin, min(end, grads.num_kept)):
        count += _is_head(grads, i)
    return count


@jit
def _store_sums(  # type: ignore[no-untyped-def]
    part, begin, end, grads, scale, mean, places, rows, values
):
    """Rows and sums of one table's runs that begin in [begin, end), from ``places[part]`` on."""
    total = np.empty(grads.dim)
    place = places[part]
    pieces = _pieces_of(grads, 0, 0)
    i, stop = _next_head(grads, begin), _next_head(grads, end)
    while i < stop:
        run_end = _run_end(grads, i)
        _sum_run(total, i, run_end, scale / (run_end - i) if mean else scale, grads, pieces)
        rows[place] = _key(grads, i)
        for j in range(grads.dim):
            store(values, place * grads.dim + j, total[j], grads.tag, VALUES)
        place += 1
        i = run_end
    return 0


def _with_chunks_summed(segments: Segments) -> _Grads:
    """The kernels' view of segments, the chunks of long runs summed by all threads."""
    itemsize, partials = segments.grad_dtype.itemsize, segments.partials
    grads = _Grads(
        segments.words.ctypes.data,
        segments.position_bits,
        segments.num_kept,
        segments.piece_starts.ctypes.data,
        segments.pieces.ctypes.data,
        segments.first_pieces.ctypes.data,
        segments.first_keys.ctypes.data,
        len(segments.pending),
        segments.long_runs.ctypes.data,
        len(segments.long_runs),
        partials.ctypes.data,
        segments.dim,
        min(max(BYTES_AHEAD // (4 * segments.dim * itemsize), MIN_AHEAD), MAX_AHEAD),
        TAGS[segments.grad_dtype],
    )
    if len(partials):
        parts = num_parts(len(partials), 1)
        parallel_for(_sum_chunks, len(partials), parts, grads)
    return grads


def _log(x: float) -> float:
    return math.log(x) if x else -math.inf


def _scalars(hyper: Hyperparams, t: int, pending: Pending) -> tuple[float, ...]:
    """What the t-th update of a table needs, in double precision; see ``_update_row``."""
    lr = float(hyper.lr)
    is_tf = hyper.eps_mode == "tf"
    inv_sqrt_correction2 = 1.0 / math.sqrt(1.0 - hyper.beta2**t)
    eps_is_final = pending.kind.per_row or not is_tf  # else it is corrected here
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
        _log(hyper.beta1),
        _log(hyper.beta2),
        float(is_tf),
    )


#: Types that ``_update_runs`` has been compiled for in this process.
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
    steps = np.array([update.step.data_ptr() for update in updates], dtype=np.int64)
    ts = np.empty_like(steps)
    _read_steps(steps, ts)
    rows: list[int] = []
    places: list[int] = []  # of each table's scalars, which hundreds of tables may share
    known: dict[tuple[Any, ...], int] = {}
    scalars: list[tuple[float, ...]] = []
    for update, t in zip(updates, ts.tolist(), strict=True):
        pending = update.pending
        param = pending.param
        rows += (
            param.block_size(),
            reciprocal_of(param.block_size()),
            param.addresses_at(),
            param.row_bytes,
            update.exp_avg.addresses_at(),
            update.exp_avg.row_bytes,
            update.exp_avg_sq.addresses_at(),
            update.exp_avg_sq.row_bytes,
        )
        key = id(update.hyper), t, pending.grad_scale, pending.mean
        place = known.get(key)
        if place is None:
            place = known[key] = len(scalars)
            scalars.append(_scalars(update.hyper, t + 1, pending))
        places.append(place)
    rows_array = np.array(rows, dtype=np.int64)
    scalars_array = np.array(scalars, dtype=np.float64)
    if len(places) > len(scalars):
        scalars_array = scalars_array[places]
    logs, logs_at = _logs(updates, kind.untouched)
    row_steps, row_steps_at = _row_steps(updates, kind.per_row)
    size, dim = segments.words.size, segments.dim
    parts = num_parts(size, GRAIN_ELEMENTS // dim)
    room_bytes = 8 * dim if kind.untouched != "replay" else 32 * dim
    room = np.empty(parts * room_bytes, dtype=np.uint8)
    tables = _Tables(
        rows_array.ctypes.data,
        scalars_array.ctypes.data,
        room.ctypes.data,
        room_bytes,
        dim,
        TAGS[dtype],
        TAGS[moment_dtype],
        TAGS_OF[kind.untouched],
        logs_at,
        BYTE if kind.per_row else None,
        row_steps_at,
    )
    grads = _with_chunks_summed(segments)
    variant = dtype, segments.grad_dtype, kind
    if variant not in _compiled:
        _update_runs(0, 0, 0, grads, tables)  # of no runs
        _advance_steps(steps[:0])
        _compiled.add(variant)
    if parts > 1:
        start_threads(parts)
    part_cuts = _cuts(segments, parts)
    # Kernels know addresses: what is there lives as long as the function.
    kept = (rows_array, scalars_array, room, logs, row_steps, segments, updates)

    def apply(kept: Any = kept) -> None:
        run_parts(_update_runs, part_cuts, grads, tables)
        _advance_steps(steps)

    return apply


def _cuts(segments: Segments, parts: int) -> list[int]:
    """Where to cut sorted positions into parts of as much work.

    A long run is none to speak of: its chunks have been summed before.
    """
    size, long_runs = segments.words.size, segments.long_runs.tolist()
    result = cuts(size - sum(end - begin for begin, end, _ in long_runs), parts)
    for begin, end, _ in long_runs:
        result = [cut if cut <= begin else cut + end - begin for cut in result]
    result[-1] = size  # a long run may be the last
    return result


def _logs(updates: Sequence[Update], untouched: str) -> tuple[list[Any], int]:
    """What is to be kept for ``_Tables.logs``, and that address."""
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
    logs = np.array(numbers, dtype=np.int64)
    return [logs, *tails.values()], logs.ctypes.data


def _row_steps(updates: Sequence[Update], per_row: bool) -> tuple[list[Any], int]:
    """What is to be kept for ``_Tables.row_steps``, and that address."""
    if not per_row:
        return [], 0
    slots = [update.row_step for update in updates]
    row_steps = np.array([slot.addresses_at() for slot in slots if slot is not None])
    return [row_steps], row_steps.ctypes.data


def coalesce(pending: Pending) -> tuple[torch.Tensor, torch.Tensor]:
    """The touched rows of one table and the sums of their gradients.

    Returns:
        rows [U] int64, ascending, and values [U, D] of the gradients' dtype.
    """
    segments = segment([pending])
    grads = _with_chunks_summed(segments)
    size = segments.words.size
    parts = num_parts(size, GRAIN_ELEMENTS // segments.dim)
    counts = parallel_for(_count_runs, size, parts, grads)
    rows = np.empty(sum(counts), dtype=np.int64)
    values = torch.empty(rows.size, segments.dim, dtype=segments.grad_dtype, device="cpu")
    parallel_for(
        _store_sums,
        size,
        parts,
        grads,
        pending.grad_scale,
        pending.mean,
        np.cumsum([0, *counts[:-1]]),
        rows,
        values.data_ptr(),
    )
    return torch.from_numpy(rows), values
