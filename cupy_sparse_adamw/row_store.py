"""Rows keyed by id: the index from id to row, and slots that share row numbers."""

from __future__ import annotations

import torch

from . import functional
from ._types import MISSING, MOMENT_DTYPE, Distribution, Slot

EMBEDDING = "embedding"
EXP_AVG = "sparse_adamw_exp_avg"
EXP_AVG_SQ = "sparse_adamw_exp_avg_sq"

#: Share of the index that may be filled. At 0.7 a search for an absent id looks at 6 entries on
#: average (Knuth, TAOCP 3, 6.4, linear probing), and the index takes 23 to 46 bytes a row.
MAX_LOAD = 0.7
MIN_ENTRIES = 64


class RowStore:
    """The contents of a HashTable.

    Attributes:
        slots: name -> Slot of width D: "embedding", and moments once there are any. Row r of every
            slot belongs to the same id.
        ids_by_row: Slot of width 1, int64: the id of each row. It is replaced, not changed, when
            rows are taken away, so whoever kept it still knows which id a row number meant.
        num_rows: rows in use, numbered from 0.
        seed: with the id, decides a new row's values.
        distribution: what new rows are drawn from.

    Args:
        dim: D.
        block_size: rows per block.
        dtype: of the embeddings.
        device: where rows live.
        seed: see above.
        distribution: see above.
    """

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
        self.slots = {EMBEDDING: Slot(EMBEDDING, dim, block_size, dtype, device)}
        self.ids_by_row = Slot("ids", 1, block_size, torch.int64, device)
        self.num_rows = 0
        self.seed = seed
        self.distribution = distribution
        self._entries = _empty_index(MIN_ENTRIES, device)  # [C, 2] int64, see engines

    @property
    def embedding(self) -> Slot:
        """The embeddings."""
        return self.slots[EMBEDDING]

    def ids(self) -> torch.Tensor:
        """The ids that have a row, [n] int64, by row."""
        return functional.gather(self.ids_by_row, self.rows()).flatten()

    def rows(self) -> torch.Tensor:
        """The rows in use, [n] int64, ascending."""
        return torch.arange(self.num_rows, device=self.embedding.device)

    def nbytes(self) -> int:
        """Bytes of memory held, used or not."""
        slots = (self.ids_by_row, *self.slots.values())
        return self._entries.nbytes + sum(slot.nbytes() for slot in slots)

    # ------------------------------------------------------------------ find and insert

    def find(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [N] of ids [N] int64; ``MISSING`` where there is none."""
        return functional.find(self._entries, ids)

    def find_or_insert(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [N] of ids [N] int64; absent ones get a row, with values from the distribution."""
        with torch.inference_mode(False):  # rows outlive the mode that they appear in
            rows = self.find(ids)
            absent = rows == MISSING
            if absent.any():
                rows[absent] = self._insert(ids[absent])
        return rows

    def _insert(self, ids: torch.Tensor) -> torch.Tensor:
        bound = ids.numel()
        if not self._has_room(self.num_rows + bound):
            bound = self._count_distinct(ids)  # so that duplicates take no memory
            self.reserve(self.num_rows + bound)
        new_rows = torch.arange(self.num_rows, self.num_rows + bound, device=ids.device)
        try:
            rows, new_ids = functional.find_or_insert_(self._entries, ids, new_rows)
            new_rows = new_rows[: new_ids.numel()]
            functional.scatter_(self.ids_by_row, new_rows, new_ids[:, None])
            functional.init_rows_(self.embedding, new_rows, new_ids, self.seed, self.distribution)
        except BaseException:  # out of memory, Ctrl-C: forget the half-made rows
            self._entries = self._index(self._entries.shape[0])
            raise
        self.num_rows += new_ids.numel()
        return rows

    @staticmethod
    def _count_distinct(ids: torch.Tensor) -> int:
        scratch = _empty_index(_capacity_for(ids.numel()), ids.device)
        _, distinct = functional.find_or_insert_(
            scratch, ids, torch.arange(ids.numel(), device=ids.device)
        )
        return distinct.numel()

    # ------------------------------------------------------------------ memory

    def reserve(self, rows: int) -> None:
        """Hold memory for at least ``rows`` rows in all. Rows stay where they are."""
        for slot in (self.ids_by_row, *self.slots.values()):
            slot.reserve(rows)
        capacity = _capacity_for(rows)
        if capacity > self._entries.shape[0]:
            self._entries = self._index(capacity)

    def _has_room(self, rows: int) -> bool:
        slots = (self.ids_by_row, *self.slots.values())
        return rows <= self._entries.shape[0] * MAX_LOAD and all(
            rows <= slot.num_rows() for slot in slots
        )

    def _index(self, capacity: int) -> torch.Tensor:
        """An index of ``capacity`` entries that holds every row."""
        entries = _empty_index(capacity, self.embedding.device)
        functional.find_or_insert_(entries, self.ids(), self.rows())
        return entries

    def new_moments(self) -> tuple[Slot, Slot]:
        """Zeroed slots for exp_avg and exp_avg_sq, not yet part of the store."""
        embedding, dtype = self.embedding, MOMENT_DTYPE[self.embedding.dtype]
        slots = [
            Slot(name, embedding.dim, self._block_size, dtype, embedding.device)
            for name in (EXP_AVG, EXP_AVG_SQ)
        ]
        for slot in slots:
            slot.reserve(embedding.num_rows())
        return slots[0], slots[1]

    # ------------------------------------------------------------------ replacing the contents

    def clear(self) -> None:
        """Remove every row and give its memory back."""
        self.load(torch.empty(0, dtype=torch.int64, device=self.embedding.device), None)

    def load(self, ids: torch.Tensor, values: torch.Tensor | None) -> None:
        """Hold exactly these ids: row i is ``ids[i]`` with embedding ``values[i]``.

        Values [n, D] of other slots stay with their ids; new ids have zeros there. All memory is
        taken before anything changes.

        Args:
            ids: [n] int64, distinct.
            values: [n, D] of the embedding's dtype; None if n is 0.
        """
        size, device = ids.numel(), ids.device
        entries = _empty_index(_capacity_for(size), device)
        rows = torch.arange(size, device=device)
        functional.find_or_insert_(entries, ids, rows)
        ids_by_row = Slot("ids", 1, self._block_size, torch.int64, device)
        ids_by_row.reserve(size)
        functional.scatter_(ids_by_row, rows, ids[:, None])
        old_rows = self.find(ids)
        kept = old_rows != MISSING
        slots = {}
        for name, slot in self.slots.items():
            new = slots[name] = Slot(name, slot.dim, self._block_size, slot.dtype, device)
            new.reserve(size)
            if name != EMBEDDING:
                functional.scatter_(new, rows[kept], functional.gather(slot, old_rows[kept]))
            elif values is not None:
                functional.scatter_(new, rows, values)
        self.slots, self.ids_by_row = slots, ids_by_row
        self._entries, self.num_rows = entries, size

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Put the rows on another device, the embeddings in another dtype."""
        slots = {
            name: slot.to(device, dtype if name == EMBEDDING else MOMENT_DTYPE[dtype])
            for name, slot in self.slots.items()
        }
        entries = self._entries.to(device)
        if device != self.embedding.device:
            self.ids_by_row = self.ids_by_row.to(device, torch.int64)
        self.slots, self._entries = slots, entries


def _capacity_for(rows: int) -> int:
    """Entries of an index that holds ``rows`` within MAX_LOAD: a power of two."""
    capacity = MIN_ENTRIES
    while rows > capacity * MAX_LOAD:
        capacity *= 2
    return capacity


def _empty_index(capacity: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.full((capacity, 2), MISSING, device=device)
