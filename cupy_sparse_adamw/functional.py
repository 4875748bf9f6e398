"""The operations, on whichever engine fits the device. Only this module chooses an engine.

Each operation has the same name and keyword signature here, in ``reference`` and in each package
under ``engines``. Tensors of one call live on one device. What users pass in is checked before it
gets here (``_checks``): rows are in range, dtypes and shapes fit. Only the rows of gradients are
checked by the engines, since they can do that on the way: at once where nothing waits for a device
(``segment`` raises), else by a report that the step after may ask (``sparse_adamw_``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from ._signals import uninterrupted as uninterrupted
from ._slots import Slot
from ._types import Distribution, HostCopy, Lagging, Pending, RowIndex, RowReport, Update

#: Engine -> its module, absolute or relative to this package.
_MODULES = {"reference": ".reference", "cpu": ".engines.cpu", "cuda": ".engines.cuda"}
_chosen: str | None = None
_warned = False


@contextlib.contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Within the block, run every operation on the named engine, or raise why it cannot load.

    Args:
        name: "reference", "cpu" or "cuda".

    Raises:
        ValueError: there is no such engine.
        RuntimeError: it cannot load here; the cause is in the text.
    """
    global _chosen
    load_engine(name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def load_engine(name: str) -> ModuleType:
    """The package that implements an engine.

    Raises:
        ValueError: there is no such engine.
        RuntimeError: it cannot load here; the cause is in the text.
    """
    if name not in _MODULES:
        raise ValueError(f"engine must be one of {', '.join(_MODULES)}, got {name!r}")
    try:
        return _import(_MODULES[name])
    except ImportError as error:
        raise RuntimeError(f"the {name} engine cannot load: {error}") from error


@functools.cache  # asked by every operation
def _import(module: str) -> ModuleType:
    return importlib.import_module(module, __package__)


def _engine(device: torch.device) -> Any:
    """The engine chosen by ``use_engine``, or the one for the device."""
    global _warned
    if _chosen is not None:
        return load_engine(_chosen)
    if device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"tables live on cpu or cuda, got a table on {device}")
    try:
        return load_engine(device.type)
    except RuntimeError as error:
        if device.type == "cuda":
            raise
        if not _warned:
            _warned = True
            warnings.warn(
                f"{error}. Falling back to the reference implementation, which is many times "
                f"slower; pip install numba",
                stacklevel=2,
            )
        return load_engine("reference")


class Segments:
    """The gradients of a step, sorted by row: from ``segment`` to ``prepare_sparse_adamw``."""

    def __init__(self, groups: list[tuple[list[int], Any, Any]]) -> None:
        self.groups = groups  # [(table numbers, engine, that engine's segments)]


def segment(pending: Sequence[Pending]) -> Segments:
    """Group the tables of a step and sort each group's gradients by row. Writes to no table.

    Args:
        pending: each table's gradients, at least one piece each.

    Raises:
        IndexError: a row is outside its table; the text names both.
    """
    groups: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number, table in enumerate(pending):
        param = table.param
        groups[param.device, param.dtype, table.pieces[0].grad.dtype, param.dim, table.kind].append(
            number
        )
    result = []
    for (device, *_), numbers in groups.items():
        engine = _engine(device)
        result.append((numbers, engine, engine.segment([pending[n] for n in numbers])))
    return Segments(result)


def prepare_sparse_adamw(
    updates: Sequence[Update], segments: Segments
) -> Callable[[], list[RowReport]]:
    """One AdamW step on the rows that ``segments`` names, all but done.

    Everything that may fail has been done when this returns, and nothing was written. Calling the
    result writes weights and moments of all tables, and advances each table's t by 1.

    Args:
        updates: the tables, in the order in which ``segment`` got them.
        segments: their gradients.

    Returns:
        A function of no arguments. It returns what is to be asked later, of engines that skip a
        row out of range instead of raising.
    """
    steps = [
        engine.prepare_sparse_adamw([updates[n] for n in numbers], group)
        for numbers, engine, group in segments.groups
    ]

    def apply() -> list[RowReport]:
        reports = [step() for step in steps]
        return [report for report in reports if report is not None]

    return apply


def gather_current(lagging: Lagging, rows: torch.Tensor) -> torch.Tensor:
    """The weights [N, D] of the named rows [N] int64, brought up to date; nothing is written.

    ``MISSING`` reads as zeros.
    """
    values: torch.Tensor = _engine(lagging.param.device).gather_current(lagging, rows)
    return values


def catch_up_(lagging: Lagging, rows: torch.Tensor) -> None:
    """Bring the named rows [N] int64 up to date: weights, moments and ``last_step``.

    Rows may repeat; ``MISSING`` and rows out of range are passed over.
    """
    _engine(lagging.param.device).catch_up_(lagging, rows)


def prepare_extend_rules(
    state: torch.Tensor, rules: torch.Tensor, begin: int, end: int, step: torch.Tensor
) -> Callable[[], None]:
    """Take one more missed step into entries [begin, end) of ``Missed.rules``, all but done.

    On the host. Calling the result does it, and takes no memory.

    Args:
        state: [4 + 2 * RULE_NODES, n] float64: for each entry the product of 1 - lr * weight_decay,
            of beta1, and of beta2, over the steps so far; how many nodes its rule has; diagonal and
            off-diagonal of the rule's Jacobi matrix.
        rules: [n, RULE_WIDTH] float64; see ``Missed.rules``.
        begin: first entry.
        end: one beyond the last.
        step: [STEP_WIDTH] float64; see ``Missed.steps``.
    """
    host = _engine(torch.device("cpu")) if _chosen in (None, "reference") else load_engine("cpu")
    apply: Callable[[], None] = host.prepare_extend_rules(state, rules, begin, end, step)
    return apply


def coalesce(pending: Pending) -> tuple[torch.Tensor, torch.Tensor]:
    """The touched rows of one table and the sums of their gradients.

    Returns:
        rows [U] int64, ascending, and values [U, D] of the gradients' dtype.
    """
    rows, values = _engine(pending.param.device).coalesce(pending)
    return rows, values


def copy_to_host(tensor: torch.Tensor) -> HostCopy:
    """Begin to copy a small tensor to the host, behind what its device has to do."""
    copy: HostCopy = _engine(tensor.device).copy_to_host(tensor)
    return copy


def find(entries: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The row of each id [N] int64 in the index [C, 2] int64, or ``MISSING``: rows [N] int64."""
    rows: torch.Tensor = _engine(entries.device).find(entries, ids)
    return rows


def find_or_insert_(
    index: RowIndex,
    ids: torch.Tensor,
    ids_by_row: Slot,
    embedding: Slot,
    seed: int,
    distribution: Distribution,
    last_step: Slot | None = None,
    now: int = 0,
) -> torch.Tensor:
    """Find each id [N] int64; one that is absent gets a row, its id noted and its values drawn.

    A new row's ``last_step`` (width 1, int32) becomes ``now``, if there is such a slot.

    The caller holds entries and memory for all that are absent. Which row a new id gets is the
    engine's choice: a free one if there is one, else a fresh one. Rows are counted last. If
    it raises, entries may hold rows that are not counted: the caller builds them anew.

    Returns:
        rows [N] int64.
    """
    rows: torch.Tensor = _engine(index.entries.device).find_or_insert_(
        index, ids, ids_by_row, embedding, seed, distribution, last_step, now
    )
    return rows


def insert_(entries: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> None:
    """Put ids [n] int64, distinct and absent, with their rows [n] into the index [C, 2] int64."""
    _engine(entries.device).insert_(entries, ids, rows)


def rehash_(entries: torch.Tensor, target: torch.Tensor) -> None:
    """Put all ids of an index [C, 2] int64, with their rows, into an empty one [C', 2]."""
    _engine(entries.device).rehash_(entries, target)


def delete_(index: RowIndex, ids: torch.Tensor) -> torch.Tensor:
    """Take ids [N] int64 out of an index, whose list of free rows has room for theirs.

    Returns:
        rows [N] int64: the row that an id had; ``MISSING`` where it had none, and at all
        occurrences of an id but one.
    """
    rows: torch.Tensor = _engine(index.entries.device).delete_(index, ids)
    return rows


def is_capturing(device: torch.device) -> bool:
    """Whether what is done on the device now is recorded into a CUDA graph rather than done."""
    return bool(_engine(device).is_capturing(device))


def pairs_moments(device: torch.device) -> bool:
    """Whether steps are quicker with rows of exp_avg and exp_avg_sq side by side in memory."""
    return bool(_engine(device).pairs_moments(device))


def gather(slot: Slot, rows: torch.Tensor) -> torch.Tensor:
    """Copies [N, D] of the named rows [N] int64; ``MISSING`` reads as zeros."""
    values: torch.Tensor = _engine(slot.device).gather(slot, rows)
    return values


def scatter_(slot: Slot, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Overwrite the named rows [N] by values [N, D]; of a row named twice the last value stays.

    A value for ``MISSING`` goes nowhere.
    """
    _engine(slot.device).scatter_(slot, rows, values)


def init_rows_(
    slot: Slot, rows: torch.Tensor, ids: torch.Tensor, seed: int, distribution: Distribution
) -> None:
    """Fill rows [n] with the initial values of ids [n]: a pure function of (seed, id)."""
    _engine(slot.device).init_rows_(slot, rows, ids, seed, distribution)
