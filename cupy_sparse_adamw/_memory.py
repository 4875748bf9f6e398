"""Memory for rows: a large piece lies on huge pages where the system has them.

Rows of a large table lie far apart, so on pages of 4 KiB each has an address translation of its own
to wait for (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import threading
from collections.abc import Callable, Sequence

import torch

#: Bytes from which on huge pages are asked for: two of them, so that one at least lies within.
LARGE = 1 << 22
#: Name of the threads that wait for memory to be moved.
MOVER = "cupy_sparse_adamw: huge pages"
#: Linux's advices: to use huge pages, and to move to them now (Linux 6.1). Python's mmap lacks the
#: second, and elsewhere both.
_HUGEPAGE, _COLLAPSE = 14, 25


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.empty``, on huge pages once it is written to if it is large and the system has them.

    Whoever asks for it fills all of it: a huge page takes 2 MiB at the first touch.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    _advise(tensor, _HUGEPAGE)
    return tensor


def move_to_huge_pages(tensor: torch.Tensor) -> None:
    """Have the system move memory in use to huge pages, if it is large. Addresses stay.

    That takes seconds a GB, so a thread waits for it, and holds the tensor until then; who reads or
    writes meanwhile notices nothing. Where it is not to be had, as on other systems and older
    Linux, nothing happens.
    """
    if _is_large(tensor):
        args = tensor.detach(), _COLLAPSE
        with contextlib.suppress(RuntimeError):  # no thread to be had: pages stay small
            threading.Thread(target=_advise, args=args, name=MOVER, daemon=True).start()


def wait_until_moved() -> None:
    """Wait for what ``move_to_huge_pages`` has begun: it takes memory's time from what is timed."""
    for thread in threading.enumerate():
        if thread.name == MOVER:
            thread.join()


def _is_large(tensor: torch.Tensor) -> bool:
    """Whether it is worth huge pages, on a system that has them."""
    return tensor.device.type == "cpu" and tensor.nbytes >= LARGE and _madvise() is not None


def _advise(tensor: torch.Tensor, advice: int) -> None:
    """Tell the system about the whole pages of a large tensor."""
    madvise = _madvise()
    if madvise is not None and _is_large(tensor):
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        begin += -begin % mmap.PAGESIZE
        end -= end % mmap.PAGESIZE
        madvise(begin, end - begin, advice)  # an advice: where it is not taken, pages are small


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's call, of (address, bytes, advice); None where it has no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux alone has it
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return lambda address, size, advice: int(madvise(address, size, advice))
