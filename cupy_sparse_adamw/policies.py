"""The policies that hooks name: which ids get a row, and which rows go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import functional
from ._checks import require_int
from ._types import MISSING
from .hooks import BaseAdmitHookImpl, BaseFilterHookImpl, HashtableHookFactory, are_among

_LAST = torch.iinfo(torch.int64).max
#: Of this share of max_rows more rows go than must, so that a full table is searched rarely.
SPARE = 16


class ReadOnlyHookImpl(BaseAdmitHookImpl):
    """``AdmitHook("ReadOnly")``: no id gets a row."""

    def admit(self, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """None of them."""
        return torch.zeros_like(ids, dtype=torch.bool)


class FrequencyAdmitHookImpl(BaseAdmitHookImpl):
    """``AdmitHook("Frequency", {...})``: an id gets a row in the lookup that sees it the k-th time.

    Sightings of ids without a row are counted in a count-min sketch (Cormode and Muthukrishnan,
    "An improved data stream summary", 2005), ``depth`` * ``width`` * 4 bytes however many ids there
    are. It never counts too low. It counts too high where an id shares a counter with others in
    every one of the ``depth`` lines: to keep that rare for ever, all counts are halved after each
    ``width`` sightings (Einziger, Friedman and Manes, "TinyLFU", 2017). So an id that is seen less
    than about k times in ``width`` sightings of others may never get a row. An id that lost its row
    keeps its count, and may be back at the next sighting. A lookup of ids without a row waits for
    the device.

    Args:
        min_frequency: k.
        width: counters in a line. A fourth of that many distinct ids between two halvings makes a
            count too high for 2 of 1,000 ids.
        depth: lines.

    Raises:
        TypeError, ValueError: an argument is no int of at least 1.
    """

    counts: torch.Tensor
    sightings: torch.Tensor

    def __init__(self, min_frequency: int, width: int = 1 << 20, depth: int = 4) -> None:
        super().__init__()
        self.min_frequency = require_int("min_frequency", min_frequency, 1)
        width, depth = require_int("width", width, 1), require_int("depth", depth, 1)
        self.register_buffer("counts", torch.zeros(depth, width, dtype=torch.int32))
        self.register_buffer("sightings", torch.zeros((), dtype=torch.int64))
        self._undo: list[Callable[[], Any]] = []  # what ``admit`` did; from the end

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_undo": []}

    def admit(self, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Those that have now been seen ``min_frequency`` times."""
        depth, width = self.counts.shape
        places = torch.stack([_mixed(ids, line) % width for line in range(depth)])
        seen = counts.to(torch.int32)
        minus, seen = (-seen).expand(depth, -1), seen.expand(depth, -1)
        total, before = counts.sum(), self.sightings.clone()
        self.counts.scatter_add_(1, places, seen)
        self._undo.append(lambda: self.counts.scatter_add_(1, places, minus))
        admitted = self.counts.gather(1, places).amin(0) >= self.min_frequency
        if before + total < width:
            self.sightings += total
        else:
            odd = self.counts.bitwise_and(1).to(torch.int8)
            self.counts >>= 1
            self._undo.append(lambda: self.counts.mul_(2).add_(odd))
            self.sightings.zero_()
        self._undo.append(lambda: self.sightings.copy_(before))
        return admitted

    def take_back(self) -> None:
        """Forget what the last ``admit`` counted."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def settle(self) -> None:
        """Forget how to."""
        self._undo.clear()


def _mixed(ids: torch.Tensor, line: int) -> torch.Tensor:
    """Ids [n] as numbers of 62 bits, otherwise for each line: MurmurHash3's finalizer, seeded."""
    z = ids ^ (line * 0x9E3779B97F4A7C15 & (1 << 63) - 1)
    for factor in (-0xAE502812AA7333, -0x3B314601E57A13AD):
        z = (z ^ ((z >> 33) & 0x7FFFFFFF)) * factor
    return (z ^ ((z >> 33) & 0x7FFFFFFF)) & (1 << 62) - 1


class GlobalStepFilterHookImpl(BaseFilterHookImpl):
    """``FilterHook("GlobalStepFilter", {...})``: rows not looked up for more than n steps go.

    ``HashTableFilterHook`` counts steps and says when.

    Args:
        ht: the table.
        name: of the slot that keeps the step of each row's last lookup.
        filter_step: n.

    Raises:
        TypeError, ValueError: filter_step is no int of at least 1.
    """

    _global_step: torch.Tensor

    def __init__(self, ht: Any, name: str = "step_filter", filter_step: int = 100) -> None:
        self._filter_step = require_int("filter_step", filter_step, 1)
        super().__init__(ht, name)
        step = torch.zeros(1, dtype=torch.int64, device=ht.device)
        self.register_buffer("_global_step", step)
        ht.append_step_filter_slot(name, step)

    def update(self, index: torch.Tensor) -> None:
        """Rows [N] were looked up in this step."""
        self._ht.update_slot(self._name, index, self._global_step)

    def update_step(self, step_size: int = 1) -> None:
        """So many steps are over."""
        self._global_step += step_size

    def filter(self, ids: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those whose last lookup was more than ``filter_step`` steps ago."""
        last = functional.gather(self._ht.get_slot(self._name), index).flatten()
        stale = self._global_step - last > self._filter_step
        return ids[stale], index[stale]

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"filter_step={self._filter_step}, global_step={int(self._global_step)}"


class _Eviction(BaseFilterHookImpl):
    """Holds a table to ``max_rows`` rows: those of the lowest rank go when new ids come.

    A sixteenth of ``max_rows`` more goes than must, since finding them looks at every row. Of equal
    rank the lowest ids go. Rows of the lookup itself stay, and rows that a gradient waits for or
    may come for (looked up since gradients were last cleared). A table that loads more rows than
    ``max_rows`` holds them until a new id comes. On a GPU each lookup in training mode waits.

    Args:
        ht: the table.
        max_rows: the bound.
        name: of the slot that keeps each row's rank.

    Raises:
        TypeError, ValueError: max_rows is no int of at least 1.
    """

    def __init__(self, ht: Any, max_rows: int, name: str) -> None:
        self.max_rows = require_int("max_rows", max_rows, 1)
        super().__init__(ht, name)
        ht.append_filter_slot(name, torch.int64, 1)

    def make_room(self, count: int, keep: torch.Tensor) -> None:
        """Delete rows until ``count`` more fit; see ``BaseFilterHookImpl.make_room``."""
        in_use = len(self._ht)
        excess = in_use + count - self.max_rows
        if excess <= 0:
            return
        ids, rows = self._ht.ids_map()
        held = torch.cat([keep, self._ht.pending_rows()])
        may_go = ~are_among(rows, held[held != MISSING])
        ids, rows = ids[may_go], rows[may_go]
        if rows.numel() < excess:
            raise RuntimeError(
                f"table {self._ht._label!r}: {count} new ids need rows, but it may hold "
                f"{self.max_rows} (max_rows), and {in_use - rows.numel()} of its {in_use} rows are "
                f"in this lookup or have gradients to come; raise max_rows, or take smaller "
                f"batches and clear gradients after each step"
            )
        going = min(excess + self.max_rows // SPARE, rows.numel())
        rank = functional.gather(self._ht.get_slot(self._name), rows).flatten()
        bound = rank.kthvalue(going).values
        below, at = ids[rank < bound], ids[rank == bound]
        self._ht.delete(torch.cat([below, at.sort().values[: going - below.numel()]]))

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"max_rows={self.max_rows}"


class LRUFilterHookImpl(_Eviction):
    """``FilterHook("LRU", {"max_rows": n})``: the least recently used rows go; see ``_Eviction``.

    A use is a lookup in training mode, or an insertion.
    """

    _clock: torch.Tensor

    def __init__(self, ht: Any, max_rows: int, name: str = "lru_clock") -> None:
        super().__init__(ht, max_rows, name)
        self.register_buffer("_clock", torch.zeros(1, dtype=torch.int64, device=ht.device))

    def update(self, index: torch.Tensor) -> None:
        """Rows [N] are used now."""
        self._ht.update_slot(self._name, index, self._clock + 1)
        self._clock += 1  # only now: what raises has used nothing


class LFUFilterHookImpl(_Eviction):
    """``FilterHook("LFU", {"max_rows": n})``: the least frequently used rows go; see ``_Eviction``.

    Each occurrence in a lookup in training mode, or in an insertion, is a use.
    """

    def __init__(self, ht: Any, max_rows: int, name: str = "lfu_count") -> None:
        super().__init__(ht, max_rows, name)

    def update(self, index: torch.Tensor) -> None:
        """Rows [N] are used, as often as they occur."""
        rows, counts = index.unique(return_counts=True)
        before = functional.gather(self._ht.get_slot(self._name), rows)
        self._ht.update_slot(self._name, rows, before + counts[:, None])


def updates_whole(filters: BaseFilterHookImpl) -> bool:
    """Whether its ``update`` has changed nothing if it raises, so that lookups keep no copies."""
    kind = type(filters)
    return kind.forward is BaseFilterHookImpl.forward and kind.update in (
        BaseFilterHookImpl.update,
        GlobalStepFilterHookImpl.update,
        LRUFilterHookImpl.update,
        LFUFilterHookImpl.update,
    )


_factory = HashtableHookFactory()
_factory.regist_admit("ReadOnly", ReadOnlyHookImpl)
_factory.regist_admit("Frequency", FrequencyAdmitHookImpl)
_factory.regist_filter("GlobalStepFilter", GlobalStepFilterHookImpl)
_factory.regist_filter("LRU", LRUFilterHookImpl)
_factory.regist_filter("LFU", LFUFilterHookImpl)
