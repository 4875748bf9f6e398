"""Telling tables from dense parameters: among objects, and among the entries of a state_dict."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from .hash_table import SAVED, HashTable


def is_hashtable(obj: Any) -> bool:
    """Whether ``obj`` is a HashTable of this package, or one of RecIS (its ``HashtableImpl``)."""
    return isinstance(obj, HashTable) or hasattr(obj, "hashtable_tag")


def split_sparse_dense_state_dict(
    state_dict: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of HashTables, and the rest, to be saved apart.

    ``model.load_state_dict({**sparse, **dense})`` puts them together again. For an optimizer use
    ``filter_out_sparse_param(model)``: it returns the tables themselves.

    A table is known by ``<prefix>ids``, ``<prefix>embedding``, ``<prefix>seed`` and
    ``<prefix>fan`` standing together with their shapes, so also in a dict that was loaded, copied
    or merged. Whatever else begins with its prefix is the table's too. In a state_dict of RecIS,
    the tables are sparse. Weights of ``nn.Embedding(sparse=True)`` are dense here: nothing in a
    state_dict tells them from others.

    Args:
        state_dict: what ``model.state_dict()`` returns, or what ``torch.load`` made of it. It
            stays as it is, whereas RecIS takes the sparse entries out of it.

    Returns:
        (sparse, dense): new dicts in the order of ``state_dict``, each with its ``_metadata`` (the
        versions of modules) if it has that. Tensors are not copied.

    Raises:
        TypeError: ``state_dict`` is no dict, a module for instance.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict must be a dict, got {type(state_dict).__name__}; use model.state_dict()"
        )
    prefixes = tuple(prefix for prefix in _prefixes(state_dict) if _is_table(state_dict, prefix))
    sparse: OrderedDict[str, Any] = OrderedDict()
    dense: OrderedDict[str, Any] = OrderedDict()
    for key, value in state_dict.items():
        is_sparse = is_hashtable(value) or (isinstance(key, str) and key.startswith(prefixes))
        (sparse if is_sparse else dense)[key] = value
    if hasattr(state_dict, "_metadata"):
        for part in (sparse, dense):
            vars(part)["_metadata"] = state_dict._metadata
    return sparse, dense


def _prefixes(state_dict: Mapping[str, Any]) -> list[str]:
    """What stands before "ids", where that is the last part of a key."""
    return [
        key.removesuffix("ids")
        for key in state_dict
        if isinstance(key, str) and f".{key}".endswith(".ids")
    ]


def _is_table(state_dict: Mapping[str, Any], prefix: str) -> bool:
    entries: list[Any] = [state_dict.get(prefix + name) for name in SAVED]
    if not all(isinstance(entry, torch.Tensor) for entry in entries):
        return False
    ids, embedding, seed, fan = (entry.shape for entry in entries)
    return len(embedding) == 2 and ids == embedding[:1] and (seed, fan) == ((), (2,))
