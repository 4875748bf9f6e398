"""Hooks that decide which ids a HashTable takes in and which it lets go, under RecIS's names.

An ``AdmitHook`` or ``FilterHook`` names a policy and its parameters; a table makes the policy
(``BaseAdmitHookImpl``, ``BaseFilterHookImpl``) and keeps it as a submodule, so that its buffers are
part of the table's ``state_dict``. Policies are registered by name: those of this package in
policies.py, users' own through ``HashtableHookFactory``.
"""

from __future__ import annotations

import inspect
import json
import logging
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from ._checks import require_int

logger = logging.getLogger("cupy_sparse_adamw")


class BaseHook:
    """The name of a policy, and what it is made with.

    Args:
        name: as registered.
        params: keyword arguments of the policy.

    Raises:
        TypeError: name is no string, or params are no dict.
    """

    #: "admit" or "filter".
    type = ""

    def __init__(self, name: str, params: Mapping[str, Any] | None = None) -> None:
        if not isinstance(name, str):
            raise TypeError(f"a hook's name must be a string, got {name!r}")
        if params is not None and not isinstance(params, Mapping):
            raise TypeError(f"a hook's params must be a dict, got {params!r}")
        self._name = name
        self._params = dict(params or {})

    @property
    def name(self) -> str:
        """The policy's name."""
        return self._name

    @property
    def params(self) -> dict[str, Any]:
        """The policy's keyword arguments."""
        return self._params

    def __str__(self) -> str:
        return json.dumps({"name": self._name, "params": self._params}, sort_keys=True)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r}, {self._params!r})"


class AdmitHook(BaseHook):
    """What a lookup in training mode does with ids that are not in the table.

    ``"ReadOnly"``: they read as zeros and get no row. ``"Frequency"`` with
    ``{"min_frequency": k}``: so do ids until they have been seen k times. See policies.py for all
    parameters.
    """

    type = "admit"


class FilterHook(BaseHook):
    """Which rows of a table go.

    ``"GlobalStepFilter"`` with ``{"filter_step": n}``: those not looked up for more than n steps,
    when ``HashTableFilterHook`` says so. ``"LRU"`` and ``"LFU"`` with ``{"max_rows": n}``: the
    least recently, or least frequently, used ones, when a new id finds the table full. See
    policies.py for all parameters.
    """

    type = "filter"


class BaseAdmitHookImpl(torch.nn.Module):
    """A policy that admits ids. Subclass it, and register the class with ``regist_admit``.

    Buffers that it registers are saved with the table. A policy that keeps some belongs into the
    table's constructor, or a ``state_dict`` may be loaded before it is there.
    """

    def __init__(self, **params: Any) -> None:
        super().__init__()
        if params:
            raise TypeError(f"{type(self).__name__} takes no parameters {sorted(params)}")

    def admit(self, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Whether ids get a row; asked once for each lookup that meets ids without one.

        Args:
            ids: [n] int64, distinct, none of them in the table.
            counts: [n] int64, how often each occurs in the lookup.

        Returns:
            [n] bool. An id that is not admitted reads as zeros, and its gradient is dropped.
        """
        raise NotImplementedError(f"{type(self).__name__} must define admit()")

    def take_back(self) -> None:
        """The lookup has failed, maybe in ``admit``: forget what that counted."""

    def settle(self) -> None:
        """The lookup is done: nothing will be taken back."""


class BaseFilterHookImpl(torch.nn.Module):
    """A policy that lets rows go. Subclass it, and register the class with ``regist_filter``.

    Attributes:
        _ht: the table; ``append_filter_slot`` gives it a value for each row, which is saved with
            it, and ``update_slot`` and ``get_slot`` write and read that.
        _name: the slot's name.
    """

    _ht: Any

    def __init__(self, ht: Any, name: str | None = None, **params: Any) -> None:
        super().__init__()
        if params:
            raise TypeError(f"{type(self).__name__} takes no parameters {sorted(params)}")
        self.__dict__["_ht"] = ht  # not a submodule: the table contains this
        self._name = name
        HashtableHookFactory().note(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        HashtableHookFactory().note(self)

    def forward(self, index: torch.Tensor) -> None:
        """``update``, as in RecIS."""
        self.update(index)

    def update(self, index: torch.Tensor) -> None:
        """Rows [N] int64 have been looked up in training mode, or inserted.

        They may repeat; -1 stands for an id that has no row. If this raises, so does the lookup,
        and what was written to slots and buffers is undone: these rows' values, and all buffers,
        are copied before. So keep what is large in a slot.
        """

    def update_step(self, step_size: int = 1) -> None:
        """So many training steps are over."""

    def filter(self, ids: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the table's ids [n] int64, with rows ``index`` [n], shall go: the same of them.

        Asked by ``do_filter``.
        """
        return ids[:0], index[:0]

    def make_room(self, count: int, keep: torch.Tensor) -> None:
        """So many new ids are about to get rows: the time to delete others, but rows ``keep`` [N].

        Raises:
            RuntimeError: they cannot get any.
        """

    def makes_room(self) -> bool:
        """Whether ``make_room`` is to be called: each lookup then waits for the device."""
        return type(self).make_room is not BaseFilterHookImpl.make_room

    def do_filter(self) -> None:
        """Delete what ``filter`` says, except rows that a gradient waits for or may come for."""
        with self._ht.lock:
            ids, index = self._ht.ids_map()
            delete_ids, delete_index = self.filter(ids, index)
            free = ~are_among(delete_index, self._ht.pending_rows())
            self._ht.delete(delete_ids[free])
            self.after_filter(ids, delete_ids[free])

    def after_filter(self, ids: torch.Tensor, delete_ids: torch.Tensor) -> None:
        """Called with the ids that were there, and those that went."""
        logger.info(
            "%s of table %r deleted %d of %d ids",
            type(self).__name__,
            self._ht.name,
            delete_ids.numel(),
            ids.numel(),
        )


def are_among(rows: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Which of rows [n] are among ``held`` [m], all at least 0, as [n] bool. Waits for the device.

    By a mask over row numbers: some thirty times as fast as ``torch.isin``, which sorts.
    """
    if not rows.numel() or not held.numel():
        return torch.zeros_like(rows, dtype=torch.bool)
    mask = torch.zeros(int(torch.maximum(rows.max(), held.max())) + 1, dtype=torch.bool)
    mask = mask.to(rows.device)
    mask[held] = True
    return mask[rows]


def require_mask(policy: torch.nn.Module, mask: Any, size: int) -> torch.Tensor:
    """A policy's answer as a bool tensor [size], or TypeError."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or list(mask.shape) != [size]:
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, torch.Tensor) else repr(mask)
        raise TypeError(
            f"{type(policy).__name__}.admit must return a bool tensor of shape {[size]}, got {got}"
        )
    return mask


class HashtableHookFactory:
    """The policies that are registered, and the filters of all tables there are.

    There is one for the process: every ``HashtableHookFactory()`` shares what is in it.
    """

    _filters: ClassVar[dict[str, type[BaseFilterHookImpl]]] = {}
    _admits: ClassVar[dict[str, type[BaseAdmitHookImpl]]] = {}
    _live: ClassVar[weakref.WeakSet[BaseFilterHookImpl]] = weakref.WeakSet()

    def regist_filter(self, name: str, filter_hook_impl: type[BaseFilterHookImpl]) -> None:
        """Let ``FilterHook(name, params)`` mean ``filter_hook_impl(table, **params)``.

        Raises:
            TypeError: it is no subclass of BaseFilterHookImpl.
            ValueError: the name is taken.
        """
        _register(self._filters, name, filter_hook_impl, BaseFilterHookImpl)

    def regist_admit(self, name: str, admit_hook_impl: type[BaseAdmitHookImpl]) -> None:
        """Let ``AdmitHook(name, params)`` mean ``admit_hook_impl(**params)``.

        Raises:
            TypeError: it is no subclass of BaseAdmitHookImpl.
            ValueError: the name is taken.
        """
        _register(self._admits, name, admit_hook_impl, BaseAdmitHookImpl)

    def create_filter_hook(self, ht: Any, hook: FilterHook) -> BaseFilterHookImpl:
        """The policy for a table. Tables call this themselves.

        Raises:
            TypeError: it is no FilterHook, or the policy has no such parameter.
            ValueError: no policy has that name.
        """
        policy: BaseFilterHookImpl = _policy_of(self._filters, FilterHook, hook, ht)
        return policy

    def create_admit_hook(self, hook: AdmitHook) -> BaseAdmitHookImpl:
        """The policy of a hook. Tables call this themselves.

        Raises:
            TypeError: it is no AdmitHook, or the policy has no such parameter.
            ValueError: no policy has that name.
        """
        policy: BaseAdmitHookImpl = _policy_of(self._admits, AdmitHook, hook)
        return policy

    def get_filters(self) -> dict[str, dict[Any, BaseFilterHookImpl]]:
        """The filters of all tables that live, by the policy's name and by table."""
        return {
            name: {impl._ht: impl for impl in self.filters() if type(impl) is policy}
            for name, policy in self._filters.items()
        }

    def note(self, impl: BaseFilterHookImpl) -> None:
        """Let ``filters`` know of a table's policy, as long as it lives."""
        self._live.add(impl)

    def filters(self) -> list[BaseFilterHookImpl]:
        """The filters of all tables that live."""
        while True:
            try:
                return list(self._live)
            except RuntimeError:  # another thread made a table meanwhile
                continue


def _register(registry: dict[str, Any], name: str, policy: Any, base: type) -> None:
    if not (isinstance(policy, type) and issubclass(policy, base)):
        raise TypeError(f"policy {name!r} must be a subclass of {base.__name__}, got {policy!r}")
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"a policy's name must be a string without dots, got {name!r}")
    if name in registry:
        raise ValueError(f"a hook named {name!r} is registered already: {registry[name].__name__}")
    registry[name] = policy


def _policy_of(registry: dict[str, Any], kind: type[BaseHook], hook: Any, *args: Any) -> Any:
    """The policy that a hook names, made with ``args`` and the hook's params."""
    if not isinstance(hook, kind):
        raise TypeError(
            f"{kind.type}_hook must be a hook such as {kind.__name__}({next(iter(registry))!r}), "
            f"got {type(hook).__name__}"
        )
    if hook.name not in registry:
        raise ValueError(
            f"{kind.type}_hook must be one of {', '.join(map(repr, registry))}, got "
            f"{hook.name!r}; HashtableHookFactory().regist_{kind.type} adds your own"
        )
    policy = registry[hook.name]
    try:
        inspect.signature(policy).bind(*args, **hook.params)
    except TypeError as error:
        known = list(inspect.signature(policy).parameters)[len(args) :]
        raise TypeError(
            f"{kind.type}_hook {hook}: {error}; {policy.__name__} takes {', '.join(known)}"
        ) from None
    return policy(*args, **hook.params)


class HashTableFilterHook:
    """Lets tables filter their rows every so many steps.

    Call ``after_step`` at the end of each training step::

        filters = HashTableFilterHook(filter_interval=200)
        for step, batch in enumerate(batches):
            ...
            filters.after_step(None, step)

    Args:
        filter_interval: steps between two filterings; None: never.
        model: whose tables; None: all tables of the process, as in RecIS.

    Raises:
        TypeError, ValueError: filter_interval is no int of at least 1.
    """

    def __init__(
        self, filter_interval: int | None = 100, model: torch.nn.Module | None = None
    ) -> None:
        self.reset_filter_interval(filter_interval)
        self.last_filter_step = 0
        self._model = model

    def state_dict(self) -> dict[str, int]:
        """The step of the last filtering: with it a resume filters at the same steps."""
        return {"last_filter_step": self.last_filter_step}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            TypeError, ValueError: it has no int ``last_filter_step``.
        """
        self.last_filter_step = require_int(
            "last_filter_step", state_dict.get("last_filter_step"), -(2**63)
        )

    def reset_filter_interval(self, interval: int | None = 100) -> None:
        """Filter every so many steps from now on."""
        if interval is not None:
            require_int("filter_interval", interval, 1)
        self.filter_interval = interval

    def after_step(self, _: Any, gstep: int | torch.Tensor) -> None:
        """Count a step in every filter, and let them filter if it is time.

        Args:
            _: unused; RecIS's trainer hands over its metrics.
            gstep: the number of the step, counted from where you like.
        """
        gstep = int(gstep)
        if self.last_filter_step == 0:
            self.last_filter_step = gstep
        due = (
            self.filter_interval is not None
            and gstep - self.last_filter_step >= self.filter_interval
        )
        policies: Iterable[Any] = HashtableHookFactory().filters()
        if self._model is not None:
            policies = filter(lambda x: isinstance(x, BaseFilterHookImpl), self._model.modules())
        for policy in policies:
            with policy._ht.lock:
                policy.update_step()
            if due:
                policy.do_filter()
        if due:
            self.last_filter_step = gstep
