"""Tables as checkpoints have them: rows by id, read from a table or built beside it in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .. import functional
from .._locks import Held
from .._memory import empty
from .._slots import Slot
from ..embedding_table import EmbeddingTable, new_moments, table_behind
from ..hash_table import HashTable
from ..missed_steps import MissedSteps
from ..row_store import (
    EMBEDDING,
    EXP_AVG,
    EXP_AVG_SQ,
    LAST_STEP,
    MOMENT_SLOTS,
    OPTIMIZER_SLOTS,
    STEP_SLOTS,
    RowStore,
)
from ..row_table import RowTable
from ..saved_rows import SavedRows
from ..tables import bring_up_to_date, dtype_name, require_moments

#: Bytes that scanning takes for each row that it looks at, whether or not it is written.
SCAN_BYTES = 64
IDS = "ids"
OF_OPTIMIZER = tuple(OPTIMIZER_SLOTS.values())

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
        #: What was built for ``install_moments``; None if there is nothing.
        self.moments: dict[str, Any] | None = None
        self._log: MissedSteps | None = None

    # ------------------------------------------------------------------ reading it

    def slots(self) -> dict[str, Slot]:
        """What is saved of each row, by name: what the optimizer keeps only after an update."""
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

    def bring_up_to_date(self) -> None:
        """Give rows what they missed, if they may be behind."""
        weight = getattr(self.table, "weight", None)
        table = self.table if weight is None else table_behind(weight)
        if table is not None:
            bring_up_to_date(table)

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
        own = {name: slot for name, slot in self.slots().items() if name not in OF_OPTIMIZER}
        for missing in own.keys() - layout.keys():
            raise ValueError(f"table {self.name!r}: the checkpoint has no slot {missing!r}")
        for unknown in layout.keys() - own.keys() - set(OF_OPTIMIZER):
            raise ValueError(
                f"table {self.name!r}: the checkpoint has a slot {unknown!r} that it has not; make "
                f"it with the hooks that it was saved with"
            )
        if (EXP_AVG in layout) != (EXP_AVG_SQ in layout):
            raise ValueError(f"table {self.name!r}: the checkpoint has one of two moments")
        for name in STEP_SLOTS.values():
            if name in layout and layout[name] != {"dtype": "int32", "dim": 1}:
                raise ValueError(f"table {self.name!r}: the saved {name} is {layout[name]}")
        for name, slot in own.items():
            dim, dtype = layout[name]["dim"], getattr(torch, layout[name]["dtype"])
            if dim != slot.dim:
                raise ValueError(
                    f"table {self.name!r}: the saved {name} has D = {dim}, the table D = {slot.dim}"
                )
            if dtype.is_floating_point != slot.dtype.is_floating_point:
                raise TypeError(f"table {self.name!r}: {name} must be {slot.dtype}, got {dtype}")
        if LAST_STEP in layout and EXP_AVG not in layout:
            raise ValueError(f"table {self.name!r}: the checkpoint has steps and no moments")
        if (moments or LAST_STEP in layout) and EXP_AVG in layout:
            saved: dict[str, Any] = {
                key: torch.empty(
                    0, layout[name]["dim"], dtype=getattr(torch, layout[name]["dtype"])
                )
                for key, name in MOMENT_SLOTS.items()
            }
            saved["dtype"] = layout[EMBEDDING]["dtype"]
            require_moments(self.name, saved, own[EMBEDDING].dtype, own[EMBEDDING].dim)

    def start(self, rows: int, keys: Sequence[str], log: MissedSteps | None) -> None:
        """Begin to build a table of so many rows, beside the one that there is.

        Args:
            rows: how many.
            keys: what of the optimizer's is built with them.
            log: what the rows have missed that are behind, if they are to be brought up to date.
        """
        raise NotImplementedError

    def put(self, ids: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """Set values [n, D] by name of slot for ids [n] int64, all on the CPU.

        Raises:
            ValueError: an id cannot be.
        """
        raise NotImplementedError

    def _require_steps(self, last: torch.Tensor) -> None:
        """Raise ValueError if a last update, of [n, 1], is at a step that the log does not have.

        Only of rows as they come out: an increment may replace older ones.
        """
        log = self._log
        if log is None or not last.numel():
            return
        if not log.first <= int(last.min()) <= int(last.max()) <= log.t:
            raise ValueError(
                f"table {self.name!r}: rows were updated last at steps {int(last.min())} to "
                f"{int(last.max())}, which is not in the saved log"
            )

    def delete(self, ids: torch.Tensor) -> None:
        """Take out ids [n] int64."""
        raise NotImplementedError

    def require_whole(self) -> None:
        """Raise ValueError if what was put since ``start`` is not all rows, each once."""
        raise NotImplementedError

    def finish(self, keep_moments: bool) -> None:
        """All has been put; ``keep_moments``: those at hand stay with their ids.

        Then no row is behind: those that were built are brought up to date, as are those at hand.
        """
        raise NotImplementedError

    def exchange(self) -> None:
        """Swap what was built with what there is, where a second call undoes it."""
        raise NotImplementedError

    def install(self) -> None:
        """Put in place what ``exchange`` did not. Cannot be undone."""
        raise NotImplementedError


def held(tables: Mapping[str, TableRows]) -> Held:
    """What keeps other threads from reading or changing these tables, in a with statement."""
    owners = (rows.table.lock_owner for rows in tables.values())
    return Held(owner for owner in owners if owner is not None)


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
            if name not in OF_OPTIMIZER or self.has_moments()
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

    def saved_rows(self) -> SavedRows | None:
        """See ``TableRows``: not known either if other things were saved of each row."""
        saved = super().saved_rows()
        return saved if saved is not None and saved.versions == list(self.slots()) else None

    def note_saved(self, checkpoint: Any) -> None:
        """See ``TableRows``."""
        self._store.note_saved(checkpoint)
        assert self._store.saved_rows is not None
        self._store.saved_rows.versions = list(self.slots())

    def start(self, rows: int, keys: Sequence[str], log: MissedSteps | None) -> None:
        """See ``TableRows``."""
        self._built = self._store.empty_like()
        for key, slot in self._built.new_slots(keys).items():
            self._built.slots[OPTIMIZER_SLOTS[key]] = slot
        self._accepted = 0
        self._keys, self._log = keys, log
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
        if self._log is not None:
            for begin in range(0, built.num_numbered, 1 << 16):
                rows = built.rows_between(begin, begin + (1 << 16))
                self._require_steps(functional.gather(built.slots[LAST_STEP], rows))
        if keep_moments and self._log is not None:
            built.missed = self._log
            bring_up_to_date(_OfStore(built))
            built.missed = None
        taken = {key: built.slots.pop(OPTIMIZER_SLOTS[key]) for key in self._keys}
        if not keep_moments:
            self.moments = taken or None
            return
        self.bring_up_to_date()
        had = [key for key, name in OPTIMIZER_SLOTS.items() if name in old.slots]
        kept = {OPTIMIZER_SLOTS[key]: slot for key, slot in built.new_slots(had).items()}
        for begin in range(0, built.num_numbered, 1 << 16):
            rows = built.rows_between(begin, begin + (1 << 16))
            old_rows = old.find(built.ids_of(rows))
            for name, slot in kept.items():
                functional.scatter_(slot, rows, functional.gather(old.slots[name], old_rows))
        if old.missed is not None:
            kept[LAST_STEP].fill(old.missed.t)
        built.slots.update(kept)

    def exchange(self) -> None:
        """See ``TableRows``."""
        self._store.exchange(self._built)

    def install(self) -> None:
        """See ``TableRows``."""
        del self._built  # what the table was


class _OfStore(RowTable):
    """Rows that are being built, for ``bring_up_to_date``."""

    def __init__(self, store: RowStore) -> None:
        self._store = store


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
            slots |= {
                name: Slot.over(name, self.state[key])
                for key, name in OPTIMIZER_SLOTS.items()
                if key in self.state
            }
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
        tensors = [self.table.weight, *map(self.state.get, OPTIMIZER_SLOTS)]
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

    def start(self, rows: int, keys: Sequence[str], log: MissedSteps | None) -> None:
        """See ``TableRows``."""
        dtype, (count, dim) = self.table.weight.dtype, self.table.weight.shape
        self._keys, self._log = keys, log
        self._tensors = {EMBEDDING: empty((count, dim), dtype, self.device).zero_()}
        if keys:
            self._tensors |= zip(MOMENT_SLOTS.values(), new_moments(self.table.weight), strict=True)
        for key in keys:
            if key in STEP_SLOTS:
                self._tensors[STEP_SLOTS[key]] = torch.zeros(
                    count, 1, dtype=torch.int32, device=self.device
                )
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
        built = {key: self._tensors[OPTIMIZER_SLOTS[key]] for key in self._keys}
        if self._log is not None:
            self._require_steps(built["last_step"])
        if not keep_moments:
            self.moments = built or None
            return
        if self._log is not None:
            weight = torch.nn.Parameter(self._tensors[EMBEDDING], requires_grad=False)
            saved = EmbeddingTable(self.name, weight)
            saved.begin_to_miss(built, self._log, as_saved=True)
            bring_up_to_date(saved)
        self.bring_up_to_date()

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
