"""torch tensors as NumPy arrays over the same memory, by DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def array_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory as an array: nothing is copied, and writes show on both sides.

    Args:
        tensor: on the CPU, contiguous, of a dtype that NumPy has. Kernels take rows of other
            dtypes (bfloat16) by address.
    """
    array = np.from_dlpack(tensor)
    if not array.flags.writeable:  # an older torch cannot say that its memory may be written
        array = tensor.numpy()
    return array
