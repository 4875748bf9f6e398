"""The fused update: each run of sorted gradients is summed and applied in one pass.

Per touched row: each of its gradients is read once from where backward left it; weights and
moments are read once and written once; the sum stays in a thread's buffer. Sums are float64, so
they are exact for all practical purposes and their order hardly shows; the order is fixed all the
same (SPEC §1): occurrences in order, in chunks of ``CHUNK`` counted from the run's start.

Rows and gradients lie scattered in memory, so what the loop will need ``AHEAD`` sorted positions
later is asked for early.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..._types import MOMENT_DTYPE, Pending, Update
from ._compile import FLOAT64, INT64, TAGS, at, cast, jit, load, prefetch, store, view
from ._threads import num_parts, parallel_for
from .segment import CHUNK, Segments, segment

#: Gradient elements a thread takes at the least.
GRAIN_ELEMENTS = 32768
#: Sorted positions between asking for a row and using it.
AHEAD = 16


class _Grads(NamedTuple):
    """``Segments`` for kernels; see there. Arrays are addresses, which cost nothing to pass on."""

    words: int
    num_words: int
    position_bits: int
    num_keys: int
    first_keys: int
    piece_starts: int
    pieces: int
    num_pieces: int
    long_runs: int
    num_long_runs: int
    partials: int  # [chunks, D] float64: sums of the chunks of long runs
    itemsize: int
    tag: Any


class _Tables(NamedTuple):
    """Where the tables of a group are, and the scalars of their update, as addresses."""

    rows: int  # [T, 4] int64: block size, then each slot's address of its block addresses
    scalars: int  # [T, 8] float64, see _scalars
    param_itemsize: int
    moment_itemsize: int
    param_tag: Any
    moment_tag: Any


@jit
def _key(grads, i):  # type: ignore[no-untyped-def]
    return at(grads.words, i, INT64) >> grads.position_bits


@jit
def _is_head(grads, i):  # type: ignore[no-untyped-def]
    """Does a run begin at sorted position i?"""
    return i == 0 or _key(grads, i - 1) != _key(grads, i)


@jit
def _first_head(grads, begin, end):  # type: ignore[no-untyped-def]
    """The first run that begins in [begin, end): one that began before is the part before's."""
    while begin < end and not _is_head(grads, begin):
        begin += 1
    return begin


@jit
def _run_end(grads, begin):  # type: ignore[no-untyped-def]
    end = begin + 1
    while end < grads.num_words and not _is_head(grads, end):
        end += 1
    return end


@jit
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


@jit
def _piece(grads, i):  # type: ignore[no-untyped-def]
    """Number of the piece that holds the gradient at sorted position i, and its place there."""
    position = at(grads.words, i, INT64) & ((1 << grads.position_bits) - 1)
    piece = _last_at_most(position, grads.piece_starts, 1, grads.num_pieces)
    return piece, position - at(grads.piece_starts, piece, INT64)


@jit
def _table_and_row(grads, i):  # type: ignore[no-untyped-def]
    """What the gradient at sorted position i belongs to."""
    piece, _ = _piece(grads, i)
    table = at(grads.pieces, 4 * piece, INT64)
    return table, _key(grads, i) - at(grads.first_keys, table, INT64)


@jit
def _grad_address(grads, i):  # type: ignore[no-untyped-def]
    """Address and column stride of the gradient at sorted position i."""
    piece, place = _piece(grads, i)
    first = at(grads.pieces, 4 * piece + 1, INT64)
    row_stride = at(grads.pieces, 4 * piece + 2, INT64)
    return first + place * row_stride * grads.itemsize, at(grads.pieces, 4 * piece + 3, INT64)


@jit
def _prefetch_row(address, row_bytes):  # type: ignore[no-untyped-def]
    for offset in range(0, row_bytes, 64):
        prefetch(address + offset)


@jit
def _prefetch_grad(grads, i, dim):  # type: ignore[no-untyped-def]
    if i < grads.num_words:
        address, _ = _grad_address(grads, i)
        _prefetch_row(address, dim * grads.itemsize)


@jit
def _sum_run(total, grads, begin, end):  # type: ignore[no-untyped-def]
    """Sum the gradients at sorted positions [begin, end), in order, into total [D] float64."""
    dim = total.size
    total[:] = 0.0
    for i in range(begin, end):
        _prefetch_grad(grads, i + AHEAD, dim)
        address, stride = _grad_address(grads, i)
        if stride == 1:
            grad = view(address, dim, grads.tag)
            for j in range(dim):
                total[j] += load(grad, j)
        else:
            grad = view(address, (dim - 1) * stride + 1, grads.tag)
            for j in range(dim):
                total[j] += load(grad, j * stride)


@jit
def _sum_chunks(part, begin, end, grads, dim):  # type: ignore[no-untyped-def]
    """Fill the partial sums of chunks [begin, end) of the long runs."""
    for chunk in range(begin, end):
        run = _last_at_most(chunk, grads.long_runs + 16, 3, grads.num_long_runs)
        number = chunk - at(grads.long_runs, 3 * run + 2, INT64)
        start = at(grads.long_runs, 3 * run, INT64) + number * CHUNK
        stop = min(start + CHUNK, at(grads.long_runs, 3 * run + 1, INT64))
        _sum_run(view(grads.partials + chunk * dim * 8, dim, FLOAT64), grads, start, stop)
    return 0


@jit
def _sum_whole_run(total, grads, begin, end):  # type: ignore[no-untyped-def]
    """Sum a run into total [D]: straight, or its chunks' sums in order if it is long."""
    if end - begin <= CHUNK:
        _sum_run(total, grads, begin, end)
        return
    dim = total.size
    run = _last_at_most(begin, grads.long_runs, 3, grads.num_long_runs)
    first = at(grads.long_runs, 3 * run + 2, INT64)
    total[:] = 0.0
    for chunk in range(first, first + (end - begin + CHUNK - 1) // CHUNK):
        partial = view(grads.partials + chunk * dim * 8, dim, FLOAT64)
        for j in range(dim):
            total[j] += partial[j]


@jit
def _row_addresses(tables, table, row, dim):  # type: ignore[no-untyped-def]
    """Where a row's weights, exp_avg and exp_avg_sq are."""
    block_size = at(tables.rows, 4 * table, INT64)
    block = row // block_size
    place = (row - block * block_size) * dim
    params = at(tables.rows, 4 * table + 1, INT64)
    exp_avgs = at(tables.rows, 4 * table + 2, INT64)
    exp_avg_sqs = at(tables.rows, 4 * table + 3, INT64)
    return (
        at(params, block, INT64) + place * tables.param_itemsize,
        at(exp_avgs, block, INT64) + place * tables.moment_itemsize,
        at(exp_avg_sqs, block, INT64) + place * tables.moment_itemsize,
    )


@jit
def _prefetch_table_row(grads, tables, i, dim):  # type: ignore[no-untyped-def]
    """Ask for what the run that begins at sorted position i, if any, will update."""
    if _is_head(grads, i) and _key(grads, i) < grads.num_keys:
        table, row = _table_and_row(grads, i)
        param, exp_avg, exp_avg_sq = _row_addresses(tables, table, row, dim)
        _prefetch_row(param, dim * tables.param_itemsize)
        _prefetch_row(exp_avg, dim * tables.moment_itemsize)
        _prefetch_row(exp_avg_sq, dim * tables.moment_itemsize)


@jit
def _update_row(  # type: ignore[no-untyped-def]
    param, exp_avg, exp_avg_sq, grad, grad_scale, scalars, moment_tag
):
    """SPEC §1 for one row [D]; ``grad`` is the only gradient or the sum of several."""
    one_minus_beta1 = cast(scalars[0], moment_tag)
    one_minus_beta2 = cast(scalars[1], moment_tag)
    step_size = cast(scalars[2], moment_tag)  # lr / (1 - beta1^t)
    inv_sqrt_correction2 = cast(scalars[3], moment_tag)  # 1 / sqrt(1 - beta2^t)
    eps = cast(scalars[4], moment_tag)
    decay = cast(scalars[5], moment_tag)  # lr * weight_decay
    for j in range(param.size):
        g = cast(load(grad, j) * grad_scale, moment_tag)
        m = exp_avg[j] + one_minus_beta1 * (g - exp_avg[j])
        v = exp_avg_sq[j] + one_minus_beta2 * (g * g - exp_avg_sq[j])
        exp_avg[j] = m
        exp_avg_sq[j] = v
        w = load(param, j)
        denom = cast(math.sqrt(v), moment_tag) * inv_sqrt_correction2 + eps
        store(param, j, w - (step_size * m / denom + decay * w))


@jit
def _update_runs(part, begin, end, grads, tables, totals):  # type: ignore[no-untyped-def]
    """Update the rows whose runs begin in [begin, end); ``totals`` [parts, D] is scratch."""
    total = totals[part]
    dim = total.size
    i = _first_head(grads, begin, end)
    while i < end and _key(grads, i) < grads.num_keys:  # dropped gradients sort last
        stop = _run_end(grads, i)
        for k in range(i + AHEAD, min(stop + AHEAD, end)):
            _prefetch_table_row(grads, tables, k, dim)

        table, row = _table_and_row(grads, i)
        addresses = _row_addresses(tables, table, row, dim)
        param = view(addresses[0], dim, tables.param_tag)
        exp_avg = view(addresses[1], dim, tables.moment_tag)
        exp_avg_sq = view(addresses[2], dim, tables.moment_tag)
        scalars = view(tables.scalars + table * 64, 8, FLOAT64)
        grad_scale = scalars[6] / (stop - i) if scalars[7] != 0.0 else scalars[6]

        address, stride = _grad_address(grads, i)
        if stop == i + 1 and stride == 1:  # the usual case: a gradient that needs no buffer
            _prefetch_grad(grads, i + AHEAD, dim)
            grad = view(address, dim, grads.tag)
            _update_row(param, exp_avg, exp_avg_sq, grad, grad_scale, scalars, tables.moment_tag)
        else:
            _sum_whole_run(total, grads, i, stop)
            _update_row(param, exp_avg, exp_avg_sq, total, grad_scale, scalars, tables.moment_tag)
        i = stop
    return 0


@jit
def _count_runs(part, begin, end, grads):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(begin, end):
        if _is_head(grads, i) and _key(grads, i) < grads.num_keys:
            count += 1
    return count


@jit
def _store_sums(  # type: ignore[no-untyped-def]
    part, begin, end, grads, scale, mean, totals, places, rows, values
):
    """Rows and sums of one table's runs that begin in [begin, end), from ``places[part]`` on."""
    total = totals[part]
    dim = total.size
    place = places[part]
    values = view(values, rows.size * dim, grads.tag)
    i = _first_head(grads, begin, end)
    while i < end and _key(grads, i) < grads.num_keys:
        stop = _run_end(grads, i)
        _sum_whole_run(total, grads, i, stop)
        rows[place] = _key(grads, i)
        for j in range(dim):
            store(values, place * dim + j, total[j] * (scale / (stop - i) if mean else scale))
        place += 1
        i = stop
    return 0


def _with_chunks_summed(segments: Segments, partials: np.ndarray) -> _Grads:
    """The kernels' view of segments, the chunks of long runs summed by all threads."""
    grads = _Grads(
        segments.words.ctypes.data,
        segments.words.size,
        segments.position_bits,
        segments.num_keys,
        segments.first_keys.ctypes.data,
        segments.piece_starts.ctypes.data,
        segments.pieces.ctypes.data,
        len(segments.pieces),
        segments.long_runs.ctypes.data,
        len(segments.long_runs),
        partials.ctypes.data,
        segments.grad_dtype.itemsize,
        TAGS[segments.grad_dtype],
    )
    if len(partials):
        parts = num_parts(len(partials), 1)
        parallel_for(_sum_chunks, len(partials), parts, grads, segments.dim)
    return grads


def _scalars(update: Update) -> tuple[float, ...]:
    """What the update of a table needs, in double precision; see ``_update_row``."""
    hyper, pending = update.hyper, update.pending
    lr, t = float(hyper.lr), update.step.item() + 1
    return (
        1.0 - hyper.beta1,
        1.0 - hyper.beta2,
        lr / (1.0 - hyper.beta1**t),
        1.0 / math.sqrt(1.0 - hyper.beta2**t),
        hyper.eps,
        lr * hyper.weight_decay,
        pending.grad_scale,
        float(pending.mean),
    )


def sparse_adamw_(updates: Sequence[Update], segments: Segments) -> None:
    """Apply one AdamW step to the rows that ``segments`` names, then advance each table's t.

    Args:
        updates: the tables of one group (one dtype, one D), in the order of ``segments``.
        segments: their gradients, from ``segment``.
    """
    dtype = updates[0].pending.param.dtype
    moment_dtype = MOMENT_DTYPE[dtype]
    slots = [(u.pending.param, u.exp_avg, u.exp_avg_sq) for u in updates]
    rows = np.array(
        [(s[0].block_size(), *(slot.addresses().ctypes.data for slot in s)) for s in slots],
        dtype=np.int64,
    )
    scalars = np.array([_scalars(update) for update in updates])
    tables = _Tables(
        rows.ctypes.data,
        scalars.ctypes.data,
        dtype.itemsize,
        moment_dtype.itemsize,
        TAGS[dtype],
        TAGS[moment_dtype],
    )
    size = segments.words.size
    parts = num_parts(size, GRAIN_ELEMENTS // segments.dim)
    totals = np.empty((parts, segments.dim))
    partials = np.empty((segments.num_chunks, segments.dim))
    grads = _with_chunks_summed(segments, partials)
    parallel_for(_update_runs, size, parts, grads, tables, totals)
    for update in updates:
        update.step.add_(1)


def coalesce(pending: Pending) -> tuple[torch.Tensor, torch.Tensor]:
    """The touched rows of one table and the sums of their gradients.

    Returns:
        rows [U] int64, ascending, and values [U, D] of the gradients' dtype.
    """
    segments = segment([pending])
    partials = np.empty((segments.num_chunks, segments.dim))
    grads = _with_chunks_summed(segments, partials)
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
        np.empty((parts, segments.dim)),
        np.cumsum([0, *counts[:-1]]),
        rows,
        values.data_ptr(),
    )
    return torch.from_numpy(rows), values
