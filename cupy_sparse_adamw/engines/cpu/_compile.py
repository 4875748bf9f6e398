"""How kernels of this engine are compiled: Numba, no Python lock held, cached on disk.

Kernels get tables as addresses, since a table is many blocks, and the element type as a *tag*, a
NumPy scalar whose type picks the specialization: ``float32``, ``float64``, ``uint16`` for fp16
bits and ``int16`` for bf16 bits (Numba's CPU target has no 16-bit float arithmetic).
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload

from ._cache import compiled

#: Tag of an array of row numbers, ids or addresses.
INT64 = np.int64(0)
#: Tag of an array of sums or scalars.
FLOAT64 = np.float64(0)
#: Tag of raw memory.
BYTE = np.uint8(0)
#: Bytes of a cache line.
LINE = 64
#: Elements that are computed between asking for cache lines: one of float32, two of float64. An
#: update's loop over so many becomes vector code; over 8 float64 it does not.
TURN = 16

F = TypeVar("F", bound=Callable[..., Any])

#: Element type -> tag.
TAGS = {
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
    torch.float16: np.uint16(0),
    torch.bfloat16: np.int16(0),
}


def _compiles_for(feature: str) -> bool:
    """Has the CPU that Numba compiles for this feature, as LLVM calls it?"""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return f"+{feature}" in features.split(",")


# Without such an instruction LLVM would call a function for each element. 64-bit ARM has both.
_IS_ARM = platform.machine() in ("aarch64", "arm64")
_HAS_FMA = _IS_ARM or _compiles_for("fma")
#: Whether one instruction converts between float16 and float32.
CONVERTS_HALF = _IS_ARM or _compiles_for("f16c")

_OPTIONS = {"nogil": True, "error_model": "numpy"}


def jit(function: F) -> F:
    """Compile at first use, and keep the result on disk where a cache directory can be written."""
    return compiled(function, **_OPTIONS)  # type: ignore[no-any-return]


def inline(function: F) -> F:
    """Compile into each kernel that calls it. Without this every call is one through a pointer."""
    return numba.njit(forceinline=True, **_OPTIONS)(function)  # type: ignore[no-any-return]


def address_of(array: Any) -> int:
    """Where a NumPy array begins in memory, which must be writable and contiguous; 0 if empty.

    Quicker than its ``ctypes.data`` (docs/performance.md).
    """
    return ctypes.addressof(ctypes.c_char.from_buffer(array)) if array.size else 0


@intrinsic
def _as_pointer(typingctx, address, tag):  # type: ignore[no-untyped-def]
    pointer = types.CPointer(tag)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(types.int64, tag), codegen


@intrinsic
def at(typingctx, address, index, tag):  # type: ignore[no-untyped-def]
    """Element ``index`` of the array of the tag's type at ``address``: a plain load."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(args[0], context.get_value_type(types.CPointer(tag)))
        return builder.load(builder.gep(pointer, [args[1]]))

    return tag(types.int64, types.int64, tag), codegen


@intrinsic(prefer_literal=True)
def numbers_at(typingctx, address, count, tag):  # type: ignore[no-untyped-def]
    """The first ``count`` elements of such an array as a tuple; the count is a constant."""
    numbers = types.UniTuple(tag, count.literal_value)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(args[0], context.get_value_type(types.CPointer(tag)))
        places = [builder.gep(pointer, [ir.IntType(64)(k)]) for k in range(numbers.count)]
        return context.make_tuple(builder, numbers, [builder.load(place) for place in places])

    return numbers(types.int64, count, tag), codegen


@inline
def last_at_most(value, first, stride, count):  # type: ignore[no-untyped-def]
    """Index of the last of ``count`` ascending int64 that is at most ``value``; the first one is.

    They begin at address ``first`` and are ``stride`` elements apart.
    """
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) >> 1
        if at(first, middle * stride, INT64) <= value:
            low = middle
        else:
            high = middle
    return low


@inline
def view(address: int, size: int, tag: Any) -> Any:
    """The ``size`` elements at ``address`` as an array of the tag's type."""
    return numba.carray(_as_pointer(address, tag), size)


@intrinsic
def prefetch(typingctx, address):  # type: ignore[no-untyped-def]
    """Ask for the cache line at ``address``; any address is allowed."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        byte_pointer, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, int32, int32, int32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        pointer = builder.inttoptr(args[0], byte_pointer)
        builder.call(function, [pointer, int32(0), int32(2), int32(1)])  # read, into L2, data
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def multiply_high(typingctx, x, y):  # type: ignore[no-untyped-def]
    """The upper 64 bits of the product of two unsigned 64-bit numbers."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(a, wide) for a in args))
        return builder.trunc(builder.lshr(product, wide(64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), codegen


@intrinsic
def multiply_add(typingctx, x, y, z):  # type: ignore[no-untyped-def]
    """The number x * y + z, rounded once where the CPU can do so at the price of one rounding."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if _HAS_FMA:
            return builder.fma(*args)
        return builder.fadd(builder.fmul(*args[:2]), args[2])

    return x(x, x, x), codegen


@intrinsic
def copy_bytes(typingctx, target, source, size):  # type: ignore[no-untyped-def]
    """Copy ``size`` bytes between two addresses, as memcpy does."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        byte_pointer = ir.IntType(8).as_pointer()
        to, origin = (builder.inttoptr(a, byte_pointer) for a in args[:2])
        cgutils.raw_memcpy(builder, to, origin, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _bits_of(typingctx, value):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def _float_of(typingctx, bits):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def _half_to_float_at_once(typingctx, half):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def _float_to_half_at_once(typingctx, value):  # type: ignore[no-untyped-def]
    """Round to nearest, ties to even; NaN stays NaN, with bits that depend on the machine."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


# float16 by bit arithmetic, after F. Giesen, "float->half variants" (2012), where no
# instruction does it: LLVM would call a library function that Numba lacks. A float32's exponent is
# biased by 127 and its mantissa 13 bits longer than a float16's, whose exponent is biased by 15.
_REBIAS = np.uint32((127 - 15) << 23)
_HALF_EXPONENT = np.uint32(0x7C00 << 13)  # the exponent field of a float16, moved up
_SMALLEST_NORMAL = np.uint32((127 - 14) << 23)  # 2**-14
_OVERFLOW = np.uint32((127 + 16) << 23)  # 2**16
_INFINITY = np.uint32(255 << 23)
#: Adding 0.5 puts a float16 subnormal's last bit, 2**-24, into the last bit of a float32.
_HALF = np.uint32(126 << 23)


@inline
def _half_to_float(half: Any) -> Any:
    bits = (np.uint32(half) & np.uint32(0x7FFF)) << np.uint32(13)
    sign = (np.uint32(half) & np.uint32(0x8000)) << np.uint32(16)
    exponent = bits & _HALF_EXPONENT
    bits += _REBIAS
    if exponent == _HALF_EXPONENT:  # infinity or NaN
        bits += _REBIAS
    if exponent == 0:  # zero or subnormal: 2**-14 (1 + mantissa) - 2**-14
        bits = _bits_of(_float_of(bits + np.uint32(1 << 23)) - _float_of(_SMALLEST_NORMAL))
    return _float_of(np.uint32(bits | sign))


@inline
def _float_to_half(value: Any) -> Any:
    """Round to nearest, ties to even; NaN stays NaN."""
    bits = _bits_of(value)
    sign = bits & np.uint32(0x80000000)
    bits ^= sign
    odd = (bits >> np.uint32(13)) & np.uint32(1)
    half = (bits - _REBIAS + np.uint32(0xFFF) + odd) >> np.uint32(13)
    if bits < _SMALLEST_NORMAL:
        half = _bits_of(_float_of(bits) + _float_of(_HALF)) - _HALF
    if bits >= _OVERFLOW:
        half = np.uint32(0x7E00) if bits > _INFINITY else np.uint32(0x7C00)
    return np.uint16(half | (sign >> np.uint32(16)))


@intrinsic
def _bfloat16_to_float(typingctx, bits):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        int32 = ir.IntType(32)
        wide = builder.shl(builder.zext(args[0], int32), int32(16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.int16), codegen


@intrinsic
def _float_to_bfloat16(typingctx, value):  # type: ignore[no-untyped-def]
    """Round to nearest, ties to even; NaN stays NaN."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        int32 = ir.IntType(32)
        bits = builder.bitcast(args[0], int32)
        odd = builder.and_(builder.lshr(bits, int32(16)), int32(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, int32(0x7FFF))), int32(16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, int32(0x7FC0), rounded), ir.IntType(16))

    return types.int16(types.float32), codegen


#: Scopes: what is at an address that ``load`` and ``store`` get. Memory of two scopes never
#: overlaps, so vector code need not ask, once for each row, whether it does. Whatever else is read
#: or written may be anywhere.
PARAM, EXP_AVG, EXP_AVG_SQ = 0, 1, 2
#: Gradients, sums of them, and rows that were copied.
VALUES = 3


def _set_scope(builder: Any, access: Any, scope: int) -> None:
    """Tell LLVM which scope an access is in (LangRef, "noalias and alias.scope metadata")."""
    module = builder.module
    domain = module.add_metadata([ir.MetaDataString(module, "sparse_adamw")])
    scopes = [
        module.add_metadata([ir.MetaDataString(module, f"sparse_adamw {number}"), domain])
        for number in (PARAM, EXP_AVG, EXP_AVG_SQ, VALUES)
    ]
    access.set_metadata("alias.scope", module.add_metadata([scopes.pop(scope)]))
    access.set_metadata("noalias", module.add_metadata(scopes))


@intrinsic(prefer_literal=True)
def _read(typingctx, address, i, tag, scope):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(args[0], context.get_value_type(types.CPointer(tag)))
        value = builder.load(builder.gep(pointer, [args[1]]))
        _set_scope(builder, value, scope.literal_value)
        return value

    return tag(types.int64, types.int64, tag, scope), codegen


@intrinsic(prefer_literal=True)
def _write(typingctx, address, i, value, tag, scope):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(args[0], context.get_value_type(types.CPointer(tag)))
        stored = builder.store(args[2], builder.gep(pointer, [args[1]]))
        _set_scope(builder, stored, scope.literal_value)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, tag, tag, scope), codegen


def load(address: int, i: int, tag: Any, scope: int) -> Any:
    """Element i in the type that it is computed in: float32, or float64 for float64."""
    raise NotImplementedError("only inside compiled code")


def store(address: int, i: int, value: Any, tag: Any, scope: int) -> None:
    """Round ``value`` to the tag's element type, to nearest even, and make it element i."""
    raise NotImplementedError("only inside compiled code")


def compiled_overload(function: Any) -> Any:
    """Decorates what chooses, by the types of arguments, the code that ``function`` stands for."""
    options = {**_OPTIONS, "forceinline": True}
    return overload(function, jit_options=options, prefer_literal=True)


@compiled_overload(load)
def _load(address, i, tag, scope):  # type: ignore[no-untyped-def]
    if tag == types.uint16:
        widen = _half_to_float_at_once if CONVERTS_HALF else _half_to_float
        return lambda address, i, tag, scope: widen(_read(address, i, tag, scope))
    if tag == types.int16:
        return lambda address, i, tag, scope: _bfloat16_to_float(_read(address, i, tag, scope))
    return lambda address, i, tag, scope: _read(address, i, tag, scope)


@compiled_overload(store)
def _store(address, i, value, tag, scope):  # type: ignore[no-untyped-def]
    if tag == types.uint16:
        narrow = _float_to_half_at_once if CONVERTS_HALF else _float_to_half

        def half(address, i, value, tag, scope):  # type: ignore[no-untyped-def]
            _write(address, i, narrow(np.float32(value)), tag, scope)

        return half
    if tag == types.int16:

        def bfloat16(address, i, value, tag, scope):  # type: ignore[no-untyped-def]
            _write(address, i, _float_to_bfloat16(np.float32(value)), tag, scope)

        return bfloat16

    def same(address, i, value, tag, scope):  # type: ignore[no-untyped-def]
        _write(address, i, cast(value, tag), tag, scope)

    return same


def cast(value: Any, tag: Any) -> Any:
    """``value`` in the tag's floating type."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(cast)
def _cast(value, tag):  # type: ignore[no-untyped-def]
    if tag == types.float64:
        return lambda value, tag: np.float64(value)
    return lambda value, tag: np.float32(value)


def itemsize_of(tag: Any) -> int:
    """Bytes of an element of the tag's type: a constant in what is compiled."""
    raise NotImplementedError("only inside compiled code")


@compiled_overload(itemsize_of)
def _itemsize_of(tag):  # type: ignore[no-untyped-def]
    size = tag.bitwidth // 8
    return lambda tag: size


@intrinsic
def _unknown(typingctx, value):  # type: ignore[no-untyped-def]
    """The value, of which LLVM is to know nothing."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        int64 = ir.IntType(64)
        return builder.asm(ir.FunctionType(int64, [int64]), "", "=r,0", args, side_effect=False)

    return types.int64(types.int64), codegen


@inline
def in_whole_turns(dim):  # type: ignore[no-untyped-def]
    """How many of ``dim`` elements are in whole turns.

    If LLVM knew that fewer than TURN are left, it would compute them as one masked vector, which
    reaches beyond the row: into a cache line that nobody asked for.
    """
    return _unknown(dim & -TURN)


@inline
def prefetch_bytes(address, size):  # type: ignore[no-untyped-def]
    """Ask for ``size`` bytes. Those that fill whole lines are taken to begin with one."""
    for offset in range(0, size, LINE):
        prefetch(address + offset)
    if size % LINE != 0:  # they may end one line further
        prefetch(address + size - 1)


@inline
def prefetch_turn(address, first, tag):  # type: ignore[no-untyped-def]
    """Ask for elements [first, first + TURN) of the array of the tag's type at ``address``."""
    for offset in range(0, TURN * itemsize_of(tag), LINE):
        prefetch(address + first * itemsize_of(tag) + offset)


@inline
def prefetch_rest(address, first, dim, tag):  # type: ignore[no-untyped-def]
    """Ask for elements [first, dim), where a row of ``dim`` ends."""
    prefetch_bytes(address + first * itemsize_of(tag), (dim - first) * itemsize_of(tag))


@inline
def prefetch_row_turn(ahead, first, tags):  # type: ignore[no-untyped-def]
    """``prefetch_turn`` of weights and moments of a row that comes.

    ``ahead`` names their addresses; the first tags are of weights and of moments.
    """
    prefetch_turn(ahead.param, first, tags[0])
    prefetch_turn(ahead.exp_avg, first, tags[1])
    prefetch_turn(ahead.exp_avg_sq, first, tags[1])


@inline
def prefetch_row_rest(ahead, first, dim, tags):  # type: ignore[no-untyped-def]
    """``prefetch_rest`` of weights and moments, likewise."""
    prefetch_rest(ahead.param, first, dim, tags[0])
    prefetch_rest(ahead.exp_avg, first, dim, tags[1])
    prefetch_rest(ahead.exp_avg_sq, first, dim, tags[1])


@functools.lru_cache(maxsize=1024)
def reciprocal_of(size: int) -> int:
    """For ``block_of``: the 64 bits of 2^64 / size, rounded up; 0 for 1."""
    bits = ((1 << 64) - 1) // size + 1
    return bits if bits < 1 << 63 else bits - (1 << 64)


@inline
def block_of(row, reciprocal):  # type: ignore[no-untyped-def]
    """The block of a row, given the reciprocal of the blocks' size.

    What rounding adds is below row * size / 2^64, and as long as that is below 1 it does not show
    (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994): a table
    of blocks of 2^31 rows may have 2^33. A division takes four times as long.
    """
    if reciprocal == 0:
        return row
    return np.int64(multiply_high(np.uint64(row), np.uint64(reciprocal)))


@inline
def row_address(blocks: Any, block_size: int, reciprocal: int, row: int, row_bytes: int) -> int:
    """Where row ``row`` begins, given the address of each block."""
    block = block_of(row, reciprocal)
    return blocks[block] + (row - block * block_size) * row_bytes  # type: ignore[no-any-return]
