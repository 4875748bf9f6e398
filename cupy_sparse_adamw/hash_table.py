"""A table of embeddings keyed by any int64 id; rows appear when an id is first seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import _checks, functional
from ._locks import locked
from ._slots import Slot
from ._types import MISSING
from .children import ChildrenInfo
from .hooks import (
    AdmitHook,
    BaseAdmitHookImpl,
    BaseFilterHookImpl,
    FilterHook,
    HashtableHookFactory,
    require_mask,
)
from .initializers import ConstantInitializer, Initializer, require_fits
from .lookup_grads import LookupGrads
from .policies import ReadOnlyHookImpl, updates_whole
from .row_store import EMBEDDING, OPTIMIZER_SLOTS, FoundRows, RowStore, SlotGroup, absent_ids
from .row_table import RowTable
from .slices import Slice, gen_slice
from .tables import bring_up_to_date, rows_are_apart

#: Saved beside the slots of hooks, whose names must differ.
SAVED = ("ids", EMBEDDING, "seed", "fan")


class _Lookup(torch.autograd.Function):
    """Rows out; in backward, (rows, gradients) to the table, not reduced and not copied.

    ``anchor`` is an empty tensor that requires grad: it makes autograd call ``backward``.
    """

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, rows: torch.Tensor, table: HashTable) -> Any:
        ctx.save_for_backward(rows)  # so that a second backward is refused, as for any other node
        ctx.table, ctx.found = table, table._store.follow(FoundRows(rows))
        return table.read(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        _ = ctx.saved_tensors
        ctx.table._accept(ctx.found, grad)
        return None, None, None


class HashTable(torch.nn.Module, RowTable):
    """Embeddings keyed by any int64 id, with RecIS's constructor and method names.

    In training mode a row appears when its id is first looked up (whether or not gradients are
    enabled); in eval mode, or with ``AdmitHook("ReadOnly")``, an id without a row reads as zeros,
    inserts nothing and drops its gradient. Rows live in blocks, so growing never moves a row.

    A HashTable is no ``Parameter``: ``model.parameters()`` does not list it, and
    ``model.requires_grad_`` and ``model.zero_grad`` of a module that contains it do not reach it.
    Freeze it with ``table.requires_grad_(False)``; the optimizer clears its gradients.

    Threads that share a table take turns, call by call; ``with table.lock:`` makes several calls
    one (docs/reliability.md).

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
        coalesced: whether ids carry the index of a child (``children_info().encode_id``).
        children: names of logical tables that share this one; None means one, itself.
        slice: the ids that ``load_state_dict`` takes, of all that it is given; None means all.
            Lookups do not ask.
        filter_hook: which rows go, and when; see ``FilterHook``.
        admit_hook: which ids get a row, in lookups that are not given another hook; see
            ``AdmitHook``.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: a size below 1, another ``grad_reduce_by``, children that do not fit, or a hook
            that nobody registered.
        RuntimeError: no engine for ``device`` can load here.
    """

    def __init__(
        self,
        embedding_shape: Any,
        block_size: int = 1024,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        coalesced: bool = False,
        children: list[str] | None = None,
        slice: Slice | None = None,
        initializer: Initializer | None = None,
        name: str | None = None,
        grad_reduce_by: str = "worker",
        filter_hook: FilterHook | None = None,
        *,
        copy_grads: bool = False,
        admit_hook: AdmitHook | None = None,
    ) -> None:
        super().__init__()
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
        self._slice = gen_slice() if slice is None else slice
        if not isinstance(self._slice, Slice):
            raise TypeError(f"slice must be a Slice such as gen_slice(0, 4), got {slice!r}")
        self._children = ChildrenInfo([self._label] if children is None else children, coalesced)
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
        hooks = HashtableHookFactory()
        self._filter_hook_impl: BaseFilterHookImpl | None = None
        with torch.inference_mode(False):  # what policies keep outlives the mode
            if filter_hook is not None:
                self._filter_hook_impl = hooks.create_filter_hook(self, filter_hook)
        self._admit_hook = admit_hook
        self._admit_hooks: dict[str, AdmitHook] = {}
        if admit_hook is not None:
            self._policy_of(admit_hook)

    # ------------------------------------------------------------------ what it is

    @property
    def _label(self) -> str:
        return self.name or "HashTable"

    def __bool__(self) -> bool:
        return True  # an empty table is a table

    @property
    @locked
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

    @locked
    def ids(self) -> torch.Tensor:
        """The ids that have a row, [n] int64, in the order of their rows."""
        return self._store.ids()

    @locked
    def ids_map(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [n] int64, their rows [n] int64)."""
        rows = self._store.rows()
        return self._store.ids_of(rows), rows

    @locked
    def embeddings(self) -> torch.Tensor:
        """A copy of the embeddings by row number, [rows, *embedding_shape]; zeros in free rows."""
        rows = torch.full((self._store.num_numbered,), MISSING, device=self.device)
        in_use = self._store.rows()
        rows[in_use] = in_use
        return self.read(rows).view(-1, *self.embedding_shape)

    def slot_group(self) -> SlotGroup:
        """The embedding and what else there is for each row: moments, and slots of hooks."""
        return SlotGroup(self._store)

    def children_info(self) -> ChildrenInfo:
        """The logical tables that share this one."""
        return self._children

    @property
    def children_hashtable(self) -> list[str]:
        """Their names."""
        return self._children.children()

    @property
    def coalesce(self) -> bool:
        """Whether ids carry the index of a child."""
        return self._children.is_coalesce()

    # ------------------------------------------------------------------ lookup

    @torch.compiler.disable  # a graph break: the index is no tensor program
    def forward(self, ids: torch.Tensor, admit_hook: AdmitHook | None = None) -> torch.Tensor:
        """The embeddings of ids.

        Args:
            ids: int64 or int32 of any shape, any value, duplicates allowed.
            admit_hook: what to do with ids that have no row, in training mode: instead of the
                table's own hook. ``AdmitHook("ReadOnly")`` inserts nothing.

        Returns:
            A tensor of shape ``ids.shape + embedding_shape``.

        Raises:
            TypeError: ids are no integers, or admit_hook is no AdmitHook.
            ValueError: nobody registered the hook's name, or the table has it with other params.
            RuntimeError: rows may appear while a CUDA graph is being captured, or a filter with
                ``max_rows`` may let none go; or new ids would get their rows in a DataLoader's
                worker, where they are lost.
        """
        flat = self._flat(_checks.require_ids(ids))
        with self._store.lock:
            admit_hook = self._admit_hook if admit_hook is None else admit_hook
            policy = None if admit_hook is None else self._policy_of(admit_hook)
            rows = self._admitted(flat, policy) if self.training else self._store.find(flat)
            if self._trainable and torch.is_grad_enabled():
                values = _Lookup.apply(self._anchor, rows, self)  # type: ignore[no-untyped-call]
            else:
                values = self.read(rows)
        return values.view(*ids.shape, *self.embedding_shape)  # type: ignore[no-any-return]

    def _policy_of(self, hook: AdmitHook) -> BaseAdmitHookImpl:
        """The table's policy of a hook, made at its first use."""
        if not isinstance(hook, AdmitHook) or hook.name not in self._admit_hooks:
            with torch.inference_mode(False):  # what it keeps outlives the mode
                policy = HashtableHookFactory().create_admit_hook(hook).to(self.device)
            self.add_module(f"admit_hook_{hook.name}", policy)
            self._admit_hooks[hook.name] = hook
        made = self._admit_hooks[hook.name]
        if made.params != hook.params:
            raise ValueError(
                f"table {self._label!r} has the admit hook {made}, so it cannot take {hook}; "
                f"register the policy under a second name for other params"
            )
        return getattr(self, f"admit_hook_{hook.name}")  # type: ignore[no-any-return]

    def _admitted(self, ids: torch.Tensor, admit: BaseAdmitHookImpl | None = None) -> torch.Tensor:
        """Rows [N] of ids [N], new ones among them; ``MISSING`` of those not admitted."""
        store, filters = self._store, self._filter_hook_impl
        if filters is None and isinstance(admit, ReadOnlyHookImpl):
            return store.find(ids)
        if filters is None and admit is None:
            return store.find_or_insert(ids)
        with functional.uninterrupted():
            with store.all_or_nothing() as undo:
                rows = self._selected(ids, admit, undo)
                if filters is not None:
                    if not updates_whole(filters):
                        undo.append(self._uses_of(rows))
                    filters(rows)
            if admit is not None:
                admit.settle()
        return rows

    def _selected(
        self, ids: torch.Tensor, admit: BaseAdmitHookImpl | None, undo: list[Callable[[], None]]
    ) -> torch.Tensor:
        """``_admitted`` with hooks, but for noting which rows are used."""
        store, filters = self._store, self._filter_hook_impl
        if isinstance(admit, ReadOnlyHookImpl):
            return store.find(ids)
        if admit is None and (filters is None or not filters.makes_room()):
            return store.find_or_insert(ids)
        # Hooks must see the new ids first: this waits for the device.
        store.require_no_capture()
        rows = store.find(ids)
        new = absent_ids(ids, rows)
        if not new.numel():
            return rows
        new, counts = new.unique(return_counts=True)
        if admit is not None:
            undo.append(admit.take_back)
            new = new[require_mask(admit, admit.admit(new, counts), new.numel())]
            if not new.numel():
                return rows
        if filters is not None:
            filters.make_room(new.numel(), rows)
        store.find_or_insert(new)
        return store.find(ids)

    # ------------------------------------------------------------------ memory

    @locked
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

    @locked
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
        self._accept(FoundRows(rows), grad)

    def _accept(self, found: FoundRows, grad: torch.Tensor) -> None:
        with self._store.lock:  # backward may run in another thread
            self._store.follow(found)
            grad = self._require_grad(self._label, "grad", grad, found.rows)
            grad = grad.detach().resolve_neg()
            if self.copy_grads or grad.is_inference():  # inference tensors count no versions
                with torch.inference_mode(False):
                    grad = grad.clone(memory_format=torch.contiguous_format)
            self._grads.append(found, grad)

    def clear_grad(self) -> None:
        """Drop the gradients."""
        self.clear_pending()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, as ``clear_grad``."""
        self.clear_pending()

    @locked
    def pending_rows(self) -> torch.Tensor:
        """Rows [n] int64 that a gradient waits for, or may come for; some repeat.

        It may come for rows that were looked up, with gradients enabled, since gradients were last
        cleared. Filters keep all of them.
        """
        rows = self._store.pinned_rows()
        return rows[rows != MISSING]

    @locked
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

    # ------------------------------------------------------------------ contents

    @locked
    def insert(self, ids: torch.Tensor, embeddings: torch.Tensor) -> None:
        """Set the embeddings of ids, with or without a row so far. Moments stay as they are.

        Args:
            ids: [N] int64; of an id that is given twice the last embedding stays.
            embeddings: [N, *embedding_shape] of the table's dtype.

        Raises:
            TypeError, ValueError: dtype, shape or device do not fit.
            RuntimeError: a filter with ``max_rows`` may let none go, or this is a DataLoader's
                worker, where what is set is lost.
        """
        flat = self._flat(_checks.require_ids(ids))
        values = _checks.require_rows_of(
            self._label, "embeddings", embeddings, flat.numel(), self.embedding_shape, self.device
        ).detach()
        _checks.require_dtype(self._label, "embeddings", values, (self.dtype,))
        store = self._store
        if store.is_copy_in_worker():
            raise RuntimeError(
                f"table {self._label!r}: a DataLoader's worker has a copy of the table, in which "
                f"what is inserted is lost; insert in the process that trains"
            )
        values = values.contiguous()  # takes its memory while no row has appeared yet
        with functional.uninterrupted(), store.all_or_nothing() as undo:
            rows = self._selected(flat, None, undo)
            self.note_change(rows)
            if (lagging := self.lagging()) is not None:  # else old motion would be added later
                functional.catch_up_(lagging, rows)
            if self._filter_hook_impl is not None:
                undo.append(self._uses_of(rows))
                self._filter_hook_impl(rows)
            functional.scatter_(store.embedding, rows, values)

    def _uses_of(self, rows: torch.Tensor) -> Callable[[], None]:
        """What puts back what a filter knows now, of rows [N] and of all."""
        assert self._filter_hook_impl is not None
        slots = [(slot, functional.gather(slot, rows)) for slot in self._hook_slots()]
        buffers = [(buffer, buffer.clone()) for buffer in self._filter_hook_impl.buffers()]

        def put_back() -> None:
            for slot, values in slots:
                functional.scatter_(slot, rows, values)
            for buffer, before in buffers:
                buffer.copy_(before)

        return put_back

    @locked
    def delete(self, ids: torch.Tensor, index: Any = None, preserve_slot: Any = None) -> None:
        """Remove ids, their moments with them; those that the table does not hold are passed over.

        Their rows are given to ids that come later, which start with fresh weights and zero
        moments. Gradients of ids that are still gone at the step are dropped. Memory is kept:
        ``clear`` gives it back.

        Args:
            ids: int64 or int32 of any shape, duplicates allowed.
            index: unused; RecIS's filters hand over rows, which are known by id here.
            preserve_slot: unused; RecIS keeps a slot's value of a removed row.

        Raises:
            TypeError: ids are no integers.
        """
        self._store.delete(self._flat(_checks.require_ids(ids)))

    @locked
    def clear(self) -> None:
        """Remove every row, its moments with it, and give their memory back."""
        self._store.clear()

    # ------------------------------------------------------------------ slots of hooks

    @locked
    def append_filter_slot(self, name: str, dtype: torch.dtype, slot_dim: int = 1) -> None:
        """Keep ``slot_dim`` values of each row under a name, zero for new ids. They are saved.

        Raises:
            TypeError, ValueError: slot_dim is no int of at least 1, or the name is taken.
        """
        _checks.require_int("slot_dim", slot_dim, 1)
        taken = dict.fromkeys((*SAVED, *OPTIMIZER_SLOTS.values(), *self._store.slots))
        if name in taken or "." in name:
            raise ValueError(
                f"table {self._label!r}: a slot's name must have no dot and be none of "
                f"{', '.join(map(repr, taken))}, got {name!r}"
            )
        self._store.add_slot(name, slot_dim, dtype)

    @locked
    def append_step_filter_slot(self, name: str, init_step: torch.Tensor) -> None:
        """``append_filter_slot`` of one int64, with a first value [1] for rows that are there."""
        self.append_filter_slot(name, torch.int64, 1)
        self.update_slot(name, self._store.rows(), init_step)

    @locked
    def update_slot(self, name: str, index: torch.Tensor, value: torch.Tensor) -> None:
        """Set a slot's values of rows.

        Args:
            name: of the slot.
            index: [N] int64 rows; -1 is passed over, and on a GPU so are rows out of range.
            value: of the slot's dtype, expandable to [N, slot_dim]. Of a row that occurs twice the
                last value stays.

        Raises:
            KeyError: there is no such slot.
            TypeError, ValueError: dtype, shape or device do not fit.
            IndexError: a row is out of range (on the CPU).
        """
        slot = self.get_slot(name)
        index = _checks.require_ids(index, "index")
        if index.dim() != 1 or index.device != self.device:
            raise ValueError(
                f"table {self._label!r}: index must have shape [N] on {self.device}, got "
                f"{list(index.shape)} on {index.device}"
            )
        value = self._slot_values(f"table {self._label!r}, slot {name!r}", slot, value, index)
        if index.numel() and self.device.type == "cpu":
            low, high = (int(x) for x in index.aminmax())
            if low < MISSING or high >= slot.num_rows():
                bad = low if low < MISSING else high
                raise _checks.row_error(self._label, bad, self._store.num_numbered)
        self.note_change(index)
        if slot is self._store.embedding and (lagging := self.lagging()) is not None:
            functional.catch_up_(lagging, index.long())  # else old motion would be added later
        functional.scatter_(slot, index.long(), value)

    @staticmethod
    def _slot_values(name: str, slot: Slot, value: Any, rows: torch.Tensor) -> torch.Tensor:
        """``value`` expanded to [N, slot_dim] for rows [N]."""
        if not isinstance(value, torch.Tensor) or value.dtype != slot.dtype:
            got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"{name}: value must be a tensor of {slot.dtype}, got {got}")
        if value.device != slot.device:
            raise ValueError(f"{name}: value must be on {slot.device}, got {value.device}")
        try:
            return value.expand(rows.numel(), slot.dim)
        except RuntimeError:
            raise ValueError(
                f"{name}: value must expand to {[rows.numel(), slot.dim]}, got shape "
                f"{list(value.shape)}"
            ) from None

    def get_slot(self, name: str) -> Slot:
        """The slot of a name, ``slot_group().slot_by_name(name)``."""
        return self.slot_group().slot_by_name(name)

    def _hook_slots(self) -> list[Slot]:
        own = (EMBEDDING, *OPTIMIZER_SLOTS.values())
        return [slot for name, slot in self._store.slots.items() if name not in own]

    # ------------------------------------------------------------------ saving and loading

    @locked
    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        store = self._store
        if not rows_are_apart():
            bring_up_to_date(self)
            rows = store.rows()
            destination[prefix + "ids"] = store.ids_of(rows)
            for slot in (store.embedding, *self._hook_slots()):
                destination[prefix + slot.name()] = functional.gather(slot, rows)
        destination[prefix + "seed"] = torch.tensor(store.seed, device="cpu")
        destination[prefix + "fan"] = torch.tensor(self._fan, device="cpu")

    @locked
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
        apart = rows_are_apart()
        slots = {slot.name(): slot for slot in (self._store.embedding, *self._hook_slots())}
        keys = ("seed", "fan") if apart else dict.fromkeys((*SAVED, *slots))
        saved = {key: state_dict.get(prefix + key) for key in keys}
        missing_keys += [prefix + key for key, value in saved.items() if value is None and strict]
        own = {prefix + key for key in saved}
        rest = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not apart and (saved["ids"] is None or saved[EMBEDDING] is None):
            return
        try:
            ids, values = (None, {}) if apart else self._saved_rows(prefix, slots, saved)
            seed, fan = self._store.seed, self._fan
            if saved["seed"] is not None:
                seed = int(saved["seed"])
            if saved["fan"] is not None:
                fan = (int(saved["fan"][0]), int(saved["fan"][1]))
            distribution = self._initializer.distribution(*fan)
        except (TypeError, ValueError, IndexError) as error:
            error_msgs.append(str(error))
            return
        if ids is not None:
            bring_up_to_date(self)  # moments stay with their ids
        with functional.uninterrupted():
            if ids is not None:
                accepted = self.accepts(ids)
                self._store.load(ids[accepted], {name: x[accepted] for name, x in values.items()})
            self._store.seed, self._store.distribution, self._fan = seed, distribution, fan
        if ids is not None and self._filter_hook_impl is not None and len(values) < len(slots):
            self._filter_hook_impl(self._store.rows())  # or all would be older than any

    def accepts(self, ids: torch.Tensor) -> torch.Tensor:
        """Which ids [n] int64 a load takes, as a bool tensor [n]: those of the table's slice."""
        return self._slice.contains(self._children.split_id(ids)[1])

    def _saved_rows(
        self, prefix: str, slots: dict[str, Slot], saved: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Ids [n], and [n, D] of each slot, from what a state_dict holds."""
        ids = self._flat(_checks.require_ids(saved["ids"], prefix + "ids"))
        if ids.unique().numel() != ids.numel():
            raise ValueError(f"{prefix}ids holds an id twice")
        values = {
            name: self._saved_values(prefix + name, slot, saved[name], ids)
            for name, slot in slots.items()
            if saved[name] is not None
        }
        return ids, values

    def _saved_values(self, key: str, slot: Slot, saved: Any, ids: torch.Tensor) -> torch.Tensor:
        """What a state_dict holds of a slot, [n, D] of its dtype, for ids [n]."""
        if not isinstance(saved, torch.Tensor):
            raise TypeError(f"{key} must be a tensor, got {type(saved).__name__}")
        shape = self.embedding_shape if slot.name() == EMBEDDING else (slot.dim,)
        values = _checks.require_rows_of(
            self._label, key, saved.to(self.device), ids.numel(), shape, self.device
        )
        if values.is_floating_point() != slot.dtype.is_floating_point:
            raise TypeError(f"{key} must be {slot.dtype}, got {values.dtype}")
        return values.detach().to(slot.dtype)

    @locked
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
        moved = self._grads.moved(fn, device)
        with functional.uninterrupted():
            self._store.move(device, dtype)
            self._grads.replace(moved)
        return self


def _require_device(device: torch.device | str) -> torch.device:
    """A device for which an engine can load."""
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device}")
    if device.type == "cuda":
        functional.load_engine("cuda")
    return torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
