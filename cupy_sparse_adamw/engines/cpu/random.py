"""Draws new rows from a counter: a value depends on (seed, id, column) and on nothing else.

Element j of a row is made from word j % 4 of Philox4x32-10 at counter (id, j // 4, 0) under key
``seed`` (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011):

    u = (word + 0.5) / 2**32                  in (0, 1)
    x = start + step * u                      a uniform value, or a probability
    x = loc + scale * normal_quantile(x)      unless uniform
    element = x, clipped to the interval and rounded to the table's dtype

``Distribution.plan`` has the numbers. All of it in float64; a 16-bit element is rounded to float32
first. Nothing but +, -, *, /, square root and a scalar log is used, in one order for every element,
so where an element stands in a batch cannot show in its bits.

A thread takes a range of rows and cuts it into tiles of ``TILE`` counters, four elements each.
Each stage runs over a whole tile in loops of fixed length over small buffers, which LLVM turns
into vector code whatever the width of a row. Per row 16 bytes are read and D elements written.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ..._slots import Slot
from ..._types import Distribution
from ._compile import PARAM, TAGS, jit, reciprocal_of, row_address, store
from ._interop import array_of
from ._threads import num_parts, parallel_for

#: Elements a thread takes at the least: some 50 microseconds of work.
GRAIN_ELEMENTS = 8192
#: Counters per tile. The buffers of a tile, 11 KiB, stay in the first-level cache.
TILE = 64

# Multipliers of Philox4x32 and increments of its key.
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW_32, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


@jit
def philox4x32_(words, seed):  # type: ignore[no-untyped-def]
    """Replace counters by their random words: [4 * TILE] uint32, c0 of all, then c1, c2, c3."""
    k0, k1 = np.uint64(seed) & _LOW_32, np.uint64(seed) >> _32
    for _ in range(10):
        # One array and fixed distances: that the four parts are apart needs no proof at run time.
        for k in range(TILE):
            product_0 = _M0 * np.uint64(words[k])
            product_1 = _M1 * np.uint64(words[k + 2 * TILE])
            c1, c3 = np.uint64(words[k + TILE]), np.uint64(words[k + 3 * TILE])
            words[k] = (product_1 >> _32) ^ c1 ^ k0
            words[k + TILE] = product_1 & _LOW_32
            words[k + 2 * TILE] = (product_0 >> _32) ^ c3 ^ k1
            words[k + 3 * TILE] = product_0 & _LOW_32
        k0, k1 = (k0 + _W0) & _LOW_32, (k1 + _W1) & _LOW_32


# The normal quantile: algorithm AS 241, PPND16 (Wichura, Applied Statistics 37, 1988), relative
# accuracy 1e-16. Three rational functions, each for a part of (0, 1).


@jit
def _central(q):  # type: ignore[no-untyped-def]
    """Quantile of 0.5 + q for |q| <= 0.425."""
    r = 0.180625 - q * q
    above = 2.5090809287301226727e3
    above = above * r + 3.3430575583588128105e4
    above = above * r + 6.7265770927008700853e4
    above = above * r + 4.5921953931549871457e4
    above = above * r + 1.3731693765509461125e4
    above = above * r + 1.9715909503065514427e3
    above = above * r + 1.3314166789178437745e2
    above = above * r + 3.3871328727963666080e0
    below = 5.2264952788528545610e3
    below = below * r + 2.8729085735721942674e4
    below = below * r + 3.9307895800092710610e4
    below = below * r + 2.1213794301586595867e4
    below = below * r + 5.3941960214247511077e3
    below = below * r + 6.8718700749205790830e2
    below = below * r + 4.2313330701600911252e1
    below = below * r + 1.0
    return q * above / below


@jit
def _tail(r):  # type: ignore[no-untyped-def]
    """Minus the quantile of p < 0.075, given r = sqrt(-log(p)) <= 5."""
    r -= 1.6
    above = 7.74545014278341407640e-4
    above = above * r + 2.27238449892691845833e-2
    above = above * r + 2.41780725177450611770e-1
    above = above * r + 1.27045825245236838258e0
    above = above * r + 3.64784832476320460504e0
    above = above * r + 5.76949722146069140550e0
    above = above * r + 4.63033784615654529590e0
    above = above * r + 1.42343711074968357734e0
    below = 1.05075007164441684324e-9
    below = below * r + 5.47593808499534494600e-4
    below = below * r + 1.51986665636164571966e-2
    below = below * r + 1.48103976427480074590e-1
    below = below * r + 6.89767334985100004550e-1
    below = below * r + 1.67638483018380384940e0
    below = below * r + 2.05319162663775882187e0
    below = below * r + 1.0
    return above / below


@jit
def _far_tail(r):  # type: ignore[no-untyped-def]
    """Minus the quantile of p < 1.4e-11, given r = sqrt(-log(p)) > 5."""
    r -= 5.0
    above = 2.01033439929228813265e-7
    above = above * r + 2.71155556874348757815e-5
    above = above * r + 1.24266094738807843860e-3
    above = above * r + 2.65321895265761230930e-2
    above = above * r + 2.96560571828504891230e-1
    above = above * r + 1.78482653991729133580e0
    above = above * r + 5.46378491116411436990e0
    above = above * r + 6.65790464350110377720e0
    below = 2.04426310338993978564e-15
    below = below * r + 1.42151175831644588870e-7
    below = below * r + 1.84631831751005468180e-5
    below = below * r + 7.86869131145613259100e-4
    below = below * r + 1.48753612908506148525e-2
    below = below * r + 1.36929880922735805310e-1
    below = below * r + 5.99832206555887937690e-1
    below = below * r + 1.0
    return above / below


@jit
def normal_quantiles_(x, p, z, tails):  # type: ignore[no-untyped-def]
    """Set x [4 * TILE] to the normal quantiles of p; ``z`` and ``tails`` are room to work in.

    Branches that go either way would cost more than the arithmetic: every element gets
    ``_central``, and those that stand in a tail, 15 % of a normal's, are listed and done again.
    """
    for i in range(4 * TILE):
        x[i] = _central(p[i] - 0.5)
    count = 0
    for i in range(4 * TILE):
        tails[count] = i
        count += abs(p[i] - 0.5) > 0.425
    for t in range(count):
        # Into x, not into a vector's neighbours: no compiler may then take a vector log for most
        # elements and the scalar one, which may differ in the last bit, for the rest.
        x[tails[t]] = math.sqrt(-math.log(min(p[tails[t]], 1.0 - p[tails[t]])))
    for t in range(count):
        z[t] = _tail(x[tails[t]])
    for t in range(count):
        i = tails[t]
        x[i] = math.copysign(z[t] if x[i] <= 5.0 else _far_tail(x[i]), p[i] - 0.5)


@jit
def _draw_(x, words, seed, plan, p, z, tails):  # type: ignore[no-untyped-def]
    """Set x [4 * TILE] to the values at the counters in ``words``; p, z, tails are room."""
    philox4x32_(words, seed)
    for k in range(4 * TILE):
        p[k] = plan.start + plan.step * ((np.float64(words[k]) + 0.5) * 2.0**-32)
    if plan.normal:
        normal_quantiles_(x, p, z, tails)
        for k in range(4 * TILE):
            p[k] = plan.loc + plan.scale * x[k]
    for k in range(4 * TILE):
        x[k] = min(max(p[k], plan.least), plan.greatest)


@jit
def _fill_rows(  # type: ignore[no-untyped-def]
    part, begin, end, blocks, block_size, reciprocal, row_bytes, dim, rows, ids, seed, plan, tag
):
    """Fill rows[begin:end] of the slot."""
    words = np.zeros(4 * TILE, dtype=np.uint32)
    x, p, z = np.empty(4 * TILE), np.empty(4 * TILE), np.empty(4 * TILE)
    tails = np.empty(4 * TILE + 1, dtype=np.int64)
    groups = (dim + 3) // 4  # counters per row
    i, group = begin, 0
    while i < end:
        first, first_group, count = i, group, 0
        while count < TILE and i < end:
            words[count] = ids[i] & 0xFFFFFFFF
            words[count + TILE] = ids[i] >> 32
            words[count + 2 * TILE] = group
            words[count + 3 * TILE] = 0
            count += 1
            group += 1
            if group == groups:
                i, group = i + 1, 0

        _draw_(x, words, seed, plan, p, z, tails)
        i, group = first, first_group
        address = row_address(blocks, block_size, reciprocal, rows[i], row_bytes)
        for k in range(count):
            j = 4 * group
            store(address, j, x[k], tag, PARAM)
            if j + 1 < dim:
                store(address, j + 1, x[k + TILE], tag, PARAM)
            if j + 2 < dim:
                store(address, j + 2, x[k + 2 * TILE], tag, PARAM)
            if j + 3 < dim:
                store(address, j + 3, x[k + 3 * TILE], tag, PARAM)
            group += 1
            if group == groups:
                i, group = i + 1, 0
                if i < end:
                    address = row_address(blocks, block_size, reciprocal, rows[i], row_bytes)
    return 0


def init_rows_(
    slot: Slot, rows: torch.Tensor, ids: torch.Tensor, seed: int, distribution: Distribution
) -> None:
    """Fill rows with the initial values of their ids.

    Args:
        slot: changed in place.
        rows: [n] int64, distinct, in range.
        ids: [n] int64, any values.
        seed: any int64.
        distribution: what each element is drawn from.
    """
    parallel_for(
        _fill_rows,
        rows.numel(),
        num_parts(rows.numel(), GRAIN_ELEMENTS // slot.dim),
        slot.addresses(),
        slot.block_size(),
        reciprocal_of(slot.block_size()),
        slot.row_bytes,
        slot.dim,
        array_of(rows),
        array_of(ids),
        seed,
        distribution.plan(slot.dtype),
        TAGS[slot.dtype],
    )
