"""What an optimizer's state is, and what must hold of one that is loaded. No arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ._checks import require_hyperparams, require_int
from .missed_steps import MissedSteps

#: Settings that an optimizer's defaults, or a saved param group, may lack.
DEFAULTS: Mapping[str, Any] = {
    "untouched": "skip",
    "bias_correction": "table",
    "eps_mode": "torch",
    "maximize": False,
}


def export_state(optimizer: Any, *, moments: bool = True) -> dict[str, Any]:
    """``state_dict``, or all of it but moments: a checkpoint has them beside the rows."""
    optimizer._raise_faults()
    for hook in optimizer._optimizer_state_dict_pre_hooks.values():
        hook(optimizer)
    if moments:
        optimizer.flush()
    states: dict[str, Any] = {}
    grads: dict[str, Any] = {}
    logs: dict[int, tuple[int, MissedSteps]] = {}
    for _, name, table in optimizer._named_tables():
        state = optimizer.state.get(table.key, {})
        if step := int(state.get("step", 0)):
            states[name] = {"step": step, **(table.export_moments(state) if moments else {})}
            if (log := table.missed) is not None and not moments:
                states[name]["missed"] = logs.setdefault(id(log), (len(logs), log))[0]
        if optimizer._accumulated:
            grads[name] = table.export_pending(name)
    result = {
        "state": states,
        "param_groups": [
            {**group, "params": names}
            for group, names in zip(
                optimizer.param_groups, optimizer._names_by_group(), strict=True
            )
        ],
        "accumulation": {
            "grad_accum_steps": optimizer._grad_accum_steps,
            "accumulated": optimizer._accumulated,
            "grads": grads,
        },
    }
    if not moments:  # rows are saved as they are, behind or not
        result["missed_steps"] = [log.export() for _, log in logs.values()]
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        replaced = post_hook(optimizer, result)
        result = result if replaced is None else replaced
    return result


def build_state(
    optimizer: Any, state_dict: Mapping[str, Any], built: Mapping[str, Any] | None = None
) -> Callable[[], None]:
    """What ``load_state_dict`` checks and builds; calling the result puts it in place.

    Args:
        optimizer: the ``SparseOptimizer``.
        state_dict: see ``state_dict``.
        built: the moments of each table in it, as ``build_moments`` makes them, where a
            checkpoint has them beside the rows.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
    state_dict = dict(state_dict)
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = hook(optimizer, state_dict)
        state_dict = state_dict if replaced is None else replaced
    groups = _require_groups(optimizer, state_dict)
    accumulation = _require_dict("accumulation", state_dict.get("accumulation", {}))
    steps = require_int("grad_accum_steps", accumulation.get("grad_accum_steps", 1), 1)
    accumulated = require_int("accumulated", accumulation.get("accumulated", 0), 0)
    saved_states = _require_dict("state", state_dict["state"])
    saved_grads = _require_dict("grads", accumulation.get("grads", {}))
    for name in (*saved_states, *saved_grads):
        if name not in optimizer._tables:
            raise ValueError(f"the saved state has a table {name!r} that this optimizer has not")
    states: dict[str, dict[str, Any]] = {}
    moments, grads = {}, {}
    logs = _build_logs(optimizer, state_dict, apart=built is not None)
    for name, table in optimizer._tables.items():
        if name in saved_states:
            count = _require_step(name, saved_states[name])
            optimizer._put_on_device(states.setdefault(name, {}), table.device, count)
            moments[name] = (
                table.build_moments(name, saved_states[name]) if built is None else built[name]
            )
            if built is None and name in logs:
                moments[name]["last_step"] = table.new_last_step(count)
        if accumulated:
            grads[name] = table.build_pending(name, saved_grads.get(name, []))

    def install() -> None:
        had_pending = optimizer._accumulated > 0
        optimizer.param_groups[:] = groups
        optimizer._grad_accum_steps, optimizer._accumulated = steps, accumulated
        optimizer.state.clear()
        optimizer._reports.clear()
        optimizer._checked.clear()
        for name, table in optimizer._tables.items():
            state = states.get(name, {})
            if state:
                optimizer.state[table.key] = state
            table.install_moments(state, moments.get(name))
            if name in logs:
                table.begin_to_miss(state, logs[name], as_saved=True)
            if accumulated:
                table.install_pending(grads[name])
            elif had_pending:  # its micro-batches belong to the state that is replaced
                table.clear_pending()
        for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
            post_hook(optimizer)

    return install


def _build_logs(optimizer: Any, state_dict: dict[str, Any], apart: bool) -> dict[str, MissedSteps]:
    """What rows of each table have missed: nothing, unless a checkpoint has them ``apart``."""
    logs: dict[str, MissedSteps] = {}
    shared: dict[tuple[Any, ...], MissedSteps] = {}
    for name, saved in state_dict["state"].items():
        table = optimizer._tables[name]
        if table.untouched == "skip":
            continue
        dense, t = table.untouched == "dense", _require_step(name, saved)
        which = saved["missed"] if apart else None
        key = (which, dense, t)
        if key not in shared:
            shared[key] = (
                MissedSteps(dense, t)
                if which is None
                else MissedSteps.replayed(state_dict["missed_steps"][which])
            )
        log = logs[name] = shared[key]
        if (log.dense, log.t) != (dense, t):
            raise ValueError(
                f"table {name!r}: its saved log ends at step {log.t} (dense: {log.dense}), the "
                f"table is at step {t} (dense: {dense})"
            )
    return logs


def _require_groups(optimizer: Any, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    """The param groups with saved settings; they must hold the same tables as saved."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"the saved state has no {key!r}; is it SparseAdamW's state_dict?")
    saved_groups = state_dict["param_groups"]
    names_here = optimizer._names_by_group()
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
    for group, saved_group in zip(optimizer.param_groups, saved_groups, strict=True):
        # What was saved before there was such a setting had the default.
        merged = {**DEFAULTS, **copy.deepcopy(saved_group), "params": group["params"]}
        for key in ("lr", "betas", "eps", "weight_decay"):
            if key not in merged:
                raise ValueError(f"a saved param group has no {key!r}")
        require_hyperparams(merged)
        require_no_amsgrad(merged.get("amsgrad", False))
        for key in ("untouched", "bias_correction"):
            if merged[key] != group[key]:
                raise ValueError(
                    f"the saved state was made with {key}={merged[key]!r}, this optimizer "
                    f"with {key}={group[key]!r}; make it alike, or change the saved "
                    f"param_groups to go on otherwise"
                )
        merged["betas"] = tuple(merged["betas"])
        groups.append(merged)
    return groups


def _require_dict(key: str, saved: Any) -> Mapping[str, Any]:
    if not isinstance(saved, Mapping):
        raise ValueError(f"the saved {key!r} must be a dict, got {type(saved).__name__}")
    return saved


def require_no_amsgrad(amsgrad: Any) -> None:
    """Raise ValueError if somebody asks for it."""
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
