"""What a module's state_dict has beside rows of tables, whose weights references stand for."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from ..embedding_table import EmbeddingTable
from ..tables import rows_apart
from .dense import place_of
from .plain_state import Reference
from .tables import TableRows


def state_of(module: torch.nn.Module, tables: Mapping[str, TableRows]) -> dict[str, Any]:
    """What ``module.state_dict()`` has beside rows of tables; references stand for weights."""
    weights = {
        place: name
        for name, rows in tables.items()
        if isinstance(rows.table, EmbeddingTable) and (place := place_of(rows.table.weight))
    }
    with rows_apart():
        saved = module.state_dict()
    values = OrderedDict(
        (key, Reference(weights[place]) if (place := place_of(value)) in weights else value)
        for key, value in saved.items()
    )
    metadata = {key: dict(value) for key, value in getattr(saved, "_metadata", {}).items()}
    return {"values": values, "metadata": metadata}


def with_weights(
    state: dict[str, Any], tables: Mapping[str, TableRows], copied: bool = False
) -> OrderedDict[str, Any]:
    """What ``load_state_dict`` takes; weights of tables stand for themselves, to be left alone."""
    values: OrderedDict[str, Any] = OrderedDict()
    for key, value in state["values"].items():
        if isinstance(value, Reference):
            values[key] = tables[value.name].table.key
        else:
            values[key] = _copy(value) if copied else value
    vars(values)["_metadata"] = state["metadata"]
    return values


def _copy(value: Any) -> Any:
    # deepcopy of a view would copy all that it is a view of
    return value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def require_tied(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise ValueError if a key is a table's weight in one of two states, and not in the other."""

    def of(state: dict[str, Any], key: str) -> str | None:
        value = state["values"][key]
        return value.name if isinstance(value, Reference) else None

    for key in saved["values"].keys() & here["values"].keys():
        there, now = of(saved, key), of(here, key)
        if there != now:
            raise ValueError(
                f"{key} is the weight of table {now!r}, but in the checkpoint of table {there!r} "
                f"(None: of no table); tie weights, and choose sparse=True, as when it was saved"
            )
