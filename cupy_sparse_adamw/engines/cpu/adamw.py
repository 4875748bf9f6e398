"""The fused update: each run of sorted gradients is summed and applied in one pass.

Per touched row: each of its gradients is read once from where backward left it; weights and
moments are read once and written once; the sum stays in a thread's buffer. Sums are float64, so
they are exact for all practical purposes and their order hardly shows; the order is fixed all the
same (SPEC §1): occurrences in order, in chunks of ``CHUNK`` counted from the run's start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..._types import MOMENT_DTYPE, Pending, Update
from ._compile import INT64, TAGS, cast, jit, load, prefetch, row_address, store, view
from ._threads import num_parts, parallel_for
from .segment import CHUNK, Segments, segment

#: Gradient elements a thread takes at the least.
GRAIN_ELEMENTS = 32768
#: Rows of weights, moments and gradients asked for this many sorted positions ahead.
AHEAD = 16


@jit
def _piece_of(piece_starts, position):  # type: ignore[no-untyped-def]
    low, high = 0, piece_starts.size - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if position >= piece_starts[middle]:
            low = middle
        else:
            high = middle
    return low


@jit
def _grad_address(piece_starts, pieces, position, grad_bytes):  # type: ignore[no-untyped-def]
    piece = _piece_of(piece_starts, position)
    offset = (position - piece_starts[piece]) * pieces[piece, 2]
    return pieces[piece, 1] + offset * grad_bytes, pieces[piece, 3], pieces[piece, 0]


@jit
def _prefetch_row(address, row_bytes):  # type: ignore[no-untyped-def]
    for offset in range(0, row_bytes, 64):
        prefetch(address + offset)


@jit
def _sum_run(  # type: ignore[no-untyped-def]
    total, begin, end, words, position_mask, piece_starts, pieces, grad_bytes, grad_tag
):
    """Sum the gradients at sorted positions [begin, end), in order, into total [D] float64."""
    dim = total.size
    total[:] = 0.0
    for i in range(begin, end):
        position = words[i] & position_mask
        address, stride, _ = _grad_address(piece_starts, pieces, position, grad_bytes)
        if i + AHEAD < end:
            ahead = words[i + AHEAD] & position_mask
            following, _, _ = _grad_address(piece_starts, pieces, ahead, grad_bytes)
            _prefetch_row(following, dim * grad_bytes)
        if stride == 1:
            grad = view(address, dim, grad_tag)
            for j in range(dim):
                total[j] += load(grad, j)
        else:
            grad = view(address, (dim - 1) * stride + 1, grad_tag)
            for j in range(dim):
                total[j] += load(grad, j * stride)


@jit
def _sum_chunks(  # type: ignore[no-untyped-def]
    part, begin, end, partials, long_runs, words, position_mask, piece_starts, pieces,
    grad_bytes, grad_tag,
):  # fmt: skip
    """Sums of chunks [begin, end) of the long runs."""
    for chunk in range(begin, end):
        run = np.searchsorted(long_runs[:, 2], chunk, side="right") - 1
        start = long_runs[run, 0] + (chunk - long_runs[run, 2]) * CHUNK
        stop = min(start + CHUNK, long_runs[run, 1])
        _sum_run(
            partials[chunk], start, stop, words, position_mask, piece_starts, pieces,
            grad_bytes, grad_tag,
        )  # fmt: skip
    return 0


@jit
def _run_end(words, begin, position_bits):  # type: ignore[no-untyped-def]
    key = words[begin] >> position_bits
    end = begin + 1
    while end < words.size and words[end] >> position_bits == key:
        end += 1
    return end


@jit
def _first_head(words, begin, end, position_bits):  # type: ignore[no-untyped-def]
    """The first run that begins in [begin, end): one that began before is the part before's."""
    while 0 < begin < end and words[begin] >> position_bits == words[begin - 1] >> position_bits:
        begin += 1
    return begin


@jit
def _sum_whole_run(  # type: ignore[no-untyped-def]
    total, begin, end, partials, long_runs, words, position_mask, piece_starts, pieces,
    grad_bytes, grad_tag,
):  # fmt: skip
    """Sum a run into total [D]: straight, or its chunks' sums in order if it is long."""
    if end - begin <= CHUNK:
        _sum_run(
            total, begin, end, words, position_mask, piece_starts, pieces, grad_bytes, grad_tag
        )
        return
    run = np.searchsorted(long_runs[:, 0], begin)
    first = long_runs[run, 2]
    total[:] = 0.0
    for chunk in range(first, first + (end - begin + CHUNK - 1) // CHUNK):
        for j in range(total.size):
            total[j] += partials[chunk, j]


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
def _update_runs(  # type: ignore[no-untyped-def]
    part, begin, end, words, position_bits, first_keys, piece_starts, pieces, tables, scalars,
    long_runs, partials, totals, param_bytes, moment_bytes, grad_bytes,
    param_tag, moment_tag, grad_tag,
):  # fmt: skip
    """Update the rows whose runs begin in [begin, end)."""
    position_mask = (1 << position_bits) - 1
    num_keys = first_keys[first_keys.size - 1]
    total = totals[part]
    dim = total.size
    i = _first_head(words, begin, end, position_bits)
    while i < end:
        key = words[i] >> position_bits
        if key >= num_keys:  # dropped gradients sort last
            break
        stop = _run_end(words, i, position_bits)
        position = words[i] & position_mask
        address, stride, table = _grad_address(piece_starts, pieces, position, grad_bytes)

        if i + AHEAD < end and words[i + AHEAD] >> position_bits < num_keys:
            ahead = words[i + AHEAD]
            following, _, owner = _grad_address(
                piece_starts, pieces, ahead & position_mask, grad_bytes
            )
            _prefetch_row(following, dim * grad_bytes)
            row = (ahead >> position_bits) - first_keys[owner]
            for slot, size in ((1, param_bytes), (2, moment_bytes), (3, moment_bytes)):
                blocks = view(tables[owner, slot], 1, INT64)
                _prefetch_row(row_address(blocks, tables[owner, 0], row, dim * size), dim * size)

        row, block_size = key - first_keys[table], tables[table, 0]
        params = view(tables[table, 1], 1, INT64)
        exp_avgs = view(tables[table, 2], 1, INT64)
        exp_avg_sqs = view(tables[table, 3], 1, INT64)
        param = view(row_address(params, block_size, row, dim * param_bytes), dim, param_tag)
        exp_avg = view(row_address(exp_avgs, block_size, row, dim * moment_bytes), dim, moment_tag)
        exp_avg_sq = view(
            row_address(exp_avg_sqs, block_size, row, dim * moment_bytes), dim, moment_tag
        )
        scale = scalars[table, 6]
        if scalars[table, 7] != 0.0:
            scale /= stop - i
        if stop == i + 1 and stride == 1:
            grad = view(address, dim, grad_tag)
            _update_row(param, exp_avg, exp_avg_sq, grad, scale, scalars[table], moment_tag)
        else:
            _sum_whole_run(
                total, i, stop, partials, long_runs, words, position_mask, piece_starts, pieces,
                grad_bytes, grad_tag,
            )  # fmt: skip
            _update_row(param, exp_avg, exp_avg_sq, total, scale, scalars[table], moment_tag)
        i = stop
    return 0


@jit
def _count_runs(part, begin, end, words, position_bits, num_keys):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(begin, end):
        key = words[i] >> position_bits
        if key < num_keys and (i == 0 or words[i - 1] >> position_bits != key):
            count += 1
    return count


@jit
def _store_sums(  # type: ignore[no-untyped-def]
    part, begin, end, words, position_bits, num_keys, piece_starts, pieces, scales, means,
    long_runs, partials, totals, grad_bytes, rows, values_address, first_keys, firsts,
    value_tag, grad_tag,
):  # fmt: skip
    """Rows and sums of the runs that begin in [begin, end), from place ``firsts[part]`` on."""
    position_mask = (1 << position_bits) - 1
    total = totals[part]
    dim = total.size
    values = view(values_address, rows.size * dim, value_tag)
    place = firsts[part]
    i = _first_head(words, begin, end, position_bits)
    while i < end:
        key = words[i] >> position_bits
        if key >= num_keys:
            break
        stop = _run_end(words, i, position_bits)
        _sum_whole_run(
            total, i, stop, partials, long_runs, words, position_mask, piece_starts, pieces,
            grad_bytes, grad_tag,
        )  # fmt: skip
        table = pieces[_piece_of(piece_starts, words[i] & position_mask), 0]
        scale = scales[table] / (stop - i) if means[table] else scales[table]
        rows[place] = key - first_keys[table]
        for j in range(dim):
            store(values, place * dim + j, cast(total[j] * scale, value_tag))
        place += 1
        i = stop
    return 0


def _partial_sums(segments: Segments) -> np.ndarray:
    """[chunks, D] float64: the sums of the chunks of long runs."""
    partials = np.empty((segments.num_chunks, segments.dim))
    if segments.num_chunks:
        parallel_for(
            _sum_chunks,
            segments.num_chunks,
            1,
            partials,
            segments.long_runs,
            segments.words,
            (1 << segments.position_bits) - 1,
            segments.piece_starts,
            segments.pieces,
            segments.grad_dtype.itemsize,
            TAGS[segments.grad_dtype],
        )
    return partials


def _scalars(update: Update) -> tuple[float, ...]:
    """What the update of a table needs, in double precision; see ``_update_row``."""
    hyper, pending = update.hyper, update.pending
    return (
        1.0 - hyper.beta1,
        1.0 - hyper.beta2,
        hyper.lr / (1.0 - hyper.beta1**update.step),
        1.0 / math.sqrt(1.0 - hyper.beta2**update.step),
        hyper.eps,
        hyper.lr * hyper.weight_decay,
        pending.grad_scale,
        float(pending.mean),
    )


def sparse_adamw_(updates: Sequence[Update], segments: Segments) -> None:
    """Apply one AdamW step to the rows that ``segments`` names. Nothing else is written.

    Args:
        updates: the tables of one group (one dtype, one D), in the order of ``segments``.
        segments: their gradients, from ``segment``.
    """
    dtype = updates[0].pending.param.dtype
    moment_dtype = MOMENT_DTYPE[dtype]
    size, dim = segments.words.size, segments.dim
    grain = max(1, GRAIN_ELEMENTS // dim)
    totals = np.empty((num_parts(size, grain), dim))
    scalars = np.array([_scalars(update) for update in updates])
    tables = np.array(
        [
            (
                u.pending.param.block_size(),
                u.pending.param.addresses().ctypes.data,
                u.exp_avg.addresses().ctypes.data,
                u.exp_avg_sq.addresses().ctypes.data,
            )
            for u in updates
        ],
        dtype=np.int64,
    )
    partials = _partial_sums(segments)
    parallel_for(
        _update_runs,
        size,
        grain,
        segments.words,
        segments.position_bits,
        segments.first_keys,
        segments.piece_starts,
        segments.pieces,
        tables,
        scalars,
        segments.long_runs,
        partials,
        totals,
        dtype.itemsize,
        moment_dtype.itemsize,
        segments.grad_dtype.itemsize,
        TAGS[dtype],
        TAGS[moment_dtype],
        TAGS[segments.grad_dtype],
    )


def coalesce(pending: Pending) -> tuple[torch.Tensor, torch.Tensor]:
    """The touched rows of one table and the sums of their gradients.

    Returns:
        rows [U] int64, ascending, and values [U, D] of the gradients' dtype.
    """
    segments = segment([pending])
    size, dim = segments.words.size, segments.dim
    grain = max(1, GRAIN_ELEMENTS // dim)
    counts = parallel_for(
        _count_runs, size, grain, segments.words, segments.position_bits, segments.num_keys
    )
    rows = np.empty(sum(counts), dtype=np.int64)
    values = torch.empty(rows.size, dim, dtype=segments.grad_dtype, device="cpu")
    parallel_for(
        _store_sums,
        size,
        grain,
        segments.words,
        segments.position_bits,
        segments.num_keys,
        segments.piece_starts,
        segments.pieces,
        np.array([pending.grad_scale]),
        np.array([pending.mean]),
        segments.long_runs,
        _partial_sums(segments),
        np.empty((len(counts), dim)),
        segments.grad_dtype.itemsize,
        rows,
        values.data_ptr(),
        segments.first_keys,
        np.cumsum([0, *counts[:-1]]),
        TAGS[segments.grad_dtype],
        TAGS[segments.grad_dtype],
    )
    return torch.from_numpy(rows), values
