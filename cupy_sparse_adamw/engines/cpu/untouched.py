"""Rows that no batch touched: a row brought up to date where it is read or updated.

``Missed`` has the formulas. Per row its last step is read; a row that is behind costs one more
line or two of memory, its entry of the rules, and is moved in registers, in the same pass over its
elements as whatever else is done to it. Only "replay" goes over a row once for each missed step,
in a thread's buffer.

What a table does is known when a kernel is compiled: a *tag* in ``Log`` says it (``TAGS_OF``), and
kernels for tables that skip what they missed get None in place of a ``Log``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types

from ..._types import MOMENT_DTYPE, RULE_CHUNK, RULE_WIDTH, STEP_WIDTH, Lagging, Missed
from ._compile import (
    BYTE,
    EXP_AVG,
    EXP_AVG_SQ,
    FLOAT64,
    INT64,
    PARAM,
    TAGS,
    TURN,
    VALUES,
    address_of,
    at,
    block_of,
    cast,
    compiled_overload,
    copy_bytes,
    inline,
    itemsize_of,
    jit,
    load,
    multiply_add,
    prefetch,
    prefetch_bytes,
    prefetch_turn,
    reciprocal_of,
    store,
    view,
)
from ._interop import array_of
from ._threads import num_parts, parallel_for

#: What a table does about missed steps -> tag.
TAGS_OF = {"skip": None, "decay": np.int8(0), "dense": np.int16(0), "replay": np.int32(0)}
#: The tags' types, by which code is chosen.
DECAY, DENSE, REPLAY = types.int8, types.int16, types.int32
#: Tag of an array of steps.
INT32 = np.int32(0)

#: Elements a thread takes at the least, and rows asked for ahead: a power of two.
GRAIN_ELEMENTS = 32768
AHEAD = 16
#: Neighbouring rows that one thread catches up (a cache line of last steps), and how many rows it
#: collects before it does.
BAND, COLLECTED = 16, 256
#: Two nodes of a rule are off by at most a sixth of e_1 e_2, relative to the motion (computed for
#: the betas of docs/untouched.md); they do where that is less than float32 shows.
TWO_NODES_FROM = 5e-7
#: The least c with whose square float32 computes.
LEAST_SQUARED = 1e-15


class Log(NamedTuple):
    """One table's ``Missed`` and its rows' last steps, for kernels. Arrays are addresses."""

    kind: Any  # tag
    t: int
    first: int
    window: int
    rules: int
    factors: int
    steps: int
    tails: int  # see _fill_tails
    last_steps: int  # of block addresses
    block_size: int
    reciprocal: int  # of the block size


#: Numbers of a ``Log``, without its tag.
LOG_WIDTH = len(Log._fields) - 1


class _Decay(NamedTuple):
    """What one row missed, in the type that it is computed in: mode "decay"."""

    decay: Any


class _Rule(NamedTuple):
    """What one row missed, in the type that it is computed in: mode "dense"."""

    decay: Any
    beta1_power: Any
    beta2_power: Any
    weight: Any
    c: Any
    d1: Any
    d2: Any
    d3: Any
    d4: Any
    d5: Any
    e1: Any
    e2: Any
    e3: Any
    e4: Any
    e5: Any


class _TwoNodes(NamedTuple):
    """``_Rule`` with two nodes, of which one division less is left."""

    decay: Any
    beta1_power: Any
    beta2_power: Any
    weight: Any
    c: Any
    d1: Any
    e1: Any


# ---------------------------------------------------------------- one element, one row


def kind_of(log: Any) -> Any:
    """The type of the tag in a ``Log``, given Numba's type of that."""
    return log.types[0]


@inline
def log_at(kind, logs, number):  # type: ignore[no-untyped-def]
    """The ``Log`` of a table, given its tag and the address of all tables' numbers."""
    numbers = logs + number * (8 * LOG_WIDTH)
    return Log(
        kind,
        at(numbers, 0, INT64),
        at(numbers, 1, INT64),
        at(numbers, 2, INT64),
        at(numbers, 3, INT64),
        at(numbers, 4, INT64),
        at(numbers, 5, INT64),
        at(numbers, 6, INT64),
        at(numbers, 7, INT64),
        at(numbers, 8, INT64),
        at(numbers, 9, INT64),
    )


@inline
def _place(blocks, block_size, reciprocal, row, row_bytes):  # type: ignore[no-untyped-def]
    """Where a row is in a slot, given the address of block addresses."""
    block = np.int64(0)
    if row >= block_size:  # never so in an Embedding
        block = block_of(row, reciprocal)
    return at(blocks, block, INT64) + row_bytes * (row - block * block_size)


@inline
def cell_address(blocks, block_size, reciprocal, row):  # type: ignore[no-untyped-def]
    """Where the int32 of a row is in a slot of width 1."""
    return _place(blocks, block_size, reciprocal, row, 4)


@inline
def last_step_of(log, row):  # type: ignore[no-untyped-def]
    """The step of a row's last update."""
    return np.int64(at(cell_address(log.last_steps, log.block_size, log.reciprocal, row), 0, INT32))


@inline
def set_last_step(log, row, step):  # type: ignore[no-untyped-def]
    """Note the step of a row's last update."""
    cell = cell_address(log.last_steps, log.block_size, log.reciprocal, row)
    view(cell, 1, INT32)[0] = step


@inline
def _rule_address(log, last_step):  # type: ignore[no-untyped-def]
    return log.rules + (last_step - log.first) * (8 * RULE_WIDTH)


@inline
def _factor_address(log, last_step):  # type: ignore[no-untyped-def]
    return log.factors + 16 * np.int64(np.uint64(last_step - log.first) // np.uint64(RULE_CHUNK))


def prefetch_missed(log: Any, last_step: int) -> None:
    """Ask for what ``missed_since`` reads."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(prefetch_missed)
def _prefetch_missed(log, last_step):  # type: ignore[no-untyped-def]
    kind = kind_of(log)
    if kind == DECAY:
        return lambda log, last_step: prefetch(_rule_address(log, last_step))

    def dense(log, last_step):  # type: ignore[no-untyped-def]
        prefetch(_rule_address(log, last_step))
        prefetch(_rule_address(log, last_step) + 64)

    return dense if kind == DENSE else lambda log, last_step: None


@inline
def _decay_since(log, last_step):  # type: ignore[no-untyped-def]
    a = at(_rule_address(log, last_step), 0, FLOAT64)
    f = at(_factor_address(log, last_step), 0, FLOAT64)
    return a + f + a * f


def missed_since(log: Any, last_step: int, tag: Any) -> Any:
    """What a row missed since its last update: ``_Decay`` or ``_Rule`` in the tag's type."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(missed_since)
def _missed_since(log, last_step, tag):  # type: ignore[no-untyped-def]
    if kind_of(log) == DECAY:
        return lambda log, last_step, tag: _Decay(cast(_decay_since(log, last_step), tag))

    def dense(log, last_step, tag):  # type: ignore[no-untyped-def]
        rule, factor = _rule_address(log, last_step), _factor_address(log, last_step)
        return _Rule(
            cast(_decay_since(log, last_step), tag),
            cast(at(rule, 1, FLOAT64), tag),
            cast(at(rule, 2, FLOAT64) * at(factor, 1, FLOAT64), tag),
            cast(at(rule, 3, FLOAT64) * (1.0 + at(factor, 0, FLOAT64)), tag),
            cast(at(rule, 4, FLOAT64), tag),
            cast(at(rule, 5, FLOAT64), tag),
            cast(at(rule, 6, FLOAT64), tag),
            cast(at(rule, 7, FLOAT64), tag),
            cast(at(rule, 8, FLOAT64), tag),
            cast(at(rule, 9, FLOAT64), tag),
            cast(at(rule, 10, FLOAT64), tag),
            cast(at(rule, 11, FLOAT64), tag),
            cast(at(rule, 12, FLOAT64), tag),
            cast(at(rule, 13, FLOAT64), tag),
            cast(at(rule, 14, FLOAT64), tag),
        )

    return dense


def two_nodes_do(missed: Any) -> bool:
    """Whether ``with_two_nodes`` is exact enough."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(two_nodes_do)
def _two_nodes_do(missed):  # type: ignore[no-untyped-def]
    if missed.instance_class is _Decay or missed.types[0] != types.float32:
        return lambda missed: False
    return lambda missed: missed.e1 * missed.e2 <= TWO_NODES_FROM and missed.c >= LEAST_SQUARED


def with_two_nodes(missed: Any) -> Any:
    """The first two nodes of a rule."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(with_two_nodes)
def _with_two_nodes(missed):  # type: ignore[no-untyped-def]
    if missed.instance_class is _Decay:
        return lambda missed: missed
    return lambda missed: _TwoNodes(
        missed.decay,
        missed.beta1_power,
        missed.beta2_power,
        missed.weight,
        missed.c,
        missed.d1,
        missed.e1,
    )


def _normal_or_zero(x: Any) -> Any:
    """Zero in place of what is not a normal number: slow to compute with, and nothing by now."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(_normal_or_zero)
def _normal_or_zero_in(x):  # type: ignore[no-untyped-def]
    tiny = np.finfo(np.float64 if x == types.float64 else np.float32).tiny
    zero = type(tiny)(0)
    return lambda x: zero if abs(x) < tiny else x


def _shift(exp_avg_sq: Any, rule: Any) -> Any:
    """S(√exp_avg_sq), see ``Missed``."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(_shift)
def _shift_in(exp_avg_sq, rule):  # type: ignore[no-untyped-def]
    if rule.instance_class is _TwoNodes:
        return lambda exp_avg_sq, rule: _shift_of_two(exp_avg_sq, rule)
    return lambda exp_avg_sq, rule: _shift_of_six(exp_avg_sq, rule)


@inline
def _shift_of_six(exp_avg_sq, rule):  # type: ignore[no-untyped-def]
    """``_shift`` as it stands there: two divisions and a square root."""
    one = cast(1.0, exp_avg_sq)
    root = cast(math.sqrt(exp_avg_sq), exp_avg_sq)
    inverse = one / (rule.c + root)
    u = root * inverse
    u = u if u < one else one  # NaN where the root is infinite
    square = u * u
    d5 = multiply_add(rule.d5, u, one)
    d4 = multiply_add(multiply_add(rule.d4, u, one), d5, -rule.e5 * square)
    d3 = multiply_add(multiply_add(rule.d3, u, one), d4, -rule.e4 * square * d5)
    d2 = multiply_add(multiply_add(rule.d2, u, one), d3, -rule.e3 * square * d4)
    d1 = multiply_add(multiply_add(rule.d1, u, one), d2, -rule.e2 * square * d3)
    product = -rule.e1 * u * d2
    return rule.weight * inverse * ((d1 + product) / multiply_add(u, product, d1))


@inline
def _shift_of_two(exp_avg_sq, rule):  # type: ignore[no-untyped-def]
    """``_shift`` with e_2 = 0, both fractions multiplied out: one division less."""
    root = cast(math.sqrt(exp_avg_sq), exp_avg_sq)
    sum_ = rule.c + root
    above = rule.weight * multiply_add(rule.d1 - rule.e1, root, sum_)
    below = multiply_add(sum_, multiply_add(rule.d1, root, sum_), -rule.e1 * root * root)
    return cast(0.0, root) if root == math.inf else above / below


def caught_up(missed: Any, param: Any, exp_avg: Any, exp_avg_sq: Any) -> Any:
    """An element's weight and moments after what it missed; None: it missed nothing."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(caught_up)
def _caught_up(missed, param, exp_avg, exp_avg_sq):  # type: ignore[no-untyped-def]
    if missed == types.none:
        return lambda missed, param, exp_avg, exp_avg_sq: (param, exp_avg, exp_avg_sq)
    if missed.instance_class is _Decay:
        return lambda missed, param, exp_avg, exp_avg_sq: (
            param + missed.decay * param,
            exp_avg,
            exp_avg_sq,
        )
    return lambda missed, param, exp_avg, exp_avg_sq: (
        param + (missed.decay * param - exp_avg * _shift(exp_avg_sq, missed)),
        _normal_or_zero(exp_avg * missed.beta1_power),
        exp_avg_sq * missed.beta2_power,
    )


@jit
def replay_row(row, work, last_step, dim, param_tag, tag, log):  # type: ignore[no-untyped-def]
    """Catch up a row by each missed step, from its addresses into ``work``.

    Args:
        row: addresses of weights, exp_avg and exp_avg_sq.
        work: the address of room for the three, [3, dim] of the moments' type.
        last_step: the step of the row's last update.
        dim: elements.
        param_tag: of weights.
        tag: of moments.
        log: what there is to replay.
    """
    param = view(work, dim, tag)
    exp_avg = view(work + dim * param.itemsize, dim, tag)
    exp_avg_sq = view(work + 2 * dim * param.itemsize, dim, tag)
    for j in range(dim):
        param[j] = load(row[0], j, param_tag, PARAM)
        exp_avg[j] = load(row[1], j, tag, EXP_AVG)
        exp_avg_sq[j] = load(row[2], j, tag, EXP_AVG_SQ)
    last_moving = min(log.t, last_step + log.window)
    for number in range(last_step - log.first, last_moving - log.first):
        step = log.steps + number * (8 * STEP_WIDTH)
        decay = cast(at(step, 0, FLOAT64), tag)
        step_size = cast(at(step, 1, FLOAT64), tag)
        inv_sqrt_correction2 = cast(at(step, 2, FLOAT64), tag)
        eps = cast(at(step, 3, FLOAT64), tag)
        beta1, beta2 = cast(at(step, 4, FLOAT64), tag), cast(at(step, 5, FLOAT64), tag)
        for j in range(dim):
            m, v = exp_avg[j] * beta1, exp_avg_sq[j] * beta2
            exp_avg[j], exp_avg_sq[j] = m, v
            denom = cast(math.sqrt(v), tag) * inv_sqrt_correction2 + eps
            param[j] -= step_size * m / denom + decay * param[j]
    tail = log.tails + 16 * (last_step - log.first)
    is_past = last_moving < log.t
    tail_decay = cast(at(tail, 0, FLOAT64) if is_past else 0.0, tag)
    beta2_power = cast(at(tail, 1, FLOAT64) if is_past else 1.0, tag)
    for j in range(dim):
        param[j] += tail_decay * param[j]
        exp_avg[j] = cast(0.0, tag) if is_past else _normal_or_zero(exp_avg[j])
        exp_avg_sq[j] *= beta2_power


@inline
def store_row(row, work, dim, param_tag, tag):  # type: ignore[no-untyped-def]
    """Move a row from ``work`` to its addresses; see ``replay_row``."""
    param = view(work, dim, tag)
    for j in range(dim):
        store(row[0], j, param[j], param_tag, PARAM)
    row_bytes = dim * param.itemsize
    copy_bytes(row[1], work + row_bytes, row_bytes)
    copy_bytes(row[2], work + 2 * row_bytes, row_bytes)


@jit
def _fill_tails(steps, first_number, tails):  # type: ignore[no-untyped-def]
    """What steps behind the window do to a row, by the first of them.

    Args:
        steps: address of ``Missed.steps``.
        first_number: number of the first step there that tails are of.
        tails: [n, 2] float64: row i becomes the product of 1 - decay, less 1, and that of beta2,
            over the steps from number ``first_number`` + i on.
    """
    decay, beta2_power = 0.0, 1.0
    for i in range(tails.shape[0] - 1, -1, -1):
        step = steps + (first_number + i) * (8 * STEP_WIDTH)
        decay -= at(step, 0, FLOAT64) * (1.0 + decay)
        beta2_power *= at(step, 5, FLOAT64)
        tails[i, 0] = decay
        tails[i, 1] = beta2_power


# ---------------------------------------------------------------- tables


def make_tails(missed: Missed, untouched: str) -> np.ndarray[Any, Any]:
    """The array that ``Log.tails`` is the address of; the caller keeps it."""
    count = missed.t - missed.first - missed.window if untouched == "replay" else 0
    tails = np.empty((max(count, 0), 2))
    if count > 0:
        _fill_tails(missed.steps.data_ptr(), missed.window, tails)
    return tails


def log_numbers(missed: Missed, tails: np.ndarray[Any, Any], last_step: Any) -> tuple[int, ...]:
    """The fields of ``Log`` but its tag."""
    return (
        missed.t,
        missed.first,
        missed.window,
        missed.rules.data_ptr(),
        missed.factors.data_ptr(),
        missed.steps.data_ptr(),
        address_of(tails),
        last_step.addresses_at(),
        last_step.block_size(),
        reciprocal_of(last_step.block_size()),
    )


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


@inline
def prefetch_row_turn(ahead, first, tags):  # type: ignore[no-untyped-def]
    """Ask for elements [first, first + TURN) of weights and moments of a row that comes.

    ``ahead`` names their addresses; the first tags are of weights and of moments.
    """
    prefetch_turn(ahead.param, first, tags[0])
    prefetch_turn(ahead.exp_avg, first, tags[1])
    prefetch_turn(ahead.exp_avg_sq, first, tags[1])


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
    whole = dim & -TURN
    for first in range(0, whole, TURN):
        prefetch_row_turn(ahead, first, tags)
        for j in range(first, first + TURN):
            _move_element(target, place, j, missed, tags)
    if whole < dim:
        prefetch_row_turn(ahead, whole, tags)
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
    table = _Table(
        Log(TAGS_OF[lagging.untouched], *log_numbers(lagging.missed, tails, lagging.last_step)),
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
    values = torch.empty(rows.numel(), param.dim, dtype=param.dtype, device="cpu")
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
