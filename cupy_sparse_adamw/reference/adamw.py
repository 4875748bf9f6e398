"""One AdamW step on the rows that gradients name, as SPEC §1 writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .._checks import row_error
from .._types import MISSING, MOMENT_DTYPE, Pending, Update
from .blocks import gather, scatter_


@dataclasses.dataclass
class Segments:
    """Per table: the touched rows [U], ascending, and their gradients' sums [U, D] float64."""

    pending: Sequence[Pending]
    rows: list[torch.Tensor]
    sums: list[torch.Tensor]


def segment(pending: Sequence[Pending]) -> Segments:
    """Reduce the gradients of tables that share dtype and D by row. Writes to no table.

    Raises:
        IndexError: a row is outside its table; the text names both.
    """
    segments = Segments(pending, [], [])
    for table in pending:
        rows = torch.cat([piece.rows for piece in table.pieces])
        grads = torch.cat([piece.grad for piece in table.pieces]).double()
        num_rows = table.count_rows()
        out_of_range = (rows < 0) | (rows >= num_rows)
        if table.drop_missing:
            out_of_range &= rows != MISSING
        if out_of_range.any():
            raise row_error(table.name, int(rows[out_of_range][0]), num_rows)
        kept = rows != MISSING
        rows, grads = rows[kept], grads[kept]
        # A stable sort keeps each row's gradients in order of occurrence.
        rows, order = torch.sort(rows, stable=True)
        rows, counts = torch.unique_consecutive(rows, return_counts=True)
        sums = torch.segment_reduce(grads[order], "sum", lengths=counts, axis=0, unsafe=True)
        sums = sums * table.grad_scale
        if table.mean:
            sums = sums / counts[:, None]
        segments.rows.append(rows)
        segments.sums.append(sums)
    return segments


def sparse_adamw_(updates: Sequence[Update], segments: Segments) -> None:
    """Apply one AdamW step to the rows that ``segments`` names, then advance each table's t.

    Args:
        updates: the tables of one group (one dtype, one D), in the order of ``segments``.
        segments: their gradients, from ``segment``.
    """
    for update, rows, sums in zip(updates, segments.rows, segments.sums, strict=True):
        lr, (_, beta1, beta2, eps, weight_decay) = float(update.hyper.lr), update.hyper
        t = int(update.step) + 1
        bias_correction1 = 1 - beta1**t
        bias_correction2 = 1 - beta2**t
        dtype = MOMENT_DTYPE[update.pending.param.dtype]

        grad = sums.to(dtype)
        exp_avg = gather(update.exp_avg, rows)
        exp_avg_sq = gather(update.exp_avg_sq, rows)
        param = gather(update.pending.param, rows).to(dtype)

        exp_avg = exp_avg + (1 - beta1) * (grad - exp_avg)
        exp_avg_sq = exp_avg_sq + (1 - beta2) * (grad * grad - exp_avg_sq)
        denom = exp_avg_sq.sqrt() / bias_correction2**0.5 + eps
        param = param - (lr / bias_correction1 * exp_avg / denom + lr * weight_decay * param)

        scatter_(update.exp_avg, rows, exp_avg)
        scatter_(update.exp_avg_sq, rows, exp_avg_sq)
        scatter_(update.pending.param, rows, param.to(update.pending.param.dtype))
    for update in updates:
        update.step.add_(1)


def coalesce(pending: Pending) -> tuple[torch.Tensor, torch.Tensor]:
    """The touched rows of one table and the sums of their gradients.

    Returns:
        rows [U] int64, ascending, and values [U, D] of the gradients' dtype.
    """
    segments = segment([pending])
    return segments.rows[0], segments.sums[0].to(pending.pieces[0].grad.dtype)
