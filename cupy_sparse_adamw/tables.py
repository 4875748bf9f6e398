"""What the optimizer knows of a table: a small protocol. And who owns which.

``HashTable`` implements it itself (hash_table.py); embedding_table.py and recis.py wrap others.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from . import functional
from ._slots import Slot
from ._types import MISSING, MOMENT_DTYPE, Lagging, Pending, RowReport
from .missed_steps import MissedSteps

ACCEPTED = (
    "a HashTable, a torch.nn.Embedding(sparse=True) or EmbeddingBag(sparse=True), its weight, or a "
    "RecIS hash table"
)

_rows_apart: ContextVar[bool] = ContextVar("rows_apart", default=False)


@contextlib.contextmanager
def rows_apart() -> Iterator[None]:
    """Within the block, rows of tables are neither saved nor loaded: a checkpoint has them.

    What remains of a HashTable is the seed, the fan and the buffers of hooks. Weights of embeddings
    are left as they are, behind or not.
    """
    token = _rows_apart.set(True)
    try:
        yield
    finally:
        _rows_apart.reset(token)


def rows_are_apart() -> bool:
    """Whether this is within ``rows_apart``."""
    return _rows_apart.get()


#: Rows that are brought up to date at once: memory may be short.
ROWS_AT_A_TIME = 1 << 16

#: The optimizer that owns a table, by the table's key: id(key) -> weak reference.
_owners = WeakIdKeyDictionary()
_claims = 0


class Table:
    """One matrix of rows that an optimizer updates.

    Methods that take ``state`` get the optimizer's state of this table, a dict that they may
    fill; methods that take ``name`` use it in error texts only. What a step asks is asked of
    hundreds of tables.
    """

    #: Whether torch.amp.GradScaler can unscale the gradients, as it does those in ``.grad``.
    grad_scaler_reaches_it = False
    #: Whether it has room for the steps of each row, and reads rows only after it was asked.
    keeps_steps = True
    #: What has the lock that a thread holds while it reads or changes rows (_locks.py), if any.
    lock_owner: Any = None
    #: Whether a step was captured into a CUDA graph: its replays change rows unseen.
    is_in_graph = False
    #: Which rows are as in a checkpoint (``SavedRows``); None while nobody asks for increments, and
    #: once something changed all rows. ``moments`` notes those in ``pending`` as changed.
    saved_rows: Any = None
    #: What becomes of rows that no batch touches: "skip", "decay" or "dense".
    untouched = "skip"
    #: Whether bias is corrected by each row's own number of updates.
    counts_rows = False
    #: What rows that are behind have missed; None before the first update, and in mode "skip".
    missed: MissedSteps | None = None

    def note_change(self, rows: torch.Tensor) -> None:
        """Rows [N] int64 are about to change, for the next increment; rows may repeat."""
        if self.saved_rows is not None:
            self.saved_rows.change(rows)

    def note_update(self, pending: Pending) -> None:
        """``note_change`` for the rows of gradients; asked of every table in every step."""
        if self.saved_rows is not None:
            for piece in pending.pieces:
                self.saved_rows.change(piece.rows)

    @property
    def key(self) -> Any:
        """What ``param_groups`` holds and ``optimizer.state`` is keyed by."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weights."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the rows live."""
        raise NotImplementedError

    def __len__(self) -> int:
        """R, the number of rows. May wait for the device."""
        raise NotImplementedError

    def pending(self, name: str) -> Pending | None:
        """The gradients of this step, checked; None if there are none.

        Raises:
            RuntimeError: they are dense, or were changed since backward.
            TypeError, ValueError: their dtype or shape does not fit.
        """
        raise NotImplementedError

    def moments(self, pending: Pending, state: dict[str, Any]) -> tuple[Slot, Slot]:
        """exp_avg and exp_avg_sq of the weights in ``pending``, as zeros if there are none yet."""
        raise NotImplementedError

    def begin_to_miss(
        self, state: dict[str, Any], log: MissedSteps, *, as_saved: bool = False
    ) -> None:
        """From now on ``log`` says what rows miss.

        All of them are up to date, unless ``as_saved``: then ``last_step`` was installed with the
        moments.
        """
        raise NotImplementedError

    def new_last_step(self, t: int) -> Any:
        """What ``install_moments`` takes as "last_step" where every row is up to date at t."""
        raise NotImplementedError

    def caught_up(self, ids: torch.Tensor) -> torch.Tensor:
        """What ids read as now; see ``SparseOptimizer.caught_up``."""
        raise NotImplementedError

    def last_step(self, state: dict[str, Any]) -> Slot:
        """The step of each row's last update: width 1, int32. After ``begin_to_miss``."""
        raise NotImplementedError

    def row_step(self, state: dict[str, Any]) -> Slot:
        """The number of each row's updates: width 1, int32, zeros if there is none yet."""
        raise NotImplementedError

    def lagging(self) -> Lagging | None:
        """The table for those who bring rows up to date; None if none can be behind."""
        return None

    def num_rows_at_most(self) -> int:
        """At least as many as there are, and memory is held for as many. Never waits."""
        raise NotImplementedError

    def require_read_current(self, pending: Pending) -> RowReport | None:
        """See to it that the rows in ``pending`` were up to date when they were read.

        Returns:
            What a GPU will say of it; None if it is so.

        Raises:
            RuntimeError: they were not.
        """
        return None

    def drop_moments(self) -> None:
        """Forget moments kept with the table: it gets a new owner."""

    def clear_pending(self, set_to_none: bool = True) -> None:
        """Drop the gradients, as ``zero_grad`` does."""
        raise NotImplementedError

    def export_moments(self, state: dict[str, Any]) -> dict[str, Any]:
        """The table's entry of ``state_dict``: moments, dtype, and ids if rows have ids."""
        raise NotImplementedError

    def build_moments(self, name: str, saved: dict[str, Any]) -> dict[str, Any]:
        """What ``install_moments`` needs, made from an entry of ``state_dict``. Changes nothing.

        By name: "exp_avg", "exp_avg_sq", and "row_step" and "last_step" where there are such.

        Raises:
            ValueError: the entry does not fit the table.
        """
        raise NotImplementedError

    def install_moments(self, state: dict[str, Any], built: dict[str, Any] | None) -> None:
        """Replace the moments by built ones, or by none. No row has missed anything then."""
        raise NotImplementedError

    def export_pending(self, name: str) -> list[dict[str, Any]]:
        """The unreduced gradients in order, as plain dicts."""
        raise NotImplementedError

    def build_pending(self, name: str, saved: list[dict[str, Any]]) -> Any:
        """What ``install_pending`` needs. Changes nothing; raises ValueError if it does not fit."""
        raise NotImplementedError

    def install_pending(self, built: Any) -> None:
        """Replace the gradients."""
        raise NotImplementedError


def dtype_name(dtype: torch.dtype) -> str:
    """The name of torch.float32 without "torch."."""
    return str(dtype).removeprefix("torch.")


def require_piece(name: str, piece: Any) -> None:
    """A saved gradient is a dict."""
    if not isinstance(piece, dict):
        raise ValueError(f"table {name!r}: a saved gradient must be a dict, got {piece!r}")


def require_moments(
    name: str, saved: dict[str, Any], dtype: torch.dtype, dim: int
) -> dict[str, torch.Tensor]:
    """The moments [n, D] of a saved entry, of the dtype that a table of ``dtype`` needs.

    And "row_step" [n, 1] int32, if it has that.

    Raises:
        ValueError: a key is missing, or shape or dtype do not fit.
    """
    for key in ("exp_avg", "exp_avg_sq"):
        tensor = saved.get(key)
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
            raise ValueError(f"table {name!r}: the saved state has no matrix {key!r}")
        if tensor.shape[1] != dim:
            raise ValueError(
                f"table {name!r}: the saved {key} has D = {tensor.shape[1]}, the table D = {dim}"
            )
        if tensor.dtype != MOMENT_DTYPE[dtype]:
            raise ValueError(
                f"table {name!r}: the saved {key} is {tensor.dtype} (of a {saved.get('dtype')} "
                f"table), but moments of a {dtype} table are {MOMENT_DTYPE[dtype]}; moments are "
                f"not converted between float64 and other tables"
            )
    if saved["exp_avg"].shape != saved["exp_avg_sq"].shape:
        raise ValueError(f"table {name!r}: the saved exp_avg and exp_avg_sq differ in shape")
    result = {key: saved[key] for key in ("exp_avg", "exp_avg_sq")}
    if "row_step" in saved:
        counts = saved["row_step"]
        shape = (saved["exp_avg"].shape[0], 1)
        if not isinstance(counts, torch.Tensor) or (counts.dtype, counts.shape) != (
            torch.int32,
            shape,
        ):
            raise ValueError(
                f"table {name!r}: the saved row_step must be int32 {list(shape)}, got {counts!r}"
            )
        result["row_step"] = counts
    return result


def recis_impl(value: Any) -> Any | None:
    """The RecIS ``HashtableImpl`` that ``value`` is, or wraps as RecIS's module does, or None."""
    impl = getattr(value, "_hashtable_impl", value)
    return impl if hasattr(impl, "hashtable_tag") else None


def require_moment_rows(name: str, rows: torch.Tensor, count: int) -> None:
    """Raise ValueError unless saved ids with rows [n] are distinct, and n is ``count``.

    ``MISSING`` may repeat.
    """
    if rows.numel() != count:
        raise ValueError(f"table {name!r}: {rows.numel()} ids are saved with {count} moments")
    held = rows[rows != MISSING]
    if held.unique().numel() != held.numel():
        raise ValueError(f"table {name!r}: the saved moments name an id twice")


def require_held(name: str, what: str, held: torch.Tensor) -> None:
    """Raise ValueError unless all saved ids, of moments or gradients, are in the table."""
    if absent := int((~held).sum()):
        raise ValueError(
            f"table {name!r}: the saved {what} name {absent} ids that the table does not hold; "
            f"load the model first"
        )


def as_table(name: str, value: Any) -> Table:
    """The table that ``value`` is or holds.

    Raises:
        TypeError: it is none; the text names the key and what is accepted.
    """
    if isinstance(value, Table):
        return value
    module = None
    if isinstance(value, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
        if not value.sparse:
            raise TypeError(
                f"{name}: this {type(value).__name__} has dense gradients; create it with "
                f"sparse=True, or give it to torch.optim.AdamW"
            )
        module, value = value, value.weight
    if isinstance(value, torch.Tensor):
        from .embedding_table import EmbeddingTable  # it implements Table

        return EmbeddingTable(name, value, module)
    if (impl := recis_impl(value)) is not None:
        from .recis import RecisTable  # it implements Table

        return RecisTable.of(name, impl)
    raise TypeError(f"{name}: expected {ACCEPTED}, got {type(value).__name__}")


def bring_up_to_date(table: Table, before: int | None = None) -> None:
    """Give every row what it missed, or those whose last update is before a step. Never waits."""
    owner = table.lock_owner
    with contextlib.nullcontext() if owner is None else owner.lock:
        if (lagging := table.lagging()) is not None:
            _bring_up_to_date(table, lagging, lagging.missed.t if before is None else before)


def _bring_up_to_date(table: Table, lagging: Lagging, before: int) -> None:
    missed = lagging.missed
    for begin in range(0, table.num_rows_at_most(), ROWS_AT_A_TIME):
        end = min(begin + ROWS_AT_A_TIME, table.num_rows_at_most())
        rows = torch.arange(begin, end, device=table.device)
        last = functional.gather(lagging.last_step, rows).flatten()
        # Rows that no id has may be from before the log.
        rows = torch.where((last >= missed.first) & (last < before), rows, MISSING)
        table.note_change(rows)
        functional.catch_up_(lagging, rows)


def claim(table: Table, optimizer: object) -> None:
    """Make ``optimizer`` the owner of a table; a former owner's next step raises."""
    global _claims
    _owners[table.key] = weakref.ref(optimizer)
    _claims += 1


def num_claims() -> int:
    """How often a table has been claimed: while this stays, every table's owner does."""
    return _claims


def require_owned(name: str, table: Table, optimizer: object) -> None:
    """Raise RuntimeError if another optimizer has taken the table over."""
    owner = _owners.get(table.key)
    if owner is None or owner() is not optimizer:
        raise RuntimeError(
            f"table {name!r} now belongs to another optimizer that was given it later; a table "
            f"belongs to one optimizer at a time, so make a new optimizer to go on with this one"
        )


def filter_out_sparse_param(model: torch.nn.Module) -> dict[str, Any]:
    """Every table in a module tree, ready for ``param_dict``.

    A HashTable, also one of RecIS, is listed by its name, or by its path in the tree if it has
    none; sparse Embedding and EmbeddingBag modules by path. A weight that several modules share is
    listed once. A model that is itself a table without a name is listed by its class name.

    Raises:
        ValueError: two tables have one name; the text names both modules.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found: dict[str, Any] = {}
    paths: dict[str, str] = {}
    keys: set[int] = set()
    for path, module in model.named_modules():
        path = path or type(module).__name__
        if isinstance(module, Table):
            name = getattr(module, "name", None) or path
            key = module.key
        elif isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and module.sparse:
            name, key = path, module.weight
        elif (impl := recis_impl(module)) is not None:
            name, key = getattr(module, "_name", None) or path, impl
        else:
            continue
        if id(key) in keys:
            continue
        if name in found:
            raise ValueError(
                f"two tables are named {name!r}: {paths[name]} and {path}; give one of them "
                f"another name"
            )
        keys.add(id(key))
        found[name], paths[name] = module, path
    return found
