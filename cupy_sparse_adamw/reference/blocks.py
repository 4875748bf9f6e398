"""Moving rows in and out of a table's blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._slots import Slot
from .._types import MISSING


def by_block(
    slot: Slot, rows: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each block [block_size, D], which of ``rows`` [N] lie in it (bool [N]), and where in it."""
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


def scatter_(slot: Slot, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Overwrite the named rows; of a row that is named twice the last value stays.

    Args:
        slot: changed in place.
        rows: [N] int64, in range or ``MISSING``, whose value goes nowhere.
        values: [N, D] of the slot's dtype.
    """
    blocks = slot.values()
    for row, value in zip(rows.tolist(), values, strict=True):
        if row != MISSING:
            blocks[row // slot.block_size()][row % slot.block_size()] = value
