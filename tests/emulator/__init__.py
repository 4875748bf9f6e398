"""Runs the CUDA engine on CPU tensors: its kernels, compiled by g++, thread by thread.

    with emulator.active(), emulator.using(seed=7):
        engine = emulator.load_engine()
        ...

Every launch is checked for what a GPU hides: accesses out of bounds or misaligned, races, barriers
and warp operations that some threads miss, shared memory that was never written, waits without
end. A launch that does any of it raises ``Fault``. Memory is ordered within a block by the
``__syncthreads`` functions and ``__syncwarp`` alone: shuffles, votes, matches and reductions of a
warp meet, and order nothing. Threads of a block that meet at barriers in different source lines are
reported as missing each other's; barriers of one line, as in a function that two branches call, are
taken for the same. What is *not* modelled: the memory model (each access takes effect at once),
blocks that run side by side, caches, FMA contraction, flush to zero, approximate division,
registers, and time.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from cupy_sparse_adamw import functional

from . import _runtime, interop
from ._build import available
from ._capture import SYNCHRONIZING, capture
from ._settings import Fault, Launch, launches, settings, using
from .interop import register

__all__ = [
    "SYNCHRONIZING",
    "Fault",
    "Launch",
    "active",
    "available",
    "capture",
    "engine_module",
    "interop",
    "launches",
    "load_engine",
    "register",
    "settings",
    "using",
]

ENGINE = "cupy_sparse_adamw.engines.emulated"
CUDA_ENGINE = Path(functional.__file__).parent / "engines/cuda"


@contextlib.contextmanager
def active() -> Iterator[None]:
    """Within the block, new CPU tensors lie between red zones, and kernels may use them."""
    runtime = _runtime.library()
    launches.clear()
    outermost = runtime.emulator_install_allocator()
    try:
        yield
    finally:
        if outermost:
            runtime.emulator_remove_allocator()
            runtime.emulator_unregister_all()
        launches.clear()


def load_engine(folder: Path = CUDA_ENGINE) -> ModuleType:
    """The CUDA engine's code once more, on the emulator, as ``use_engine("emulated")`` finds it."""
    if ENGINE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            ENGINE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        module._interop = interop  # type: ignore[attr-defined]
        sys.modules[ENGINE] = module
        sys.modules[f"{ENGINE}._interop"] = interop
        try:
            spec.loader.exec_module(module)
        except BaseException:
            unload_engine()
            raise
    functional._MODULES["emulated"] = ".engines.emulated"
    return sys.modules[ENGINE]


def engine_module(name: str) -> ModuleType:
    """A module of that engine, such as "_compile". Neither g++ nor a GPU is needed for it."""
    load_engine()
    return importlib.import_module(f"{ENGINE}.{name}")


def unload_engine() -> None:
    """Forgets the engine, its submodules too."""
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{ENGINE}.")]:
        del sys.modules[name]
    functional._MODULES.pop("emulated", None)
