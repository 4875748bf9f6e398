"""What the optimizer knows of a table: a small protocol, and the kind that wraps embeddings.

``HashTable`` implements the protocol itself (hash_table.py).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from . import _checks
from ._memory import empty
from ._types import MISSING, MOMENT_DTYPE, Pending, PendingGrad, Slot

ACCEPTED = (
    "a HashTable, a torch.nn.Embedding(sparse=True) or EmbeddingBag(sparse=True), its weight, or a "
    "RecIS hash table"
)

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
    #: Whether a step was captured into a CUDA graph: its replays change rows unseen.
    is_in_graph = False
    #: Which rows are as in a checkpoint (``SavedRows``); None while nobody asks for increments, and
    #: once something changed all rows. ``moments`` notes those in ``pending`` as changed.
    saved_rows: Any = None

    def note_change(self, rows: torch.Tensor) -> None:
        """Rows [N] int64 are about to change, for the next increment; rows may repeat."""
        if self.saved_rows is not None:
            self.saved_rows.change(rows)

    @property
    def key(self) -> Any:
        """What ``param_groups`` holds and ``optimizer.state`` is keyed by."""
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

    def drop_moments(self) -> None:
        """Forget moments kept with the table: it gets a new owner."""

    def clear_pending(self, set_to_none: bool = True) -> None:
        """Drop the gradients, as ``zero_grad`` does."""
        raise NotImplementedError

    def export_moments(self, state: dict[str, Any]) -> dict[str, Any]:
        """The table's entry of ``state_dict``: moments, dtype, and ids if rows have ids."""
        raise NotImplementedError

    def build_moments(self, name: str, saved: dict[str, Any]) -> tuple[Any, Any]:
        """What ``install_moments`` needs, made from an entry of ``state_dict``. Changes nothing.

        Raises:
            ValueError: the entry does not fit the table.
        """
        raise NotImplementedError

    def install_moments(self, state: dict[str, Any], built: tuple[Any, Any] | None) -> None:
        """Replace the moments by built ones, or by none."""
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


class _Over:
    """A slot over a tensor [R, D], good while ``is_over``.

    The slot keeps the memory that it is over alive. So what else is at its address is a view of it:
    a tensor of another dtype or on another device is elsewhere.
    """

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.slot = Slot.over(name, tensor.detach())
        # The address that kernels use: a storage may be moved in place (share_memory_).
        self.address, self.shape = tensor.data_ptr(), tensor.shape

    def is_over(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory and shape are what they were; never of an empty one."""
        return (
            tensor.data_ptr() == self.address != 0  # 0: without memory, on whatever device
            and tensor.shape == self.shape
            and tensor.is_contiguous()
        )


class _Moments:
    """The slots over the moments of the weights in slot ``param``, good while ``are_in``.

    Moments belong to the optimizer: they may be replaced or moved, but nobody reshapes them alone.
    """

    def __init__(self, param: Slot, state: dict[str, Any]) -> None:
        self.param = param
        self._tensors: tuple[torch.Tensor, torch.Tensor] = state["exp_avg"], state["exp_avg_sq"]
        self._exp_avg, self._exp_avg_sq = map(_Over, ("exp_avg", "exp_avg_sq"), self._tensors)
        self.slots = self._exp_avg.slot, self._exp_avg_sq.slot

    def are_in(self, state: dict[str, Any]) -> bool:
        """Whether the moments in an optimizer's state are still these."""
        first, second = self._tensors
        return (
            first is state.get("exp_avg")
            and second is state.get("exp_avg_sq")
            and first.data_ptr() == self._exp_avg.address != 0
            and second.data_ptr() == self._exp_avg_sq.address != 0
        )


class EmbeddingTable(Table):
    """The weight of a ``torch.nn.Embedding`` or ``EmbeddingBag`` with sparse gradients.

    Args:
        name: the table's name, for error texts.
        weight: [R, D], contiguous; its ``.grad`` is sparse COO with indices [1, N], values [N, D].
    """

    grad_scaler_reaches_it = True

    def __init__(self, name: str, weight: torch.Tensor) -> None:
        if weight.dim() != 2 or not weight.is_leaf or weight.shape[1] == 0:
            raise TypeError(
                f"{name}: a table is a leaf tensor of shape [rows, dim], got one of shape "
                f"{list(weight.shape)}; accepted: {ACCEPTED}"
            )
        _checks.require_table_dtype(name, weight.dtype)
        _require_contiguous(name, weight)
        self.weight = weight
        self._param: _Over | None = None
        self._moments: _Moments | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_param": None, "_moments": None, "saved_rows": None}

    @property
    def key(self) -> Any:
        """The weight."""
        return self.weight

    @property
    def device(self) -> torch.device:
        """The weight's device."""
        return self.weight.device

    def __len__(self) -> int:
        return self.weight.shape[0]

    def pending(self, name: str) -> Pending | None:
        """The gradients in ``weight.grad``; see ``Table.pending``."""
        weight = self.weight
        grad = weight.grad
        if grad is None:
            return None
        if grad.layout is not torch.sparse_coo:
            raise RuntimeError(
                f"table {name!r}: its gradient is dense; create the embedding with sparse=True, or "
                f"give this parameter to torch.optim.AdamW"
            )
        held = self._param
        if held is None or not held.is_over(weight):
            _require_contiguous(name, weight)
            held = self._param = _Over("embedding", weight)
        param, shape = held.slot, held.shape
        values = grad._values()  # not differentiable, nor are _indices
        if grad.shape != shape or values.dim() != 2:
            raise ValueError(
                f"table {name!r}: its gradient must be sparse over rows with shape "
                f"{list(shape)}, got shape {list(grad.shape)} with "
                f"{grad.sparse_dim()} sparse dimensions"
            )
        if values.dtype is not param.dtype:
            _checks.require_dtype(name, "its gradient", values, (param.dtype,))
        indices = grad._indices()
        if not indices.is_contiguous():
            indices = indices.contiguous()
        piece = PendingGrad(indices, values)
        return Pending(name, param, shape[0], [piece], coalesced=grad.is_coalesced())

    def moments(self, pending: Pending, state: dict[str, Any]) -> tuple[Slot, Slot]:
        """The moments in the optimizer's state, as in torch: ``exp_avg`` and ``exp_avg_sq`` [R, D].

        Raises:
            RuntimeError: the weight was moved, converted or resized after the first step.
        """
        for piece in pending.pieces:
            self.note_change(piece.rows)
        held = self._moments
        if held is None or held.param is not pending.param or not held.are_in(state):
            self._require_moments(pending.name, state)
            held = self._moments = _Moments(pending.param, state)
        return held.slots

    def _require_moments(self, name: str, state: dict[str, Any]) -> None:
        """Moments that fit the weight; zeros where there are none."""
        weight = self.weight
        dtype = MOMENT_DTYPE[weight.dtype]
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state:
                state[key] = empty(weight.shape, dtype, weight.device).zero_()
            x = state[key]
            if (x.dtype, x.device, x.shape) != (dtype, weight.device, weight.shape):
                raise RuntimeError(
                    f"table {name!r}: its weight became {list(weight.shape)} "
                    f"{weight.dtype} on {weight.device} after its first update, its moments are "
                    f"{list(x.shape)} {x.dtype} on {x.device}; resize, move or convert a model "
                    f"before it is trained, or make a new optimizer"
                )
            if not x.is_contiguous():
                raise RuntimeError(
                    f"table {name!r}: its {key} is not contiguous; use "
                    f"optimizer.state[...][{key!r}] = moments.contiguous()"
                )

    def clear_pending(self, set_to_none: bool = True) -> None:
        """Drop ``weight.grad``, or make it a zero without entries, as torch does."""
        if set_to_none:
            self.weight.grad = None
        elif self.weight.grad is not None:
            self.weight.grad.detach_().zero_()

    def export_moments(self, state: dict[str, Any]) -> dict[str, Any]:
        """References to the moments, as in torch."""
        return {
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state["exp_avg_sq"],
            "dtype": dtype_name(self.weight.dtype),
        }

    def build_moments(self, name: str, saved: dict[str, Any]) -> tuple[Any, Any]:
        """Copies of the saved moments; see ``Table.build_moments``."""
        if "ids" in saved:
            raise ValueError(
                f"table {name!r}: the saved moments are of a HashTable, this is an embedding"
            )
        first, second = require_moments(name, saved, self.weight.dtype, self.weight.shape[1])
        if first.shape != self.weight.shape:
            raise ValueError(
                f"table {name!r}: the saved moments have shape {list(first.shape)}, the weight "
                f"{list(self.weight.shape)}"
            )
        return _plain_copy(first, self.weight.device), _plain_copy(second, self.weight.device)

    def install_moments(self, state: dict[str, Any], built: tuple[Any, Any] | None) -> None:
        """Put copies made by ``build_moments`` into the optimizer's state."""
        state.pop("exp_avg", None)
        state.pop("exp_avg_sq", None)
        self.saved_rows = None
        self._moments = None  # or they would hold the memory until the next step
        if built is not None:
            state["exp_avg"], state["exp_avg_sq"] = built

    def export_pending(self, name: str) -> list[dict[str, Any]]:
        """``.grad`` as torch holds it."""
        if self.pending(name) is None:
            return []
        grad = self.weight.grad
        assert grad is not None
        return [
            {
                "indices": grad._indices(),
                "values": grad._values(),
                "is_coalesced": grad.is_coalesced(),
            }
        ]

    def build_pending(self, name: str, saved: list[dict[str, Any]]) -> Any:
        """The saved ``.grad``; see ``Table.build_pending``."""
        grads = []
        if len(saved) > 1:
            raise ValueError(f"table {name!r}: {len(saved)} gradients are saved, expected one")
        for piece in saved:
            require_piece(name, piece)
            if "indices" not in piece:
                raise ValueError(
                    f"table {name!r}: the saved gradients are of a HashTable, this is an embedding"
                )
            for key in ("values", "is_coalesced"):
                if key not in piece:
                    raise ValueError(f"table {name!r}: a saved gradient has no {key!r}")
            indices, values = piece["indices"], piece["values"]
            if indices.dim() != 2 or indices.shape[0] != 1:
                raise ValueError(
                    f"table {name!r}: the indices of its saved gradient must have shape [1, N], "
                    f"got {list(indices.shape)}"
                )
            if indices.numel() and not 0 <= indices.min() <= indices.max() < self.weight.shape[0]:
                raise ValueError(
                    f"table {name!r}: its saved gradient names rows {int(indices.min())} to "
                    f"{int(indices.max())}, but the table has {self.weight.shape[0]} rows"
                )
            _checks.require_rows_of(
                name,
                "its saved gradient",
                values,
                indices.shape[1],
                tuple(self.weight.shape[1:]),
                values.device,
            )
            _checks.require_dtype(name, "its saved gradient", values, (self.weight.dtype,))
            grads.append(
                torch.sparse_coo_tensor(
                    indices.to(self.weight.device, copy=True),
                    values.to(self.weight.device, copy=True),
                    tuple(self.weight.shape),
                    device=self.weight.device,
                    is_coalesced=piece["is_coalesced"],
                    check_invariants=True,
                )
            )
        return grads[0] if grads else None

    def install_pending(self, built: Any) -> None:
        """Set ``.grad``."""
        self.weight.grad = built


def _require_contiguous(name: str, weight: torch.Tensor) -> None:
    if not weight.is_contiguous():
        raise ValueError(
            f"{name!r}: the weight must be contiguous; use "
            f"torch.nn.Parameter(weight.detach().contiguous())"
        )


def _plain_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A contiguous copy, whatever the strides."""
    return empty(tensor.shape, tensor.dtype, device).copy_(tensor.detach())


def dtype_name(dtype: torch.dtype) -> str:
    """The name of torch.float32 without "torch."."""
    return str(dtype).removeprefix("torch.")


def require_piece(name: str, piece: Any) -> None:
    """A saved gradient is a dict."""
    if not isinstance(piece, dict):
        raise ValueError(f"table {name!r}: a saved gradient must be a dict, got {piece!r}")


def require_moments(
    name: str, saved: dict[str, Any], dtype: torch.dtype, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The moments [n, D] of a saved entry, of the dtype that a table of ``dtype`` needs.

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
    return saved["exp_avg"], saved["exp_avg_sq"]


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
    if isinstance(value, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
        if not value.sparse:
            raise TypeError(
                f"{name}: this {type(value).__name__} has dense gradients; create it with "
                f"sparse=True, or give it to torch.optim.AdamW"
            )
        value = value.weight
    if isinstance(value, torch.Tensor):
        return EmbeddingTable(name, value)
    if (impl := recis_impl(value)) is not None:
        from .recis import RecisTable  # it implements Table

        return RecisTable.of(name, impl)
    raise TypeError(f"{name}: expected {ACCEPTED}, got {type(value).__name__}")


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
