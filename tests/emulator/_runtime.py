"""The runtime's functions, called through ctypes with the GIL held: one launch at a time."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from ctypes import (
    POINTER,
    Structure,
    c_bool,
    c_char,
    c_char_p,
    c_int,
    c_size_t,
    c_uint,
    c_uint64,
    c_void_p,
)
from pathlib import Path

from . import _build
from ._settings import Fault


class Parameter(Structure):
    _fields_ = (("size", c_uint), ("kind", c_char))


class Kernel(Structure):
    _fields_ = (
        ("name", c_char_p),
        ("invoke", c_void_p),
        ("parameters", POINTER(Parameter)),
        ("parameter_count", c_uint),
        ("max_threads", c_uint),
    )


class Module(Structure):
    _fields_ = (
        ("base", c_void_p),
        ("shared", c_void_p),
        ("end", c_void_p),
        ("kernels", POINTER(Kernel)),
        ("kernel_count", c_uint),
    )


@functools.cache
def library() -> ctypes.PyDLL:
    found = ctypes.PyDLL(str(_build.runtime()))
    triple = POINTER(c_uint)
    found.emulator_launch.restype = c_char_p
    found.emulator_launch.argtypes = [
        *(POINTER(Module), POINTER(Kernel), triple, triple, POINTER(c_void_p)),
        *(c_size_t, c_uint64, c_int),
    ]
    found.emulator_install_allocator.restype = c_bool
    found.emulator_register.argtypes = [c_void_p, c_size_t]
    found.emulator_in_arena.argtypes = [c_void_p]
    found.emulator_add_shared.argtypes = [POINTER(Module), c_char_p, c_size_t, c_size_t]
    return found


class Library:
    """A compiled kernel source: its kernels by name, and how to run one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        runtime = library()
        self._loaded = ctypes.PyDLL(str(path))
        self._loaded.emulator_module.restype = POINTER(Module)
        self._module = self._loaded.emulator_module()
        for name, offset, size in _build.shared_variables(path):
            runtime.emulator_add_shared(self._module, name.encode(), offset, size)
        module = self._module.contents
        self.kernels = {
            module.kernels[i].name.decode(): module.kernels[i] for i in range(module.kernel_count)
        }

    def exports(self, name: str) -> bool:
        """Whether the kernel is found by this name: it is not where C++ has mangled it."""
        return hasattr(self._loaded, name)

    def launch(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[bytes],
        shared_mem: int,
        seed: int,
        checked: bool,
    ) -> None:
        values = [_aligned(argument) for argument in arguments]
        pointers = (c_void_p * max(len(values), 1))(*(address for address, _ in values))
        fault = library().emulator_launch(
            *(self._module, ctypes.byref(kernel)),
            *((c_uint * 3)(*grid), (c_uint * 3)(*block)),
            *(pointers, shared_mem, seed % 2**64, checked),
        )
        if fault is not None:
            raise Fault(self._with_lines(fault.decode()))

    def _with_lines(self, text: str) -> str:
        def line_of(match: re.Match[str]) -> str:
            line = _build.source_line(self.path, int(match[1]) - self._module.contents.base)
            return f" [{line}]" if line else ""

        return re.sub(r" \[@(\d+)\]", line_of, text)


def _aligned(value: bytes) -> tuple[int, object]:
    """The address of a copy of the bytes, as aligned as any parameter, and what owns it."""
    alignment = 64
    memory = ctypes.create_string_buffer(len(value) + alignment)
    address = -(-ctypes.addressof(memory) // alignment) * alignment
    ctypes.memmove(address, value, len(value))
    return address, memory
