"""Which ids a shard of a table holds, by the rule by which RecIS writes and loads checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from ._checks import require_ids, require_int

#: RecIS's number of key classes.
SLICE_SIZE = 65536


class Slice:
    """The ids whose remainder, divided by ``slice_size``, is in [slice_begin, slice_end).

    The remainder is that of the id as an unsigned 64-bit word: id −1 counts as 2**64 − 1. So does
    RecIS where it loads a checkpoint, and where it partitions a batch on a GPU. (On the CPU RecIS
    1.0.0 partitions by the id's absolute value: negative ids go to shards that do not load them.)

    Args:
        slice_beg: the first remainder; ``slice_begin`` as an attribute, both as in RecIS.
        slice_end: one more than the last.
        slice_size: the divisor.

    Raises:
        TypeError: an argument is no int.
        ValueError: not 0 ≤ slice_beg < slice_end ≤ slice_size < 2**63.
    """

    def __init__(self, slice_beg: int, slice_end: int, slice_size: int) -> None:
        self.slice_begin = require_int("slice_beg", slice_beg, 0)
        self.slice_end = require_int("slice_end", slice_end, 1)
        self.slice_size = require_int("slice_size", slice_size, 1)
        if not self.slice_begin < self.slice_end <= self.slice_size < 2**63:
            raise ValueError(
                f"a slice must have 0 <= slice_beg < slice_end <= slice_size < 2**63, got {self}; "
                f"gen_slice(shard_index, shard_num) makes those of equal shards"
            )

    def contains(self, ids: torch.Tensor) -> torch.Tensor:
        """Which ids belong to the slice. Does not wait for a GPU.

        With children these are the ids before ``encode_id``. Encoded ids give the same where
        ``slice_size`` is a power of two up to 2**52, as RecIS's is.

        Args:
            ids: int64 or int32 of any shape.

        Returns:
            A bool tensor of that shape on that device.

        Raises:
            TypeError: ids are no integers.
        """
        ids = require_ids(ids).long()
        remainder = ids.remainder(self.slice_size)  # in [0, slice_size) for negative ids too
        # As a word, a negative id is greater by 2**64. What that adds is taken from below 0, since
        # adding could overflow.
        wrapped = remainder - (self.slice_size - 2**64 % self.slice_size)
        wrapped = torch.where(wrapped < 0, wrapped + self.slice_size, wrapped)
        remainder = torch.where(ids < 0, wrapped, remainder)
        return (remainder >= self.slice_begin) & (remainder < self.slice_end)

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Slice):
            return NotImplemented
        return vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"Slice({self.slice_begin}, {self.slice_end}, {self.slice_size})"


def gen_slice(shard_index: int = 0, shard_num: int = 1, slice_size: int = SLICE_SIZE) -> Slice:
    """The slice of one of ``shard_num`` shards. Together they hold every id once.

    Slices are equally wide; if ``slice_size`` leaves a remainder, the first are wider by 1.

    Raises:
        TypeError: an argument is no int.
        ValueError: not 0 ≤ shard_index < shard_num ≤ slice_size < 2**63.
    """
    index = require_int("shard_index", shard_index, 0)
    shards = require_int("shard_num", shard_num, 1)
    size = require_int("slice_size", slice_size, 1)
    if index >= shards:
        raise ValueError(f"shard_index must be from 0 to shard_num - 1 = {shards - 1}, got {index}")
    if shards > size:
        raise ValueError(
            f"shard_num must be at most slice_size = {size}, got {shards}: a shard would hold no "
            f"ids; use a larger slice_size in all shards"
        )
    width, wider = divmod(size, shards)
    begin = index * width + min(index, wider)
    return Slice(begin, begin + width + (index < wider), size)
