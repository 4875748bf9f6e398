"""The gradients that backward has left on a HashTable, neither reduced nor copied."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import functional
from ._types import MISSING, PendingGrad
from .row_store import FoundRows, RowStore


@dataclasses.dataclass
class LookupGrad:
    """What one backward through one lookup left.

    Attributes:
        found: rows [N] as they were numbered when the lookup was made, followed since.
        grad: [N, D].
        version: how often ``grad`` had been written to when it was handed over.
        stream: the CUDA stream that backward ran on, which may still be writing ``grad``.
    """

    found: FoundRows
    grad: torch.Tensor
    version: int = dataclasses.field(init=False)
    stream: torch.cuda.Stream | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        self.version = self.grad._version
        if self.grad.is_cuda:
            self.stream = torch.cuda.current_stream(self.grad.device)

    def __getstate__(self) -> dict[str, Any]:
        # A copied tensor counts versions anew: keep whether it was changed, not the count.
        return {**self.__dict__, "version": self.version - self.grad._version, "stream": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.version += self.grad._version

    def join(self) -> None:
        """Let the current stream wait for backward's, as autograd does for Parameters."""
        if self.stream is None or functional.is_capturing(self.grad.device):
            return
        current = torch.cuda.current_stream(self.grad.device)
        if current != self.stream:
            current.wait_stream(self.stream)
            self.grad.record_stream(current)
            self.found.rows.record_stream(current)


class LookupGrads:
    """All that has been left since the last ``clear``, in order.

    Rows may change hands meanwhile (delete, clear, load): gradients find their rows again by id,
    and those whose id is gone are dropped.
    """

    def __init__(self, store: RowStore) -> None:
        self._store = store
        self._grads: list[LookupGrad] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for left in self._grads:
            self._store.follow(left.found)

    def __len__(self) -> int:
        return len(self._grads)

    def append(self, found: FoundRows, grad: torch.Tensor) -> None:
        """Keep (rows [N], grad [N, D]) by reference."""
        self._grads.append(LookupGrad(found, grad))

    def clear(self) -> None:
        """Drop them all."""
        self._grads.clear()

    def replace(self, grads: Sequence[LookupGrad]) -> None:
        """Keep these instead."""
        self._grads = list(grads)

    def pieces(self, name: str) -> list[PendingGrad]:
        """Rows as they are numbered now, ``MISSING`` where the id is gone, and gradients.

        Raises:
            RuntimeError: a gradient was changed since backward; the text names the table.
        """
        for left in self._grads:
            if left.grad._version != left.version:
                raise RuntimeError(
                    f"table {name!r}: a gradient was changed in place after backward handed it to "
                    f"the table; create the table with copy_grads=True"
                )
            left.join()
        pieces = [PendingGrad(self._store.rows_now(left.found), left.grad) for left in self._grads]
        if len({piece.grad.dtype for piece in pieces}) > 1:  # a 16-bit table, some given as float32
            pieces = [PendingGrad(rows, grad.float()) for rows, grad in pieces]
        return pieces

    def by_id(self, name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(ids [n] int64, gradients [n, D]) of each piece, without those whose id is gone."""
        result = []
        for rows, grad in self.pieces(name):
            kept = rows != MISSING
            result.append((self._store.ids_of(rows[kept]), grad[kept]))
        return result

    def moved(
        self, convert: Callable[[torch.Tensor], torch.Tensor], device: torch.device
    ) -> list[LookupGrad]:
        """The gradients moved or converted, as the store is about to be."""
        moved = []
        for left in self._grads:
            left.join()
            rows, ids = left.found.rows, left.found.ids
            found = FoundRows(rows.to(device), None if ids is None else ids.to(device))
            new = LookupGrad(self._store.follow(found), convert(left.grad))
            new.version -= left.grad._version - left.version  # changed stays changed
            moved.append(new)
        return moved
