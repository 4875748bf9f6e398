"""A table of embeddings keyed by any int64 id; rows appear when an id is first seen."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import _checks, functional
from ._types import MISSING, Pending, Slot
from .hooks import AdmitHook
from .initializers import ConstantInitializer, Initializer, require_fits
from .lookup_grads import LookupGrad, LookupGrads
from .row_store import EXP_AVG, EXP_AVG_SQ, FoundRows, RowStore
from .tables import Table, dtype_name, require_moments, require_piece


class _Lookup(torch.autograd.Function):
    """Rows out; in backward, (rows, gradients) to the table, not reduced and not copied.

    ``anchor`` is an empty tensor that requires grad: it makes autograd call ``backward``.
    """

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, rows: torch.Tensor, table: HashTable) -> Any:
        ctx.save_for_backward(rows)  # so that a second backward is refused, as for any other node
        ctx.table, ctx.found = table, table._store.follow(FoundRows(rows))
        return functional.gather(table._store.embedding, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        _ = ctx.saved_tensors
        ctx.table._accept(ctx.found, grad)
        return None, None, None


class HashTable(torch.nn.Module, Table):
    """Embeddings keyed by any int64 id, with RecIS's constructor and method names.

    In training mode a row appears when its id is first looked up (whether or not gradients are
    enabled); in eval mode, or with ``AdmitHook("ReadOnly")``, an id without a row reads as zeros,
    inserts nothing and drops its gradient. Rows live in blocks, so growing never moves a row.

    A HashTable is no ``Parameter``: ``model.parameters()`` does not list it, and
    ``model.requires_grad_`` and ``model.zero_grad`` of a module that contains it do not reach it.
    Freeze it with ``table.requires_grad_(False)``; the optimizer clears its gradients.

    Args:
        embedding_shape: shape of one embedding, [D] in general; an int d means [d].
        block_size: rows per block.
        dtype: float32, float64, float16 or bfloat16.
        device: where the rows live.
        initializer: what new rows are drawn from; None means zeros. A row's value depends only on
            the table's seed, drawn once from the initializer's generator, and its id.
        name: the table's name in ``filter_out_sparse_param`` and in error texts.
        grad_reduce_by: "worker" divides the sum of a row's gradients by the environment variable
            WORLD_SIZE (1 if unset); "id" divides it by the row's number of occurrences.
        copy_grads: copy gradients in backward instead of keeping a reference, for models that
            change a gradient in place after backward has handed it on.
        coalesced: not supported yet.
        children: not supported yet.
        slice: not supported yet.
        filter_hook: not supported yet.

    Raises:
        TypeError: embedding_shape, block_size, dtype, initializer or name of a wrong type.
        ValueError: a size below 1, or another ``grad_reduce_by``.
        RuntimeError: no engine for ``device`` can load here.
        NotImplementedError: an argument marked so above.
    """

    def __init__(
        self,
        embedding_shape: Any,
        block_size: int = 1024,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        coalesced: bool = False,
        children: list[str] | None = None,
        slice: Any = None,
        initializer: Initializer | None = None,
        name: str | None = None,
        grad_reduce_by: str = "worker",
        filter_hook: Any = None,
        *,
        copy_grads: bool = False,
    ) -> None:
        super().__init__()
        for argument, value in (
            ("coalesced", coalesced),
            ("children", children),
            ("slice", slice),
            ("filter_hook", filter_hook),
        ):
            if value:
                raise NotImplementedError(
                    f"HashTable({argument}=...) is not supported yet; leave it out"
                )
        if grad_reduce_by not in ("worker", "id"):
            raise ValueError(f"grad_reduce_by must be 'worker' or 'id', got {grad_reduce_by!r}")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a string or None, got {type(name).__name__}")
        if initializer is None:
            initializer = ConstantInitializer(0.0)
        if not isinstance(initializer, Initializer):
            raise TypeError(
                f"initializer must be an Initializer such as NormalInitializer(std=0.01), "
                f"got {type(initializer).__name__}"
            )
        self.embedding_shape = _checks.require_shape(embedding_shape)
        self.block_size = _checks.require_int("block_size", block_size, 1)
        self.name = name
        self.grad_reduce_by = grad_reduce_by
        self.copy_grads = copy_grads
        self._dim = torch.Size(self.embedding_shape).numel()
        _checks.require_world_size()  # an error comes now rather than in the first step
        dtype = _checks.require_table_dtype("dtype", dtype)
        device = _require_device(device)

        self._initializer = initializer
        self._fan = (self._dim, self.block_size)
        distribution = initializer.distribution(*self._fan)
        require_fits(distribution, dtype)
        self._store = RowStore(
            self._dim,
            self.block_size,
            dtype,
            device,
            seed=initializer.draw_seed(),
            distribution=distribution,
        )
        self._grads = LookupGrads(self._store)
        self._trainable = True
        self._anchor = torch.empty(0, requires_grad=True, device="cpu")

    # ------------------------------------------------------------------ what it is

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the embeddings."""
        return self._store.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows live."""
        return self._store.embedding.device

    @property
    def _label(self) -> str:
        return self.name or "HashTable"

    def __len__(self) -> int:
        return self._store.num_rows

    def __bool__(self) -> bool:
        return True  # an empty table is a table

    @property
    def nbytes(self) -> int:
        """Bytes of memory held for rows, moments and the index, used or not."""
        return self._store.nbytes()

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return (
            f"{list(self.embedding_shape)}, rows={len(self)}, dtype={self.dtype}, "
            f"device={self.device}, initializer={self._initializer}, name={self.name!r}"
        )

    def initializer(self) -> Initializer:
        """What new rows are drawn from."""
        return self._initializer

    def ids(self) -> torch.Tensor:
        """The ids that have a row, [n] int64, in the order of their rows."""
        return self._store.ids()

    def ids_map(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [n] int64, their rows [n] int64)."""
        return self._store.ids(), self._store.rows()

    def embeddings(self) -> torch.Tensor:
        """A copy of the embeddings by row number, [rows, *embedding_shape]; zeros in free rows."""
        rows = torch.full((self._store.num_numbered,), MISSING, device=self.device)
        in_use = self._store.rows()
        rows[in_use] = in_use
        values = functional.gather(self._store.embedding, rows)
        return values.view(-1, *self.embedding_shape)

    # ------------------------------------------------------------------ lookup

    @torch.compiler.disable  # a graph break: the index is no tensor program
    def forward(self, ids: torch.Tensor, admit_hook: AdmitHook | None = None) -> torch.Tensor:
        """The embeddings of ids.

        Args:
            ids: int64 or int32 of any shape, any value, duplicates allowed.
            admit_hook: ``AdmitHook("ReadOnly")`` to insert nothing in training mode.

        Returns:
            A tensor of shape ``ids.shape + embedding_shape``.

        Raises:
            TypeError: ids are no integers, or admit_hook is no AdmitHook.
            RuntimeError: rows may appear, and a CUDA graph is being captured.
        """
        if admit_hook is not None and not isinstance(admit_hook, AdmitHook):
            raise TypeError(
                f"admit_hook must be an AdmitHook, got {type(admit_hook).__name__}; "
                f"use AdmitHook('ReadOnly')"
            )
        flat = self._flat(_checks.require_ids(ids))
        if self.training and admit_hook is None:
            rows = self._store.find_or_insert(flat)
        else:
            rows = self._store.find(flat)
        if self._trainable and torch.is_grad_enabled():
            values = _Lookup.apply(self._anchor, rows, self)  # type: ignore[no-untyped-call]
        else:
            values = functional.gather(self._store.embedding, rows)
        return values.view(*ids.shape, *self.embedding_shape)  # type: ignore[no-any-return]

    def _flat(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.detach().to(self.device, torch.int64).reshape(-1).contiguous()

    # ------------------------------------------------------------------ memory

    def reserve(self, n: int) -> None:
        """Hold memory for at least ``n`` rows in all, so that growing up to there takes no more.

        Raises:
            TypeError, ValueError: ``n`` is no int of at least 0.
        """
        _checks.require_int("n", n, 0)
        self._store.reserve(n)

    # ------------------------------------------------------------------ gradients

    def requires_grad_(self, requires_grad: bool = True) -> HashTable:
        """Whether lookups are differentiable. ``False`` freezes the table."""
        self._trainable = requires_grad
        return self

    def accept_grad(self, rows: torch.Tensor, grad: torch.Tensor) -> None:
        """Add gradients of rows, as backward does.

        Args:
            rows: [N] int64 row numbers, duplicates allowed.
            grad: [N, *embedding_shape] of the table's dtype, or float32 for a 16-bit table. Kept
                by reference unless ``copy_grads``.

        Raises:
            TypeError, ValueError: dtype, shape or device do not fit.
            IndexError: no id has a row (on a GPU the step says so, unless ids were deleted).
        """
        rows = _checks.require_ids(rows, "rows")
        if rows.dim() != 1:
            raise ValueError(f"rows must have shape [N], got {list(rows.shape)}")
        rows = self._flat(rows).clone()
        if self.device.type == "cpu" or self._store.has_deleted():
            unused = self._store.unused(rows)
            if unused.numel():
                raise _checks.row_error(self._label, int(unused[0]), self._store.num_numbered)
        self._accept(self._store.follow(FoundRows(rows)), grad)

    def _accept(self, found: FoundRows, grad: torch.Tensor) -> None:
        grad = self._require_grad(self._label, "grad", grad, found.rows).detach().resolve_neg()
        if self.copy_grads or grad.is_inference():  # inference tensors count no versions
            with torch.inference_mode(False):
                grad = grad.clone(memory_format=torch.contiguous_format)
        self._grads.append(found, grad)

    def _require_grad(self, name: str, what: str, grad: Any, rows: torch.Tensor) -> torch.Tensor:
        """Gradients [N, D] for rows [N], of a dtype that the table takes."""
        grad = _checks.require_rows_of(
            name, what, grad, rows.numel(), self.embedding_shape, self.device
        )
        allowed = (self.dtype,) if self.dtype.itemsize > 2 else (self.dtype, torch.float32)
        return _checks.require_dtype(name, what, grad, allowed)

    def clear_grad(self) -> None:
        """Drop the gradients."""
        self._grads.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, as ``clear_grad``."""
        self._grads.clear()

    def grad(self, acc_step: int = 1) -> torch.Tensor:
        """The gradients reduced by row and divided by ``acc_step``.

        Returns:
            A coalesced sparse COO tensor of shape [rows, *embedding_shape] whose indices are rows.
            It has no entries where there are no gradients.

        Raises:
            TypeError, ValueError: ``acc_step`` is no int of at least 1.
            RuntimeError: a gradient was changed since backward.
        """
        _checks.require_int("acc_step", acc_step, 1)
        pending = self.pending(self._label)
        if pending is None:
            rows = torch.empty(0, dtype=torch.int64, device=self.device)
            values = torch.empty(0, self._dim, dtype=self.dtype, device=self.device)
        else:
            rows, values = functional.coalesce(pending)
        return torch.sparse_coo_tensor(
            rows[None],
            (values / acc_step).view(-1, *self.embedding_shape),
            (self._store.num_numbered, *self.embedding_shape),
            device=self.device,
            is_coalesced=True,
            check_invariants=False,
        )

    def pending(self, name: str) -> Pending | None:
        """The gradients of this step; see ``Table.pending``."""
        if not self._grads:
            return None
        return Pending(
            name,
            self._store.embedding,
            self._store.num_rows_bound,
            self._grads.pieces(name),
            drop_missing=True,
            grad_scale=1.0 / _checks.require_world_size()
            if self.grad_reduce_by == "worker"
            else 1.0,
            mean=self.grad_reduce_by == "id",
            row_count=self._store.row_count,
        )

    def clear_pending(self, set_to_none: bool = True) -> None:
        """Drop the gradients; see ``Table.clear_pending``."""
        self._grads.clear()

    # ------------------------------------------------------------------ contents

    def insert(self, ids: torch.Tensor, embeddings: torch.Tensor) -> None:
        """Set the embeddings of ids, with or without a row so far. Moments stay as they are.

        Args:
            ids: [N] int64; of an id that is given twice the last embedding stays.
            embeddings: [N, *embedding_shape] of the table's dtype.

        Raises:
            TypeError, ValueError: dtype, shape or device do not fit.
        """
        flat = self._flat(_checks.require_ids(ids))
        values = _checks.require_rows_of(
            self._label, "embeddings", embeddings, flat.numel(), self.embedding_shape, self.device
        ).detach()
        _checks.require_dtype(self._label, "embeddings", values, (self.dtype,))
        functional.scatter_(self._store.embedding, self._store.find_or_insert(flat), values)

    def delete(self, ids: torch.Tensor) -> None:
        """Remove ids, their moments with them; those that the table does not hold are passed over.

        Their rows are given to ids that come later, which start with fresh weights and zero
        moments. Gradients of removed ids are dropped. Memory is kept: ``clear`` gives it back.

        Args:
            ids: int64 or int32 of any shape, duplicates allowed.

        Raises:
            TypeError: ids are no integers.
        """
        self._store.delete(self._flat(_checks.require_ids(ids)))

    def clear(self) -> None:
        """Remove every row, its moments with it, and give their memory back."""
        self._store.clear()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        store = self._store
        destination[prefix + "ids"] = store.ids()
        destination[prefix + "embedding"] = functional.gather(store.embedding, store.rows())
        destination[prefix + "seed"] = torch.tensor(store.seed, device="cpu")
        destination[prefix + "fan"] = torch.tensor(self._fan, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        saved = {key: state_dict.get(prefix + key) for key in ("ids", "embedding", "seed", "fan")}
        missing_keys += [prefix + key for key, value in saved.items() if value is None and strict]
        own = {prefix + key for key in saved}
        rest = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        ids, embedding = saved["ids"], saved["embedding"]
        if ids is None or embedding is None:
            return
        try:
            ids = self._flat(_checks.require_ids(ids, prefix + "ids"))
            embedding = embedding.to(self.device)
            values = _checks.require_rows_of(
                self._label,
                prefix + "embedding",
                embedding,
                ids.numel(),
                self.embedding_shape,
                self.device,
            )
            if not values.is_floating_point():
                raise TypeError(f"{prefix}embedding must be floating, got {values.dtype}")
            if ids.unique().numel() != ids.numel():
                raise ValueError(f"{prefix}ids holds an id twice")
            seed, fan = self._store.seed, self._fan
            if saved["seed"] is not None:
                seed = int(saved["seed"])
            if saved["fan"] is not None:
                fan = (int(saved["fan"][0]), int(saved["fan"][1]))
            distribution = self._initializer.distribution(*fan)
        except (TypeError, ValueError, IndexError) as error:
            error_msgs.append(str(error))
            return
        self._store.load(ids, values.detach().to(self.dtype))
        self._store.seed, self._store.distribution, self._fan = seed, distribution, fan

    def _apply(self, fn: Any, recurse: bool = True) -> HashTable:
        """Move or convert, as ``model.to`` does: moments stay float32 (float64 with float64)."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        probe = fn(torch.empty(1, dtype=self.dtype, device=self.device))
        if probe.device.type == "cpu" and probe.is_shared():
            raise RuntimeError(
                f"table {self._label!r} cannot be shared between processes: its index grows in "
                f"the process that inserts; keep it out of share_memory()"
            )
        dtype = _checks.require_table_dtype(self._label, probe.dtype)
        device = _require_device(probe.device)
        require_fits(self._store.distribution, dtype)
        if dtype == self.dtype and device == self.device:
            return self
        self._store.move(device, dtype)
        self._grads.follow_move(fn, device)
        return self

    # ------------------------------------------------------------------ for the optimizer

    @property
    def key(self) -> Any:
        """The table itself."""
        return self

    def moments(self, pending: Pending, state: dict[str, Any]) -> tuple[Slot, Slot]:
        """The slots of the moments; see ``Table.moments``."""
        return self._moments()

    def _moments(self) -> tuple[Slot, Slot]:
        slots = self._store.slots
        if EXP_AVG not in slots:
            slots[EXP_AVG], slots[EXP_AVG_SQ] = self._store.new_moments()
        return slots[EXP_AVG], slots[EXP_AVG_SQ]

    def drop_moments(self) -> None:
        """Forget the moments: the table gets a new owner."""
        for name in (EXP_AVG, EXP_AVG_SQ):
            self._store.slots.pop(name, None)

    def export_moments(self, state: dict[str, Any]) -> dict[str, Any]:
        """Moments by id; see ``Table.export_moments``."""
        rows = self._store.rows()
        first, second = self._moments()
        return {
            "exp_avg": functional.gather(first, rows),
            "exp_avg_sq": functional.gather(second, rows),
            "dtype": dtype_name(self.dtype),
            "ids": self.ids(),
        }

    def build_moments(self, name: str, saved: dict[str, Any]) -> tuple[Any, Any]:
        """New slots with the saved moments; see ``Table.build_moments``."""
        values = require_moments(name, saved, self.dtype, self._dim)
        rows = self._rows_of_saved(name, "moments", saved.get("ids"))
        if rows.numel() != values[0].shape[0]:
            raise ValueError(
                f"table {name!r}: {rows.numel()} ids are saved with {values[0].shape[0]} moments"
            )
        if rows.unique().numel() != rows.numel():
            raise ValueError(f"table {name!r}: the saved moments name an id twice")
        built = self._store.new_moments()
        for slot, value in zip(built, values, strict=True):
            functional.scatter_(slot, rows, value.to(self.device))
        return built

    def _rows_of_saved(self, name: str, what: str, ids: Any) -> torch.Tensor:
        """Rows of saved ids [n], all of which must be in the table."""
        if not isinstance(ids, torch.Tensor):
            raise ValueError(f"table {name!r}: the saved {what} have no ids; is it a HashTable's?")
        rows = self._store.find(self._flat(_checks.require_ids(ids)))
        absent = int((rows == MISSING).sum())
        if absent:
            raise ValueError(
                f"table {name!r}: the saved {what} name {absent} ids that the table does not hold; "
                f"load the model first"
            )
        return rows

    def install_moments(self, state: dict[str, Any], built: tuple[Any, Any] | None) -> None:
        """Replace the moment slots by built ones, or drop them."""
        self.drop_moments()
        if built is not None:
            self._store.slots[EXP_AVG], self._store.slots[EXP_AVG_SQ] = built

    def export_pending(self, name: str) -> list[dict[str, Any]]:
        """Gradients by id; those whose id is gone are left out."""
        return [{"ids": ids, "grad": grad} for ids, grad in self._grads.by_id(name)]

    def build_pending(self, name: str, saved: list[dict[str, Any]]) -> Any:
        """Gradients of the saved ids' rows; see ``Table.build_pending``."""
        grads = []
        for piece in saved:
            require_piece(name, piece)
            rows = self._rows_of_saved(name, "gradients", piece.get("ids"))
            if "grad" not in piece:
                raise ValueError(f"table {name!r}: a saved gradient has no 'grad'")
            grad = piece["grad"].to(self.device, copy=True)
            grad = self._require_grad(name, "its saved gradient", grad, rows)
            grads.append(LookupGrad(self._store.follow(FoundRows(rows)), grad))
        return grads

    def install_pending(self, built: Any) -> None:
        """Replace the gradients."""
        self._grads.replace(built or [])


def _require_device(device: torch.device | str) -> torch.device:
    """A device for which an engine can load."""
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device}")
    if device.type == "cuda":
        functional.load_engine("cuda")
    return torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
