"""Memory that runs out wherever it is taken: an exception, and all is as before or as after.

An operation is run on new copies of one state, and each time another allocation fails: of torch
(every operation that makes a tensor, and all in-place ones but the plainest, which may take memory
within) and of NumPy in this package. SOAK=1 fails at every allocation of the CPU engine, with
MemoryError and with RuntimeError, which is what torch raises; else a part of them fails.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from operations import CASES, SOAK
from torch.utils._python_dispatch import TorchDispatchMode

import cupy_sparse_adamw

PACKAGE = str(Path(cupy_sparse_adamw.__file__).parent)

#: In-place operations that take no memory.
TAKE_NONE = {
    "fill_",
    "zero_",
    "copy_",
    "index_copy_",
    "add_",
    "sub_",
    "mul_",
    "neg_",
    "requires_grad_",
}
#: What this package asks NumPy for.
NUMPY = ("empty", "zeros", "ones", "full", "array", "arange", "concatenate", "cumsum", "repeat")


class Shortage(TorchDispatchMode):
    """Counts allocations, and fails at one of them."""

    def __init__(self, at: int, error: type[Exception]) -> None:
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def take(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise self.error("out of memory, injected")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if takes_memory(func):
            self.take()
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self._numpy = {name: getattr(np, name) for name in NUMPY}
        for name, right in self._numpy.items():
            setattr(np, name, self._counted(right))
        return super().__enter__()

    def __exit__(self, *raised):
        for name, right in self._numpy.items():
            setattr(np, name, right)
        return super().__exit__(*raised)

    def _counted(self, right: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args, **kwargs):
            if sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
                self.take()
            return right(*args, **kwargs)

        return call


def takes_memory(func: Any) -> bool:
    """Whether an operation of torch may allocate."""
    returned = func._schema.returns
    if any(x.alias_info is not None and x.alias_info.is_write for x in returned):
        return func._schema.name.split("::")[1] not in TAKE_NONE
    return any(x.alias_info is None and "Tensor" in str(x.type) for x in returned)


@pytest.mark.parametrize("name", CASES)
def test_an_allocation_that_fails_leaves_all_as_before_or_after(engine, name):
    at_most = 15 if engine == "cpu" else 3
    if SOAK:
        at_most = 10_000 if engine == "cpu" else 12  # the reference takes memory for each id
    failures = CASES[name].run(Shortage, [MemoryError, RuntimeError], at_most)
    print(f"{engine}, {name}: {failures} failures")
