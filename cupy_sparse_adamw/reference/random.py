"""Initial values of new rows: a pure function of (seed, id, column), drawn from a counter."""

from __future__ import annotations

import math

import torch

from .._slots import Slot
from .._types import Distribution, DistributionKind
from .blocks import by_block

_LOW_32 = 0xFFFFFFFF


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * b for 32-bit a and b, by halves that fit an int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: torch.Tensor, seed: int) -> torch.Tensor:
    """Philox4x32-10: four random words for each counter under the key ``seed``.

    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.

    Args:
        counter: [..., 4] int64, each element 32 bits.
        seed: an int64: its low half is the key's first word, its high half the second.

    Returns:
        words [..., 4] int64, each 32 bits.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = seed & _LOW_32, (seed >> 32) & _LOW_32
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW_32, (k1 + 0xBB67AE85) & _LOW_32
    return torch.stack([c0, c1, c2, c3], -1)


def uniforms(ids: torch.Tensor, dim: int, seed: int) -> torch.Tensor:
    """A share u [n, D] float64 in (0, 1) for each element, of 32 random bits.

    Element j of an id is word j % 4 at counter (id's low half, id's high half, j // 4, 0).
    """
    group = torch.arange((dim + 3) // 4, device=ids.device)
    low, high = ids[:, None] & _LOW_32, (ids[:, None] >> 32) & _LOW_32
    counter = torch.stack(torch.broadcast_tensors(low, high, group, group.new_zeros(())), -1)
    words = philox4x32(counter, seed).flatten(1)[:, :dim]
    return (words.double() + 0.5) * 2.0**-32


def _normal_cdf(z: float) -> float:
    return math.erfc(-z / math.sqrt(2.0)) / 2.0


def quantile(distribution: Distribution, u: torch.Tensor) -> torch.Tensor:
    """The values [n, D] float64 below which a share u [n, D] float64 of the distribution lies."""
    kind, loc, scale, low, high = distribution
    values: torch.Tensor
    if kind == DistributionKind.CONSTANT:
        values = torch.full_like(u, loc)
    elif kind == DistributionKind.UNIFORM:
        values = low + (high - low) * u
    elif kind == DistributionKind.NORMAL:
        values = loc + scale * torch.special.ndtri(u)
    else:
        a, b = (low - loc) / scale, (high - loc) / scale
        if a <= -b:
            start, stop = _normal_cdf(a), _normal_cdf(b)
            values = loc + scale * torch.special.ndtri(start + (stop - start) * u)
        else:  # mostly above the mean, where probabilities crowd against 1: the mirror image
            start, stop = _normal_cdf(-a), _normal_cdf(-b)
            values = loc - scale * torch.special.ndtri(start + (stop - start) * u)
    return values


@torch.no_grad()
def init_rows_(
    slot: Slot, rows: torch.Tensor, ids: torch.Tensor, seed: int, distribution: Distribution
) -> None:
    """Fill rows with the initial values of their ids.

    A value is ``quantile(uniforms)``, clipped so that it stays in the distribution's interval
    when it is rounded to the table's dtype (16-bit types by way of float32).

    Args:
        slot: changed in place.
        rows: [n] int64, distinct, in range.
        ids: [n] int64, any values.
        seed: any int64.
        distribution: what each element is drawn from.
    """
    values = quantile(distribution, uniforms(ids, slot.dim, seed))
    values = values.clamp(*distribution.limits(slot.dtype))
    if slot.dtype != torch.float64:
        values = values.float()
    values = values.to(slot.dtype)
    for block, here, places in by_block(slot, rows):
        block[places] = values[here]
