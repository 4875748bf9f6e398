"""Tables as checkpoints have them: rows by id, read from a table or built beside it in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .. import functional
from .._memory import empty
from .._types import MOMENT_DTYPE, Slot
from ..hash_table import HashTable
from ..row_store import EMBEDDING, EXP_AVG, EXP_AVG_SQ, RowStore
from ..saved_rows import SavedRows
from ..tables import EmbeddingTable, dtype_name, require_moments

#: Bytes that scanning takes for each row that it looks at, whether or not it is written.
SCAN_BYTES = 64
IDS = "ids"
MOMENTS = (EXP_AVG, EXP_AVG_SQ)

#: name of a slot -> {"dtype": "float32", "dim": D}
Layout = dict[str, dict[str, Any]]


class TableRows:
    """One table, for the time of one save or load.

    Args:
        name: of the table in the checkpoint.
        table: the table.
        owner: [the optimizer's name in the checkpoint, the table's name in the optimizer], or None.
        state: the optimizer's state of the table.
        in_model: whether it is in the model.
    """

    kind = ""

    def __init__(
        self,
        name: str,
        table: Any,
        owner: list[str] | None,
        state: dict[str, Any],
        in_model: bool,
    ) -> None:
        self.name = name
        self.table = table
        self.owner = owner
        self.state = state
        self.in_model = in_model
        self.device = table.device
        #: exp_avg and exp_avg_sq that were built, for ``install_moments``; None if there are none.
        self.moments: tuple[Any, Any] | None = None

    # ------------------------------------------------------------------ reading it

    def slots(self) -> dict[str, Slot]:
        """What is saved of each row, by name: moments only after an update."""
        raise NotImplementedError

    def num_rows(self) -> int:
        """Rows in use."""
        raise NotImplementedError

    def num_numbered(self) -> int:
        """Row numbers in use are below it."""
        raise NotImplementedError

    def rows_between(self, begin: int, end: int) -> torch.Tensor:
        """The rows in use from ``begin`` to ``end`` - 1, [n] int64."""
        raise NotImplementedError

    def ids(self, rows: torch.Tensor) -> torch.Tensor:
        """The ids [n] int64 of rows [n]."""
        raise NotImplementedError

    def has_moments(self) -> bool:
        """Whether the optimizer has updated the table."""
        return int(self.state.get("step", 0)) > 0

    def layout(self) -> Layout:
        """The slots, described."""
        return {
            name: {"dtype": dtype_name(slot.dtype), "dim": slot.dim}
            for name, slot in self.slots().items()
        }

    def chunks(
        self, saved: SavedRows | None, chunk_bytes: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        """``ids`` [n] int64 and [n, D] of each slot, of all rows or of those changed since.

        A chunk has ``chunk_bytes``, or one row.
        """
        slots = self.slots()
        per_row = 8 + sum(slot.dim * slot.dtype.itemsize for slot in slots.values())
        per_chunk = max(chunk_bytes // per_row, 1)
        scanned = max(chunk_bytes // SCAN_BYTES, 1)
        waiting = torch.empty(0, dtype=torch.int64, device=self.device)
        for begin in range(0, self.num_numbered(), scanned):
            rows = self.rows_between(begin, begin + scanned)
            if saved is not None:
                rows = saved.changed(rows)
            waiting = torch.cat([waiting, rows])
            while waiting.numel() >= per_chunk:
                yield self._chunk(slots, waiting[:per_chunk])
                waiting = waiting[per_chunk:]
        if waiting.numel():
            yield self._chunk(slots, waiting)

    def _chunk(self, slots: dict[str, Slot], rows: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = rows.contiguous()
        return {IDS: self.ids(rows)} | {
            name: functional.gather(slot, rows) for name, slot in slots.items()
        }

    # ------------------------------------------------------------------ increments

    def saved_rows(self) -> SavedRows | None:
        """Which rows are as in the last checkpoint; None if that is not known."""
        return None if self.table.is_in_graph else self.table.saved_rows

    def note_saved(self, checkpoint: Any) -> None:
        """All rows are now as in this checkpoint."""
        raise NotImplementedError

    # ------------------------------------------------------------------ building another

    def require_fits(self, layout: Layout, rows: int, moments: bool) -> None:
        """Raise ValueError or TypeError if so many rows of this layout do not fit the table."""
        own = {name: slot for name, slot in self.slots().items() if name not in MOMENTS}
        for missing in own.keys() - layout.keys():
            raise ValueError(f"table {self.name!r}: the checkpoint has no slot {missing!r}")
        for unknown in layout.keys() - own.keys() - set(MOMENTS):
            raise ValueError(
                f"table {self.name!r}: the checkpoint has a slot {unknown!r} that it has not; make "
                f"it with the hooks that it was saved with"
            )
        if (EXP_AVG in layout) != (EXP_AVG_SQ in layout):
            raise ValueError(f"table {self.name!r}: the checkpoint has one of two moments")
        for name, slot in own.items():
            dim, dtype = layout[name]["dim"], getattr(torch, layout[name]["dtype"])
            if dim != slot.dim:
                raise ValueError(
                    f"table {self.name!r}: the saved {name} has D = {dim}, the table D = {slot.dim}"
                )
            if dtype.is_floating_point != slot.dtype.is_floating_point:
                raise TypeError(f"table {self.name!r}: {name} must be {slot.dtype}, got {dtype}")
        if moments and EXP_AVG in layout:
            saved = {
                key: torch.empty(
                    0, layout[name]["dim"], dtype=getattr(torch, layout[name]["dtype"])
                )
                for key, name in zip(("exp_avg", "exp_avg_sq"), MOMENTS, strict=True)
            }
            saved["dtype"] = layout[EMBEDDING]["dtype"]
            require_moments(self.name, saved, own[EMBEDDING].dtype, own[EMBEDDING].dim)

    def start(self, rows: int, moments: bool) -> None:
        """Begin to build a table of so many rows, beside the one that there is."""
        raise NotImplementedError

    def put(self, ids: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """Set values [n, D] by name of slot for ids [n] int64, all on the CPU.

        Raises:
            ValueError: an id cannot be.
        """
        raise NotImplementedError

    def delete(self, ids: torch.Tensor) -> None:
        """Take out ids [n] int64."""
        raise NotImplementedError

    def require_whole(self) -> None:
        """Raise ValueError if what was put since ``start`` is not all rows, each once."""
        raise NotImplementedError

    def finish(self, keep_moments: bool) -> None:
        """All has been put; ``keep_moments``: those at hand stay with their ids."""
        raise NotImplementedError

    def exchange(self) -> None:
        """Swap what was built with what there is, where a second call undoes it."""
        raise NotImplementedError

    def install(self) -> None:
        """Put in place what ``exchange`` did not. Cannot be undone."""
        raise NotImplementedError


class HashTableRows(TableRows):
    """A HashTable. What is built is a store of its own, which takes the place of the table's."""

    kind = "HashTable"
    table: HashTable
    _built: RowStore

    @property
    def _store(self) -> RowStore:
        return self.table._store

    def slots(self) -> dict[str, Slot]:
        """See ``TableRows``."""
        if self.has_moments():
            self.table._moments()  # makes them where there are none
        return {
            name: slot
            for name, slot in self._store.slots.items()
            if name not in MOMENTS or self.has_moments()
        }

    def num_rows(self) -> int:
        """See ``TableRows``."""
        return len(self.table)

    def num_numbered(self) -> int:
        """See ``TableRows``."""
        return self._store.num_numbered

    def rows_between(self, begin: int, end: int) -> torch.Tensor:
        """See ``TableRows``."""
        return self._store.rows_between(begin, end)

    def ids(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``TableRows``."""
        return self._store.ids_of(rows)

    def note_saved(self, checkpoint: Any) -> None:
        """See ``TableRows``."""
        self._store.note_saved(checkpoint)

    def start(self, rows: int, moments: bool) -> None:
        """See ``TableRows``."""
        self._built = self._store.empty_like()
        if moments:
            self._built.slots[EXP_AVG], self._built.slots[EXP_AVG_SQ] = self._built.new_moments()
        self._accepted = 0
        self._has_moments = moments
        own = self.table._slice
        self._takes_all = (own.slice_begin, own.slice_end) == (0, own.slice_size)
        self._rows = rows
        if self._takes_all:
            self._built.reserve(rows)

    def put(self, ids: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """See ``TableRows``. Ids of other slices are passed over."""
        accepted = self.table.accepts(ids)
        if not bool(accepted.all()):
            ids, values = ids[accepted], {name: value[accepted] for name, value in values.items()}
        slots = self._built.slots
        self._built.put(
            ids.to(self.device),
            {
                name: value.to(self.device, slots[name].dtype)
                for name, value in values.items()
                if name in slots
            },
        )
        self._accepted += ids.numel()

    def delete(self, ids: torch.Tensor) -> None:
        """See ``TableRows``."""
        self._built.delete(ids.to(self.device))

    def require_whole(self) -> None:
        """See ``TableRows``."""
        if self._built.num_rows != self._accepted:
            raise ValueError(f"table {self.name!r}: an id is saved twice")

    def finish(self, keep_moments: bool) -> None:
        """See ``TableRows``."""
        built, old = self._built, self._store
        if self._takes_all and built.num_rows != self._rows:
            raise ValueError(
                f"table {self.name!r} comes to {built.num_rows} rows, {self._rows} were saved"
            )
        if self._has_moments:
            self.moments = built.slots.pop(EXP_AVG), built.slots.pop(EXP_AVG_SQ)
        elif keep_moments and EXP_AVG in old.slots:
            moments = built.new_moments()
            for begin in range(0, built.num_numbered, 1 << 16):
                rows = built.rows_between(begin, begin + (1 << 16))
                old_rows = old.find(built.ids_of(rows))
                for name, slot in zip(MOMENTS, moments, strict=True):
                    functional.scatter_(slot, rows, functional.gather(old.slots[name], old_rows))
            built.slots[EXP_AVG], built.slots[EXP_AVG_SQ] = moments

    def exchange(self) -> None:
        """See ``TableRows``."""
        self._store.exchange(self._built)

    def install(self) -> None:
        """See ``TableRows``."""
        del self._built  # what the table was


class WeightRows(TableRows):
    """The weight of an Embedding. Its ids are its row numbers."""

    kind = "Embedding"
    table: EmbeddingTable
    _built: dict[str, Slot]
    _known: SavedRows | None = None

    def slots(self) -> dict[str, Slot]:
        """See ``TableRows``."""
        slots = {EMBEDDING: Slot.over(EMBEDDING, self.table.weight.detach())}
        if self.has_moments():
            self.table._require_moments(self.name, self.state)
            slots[EXP_AVG] = Slot.over(EXP_AVG, self.state["exp_avg"])
            slots[EXP_AVG_SQ] = Slot.over(EXP_AVG_SQ, self.state["exp_avg_sq"])
        return slots

    def num_rows(self) -> int:
        """See ``TableRows``."""
        return len(self.table)

    def num_numbered(self) -> int:
        """See ``TableRows``."""
        return len(self.table)

    def rows_between(self, begin: int, end: int) -> torch.Tensor:
        """See ``TableRows``."""
        return torch.arange(begin, min(end, len(self.table)), device=self.device)

    def ids(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``TableRows``."""
        return rows

    def saved_rows(self) -> SavedRows | None:
        """See ``TableRows``: not known either if somebody else wrote to the weight or moments."""
        saved = super().saved_rows()
        return saved if saved is not None and saved.versions == self._versions() else None

    def note_saved(self, checkpoint: Any) -> None:
        """See ``TableRows``."""
        versions = self._versions()
        self.table.saved_rows = None  # its memory goes first
        if versions is not None:
            self.table.saved_rows = SavedRows(checkpoint, len(self.table), self.device, versions)

    def _versions(self) -> list[Any] | None:
        """What an in-place operation of torch changes; our engines write past torch."""
        tensors = [self.table.weight, self.state.get("exp_avg"), self.state.get("exp_avg_sq")]
        if any(x is not None and x.is_inference() for x in tensors):
            return None  # such tensors count no versions
        return [None if x is None else (x.data_ptr(), x.shape, x._version) for x in tensors]

    def require_fits(self, layout: Layout, rows: int, moments: bool) -> None:
        """See ``TableRows``."""
        super().require_fits(layout, rows, moments)
        if rows != len(self.table):
            raise ValueError(
                f"table {self.name!r}: the checkpoint has {rows} rows of it, the weight has "
                f"{len(self.table)}"
            )

    def start(self, rows: int, moments: bool) -> None:
        """See ``TableRows``."""
        slots = self.slots()
        dtypes = {EMBEDDING: slots[EMBEDDING].dtype}
        if moments:
            dtypes |= dict.fromkeys(MOMENTS, MOMENT_DTYPE[dtypes[EMBEDDING]])
        shape = self.table.weight.shape
        self._tensors = {
            name: empty(shape, dtype, self.device).zero_() for name, dtype in dtypes.items()
        }
        self._built = {name: Slot.over(name, x) for name, x in self._tensors.items()}
        self._has = torch.zeros(rows, dtype=torch.bool, device="cpu")

    def put(self, ids: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """See ``TableRows``."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.table):
            raise ValueError(
                f"table {self.name!r}: rows {int(ids.min())} to {int(ids.max())} are saved of a "
                f"weight with {len(self.table)} rows"
            )
        self._has[ids] = True
        rows = ids.to(self.device)
        for name, value in values.items():
            if name in self._built:
                slot = self._built[name]
                functional.scatter_(slot, rows, value.to(self.device, slot.dtype))

    def delete(self, ids: torch.Tensor) -> None:
        """See ``TableRows``."""
        raise ValueError(f"table {self.name!r}: rows of a weight cannot be deleted")

    def require_whole(self) -> None:
        """See ``TableRows``."""
        if not bool(self._has.all()):
            raise ValueError(f"table {self.name!r}: {int((~self._has).sum())} rows are not saved")

    def finish(self, keep_moments: bool) -> None:
        """See ``TableRows``."""
        if EXP_AVG in self._tensors:
            self.moments = self._tensors[EXP_AVG], self._tensors[EXP_AVG_SQ]

    def exchange(self) -> None:
        """Swaps nothing, but torch will write the weight onto itself, and count that."""
        if self._known is None:
            self._known = self.saved_rows()
        else:
            self._known.versions = self._versions()

    def install(self) -> None:
        """See ``TableRows``."""
        self.table.weight.detach().copy_(self._tensors[EMBEDDING])
        del self._tensors, self._built
