"""One AdamW step on the rows that gradients name, as SPEC §1 writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from .._checks import row_error
from .._slots import Slot
from .._types import MISSING, MOMENT_DTYPE, Pending, Update
from .blocks import gather, writes_of
from .untouched import caught_up


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


def prepare_sparse_adamw(updates: Sequence[Update], segments: Segments) -> Callable[[], None]:
    """One AdamW step on the rows that ``segments`` names, all but done: nothing is written.

    Args:
        updates: the tables of one group (one dtype, one D, one kind), in the order of ``segments``.
        segments: their gradients, from ``segment``.

    Returns:
        A function that writes the rows and advances each table's t.
    """
    writes = [
        write
        for update, rows, sums in zip(updates, segments.rows, segments.sums, strict=True)
        for slot, values in _updated(update, rows, sums)
        for write in writes_of(slot, rows, values)
    ]

    def apply() -> None:
        for write in writes:
            write()
        for update in updates:
            update.step.add_(1)

    return apply


def _updated(
    update: Update, rows: torch.Tensor, sums: torch.Tensor
) -> list[tuple[Slot, torch.Tensor]]:
    """What the step writes to each slot of one table, [U, D] or [U, 1].

    Args:
        update: the table.
        rows: [U] int64, distinct.
        sums: their gradients [U, D] float64.
    """
    slots = update.pending.param, update.exp_avg, update.exp_avg_sq
    kind, hyper = update.pending.kind, update.hyper
    lr, beta1, beta2 = float(hyper.lr), hyper.beta1, hyper.beta2
    dtype = MOMENT_DTYPE[update.pending.param.dtype]
    param, exp_avg, exp_avg_sq = (gather(slot, rows).to(dtype) for slot in slots)
    t = int(update.step) + 1
    counters: list[tuple[Slot, torch.Tensor]] = []
    if update.last_step is not None and update.missed is not None:
        last_step = gather(update.last_step, rows)
        param, exp_avg, exp_avg_sq = caught_up(
            (param, exp_avg, exp_avg_sq), last_step, update.missed, kind.untouched
        )
        counters.append((update.last_step, torch.full_like(last_step, t)))
    steps = torch.full((rows.numel(), 1), t, device=rows.device)
    if update.row_step is not None:
        steps = gather(update.row_step, rows) + 1
        counters.append((update.row_step, steps))

    bias_correction1, bias_correction2 = 1 - beta1 ** steps.double(), 1 - beta2 ** steps.double()
    step_size = (lr / bias_correction1).to(dtype)
    inv_sqrt_correction2 = bias_correction2.rsqrt()
    eps = hyper.eps * (inv_sqrt_correction2 if hyper.eps_mode == "tf" else 1)
    grad = (-sums if hyper.maximize else sums).to(dtype)
    exp_avg = exp_avg + (1 - beta1) * (grad - exp_avg)
    exp_avg_sq = exp_avg_sq + (1 - beta2) * (grad * grad - exp_avg_sq)
    denom = exp_avg_sq.sqrt() * inv_sqrt_correction2.to(dtype) + torch.as_tensor(
        eps, dtype=torch.float64
    ).to(dtype)
    param = param - (step_size * exp_avg / denom + lr * hyper.weight_decay * param)
    return [*zip(slots, (param, exp_avg, exp_avg_sq), strict=True), *counters]


def coalesce(pending: Pending) -> tuple[torch.Tensor, torch.Tensor]:
    """The touched rows of one table and the sums of their gradients.

    Returns:
        rows [U] int64, ascending, and values [U, D] of the gradients' dtype.
    """
    segments = segment([pending])
    return segments.rows[0], segments.sums[0].to(pending.pieces[0].grad.dtype)
