"""SparseOptimizer and SparseAdamW: param groups, accumulation, state. No arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from . import functional
from ._checks import (
    SETTINGS,
    lr_error,
    require_betas,
    require_hyperparams,
    require_int,
    row_error,
)
from ._locks import Held
from ._step_hooks import hooked
from ._types import SKIP, Hyperparams, Kind, Pending, RowReport, Update
from .missed_steps import MissedSteps
from .optimizer_state import DEFAULTS, build_state, export_state, require_no_amsgrad
from .tables import Table, as_table, bring_up_to_date, claim, num_claims, require_owned
from .untouched import (
    hook_module,
    leave_former,
    make_room,
    prepare_to_count,
    require_keeps,
    restart,
    take_over,
)

_settings_in = operator.itemgetter(*SETTINGS)
#: Types of settings that do not change in place.
FIXED = {float, int, bool, str, tuple}


class SparseOptimizer(torch.optim.Optimizer):
    """Base of optimizers that update only the rows that gradients name.

    It keeps what torch.optim.Optimizer promises (hooks, LR schedulers, closures, state_dict,
    deepcopy, pickle) for tables given by name, and RecIS's names: ``add_params``,
    ``set_grad_accum_steps``.

    With ``set_grad_accum_steps(n)`` an update happens at the n-th ``step()`` since the last update,
    and ``zero_grad()`` in between keeps the gradients. They are summed: scale the loss.

    Args:
        param_dict: name -> table; may be empty.
        defaults: ``lr``, ``betas``, ``eps``, ``weight_decay`` of groups that do not set them; other
            settings of SparseAdamW, where they are not to be its defaults.
    """

    def __init__(self, param_dict: Mapping[str, Any], defaults: dict[str, Any]) -> None:
        if not isinstance(param_dict, Mapping):
            raise TypeError(
                f"param_dict must be a dict of name -> table, got {type(param_dict).__name__}; use "
                f"filter_out_sparse_param(model)"
            )
        defaults = {**DEFAULTS, **defaults}
        require_hyperparams(defaults)
        self._tables: dict[str, Table] = {}
        self._grad_accum_steps = 1
        self._accumulated = 0  # micro-batches since the last update
        self._reports: list[RowReport] = []  # of updates whose rows are still being checked
        self._listed: tuple[Any, list[tuple[dict[str, Any], str, Table]]] | None = None
        self._checked: dict[int, tuple[tuple[Any, ...], Hyperparams]] = {}  # by id of the group
        super().__init__([{"params": param_dict}], defaults)

    # ------------------------------------------------------------------ tables and groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add tables with settings of their own.

        Args:
            param_group: ``{"params": {name: table}, "lr": ..., ...}``; ``beta1`` and ``beta2`` may
                stand for ``betas``. What is left out comes from the constructor.

        Raises:
            TypeError: ``params`` is no dict, or holds something that is not a table.
            ValueError: a setting is out of range, or a name or table is already here.
        """
        if not isinstance(param_group, dict) or not isinstance(param_group.get("params"), Mapping):
            raise TypeError(
                "a param group must be a dict whose 'params' is a dict of name -> table; use "
                "filter_out_sparse_param(model)"
            )
        require_no_amsgrad(param_group.get("amsgrad", False))
        group = {**self.defaults, **param_group}
        beta1, beta2 = require_betas(group["betas"])
        group["betas"] = (group.pop("beta1", beta1), group.pop("beta2", beta2))
        require_hyperparams(group)
        tables = self._require_new_tables(param_group["params"], group)
        group["params"] = [table.key for table in tables.values()]
        self._adopt(tables, group)
        self.param_groups.append(group)

    def add_params(self, params: Mapping[str, Any]) -> None:
        """Add tables to the first param group.

        Raises:
            TypeError: ``params`` is no dict, or holds something that is not a table.
            ValueError: a name or table is already here.
        """
        if not isinstance(params, Mapping):
            raise TypeError(
                f"params must be a dict of name -> table, got {type(params).__name__}; use "
                f"filter_out_sparse_param(model)"
            )
        if not self.param_groups:  # removed by hand
            self.add_param_group({"params": params})
            return
        tables = self._require_new_tables(params, self.param_groups[0])
        self._adopt(tables, self.param_groups[0])
        self.param_groups[0]["params"] += [table.key for table in tables.values()]

    def _require_new_tables(
        self, params: Mapping[str, Any], group: dict[str, Any]
    ) -> dict[str, Table]:
        """The tables of a dict for a group, none of which is known yet by name or identity."""
        self._listed = None
        held = {id(key) for group in self.param_groups for key in group["params"]}
        for name, table in list(self._tables.items()):
            if id(table.key) not in held:  # its group was removed by hand
                del self._tables[name]
        tables: dict[str, Table] = {}
        names = {id(table.key): name for name, table in self._tables.items()}
        for name, value in params.items():
            if not isinstance(name, str):
                raise TypeError(f"table names are strings, got {name!r}")
            table = as_table(name, value)
            if name in self._tables:
                raise ValueError(f"the optimizer already has a table named {name!r}")
            if id(table.key) in names:
                raise ValueError(
                    f"{names[id(table.key)]!r} and {name!r} are the same table; a table is updated "
                    f"once per step, so give it once"
                )
            names[id(table.key)] = name
            require_keeps(name, table, group)
            tables[name] = table
        return tables

    def _adopt(self, tables: dict[str, Table], group: dict[str, Any]) -> None:
        for table in tables.values():
            leave_former(table)
        for table in tables.values():
            take_over(table, group)
            claim(table, self)
        self._tables.update(tables)

    def _named_tables(self) -> list[tuple[dict[str, Any], str, Table]]:
        """(group, name, table) of every table, in the order of the groups.

        Raises:
            RuntimeError: another optimizer has taken a table over, or ``param_groups`` was changed
                by hand so that a table is unknown or met twice.
        """
        # What the list depends on. It keeps what has these ids, so that nothing new can.
        held = [[id(group), *map(id, group["params"])] for group in self.param_groups]
        seen = num_claims(), held
        if self._listed is None or self._listed[0] != seen:
            self._listed = seen, list(self._list_tables())
        return self._listed[1]

    def _list_tables(self) -> Iterator[tuple[dict[str, Any], str, Table]]:
        by_key = {id(table.key): (name, table) for name, table in self._tables.items()}
        for group in self.param_groups:
            for key in group["params"]:
                if id(key) not in by_key:  # or no longer: each is met once
                    raise RuntimeError(
                        "param_groups holds something that was put there by hand, or a table "
                        "twice; add tables with add_params or add_param_group, which take their "
                        "names and see to it that each is updated once"
                    )
                name, table = by_key.pop(id(key))
                require_owned(name, table, self)
                yield group, name, table

    def _names_by_group(self) -> list[list[str]]:
        names: dict[int, list[str]] = {id(group): [] for group in self.param_groups}
        for group, name, _ in self._named_tables():
            names[id(group)].append(name)
        return list(names.values())

    # ------------------------------------------------------------------ step

    def set_grad_accum_steps(self, steps: int) -> None:
        """Update at every ``steps``-th ``step()`` only.

        Clear gradients through ``zero_grad`` of this optimizer, which knows of the accumulation:
        ``model.zero_grad()`` drops an Embedding's micro-batches, as torch would.

        Raises:
            TypeError, ValueError: ``steps`` is no int of at least 1.
        """
        self._grad_accum_steps = require_int("steps", steps, 1)

    @hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every table that has a gradient, or count a micro-batch.

        Everything is checked before anything is written: after one of the exceptions below,
        weights, moments and counters of all tables are what they were. Ctrl-C during the update is
        held back until it is done.

        On a GPU nothing is read back in a step, so a row out of range is skipped, and the first
        ``step()`` that finds this reported raises the IndexError, as does ``state_dict()``.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a gradient is dense or was changed since backward, another optimizer
                has taken a table over, or a CUDA graph is being captured and a replay would not be
                such a step.
            IndexError: a gradient names a row that the table does not have.
            OverflowError: more gradient rows or table rows than one sort can hold.
            TypeError, ValueError: a gradient or a setting does not fit.
        """
        if self._reports:
            self._raise_reported()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_alone()
        return loss

    @torch.compiler.disable  # the update is no tensor program
    def _update_alone(self) -> None:
        with self.locked():
            is_enabled = torch.is_grad_enabled()
            try:
                # torch.no_grad is several calls: Ctrl-C within would leave gradients disabled.
                torch._C._set_grad_enabled(False)
                self._update(last=self._accumulated + 1 >= self._grad_accum_steps)
            finally:
                torch._C._set_grad_enabled(is_enabled)

    def locked(self) -> Held:
        """What keeps other threads from reading or changing rows of all tables in a ``with``.

        Around several calls that shall be one. Not around a backward on a GPU, which runs in a
        thread of torch's own and would wait for this one.
        """
        tables = self._tables.values()
        return Held([t.lock_owner for t in tables if t.lock_owner is not None])

    def _update(self, last: bool) -> None:
        settings = {id(group): self._settings_of(group) for group in self.param_groups}
        # What follows asks each of hundreds of tables only if some may lag.
        may_lag = any(group["untouched"] != "skip" for group in self.param_groups)
        if may_lag:
            make_room(self._tables.values())
        tables, grads, hypers, groups = [], [], [], []
        for group, name, table in self._named_tables():
            pending = table.pending(name)
            if pending is not None:
                tables.append(table)
                grads.append(pending)
                hypers.append(settings[id(group)])
                groups.append(group)
        if any(map(functional.is_capturing, {pending.param.device for pending in grads})):
            self._require_capturable(tables, grads, hypers)
        if not last:
            self._accumulated += 1
            return
        states = []
        for table, pending, group in zip(tables, grads, groups, strict=True):
            state = self.state[table.key]
            step = state.get("step")
            if step is None and table.missed is not None:  # the state was cleared by hand
                bring_up_to_date(table)
                table.missed = None
            pending.kind = self._kind(pending.name, table, group)
            if (
                step is None
                or step.device != pending.param.device
                or step.dtype is not torch.int64  # put there by hand; engines read int64
            ):
                self._put_on_device(state, pending.param.device)
            pending.fault = state["row_fault"]
            states.append(state)
        if may_lag:
            self._begin_to_miss(tables, states)
        segments = functional.segment(grads)
        reports: list[RowReport] = []
        if may_lag:
            asked = (t.require_read_current(g) for t, g in zip(tables, grads, strict=True))
            reports = [report for report in asked if report is not None]
        updates = [
            self._update_of(table, pending, state, hyper)
            for table, pending, state, hyper in zip(tables, grads, states, hypers, strict=True)
        ]
        apply = self._prepare_updates(updates, segments)
        count = None
        if may_lag:
            count = prepare_to_count(list(zip(tables, hypers, strict=True)), self._tables.values())
        with functional.uninterrupted():
            self._reports += apply()
            if count is not None:
                count()
            self._reports += reports
            self._accumulated = 0

    def _settings_of(self, group: dict[str, Any]) -> Hyperparams:
        """``require_hyperparams`` of a group, whose result is kept while its settings stay."""
        found = _settings_in(group)
        known = self._checked.get(id(group))
        if known is not None and all(map(operator.is_, found, known[0])):
            return known[1]
        hyper = require_hyperparams(group)
        if {*map(type, (*found, *found[SETTINGS.index("betas")]))} <= FIXED:
            self._checked[id(group)] = found, hyper
        return hyper

    def _prepare_updates(
        self, updates: list[Update], segments: functional.Segments
    ) -> Callable[[], list[RowReport]]:
        """The update rule: the result writes weights and moments of the rows in ``segments``.

        Whatever may fail happens before, so that all tables are updated or none.
        """
        raise NotImplementedError

    @staticmethod
    def _kind(name: str, table: Table, group: dict[str, Any]) -> Kind:
        """Which update a table gets.

        Raises:
            ValueError: "untouched" or "bias_correction" of its group was changed.
        """
        untouched, per_row = group["untouched"], group["bias_correction"] == "row"
        if untouched == table.untouched == "skip" and not (per_row or table.counts_rows):
            return SKIP
        if per_row != table.counts_rows:
            raise ValueError(
                f"table {name!r}: bias_correction was changed in param_groups; it is chosen when "
                f"the table is given to the optimizer"
            )
        if untouched != table.untouched:
            raise ValueError(
                f"table {name!r}: untouched was changed from {table.untouched!r} to "
                f"{untouched!r} in param_groups; it is chosen when the table is given to the "
                f"optimizer"
            )
        if table.missed is not None:
            untouched = table.missed.kind(table.dtype)
        elif untouched == "dense" and table.dtype is torch.float64:
            untouched = "replay"
        return Kind(untouched, per_row)

    @staticmethod
    def _update_of(
        table: Table, pending: Pending, state: dict[str, Any], hyper: Hyperparams
    ) -> Update:
        update = Update(pending, *table.moments(pending, state), state["step"], hyper)
        if table.missed is not None:
            update.last_step = table.last_step(state)
            update.missed = table.missed.on(pending.param.device, table.dtype)
        if pending.kind.per_row:
            update.row_step = table.row_step(state)
        return update

    @staticmethod
    def _begin_to_miss(tables: list[Table], states: list[dict[str, Any]]) -> None:
        """Have a log for tables whose rows may fall behind from this step on; shared if alike."""
        logs: dict[tuple[str, int], MissedSteps] = {}
        for table, state in zip(tables, states, strict=True):
            if table.untouched != "skip" and table.missed is None:
                alike = table.untouched, int(state["step"])
                if alike not in logs:
                    logs[alike] = MissedSteps(alike[0] == "dense", alike[1])
                table.begin_to_miss(state, logs[alike])

    @staticmethod
    def _put_on_device(state: dict[str, Any], device: torch.device, t: int = 0) -> None:
        """Have "step" and "row_fault" of a table's state beside its rows; new ones begin at t.

        "step" [] int64 is the number of updates, "row_fault" [2] int64 see ``Pending.fault``.
        """
        with torch.inference_mode(False):  # they outlive the mode that they appear in
            if "step" not in state:
                new = {
                    "step": torch.full((), t, dtype=torch.int64, device=device),
                    "row_fault": torch.zeros(2, dtype=torch.int64, device=device),
                }
            else:  # a HashTable was moved
                new = {key: state[key].to(device, torch.int64) for key in ("step", "row_fault")}
            state.update(new)  # both or neither

    def _require_capturable(
        self, tables: list[Table], grads: list[Pending], hypers: list[Hyperparams]
    ) -> None:
        """Raise RuntimeError if a replay of this step would not be what the step itself is."""
        if self._grad_accum_steps > 1:
            raise RuntimeError(
                f"step() with {self._grad_accum_steps} accumulation steps cannot be captured into "
                f"a CUDA graph: replays count no micro-batches; use set_grad_accum_steps(1), and "
                f"capture every backward before the one step()"
            )
        for table, pending in zip(tables, grads, strict=True):
            if table.untouched != "skip":
                raise RuntimeError(
                    f"table {pending.name!r}: a step with untouched={table.untouched!r} cannot be "
                    f"captured into a CUDA graph: the host keeps count of what rows miss; use "
                    f"untouched='skip', or do not capture the step"
                )
        for table, pending, hyper in zip(tables, grads, hypers, strict=True):
            table.saved_rows, table.is_in_graph = None, True
            step = self.state.get(table.key, {}).get("step")
            if step is None or step.device != table.device:
                raise RuntimeError(
                    f"table {pending.name!r}: its first update on {table.device} cannot be "
                    f"captured into a CUDA graph, since every replay would start it anew; run one "
                    f"step before capturing"
                )
            if isinstance(hyper.lr, torch.Tensor) and hyper.lr.device != table.device:
                raise lr_error(pending.name, hyper.lr, table.device)

    # ------------------------------------------------------------------ rows out of range

    @torch.compiler.disable
    def _raise_reported(self) -> None:
        """Raise the IndexError of an earlier update, if a report of it has come in."""
        devices = {state["step"].device for state in self.state.values() if "step" in state}
        if any(map(functional.is_capturing, devices)):
            return
        for report in self._reports[:]:
            if report.ready():
                if error := report.error():
                    self._forget_faults()
                    raise error
                self._reports.remove(report)

    def _raise_faults(self) -> None:
        """Raise the IndexError of an earlier update, if there is one. Waits for the device."""
        for _, name, table in self._named_tables():
            fault = self.state.get(table.key, {}).get("row_fault")
            flag, row = (0, 0) if fault is None else fault.tolist()
            if flag:
                self._forget_faults()
                raise row_error(name, row, len(table))

    def _forget_faults(self) -> None:
        self._reports.clear()
        for state in self.state.values():
            if "row_fault" in state:
                state["row_fault"].zero_()

    # ------------------------------------------------------------------ gradients

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, unless micro-batches are being accumulated."""
        with self.locked():
            if self._accumulated == 0:
                for table in self._tables.values():
                    table.clear_pending(set_to_none)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by torch.amp.GradScaler, which unscales ``.grad`` itself where this is False."""
        if self._grad_accum_steps > 1 or not all(
            table.grad_scaler_reaches_it for table in self._tables.values()
        ):
            raise RuntimeError(
                "GradScaler cannot unscale the gradients of a HashTable or of accumulated "
                "micro-batches yet; use bfloat16 autocast without a GradScaler, or call "
                "optimizer.step() on unscaled gradients"
            )
        return False

    # ------------------------------------------------------------------ untouched rows

    @torch.no_grad()
    @torch.compiler.disable
    def flush(self, names: Iterable[str] | None = None) -> None:
        """Bring every row up to date in memory, so that weights can be read past the lookups.

        With ``untouched="skip"`` there is nothing to do.

        Args:
            names: of tables; None means all.

        Raises:
            KeyError: the optimizer has no table of such a name.
        """
        tables = [self._table_named(name) for name in (self._tables if names is None else names)]
        with self.locked():
            for table in tables:
                bring_up_to_date(table)
            if names is None:
                restart(tables)

    @torch.no_grad()
    @torch.compiler.disable
    def caught_up(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings that ids have now, whether their rows are behind or not. Writes nothing.

        Args:
            name: of the table.
            ids: of a HashTable, or row numbers of an Embedding; int64 or int32 of any shape. An
                id that a HashTable does not hold reads as zeros.

        Returns:
            A tensor of shape ``ids.shape`` + the shape of an embedding.

        Raises:
            KeyError: the optimizer has no table of that name.
            TypeError: ids are no integers.
            IndexError: an Embedding has no such row (on the CPU).
        """
        table = self._table_named(name)
        with self.locked():
            return table.caught_up(ids)

    def _table_named(self, name: str) -> Table:
        if name not in self._tables:
            known = ", ".join(map(repr, self._tables))
            raise KeyError(f"the optimizer has no table {name!r}; it has {known}")
        return self._tables[name]

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs, in plain types.

        Returns:
            ``{"state": {name: {"step", "exp_avg", "exp_avg_sq", "dtype"[, "ids"]}},
            "param_groups": [{settings, "params": [names]}], "accumulation": {"grad_accum_steps",
            "accumulated", "grads": {name: unreduced gradients}}}``. Tables that had no update
            have no entry in "state". Moments of a HashTable are listed by id. "grads" is empty
            unless micro-batches are being accumulated: as in torch, gradients that no ``step()``
            has counted are not part of the state.

        Raises:
            IndexError: an earlier update on a GPU got a gradient of a row out of range. It is
                raised once.
        """
        with self.locked():
            return export_state(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned. Load the model's own state first.

        Raises:
            TypeError, ValueError: something does not fit; then nothing has been changed.
        """
        with self.locked():
            install = build_state(self, state_dict)
            for table in self._tables.values():
                bring_up_to_date(table)  # weights stay as they are now
            with functional.uninterrupted():
                install()

    def __getstate__(self) -> dict[str, Any]:
        for name, table in self._tables.items():
            require_owned(name, table, self)
        return {
            **super().__getstate__(),
            "_tables": self._tables,
            "_grad_accum_steps": self._grad_accum_steps,
            "_accumulated": self._accumulated,
            # torch's deepcopy and pickle of a Parameter drop its .grad
            "_grads": {n: t.export_pending(n) for n, t in self._tables.items()}
            if self._accumulated
            else {},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        grads = state.pop("_grads", {})
        super().__setstate__(state)
        self._reports = []  # what they would say is in the state as well
        self._listed, self._checked = None, {}
        for name, saved in grads.items():
            self._tables[name].install_pending(self._tables[name].build_pending(name, saved))
        for table in self._tables.values():
            hook_module(table)  # it was copied too, and its hooks without the table
            claim(table, self)  # the copies' owner is the copy


class SparseAdamW(SparseOptimizer):
    r"""AdamW for tables of which a batch touches few rows.

    For every row r with gradients, g their sum in this step, t the number of the table's updates,
    elementwise (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, algorithm 2,
    as torch.optim.AdamW)::

        exp_avg    += (1 - beta1) * (g - exp_avg)
        exp_avg_sq += (1 - beta2) * (g * g - exp_avg_sq)
        denom       = sqrt(exp_avg_sq / (1 - beta2**t)) + eps
        param      -= lr * (exp_avg / (1 - beta1**t) / denom + weight_decay * param)

    Other rows stay bit for bit, or are brought up to date when they are read: see ``untouched``.

    A table without a gradient in a step is skipped and its t stays; a gradient without entries
    advances t. Tables are float32, float64, float16 or bfloat16; moments are float32 (float64 for
    float64 tables).

    Args:
        param_dict: name -> HashTable, ``torch.nn.Embedding(sparse=True)``,
            ``EmbeddingBag(sparse=True)`` or such a module's weight; may be empty.
        lr: learning rate, a float or a tensor with one element. A tensor on a GPU is never read by
            the host, so its range is not checked; a captured step follows it.
        beta1: decay rate of ``exp_avg``, in [0, 1).
        beta2: decay rate of ``exp_avg_sq``, in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: decoupled weight decay, at least 0.
        amsgrad: must be False; there for RecIS's signature.
        untouched: what a row gets for steps in which no batch touched it, by the time that it is
            read: "skip" (nothing), "decay" (the weight decay), or "dense" (all that
            torch.optim.AdamW does with a zero gradient). docs/untouched.md has the formulas. In
            the latter two, Embeddings are given as modules, and weights in memory may be behind
            until ``flush``.
        eps_mode: "torch" adds ε to √(exp_avg_sq / (1 - beta2^t)); "tf" to √exp_avg_sq, as
            torch.optim.SparseAdam, TensorFlow and RecIS's C++ do.
        bias_correction: "table" corrects bias by the table's t; "row" by the number of the row's
            own updates, as FBGEMM's ``use_rowwise_bias_correction``.
        maximize: go along the gradient instead of against it.

    Raises:
        ValueError: a setting is out of range, NaN or infinite, ``amsgrad`` is True, two names
            stand for one table, or settings do not go together: with "decay" and "dense" lr *
            weight_decay is below 1; with "dense" eps is above 0, beta1^2 below beta2, and bias
            is corrected by the table.
        TypeError: a value of ``param_dict`` is no table, or, unless ``untouched`` is "skip", has
            no place to bring rows up to date (a bare weight); the text names its key.

    Example::

        model = torch.nn.Embedding(1_000_000, 64, sparse=True)
        optimizer = SparseAdamW({"items": model}, lr=1e-3)
        model(torch.tensor([3, 7, 3])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    """

    def __init__(
        self,
        param_dict: Mapping[str, Any],
        lr: float | torch.Tensor = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        untouched: str = "skip",
        eps_mode: str = "torch",
        bias_correction: str = "table",
        maximize: bool = False,
    ) -> None:
        require_no_amsgrad(amsgrad)
        defaults = {
            "lr": lr,
            "betas": (beta1, beta2),
            "eps": eps,
            "weight_decay": weight_decay,
            "untouched": untouched,
            "eps_mode": eps_mode,
            "bias_correction": bias_correction,
            "maximize": maximize,
        }
        super().__init__(param_dict, defaults)

    def _prepare_updates(
        self, updates: list[Update], segments: functional.Segments
    ) -> Callable[[], list[RowReport]]:
        return functional.prepare_sparse_adamw(updates, segments)
