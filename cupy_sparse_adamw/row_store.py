"""Rows keyed by id: the index from id to row, and slots that share row numbers."""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import get_worker_info

from . import functional
from ._locks import Lock, give_lock
from ._slots import Slot
from ._types import MISSING, MOMENT_DTYPE, Distribution, DistributionKind, RowIndex
from .missed_steps import MissedSteps
from .row_bound import RowBound, Rows
from .saved_rows import SavedRows

EMBEDDING = "embedding"
EXP_AVG = "sparse_adamw_exp_avg"
EXP_AVG_SQ = "sparse_adamw_exp_avg_sq"
LAST_STEP = "sparse_adamw_last_step"
ROW_STEP = "sparse_adamw_row_step"
#: Slots that belong to the optimizer, by the names that its state has for them: as wide as the
#: embedding, and of one int32.
MOMENT_SLOTS = {"exp_avg": EXP_AVG, "exp_avg_sq": EXP_AVG_SQ}
STEP_SLOTS = {"last_step": LAST_STEP, "row_step": ROW_STEP}
OPTIMIZER_SLOTS = MOMENT_SLOTS | STEP_SLOTS

_IDS = "ids"
#: Share of the index that may be filled. At 0.7 a search for an absent id looks at 6 entries on
#: average (Knuth, TAOCP 3, 6.4, linear probing), and an index that has just grown takes 34 bytes a
#: row.
MAX_LOAD = 0.7
MIN_ENTRIES = 64
#: Rows that are entered into an index, or zeroed, at once: memory may be short.
ROWS_AT_A_TIME = 1 << 16
#: Where reading their number waits, growing leaves room for so many more batches: by the time that
#: they are full, a copy of the number has come.
SPARE_BATCHES = 2


class FoundRows:
    """Rows [N] int64 that were found for ids, ``MISSING`` for those without one.

    They are followed (``RowStore.rows_now``) while somebody keeps this: before rows are renumbered
    or given to other ids, ``ids`` [N] notes what they stood for. ``pinned_in`` is the store's
    ``pins`` when they were last pinned.
    """

    __slots__ = ("__weakref__", "ids", "pinned_in", "rows")

    def __init__(self, rows: torch.Tensor, ids: torch.Tensor | None = None) -> None:
        self.rows = rows
        self.ids = ids
        self.pinned_in = -1


class _Undo:
    """How a store was before a change that may yet fail; see ``RowStore.all_or_nothing``.

    Args:
        store: as it is before.

    Attributes:
        counters: those of its index.
        to_zero: its rows that are to be zeroed.
        free_rows: its list of free rows, once rows went: they are put where others were.
        deleted: of ids that went, (rows [n], values [n, D] by name of slot).
        is_changed: whether there is something to put back.
        actions: what else undoes the change; not called by the store.
    """

    def __init__(self, store: RowStore) -> None:
        index = store._index
        self.counters = index.counters.clone()
        self.to_zero = list(store._to_zero)
        self.free_rows: torch.Tensor | None = None
        self.deleted: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
        self.is_changed = False
        self.actions: list[Callable[[], None]] = []

    def keep(self, store: RowStore, ids: torch.Tensor) -> None:
        """Copy the rows of ids [N], which are about to go."""
        index = store._index
        if self.free_rows is None:
            self.free_rows = index.free_rows[: int(self.counters[1])].clone()
        rows = store.find(ids)
        slots = {**store.slots, _IDS: store.ids_by_row}
        values = {name: functional.gather(slot, rows) for name, slot in slots.items()}
        self.deleted.append((rows, values))

    def put_back(self, store: RowStore, index: RowIndex) -> None:
        """Undo what was done, but for the index's entries. May be called again if it raises."""
        numbered, free, _ = self.counters.tolist()
        free_rows = index.free_rows[:free] if self.free_rows is None else self.free_rows
        fresh = torch.arange(numbered, int(index.counters[0]), device=free_rows.device)
        slots = {**store._raw_slots, _IDS: store._raw_ids_by_row}
        for rows, values in reversed(self.deleted):
            for name, value in values.items():
                functional.scatter_(slots[name], rows, value)
        store._to_zero = [*self.to_zero, free_rows, fresh]  # hooks may have written there
        index.free_rows[:free] = free_rows
        index.counters.copy_(self.counters)
        store._raw_bound = RowBound(index.counters, Rows(numbered - free, numbered))


class SlotGroup:
    """The slots of a table, under RecIS's names: row r of each belongs to the same id.

    It shows those that there are when it is asked.
    """

    def __init__(self, store: RowStore) -> None:
        self._store = store

    def slots(self) -> list[Slot]:
        """All of them, the embedding first."""
        return list(self._store.slots.values())

    def slot_by_name(self, name: str) -> Slot:
        """The slot of a name.

        Raises:
            KeyError: there is none; the text names those there are.
        """
        slots = self._store.slots
        if name not in slots:
            raise KeyError(f"no slot {name!r}; there are {', '.join(map(repr, slots))}")
        return slots[name]

    def slot_by_index(self, index: int) -> Slot:
        """The slot of an index, as ``slots`` lists them; IndexError if there is none."""
        slots = self.slots()
        if not 0 <= index < len(slots):
            raise IndexError(f"no slot {index}; there are {len(slots)}")
        return slots[index]

    def slot_index(self, name: str) -> int:
        """The index of the slot of a name; KeyError if there is none."""
        return self.slots().index(self.slot_by_name(name))


class RowStore:
    """The contents of a HashTable.

    How many rows there are is known to their device alone. Memory is held for a bound on it that
    the host keeps (``RowBound``), so that an ordinary lookup on a GPU does not wait.

    Attributes:
        slots: name -> Slot: "embedding" of width D, moments once there are any, and what hooks
            keep of each row. Row r of every slot belongs to the same id.
        ids_by_row: Slot of width 1, int64: the id of each row. That of a free row means nothing.
        seed: with the id, decides a new row's values.
        distribution: what new rows are drawn from.
        saved_rows: which rows are as in a checkpoint; None while nobody asks for increments, and
            once something changed all rows.
        lock: held by whoever reads or changes the store (_locks.py). Methods here do not take it.
        lock_order: its place among all locks.
        pins: rows followed since it last rose are pinned: a gradient waits for them, or may come,
            so that filters keep them. It rises when gradients are cleared.
        missed: what rows missed whose last update is a while ago; None if rows are never behind.

    Args:
        dim: D.
        block_size: rows per block.
        dtype: of the embeddings.
        device: where rows live.
        seed: see above.
        distribution: see above.
    """

    lock: Lock
    lock_order: int

    def __init__(
        self,
        dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        distribution: Distribution,
    ) -> None:
        self._block_size = block_size
        self._undo: _Undo | None = None  # of the change that is being made
        self._undone: _Undo | None = None  # what to put back before anybody looks
        self._raw_slots = {EMBEDDING: Slot(EMBEDDING, dim, block_size, dtype, device)}
        self._raw_ids_by_row = Slot("ids", 1, block_size, torch.int64, device)
        self.seed = seed
        self.distribution = distribution
        self._raw_index = _index_of(0, _empty_entries(MIN_ENTRIES, device))
        self._is_torn = False  # entries of the index may hold rows that are not counted
        self._raw_bound = RowBound(self._index.counters, Rows(0, 0))
        self._deleted = 0  # entries of the index that are DELETED, at the most
        self._to_zero: list[torch.Tensor] = []  # rows that became free
        self.pins = 0
        self._followed: weakref.WeakSet[FoundRows] = weakref.WeakSet()
        self._is_in_graph = False  # a captured lookup reads the index and the slots as they are
        self.saved_rows: SavedRows | None = None
        self.missed: MissedSteps | None = None
        self._made_in = os.getpid()
        give_lock(self)

    def __getstate__(self) -> dict[str, Any]:
        # What a copy follows is what is copied with it: see LookupGrads.
        return {**self.__dict__, "_followed": None, "saved_rows": None, "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _followed=weakref.WeakSet())
        give_lock(self)

    # Whoever looks at any of these finds a change that failed undone.

    def _put_back(self) -> None:
        if self._undone is not None:
            self._undone.put_back(self, self._raw_index)
            self._undone = None

    @property
    def slots(self) -> dict[str, Slot]:
        """See the class."""
        self._put_back()
        return self._raw_slots

    @slots.setter
    def slots(self, slots: dict[str, Slot]) -> None:
        self._raw_slots = slots

    @property
    def ids_by_row(self) -> Slot:
        """See the class."""
        self._put_back()
        return self._raw_ids_by_row

    @ids_by_row.setter
    def ids_by_row(self, slot: Slot) -> None:
        self._raw_ids_by_row = slot

    @property
    def _bound(self) -> RowBound:
        """How many rows there are, at the most."""
        self._put_back()
        return self._raw_bound

    @_bound.setter
    def _bound(self, bound: RowBound) -> None:
        self._raw_bound = bound

    @property
    def embedding(self) -> Slot:
        """The embeddings."""
        return self.slots[EMBEDDING]

    @property
    def _index(self) -> RowIndex:
        """The index, built anew first if a change broke off in the middle of it."""
        self._put_back()
        index = self._raw_index
        if self._is_torn:
            index.counters[2:] = 0  # rows that were given but not counted
            index.entries.fill_(MISSING)
            for rows in _rows_in(index).split(ROWS_AT_A_TIME):
                functional.insert_(index.entries, self.ids_of(rows), rows)
            self._deleted, self._is_torn = 0, False
        return index

    @_index.setter
    def _index(self, index: RowIndex) -> None:
        self._raw_index, self._is_torn, self._undone = index, False, None

    @property
    def num_rows(self) -> int:
        """Rows in use. Waits for the device."""
        numbered, free, _ = self._index.counters.tolist()
        return int(numbered - free)

    @property
    def num_numbered(self) -> int:
        """Rows numbered so far, in use or free: row numbers are below it. Waits for the device."""
        return int(self._index.counters[0])

    @property
    def num_rows_bound(self) -> int:
        """At least the rows numbered so far, and memory is held for as many. Never waits."""
        return self._bound.at_most().numbered

    @property
    def row_count(self) -> torch.Tensor:
        """The rows numbered so far, [1] int64 on their device."""
        return self._index.counters[:1]

    def ids(self) -> torch.Tensor:
        """The ids that have a row, [n] int64, by row."""
        return self.ids_of(self.rows())

    def ids_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The ids [n] int64 of rows [n] in use; 0 for ``MISSING``."""
        return functional.gather(self.ids_by_row, rows).flatten()

    def rows(self) -> torch.Tensor:
        """The rows in use, [n] int64, ascending. Waits for the device."""
        return _rows_in(self._index)

    def rows_between(self, begin: int, end: int) -> torch.Tensor:
        """Those of ``rows`` from ``begin`` to ``end`` - 1, with memory for as many only."""
        numbered, free, _ = self._index.counters.tolist()
        rows = torch.arange(begin, max(begin, min(end, numbered)), device=self.embedding.device)
        if not free:
            return rows
        return rows[self.find(self.ids_of(rows)) == rows]

    def has_deleted(self) -> bool:
        """Whether ids were ever deleted, so that rows may be free. Never waits."""
        return self._index.free_rows.numel() > 0

    def unused(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of rows [N] int64 that no id has. Waits for the device."""
        unused = (rows < 0) | (rows >= self.num_numbered)
        if self.has_deleted():
            unused |= self.find(self.ids_of(rows.masked_fill(unused, MISSING))) != rows
        return rows[unused]

    def nbytes(self) -> int:
        """Bytes of memory held, used or not."""
        index = self._index
        slots = (self.ids_by_row, *self.slots.values())
        return index.entries.nbytes + index.free_rows.nbytes + sum(slot.nbytes() for slot in slots)

    # ------------------------------------------------------------------ find and insert

    def find(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [N] of ids [N] int64; ``MISSING`` where there is none."""
        self._is_in_graph |= functional.is_capturing(ids.device)
        return functional.find(self._index.entries, ids)

    def find_or_insert(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [N] of ids [N] int64; absent ones get a row, with values from the distribution.

        Raises:
            RuntimeError: a CUDA graph is being captured: a replay could not take memory.
        """
        self.require_no_capture()
        if self.is_copy_in_worker():
            rows = self.find(ids)
            if absent_ids(ids, rows).numel():
                raise RuntimeError(
                    "a lookup in training mode would give new ids their rows in a DataLoader's "
                    "worker, whose table is a copy: they would be lost; call table.eval() in the "
                    "worker, or look up in the process that trains"
                )
            return rows
        count, bound = ids.numel(), self._bound
        with torch.inference_mode(False):  # rows outlive the mode that they appear in
            for known in (bound.at_most, bound.copied, bound.exactly):
                if self._has_room(known().plus(count)):
                    return self._insert(ids, count)
            rows = self.find(ids)
            distinct = absent_ids(ids, rows).unique().numel()  # duplicates take no memory
            spare = SPARE_BATCHES * count if bound.reading_waits() else 0
            self._make_room(bound.at_most().plus(distinct + spare))
            return self._insert(ids, distinct) if distinct else rows

    def is_copy_in_worker(self) -> bool:
        """Whether this is a DataLoader worker's copy of what another process made."""
        return get_worker_info() is not None and os.getpid() != self._made_in

    def require_no_capture(self) -> None:
        """Raise RuntimeError while a CUDA graph is being captured: replays take no memory."""
        if functional.is_capturing(self.embedding.device):
            raise RuntimeError(
                "a lookup that may insert rows cannot be captured into a CUDA graph; put the "
                "table into eval mode, or look up with AdmitHook('ReadOnly')"
            )

    def _insert(self, ids: torch.Tensor, at_most: int) -> torch.Tensor:
        """``find_or_insert`` where there is room for the new ids, of which there are so many."""
        index = self._index
        self._zero_freed()
        self._bound.add(at_most)
        if self._undo is not None:
            self._undo.is_changed = True
        try:
            rows = functional.find_or_insert_(
                index,
                ids,
                self.ids_by_row,
                self.embedding,
                self.seed,
                self.distribution,
                self.slots.get(LAST_STEP),
                0 if self.missed is None else self.missed.t,
            )
        except BaseException:  # out of memory, Ctrl-C: forget the half-made rows
            self._is_torn = True
            raise
        bound, soon = self._bound, SPARE_BATCHES * ids.numel()
        if bound.reading_waits() and not self._has_room(bound.at_most().plus(soon)):
            bound.send_copy()
        return rows

    def delete(self, ids: torch.Tensor) -> None:
        """Take ids [N] int64 out, with their moments; those without a row are passed over.

        Their rows are given to other ids later. Memory is kept.
        """
        self._note_ids()
        index, held = self._index, self.embedding.num_rows()
        with torch.inference_mode(False):
            if index.free_rows.numel() < held:
                longer = index.free_rows.new_empty(held)
                longer[: index.free_rows.numel()] = index.free_rows
                index.free_rows = longer
            if self._undo is not None:
                self._undo.keep(self, ids)
                self._undo.is_changed = True
            self._deleted += ids.numel()
            with functional.uninterrupted():  # or whoever gets the rows finds old moments
                rows = functional.delete_(index, ids)
                self._to_zero.append(rows)
            if self.saved_rows is not None:
                try:
                    self.saved_rows.delete(ids, rows)
                except BaseException:
                    self.saved_rows = None
                    raise
            self._zero_freed()

    def _zero_freed(self) -> None:
        """Zero moments, and what hooks keep, of rows that became free, before anyone gets them."""
        while self._to_zero:
            for rows in self._to_zero[-1].split(ROWS_AT_A_TIME):
                for name, slot in self.slots.items():
                    if name != EMBEDDING:
                        zeros = torch.zeros(
                            rows.numel(), slot.dim, dtype=slot.dtype, device=slot.device
                        )
                        functional.scatter_(slot, rows, zeros)
            self._to_zero.pop()  # only now: what was interrupted is done again

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[list[Callable[[], None]]]:
        """Within the block ids get rows and go for good if it ends; if it raises, none did.

        It gives a list: what is put there is called, last first, if the block raises. Ctrl-C must
        wait (``functional.uninterrupted``). Nested blocks are one.
        """
        if self._undo is not None:
            yield self._undo.actions
            return
        undo = self._undo = _Undo(self)
        try:
            yield undo.actions
        except BaseException:
            if undo.is_changed:  # memory may be short: it is put back when somebody looks
                self._undone, self._is_torn = undo, True
            while undo.actions:
                undo.actions.pop()()
            raise
        finally:
            self._undo = None

    # ------------------------------------------------------------------ following rows

    def follow(self, found: FoundRows) -> FoundRows:
        """See to it that ``rows_now`` knows where these rows went, as long as they are kept.

        And pin them: at a lookup, and again when its gradient has come.
        """
        self._followed.add(found)
        found.pinned_in = self.pins
        return found

    def rows_now(self, found: FoundRows) -> torch.Tensor:
        """Rows [N] int64 that now belong to the ids that were looked up; ``MISSING`` if gone."""
        if found.ids is None:
            return found.rows
        return torch.where(found.rows == MISSING, MISSING, self.find(found.ids))

    def _note_ids(self) -> None:
        """Note what rows stand for, where somebody keeps them: they are about to change."""
        for found in self._followed_here():
            if found.ids is None:
                found.ids = self.ids_of(found.rows)

    def _followed_here(self) -> list[FoundRows]:
        """All but those that were found before the table was moved to another device."""
        return [x for x in list(self._followed) if x.rows.device == self.embedding.device]

    def pinned_rows(self) -> torch.Tensor:
        """Rows [n] int64 that a gradient waits for or may come for; some repeat."""
        none = torch.empty(0, dtype=torch.int64, device=self.embedding.device)
        pinned = [x for x in self._followed_here() if x.pinned_in == self.pins]
        return torch.cat([none, *map(self.rows_now, pinned)])

    def unpin(self) -> None:
        """No gradient waits any more, nor is one expected for lookups made so far."""
        self.pins += 1

    # ------------------------------------------------------------------ memory

    def reserve(self, rows: int) -> None:
        """Hold memory for at least ``rows`` rows in all. Rows stay where they are."""
        known = self._bound.at_most()
        self._make_room(known.plus(max(rows - known.in_use, 0)))

    def _make_room(self, rows: Rows) -> None:
        if not self._has_room(rows):
            self._leave_graph()
        for slot in (self.ids_by_row, *self.slots.values()):
            slot.reserve(rows.numbered)
        capacity = self._index.entries.shape[0]
        if rows.in_use + self._deleted <= capacity * MAX_LOAD:
            return
        # Room for an eighth more, or every few deletions would copy an index that does not grow.
        wanted = _capacity_for(rows.in_use + (rows.in_use // 8 if self._deleted else 0))
        if wanted > capacity:
            capacity = max(wanted, capacity + capacity // 2)
        entries = _empty_entries(capacity, self.embedding.device)
        functional.rehash_(self._index.entries, entries)
        self._index.entries, self._deleted = entries, 0

    def _has_room(self, rows: Rows) -> bool:
        return rows.in_use + self._deleted <= self._index.entries.shape[0] * MAX_LOAD and all(
            rows.numbered <= slot.num_rows() for slot in (self.ids_by_row, *self.slots.values())
        )

    def _leave_graph(self) -> None:
        """Say that CUDA graphs with lookups of this store do not follow what it becomes."""
        if self._is_in_graph:
            self._is_in_graph = False
            warnings.warn(
                "a HashTable whose lookups were captured in a CUDA graph grows, or is replaced; "
                "replays find only the rows that it had before: capture the graph anew",
                stacklevel=2,
            )

    def add_slot(self, name: str, dim: int, dtype: torch.dtype) -> Slot:
        """A value of width ``dim`` for each row from now on, which is zero for every new id."""
        slot = Slot(name, dim, self._block_size, dtype, self.embedding.device)
        slot.reserve(self.embedding.num_rows())
        self.slots[name] = slot
        self.saved_rows = None
        return slot

    def new_slots(self, keys: Collection[str]) -> dict[str, Slot]:
        """Zeroed slots for what the optimizer's state names ``keys``, not yet part of the store."""
        dim, dtype = self.embedding.dim, MOMENT_DTYPE[self.embedding.dtype]
        columns = {
            OPTIMIZER_SLOTS[key]: (dim, dtype) if key in MOMENT_SLOTS else (1, torch.int32)
            for key in keys
        }
        slots = self._slots_of(columns, self.embedding.num_rows(), self.embedding.device)
        return dict(zip(keys, slots.values(), strict=True))

    def _slots_of(
        self, columns: Mapping[str, tuple[int, torch.dtype]], rows: int, device: torch.device
    ) -> dict[str, Slot]:
        """Zeroed slots for so many rows, given the width and dtype of each by name.

        The moments lie side by side where the engine is quicker then.
        """
        size, names = self._block_size, (EXP_AVG, EXP_AVG_SQ)
        pair: dict[str, Slot] = {}
        if set(names) <= columns.keys() and functional.pairs_moments(device):
            dim, dtype = columns[EXP_AVG]
            slots = Slot.side_by_side(names, dim, size, dtype, device)
            pair = dict(zip(names, slots, strict=True))
        result = {
            name: pair[name] if name in pair else Slot(name, dim, size, dtype, device)
            for name, (dim, dtype) in columns.items()
        }
        for slot in result.values():
            slot.reserve(rows)
        return result

    # ------------------------------------------------------------------ replacing the contents

    def clear(self) -> None:
        """Remove every row and give its memory back."""
        self.load(torch.empty(0, dtype=torch.int64, device=self.embedding.device), {})

    def load(self, ids: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """Hold exactly these ids: row i is ``ids[i]`` with value ``values[name][i]`` in each slot.

        In slots without values here, those of before stay with their ids, and new ids have zeros.
        No row is behind afterwards, so those that stay must not be so before. All memory is taken
        before anything changes.

        Args:
            ids: [n] int64, distinct.
            values: slot's name -> [n, D] of its dtype, "embedding" among them unless n is 0.
        """
        if self._undo is not None:
            raise RuntimeError(
                "a table cannot be cleared or loaded by a hook that makes room in it: what it "
                "does is undone if the lookup fails; use table.delete(ids)"
            )
        self._note_ids()
        size, device = ids.numel(), ids.device
        index = _index_of(size, _empty_entries(_capacity_for(size), device))
        rows = torch.arange(size, device=device)
        functional.insert_(index.entries, ids, rows)
        ids_by_row = Slot("ids", 1, self._block_size, torch.int64, device)
        ids_by_row.reserve(size)
        functional.scatter_(ids_by_row, rows, ids[:, None])
        old_rows = self.find(ids)
        kept = old_rows != MISSING
        columns = {name: (slot.dim, slot.dtype) for name, slot in self.slots.items()}
        slots = self._slots_of(columns, size, device)
        for name, slot in self.slots.items():
            new = slots[name]
            if name in values:
                functional.scatter_(new, rows, values[name])
            elif name != EMBEDDING:
                functional.scatter_(new, rows[kept], functional.gather(slot, old_rows[kept]))
        if self.missed is not None:
            slots[LAST_STEP].fill(self.missed.t)
        bound = RowBound(index.counters, Rows(size, size))
        self._leave_graph()
        with functional.uninterrupted():
            self.slots, self.ids_by_row = slots, ids_by_row
            self._index, self._bound = index, bound
            self._deleted, self._to_zero, self.saved_rows = 0, [], None

    def empty_like(self) -> RowStore:
        """A store without rows that has the same slots, but for the optimizer's. New rows are 0."""
        embedding = self.embedding
        zeros = Distribution(DistributionKind.CONSTANT)
        store = RowStore(
            embedding.dim, self._block_size, embedding.dtype, embedding.device, 0, zeros
        )
        for name, slot in self.slots.items():
            if name not in (EMBEDDING, *OPTIMIZER_SLOTS.values()):
                store.add_slot(name, slot.dim, slot.dtype)
        return store

    def put(self, ids: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """Set values [n, D] by name of slot for ids [n] int64, with or without a row so far."""
        rows = self.find_or_insert(ids)
        for name, value in values.items():
            functional.scatter_(self.slots[name], rows, value)

    def exchange(self, other: RowStore) -> None:
        """Swap all rows with a store of the same slots. A second call undoes it."""
        for store in (self, other):
            store._note_ids()
            store._leave_graph()
        names = (
            "slots",
            "ids_by_row",
            "_index",
            "_bound",
            "_deleted",
            "_to_zero",
            "saved_rows",
        )
        mine, its = ({name: getattr(x, name) for name in names} for x in (self, other))
        with functional.uninterrupted():
            for name in names:
                setattr(self, name, its[name])
                setattr(other, name, mine[name])

    def note_saved(self, checkpoint: Any) -> None:
        """From now on, keep track of which rows are no longer as in a checkpoint just made."""
        numbered, free, _ = self._index.counters.tolist()
        self.saved_rows = None  # its memory goes first
        self.saved_rows = SavedRows(checkpoint, numbered, self.embedding.device)
        self.saved_rows.change(self._index.free_rows[:free])  # whoever gets them is new

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Put the rows on another device, the embeddings in another dtype."""
        self._zero_freed()
        moments = MOMENT_DTYPE[dtype]
        dtypes = {EMBEDDING: dtype, EXP_AVG: moments, EXP_AVG_SQ: moments}
        slots, index, ids_by_row = dict(self.slots), self._index, self.ids_by_row
        columns = {
            name: (slot.dim, dtypes.get(name, slot.dtype))
            for name, slot in slots.items()
            if (device, dtypes.get(name, slot.dtype)) != (slot.device, slot.dtype)
        }
        for name, slot in self._slots_of(columns, 0, device).items():
            slot.copy_(slots[name])
            slots[name] = slot
        if device != self.embedding.device:
            index = RowIndex(
                *(x.to(device) for x in (index.entries, index.counters, index.free_rows))
            )
            ids_by_row = Slot("ids", 1, self._block_size, torch.int64, device)
            ids_by_row.copy_(self.ids_by_row)
        bound = RowBound(index.counters, self._bound.at_most())
        self._leave_graph()
        with functional.uninterrupted():
            self.slots, self.ids_by_row, self._index = slots, ids_by_row, index
            self._bound, self.saved_rows = bound, None


def absent_ids(ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Those of ids [N] whose row is ``MISSING``, [n] int64.

    On the CPU by NumPy: torch would share the work among its threads, which then spin for
    milliseconds on the cores that the gather behind this wants.
    """
    if ids.device.type != "cpu":
        return ids[rows == MISSING]
    return torch.from_numpy(ids.numpy()[rows.numpy() == MISSING])


def _capacity_for(rows: int) -> int:
    """Entries of an index that holds ``rows`` within MAX_LOAD."""
    return max(int(rows / MAX_LOAD) + 2, MIN_ENTRIES)  # 2: beyond what rounding may take away


def _rows_in(index: RowIndex) -> torch.Tensor:
    """The rows in use, [n] int64, ascending, by an index's counters. Waits for the device."""
    numbered, free, _ = index.counters.tolist()
    device = index.counters.device
    if not free:
        return torch.arange(numbered, device=device)
    in_use = torch.ones(numbered, dtype=torch.bool, device=device)
    in_use[index.free_rows[:free]] = False
    return in_use.nonzero().flatten()


def _empty_entries(capacity: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.full((capacity, 2), MISSING, device=device)


def _index_of(rows: int, entries: torch.Tensor) -> RowIndex:
    """The index of rows 0 to ``rows`` - 1, none of them free."""
    with torch.inference_mode(False):
        counters = torch.zeros(3, dtype=torch.int64, device=entries.device)
        counters[0] = rows
        return RowIndex(entries, counters, counters.new_empty(0))
