"""Rows that no batch touched: what they missed, as ``Missed`` says, and how its rules are made."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .._types import MISSING, MOMENT_DTYPE, RULE_CHUNK, RULE_NODES, Lagging, Missed
from .blocks import gather, writes_of

Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # param, exp_avg, exp_avg_sq, each [n, D]


def caught_up(values: Row, last_step: torch.Tensor, missed: Missed, untouched: str) -> Row:
    """What rows are at step ``missed.t``. Those that are not behind stay bit for bit.

    Args:
        values: weights and moments [n, D], all of the moments' dtype.
        last_step: [n, 1], the step of each row's last update.
        missed: what the steps since have done.
        untouched: "decay", "dense" or "replay".
    """
    bring = {"decay": _decayed, "dense": _by_rules, "replay": _step_by_step}[untouched]
    now = bring(values, last_step.long(), missed)
    is_behind = last_step < missed.t
    param, exp_avg, exp_avg_sq = (
        torch.where(is_behind, new, old) for new, old in zip(now, values, strict=True)
    )
    return param, exp_avg, exp_avg_sq


def _entries(last_step: torch.Tensor, missed: Missed) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's entry [RULE_WIDTH, n, 1] and its factor [2, n, 1]."""
    number = (last_step - missed.first).flatten()
    rules, factors = missed.rules[number], missed.factors[number // RULE_CHUNK]
    return rules.T[..., None], factors.T[..., None]


def _decayed(values: Row, last_step: torch.Tensor, missed: Missed) -> Row:
    param, exp_avg, exp_avg_sq = values
    (a, *_), (f, _) = _entries(last_step, missed)
    return param + (a + f + a * f).to(param.dtype) * param, exp_avg, exp_avg_sq


def _by_rules(values: Row, last_step: torch.Tensor, missed: Missed) -> Row:
    param, exp_avg, exp_avg_sq = values
    rules, (f, f2) = _entries(last_step, missed)
    a, beta1_power, b2, weight = rules[:4]
    decay, beta1_power, beta2_power, weight = (
        x.to(param.dtype) for x in (a + f + a * f, beta1_power, b2 * f2, weight * (1 + f))
    )
    moved = exp_avg * weight * _mean_inverse(exp_avg_sq.sqrt(), rules[4:].to(param.dtype))
    param = param + (decay * param - moved)
    return param, _normal_or_zero(exp_avg * beta1_power), exp_avg_sq * beta2_power


def _mean_inverse(root: torch.Tensor, rules: torch.Tensor) -> torch.Tensor:
    """The quadrature rule's mean of 1 / (root + node): S(root) / (W (1 + f)), [n, D].

    Args:
        root: √exp_avg_sq, [n, D].
        rules: the entries' columns from c on, each [n, 1].
    """
    c, d, e = rules[0], rules[:RULE_NODES], rules[RULE_NODES - 1 :]  # d[k], e[k] for k >= 1
    inverse = 1 / (c + root)
    u = (root * inverse).nan_to_num(nan=1.0)  # NaN only where the root is infinite, or NaN itself
    later, now = torch.ones_like(u), 1 + d[RULE_NODES - 1] * u  # D_6, D_5
    for k in range(RULE_NODES - 2, 0, -1):
        later, now = now, (1 + d[k] * u) * now - e[k + 1] * u * u * later
    return inverse * (now - e[1] * u * later) / (now - e[1] * u * u * later)


def _step_by_step(values: Row, last_step: torch.Tensor, missed: Missed) -> Row:
    """Dense AdamW with zero gradients; after the window only decay and ``exp_avg_sq`` go on."""
    param, exp_avg, exp_avg_sq = values
    last_moving = last_step + missed.window
    kept = torch.ones_like(last_step, dtype=torch.float64)  # product of 1 - decay after the window
    beta2_power = kept.clone()
    for j in range(int(last_step.min()) + 1 if last_step.numel() else 0, missed.t + 1):
        decay, step_size, inv_sqrt_correction2, eps, beta1, beta2 = missed.steps[
            j - missed.first - 1
        ].tolist()
        moves = (last_step < j) & (j <= last_moving)
        exp_avg = torch.where(moves, exp_avg * beta1, exp_avg)
        exp_avg_sq = torch.where(moves, exp_avg_sq * beta2, exp_avg_sq)
        denom = exp_avg_sq.sqrt() * inv_sqrt_correction2 + eps
        param = torch.where(moves, param - (step_size * exp_avg / denom + decay * param), param)
        kept[j > last_moving] *= 1 - decay
        beta2_power[j > last_moving] *= beta2
    exp_avg = torch.where(missed.t > last_moving, 0.0, _normal_or_zero(exp_avg))
    dtype = param.dtype
    return param + (kept - 1).to(dtype) * param, exp_avg, exp_avg_sq * beta2_power.to(dtype)


def _normal_or_zero(x: torch.Tensor) -> torch.Tensor:
    """Zero in place of what is not a normal number: slow to compute with, and nothing by now."""
    return torch.where(x.abs() < torch.finfo(x.dtype).tiny, 0.0, x)


def _current(lagging: Lagging, rows: torch.Tensor) -> Row:
    """The named rows [n], brought up to date, in the moments' dtype."""
    dtype = MOMENT_DTYPE[lagging.param.dtype]
    param = gather(lagging.param, rows).to(dtype)
    if lagging.untouched == "decay":
        moments = torch.zeros_like(param), torch.zeros_like(param)
    else:
        moments = gather(lagging.exp_avg, rows), gather(lagging.exp_avg_sq, rows)
    last_step = gather(lagging.last_step, rows)
    return caught_up((param, *moments), last_step, lagging.missed, lagging.untouched)


def gather_current(lagging: Lagging, rows: torch.Tensor) -> torch.Tensor:
    """The weights of the named rows, brought up to date; nothing is written.

    Args:
        lagging: the table.
        rows: [N] int64, in range or ``MISSING``, which reads as zeros.

    Returns:
        values [N, D] of the weights' dtype.
    """
    param = lagging.param
    values = torch.zeros(rows.numel(), param.dim, dtype=param.dtype, device=param.device)
    there = rows != MISSING
    values[there] = _current(lagging, rows[there])[0].to(param.dtype)
    return values


def catch_up_(lagging: Lagging, rows: torch.Tensor) -> None:
    """Bring the named rows up to date: weights, moments and ``last_step``.

    Args:
        lagging: changed in place.
        rows: [N] int64; may repeat. ``MISSING`` and rows out of range are passed over.
    """
    num_rows = min(lagging.param.num_rows(), lagging.last_step.num_rows())
    rows = rows[(rows >= 0) & (rows < num_rows)].unique()
    last_step = gather(lagging.last_step, rows)
    rows = rows[last_step.flatten() < lagging.missed.t]
    param, exp_avg, exp_avg_sq = _current(lagging, rows)
    now = torch.full((rows.numel(), 1), lagging.missed.t, device=rows.device)
    current = [(lagging.param, param), (lagging.last_step, now)]
    if lagging.untouched != "decay":
        current += [(lagging.exp_avg, exp_avg), (lagging.exp_avg_sq, exp_avg_sq)]
    writes = [write for slot, values in current for write in writes_of(slot, rows, values)]
    for write in writes:
        write()


def prepare_extend_rules(
    state: torch.Tensor, rules: torch.Tensor, begin: int, end: int, step: torch.Tensor
) -> Callable[[], None]:
    """Take one more missed step into entries [begin, end) of ``Missed.rules``, all but done.

    The step is a node more in each entry's sum: weight / (√v_s + 1 / node).

    Args:
        state: [4 + 2 * RULE_NODES, n] float64, on the CPU, changed in place; for each entry the
            product of 1 - lr * weight_decay, of beta1, and of beta2, over the steps so far; how
            many nodes its rule has; diagonal and off-diagonal of the rule's Jacobi matrix, the
            latter squared and led by the sum of all weights.
        rules: [n, RULE_WIDTH] float64, on the CPU, changed in place.
        begin: first entry.
        end: one beyond the last.
        step: [STEP_WIDTH] float64, a row of ``Missed.steps``.

    Returns:
        A function that changes ``state`` and ``rules``.
    """
    decay, step_size, inv_sqrt_correction2, eps, beta1, beta2 = step.tolist()
    entries = state[:, begin:end].clone()
    kept, beta1_power, beta2_power, count = entries[:4]
    alpha, beta = entries[4 : 4 + RULE_NODES], entries[4 + RULE_NODES :]
    kept *= 1 - decay
    beta1_power *= beta1
    beta2_power *= beta2
    beta[0] *= 1 - decay

    rho = 1 / (inv_sqrt_correction2 * beta2_power.sqrt())
    weight, node = step_size * beta1_power * rho, 1 / (eps * rho)
    is_node = (weight > 0) & weight.isfinite() & node.isfinite()
    _insert_(alpha, beta, count, torch.where(is_node, node, 0.0), torch.where(is_node, weight, 0.0))
    count.copy_((count + is_node).clamp(max=RULE_NODES))

    has_nodes = count > 0
    c = torch.where(has_nodes, 1 / alpha[0], 1.0)
    d = torch.where(torch.arange(1, RULE_NODES)[:, None] < count, alpha[1:] * c - 1, 0.0)
    e = torch.where(has_nodes, beta[1:] * c * c, 0.0)
    c = c.clamp(min=torch.finfo(torch.float32).tiny)
    columns = [kept - 1, beta1_power, beta2_power, beta[0], c, *d, *e, torch.zeros_like(c)]
    extended = torch.stack(columns, dim=1)

    def apply() -> None:
        state[:, begin:end].copy_(entries)
        rules[begin:end].copy_(extended)

    return apply


def _insert_(
    alpha: torch.Tensor,
    beta: torch.Tensor,
    count: torch.Tensor,
    node: torch.Tensor,
    weight: torch.Tensor,
) -> None:
    """Add a node to each rule of n, of which RULE_NODES stay; weight 0 changes nothing.

    Gragg and Harwood's algorithm RKPW ("The numerically stable reconstruction of Jacobi matrices
    from spectral data", Numerische Mathematik 44, 1984). A row of the matrix depends only on those
    above it, so leaving out the row behind the last gives the Gauss rule of all that was added.

    Args:
        alpha: [RULE_NODES, n], the matrices' diagonals, changed in place.
        beta: [RULE_NODES, n], the sums of all weights, then the off-diagonals squared.
        count: [n], how many rows the matrices have so far.
        node: [n].
        weight: [n], at least 0.
    """
    gamma, sigma = torch.ones_like(weight), torch.zeros_like(weight)
    shift, rest = torch.zeros_like(weight), weight
    for k in range(RULE_NODES):
        old_alpha = torch.where(k < count, alpha[k], node)
        old_beta = torch.where(k < count, beta[k], 0.0)
        total, sigma_before, shift_before = old_beta + rest, sigma, shift
        beta[k] = gamma * total
        gamma = torch.where(total > 0, old_beta / total, 1.0)
        sigma = torch.where(total > 0, rest / total, 0.0)
        shift = sigma * (old_alpha - node) - gamma * shift
        alpha[k] = old_alpha - (shift - shift_before)
        rest = torch.where(sigma > 0, shift * shift / sigma, sigma_before * old_beta)
