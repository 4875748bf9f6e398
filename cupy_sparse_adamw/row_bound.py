"""How many rows an index has at the most, known without waiting for a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from . import functional
from ._types import HostCopy


class Rows(NamedTuple):
    """Rows of an index: how many are ``in_use``, and how many have been ``numbered`` so far.

    Free rows are used before fresh ones are numbered.
    """

    in_use: int
    numbered: int

    def plus(self, count: int) -> Rows:
        """After ``count`` more ids got a row."""
        return Rows(self.in_use + count, max(self.numbered, self.in_use + count))


class RowBound:
    """Upper bounds on the rows of an index, each tighter than the last, and dearer.

    A lookup may use as many rows as it has ids, so ``at_most`` rises by that. Where reading the
    counters would wait for all that a GPU has to do, a copy of them can be sent to the host behind
    a lookup (``send_copy``); by the time it is needed it has mostly come. That rows became free is
    known from the counters alone.

    Args:
        counters: of a ``RowIndex``.
        bound: what is known of them.
    """

    def __init__(self, counters: torch.Tensor, bound: Rows) -> None:
        self._counters = counters
        self._bound = bound
        self._copy: HostCopy | None = None
        self._since_copy = 0  # what was added behind it

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_copy": None}

    def reading_waits(self) -> bool:
        """Whether ``exactly`` has a GPU to wait for."""
        return self._counters.device.type != "cpu"

    def add(self, count: int) -> None:
        """So many rows may get into use now."""
        self._bound = self._bound.plus(count)
        self._since_copy += count

    def at_most(self) -> Rows:
        """The bound at hand. Never waits; on the CPU it is the number itself."""
        if not self.reading_waits():
            return self.exactly()
        copy, device = self._copy, self._counters.device
        # Under capture CUDA forbids even to ask.
        if copy is not None and not functional.is_capturing(device) and copy.ready():
            return self.copied()
        return self._bound

    def copied(self) -> Rows:
        """A tighter bound, if a copy is under way. Waits for it, but for nothing behind it."""
        if self._copy is not None:
            then = _rows(self._copy.values()).plus(self._since_copy)
            self._bound = Rows(*map(min, self._bound, then))
            self._copy = None
        return self._bound

    def exactly(self) -> Rows:
        """The numbers themselves. Waits for the device."""
        self._bound, self._copy = _rows(self._counters.tolist()), None
        return self._bound

    def send_copy(self) -> None:
        """Send the numbers to the host, unless earlier ones are still under way."""
        if self._copy is None:
            self._copy = functional.copy_to_host(self._counters)
            self._since_copy = 0


def _rows(counters: Iterable[int]) -> Rows:
    numbered, free, _ = map(int, counters)
    return Rows(numbered - free, numbered)
