"""Rows that are behind, brought up to date outside of a step: ``cuda_src/untouched.cu``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..._types import Lagging
from . import _interop
from ._compile import blocks_for, launch, log_lanes, untouched_variant, widest_vec
from ._group import DIVISOR, MISSED, block_table, divisor, missed_fields, slots_are_aligned

#: Threads per block.
THREADS = 128
LAGGING = np.dtype(
    [
        ("num_rows", "i8"),
        ("block_rows", DIVISOR),
        ("param", "i8"),
        ("exp_avg", "i8"),
        ("exp_avg_sq", "i8"),
        ("missed", MISSED),
    ]
)


def _slots(lagging: Lagging) -> list[Any]:
    """Those that are read; in mode "decay" there need be no others."""
    if lagging.untouched == "decay":
        return [lagging.param]
    return [lagging.param, lagging.exp_avg, lagging.exp_avg_sq]


def _launch(name: str, lagging: Lagging, rows: torch.Tensor, *values: torch.Tensor) -> None:
    """Run a kernel of untouched.cu.

    Raises:
        RuntimeError: under capture; a replay would not know what rows have missed since.
    """
    param, slots = lagging.param, _slots(lagging)
    if _interop.is_capturing(param.device):
        untouched = "decay" if lagging.untouched == "decay" else "dense"
        raise RuntimeError(
            f"rows of a table with untouched={untouched!r} cannot be brought up to date within a "
            f"CUDA graph capture, since the host counts its steps; look them up outside of it, or "
            f"use untouched='skip'"
        )
    vec = widest_vec(param.dtype)
    if param.dim % vec or not slots_are_aligned(slots, vec):
        vec = 1
    addresses = [block_table(slot).data_ptr() for slot in slots]
    addresses += [0] * (3 - len(slots))
    missed = missed_fields(lagging.missed, lagging.last_step)
    struct = (param.num_rows(), divisor(param.block_size()), *addresses, missed)
    size, lanes = rows.numel(), log_lanes(-(-param.dim // vec))
    args = (
        np.array(struct, dtype=LAGGING),
        rows.contiguous(),
        *values,
        np.int64(size),
        np.int64(param.dim),
        np.int32(lanes),
    )
    variant = untouched_variant(param.dtype, vec, lagging.untouched)
    launch(param.device, variant, name, blocks_for(size << lanes, THREADS), THREADS, args)


def gather_current(lagging: Lagging, rows: torch.Tensor) -> torch.Tensor:
    """Copies of the named rows, brought up to date. Writes to no table; does not wait.

    Args:
        lagging: the table.
        rows: [N] int64, in range or ``MISSING``, which reads as zeros.

    Returns:
        values [N, D] of the weights' dtype.

    Raises:
        RuntimeError: under CUDA graph capture.
    """
    param = lagging.param
    values = torch.empty(rows.numel(), param.dim, dtype=param.dtype, device=param.device)
    _launch("gather_current", lagging, rows, values)
    return values


def catch_up_(lagging: Lagging, rows: torch.Tensor) -> None:
    """Bring the named rows up to date in place. Does not wait.

    Args:
        lagging: weights, moments and last steps are changed; in mode "decay" no moments.
        rows: [N] int64, which may repeat; ``MISSING`` and rows out of range are passed over.

    Raises:
        RuntimeError: under CUDA graph capture.
    """
    _launch("catch_up", lagging, rows)
