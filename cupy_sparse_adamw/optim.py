"""SparseOptimizer and SparseAdamW: param groups, accumulation, state. No arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from . import functional
from ._checks import lr_error, require_betas, require_hyperparams, require_int, row_error
from ._types import Hyperparams, Pending, RowReport, Update
from .tables import Table, as_table, claim, num_claims, require_owned


class SparseOptimizer(torch.optim.Optimizer):
    """Base of optimizers that update only the rows that gradients name.

    It keeps what torch.optim.Optimizer promises (hooks, LR schedulers, closures, state_dict,
    deepcopy, pickle) for tables given by name, and RecIS's names: ``add_params``,
    ``set_grad_accum_steps``.

    With ``set_grad_accum_steps(n)`` an update happens at the n-th ``step()`` since the last update,
    and ``zero_grad()`` in between keeps the gradients. They are summed: scale the loss.

    Args:
        param_dict: name -> table; may be empty.
        defaults: ``lr``, ``betas``, ``eps``, ``weight_decay`` of groups that do not set them.
    """

    def __init__(self, param_dict: Mapping[str, Any], defaults: dict[str, Any]) -> None:
        if not isinstance(param_dict, Mapping):
            raise TypeError(
                f"param_dict must be a dict of name -> table, got {type(param_dict).__name__}; use "
                f"filter_out_sparse_param(model)"
            )
        require_hyperparams(defaults)
        self._tables: dict[str, Table] = {}
        self._grad_accum_steps = 1
        self._accumulated = 0  # micro-batches since the last update
        self._reports: list[RowReport] = []  # of updates whose rows are still being checked
        self._listed: tuple[Any, list[tuple[dict[str, Any], str, Table]]] | None = None
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
        _require_no_amsgrad(param_group.get("amsgrad", False))
        group = {**self.defaults, **param_group}
        beta1, beta2 = require_betas(group["betas"])
        group["betas"] = (group.pop("beta1", beta1), group.pop("beta2", beta2))
        require_hyperparams(group)
        tables = self._require_new_tables(param_group["params"])
        group["params"] = [table.key for table in tables.values()]
        self.param_groups.append(group)
        self._adopt(tables)

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
        tables = self._require_new_tables(params)
        self.param_groups[0]["params"] += [table.key for table in tables.values()]
        self._adopt(tables)

    def _require_new_tables(self, params: Mapping[str, Any]) -> dict[str, Table]:
        """The tables of a dict, none of which is known yet by name or identity."""
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
            tables[name] = table
        return tables

    def _adopt(self, tables: dict[str, Table]) -> None:
        for table in tables.values():
            table.drop_moments()
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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every table that has a gradient, or count a micro-batch.

        Everything is checked before anything is written: after one of the exceptions below,
        weights, moments and counters of all tables are what they were. Ctrl-C during the update is
        held back until it is done. (docs/reliability.md says what running out of memory may leave.)

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
        self._update(last=self._accumulated + 1 >= self._grad_accum_steps)
        return loss

    @torch.compiler.disable  # the update is no tensor program
    def _update(self, last: bool) -> None:
        settings = {id(group): require_hyperparams(group) for group in self.param_groups}
        tables, grads, hypers = [], [], []
        for group, name, table in self._named_tables():
            pending = table.pending(name)
            if pending is not None:
                tables.append(table)
                grads.append(pending)
                hypers.append(settings[id(group)])
        if any(
            functional.is_capturing(device)
            for device in {pending.param.device for pending in grads}
        ):
            self._require_capturable(tables, grads, hypers)
        if not last:
            self._accumulated += 1
            return
        states = []
        for table, pending in zip(tables, grads, strict=True):
            state = self.state[table.key]
            step = state.get("step")
            if (
                step is None
                or step.device != pending.param.device
                or step.dtype is not torch.int64  # put there by hand; engines read int64
            ):
                self._put_on_device(state, pending.param.device)
            pending.fault = state["row_fault"]
            states.append(state)
        segments = functional.segment(grads)
        updates = [
            Update(pending, *table.moments(pending, state), state["step"], hyper)
            for table, pending, state, hyper in zip(tables, grads, states, hypers, strict=True)
        ]
        with functional.uninterrupted():
            self._reports += self._apply_updates(updates, segments)
            self._accumulated = 0

    def _apply_updates(
        self, updates: list[Update], segments: functional.Segments
    ) -> list[RowReport]:
        """The update rule: writes weights and moments of the rows in ``segments``."""
        raise NotImplementedError

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
        return self._export_state()

    def _export_state(self, *, moments: bool = True) -> dict[str, Any]:
        """``state_dict``, or all of it but moments: a checkpoint has them beside the rows."""
        self._raise_faults()
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        states: dict[str, Any] = {}
        grads: dict[str, Any] = {}
        for _, name, table in self._named_tables():
            state = self.state.get(table.key, {})
            if step := int(state.get("step", 0)):
                states[name] = {"step": step, **(table.export_moments(state) if moments else {})}
            if self._accumulated:
                grads[name] = table.export_pending(name)
        result = {
            "state": states,
            "param_groups": [
                {**group, "params": names}
                for group, names in zip(self.param_groups, self._names_by_group(), strict=True)
            ],
            "accumulation": {
                "grad_accum_steps": self._grad_accum_steps,
                "accumulated": self._accumulated,
                "grads": grads,
            },
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, result)
            result = result if replaced is None else replaced
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned. Load the model's own state first.

        Raises:
            TypeError, ValueError: something does not fit; then nothing has been changed.
        """
        self._build_state(state_dict)()

    def _build_state(
        self, state_dict: Mapping[str, Any], built: Mapping[str, Any] | None = None
    ) -> Callable[[], None]:
        """What ``load_state_dict`` checks and builds; calling the result puts it in place.

        Args:
            state_dict: see ``state_dict``.
            built: the moments of each table in it, as ``build_moments`` makes them, where a
                checkpoint has them beside the rows.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        groups = self._require_groups(state_dict)
        accumulation = _require_dict("accumulation", state_dict.get("accumulation", {}))
        steps = require_int("grad_accum_steps", accumulation.get("grad_accum_steps", 1), 1)
        accumulated = require_int("accumulated", accumulation.get("accumulated", 0), 0)
        saved_states = _require_dict("state", state_dict["state"])
        saved_grads = _require_dict("grads", accumulation.get("grads", {}))
        for name in (*saved_states, *saved_grads):
            if name not in self._tables:
                raise ValueError(
                    f"the saved state has a table {name!r} that this optimizer has not"
                )
        states: dict[str, dict[str, Any]] = {}
        moments, grads = {}, {}
        for name, table in self._tables.items():
            if name in saved_states:
                count = _require_step(name, saved_states[name])
                self._put_on_device(states.setdefault(name, {}), table.device, count)
                moments[name] = (
                    table.build_moments(name, saved_states[name]) if built is None else built[name]
                )
            if accumulated:
                grads[name] = table.build_pending(name, saved_grads.get(name, []))

        def install() -> None:
            had_pending = self._accumulated > 0
            self.param_groups[:] = groups
            self._grad_accum_steps, self._accumulated = steps, accumulated
            self.state.clear()
            self._reports.clear()
            for name, table in self._tables.items():
                state = states.get(name, {})
                if state:
                    self.state[table.key] = state
                table.install_moments(state, moments.get(name))
                if accumulated:
                    table.install_pending(grads[name])
                elif had_pending:  # its micro-batches belong to the state that is replaced
                    table.clear_pending()
            for post_hook in self._optimizer_load_state_dict_post_hooks.values():
                post_hook(self)

        return install

    def _require_groups(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """The param groups with saved settings; they must hold the same tables as saved."""
        for key in ("state", "param_groups"):
            if key not in state_dict:
                raise ValueError(f"the saved state has no {key!r}; is it SparseAdamW's state_dict?")
        saved_groups = state_dict["param_groups"]
        names_here = self._names_by_group()
        if not all(isinstance(group, Mapping) and "params" in group for group in saved_groups):
            raise ValueError("every saved param group must be a dict with the names in 'params'")
        names_saved = [list(group["params"]) for group in saved_groups]
        here, saved = (
            {name for names in groups for name in names} for groups in (names_here, names_saved)
        )
        if saved - here:
            raise ValueError(
                f"the saved state has tables that this optimizer has not: {sorted(saved - here)}"
            )
        if here - saved:
            raise ValueError(
                f"the saved state lacks tables that this optimizer has: {sorted(here - saved)}"
            )
        if [sorted(names) for names in names_here] != [sorted(names) for names in names_saved]:
            raise ValueError(
                f"the saved param groups hold {names_saved}, this optimizer's {names_here}; make "
                f"the same groups before loading"
            )
        groups = []
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            merged = {**copy.deepcopy(saved_group), "params": group["params"]}
            for key in ("lr", "betas", "eps", "weight_decay"):
                if key not in merged:
                    raise ValueError(f"a saved param group has no {key!r}")
            require_hyperparams(merged)
            _require_no_amsgrad(merged.get("amsgrad", False))
            merged["betas"] = tuple(merged["betas"])
            groups.append(merged)
        return groups

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
        self._listed = None
        for name, saved in grads.items():
            self._tables[name].install_pending(self._tables[name].build_pending(name, saved))
        for table in self._tables.values():
            claim(table, self)  # the copies' owner is the copy


def _require_dict(key: str, saved: Any) -> Mapping[str, Any]:
    if not isinstance(saved, Mapping):
        raise ValueError(f"the saved {key!r} must be a dict, got {type(saved).__name__}")
    return saved


def _require_no_amsgrad(amsgrad: Any) -> None:
    if amsgrad:
        raise ValueError("amsgrad must be False: SparseAdamW has no amsgrad variant")


def _require_step(name: str, saved: Any) -> int:
    if not isinstance(saved, Mapping):
        raise ValueError(f"table {name!r}: its saved state must be a dict, got {saved!r}")
    step = saved.get("step")
    if isinstance(step, torch.Tensor) and step.numel() == 1 and step == step.floor():
        step = int(step)
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise ValueError(
            f"table {name!r}: the saved step must be an int of at least 1, got {step!r}"
        )
    return step


class SparseAdamW(SparseOptimizer):
    r"""AdamW for tables of which a batch touches few rows. Other rows stay bit for bit.

    For every row r with gradients, g their sum in this step, t the number of the table's updates,
    elementwise (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, algorithm 2,
    as torch.optim.AdamW)::

        exp_avg    += (1 - beta1) * (g - exp_avg)
        exp_avg_sq += (1 - beta2) * (g * g - exp_avg_sq)
        denom       = sqrt(exp_avg_sq / (1 - beta2**t)) + eps
        param      -= lr * (exp_avg / (1 - beta1**t) / denom + weight_decay * param)

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

    Raises:
        ValueError: a setting is out of range, NaN or infinite, ``amsgrad`` is True, or two names
            stand for one table.
        TypeError: a value of ``param_dict`` is no table; the text names its key.

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
    ) -> None:
        _require_no_amsgrad(amsgrad)
        defaults = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
        super().__init__(param_dict, defaults)

    def _apply_updates(
        self, updates: list[Update], segments: functional.Segments
    ) -> list[RowReport]:
        return functional.sparse_adamw_(updates, segments)
