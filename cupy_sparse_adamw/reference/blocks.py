"""Moving rows in and out of a table's blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .._slots import Slot


def by_block(
    slot: Slot, rows: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each block [block_size, D], which of ``rows`` [N] lie in it (bool [N]), and where in it.

    ``MISSING`` lies in none.
    """
    block_of = rows.div(slot.block_size(), rounding_mode="floor")
    for number, block in enumerate(slot.values()):
        here = block_of == number
        yield block, here, rows[here] - number * slot.block_size()


def gather(slot: Slot, rows: torch.Tensor) -> torch.Tensor:
    """Copies of the named rows.

    Args:
        slot: weights or moments of width D.
        rows: [N] int64, in range or ``MISSING``, which reads as zeros.

    Returns:
        values [N, D] of the slot's dtype.
    """
    values = torch.zeros(rows.numel(), slot.dim, dtype=slot.dtype, device=slot.device)
    for block, here, places in by_block(slot, rows):
        values[here] = block[places]
    return values


class Write(NamedTuple):
    """Values [n, D] for distinct places [n] of a block [block_size, D]."""

    block: torch.Tensor
    places: torch.Tensor
    values: torch.Tensor

    def do(self) -> None:
        """Takes no memory, so that all of several writes are done or none."""
        self.block.index_copy_(0, self.places, self.values)


def writes_of(slot: Slot, rows: torch.Tensor, values: torch.Tensor) -> list[Write]:
    """What ``scatter_`` with the same arguments does, none of it done yet."""
    # Of a row that is named twice index_copy_ would keep any value.
    rows, index_of = torch.unique(rows, return_inverse=True)
    order = torch.arange(index_of.numel(), device=rows.device)
    last = torch.zeros_like(rows).scatter_reduce_(0, index_of, order, "amax")
    return [
        Write(block, places, values[last[here]].to(slot.dtype))
        for block, here, places in by_block(slot, rows)
    ]


def scatter_(slot: Slot, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Overwrite the named rows; of a row that is named twice the last value stays.

    Args:
        slot: changed in place.
        rows: [N] int64, in range or ``MISSING``, whose value goes nowhere.
        values: [N, D], converted to the slot's dtype.
    """
    for write in writes_of(slot, rows, values):
        write.do()
