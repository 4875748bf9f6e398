"""What the optimizer sees of a table whose rows are in a RowStore."""

from __future__ import annotations

from typing import Any

import torch

from . import _checks, functional
from ._types import MISSING, Pending, Slot
from .lookup_grads import LookupGrad, LookupGrads
from .row_store import EXP_AVG, EXP_AVG_SQ, FoundRows, RowStore
from .tables import (
    Table,
    dtype_name,
    require_held,
    require_moment_rows,
    require_moments,
    require_piece,
)


class RowTable(Table):
    """A table of rows that are keyed by id.

    Attributes:
        embedding_shape: shape of one embedding, of D elements.
        grad_reduce_by: "worker" or "id": what a row's sum of gradients is divided by.
        _store: the rows.
        _grads: the gradients that wait for a step.
    """

    embedding_shape: tuple[int, ...]
    grad_reduce_by: str
    _store: RowStore
    _grads: LookupGrads

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the embeddings."""
        return self._store.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows live."""
        return self._store.embedding.device

    def __len__(self) -> int:
        return self._store.num_rows

    @property
    def key(self) -> Any:
        """The table itself."""
        return self

    def accepts(self, ids: torch.Tensor) -> torch.Tensor:
        """Which ids [n] int64 a load takes, as a bool tensor [n]."""
        return torch.ones_like(ids, dtype=torch.bool)

    @property
    def saved_rows(self) -> Any:
        """Which rows are as in a checkpoint; see ``RowStore.saved_rows``."""
        return self._store.saved_rows

    @saved_rows.setter
    def saved_rows(self, saved: Any) -> None:
        self._store.saved_rows = saved

    def moments(self, pending: Pending, state: dict[str, Any]) -> tuple[Slot, Slot]:
        """The slots of the moments; see ``Table.moments``."""
        for piece in pending.pieces:
            self.note_change(piece.rows)
        return self._moments()

    def _moments(self) -> tuple[Slot, Slot]:
        slots = self._store.slots
        if EXP_AVG not in slots:
            slots[EXP_AVG], slots[EXP_AVG_SQ] = self._store.new_moments()
        return slots[EXP_AVG], slots[EXP_AVG_SQ]

    def drop_moments(self) -> None:
        """Forget the moments: the table gets a new owner."""
        self.saved_rows = None
        for name in (EXP_AVG, EXP_AVG_SQ):
            self._store.slots.pop(name, None)

    def export_moments(self, state: dict[str, Any]) -> dict[str, Any]:
        """Moments by id; see ``Table.export_moments``."""
        rows = self._store.rows()
        first, second = self._moments()
        return {
            "exp_avg": functional.gather(first, rows),
            "exp_avg_sq": functional.gather(second, rows),
            "dtype": dtype_name(self.dtype),
            "ids": self._store.ids_of(rows),
        }

    def build_moments(self, name: str, saved: dict[str, Any]) -> tuple[Any, Any]:
        """New slots with the saved moments; see ``Table.build_moments``."""
        values = require_moments(name, saved, self.dtype, self._store.embedding.dim)
        rows = self._rows_of_saved(name, "moments", saved.get("ids"))
        require_moment_rows(name, rows, values[0].shape[0])
        built = self._store.new_moments()
        for slot, value in zip(built, values, strict=True):
            functional.scatter_(slot, rows, value.to(self.device))
        return built

    def _rows_of_saved(self, name: str, what: str, ids: Any) -> torch.Tensor:
        """Rows of saved ids [n], which must be in the table; ``MISSING`` of those it refuses."""
        if not isinstance(ids, torch.Tensor):
            raise ValueError(f"table {name!r}: the saved {what} have no ids; is it a HashTable's?")
        ids = self._flat(_checks.require_ids(ids))
        rows = self._store.find(ids)
        require_held(name, what, (rows != MISSING) | ~self.accepts(ids))
        return rows

    def install_moments(self, state: dict[str, Any], built: tuple[Any, Any] | None) -> None:
        """Replace the moment slots by built ones, or drop them."""
        self.drop_moments()
        if built is not None:
            self._store.slots[EXP_AVG], self._store.slots[EXP_AVG_SQ] = built

    def export_pending(self, name: str) -> list[dict[str, Any]]:
        """Gradients by id; those whose id is gone are left out."""
        return [{"ids": ids, "grad": grad} for ids, grad in self._grads.by_id(name)]

    def build_pending(self, name: str, saved: list[dict[str, Any]]) -> Any:
        """Gradients of the saved ids' rows; see ``Table.build_pending``."""
        grads = []
        for piece in saved:
            require_piece(name, piece)
            rows = self._rows_of_saved(name, "gradients", piece.get("ids"))
            if "grad" not in piece:
                raise ValueError(f"table {name!r}: a saved gradient has no 'grad'")
            grad = piece["grad"].to(self.device, copy=True)
            grad = self._require_grad(name, "its saved gradient", grad, rows)
            grads.append(LookupGrad(self._store.follow(FoundRows(rows)), grad))
        return grads

    def install_pending(self, built: Any) -> None:
        """Replace the gradients."""
        self._grads.replace(built or [])

    def _flat(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.detach().to(self.device, torch.int64).reshape(-1).contiguous()

    # ------------------------------------------------------------------ gradients

    def pending(self, name: str) -> Pending | None:
        """The gradients of this step; see ``Table.pending``."""
        if not self._grads:
            return None
        return Pending(
            name,
            self._store.embedding,
            self._store.num_rows_bound,
            self._grads.pieces(name),
            drop_missing=True,
            grad_scale=1.0 / _checks.require_world_size()
            if self.grad_reduce_by == "worker"
            else 1.0,
            mean=self.grad_reduce_by == "id",
            row_count=self._store.row_count,
        )

    def clear_pending(self, set_to_none: bool = True) -> None:
        """Drop the gradients; see ``Table.clear_pending``."""
        self._grads.clear()
        self._store.unpin()

    def _require_grad(self, name: str, what: str, grad: Any, rows: torch.Tensor) -> torch.Tensor:
        """Gradients [N, D] for rows [N], of a dtype that the table takes."""
        grad = _checks.require_rows_of(
            name, what, grad, rows.numel(), self.embedding_shape, self.device
        )
        allowed = (self.dtype,) if self.dtype.itemsize > 2 else (self.dtype, torch.float32)
        return _checks.require_dtype(name, what, grad, allowed)
