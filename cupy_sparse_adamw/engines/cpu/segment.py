"""Group pending gradients by row: one packed word per gradient row, one stable radix sort.

A word is ``key << position_bits | position``: the key numbers a row among all rows of the group's
tables, the position is the gradient's place in the order of occurrence. Sorted words therefore
list each row's gradients as one *run*, in order. No table is scanned and no gradient moves.
Memory: two words (16 bytes) a gradient row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from ..._checks import row_error
from ..._types import MISSING, Pending
from ._compile import INT64, jit, view
from ._threads import num_parts, parallel_for

#: Runs longer than this are summed in chunks of this length, by all threads, then combined in
#: order. It is part of the definition of a row's sum: chunks count from the run's start.
CHUNK = 2048
#: Words a thread sorts at the least.
GRAIN = 16384
#: A digit's bits at most: 2,048 counters fill half of a 32-KiB level-one cache.
DIGIT_BITS = 11


@dataclasses.dataclass
class Segments:
    """The gradients of one group (one dtype, one D), sorted by row.

    Attributes:
        pending: the group's tables, in order; it keeps the gradients' memory alive.
        words: [N] int64, sorted.
        position_bits: low bits of a word that hold the position.
        num_keys: rows of all tables; the key of a dropped gradient, after every other.
        first_keys: [T + 1] int64, each table's first key.
        piece_starts: [P + 1] int64, each piece's first position.
        pieces: [P, 4] int64: table, address, row stride and column stride (elements).
        long_runs: [K, 3] int64: begin, end, first chunk of each run longer than ``CHUNK``.
        num_chunks: chunks of all long runs.
    """

    pending: Sequence[Pending]
    dim: int
    grad_dtype: torch.dtype
    words: np.ndarray
    position_bits: int
    num_keys: int
    first_keys: np.ndarray
    piece_starts: np.ndarray
    pieces: np.ndarray
    long_runs: np.ndarray
    num_chunks: int


@jit
def _make_words(  # type: ignore[no-untyped-def]
    part, begin, end, words, position_bits, num_keys, piece_starts, piece_table, rows_address,
    first_keys, drop_missing,
):  # fmt: skip
    """Fill words [begin, end). Returns the first position whose row is out of range, or -1."""
    piece = np.searchsorted(piece_starts, begin, side="right") - 1
    for position in range(begin, end):
        while position >= piece_starts[piece + 1]:
            piece += 1
        table = piece_table[piece]
        rows = view(rows_address[piece], piece_starts[piece + 1] - piece_starts[piece], INT64)
        row = rows[position - piece_starts[piece]]
        key = first_keys[table] + row
        if row < 0 or row >= first_keys[table + 1] - first_keys[table]:
            if row != MISSING or not drop_missing[table]:
                return position
            key = num_keys
        words[position] = (key << position_bits) | position
    return -1


@jit
def _count_digits(part, begin, end, words, shift, counts):  # type: ignore[no-untyped-def]
    mask = counts.shape[1] - 1
    count = counts[part]
    count[:] = 0
    for i in range(begin, end):
        count[(words[i] >> shift) & mask] += 1
    return 0


@jit
def _scatter_digits(part, begin, end, words, shift, places, target):  # type: ignore[no-untyped-def]
    mask = places.shape[1] - 1
    place = places[part]
    for i in range(begin, end):
        digit = (words[i] >> shift) & mask
        target[place[digit]] = words[i]
        place[digit] += 1
    return 0


def _sort(words: np.ndarray, low_bit: int, high_bit: int) -> np.ndarray:
    """Stable sort of non-negative words by bits [low_bit, high_bit): a radix sort from below."""
    if words.size <= 256:
        words.sort()  # positions make words distinct, so any sort of whole words is the stable one
        return words
    passes = -(-(high_bit - low_bit) // DIGIT_BITS)
    scratch = np.empty_like(words)
    parts = num_parts(words.size, GRAIN)
    for i in range(passes):
        shift = low_bit + (high_bit - low_bit) * i // passes
        bits = low_bit + (high_bit - low_bit) * (i + 1) // passes - shift
        counts = np.empty((parts, 1 << bits), dtype=np.int64)
        parallel_for(_count_digits, words.size, parts, words, shift, counts)
        ends = np.cumsum(counts.T.reshape(-1)).reshape(-1, parts).T  # by digit, then by part
        places = np.ascontiguousarray(ends - counts)
        parallel_for(_scatter_digits, words.size, parts, words, shift, places, scratch)
        words, scratch = scratch, words
    return words


def _long_runs(words: np.ndarray, position_bits: int, num_keys: int) -> tuple[np.ndarray, int]:
    """Runs longer than CHUNK: each covers a multiple of CHUNK, so only those are looked at."""
    runs: list[tuple[int, int, int]] = []
    chunks = 0
    keys_here = np.unique(words[::CHUNK] >> position_bits) if words.size > CHUNK else ()
    for key in keys_here:
        begin, end = np.searchsorted(words, [key << position_bits, (key + 1) << position_bits])
        if end - begin > CHUNK and key < num_keys:
            runs.append((int(begin), int(end), chunks))
            chunks += -(-int(end - begin) // CHUNK)
    return np.array(runs, dtype=np.int64).reshape(-1, 3), chunks


def segment(pending: Sequence[Pending]) -> Segments:
    """Sort the gradients of tables that share dtype and D by row. Writes to no table.

    Raises:
        IndexError: a row is outside its table; the text names both.
        OverflowError: rows of all tables times gradient rows exceed 2**63.
    """
    pieces = [(table, piece) for table, p in enumerate(pending) for piece in p.pieces]
    sizes = [piece.rows.numel() for _, piece in pieces]
    piece_starts = np.cumsum([0, *sizes], dtype=np.int64)
    first_keys = np.cumsum([0, *(p.count_rows() for p in pending)], dtype=np.int64)
    size, num_keys = int(piece_starts[-1]), int(first_keys[-1])
    position_bits = max(size - 1, 0).bit_length()
    key_bits = num_keys.bit_length()
    if position_bits + key_bits > 63:
        raise OverflowError(
            f"{num_keys} rows and {size} gradient rows in one step are more than one sort key "
            f"can hold; use tables of another width or dtype, or smaller batches"
        )
    table_numbers = np.array([table for table, _ in pieces], dtype=np.int64)
    words = np.empty(size, dtype=np.int64)
    bad = parallel_for(
        _make_words,
        size,
        num_parts(size, GRAIN),
        words,
        position_bits,
        num_keys,
        piece_starts,
        table_numbers,
        np.array([piece.rows.data_ptr() for _, piece in pieces], dtype=np.int64),
        first_keys,
        np.array([p.drop_missing for p in pending], dtype=np.bool_),
    )
    for position in bad:
        if position >= 0:
            number = int(np.searchsorted(piece_starts, position, side="right")) - 1
            table, piece = pieces[number]
            row = int(piece.rows[position - int(piece_starts[number])])
            raise row_error(pending[table].name, row, pending[table].count_rows())
    words = _sort(words, position_bits, position_bits + key_bits)
    long_runs, num_chunks = _long_runs(words, position_bits, num_keys)
    first_grad = pieces[0][1].grad
    return Segments(
        pending=pending,
        dim=first_grad.shape[1],
        grad_dtype=first_grad.dtype,
        words=words,
        position_bits=position_bits,
        num_keys=num_keys,
        first_keys=first_keys,
        piece_starts=piece_starts,
        pieces=np.array(
            [(t, p.grad.data_ptr(), *p.grad.stride()) for t, p in pieces], dtype=np.int64
        ),
        long_runs=long_runs,
        num_chunks=num_chunks,
    )
