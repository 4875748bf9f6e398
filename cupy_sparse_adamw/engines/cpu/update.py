"""The kernel of a step: each run of sorted gradients is summed and applied in one pass.

Per touched row: each of its gradients is read once from where backward left it; weights and
moments are read once and written once; the sum (``sums``) stays in a thread's buffer.

Rows and gradients lie scattered in memory, so each is asked for some time before it is used: into
the second-level cache, which can have many more lines on their way than the first, and line by line
between the elements of the row that is computed. All lines at once would fill what a core keeps
requests in, and computing would wait for memory, then memory for computing (docs/performance.md).

What a table does about steps that a row missed, and how it corrects bias, is known when the kernel
is compiled (``Tables``): a table that skips what it missed pays for none of it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numba import types

from ._compile import (
    EXP_AVG,
    EXP_AVG_SQ,
    FLOAT64,
    INT64,
    PARAM,
    TURN,
    VALUES,
    at,
    block_of,
    cast,
    compiled_overload,
    in_whole_turns,
    inline,
    itemsize_of,
    jit,
    load,
    numbers_at,
    prefetch,
    prefetch_bytes,
    prefetch_rest,
    prefetch_row_rest,
    prefetch_row_turn,
    prefetch_turn,
    store,
    view,
)
from .missed import (
    INT32,
    REPLAY,
    caught_up,
    cell_address,
    kind_of,
    last_step_of,
    log_at,
    missed_since,
    prefetch_missed,
    replay_row,
    set_last_step,
    store_row,
    two_nodes_do,
    with_two_nodes,
)
from .segment import CHUNK
from .sums import (
    Grads,
    first_key_of,
    grad_ahead,
    grad_at,
    grads_of,
    key_at,
    next_head,
    pieces_of,
    prefetch_grads,
    run_end_of,
    sum_run,
    table_at,
)

#: Numbers of ``Tables.rows`` for a table, and which of them is the place of its scalars.
ROWS_WIDTH = 9
PLACE = 8
#: Numbers of a table's scalars.
SCALARS = 12


class Tables(NamedTuple):
    """Where the tables of a group are, and the scalars of their update, as addresses.

    As with ``Grads``, kernels get the numbers at an address (``_tables_of``).
    """

    rows: int  # [T, ROWS_WIDTH] int64: block size, its reciprocal, then of each slot the address of
    # its block addresses and the bytes from a row to the next, last the place among scalars
    scalars: int  # [K, SCALARS] float64, see adamw._scalars; tables may share them
    room: int  # [parts, room_bytes]: a sum [D] float64, then a row to replay [3, D]
    room_bytes: int
    dim: int
    logs: int  # [T, LOG_WIDTH] int64, see Log; unless untouched is None
    row_steps: int  # [T] int64: each table's block addresses of its counts; unless per_row is None
    param_tag: Any
    moment_tag: Any
    untouched: Any  # one of TAGS_OF
    per_row: Any  # whether bias is corrected by rows' own counts: BYTE or None


#: Numbers of ``Tables``, without its tags.
TABLES_WIDTH = len(Tables._fields) - 4


@inline
def _tables_of(numbers, tags):  # type: ignore[no-untyped-def]
    """``Tables`` from the address of its numbers, and its tags."""
    param_tag, moment_tag, untouched, per_row = tags
    fields = numbers_at(numbers, TABLES_WIDTH, INT64)
    return Tables(*fields, param_tag, moment_tag, untouched, per_row)  # type: ignore[call-arg]


# What a loop over the runs of one table needs of the above, read once per table: as far as the
# compiler knows a loop may write to what it reads, so it would read it anew for each row.


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


def _row_steps_at(per_row: Any, row_steps: int, number: int) -> int:
    """``row_steps`` of ``_Rows``."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(_row_steps_at)
def _row_steps_at_in(per_row, row_steps, number):  # type: ignore[no-untyped-def]
    if per_row == types.none:
        return lambda per_row, row_steps, number: 0
    return lambda per_row, row_steps, number: at(row_steps, number, INT64)


@inline
def _rows_of(grads, tables, number):  # type: ignore[no-untyped-def]
    """``_Rows`` of a table."""
    (
        block_size,
        reciprocal,
        params,
        param_bytes,
        exp_avgs,
        exp_avg_bytes,
        exp_avg_sqs,
        exp_avg_sq_bytes,
        _,
    ) = numbers_at(tables.rows + 8 * ROWS_WIDTH * number, ROWS_WIDTH, INT64)
    return _Rows(
        log_at(tables.untouched, tables.logs, number, block_size, reciprocal),
        _row_steps_at(tables.per_row, tables.row_steps, number),
        first_key_of(grads, number),
        block_size,
        reciprocal,
        params,
        exp_avgs,
        exp_avg_sqs,
        param_bytes,
        exp_avg_bytes,
        exp_avg_sq_bytes,
        at(params, 0, INT64),
        at(exp_avgs, 0, INT64),
        at(exp_avg_sqs, 0, INT64),
    )


@inline
def _scalars_at(tables, number):  # type: ignore[no-untyped-def]
    """A table's scalars."""
    place = at(tables.rows, ROWS_WIDTH * number + PLACE, INT64)
    return view(tables.scalars + 8 * SCALARS * place, SCALARS, FLOAT64)


@inline
def _row_at(grads, i, rows):  # type: ignore[no-untyped-def]
    """Addresses of weights, exp_avg and exp_avg_sq of the row at sorted position i."""
    row = key_at(grads, i) - rows.first_key
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


def _prefetch_steps(per_row: Any, grads: Grads, i: int, rows: _Rows, end: int) -> None:
    """Ask for a row's count, what it missed, and ``ahead`` positions before that its last step."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(_prefetch_steps)
def _prefetch_steps_in(per_row, grads, i, rows, end):  # type: ignore[no-untyped-def]
    def count(per_row, grads, i, rows, end):  # type: ignore[no-untyped-def]
        row = key_at(grads, i) - rows.first_key
        prefetch(cell_address(rows.row_steps, rows.block_size, rows.reciprocal, row))

    if rows.types[0] == types.none:
        return count if per_row != types.none else lambda per_row, grads, i, rows, end: None

    def lagging(per_row, grads, i, rows, end):  # type: ignore[no-untyped-def]
        log = rows.log
        last_step = last_step_of(log, key_at(grads, i) - rows.first_key)
        if last_step != log.t:
            prefetch_missed(log, last_step)
        if i + grads.ahead < end:
            row = key_at(grads, i + grads.ahead) - rows.first_key
            prefetch(cell_address(log.last_steps, log.block_size, log.reciprocal, row))

    return lagging


@inline
def _prefetch_rows(grads, tables, i, rows, end):  # type: ignore[no-untyped-def]
    """Ask for the first ``ahead`` rows, from the run on that begins at i.

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
            coming = run_end_of(grads, coming)
    return coming


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
def _prefetch_ahead(ahead, first, tags):  # type: ignore[no-untyped-def]
    """``prefetch_turn`` of an ``_Ahead``."""
    prefetch_row_turn(ahead, first, tags)
    prefetch_turn(ahead.grad, first, tags[2])


@inline
def _prefetch_ahead_rest(ahead, first, dim, tags):  # type: ignore[no-untyped-def]
    """``prefetch_rest`` of an ``_Ahead``."""
    prefetch_row_rest(ahead, first, dim, tags)
    prefetch_rest(ahead.grad, first, dim, tags[2])


@inline
def _update_turn(place, grad, first, factors, missed, tags):  # type: ignore[no-untyped-def]
    """``_update_element`` of elements [first, first + TURN)."""
    for j in range(first, first + TURN):
        _update_element(place, grad, j, factors, missed, tags)


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
    whole = in_whole_turns(dim)
    for first in range(0, whole, TURN):
        _prefetch_ahead(ahead, first, tags)
        _update_turn(place, grad, first, factors, missed, tags)
    if whole < dim:
        _prefetch_ahead_rest(ahead, whole, dim, tags)
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
            _prefetch_ahead_rest(ahead, 0, tables.dim, (param_tag, tag, grad[1]))
            replay_row(place, work, last_step, tables.dim, param_tag, tag, log)
            here = _Ahead(current[0], current[1], current[2], grad[0])
            update(current, tag, grad, scalars, corrections, None, here, tables)
            store_row(place, work, tables.dim, param_tag, tag)
        set_last_step(log, row, log.t + 1)

    return replay


@jit
def update_runs(part, begin, end, grad_numbers, grad_tag, table_numbers, tags):  # type: ignore[no-untyped-def]
    """Update the rows whose runs begin at sorted positions [begin, end)."""
    grads, tables = grads_of(grad_numbers, grad_tag), _tables_of(table_numbers, tags)
    room = tables.room + part * tables.room_bytes
    total, work = view(room, grads.dim, FLOAT64), room + 8 * grads.dim
    i, stop = next_head(grads, begin), next_head(grads, end)
    while i < stop:
        number = table_at(grads, i)
        pieces, rows = pieces_of(grads, number, i), _rows_of(grads, tables, number)
        last = min(pieces.end, stop)
        scalars = _scalars_at(tables, number)
        grad_scale, is_mean = scalars[6], scalars[7] != 0.0
        prefetch_grads(grads, i, i + grads.ahead, pieces)
        coming = _prefetch_rows(grads, tables, i, rows, last)
        while i < last:
            place, row = _row_at(grads, i, rows), key_at(grads, i) - rows.first_key
            corrections = _corrections(tables.per_row, scalars, rows, row)
            address, stride = grad_at(grads, i, pieces)
            run_end = run_end_of(grads, i)
            next_place = place
            if coming < last:
                _prefetch_steps(tables.per_row, grads, coming, rows, last)
                next_place = _row_at(grads, coming, rows)
                coming = run_end_of(grads, coming)
            if run_end == i + 1 and stride == 1 and grad_scale == 1.0:  # needs no buffer
                next_grad = grad_ahead(grads, i, pieces)
                ahead = _Ahead(next_place[0], next_place[1], next_place[2], next_grad)
                grad = address, grads.tag
                _step_row(rows.log, place, row, grad, scalars, corrections, work, ahead, tables)
            else:
                scale = grad_scale / (run_end - i) if is_mean else grad_scale
                sum_run(total, i, run_end, scale, grads, pieces)
                if run_end - i > CHUNK:  # no gradient of it was read here
                    prefetch_grads(grads, run_end, run_end + grads.ahead, pieces)
                ahead = _Ahead(next_place[0], next_place[1], next_place[2], room)
                grad = room, FLOAT64
                _step_row(rows.log, place, row, grad, scalars, corrections, work, ahead, tables)
            i = run_end
    return 0
