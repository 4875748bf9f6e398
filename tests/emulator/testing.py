"""What the emulator's own tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import emulator
from emulator import interop

KERNELS = Path(emulator.__file__).parent / "kernels"
SEEDS = range(4)
DEVICE = torch.device("cpu")


def function(file: str, name: str, *options: str) -> interop.RawKernel:
    """A kernel of ours, to be launched as the engine has to."""
    code = f'#line 1 "{file}"\n' + (KERNELS / file).read_text(encoding="utf-8")
    options = options or ("-DOFFSET=0",)
    return interop.RawModule(code=code, options=("-std=c++17", *options)).get_function(name)


def kernel(file: str, name: str, *options: str) -> Callable[..., None]:
    """Launches a kernel: tensors become arrays, int and bool what C++ calls by these names."""
    raw = function(file, name, *options)

    def launch(block: int | tuple[int, ...], *args: object, grid: Any = (1,), **more: Any) -> None:
        packed = [
            interop.array_of(arg)
            if isinstance(arg, torch.Tensor)
            else np.int32(arg)
            if type(arg) is int
            else arg
            for arg in args
        ]
        block = (block,) if isinstance(block, int) else block
        with interop.on_device(DEVICE):
            raw(grid, block, tuple(packed), stream=interop.stream_of(DEVICE), **more)

    return launch


def ints(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int32)


def line_of(code: str) -> str:
    """Where the line of planted_faults.cu that has this code is, as faults say it."""
    lines = (KERNELS / "planted_faults.cu").read_text(encoding="utf-8").splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if code in line)
    return f"[planted_faults.cu:{number}]"


def found(name: str, *args: Any, **more: Any) -> str:
    """The fault that a launch reports: its text, after some checks."""
    with pytest.raises(emulator.Fault) as caught:
        kernel("planted_faults.cu", name)(*args, **more)
    text = str(caught.value)
    assert f": kernel {name}, block (" in text
    return text


def descriptor(address: int, count: int) -> np.ndarray:
    return np.array((address, count), np.dtype([("a", np.uint64), ("n", np.int32)], align=True))
