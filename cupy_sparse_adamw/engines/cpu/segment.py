"""Group pending gradients by row: one packed word per gradient row, sorted by row.

A word is ``key << position_bits | position``: the key numbers a row among all rows of the group's
tables, the position is the gradient's place in the order of occurrence. Sorted words therefore
list each row's gradients as one *run*, in order. No table is scanned and no gradient moves.

The sort is a radix sort whose first digit is the highest: it deals the words into buckets that fit
a core's cache, where the remaining digits are sorted. A batch that is already in order, like a
coalesced gradient, is not sorted. Memory: two words (16 bytes) a gradient row.
"""

from __future__ import annotations

import collections
import dataclasses
from array import array
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..._checks import row_error
from ..._types import MISSING, Pending
from ._compile import INT64, LINE, at, inline, jit, last_at_most, prefetch, view
from ._threads import cuts, num_parts, parallel_for

#: Runs longer than this are summed in chunks of this length, by all threads, then combined in
#: order. It is part of the definition of a row's sum: chunks count from the run's start.
CHUNK = 2048
#: Words a thread sorts at the least.
GRAIN = 16384
#: Words per bucket to aim at, and the first digit's bits at most: so many places are written to in
#: turn, and each of them should stay in cache.
BUCKET_BITS = 9
FIRST_DIGIT_BITS = 8
#: The later digits' bits at most: their counters should leave room for the words in cache.
DIGIT_BITS = 10
#: Columns of ``Segments.tables`` and ``Segments.pieces``; both are searched by the first.
FIRST_KEY, FIRST_PIECE, DROP_MISSING, TABLE_WIDTH = range(4)
START, ROWS, TABLE, GRADS, ROW_STRIDE, COLUMN_STRIDE, PIECE_WIDTH = range(7)
#: Fewer words than this are sorted by insertion.
FEW = 32
#: Buffers kept for later steps: a step takes one per group of tables.
MAX_BUFFERS = 4
#: A buffer serves a batch that is so many times smaller than it, or smaller than LITTLE words.
MAX_SPARE = 8
LITTLE = 1 << 16

_free_buffers: collections.deque[np.ndarray] = collections.deque(maxlen=MAX_BUFFERS)


class _Buffer:
    """Room for words, which goes back into ``_free_buffers`` when nobody has this any more.

    Buffers go round, since a fresh page costs more than it takes to sort the words in it. Groups
    take them in the order in which they put them back. One that does not fit is let go.
    """

    words: np.ndarray | None = None

    def __init__(self, words: np.ndarray) -> None:
        self.words = words

    # By default arguments: at the interpreter's end a module's names are gone.
    def __del__(self, put_back: Callable[[np.ndarray], None] = _free_buffers.append) -> None:
        if self.words is not None:
            put_back(self.words)


def _free_words(size: int) -> np.ndarray:
    """At least ``size`` words that nobody uses, for a ``_Buffer``."""
    while _free_buffers:
        try:
            words = _free_buffers.popleft()
        except IndexError:  # another thread was faster
            break
        if size <= words.size <= max(MAX_SPARE * size, LITTLE):
            return words
    return np.empty(size, dtype=np.int64)


@dataclasses.dataclass
class Segments:
    """The gradients of one group (one dtype, one D), sorted by row.

    Attributes:
        pending: the group's tables, in order; it keeps the gradients' memory alive.
        words: [N] int64, sorted.
        position_bits: low bits of a word that hold the position.
        num_kept: how many words are not of dropped gradients, which come last.
        tables: [T + 1, TABLE_WIDTH] int64: each table's first key and first piece, and whether its
            missing rows are dropped.
        pieces: [P + 1, PIECE_WIDTH] int64: each piece's first position, the address of its rows,
            its table, and the address, row stride and column stride (elements) of its gradients.
        long_runs: [K, 3] int64: begin, end, first chunk of each run longer than ``CHUNK``.
        partials: [chunks, D] float64, room for the sums of the chunks of all long runs.
        buffer: what the words are in.
    """

    pending: Sequence[Pending]
    dim: int
    grad_dtype: torch.dtype
    words: np.ndarray
    position_bits: int
    num_kept: int
    tables: array[int]
    pieces: array[int]
    long_runs: np.ndarray
    partials: np.ndarray
    buffer: _Buffer


@jit
def _make_words(  # type: ignore[no-untyped-def]
    part, begin, end, words, position_bits, num_keys, tables, pieces, num_pieces, digit_shift,
    counts,
):  # fmt: skip
    """Fill words [begin, end) and count their first digits; tables and pieces are addresses.

    Returns:
        The first position whose row is out of range, or -1 if there is none and the words ascend,
        or -2.
    """
    count = counts[part]
    count[:] = 0
    ascending = True
    last = np.int64(-1)
    piece = last_at_most(begin, pieces, PIECE_WIDTH, num_pieces)
    position = begin
    while position < end:
        while position >= at(pieces, PIECE_WIDTH * (piece + 1) + START, INT64):
            piece += 1
        here = pieces + 8 * PIECE_WIDTH * piece
        start, stop = at(here, START, INT64), min(at(here, PIECE_WIDTH + START, INT64), end)
        rows = view(at(here, ROWS, INT64), stop - start, INT64)
        table = tables + 8 * TABLE_WIDTH * at(here, TABLE, INT64)
        first_key, drop_missing = at(table, FIRST_KEY, INT64), at(table, DROP_MISSING, INT64) != 0
        num_rows = at(table, TABLE_WIDTH + FIRST_KEY, INT64) - first_key
        for place in range(position - start, stop - start):
            row = rows[place]
            key = first_key + row
            if row < 0 or row >= num_rows:
                if row != MISSING or not drop_missing:
                    return start + place
                key = num_keys
            word = (key << position_bits) | (start + place)
            words[start + place] = word
            count[word >> digit_shift] += 1
            ascending &= word > last
            last = word
        position = stop
    return -1 if ascending else -2


@jit
def _find_places(counts, starts):  # type: ignore[no-untyped-def]
    """Fill ``starts`` with where each bucket begins.

    ``counts`` [parts, digits] become the places where each part deals its words of each bucket to.
    """
    place = np.int64(0)
    for digit in range(counts.shape[1]):
        starts[digit] = place
        for part in range(counts.shape[0]):
            count = counts[part, digit]
            counts[part, digit] = place
            place += count
    starts[counts.shape[1]] = place


@jit
def _deal(part, begin, end, words, digit_shift, places, target):  # type: ignore[no-untyped-def]
    """Move words [begin, end) to the buckets of their first digits, keeping their order."""
    place = places[part]
    next_line = target.ctypes.data + LINE
    for i in range(begin, end):
        digit = words[i] >> digit_shift
        target[place[digit]] = words[i]
        prefetch(next_line + 8 * place[digit])  # or the first word in it would wait for it
        place[digit] += 1
    return 0


@inline
def _sort_few(words):  # type: ignore[no-untyped-def]
    for i in range(1, words.size):
        word = words[i]
        k = i
        while k > 0 and words[k - 1] > word:
            words[k] = words[k - 1]
            k -= 1
        words[k] = word


@inline
def _sort_bucket(words, scratch, low_bit, high_bit, places):  # type: ignore[no-untyped-def]
    """Stable radix sort by bits [low_bit, high_bit), from below; ``scratch`` is as large."""
    size = words.size
    digit_bits = 4
    while digit_bits < DIGIT_BITS and size >> digit_bits:
        digit_bits += 1
    passes = (high_bit - low_bit + digit_bits - 1) // digit_bits
    for i in range(passes):
        shift = low_bit + (high_bit - low_bit) * i // passes
        digits = 1 << (low_bit + (high_bit - low_bit) * (i + 1) // passes - shift)
        places[:digits] = 0
        for k in range(size):
            places[(words[k] >> shift) & (digits - 1)] += 1
        place = np.int64(0)
        for digit in range(digits):
            count = places[digit]
            places[digit] = place
            place += count
        for k in range(size):
            digit = (words[k] >> shift) & (digits - 1)
            scratch[places[digit]] = words[k]
            places[digit] += 1
        words, scratch = scratch, words
    if passes & 1:
        scratch[:] = words


@jit
def _sort_buckets(  # type: ignore[no-untyped-def]
    part, begin, end, words, scratch, position_bits, digit_shift, bucket_starts
):
    """Sort the buckets that begin in [begin, end)."""
    places = np.empty(1 << DIGIT_BITS, dtype=np.int64)
    bucket = np.searchsorted(bucket_starts, begin)
    while bucket < bucket_starts.size - 1 and bucket_starts[bucket] < end:
        start, stop = bucket_starts[bucket], bucket_starts[bucket + 1]
        if stop - start <= FEW:
            _sort_few(words[start:stop])
        else:
            _sort_bucket(words[start:stop], scratch[start:stop], position_bits, digit_shift, places)
        bucket += 1
    return 0


@jit
def _find_long_runs(words, position_bits, num_keys, runs):  # type: ignore[no-untyped-def]
    """Fill ``runs`` [K, 3], see ``Segments.long_runs``.

    A run longer than CHUNK covers a multiple of CHUNK, so only those positions are looked at.

    Returns:
        How many words are kept, how many runs are long, and the chunks of all of them.
    """
    num_kept = np.searchsorted(words, num_keys << position_bits)
    count = chunks = end = 0
    for i in range(0, num_kept, CHUNK):
        if i < end:
            continue  # still in the run before
        key = words[i] >> position_bits
        begin = np.searchsorted(words, key << position_bits)
        end = np.searchsorted(words, (key + 1) << position_bits)
        if end - begin > CHUNK:
            runs[count, 0] = begin
            runs[count, 1] = end
            runs[count, 2] = chunks
            count += 1
            chunks += (end - begin + CHUNK - 1) // CHUNK
    return num_kept, count, chunks


def _describe(pending: Sequence[Pending]) -> tuple[list[int], list[int]]:
    """``Segments.tables`` and ``Segments.pieces``."""
    tables: list[int] = []
    pieces: list[int] = []
    first_key = first_piece = start = 0
    for number, table in enumerate(pending):
        tables += (first_key, first_piece, table.drop_missing)
        first_key += table.count_rows()
        first_piece += len(table.pieces)
        for piece in table.pieces:
            indices, grad = piece.indices, piece.grad
            pieces += (start, indices.data_ptr(), number, grad.data_ptr(), *grad.stride())
            start += indices.numel()
    tables += (first_key, first_piece, 0)
    pieces += (start, 0, len(pending), 0, 0, 0)
    return tables, pieces


def _error_at(pending: Sequence[Pending], position: int) -> IndexError:
    """What to raise for the row of the gradient at a position."""
    for table in pending:
        for piece in table.pieces:
            if position < piece.indices.numel():
                return row_error(table.name, int(piece.rows[position]), table.count_rows())
            position -= piece.indices.numel()
    raise AssertionError("no gradient is at that position")


def _sort(
    words: np.ndarray, scratch: np.ndarray, low_bit: int, shift: int, counts: np.ndarray
) -> np.ndarray:
    """Sort words by bits from ``low_bit`` on.

    ``counts`` [parts, digits] are of ``>> shift``; they are used up.
    """
    if words.size <= FEW:
        words.sort()
        return words
    parts, digits = counts.shape
    starts = np.empty(digits + 1, dtype=np.int64)
    _find_places(counts, starts)
    if digits > 1:
        parallel_for(_deal, words.size, parts, words, shift, counts, scratch)
        words, scratch = scratch, words
    parallel_for(_sort_buckets, words.size, parts, words, scratch, low_bit, shift, starts)
    return words


def segment(pending: Sequence[Pending]) -> Segments:
    """Sort the gradients of tables that share dtype and D by row. Writes to no table.

    Raises:
        IndexError: a row is outside its table; the text names both.
        OverflowError: rows of all tables times gradient rows exceed 2**63.
    """
    tables, pieces = _describe(pending)
    num_keys, size = tables[FIRST_KEY - TABLE_WIDTH], pieces[START - PIECE_WIDTH]
    position_bits = max(size - 1, 0).bit_length()
    key_bits = num_keys.bit_length()
    if position_bits + key_bits > 63:
        raise OverflowError(
            f"{num_keys} rows and {size} gradient rows in one step are more than one sort key "
            f"can hold; use tables of another width or dtype, or smaller batches"
        )
    digit_bits = min(max(position_bits - BUCKET_BITS, 0), FIRST_DIGIT_BITS, key_bits)
    digit_shift = position_bits + key_bits - digit_bits
    parts = num_parts(size, GRAIN)
    room = _free_words(2 * size)
    buffer = _Buffer(room)
    words, scratch = room[:size], room[size : 2 * size]
    counts = np.empty((parts, 1 << digit_bits), dtype=np.int64)
    table_array, piece_array = array("q", tables), array("q", pieces)
    found = parallel_for(
        _make_words,
        size,
        parts,
        words,
        position_bits,
        num_keys,
        table_array.buffer_info()[0],
        piece_array.buffer_info()[0],
        len(pieces) // PIECE_WIDTH - 1,
        digit_shift,
        counts,
    )
    for position in found:
        if position >= 0:
            raise _error_at(pending, position)
    inner_cuts = cuts(size, parts)[1:-1]
    if -2 in found or any(words[cut - 1] > words[cut] for cut in inner_cuts):
        words = _sort(words, scratch, position_bits, digit_shift, counts)
    long_runs = np.empty((size // CHUNK, 3), dtype=np.int64)
    num_kept, num_long_runs, num_chunks = _find_long_runs(words, position_bits, num_keys, long_runs)
    first_grad = pending[0].pieces[0].grad
    return Segments(
        pending=pending,
        dim=first_grad.shape[1],
        grad_dtype=first_grad.dtype,
        words=words,
        position_bits=position_bits,
        num_kept=num_kept,
        tables=table_array,
        pieces=piece_array,
        long_runs=long_runs[:num_long_runs],
        # Taken here, since no table has been written to yet: it is all that grows with the batch.
        partials=np.empty((num_chunks, first_grad.shape[1])),
        buffer=buffer,
    )
