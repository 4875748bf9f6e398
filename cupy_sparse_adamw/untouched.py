"""Rows that no batch touched, in modes "decay" and "dense": logs of steps, and catching up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ._types import Hyperparams
from .embedding_hooks import hook, require_no_max_norm
from .embedding_table import EmbeddingTable, table_behind
from .missed_steps import MissedSteps, step_scalars
from .tables import Table, bring_up_to_date


def require_keeps(name: str, table: Table, group: Mapping[str, Any]) -> None:
    """See to it that the table can keep what a group's settings ask of each row.

    Raises:
        TypeError: a weight was given without its module, or a table of RecIS.
        ValueError: the module writes to its weight (``max_norm``).
    """
    untouched, bias_correction = group["untouched"], group["bias_correction"]
    if not table.keeps_steps and (untouched != "skip" or bias_correction == "row"):
        raise TypeError(
            f"{name}: {type(table).__name__} keeps no step for each row, which "
            f"untouched={untouched!r} with bias_correction={bias_correction!r} needs; "
            f"use a HashTable of this package, or untouched='skip' and bias_correction='table'"
        )
    if untouched == "skip":
        return
    if isinstance(table, EmbeddingTable):
        if table.module is None:
            raise TypeError(
                f"{name}: with untouched={untouched!r} give the module (torch.nn.Embedding or "
                f"EmbeddingBag) instead of its weight: rows must be brought up to date before it "
                f"reads them"
            )
        own = (torch.nn.Embedding.forward, torch.nn.EmbeddingBag.forward)
        if type(table.module).forward not in own:
            raise TypeError(
                f"{name}: with untouched={untouched!r} a module must look up as torch's own do, "
                f"but {type(table.module).__name__} has a forward of its own; give the optimizer "
                f"an Embedding that it holds, or use untouched='skip'"
            )
        require_no_max_norm(name, table.module, untouched)


def leave_former(table: Table) -> None:
    """Give rows what they missed under a former owner, before another one takes the table."""
    former = table_behind(table.weight) if isinstance(table, EmbeddingTable) else table
    if former is not None:
        bring_up_to_date(former)


def take_over(table: Table, group: Mapping[str, Any]) -> None:
    """Prepare a table for a new owner, after ``leave_former``."""
    table.untouched = group["untouched"]
    table.counts_rows = group["bias_correction"] == "row"
    if isinstance(table, EmbeddingTable) and (former := table_behind(table.weight)) is not None:
        former.leave()
    hook_module(table)
    table.drop_moments()


def hook_module(table: Table) -> None:
    """See to it that the module of a table whose rows may be behind reads them as of now."""
    if isinstance(table, EmbeddingTable) and table.module is not None:
        hook(table.module, table if table.untouched != "skip" else None)


def restart(tables: Iterable[Table]) -> None:
    """Drop logs that say nothing any more: all rows of these tables are up to date."""
    fresh: dict[int, MissedSteps] = {}
    for table in tables:
        if (log := table.missed) is not None:
            if id(log) not in fresh:
                fresh[id(log)] = MissedSteps(log.dense, log.t)
            table.missed = fresh[id(log)]


def make_room(tables: Iterable[Table]) -> None:
    """Bring up to date the rows that keep a log from forgetting its oldest half, if it is full."""
    full: dict[int, tuple[MissedSteps, list[Table]]] = {}
    for table in tables:
        if (log := table.missed) is not None and log.oldest_to_keep() is not None:
            full.setdefault(id(log), (log, []))[1].append(table)
    for log, sharers in full.values():
        before = log.oldest_to_keep()
        assert before is not None
        for table in sharers:
            bring_up_to_date(table, before)
        log.forget_before(before)


def prepare_to_count(
    stepping: Sequence[tuple[Table, Hyperparams]], tables: Iterable[Table]
) -> Callable[[], None]:
    """Make ready to note a step of some of an optimizer's tables; the result notes it.

    Tables share a log as long as they make the same steps.
    """
    sharers = Counter(id(table.missed) for table in tables)
    together: dict[tuple[int, tuple[float, ...]], list[Table]] = {}
    for table, hyper in stepping:
        if (log := table.missed) is not None:
            step = step_scalars(hyper, log.t + 1)
            together.setdefault((id(log), step), []).append(table)
    plans = []
    for (_, step), members in together.items():
        log = members[0].missed
        assert log is not None
        if sharers[id(log)] > len(members):  # others stay behind
            sharers[id(log)] -= len(members)
            log = log.clone()
        plans.append((log, log.prepare(step), members))

    def count() -> None:
        for log, advance, members in plans:
            for table in members:
                table.missed = log
            advance()

    return count
