"""Memory for the rows of tables: a large piece lies on huge pages where the system has them.

Rows of a large table lie far apart, so on pages of 4 KiB each has an address translation of its own
to wait for (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence

import torch

#: Bytes from which on huge pages are asked for: two of them, so that one at least lies within.
LARGE = 1 << 22


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.empty``, on huge pages once it is written to if it is large and the system has them.

    Whoever asks for it fills all of it: a huge page takes 2 MiB at the first touch.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    madvise = _madvise()
    if madvise is not None and tensor.device.type == "cpu" and tensor.nbytes >= LARGE:
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        begin += -begin % mmap.PAGESIZE
        end -= end % mmap.PAGESIZE
        madvise(begin, end - begin)  # an advice: where it is not taken, pages are small
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int], int] | None:
    """Ask for huge pages at (address, bytes); None where the system has no such call."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone has it
    if advice is None:
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return lambda address, size: int(madvise(address, size, advice))
