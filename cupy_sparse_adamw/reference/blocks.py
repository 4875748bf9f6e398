"""Moving rows in and out of a table's blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .._slots import Slot
from .._types import MISSING


def by_block(
    slot: Slot, rows: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each block [block_size, D] with some of ``rows`` [N], which (bool [N]), and where in it.

    ``MISSING`` lies in none.
    """
    blocks = slot.values()
    block_of = rows.div(slot.block_size(), rounding_mode="floor")
    for number in block_of[rows != MISSING].unique().tolist():
        here = block_of == number
        yield blocks[number], here, rows[here] - number * slot.block_size()


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


def writes_of(
    slot: Slot, rows: torch.Tensor, values: torch.Tensor
) -> list[Callable[[], torch.Tensor]]:
    """What overwrites the named rows, all but done.

    On the CPU calling a result takes no memory, so that all of several are done or none.

    Args:
        slot: weights, moments, or what counts a row's steps.
        rows: [N] int64, distinct, in range.
        values: [N, D], converted to the slot's dtype.
    """
    return [
        partial(block.index_copy_, 0, places, values[here].to(slot.dtype))
        for block, here, places in by_block(slot, rows)
    ]


def scatter_(slot: Slot, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Overwrite the named rows; of a row that is named twice the last value stays.

    One by one, which takes no memory: what failed is undone by this.

    Args:
        slot: changed in place.
        rows: [N] int64, in range or ``MISSING``, whose value goes nowhere.
        values: [N, D] of the slot's dtype.
    """
    blocks = slot.values()
    for row, value in zip(rows.tolist(), values, strict=True):
        if row != MISSING:
            blocks[row // slot.block_size()][row % slot.block_size()] = value
