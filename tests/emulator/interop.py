"""Stands in for the CUDA engine's ``_interop``: what it takes from CuPy and from the device.

A launch must name torch's stream and lie within ``on_device``: a GPU would run it elsewhere without
a word. Not modelled: streams (everything runs in the order in which Python asks for it, before the
call returns) and the cost of anything.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch

from . import _build, _capture, _runtime
from ._settings import Launch, launches, settings

MAX_THREADS = 1024
MAX_BLOCK = (1024, 1024, 64)
MAX_GRID = (2**31 - 1, 65535, 65535)
DEFAULT_SHARED = 48 * 1024  # more needs an attribute that RawModule's callers do not set


class DeviceArray(np.ndarray):
    """Memory that kernels may use, as cupy.ndarray is; an ordinary array is the host's."""


class DeviceAddress:
    """A pointer, as ``address_of`` makes it; it keeps what it points to, as a graph's pool does."""

    def __init__(self, tensor: torch.Tensor | None) -> None:
        self.tensor = tensor
        self.value = np.uint64(0 if tensor is None else tensor.data_ptr())


class RawModule:
    """Like cupy.RawModule(code=..., options=...): compiled when its first kernel is launched."""

    def __init__(self, code: str, options: tuple[str, ...] = ()) -> None:
        if not isinstance(options, tuple) or not all(isinstance(o, str) for o in options):
            raise TypeError(f"options must be a tuple of str, got {options!r}")
        self.code, self.options = code, options

    def get_function(self, name: str) -> RawKernel:
        kernel = RawKernel(self, name)
        kernel.find(settings.checked)  # raises what CuPy would raise here
        return kernel


@functools.cache
def load(code: str, options: tuple[str, ...], checked: bool) -> _runtime.Library:
    return _runtime.Library(_build.kernels(code, options, checked))


class RawKernel:
    """A kernel that is called as ``kernel(grid, block, args, shared_mem=0, stream=stream)``."""

    def __init__(self, module: RawModule, name: str) -> None:
        self.module, self.name = module, name

    def find(self, checked: bool) -> tuple[_runtime.Library, _runtime.Kernel]:
        library = load(self.module.code, self.module.options, checked)
        if self.name not in library.kernels or not library.exports(self.name):
            known = ", ".join(filter(library.exports, library.kernels)) or "none"
            raise AttributeError(
                f'no kernel {self.name!r} with a C name (extern "C", outside any namespace); '
                f"there are: {known}"
            )
        return library, library.kernels[self.name]

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[object],
        shared_mem: int = 0,
        stream: object = None,
    ) -> None:
        _require_place(self.name, stream)
        _, kernel = self.find(settings.checked)
        grid = _extents(self.name, "grid", grid, MAX_GRID)
        block = _extents(self.name, "block", block, MAX_BLOCK)
        threads = block[0] * block[1] * block[2]
        if threads > kernel.max_threads or threads > MAX_THREADS:
            raise ValueError(
                f"{self.name}: a block of {threads} threads, and its __launch_bounds__ allow "
                f"{kernel.max_threads}"
            )
        if not 0 <= shared_mem <= DEFAULT_SHARED:
            raise ValueError(f"{self.name}: shared_mem must be at most 48 KiB, got {shared_mem}")
        packed = pack(self.name, kernel, args)
        launches.append(Launch(self.name, grid, block))

        def launch() -> None:
            library, kernel = self.find(settings.checked)
            library.launch(kernel, grid, block, packed, shared_mem, settings.seed, settings.checked)

        if (graph := _capture.current()) is not None:
            graph.record(launch, keep=args)
        else:
            launch()


def _extents(
    kernel: str, name: str, given: Sequence[int], largest: Sequence[int]
) -> tuple[int, int, int]:
    extents = tuple(given)
    if not 1 <= len(extents) <= 3:
        raise ValueError(f"{kernel}: {name} must have one to three extents, got {extents}")
    extents += (1,) * (3 - len(extents))
    if not all(1 <= extent <= most for extent, most in zip(extents, largest, strict=True)):
        # CuPy would run one block for an extent of zero.
        raise ValueError(f"{kernel}: {name} must lie between 1 and {largest}, got {extents}")
    return extents  # type: ignore[return-value]


KINDS = {"p": "a pointer", "f": "a floating-point number", "i": "an integer", "s": "a struct"}


def pack(name: str, kernel: _runtime.Kernel, args: Sequence[object]) -> list[bytes]:
    """The arguments' bytes as CuPy passes them, once they are what the kernel takes."""
    if not isinstance(args, tuple | list):
        raise TypeError(f"{name}: args must be a tuple, got {type(args).__name__}")
    if len(args) != kernel.parameter_count:
        raise TypeError(f"{name}: takes {kernel.parameter_count} arguments, got {len(args)}")
    packed = []
    for position, arg in enumerate(args):
        kind, value = _pack(f"{name}: argument {position}", arg)
        parameter = kernel.parameters[position]
        wanted = parameter.kind.decode()
        if kind != wanted or len(value) != parameter.size:
            raise TypeError(
                f"{name}: argument {position} must be {KINDS[wanted]} of {parameter.size} bytes, "
                f"got {KINDS[kind]} of {len(value)} bytes ({type(arg).__name__})"
            )
        packed.append(value)
    return packed


def _pack(what: str, arg: object) -> tuple[str, bytes]:
    if isinstance(arg, DeviceArray):
        return "p", np.uint64(arg.ctypes.data if arg.size else 0).tobytes()
    if isinstance(arg, DeviceAddress):
        return "p", arg.value.tobytes()
    if isinstance(arg, bool):
        return "i", np.bool_(arg).tobytes()
    if isinstance(arg, int):
        return "i", np.int64(arg).tobytes()
    if isinstance(arg, float):
        return "f", np.float64(arg).tobytes()
    if isinstance(arg, np.ndarray) and arg.ndim:
        raise TypeError(f"{what} is an array in the host's memory; a kernel takes array_of(tensor)")
    if isinstance(arg, np.ndarray | np.generic):
        kind = {"V": "s", "f": "f", "b": "i", "i": "i", "u": "i"}.get(arg.dtype.kind)
        if kind is not None:
            return kind, arg.tobytes()
    raise TypeError(f"{what} must be an array or a number, got {arg!r}")


def array_of(tensor: torch.Tensor) -> DeviceArray:
    """The tensor's memory as an array, without a copy; bfloat16 as int16."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    register(tensor)
    array = np.from_dlpack(tensor)
    if not array.flags.writeable:
        array = tensor.numpy()
    return array.view(DeviceArray)


def address_of(tensor: torch.Tensor | None) -> DeviceAddress:
    """What a kernel takes for a pointer to the tensor's memory."""
    if tensor is not None:
        if not tensor.is_contiguous():
            raise ValueError(f"kernels take contiguous tensors, got strides {tensor.stride()}")
        register(tensor)
    return DeviceAddress(tensor)


def register(tensor: torch.Tensor) -> None:
    """Lets kernels use a tensor from before ``active()``; newer ones they may use anyway."""
    storage = tensor.untyped_storage()
    runtime = _runtime.library()
    if storage.nbytes() and not runtime.emulator_in_arena(storage.data_ptr()):
        runtime.emulator_register(storage.data_ptr(), storage.nbytes())


class Stream(NamedTuple):
    device: torch.device
    ptr: int = 0


@functools.cache
def stream_of(device: torch.device) -> Stream:
    """The device's one stream, always the same object."""
    return Stream(device)


_current_device: ContextVar[torch.device | None] = ContextVar("_current_device", default=None)


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Within the block, kernels may be launched on the device."""
    token = _current_device.set(device)
    try:
        yield
    finally:
        _current_device.reset(token)


def _require_place(kernel: str, stream: object) -> None:
    """Refuses a launch that a GPU would run on another device or stream than torch's."""
    device = _current_device.get()
    if device is None:
        raise RuntimeError(
            f"{kernel} is launched outside on_device(device): on a GPU it would run on whichever "
            f"device is the current one"
        )
    if stream is None:
        raise RuntimeError(
            f"{kernel} is launched without a stream: on a GPU it would run on CuPy's, unordered "
            f"with torch's; pass stream=stream_of(device)"
        )
    if stream is not stream_of(device):
        raise RuntimeError(
            f"{kernel} is launched within on_device({device}), and its stream is not what "
            f"stream_of({device}) returned, but {stream!r}"
        )


def is_capturing(device: torch.device) -> bool:
    return settings.capturing or _capture.current() is not None


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """A new tensor with the array's values."""
    _refuse_in_capture("to_device")
    return torch.from_numpy(np.array(array)).clone()


class HostCopy:
    """A small tensor's values as ``send`` finds them, for the host to read once they have come."""

    def __init__(self, tensor: torch.Tensor) -> None:
        _refuse_in_capture("HostCopy")
        self._source = tensor

    def send(self) -> None:
        _refuse_in_capture("HostCopy.send")
        self._values = np.array(self._source.detach().numpy())

    def ready(self) -> bool:
        _refuse_in_capture("HostCopy.ready")
        return settings.copies_complete

    def values(self) -> np.ndarray[Any, Any]:
        _refuse_in_capture("HostCopy.values")
        return self._values


def _refuse_in_capture(what: str) -> None:
    if _capture.current() is not None:
        raise RuntimeError(f"{what} within a capture: CUDA cannot capture it")
