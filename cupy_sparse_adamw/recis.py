"""RecIS's hash tables as tables of the optimizer, through RecIS's Python bindings (1.0.0) alone.

RecIS's ``HashtableImpl`` owns rows and gradients; nothing here imports RecIS. Moments lie in two
slots of the table, so that its growth and deletions keep them beside the rows.

**Which gradients are right.** ``grad(1)`` is a sparse COO tensor. If all N rows accepted since
``clear_grad()`` are distinct, its indices are those rows as they came, its values their gradients
and its first dimension their maximum + 1. If any row repeats, within a lookup or across lookups,
its N indices are positions in the list of U < N distinct rows, so they must repeat. Indices that
repeat are therefore exactly the wrong ones, and ``RecisTable.pending`` refuses them. What the
bindings cannot tell is whether a row still belongs to the id that was looked up: see
docs/from-recis.md.
"""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

import torch

from . import _checks, functional
from ._slots import Slot
from ._types import MISSING, MOMENT_DTYPE, Pending, PendingGrad
from .tables import (
    Table,
    dtype_name,
    require_held,
    require_moment_rows,
    require_moments,
    require_piece,
)

EMBEDDING = "embedding"
#: RecIS's own optimizer gives its moments the same names.
MOMENTS = ("sparse_adamw_exp_avg", "sparse_adamw_exp_avg_sq")

#: id of a HashtableImpl -> its adapter, which keeps the impl alive, and so the id its own.
_adapters: weakref.WeakValueDictionary[int, RecisTable] = weakref.WeakValueDictionary()


class _Blocks:
    """A slot of RecIS as a ``Slot`` over the same memory, made anew when its blocks change."""

    def __init__(self, slot: Any, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._recis_slot = slot
        self._layout = dim, int(slot.block_size()), dtype, device
        self._addresses: list[int] = []
        #: The slot over the blocks that ``refresh`` found.
        self.slot = Slot.over_blocks(slot.name(), *self._layout, [])

    def refresh(self) -> Slot:
        """``slot`` over the blocks that are there now; the same one while they are the same."""
        blocks = self._recis_slot.values()
        addresses = [block.data_ptr() for block in blocks]
        if addresses != self._addresses:
            self.slot = Slot.over_blocks(self.slot.name(), *self._layout, blocks)
            self._addresses = addresses
        return self.slot

    def zero_(self) -> None:
        """Set all rows to zero."""
        for block in self._recis_slot.values():
            block.zero_()

    def any(self) -> bool:
        """Whether an element is not zero. Waits for the device."""
        return any(bool(block.any()) for block in self._recis_slot.values())


class RecisTable(Table):
    """A RecIS ``HashtableImpl``. ``RecisTable.of`` gives each of them one adapter.

    Args:
        name: the table's name, for error texts.
        impl: the ``HashtableImpl``. It must have no row yet, or slots for the moments already:
            ``append_filter_slot`` makes no memory for rows that exist.

    Raises:
        TypeError: its dtype or shape, or those of slots for moments, do not fit.
        RuntimeError: it has rows and no slots for moments.
    """

    keeps_steps = False

    def __init__(self, name: str, impl: Any) -> None:
        self._impl = impl
        slots = {slot.name(): slot for slot in impl.slot_group().slots()}
        embedding = impl.slot_group().slot_by_name(EMBEDDING)
        sample = _sample(embedding)
        if sample.dim() != 2 or sample.shape[1] == 0:
            raise TypeError(
                f"{name}: a RecIS table must have an embedding_shape [D], its rows have shape "
                f"{list(sample.shape[1:])}"
            )
        self._dtype = _checks.require_table_dtype(name, sample.dtype)
        self._device = sample.device
        self._dim = sample.shape[1]
        self._embedding = self._blocks_of(embedding, self.dtype)
        self._moments: dict[str, _Blocks] = {}
        self._must_be_zero = True  # t is 0, so moments are zero until the first update
        for moment in MOMENTS:
            if moment in slots:
                self._moments[moment] = self._require_moment(name, slots[moment])
            elif embedding.values():
                raise RuntimeError(
                    f"table {name!r} has rows already, and RecIS gives a new slot memory for later "
                    f"rows only; give the table to SparseAdamW before its first lookup, insert or "
                    f"load"
                )
        self._require_aligned(name)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the embeddings."""
        return self._dtype

    @classmethod
    def of(cls, name: str, impl: Any) -> RecisTable:
        """The adapter of ``impl``, made at the first call: it is what an optimizer owns."""
        table = _adapters.get(id(impl))
        if table is None:
            table = _adapters[id(impl)] = cls(name, impl)
        return table

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Asked by copy.deepcopy and pickle."""
        raise TypeError(
            "a RecIS table can be neither copied nor pickled; save optimizer.state_dict(), and "
            "load it into an optimizer over the other table"
        )

    def _blocks_of(self, slot: Any, dtype: torch.dtype) -> _Blocks:
        return _Blocks(slot, self._dim, dtype, self._device)

    def _require_moment(self, name: str, slot: Any) -> _Blocks:
        """A slot that is there already, for moments, if it fits."""
        sample, dtype = _sample(slot), MOMENT_DTYPE[self.dtype]
        found = sample.dtype, slot.flat_size(), sample.device
        if found != (dtype, self._dim, self._device):
            raise TypeError(
                f"table {name!r}: its slot {slot.name()} is {found[0]} with D = {found[1]} on "
                f"{found[2]} (RecIS's SparseAdamW makes moments of the table's dtype), but the "
                f"moments of this {self.dtype} table must be {dtype} with D = {self._dim} on "
                f"{self._device}; a slot cannot be changed, so make a new table, give it to this "
                f"optimizer first, then insert ids and embeddings"
            )
        return self._blocks_of(slot, dtype)

    def _require_aligned(self, name: str) -> None:
        """Refresh all slots; raise RuntimeError unless every row of the table has moments."""
        rows = self._embedding.refresh().num_rows()
        for moment, blocks in self._moments.items():
            if (held := blocks.refresh().num_rows()) != rows:
                raise RuntimeError(
                    f"table {name!r}: its slot {moment} has memory for {held} rows, its embeddings "
                    f"for {rows}: it was added after the first rows, or memory ran out in growing; "
                    f"make a new table, give it to SparseAdamW first, then insert ids and "
                    f"embeddings"
                )

    # ------------------------------------------------------------------ what it is

    @property
    def key(self) -> Any:
        """The adapter: each HashtableImpl has one."""
        return self

    @property
    def device(self) -> torch.device:
        """Where the rows live."""
        return self._device

    def __len__(self) -> int:
        """Rows that memory is held for: RecIS does not tell which of them are in use."""
        return self._embedding.refresh().num_rows()

    # ------------------------------------------------------------------ gradients

    def pending(self, name: str) -> Pending | None:
        """What ``grad(1)`` returns; see ``Table.pending``. Waits for the device, as RecIS does.

        Raises:
            RuntimeError: its indices repeat or are no rows of the table.
            TypeError, ValueError: dtype or shape do not fit.
        """
        grad = self._grad(name)
        if grad is None:
            return None
        self._require_aligned(name)
        param = self._embedding.slot
        values = grad._values().to(self._device)
        indices = grad._indices().to(self._device)
        if grad.sparse_dim() != 1:
            _refuse(name, f"has {grad.sparse_dim()} sparse dimensions")
        rows = indices[0]
        _checks.require_rows_of(
            name, "its gradient", values, rows.numel(), (self._dim,), self._device
        )
        _checks.require_dtype(name, "its gradient", values, (self.dtype,))
        _require_rows(name, rows, grad.shape[0], param.num_rows())
        # -1 is an id that a read-only lookup did not find.
        return Pending(
            name, param, param.num_rows(), [PendingGrad(rows, values)], drop_missing=True
        )

    def _grad(self, name: str) -> torch.Tensor | None:
        """``grad(1)``, or None if nothing was accepted: no binding tells, but grad() fails then."""
        try:
            grad: torch.Tensor = self._impl.grad(1)
        except (RuntimeError, ValueError) as error:  # which of them depends on the torch version
            if "expected a non-empty list of Tensors" in str(error):
                return None
            raise RuntimeError(
                f"table {name!r}: RecIS cannot put its gradients together: {error}; drop them with "
                f"the table's clear_grad()"
            ) from error
        if grad.layout is not torch.sparse_coo:
            _refuse(name, f"is a {grad.layout} tensor")
        return grad

    def clear_pending(self, set_to_none: bool = True) -> None:
        """``clear_grad``."""
        self._impl.clear_grad()

    # ------------------------------------------------------------------ moments

    def moments(self, pending: Pending, state: dict[str, Any]) -> tuple[Slot, Slot]:
        """The slots of the moments; see ``Table.moments``.

        Raises:
            RuntimeError: they were filled since the optimizer got the table, at an unknown t.
        """
        if self._must_be_zero and any(blocks.any() for blocks in self._moments.values()):
            raise RuntimeError(
                f"table {pending.name!r}: something (RecIS's loader?) filled its slots "
                f"{MOMENTS[0]} and {MOMENTS[1]} after the optimizer had got the table, and how "
                f"many updates they stand for is not known; load them with "
                f"optimizer.load_state_dict, which takes that number, see docs/from-recis.md"
            )
        self._must_be_zero = False
        first, second = MOMENTS
        return self._moments[first].slot, self._moments[second].slot  # pending() refreshed them

    def _slots(self) -> tuple[Slot, Slot]:
        first, second = MOMENTS
        return self._moments[first].refresh(), self._moments[second].refresh()

    def drop_moments(self) -> None:
        """Zero the slots of the moments, or add them: RecIS cannot remove a slot."""
        for moment in MOMENTS:
            if moment in self._moments:
                self._moments[moment].zero_()
            else:
                self._moments[moment] = self._append(moment)
        self._must_be_zero = True

    def _append(self, moment: str) -> _Blocks:
        dtype = MOMENT_DTYPE[self.dtype]
        group = self._impl.slot_group()
        shape = [group.slot_by_name(EMBEDDING).block_size(), self._dim]
        zeros = torch.classes.recis.Generator.make_constant_generator(shape, dtype, 0.0)
        self._impl.append_filter_slot(moment, dtype, self._dim, zeros)
        return self._blocks_of(group.slot_by_name(moment), dtype)

    # ------------------------------------------------------------------ state

    def export_moments(self, state: dict[str, Any]) -> dict[str, Any]:
        """Moments by id, as those of a HashTable; see ``Table.export_moments``."""
        ids, rows = self._ids_map()
        first, second = self._slots()
        return {
            "exp_avg": functional.gather(first, rows),
            "exp_avg_sq": functional.gather(second, rows),
            "dtype": dtype_name(self.dtype),
            "ids": ids,
        }

    def build_moments(self, name: str, saved: dict[str, Any]) -> dict[str, Any]:
        """Rows [n] of the saved ids, and the saved moments; see ``Table.build_moments``."""
        values = require_moments(name, saved, self.dtype, self._dim)
        rows = self._rows_of_saved(name, "moments", saved.get("ids"))
        require_moment_rows(name, rows, values["exp_avg"].shape[0])
        return {"rows": rows, **values}

    def install_moments(self, state: dict[str, Any], built: dict[str, Any] | None) -> None:
        """Zero the slots, then write the built moments into the rows of their ids."""
        self.drop_moments()
        if built is not None:
            for slot, key in zip(self._slots(), ("exp_avg", "exp_avg_sq"), strict=True):
                functional.scatter_(slot, built["rows"], built[key].detach().to(self._device))
            self._must_be_zero = False

    def export_pending(self, name: str) -> list[dict[str, Any]]:
        """Gradients by id; those whose id is gone are left out."""
        pending = self.pending(name)
        if pending is None:
            return []
        (piece,) = pending.pieces
        ids, rows = self._ids_map()
        at, found = _search(rows, piece.rows)
        return [{"ids": ids[at[found]], "values": piece.grad[found]}]

    def build_pending(self, name: str, saved: list[dict[str, Any]]) -> Any:
        """Rows and gradients for ``accept_grad``; see ``Table.build_pending``."""
        grads = []
        for piece in saved:
            require_piece(name, piece)
            if "values" not in piece:
                raise ValueError(
                    f"table {name!r}: the saved gradients are not of a RecIS table; resume at a "
                    f"checkpoint taken right after an update"
                )
            rows = self._rows_of_saved(name, "gradients", piece.get("ids"))
            values = piece["values"].to(self._device, copy=True)
            _checks.require_rows_of(
                name, "its saved gradient", values, rows.numel(), (self._dim,), self._device
            )
            _checks.require_dtype(name, "its saved gradient", values, (self.dtype,))
            grads.append((rows, values))
        if grads:
            rows = torch.cat([rows for rows, _ in grads])
            if rows.unique().numel() != rows.numel():
                raise ValueError(
                    f"table {name!r}: the saved gradients name an id twice, which a RecIS table "
                    f"cannot add up; resume at a checkpoint taken right after an update"
                )
        return grads

    def install_pending(self, built: Any) -> None:
        """Replace the gradients."""
        self._impl.clear_grad()
        for rows, values in built:
            self._impl.accept_grad(rows, values)

    def _ids_map(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [n] int64, their rows [n] int64), in no order, on the table's device."""
        ids, rows = self._impl.ids_map()
        return ids.to(self._device), rows.to(self._device)

    def _rows_of_saved(self, name: str, what: str, ids: Any) -> torch.Tensor:
        """Rows of saved ids [n], all of which must be in the table."""
        if not isinstance(ids, torch.Tensor):
            raise ValueError(
                f"table {name!r}: the saved {what} have no ids; are they of an embedding?"
            )
        ids = _checks.require_ids(ids).to(self._device, torch.int64).reshape(-1)
        known, rows = self._ids_map()
        at, found = _search(known, ids)
        require_held(name, what, found)
        return rows[at]


def _sample(slot: Any) -> torch.Tensor:
    """A tensor that shows a RecIS slot's dtype, device and row shape: no binding tells them."""
    blocks = slot.values()
    sample: torch.Tensor = blocks[0] if blocks else slot.value()  # which copies all blocks
    return sample


def _search(keys: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each of ``wanted`` [m] stands in ``keys`` [n], distinct: positions [m], found [m]."""
    if not keys.numel():
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    ordered, order = keys.sort()
    at = order[torch.searchsorted(ordered, wanted).clamp_(max=keys.numel() - 1)]
    return at, keys[at] == wanted


def _require_rows(name: str, rows: torch.Tensor, size: int, num_rows: int) -> None:
    """Raise RuntimeError unless ``rows`` [N], of a gradient [size, D], can be trusted."""
    if not rows.numel():
        return
    ordered = rows.sort().values
    if bool((ordered[1:] == ordered[:-1]).any()):
        raise RuntimeError(
            f"table {name!r}: a row has several gradients, and then RecIS's grad() returns "
            f"positions in a list instead of rows (here they repeat); nothing was updated. Drop "
            f"them with the table's clear_grad(), and look each table up once per update, with all "
            f"ids in one call (a read-only lookup may miss one id at most), or use this package's "
            f"HashTable, which adds them up"
        )
    low, high = int(ordered[0]), int(ordered[-1])
    if low < MISSING or high + 1 != size:
        _refuse(name, f"has shape[0] = {size} and indices from {low} to {high}")
    if high >= num_rows:
        _refuse(name, f"names row {high}, but the table holds memory for {num_rows} rows")


def _refuse(name: str, what: str) -> NoReturn:
    raise RuntimeError(
        f"table {name!r}: the gradient that RecIS returned {what}, so it does not match the "
        f"table's rows; nothing was updated. Drop it with the table's clear_grad(), after clear() "
        f"make a new table, or use this package's HashTable"
    )
