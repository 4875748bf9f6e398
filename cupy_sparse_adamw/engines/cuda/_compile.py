"""From ``cuda_src/*.cu`` to kernels: one module for each (file, types), compiled at first use.

CuPy keeps compiled modules on disk under the source text and the options. What ``#include`` brings
in is not part of that key, so includes of our own are put into the text here.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..._types import MOMENT_DTYPE, Kind
from . import _interop

#: Without fused multiply-add every variant of a kernel rounds alike, so whether a gradient is read
#: 4 or 16 bytes at a time cannot show in its row's bits. Division and square root in float32 are
#: those without the slow path for denormal numbers, 2 units in the last place at most. (CuPy adds
#: -ftz=true: float32 numbers below 1.2e-38 count as 0 here, unlike on the CPU.)
OPTIONS = ("-std=c++17", "-fmad=false", "-prec-div=false", "-prec-sqrt=false")

#: Threads that run together (CUDA C++ Programming Guide, "SIMT architecture").
WARP = 32
#: Threads a block of kernels that have a thread for each item: any multiple of a warp would do.
THREADS = 256
#: Types of elements.cuh.
TYPE_NAMES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "Float16",
    torch.bfloat16: "BFloat16",
}
#: The update that leaves rows alone which no batch touched.
SKIP = Kind()
#: What is a row's own (untouched.cuh), by what rows miss. Rows that have a count of their own miss
#: decay, or nothing: that is Decay, too.
_OWN = {"decay": "Decay", "dense": "Dense", "replay": "Replay"}
#: Integers to move rows with (rows.cu): bytes -> type.
UNITS = {16: "uint4", 8: "uint2", 4: "unsigned int", 2: "unsigned short"}


class Variant(NamedTuple):
    """What is compiled: a file of cuda_src, and the macros that name its types."""

    file: str
    macros: tuple[tuple[str, str], ...] = ()

    def options(self) -> tuple[str, ...]:
        """The compiler's options."""
        macros = [f"-D{name}={value}" for name, value in self.macros]
        uses_half = "Float16" in (value for _, value in self.macros)
        return (*OPTIONS, *macros, *(["-DUSES_HALF"] if uses_half else []))


GROUP = Variant("group.cu")


@functools.cache
def rows_variant(unit: int) -> Variant:
    """Moving rows in units of so many bytes."""
    return Variant("rows.cu", (("UNIT", UNITS[unit]),))


@functools.cache
def hash_table_variant(dtype: torch.dtype) -> Variant:
    """The index of a table of a dtype."""
    return Variant("hash_table.cu", (("PARAM", TYPE_NAMES[dtype]),))


@functools.cache
def adamw_variant(
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    key_dtype: torch.dtype,
    vec: int,
    kind: Kind = SKIP,
) -> Variant:
    """The update of tables of a dtype and kind, ``vec`` neighbouring columns at a time."""
    macros = {
        "PARAM": TYPE_NAMES[dtype],
        "GRAD": TYPE_NAMES[grad_dtype],
        "KEY": "int" if key_dtype == torch.int32 else "long long",
        "VEC": str(vec),
    }
    if kind != SKIP:
        macros["UNTOUCHED"] = _OWN["decay" if kind.per_row else kind.untouched]
    return Variant("sparse_adamw.cu", tuple(macros.items()))


@functools.cache
def untouched_variant(dtype: torch.dtype, vec: int, untouched: str) -> Variant:
    """Bringing rows up to date outside of a step, ``vec`` neighbouring columns at a time."""
    macros = {"PARAM": TYPE_NAMES[dtype], "VEC": str(vec), "UNTOUCHED": _OWN[untouched]}
    return Variant("untouched.cu", tuple(macros.items()))


def widest_vec(dtype: torch.dtype) -> int:
    """Columns that move together, at the most, in a table of a dtype: 16 bytes of its moments."""
    return 16 // MOMENT_DTYPE[dtype].itemsize


def all_variants() -> Iterator[Variant]:
    """Everything that the engine is asked for: in float64 steps are replayed, never "dense"."""
    yield GROUP
    yield from map(rows_variant, UNITS)
    for dtype in TYPE_NAMES:
        yield hash_table_variant(dtype)
        grad_dtypes = {dtype, torch.float32} if dtype.itemsize == 2 else {dtype}
        widths = (1, widest_vec(dtype))
        missing = [x for x in _OWN if x != "dense" or dtype != torch.float64]
        kinds = (SKIP, *map(Kind, missing))
        choices = (sorted(grad_dtypes, key=str), kinds, (torch.int32, torch.int64), widths)
        for grad_dtype, kind, key_dtype, vec in itertools.product(*choices):
            yield adamw_variant(dtype, grad_dtype, key_dtype, vec, kind)
        for untouched, vec in itertools.product(missing, widths):
            yield untouched_variant(dtype, vec, untouched)


def _folder() -> Any:  # a Traversable, whose place differs between Python versions
    try:
        return importlib.resources.files("cupy_sparse_adamw.cuda_src")
    except ModuleNotFoundError:  # a source tree on PYTHONPATH
        return Path(__file__).resolve().parents[3] / "cuda_src"


@functools.cache
def source(file: str) -> str:
    """The text of a file of cuda_src, each of our own includes put in at its first mention.

    ``#line`` keeps compilers' messages about lines of the files themselves.
    """
    included: set[str] = set()

    def text_of(name: str) -> str:
        lines = [f'#line 1 "{name}"']
        text = (_folder() / name).read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            include = re.fullmatch(r'#include "(.+)"', line)
            if include is None:
                lines.append("" if line == "#pragma once" else line)
            elif include[1] not in included:
                included.add(include[1])
                lines += [text_of(include[1]), f'#line {number + 1} "{name}"']
            else:
                lines.append("")
        return "\n".join(lines)

    return text_of(file) + "\n"


@functools.cache
def _function(device: torch.device, variant: Variant, name: str) -> Any:
    if _interop.is_capturing(device):
        raise RuntimeError(
            f"kernel {name} of {variant.file} is not loaded yet for such tensors, and loading it "
            f"would break a CUDA graph's capture; run one such step, or lookup, before capturing"
        )
    return _module(device, variant).get_function(name)


@functools.cache
def _module(device: torch.device, variant: Variant) -> Any:
    return _interop.RawModule(code=source(variant.file), options=variant.options())


def _packed(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    if not argument.is_contiguous():
        raise ValueError(f"kernels take contiguous tensors, got strides {argument.stride()}")
    return _interop.array_of(argument)


def prepare_launch(
    device: torch.device,
    variant: Variant,
    name: str,
    num_blocks: int,
    num_threads: int,
    args: Sequence[Any],
) -> Callable[[], None]:
    """Compile and load a kernel; the result runs it on torch's current stream, and does not wait.

    Args:
        device: where the tensors are.
        variant: the module.
        name: the kernel in it.
        num_blocks: size of the grid; nothing runs if it is 0.
        num_threads: threads a block.
        args: what the kernel takes, in order: contiguous tensors, ``_interop.address_of`` of those
            that are made for this launch, and NumPy scalars or structs by value. Whose memory an
            address names must live until the launch.

    Raises:
        RuntimeError: the kernel is not loaded yet, and the stream is being captured.
    """
    if num_blocks == 0:
        return _launch_nothing
    packed = tuple(_packed(x) for x in args)
    with _interop.on_device(device):
        function = _function(device, variant, name)

    def start() -> None:
        with _interop.on_device(device):
            stream = _interop.stream_of(device)
            function((num_blocks,), (num_threads,), packed, stream=stream)

    return start


def _launch_nothing() -> None:
    pass


def launch(
    device: torch.device,
    variant: Variant,
    name: str,
    num_blocks: int,
    num_threads: int,
    args: Sequence[Any],
) -> None:
    """Run a kernel now: see ``prepare_launch``."""
    prepare_launch(device, variant, name, num_blocks, num_threads, args)()


def log_lanes(parts: int) -> int:
    """Logarithm of how many threads share a row of so many parts: a warp at the most."""
    return min((parts - 1).bit_length(), WARP.bit_length() - 1)


def blocks_for(size: int, num_threads: int) -> int:
    """How many blocks it takes to have a thread for each of ``size`` things."""
    return -(-size // num_threads)
