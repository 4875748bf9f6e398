"""A step's gradients as kernels see them, and the sums of those that belong to one row.

Sums are float64, so they are exact for all practical purposes and their order hardly shows; the
order is fixed all the same (SPEC §1): occurrences in order, in chunks of ``CHUNK`` counted from
the run's start. Each gradient is read once, from where backward left it.
"""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..._types import Pending
from ._compile import (
    CONVERTS_HALF,
    FLOAT64,
    INT64,
    TAGS,
    TURN,
    VALUES,
    address_of,
    at,
    compiled_overload,
    in_whole_turns,
    inline,
    itemsize_of,
    jit,
    last_at_most,
    load,
    numbers_at,
    prefetch_bytes,
    prefetch_rest,
    prefetch_turn,
    store,
    view,
)
from ._threads import num_parts, parallel_for
from .segment import (
    CHUNK,
    COLUMN_STRIDE,
    FIRST_KEY,
    FIRST_PIECE,
    GRADS,
    PIECE_WIDTH,
    ROW_STRIDE,
    START,
    TABLE_WIDTH,
    Segments,
    segment,
)

#: Gradient elements a thread takes at the least.
GRAIN_ELEMENTS = 32768
#: Sorted positions, for gradients, and rows between asking for one and using it: ``Grads.ahead``,
#: at least and at most. Between those, so many bytes: an eighth of a small second-level cache.
MIN_AHEAD, MAX_AHEAD = 4, 16
BYTES_AHEAD = 1 << 16


class Grads(NamedTuple):
    """``Segments`` in kernels; see there. Arrays are addresses, which cost nothing to pass on.

    Kernels get its numbers at an address (``grads_of``): Numba would unbox a tuple field by field,
    at every call.
    """

    words: int
    position_bits: int
    num_kept: int
    tables: int
    num_tables: int
    pieces: int
    long_runs: int
    num_long_runs: int
    partials: int  # [chunks, D] float64: sums of the chunks of long runs
    dim: int
    ahead: int
    tag: Any


#: Numbers of ``Grads``, without its tag.
GRADS_WIDTH = len(Grads._fields) - 1


class Pieces(NamedTuple):
    """Where one table's gradients are."""

    end: int  # of its sorted positions
    first: int
    num: int
    # of the first piece, if it is the only one
    base: int  # the address of position 0, as it were
    row_bytes: int
    column_stride: int
    contiguous: bool  # whether all column strides are 1


@inline
def grads_of(numbers, tag):  # type: ignore[no-untyped-def]
    """``Grads`` from the address of all but the tag."""
    return Grads(*numbers_at(numbers, GRADS_WIDTH, INT64), tag)  # type: ignore[call-arg]


@inline
def _word(grads, i):  # type: ignore[no-untyped-def]
    return at(grads.words, i, INT64)


@inline
def key_at(grads, i):  # type: ignore[no-untyped-def]
    """The key of the row that the gradient at sorted position i belongs to."""
    return _word(grads, i) >> grads.position_bits


@inline
def _is_head(grads, i):  # type: ignore[no-untyped-def]
    """Does a run begin at sorted position i?"""
    return i == 0 or key_at(grads, i - 1) != key_at(grads, i)


@inline
def run_end_of(grads, begin):  # type: ignore[no-untyped-def]
    """Where the run ends that sorted position ``begin`` is in."""
    key, end = key_at(grads, begin), begin + 1
    while end < grads.num_kept and key_at(grads, end) == key:
        end += 1
    return end


@inline
def next_head(grads, i):  # type: ignore[no-untyped-def]
    """Where the first run begins that begins at i or later; ``num_kept`` if none does."""
    if i >= grads.num_kept:
        return grads.num_kept
    return i if _is_head(grads, i) else run_end_of(grads, i)


@inline
def table_at(grads, i):  # type: ignore[no-untyped-def]
    """The number of the table that the gradient at sorted position i belongs to."""
    return last_at_most(key_at(grads, i), grads.tables, TABLE_WIDTH, grads.num_tables)


@inline
def first_key_of(grads, number):  # type: ignore[no-untyped-def]
    """The key of a table's first row."""
    return at(grads.tables, TABLE_WIDTH * number + FIRST_KEY, INT64)


@inline
def _piece(grads, piece, column):  # type: ignore[no-untyped-def]
    return at(grads.pieces, PIECE_WIDTH * piece + column, INT64)


@inline
def pieces_of(grads, number, i):  # type: ignore[no-untyped-def]
    """``Pieces`` of a table; sorted position i is one of its."""
    last_word = (first_key_of(grads, number + 1) << grads.position_bits) - 1
    end = i + 1 + last_at_most(last_word, grads.words + 8 * i, 1, grads.num_kept - i)
    first = at(grads.tables, TABLE_WIDTH * number + FIRST_PIECE, INT64)
    count = at(grads.tables, TABLE_WIDTH * (number + 1) + FIRST_PIECE, INT64) - first
    contiguous = True
    for piece in range(first, first + count):
        contiguous &= _piece(grads, piece, COLUMN_STRIDE) == 1
    row_bytes = _piece(grads, first, ROW_STRIDE) * itemsize_of(grads.tag)
    return Pieces(
        end,
        first,
        count,
        _piece(grads, first, GRADS) - _piece(grads, first, START) * row_bytes,
        row_bytes,
        _piece(grads, first, COLUMN_STRIDE),
        contiguous,
    )


@inline
def grad_at(grads, i, pieces):  # type: ignore[no-untyped-def]
    """Address and column stride of the gradient at sorted position i."""
    position = _word(grads, i) & ((1 << grads.position_bits) - 1)
    if pieces.num == 1:
        return pieces.base + position * pieces.row_bytes, pieces.column_stride
    starts = grads.pieces + 8 * PIECE_WIDTH * pieces.first
    piece = pieces.first + last_at_most(position, starts, PIECE_WIDTH, pieces.num)
    row_bytes = _piece(grads, piece, ROW_STRIDE) * itemsize_of(grads.tag)
    address = _piece(grads, piece, GRADS) + (position - _piece(grads, piece, START)) * row_bytes
    return address, _piece(grads, piece, COLUMN_STRIDE)


@inline
def grad_ahead(grads, i, pieces):  # type: ignore[no-untyped-def]
    """What to ask for while the gradient at sorted position i is used: the address of another."""
    address, _ = grad_at(grads, min(i + grads.ahead, pieces.end - 1), pieces)
    return address


@inline
def prefetch_grads(grads, begin, end, pieces):  # type: ignore[no-untyped-def]
    """Ask for the gradients at sorted positions [begin, end)."""
    for i in range(begin, min(end, pieces.end)):
        address, _ = grad_at(grads, i, pieces)
        prefetch_bytes(address, grads.dim * itemsize_of(grads.tag))


@inline
def _add_strided(total, address, stride, tag):  # type: ignore[no-untyped-def]
    """``_add`` where a gradient's columns are apart; rare enough not to ask for any."""
    for j in range(total.size):
        total[j] += load(address, j * stride, tag, VALUES)


@intrinsic
def _add_vectors(typingctx, total, addresses, first, tag):  # type: ignore[no-untyped-def]
    """``_add_element`` of elements [first, first + TURN) as vector code."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        def pointer_to(address, tag):  # type: ignore[no-untyped-def]
            element = context.get_value_type(tag)
            array = builder.inttoptr(address, element.as_pointer())
            return builder.bitcast(builder.gep(array, [args[2]]), vector(element).as_pointer())

        def vector(element):  # type: ignore[no-untyped-def]
            return ir.VectorType(element, TURN)

        target = pointer_to(args[0], types.float64)
        result = builder.load(target, align=8)
        for address in cgutils.unpack_tuple(builder, args[1]):
            grad = builder.load(pointer_to(address, tag), align=tag.bitwidth // 8)
            if tag == types.uint16:
                grad = builder.bitcast(grad, vector(ir.HalfType()))
            if tag == types.int16:
                words = vector(ir.IntType(32))
                wide = builder.shl(builder.zext(grad, words), words([16] * TURN))
                grad = builder.bitcast(wide, vector(ir.FloatType()))
            if tag != types.float64:
                grad = builder.fpext(grad, vector(ir.DoubleType()))
            result = builder.fadd(result, grad)
        builder.store(result, target, align=8)
        return context.get_dummy_value()

    return types.void(types.int64, addresses, types.int64, tag), codegen


@inline
def _add_element(total, addresses, j, tag):  # type: ignore[no-untyped-def]
    """Add element j of each gradient to total [D] float64, one after the other."""
    sum_ = total[j]
    for address in addresses:
        sum_ += load(address, j, tag, VALUES)
    total[j] = sum_


def _add_turn(total: Any, addresses: Any, first: int, tag: Any) -> None:
    """``_add_element`` of elements [first, first + TURN).

    LLVM makes scalar code of a loop with so little in it, so this is written as vector code.
    """
    raise NotImplementedError("only inside compiled code")


@compiled_overload(_add_turn)
def _add_turn_in(total, addresses, first, tag):  # type: ignore[no-untyped-def]
    if tag != types.uint16 or CONVERTS_HALF:

        def vectors(total, addresses, first, tag):  # type: ignore[no-untyped-def]
            _add_vectors(total.ctypes.data, addresses, first, tag)

        return vectors

    def elements(total, addresses, first, tag):  # type: ignore[no-untyped-def]
        for j in range(first, first + TURN):
            _add_element(total, addresses, j, tag)

    return elements


@inline
def _add(total, addresses, ahead, tag):  # type: ignore[no-untyped-def]
    """Add gradients to total [D] float64, in order, and ask for as many others, line by line."""
    whole = in_whole_turns(total.size)
    for first in range(0, whole, TURN):
        for address in ahead:
            prefetch_turn(address, first, tag)
        _add_turn(total, addresses, first, tag)
    if whole < total.size:
        for address in ahead:
            prefetch_rest(address, whole, total.size, tag)
    for j in range(whole, total.size):
        _add_element(total, addresses, j, tag)


@inline
def _sum_chunk(total, begin, end, grads, pieces):  # type: ignore[no-untyped-def]
    """Sum the gradients at sorted positions [begin, end), in order, into total [D] float64."""
    total[:] = 0.0
    i = begin
    while i < end:
        address, stride = grad_at(grads, i, pieces)
        if i + 4 <= end and pieces.contiguous:
            second, _ = grad_at(grads, i + 1, pieces)
            third, _ = grad_at(grads, i + 2, pieces)
            fourth, _ = grad_at(grads, i + 3, pieces)
            ahead = (
                grad_ahead(grads, i, pieces),
                grad_ahead(grads, i + 1, pieces),
                grad_ahead(grads, i + 2, pieces),
                grad_ahead(grads, i + 3, pieces),
            )
            _add(total, (address, second, third, fourth), ahead, grads.tag)
            i += 4
        elif i + 2 <= end and pieces.contiguous:
            second, _ = grad_at(grads, i + 1, pieces)
            coming = grad_ahead(grads, i, pieces), grad_ahead(grads, i + 1, pieces)
            _add(total, (address, second), coming, grads.tag)
            i += 2
        elif stride == 1:
            _add(total, (address,), (grad_ahead(grads, i, pieces),), grads.tag)
            i += 1
        else:
            _add_strided(total, address, stride, grads.tag)
            i += 1


@jit
def _sum_chunks(part, begin, end, numbers, tag):  # type: ignore[no-untyped-def]
    """Fill the partial sums of chunks [begin, end) of the long runs."""
    grads = grads_of(numbers, tag)
    for chunk in range(begin, end):
        run = last_at_most(chunk, grads.long_runs + 16, 3, grads.num_long_runs)
        number = chunk - at(grads.long_runs, 3 * run + 2, INT64)
        start = at(grads.long_runs, 3 * run, INT64) + number * CHUNK
        stop = min(start + CHUNK, at(grads.long_runs, 3 * run + 1, INT64))
        partial = view(grads.partials + chunk * grads.dim * 8, grads.dim, FLOAT64)
        _sum_chunk(partial, start, stop, grads, pieces_of(grads, table_at(grads, start), start))
    return 0


@inline
def _sum_partials(total, begin, end, grads):  # type: ignore[no-untyped-def]
    """Sum a long run into total [D] float64: its chunks' sums, in order."""
    run = last_at_most(begin, grads.long_runs, 3, grads.num_long_runs)
    first = at(grads.long_runs, 3 * run + 2, INT64)
    total[:] = 0.0
    for chunk in range(first, first + (end - begin + CHUNK - 1) // CHUNK):
        partial = grads.partials + chunk * grads.dim * 8
        _add(total, (partial,), (partial + 8 * grads.dim,), FLOAT64)


@jit  # called, not compiled in: the loop that mostly has no use for it runs better without
def sum_run(total, begin, end, scale, grads, pieces):  # type: ignore[no-untyped-def]
    """The sum of a run times ``scale``, into total [D] float64."""
    if end - begin > CHUNK:
        _sum_partials(total, begin, end, grads)
    else:
        _sum_chunk(total, begin, end, grads, pieces)
    if scale != 1.0:
        total *= scale


@jit
def _count_runs(part, begin, end, numbers, tag):  # type: ignore[no-untyped-def]
    grads = grads_of(numbers, tag)
    count = 0
    for i in range(begin, min(end, grads.num_kept)):
        count += _is_head(grads, i)
    return count


@jit
def _store_sums(  # type: ignore[no-untyped-def]
    part, begin, end, numbers, tag, scale, mean, places, rows, values
):
    """Rows and sums of one table's runs that begin in [begin, end), from ``places[part]`` on."""
    grads = grads_of(numbers, tag)
    total = np.empty(grads.dim)
    place = places[part]
    pieces = pieces_of(grads, 0, 0)
    i, stop = next_head(grads, begin), next_head(grads, end)
    while i < stop:
        run_end = run_end_of(grads, i)
        sum_run(total, i, run_end, scale / (run_end - i) if mean else scale, grads, pieces)
        rows[place] = key_at(grads, i)
        for j in range(grads.dim):
            store(values, place * grads.dim + j, total[j], grads.tag, VALUES)
        place += 1
        i = run_end
    return 0


def with_chunks_summed(segments: Segments) -> tuple[array[int], tuple[int, Any]]:
    """The numbers of ``Grads``, which are to be kept, and what ``grads_of`` takes.

    The chunks of long runs have been summed by all threads then.
    """
    itemsize, partials = segments.grad_dtype.itemsize, segments.partials
    fields = (
        address_of(segments.words),
        segments.position_bits,
        segments.num_kept,
        segments.tables.buffer_info()[0],
        len(segments.pending),
        segments.pieces.buffer_info()[0],
        address_of(segments.long_runs),
        len(segments.long_runs),
        address_of(partials),
        segments.dim,
        min(max(BYTES_AHEAD // (4 * segments.dim * itemsize), MIN_AHEAD), MAX_AHEAD),
    )
    numbers = array("q", fields)
    args = numbers.buffer_info()[0], TAGS[segments.grad_dtype]
    if len(partials):
        parallel_for(_sum_chunks, len(partials), num_parts(len(partials), 1), *args)
    return numbers, args


def coalesce(pending: Pending) -> tuple[torch.Tensor, torch.Tensor]:
    """The touched rows of one table and the sums of their gradients.

    Returns:
        rows [U] int64, ascending, and values [U, D] of the gradients' dtype.
    """
    segments = segment([pending])
    _kept, args = with_chunks_summed(segments)
    size = segments.words.size
    parts = num_parts(size, GRAIN_ELEMENTS // segments.dim)
    counts = parallel_for(_count_runs, size, parts, *args)
    rows = np.empty(sum(counts), dtype=np.int64)
    values = torch.empty(rows.size, segments.dim, dtype=segments.grad_dtype, device="cpu")
    parallel_for(
        _store_sums,
        size,
        parts,
        *args,
        pending.grad_scale,
        pending.mean,
        np.cumsum([0, *counts[:-1]]),
        rows,
        values.data_ptr(),
    )
    return torch.from_numpy(rows), values
