"""Nested plain state (a ``state_dict``, say) as JSON, its tensors apart.

Numbers, strings, bools, None and lists are themselves. Other things are an object of one key that
says what they are: ``{"tuple": [...]}``, ``{"dict": [[key, value], ...]}``, ``{"tensor": n}``.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import torch

#: The dicts that come back as what they were: MultiStepLR keeps a Counter.
_DICTS: dict[str, Any] = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "Counter": collections.Counter,
}
ACCEPTED = (
    "tensors, numbers, strings, bools, None, lists, tuples, and dicts whose keys are strings or "
    "ints"
)


class Reference:
    """Stands in a state for something that is kept elsewhere, under a name."""

    def __init__(self, name: str) -> None:
        self.name = name


def pack(value: Any, path: str, keep: Callable[[str, torch.Tensor], int]) -> Any:
    """A state as JSON.

    Args:
        value: the state.
        path: what to call it in error texts.
        keep: called with the path and each tensor; returns the number that stands for it.

    Raises:
        TypeError: it holds something that is not plain; the text says where.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):  # NumPy's float64 too
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, torch.Tensor):
        return {"tensor": keep(path, value)}
    if isinstance(value, Reference):
        return {"reference": value.name}
    if type(value) is list:
        return [pack(x, f"{path}[{i}]", keep) for i, x in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [pack(x, f"{path}[{i}]", keep) for i, x in enumerate(value)]}
    for kind, cls in _DICTS.items():
        if type(value) is cls:
            pairs = []
            for key, x in value.items():
                if type(key) not in (str, int):
                    raise TypeError(f"{path} has a key {key!r}; a checkpoint takes {ACCEPTED}")
                pairs.append([key, pack(x, f"{path}[{key!r}]", keep)])
            return {kind: pairs}
    raise TypeError(
        f"{path} is a {type(value).__name__}; a checkpoint takes {ACCEPTED}; "
        f"use torch.from_numpy for an array, dict(...) for another mapping"
    )


def unpack(
    packed: Any, tensor: Callable[[int], torch.Tensor], reference: Callable[[str], Any]
) -> Any:
    """The state that ``pack`` was given.

    Args:
        packed: what ``pack`` returned.
        tensor: called with a tensor's number; returns it.
        reference: called with a ``Reference``'s name; returns what takes its place.

    Raises:
        ValueError: ``pack`` returns no such thing.
    """
    if packed is None or type(packed) in (bool, int, float, str):
        return packed
    if type(packed) is list:
        return [unpack(x, tensor, reference) for x in packed]
    if type(packed) is dict and len(packed) == 1:
        ((kind, content),) = packed.items()
        if kind == "tensor" and type(content) is int and content >= 0:
            return tensor(content)
        if kind == "reference" and type(content) is str:
            return reference(content)
        if kind == "float" and content in ("nan", "inf", "-inf"):
            return float(content)
        if kind == "tuple" and type(content) is list:
            return tuple(unpack(x, tensor, reference) for x in content)
        if kind in _DICTS and type(content) is list:
            result = _DICTS[kind]()
            for pair in content:
                if type(pair) is not list or len(pair) != 2 or type(pair[0]) not in (str, int):
                    raise ValueError(f"a {kind} has an entry {pair!r:.80}")
                result[pair[0]] = unpack(pair[1], tensor, reference)
            return result
    raise ValueError(f"{packed!r:.80} is no plain state")
