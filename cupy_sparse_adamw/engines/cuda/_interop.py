"""All that this engine asks of CuPy and of torch's CUDA runtime.

Tensors reach CuPy by DLPack, without a copy; those that live for one step only, by their address,
since a step has twenty and an exchange takes microseconds. The tests replace this module by one
that runs the same kernels on the CPU, so nothing else in the engine may touch CuPy, streams or
pinned memory.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

try:
    import cupy
except ImportError as error:
    raise ImportError(
        f"CuPy cannot be imported ({error}); install the one for torch's CUDA, which is "
        f"{torch.version.cuda}: pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12 "
        f"nvidia-cuda-runtime-cu12, or cupy-cuda13x nvidia-cuda-nvrtc nvidia-cuda-runtime; or keep "
        f"tables on the CPU (model.to('cpu'), or HashTable(..., device='cpu'))"
    ) from error


def _require_gpu() -> None:
    """Find a GPU that torch and CuPy both can use.

    Raises:
        ImportError: there is none; the cause is in the text.
    """
    if not torch.cuda.is_available():
        raise ImportError(
            f"torch {torch.__version__} finds no CUDA device; keep tables on the CPU "
            f"(model.to('cpu'), or HashTable(..., device='cpu'))"
        )
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ImportError(f"CuPy {cupy.__version__} finds no CUDA device: {error}") from error


_require_gpu()
RawModule = cupy.RawModule
_NOTHING_TO_DO = contextlib.nullcontext()


class Stream(NamedTuple):
    """A CUDA stream as CuPy's launches take it."""

    ptr: int


def array_of(tensor: torch.Tensor) -> Any:
    """The tensor's memory as a CuPy array: nothing is copied, and writes show on both sides.

    Args:
        tensor: on a GPU, contiguous. bfloat16, which CuPy has not, becomes int16.
    """
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    # A capsule rather than the tensor, whose __dlpack__ would make CuPy's stream wait for torch's:
    # the kernels run on torch's own stream.
    return cupy.from_dlpack(to_dlpack(tensor))


def address_of(tensor: torch.Tensor | None) -> np.uint64:
    """What a kernel takes for a pointer to the tensor's memory; None is a null pointer.

    Args:
        tensor: on a GPU, contiguous, made for the launches that get it: torch hands its memory on
            to what the stream does later, once the last reference is gone.
    """
    address: np.uint64 = np.uint64(0 if tensor is None else tensor.data_ptr())
    return address


def stream_of(device: torch.device) -> Stream:
    """The stream that torch uses on a device."""
    return Stream(torch.cuda.current_stream(device).cuda_stream)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Within the block, the device is the current one, to CuPy too."""
    if device.index == torch.cuda.current_device():
        return _NOTHING_TO_DO
    return torch.cuda.device(device)


def is_capturing(device: torch.device) -> bool:
    """Whether torch's current stream is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with on_device(device):
        return bool(torch.cuda.is_current_stream_capturing())


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """A copy of a NumPy array on a device, from pinned memory: nobody waits."""
    source = torch.from_numpy(array)
    pinned = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(source).to(device, non_blocking=True)


class HostCopy:
    """A copy of a small tensor to pinned memory, which is taken when the object is made.

    It is under way once ``send`` was called, behind what the stream has to do.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._source = tensor
        self._target = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self._done = torch.cuda.Event()

    def send(self) -> None:
        """Begin to copy. Does not wait."""
        self._target.copy_(self._source, non_blocking=True)
        self._done.record(torch.cuda.current_stream(self._source.device))

    def ready(self) -> bool:
        """Whether the copy is complete. Does not wait."""
        return bool(self._done.query())

    def values(self) -> np.ndarray[Any, Any]:
        """The copy. Waits for it."""
        self._done.synchronize()
        return self._target.numpy()
