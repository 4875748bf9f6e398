"""What makes an embedding module read rows that are up to date: hooks around its forward."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from . import functional
from ._types import MISSING, Lagging
from .embedding_table import EmbeddingTable
from .tables import bring_up_to_date, rows_are_apart

_ATTRIBUTE = "_sparse_adamw_hooks"


def require_no_max_norm(who: str, module: Any, untouched: str) -> None:
    """Raise ValueError if reading a row rescales it, whatever it has missed."""
    if module.max_norm is not None:
        raise ValueError(
            f"{who}: max_norm rescales rows whenever they are read, which untouched="
            f"{untouched!r} cannot make up for; use max_norm=None or untouched='skip'"
        )


class _ReadInstead(torch.autograd.Function):
    """Other values for an output, whose gradient goes the way that the output's would."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, values: torch.Tensor) -> Any:
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


class EmbeddingHooks:
    """The hooks of one ``torch.nn.Embedding`` or ``EmbeddingBag``.

    In training mode the rows that a batch reads are brought up to date in place before it reads
    them. In eval mode nothing is written: the output is made anew from what the rows would be.
    ``state_dict`` and ``load_state_dict`` of the module bring all rows up to date first.

    Attributes:
        table: whose rows they are; None once it needs no hooks any more.
    """

    table: EmbeddingTable | None

    def __init__(self, module: torch.nn.Module, table: EmbeddingTable) -> None:
        self.table = table
        module.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        module.register_forward_hook(self._after_forward, with_kwargs=True, prepend=True)
        module.register_state_dict_pre_hook(self._before_state_dict)
        module._register_load_state_dict_pre_hook(self._before_load)
        setattr(module, _ATTRIBUTE, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingHooks:
        copied = EmbeddingHooks.__new__(EmbeddingHooks)
        memo[id(self)] = copied
        copied.__setstate__({"table": copy.deepcopy(self.table, memo)})
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied module is up to date and on its own: a copied optimizer hooks it again."""
        self.table = None
        table = state["table"]
        if table is not None and vars(table):  # else the optimizer is copied, and begins with it
            bring_up_to_date(table)

    @torch.compiler.disable
    @torch.no_grad()
    def _before_forward(self, module: Any, args: Any, kwargs: Any) -> None:
        if (table := self._table_of(module)) is None:
            return
        require_no_max_norm(table.name, module, table.untouched)  # it may have been set since
        if table.missed is None or not module.training:
            return
        with table.lock:
            if (lagging := table.lagging()) is not None:
                rows = _rows(args[0] if args else kwargs["input"], len(table))
                table.note_change(rows)
                # What an earlier forward has saved for its backward is no value of these rows.
                with _unsafe_preserve_version_counter(table.weight):
                    functional.catch_up_(lagging, rows)

    @torch.compiler.disable
    def _after_forward(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        table = self._table_of(module)
        if table is None or table.missed is None or module.training:
            return None
        with table.lock:
            lagging = table.lagging()
            return None if lagging is None else _read(module, lagging, args, kwargs, output)

    def _before_state_dict(self, module: Any, *args: Any) -> None:
        if not rows_are_apart() and (table := self._table_of(module)) is not None:
            bring_up_to_date(table)

    def _before_load(self, *args: Any) -> None:
        if not rows_are_apart() and self.table is not None:
            bring_up_to_date(self.table)

    def _table_of(self, module: Any) -> EmbeddingTable | None:
        """The table, if the module still has its weight."""
        table = self.table
        return table if table is not None and module.weight is table.weight else None


def _read(
    module: Any, lagging: Lagging, args: Any, kwargs: Any, output: torch.Tensor
) -> torch.Tensor:
    """The output that the module's forward would have had with rows that are up to date."""
    names = ("input", "offsets", "per_sample_weights")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    ids = given["input"]
    factors = given.get("per_sample_weights")
    rows = _rows(ids, module.num_embeddings)
    if factors is not None and factors.requires_grad and torch.is_grad_enabled():
        last = functional.gather(lagging.last_step, rows[rows != MISSING])
        if not bool((last != lagging.missed.t).any()):
            return output
        raise RuntimeError(
            f"{module}: in eval mode there are no gradients of per_sample_weights, since rows may "
            f"be behind; use module.train(), or torch.no_grad() to evaluate"
        )
    with torch.no_grad():
        values = functional.gather_current(lagging, rows)
        places = torch.arange(ids.numel(), device=ids.device).view_as(ids)
        if isinstance(module, torch.nn.EmbeddingBag):
            current = _bags(module, ids, places, values, given.get("offsets"), factors)
        else:
            current = values.view(*ids.shape, values.shape[1])
    return _ReadInstead.apply(output, current) if output.requires_grad else current  # type: ignore[no-untyped-call]


def _rows(ids: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Ids of any shape as rows [N] int64; those out of range, which torch refuses, as MISSING."""
    rows = ids.detach().reshape(-1).long()
    return torch.where((rows >= 0) & (rows < num_rows), rows, MISSING)


def _bags(
    module: torch.nn.EmbeddingBag,
    ids: torch.Tensor,
    places: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor | None,
    factors: torch.Tensor | None,
) -> torch.Tensor:
    """What the module's forward makes of rows ``values`` [N, D] instead of its own."""
    padding = module.padding_idx
    if padding is not None:  # one more row, which stands for padding
        if padding < 0:
            padding += module.num_embeddings
        values = torch.cat([values, values.new_zeros(1, values.shape[1])])
        places = torch.where(ids == padding, values.shape[0] - 1, places)
        padding = values.shape[0] - 1
    return torch.nn.functional.embedding_bag(
        places,
        values,
        offsets,
        mode=module.mode,
        per_sample_weights=factors,
        include_last_offset=module.include_last_offset,
        padding_idx=padding,
    )


def hook(module: torch.nn.Module, table: EmbeddingTable | None) -> None:
    """See to it that the module reads rows of the table as they are now; None: as they lie."""
    hooks = vars(module).get(_ATTRIBUTE)
    if hooks is not None:
        hooks.table = table
    elif table is not None:
        EmbeddingHooks(module, table)
