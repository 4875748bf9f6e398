"""A model of CUDA graph capture: what a capture records, ``replay`` runs again on the same memory.

Kernels and in-place torch operations are recorded, not run, as under CUDA. An operation that makes
a tensor has to run once to make it; a replay computes it anew and copies the result there. Not
modelled: the private memory pool, whose blocks later operations of the graph use again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_current: list[Graph] = []

# They wait for the device to read a result, which a capture cannot.
SYNCHRONIZING = frozenset((
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero",
    "aten::_unique2", "aten::unique_consecutive", "aten::masked_select", "aten::bincount",
    "aten::_coalesce", "aten::repeat_interleave",
))  # fmt: skip


def current() -> Graph | None:
    """The graph that is being captured."""
    return _current[-1] if _current else None


class Graph:
    """What was captured."""

    def __init__(self) -> None:
        self._actions: list[Callable[[], object]] = []
        self._kept: list[object] = []  # the arguments' memory stays where the kernels expect it

    def record(self, action: Callable[[], object], keep: object) -> None:
        self._actions.append(action)
        self._kept.append(keep)

    def replay(self) -> None:
        for action in self._actions:
            action()


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if schema.name in SYNCHRONIZING:
            raise RuntimeError(f"{schema.name} within a capture: CUDA cannot capture it")
        if schema.is_mutable:
            self.graph.record(lambda: func(*args, **kwargs), keep=(args, kwargs))
            return _written(schema, args, kwargs)
        made = func(*args, **kwargs)
        is_view = any(result.alias_info is not None for result in schema.returns)
        if not is_view and not schema.name.startswith(("aten::empty", "aten::new_empty")):

            def again() -> None:
                for old, new in zip(
                    tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True
                ):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)

            self.graph.record(again, keep=made)
        return made


def _written(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a mutating operation returns: those of its arguments that it writes to."""
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)}
    given.update(kwargs)
    by_alias = {
        frozenset(argument.alias_info.before_set): given[argument.name]
        for argument in schema.arguments
        if argument.alias_info is not None and argument.name in given
    }
    if any(result.alias_info is None for result in schema.returns):
        raise NotImplementedError(f"{schema.name} cannot be captured here: it also makes a tensor")
    results = [by_alias[frozenset(result.alias_info.before_set)] for result in schema.returns]
    return tuple(results) if len(results) > 1 else (results[0] if results else None)


@contextlib.contextmanager
def capture() -> Iterator[Graph]:
    """Within the block, kernels and torch operations are recorded into the graph."""
    graph = Graph()
    _current.append(graph)
    try:
        with _Recorder(graph):
            yield graph
    finally:
        _current.pop()
