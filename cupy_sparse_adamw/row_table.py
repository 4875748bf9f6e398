"""What the optimizer sees of a table whose rows are in a RowStore."""

from __future__ import annotations

from typing import Any

import torch

from . import _checks, functional
from ._locks import Lock, locked
from ._slots import Slot
from ._types import MISSING, Lagging, Pending
from .lookup_grads import LookupGrad, LookupGrads
from .missed_steps import MissedSteps
from .row_store import (
    EXP_AVG,
    EXP_AVG_SQ,
    LAST_STEP,
    MOMENT_SLOTS,
    OPTIMIZER_SLOTS,
    ROW_STEP,
    FoundRows,
    RowStore,
)
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

    @property
    def lock(self) -> Lock:
        """Held by the thread that reads or changes the table; reentrant."""
        return self._store.lock

    @property
    def lock_owner(self) -> RowStore:
        """The rows."""
        return self._store

    @locked
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

    # ------------------------------------------------------------------ what rows missed

    @property
    def missed(self) -> MissedSteps | None:
        """What rows that are behind have missed."""
        return self._store.missed

    @missed.setter
    def missed(self, log: MissedSteps | None) -> None:
        self._store.missed = log

    def begin_to_miss(
        self, state: dict[str, Any], log: MissedSteps, *, as_saved: bool = False
    ) -> None:
        """See ``Table.begin_to_miss``."""
        slot = self._optimizer_slot("last_step")
        if not as_saved:
            slot.fill(log.t)
        self.missed = log

    def new_last_step(self, t: int) -> Slot:
        """See ``Table.new_last_step``."""
        slot = self._store.new_slots(["last_step"])["last_step"]
        slot.fill(t)
        return slot

    def last_step(self, state: dict[str, Any]) -> Slot:
        """See ``Table.last_step``."""
        return self._store.slots[LAST_STEP]

    def row_step(self, state: dict[str, Any]) -> Slot:
        """See ``Table.row_step``."""
        return self._optimizer_slot("row_step")

    def _optimizer_slot(self, key: str) -> Slot:
        slots, name = self._store.slots, OPTIMIZER_SLOTS[key]
        if name not in slots:
            slots[name] = self._store.new_slots([key])[key]
        return slots[name]

    def lagging(self) -> Lagging | None:
        """See ``Table.lagging``."""
        log = self._store.missed
        if log is None or log.is_empty:
            return None
        missed, kind = log.on(self.device, self.dtype), log.kind(self.dtype)
        last_step = self._store.slots[LAST_STEP]
        return Lagging(self._store.embedding, *self._moments(), last_step, missed, kind)

    def num_rows_at_most(self) -> int:
        """See ``Table.num_rows_at_most``."""
        return self._store.num_rows_bound

    @locked
    def caught_up(self, ids: torch.Tensor) -> torch.Tensor:
        """What ids read as in eval mode; see ``SparseOptimizer.caught_up``."""
        flat = self._flat(_checks.require_ids(ids))
        return self.read(self._store.find(flat)).view(*ids.shape, *self.embedding_shape)

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """The embeddings [N, D] of rows [N] int64 as they are now; zeros for ``MISSING``."""
        lagging = self.lagging()
        if lagging is None:
            return functional.gather(self._store.embedding, rows)
        return functional.gather_current(lagging, rows)

    # ------------------------------------------------------------------ moments

    def moments(self, pending: Pending, state: dict[str, Any]) -> tuple[Slot, Slot]:
        """The slots of the moments; see ``Table.moments``."""
        self.note_update(pending)
        return self._moments()

    def _moments(self) -> tuple[Slot, Slot]:
        slots = self._store.slots
        if EXP_AVG not in slots:
            new = self._store.new_slots(MOMENT_SLOTS)
            slots |= {MOMENT_SLOTS[key]: slot for key, slot in new.items()}
        return slots[EXP_AVG], slots[EXP_AVG_SQ]

    def drop_moments(self) -> None:
        """Forget the moments: the table gets a new owner."""
        self.saved_rows = None
        self.missed = None
        for name in OPTIMIZER_SLOTS.values():
            self._store.slots.pop(name, None)

    def export_moments(self, state: dict[str, Any]) -> dict[str, Any]:
        """Moments by id; see ``Table.export_moments``."""
        rows = self._store.rows()
        first, second = self._moments()
        result = {
            "exp_avg": functional.gather(first, rows),
            "exp_avg_sq": functional.gather(second, rows),
            "dtype": dtype_name(self.dtype),
            "ids": self._store.ids_of(rows),
        }
        if ROW_STEP in self._store.slots:
            result["row_step"] = functional.gather(self.row_step(state), rows)
        return result

    def build_moments(self, name: str, saved: dict[str, Any]) -> dict[str, Any]:
        """New slots with the saved moments; see ``Table.build_moments``."""
        values = require_moments(name, saved, self.dtype, self._store.embedding.dim)
        rows = self._rows_of_saved(name, "moments", saved.get("ids"))
        require_moment_rows(name, rows, values["exp_avg"].shape[0])
        built = self._store.new_slots(values)
        for key, slot in built.items():
            functional.scatter_(slot, rows, values[key].to(self.device))
        return built

    def _rows_of_saved(self, name: str, what: str, ids: Any) -> torch.Tensor:
        """Rows of saved ids [n], which must be in the table; ``MISSING`` of those it refuses."""
        if not isinstance(ids, torch.Tensor):
            raise ValueError(f"table {name!r}: the saved {what} have no ids; is it a HashTable's?")
        ids = self._flat(_checks.require_ids(ids))
        rows = self._store.find(ids)
        require_held(name, what, (rows != MISSING) | ~self.accepts(ids))
        return rows

    def install_moments(self, state: dict[str, Any], built: dict[str, Any] | None) -> None:
        """Replace the moment slots by built ones, or drop them."""
        self.drop_moments()
        for key, slot in (built or {}).items():
            self._store.slots[OPTIMIZER_SLOTS[key]] = slot

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
        with self._store.lock:
            self._grads.clear()
            self._store.unpin()

    def _require_grad(self, name: str, what: str, grad: Any, rows: torch.Tensor) -> torch.Tensor:
        """Gradients [N, D] for rows [N], of a dtype that the table takes."""
        grad = _checks.require_rows_of(
            name, what, grad, rows.numel(), self.embedding_shape, self.device
        )
        allowed = (self.dtype,) if self.dtype.itemsize > 2 else (self.dtype, torch.float32)
        return _checks.require_dtype(name, what, grad, allowed)
