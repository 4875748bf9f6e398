"""The rules of mode "dense" go on by a step: ``Missed.rules``, for those that rows will look up."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch

from ..._types import RULE_NODES, RULE_WIDTH, STEP_WIDTH
from ._compile import FLOAT64, jit, numbers_at, view

#: Entries of the rules that are extended together; a tile of them takes 11 KiB.
TILE = 64
#: The least c of a rule.
SMALLEST = float(np.finfo(np.float32).tiny)

# Rows of a tile, each of TILE entries: those of ``state``, then room.
_KEPT, _BETA1, _BETA2, _COUNT, _ALPHA = range(5)
_BETA = _ALPHA + RULE_NODES
_NODE = _BETA + RULE_NODES
_GAMMA, _SIGMA, _SHIFT, _REST, _ROWS = range(_NODE + 1, _NODE + 6)


@jit
def _extend_tile(tile, step):  # type: ignore[no-untyped-def]
    """Take one more step into TILE entries.

    Loops of fixed length over one array, whose rows are a fixed distance apart, become vector
    code. Gragg and Harwood's RKPW ("The numerically stable reconstruction of Jacobi matrices from
    spectral data", Numerische Mathematik 44, 1984): row k of the matrices at a time.
    """
    decay, step_size, inv_sqrt_correction2, eps, beta1, beta2 = step
    for i in range(TILE):
        tile[_KEPT * TILE + i] *= 1.0 - decay
        tile[_BETA1 * TILE + i] *= beta1
        tile[_BETA2 * TILE + i] *= beta2
        tile[_BETA * TILE + i] *= 1.0 - decay
        rho = 1.0 / (inv_sqrt_correction2 * math.sqrt(tile[_BETA2 * TILE + i]))
        weight, node = step_size * tile[_BETA1 * TILE + i] * rho, 1.0 / (eps * rho)
        is_node = (weight > 0.0) & (weight < np.inf) & (node < np.inf)
        tile[_REST * TILE + i] = weight if is_node else 0.0
        tile[_NODE * TILE + i] = node if is_node else 0.0
        tile[_GAMMA * TILE + i] = 1.0
        tile[_SIGMA * TILE + i] = 0.0
        tile[_SHIFT * TILE + i] = 0.0
    for k in range(RULE_NODES):
        for i in range(TILE):
            is_there = k < tile[_COUNT * TILE + i]
            node, rest = tile[_NODE * TILE + i], tile[_REST * TILE + i]
            alpha = tile[(_ALPHA + k) * TILE + i] if is_there else node
            beta = tile[(_BETA + k) * TILE + i] if is_there else 0.0
            total = beta + rest
            tile[(_BETA + k) * TILE + i] = tile[_GAMMA * TILE + i] * total
            gamma = beta / total if total > 0.0 else 1.0
            sigma = rest / total if total > 0.0 else 0.0
            shift = sigma * (alpha - node) - gamma * tile[_SHIFT * TILE + i]
            tile[(_ALPHA + k) * TILE + i] = alpha - (shift - tile[_SHIFT * TILE + i])
            rest_before = tile[_SIGMA * TILE + i] * beta
            tile[_REST * TILE + i] = shift * shift / sigma if sigma > 0.0 else rest_before
            tile[_GAMMA * TILE + i] = gamma
            tile[_SIGMA * TILE + i] = sigma
            tile[_SHIFT * TILE + i] = shift
    for i in range(TILE):
        count = tile[_COUNT * TILE + i]
        is_node = tile[_NODE * TILE + i] > 0.0
        tile[_COUNT * TILE + i] = min(count + (1.0 if is_node else 0.0), float(RULE_NODES))


@jit
def _fill_rules(tile, rules, count):  # type: ignore[no-untyped-def]
    """Fill rules [count, RULE_WIDTH] from the first entries of a tile; see ``Missed.rules``."""
    for i in range(count):
        rule, nodes = view(rules + 8 * RULE_WIDTH * i, RULE_WIDTH, FLOAT64), tile[_COUNT * TILE + i]
        c = 1.0 / tile[_ALPHA * TILE + i] if nodes > 0.0 else 1.0
        rule[0] = tile[_KEPT * TILE + i] - 1.0
        rule[1] = tile[_BETA1 * TILE + i]
        rule[2] = tile[_BETA2 * TILE + i]
        rule[3] = tile[_BETA * TILE + i]
        rule[4] = max(c, SMALLEST)
        for k in range(1, RULE_NODES):
            d = tile[(_ALPHA + k) * TILE + i] * c - 1.0
            rule[4 + k] = d if k < nodes else 0.0
            rule[4 + RULE_NODES - 1 + k] = tile[(_BETA + k) * TILE + i] * c * c
        rule[RULE_WIDTH - 1] = 0.0


@jit
def _extend(state, state_width, rules, begin, end, step):  # type: ignore[no-untyped-def]
    """Extend entries [begin, end); arrays are addresses, of which a call unpacks none."""
    tile = np.zeros(_ROWS * TILE)
    numbers = numbers_at(step, STEP_WIDTH, FLOAT64)
    for first in range(begin, end, TILE):
        count = min(TILE, end - first)
        for row in range(_NODE):
            entries = view(state + 8 * (row * state_width + first), count, FLOAT64)
            for i in range(count):
                tile[row * TILE + i] = entries[i]
        _extend_tile(tile, numbers)
        for row in range(_NODE):
            entries = view(state + 8 * (row * state_width + first), count, FLOAT64)
            for i in range(count):
                entries[i] = tile[row * TILE + i]
        _fill_rules(tile, rules + 8 * RULE_WIDTH * first, count)


@functools.cache
def _compile_extend() -> None:
    _extend(0, 0, 0, 0, 0, np.zeros(STEP_WIDTH).ctypes.data)  # of no entries


def prepare_extend_rules(
    state: torch.Tensor, rules: torch.Tensor, begin: int, end: int, step: torch.Tensor
) -> Callable[[], None]:
    """Take one more missed step into entries [begin, end) of ``Missed.rules``, all but done.

    Args:
        state: [4 + 2 * RULE_NODES, n] float64, changed in place; for each entry the product of
            1 - lr * weight_decay, of beta1, and of beta2, over the steps so far; how many nodes
            its rule has; diagonal and off-diagonal of the rule's Jacobi matrix, the latter squared
            and led by the sum of all weights.
        rules: [n, RULE_WIDTH] float64, changed in place.
        begin: first entry.
        end: one beyond the last.
        step: [STEP_WIDTH] float64, a row of ``Missed.steps``.

    Returns:
        A function that changes ``state`` and ``rules``.
    """
    _compile_extend()

    def apply() -> None:
        _extend(state.data_ptr(), state.stride(0), rules.data_ptr(), begin, end, step.data_ptr())

    return apply
