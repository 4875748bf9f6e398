"""The kind of table that wraps the weight of an Embedding."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from . import _checks, functional
from ._locks import Lock, give_lock
from ._memory import empty, move_to_huge_pages
from ._slots import Slot
from ._types import MOMENT_DTYPE, HostCopy, Lagging, Pending, PendingGrad, RowReport
from .missed_steps import MissedSteps
from .tables import ACCEPTED, Table, dtype_name, require_moments, require_piece

#: The table whose rows may be behind, by weight -> weak reference.
_behind = WeakIdKeyDictionary()


def table_behind(weight: torch.Tensor) -> EmbeddingTable | None:
    """The table that stands for a weight whose rows may be behind, if there is one."""
    known = _behind.get(weight)
    return None if known is None else known()


class _BehindReport:
    """What a GPU will say of rows that were read although they were behind; a ``RowReport``."""

    def __init__(self, name: str, behind: HostCopy) -> None:
        self._name = name
        self._behind = behind

    def ready(self) -> bool:
        """Whether it is known by now."""
        return self._behind.ready()

    def error(self) -> Exception | None:
        """What to raise, if some were. Waits until it is known."""
        if not bool(self._behind.values()):
            return None
        return RuntimeError(
            f"table {self._name!r}: gradients came for rows that were behind when they were read, "
            f"so they are gradients at old weights; read rows through the module that the "
            f"optimizer was given, in training mode (not through F.embedding, a tied weight, or in "
            f"eval mode), or use untouched='skip'"
        )


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
        module: whose weight it is, if that was given.
    """

    grad_scaler_reaches_it = True
    lock: Lock
    lock_order: int

    def __init__(
        self, name: str, weight: torch.Tensor, module: torch.nn.Module | None = None
    ) -> None:
        if weight.dim() != 2 or not weight.is_leaf or weight.shape[1] == 0:
            raise TypeError(
                f"{name}: a table is a leaf tensor of shape [rows, dim], got one of shape "
                f"{list(weight.shape)}; accepted: {ACCEPTED}"
            )
        _checks.require_table_dtype(name, weight.dtype)
        _require_contiguous(name, weight)
        self.name = name
        self.weight = weight
        self.module = module
        self._param: _Over | None = None
        self._moments: _Moments | None = None
        self._row_slots: dict[str, _Over] = {}
        #: the optimizer's state, of which rows that are behind need the moments
        self._state: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        dropped: dict[str, Any] = {
            "_param": None,
            "_moments": None,
            "_row_slots": {},
            "lock": None,
            "lock_owner": None,
            "saved_rows": None,
        }
        return {**self.__dict__, **dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.missed is not None:
            self._be_locked()
            _behind[self.weight] = weakref.ref(self)

    @property
    def key(self) -> Any:
        """The weight."""
        return self.weight

    @property
    def dtype(self) -> torch.dtype:
        """The weight's dtype."""
        return self.weight.dtype

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
        held = self._over_weight(name)
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
        self.note_update(pending)
        return self._moments_in(pending.name, pending.param, state)

    def _over_weight(self, name: str) -> _Over:
        held = self._param
        if held is None or not held.is_over(self.weight):
            _require_contiguous(name, self.weight)
            held = self._param = _Over("embedding", self.weight)
        return held

    def _moments_in(self, name: str, param: Slot, state: dict[str, Any]) -> tuple[Slot, Slot]:
        held = self._moments
        if held is None or held.param is not param or not held.are_in(state):
            self._require_moments(name, state)
            move_to_huge_pages(self.weight)
            held = self._moments = _Moments(param, state)
        return held.slots

    def _row_slot(self, key: str, state: dict[str, Any]) -> Slot:
        """An int32 for each row, [R, 1] in the optimizer's state; zeros if there is none yet."""
        if key not in state:
            with torch.inference_mode(False):
                state[key] = torch.zeros(len(self), 1, dtype=torch.int32, device=self.device)
        held = self._row_slots.get(key)
        if held is None or not held.is_over(state[key]):
            held = self._row_slots[key] = _Over(key, state[key])
        return held.slot

    def begin_to_miss(
        self, state: dict[str, Any], log: MissedSteps, *, as_saved: bool = False
    ) -> None:
        """See ``Table.begin_to_miss``."""
        self._row_slot("last_step", state)
        if not as_saved:
            state["last_step"].fill_(log.t)
        if self.lock_owner is None:
            self._be_locked()
        self._state, self.missed = state, log
        _behind[self.weight] = weakref.ref(self)

    def _be_locked(self) -> None:
        give_lock(self)  # from now on whoever reads rows writes to them
        self.lock_owner = self

    def new_last_step(self, t: int) -> torch.Tensor:
        """See ``Table.new_last_step``."""
        with torch.inference_mode(False):
            return torch.full((len(self), 1), t, dtype=torch.int32, device=self.device)

    def last_step(self, state: dict[str, Any]) -> Slot:
        """See ``Table.last_step``."""
        return self._row_slot("last_step", state)

    def row_step(self, state: dict[str, Any]) -> Slot:
        """See ``Table.row_step``."""
        return self._row_slot("row_step", state)

    def lagging(self) -> Lagging | None:
        """See ``Table.lagging``."""
        log, state = self.missed, self._state
        if log is None or state is None or log.is_empty:
            return None
        param = self._over_weight(self.name).slot
        self._convert(state)
        moments = self._moments_in(self.name, param, state)
        missed, kind = log.on(self.device, self.dtype), log.kind(self.dtype)
        return Lagging(param, *moments, self.last_step(state), missed, kind)

    def _convert(self, state: dict[str, Any]) -> None:
        """Have the moments follow a weight that was moved or converted, as a HashTable's do."""
        device, dtype = self.device, MOMENT_DTYPE[self.dtype]
        for key in ("exp_avg", "exp_avg_sq"):
            if state[key].dtype is not dtype or state[key].device != device:
                state[key] = state[key].to(device, dtype)
        if state["last_step"].device != device:
            state["last_step"] = state["last_step"].to(device)

    def num_rows_at_most(self) -> int:
        """R."""
        return len(self)

    def require_read_current(self, pending: Pending) -> RowReport | None:
        """Whether a hook saw to it before rows were read; see ``Table.require_read_current``."""
        log, state = self.missed, self._state
        if log is None or state is None or log.is_empty:
            return None
        behind = torch.zeros((), dtype=torch.bool, device=self.device)
        for piece in pending.pieces:
            rows = piece.rows.clamp(0, max(len(self) - 1, 0))  # who names others is told elsewhere
            behind |= (state["last_step"].view(-1)[rows] != log.t).any()
        report = _BehindReport(self.name, functional.copy_to_host(behind))
        if self.device.type == "cpu" and (error := report.error()):
            raise error
        return report

    def caught_up(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the weight as they are now; see ``SparseOptimizer.caught_up``."""
        rows = _checks.require_ids(ids).to(self.device)
        flat = rows.reshape(-1).long()
        if self.device.type == "cpu":
            outside = flat[(flat < 0) | (flat >= len(self))]
            if outside.numel():
                raise IndexError(
                    f"table {self.name!r}: it has {len(self)} rows, there is no row "
                    f"{int(outside[0])}"
                )
        lagging = self.lagging()
        if lagging is None:
            return self.weight.detach()[rows]
        values = functional.gather_current(lagging, flat)
        return values.view(*rows.shape, self.weight.shape[1])

    def leave(self) -> None:
        """Another table stands for the weight from now on."""
        self._state = self.missed = None

    def _require_moments(self, name: str, state: dict[str, Any]) -> None:
        """Moments that fit the weight; zeros where there are none."""
        weight = self.weight
        dtype = MOMENT_DTYPE[weight.dtype]
        keys = "exp_avg", "exp_avg_sq"
        if not any(key in state for key in keys):
            state.update(zip(keys, new_moments(weight), strict=True))
        for key in keys:
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
            has_rows = x.device.type == "cpu" and x.stride(1) == 1 and x.stride(0) >= x.shape[1]
            if not (has_rows or x.is_contiguous()):
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
        result = {
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state["exp_avg_sq"],
            "dtype": dtype_name(self.weight.dtype),
        }
        if "row_step" in state:
            result["row_step"] = state["row_step"]
        return result

    def build_moments(self, name: str, saved: dict[str, Any]) -> dict[str, Any]:
        """Copies of the saved moments; see ``Table.build_moments``."""
        if "ids" in saved:
            raise ValueError(
                f"table {name!r}: the saved moments are of a HashTable, this is an embedding"
            )
        values = require_moments(name, saved, self.weight.dtype, self.weight.shape[1])
        first = values["exp_avg"]
        if first.shape != self.weight.shape:
            raise ValueError(
                f"table {name!r}: the saved moments have shape {list(first.shape)}, the weight "
                f"{list(self.weight.shape)}"
            )
        built = dict(zip(("exp_avg", "exp_avg_sq"), new_moments(self.weight), strict=True))
        for key, value in values.items():
            if key in built:
                built[key].copy_(value.detach())
            else:
                built[key] = _plain_copy(value, self.weight.device)
        return built

    def install_moments(self, state: dict[str, Any], built: dict[str, Any] | None) -> None:
        """Put copies made by ``build_moments`` into the optimizer's state."""
        for key in ("exp_avg", "exp_avg_sq", "last_step", "row_step"):
            state.pop(key, None)
        self._state = self.missed = None
        self.saved_rows = None
        self._moments = None  # or they would hold the memory until the next step
        state.update(built or {})

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


def new_moments(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroed exp_avg and exp_avg_sq [R, D] for a weight.

    Their rows lie side by side in memory where the engine is quicker then.
    """
    (rows, dim), dtype, device = weight.shape, MOMENT_DTYPE[weight.dtype], weight.device
    if functional.pairs_moments(device):
        both = empty((rows, 2, dim), dtype, device).zero_()
        return both[:, 0], both[:, 1]
    first, second = (empty((rows, dim), dtype, device).zero_() for _ in range(2))
    return first, second


def _require_contiguous(name: str, weight: torch.Tensor) -> None:
    if not weight.is_contiguous():
        raise ValueError(
            f"{name!r}: the weight must be contiguous; use "
            f"torch.nn.Parameter(weight.detach().contiguous())"
        )


def _plain_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A contiguous copy, whatever the strides."""
    return empty(tensor.shape, tensor.dtype, device).copy_(tensor.detach())
