"""How many rows an index has numbered at the most, known without waiting for a GPU."""

from __future__ import annotations

import torch

from . import functional
from ._types import HostCopy


class RowBound:
    """Upper bounds on the first of an index's counters, each tighter than the last, and dearer.

    A lookup may number as many rows as it has ids, so ``at_most`` rises by that. Where reading the
    counter would wait for all that a GPU has to do, a copy of it can be sent to the host behind a
    lookup (``send_copy``); by the time it is needed it has mostly come.

    Args:
        counters: of a ``RowIndex``.
        bound: what is known of them.
    """

    def __init__(self, counters: torch.Tensor, bound: int) -> None:
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
        """So many rows may be numbered now."""
        self._bound += count
        self._since_copy += count

    def at_most(self) -> int:
        """The bound at hand. Never waits; on the CPU it is the number itself."""
        if not self.reading_waits():
            return self.exactly()
        copy, device = self._copy, self._counters.device
        # Under capture CUDA forbids even to ask.
        if copy is not None and not functional.is_capturing(device) and copy.ready():
            return self.copied()
        return self._bound

    def copied(self) -> int:
        """A tighter bound, if a copy is under way. Waits for it, but for nothing behind it."""
        if self._copy is not None:
            numbered = int(self._copy.values()[0])
            self._bound = min(self._bound, numbered + self._since_copy)
            self._copy = None
        return self._bound

    def exactly(self) -> int:
        """The number itself. Waits for the device."""
        self._bound, self._copy = int(self._counters[0]), None
        return self._bound

    def send_copy(self) -> None:
        """Send the number to the host, unless an earlier one is still under way."""
        if self._copy is None:
            self._copy = functional.copy_to_host(self._counters)
            self._since_copy = 0
