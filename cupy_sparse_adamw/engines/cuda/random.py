"""Draws new rows from a counter, as every engine does; ``cuda_src/random.cuh`` has the formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..._slots import Slot
from ..._types import Distribution
from ._compile import THREADS, WARP, blocks_for, hash_table_variant, launch
from ._group import block_table, divisor_struct

PLAN = np.dtype(
    [
        ("start", "f8"),
        ("step", "f8"),
        ("loc", "f8"),
        ("scale", "f8"),
        ("least", "f8"),
        ("greatest", "f8"),
        ("seed", "i8"),
        ("normal", "i8"),
    ]
)


def plan_struct(distribution: Distribution, dtype: torch.dtype, seed: int) -> np.ndarray[Any, Any]:
    """``Plan`` as a kernel argument by value."""
    normal, *numbers = distribution.plan(dtype)
    return np.array((*numbers, seed, normal), dtype=PLAN)


def init_rows_(
    slot: Slot, rows: torch.Tensor, ids: torch.Tensor, seed: int, distribution: Distribution
) -> None:
    """Fill rows with the initial values of their ids.

    Args:
        slot: changed in place.
        rows: [n] int64, distinct, in range.
        ids: [n] int64, any values.
        seed: any int64.
        distribution: what each element is drawn from.
    """
    size = rows.numel()
    args = (
        block_table(slot),
        divisor_struct(slot.block_size()),
        np.int64(slot.dim),
        rows.contiguous(),
        ids.contiguous(),
        np.int64(size),
        plan_struct(distribution, slot.dtype, seed),
    )
    num_blocks = blocks_for(size * WARP, THREADS)
    launch(slot.device, hash_table_variant(slot.dtype), "init_rows", num_blocks, THREADS, args)
