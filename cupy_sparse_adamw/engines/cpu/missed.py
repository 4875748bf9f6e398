"""What a row missed since its last step, for kernels that read it or update it.

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
from numba import types

from ..._types import RULE_CHUNK, RULE_WIDTH, STEP_WIDTH, Missed
from ._compile import (
    EXP_AVG,
    EXP_AVG_SQ,
    FLOAT64,
    INT64,
    PARAM,
    address_of,
    at,
    block_of,
    cast,
    compiled_overload,
    copy_bytes,
    inline,
    jit,
    load,
    multiply_add,
    numbers_at,
    prefetch,
    store,
    view,
)

#: What a table does about missed steps -> tag.
TAGS_OF = {"skip": None, "decay": np.int8(0), "dense": np.int16(0), "replay": np.int32(0)}
#: The tags' types, by which code is chosen.
DECAY, DENSE, REPLAY = types.int8, types.int16, types.int32
#: Tag of an array of steps.
INT32 = np.int32(0)

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
    # The same as the weights', known to be so by the compiler: rows are divided by it once.
    block_size: int
    reciprocal: int  # of the block size


#: Numbers of a ``Log`` in memory: without its tag and the blocks' size.
LOG_WIDTH = len(Log._fields) - 3


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


def log_at(kind: Any, logs: int, number: int, block_size: int, reciprocal: int) -> Any:
    """The ``Log`` of a table, given its tag and the address of all tables' ``log_numbers``."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(log_at)
def _log_at(kind, logs, number, block_size, reciprocal):  # type: ignore[no-untyped-def]
    if kind == types.none:
        return lambda kind, logs, number, block_size, reciprocal: None

    def log(kind, logs, number, block_size, reciprocal):  # type: ignore[no-untyped-def]
        numbers = numbers_at(logs + number * (8 * LOG_WIDTH), LOG_WIDTH, INT64)
        return Log(kind, *numbers, block_size, reciprocal)  # type: ignore[call-arg]

    return log


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


def log_numbers(
    missed: Missed, tails: np.ndarray[Any, Any], last_step: Any
) -> tuple[int, int, int, int, int, int, int, int]:
    """The fields of ``Log`` but its tag and the blocks' size."""
    return (
        missed.t,
        missed.first,
        missed.window,
        missed.rules.data_ptr(),
        missed.factors.data_ptr(),
        missed.steps.data_ptr(),
        address_of(tails),
        last_step.addresses_at(),
    )
