"""The steps that rows may have missed: a log of what each did, and rules that sum many of them.

A row that missed the steps s + 1 to t would have got, from torch.optim.AdamW with zero gradients,

    param_t = P(s, t) param_s - exp_avg_s * sum over j of w_j / (sqrt(exp_avg_sq_s) + eps_j rho_j)

with P the product of 1 - lr * weight_decay, rho_j = sqrt((1 - beta2^j) / prod of beta2 since s) and
w_j = lr_j / (1 - beta1^j) * P(j, t) * (prod of beta1 since s) * rho_j. w_j and rho_j are the same
for all elements, so the sum is replaced by the Gauss quadrature rule with ``RULE_NODES`` nodes of
the measure that has weight w_j at 1 / (eps_j rho_j): docs/untouched.md. A rule is kept as its
Jacobi matrix, which a step extends by one node in a few operations (Gragg and Harwood, "The
numerically stable reconstruction of Jacobi matrices from spectral data", 1984).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from . import functional
from ._types import RULE_CHUNK, RULE_NODES, RULE_WIDTH, STEP_WIDTH, Hyperparams, Missed

#: Entries of the log, at the most: rows that are further behind are brought up to date.
MAX_ENTRIES = 1 << 16
#: Momentum is over where beta1^k / sqrt(beta2^k) falls below this: it moves no weight any more.
MOMENTUM_ENDS = 1e-8
#: The same in float64 tables.
MOMENTUM_ENDS_64 = 1e-18
#: A rule is not exact enough, and steps are replayed, where what ε is beside √v changes by more
#: than this factor from one step to the next, which settings that stay never do,
RULES_NEED_JUMPS_BELOW = 2.0
#: where ε itself strays from what it was at first by more than this factor,
RULES_NEED_EPS_WITHIN = 1.5
#: or with beta1 above this power of beta2: what x = 1 / (eps rho) weighs falls as x**a towards 0,
#: with a = 2 log(beta1) / log(beta2) - 1, and the less, the more nodes it takes.
RULES_NEED_POWER_OF_BETA2 = 2

_MIN_ENTRIES = 4 * RULE_CHUNK
_STATE_ROWS = 4 + 2 * RULE_NODES
#: The rule of a row that has missed nothing.
_NOTHING_MISSED = (0.0, 1.0, 1.0, 0.0, 1.0, *[0.0] * (RULE_WIDTH - 5))


def step_scalars(hyper: Hyperparams, t: int) -> tuple[float, ...]:
    """What the t-th update of a table does: a row of ``Missed.steps``, in double precision."""
    lr = float(hyper.lr)
    correction2 = math.sqrt(1.0 - hyper.beta2**t)
    return (
        lr * hyper.weight_decay,
        lr / (1.0 - hyper.beta1**t),
        1.0 / correction2,
        hyper.eps / correction2 if hyper.eps_mode == "tf" else hyper.eps,
        hyper.beta1,
        hyper.beta2,
    )


class MissedSteps:
    """What the steps of a table did, since the oldest update of any of its rows.

    Tables that made the same steps share one. It takes 176 bytes a step on the host, and on each
    GPU that a table of it is on.

    Args:
        dense: whether rows miss momentum as well as decay.
        t: updates of the table so far; all rows are up to date.

    Attributes:
        dense: see above.
        t: updates so far.
        first: the least s that a row may have as the step of its last update.
    """

    def __init__(self, dense: bool, t: int = 0) -> None:
        self.dense = dense
        self.t = t
        self.first = t
        with torch.inference_mode(False), torch.device("cpu"):
            self._rules = torch.zeros(_MIN_ENTRIES, RULE_WIDTH, dtype=torch.float64)
            self._factors = torch.zeros(_MIN_ENTRIES // RULE_CHUNK, 2, dtype=torch.float64)
            self._steps = torch.zeros(_MIN_ENTRIES, STEP_WIDTH, dtype=torch.float64)
            self._state = torch.zeros(_STATE_ROWS, 2 * RULE_CHUNK, dtype=torch.float64)
        self._factors[:, 1] = 1.0
        self._open = 0  # first entry whose rule still changes, at the beginning of a chunk
        self._judge_anew()
        self._mirrors: dict[torch.device, tuple[Missed, int]] = {}  # and what was open then
        self._begin_entry(0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mirrors": {}}

    def clone(self) -> MissedSteps:
        """One that goes its own way from here."""
        twin = copy.copy(self)
        with torch.inference_mode(False):
            for name in ("_rules", "_factors", "_steps", "_state"):
                setattr(twin, name, getattr(self, name).clone())
        return twin

    # ------------------------------------------------------------------ what engines read

    @property
    def is_empty(self) -> bool:
        """Whether no row can be behind."""
        return self.t == self.first

    def window(self, dtype: torch.dtype) -> int:
        """After so many missed steps replaying them moves nothing any more but decay."""
        end = MOMENTUM_ENDS_64 if dtype is torch.float64 else MOMENTUM_ENDS
        return _steps_until(end, self._max_ratio)

    def kind(self, dtype: torch.dtype) -> str:
        """``Kind.untouched`` of a table of ``dtype`` in its next step."""
        if not self.dense:
            return "decay"
        return "replay" if self.is_exact_only or dtype is torch.float64 else "dense"

    def on(self, device: torch.device, dtype: torch.dtype) -> Missed:
        """What engines need to bring rows of ``dtype`` up to ``t``. Valid until ``advance``."""
        window = self.window(dtype)
        if device.type == "cpu":
            return Missed(self.t, self.first, window, self._rules, self._factors, self._steps)
        mirror, was_open = self._mirrors.get(device, (None, 0))
        if mirror is None or mirror.rules.shape != self._rules.shape or mirror.first != self.first:
            tensors = (_sent(x, device) for x in (self._rules, self._factors, self._steps))
            mirror = Missed(self.t, self.first, window, *tensors)
        elif mirror.t != self.t:  # send what may have changed
            now, since = self.t - self.first, mirror.t - self.first
            _send(self._rules[was_open : now + 1], mirror.rules[was_open : now + 1])
            _send(self._steps[since:now], mirror.steps[since:now])
            _send(self._factors, mirror.factors)
            mirror.t = self.t
        self._mirrors[device] = mirror, self._open
        return dataclasses.replace(mirror, window=window)

    # ------------------------------------------------------------------ steps

    def _reserve(self) -> None:
        """Hold memory for one more step."""
        entries = self.t - self.first + 2
        if entries > self._rules.shape[0]:
            held = 2 * self._rules.shape[0]
            self._rules, self._factors, self._steps = (
                _longer(self._rules, held),
                _longer(self._factors, held // RULE_CHUNK),
                _longer(self._steps, held),
            )
            self._factors[-(held // 2 // RULE_CHUNK) :, 1] = 1.0
        columns = entries - self._open
        if columns > self._state.shape[1]:
            with torch.inference_mode(False):
                state = self._state.new_zeros(_STATE_ROWS, 2 * columns)
            state[:, : self._state.shape[1]] = self._state
            self._state = state

    def advance(self, step: tuple[float, ...]) -> None:
        """Count a step, which did what ``step_scalars`` says."""
        self.prepare(step)()

    def prepare(self, step: tuple[float, ...]) -> Callable[[], None]:
        """``advance``, all but done: calling the result does it, and takes no memory."""
        self._reserve()
        entry = self.t - self.first  # of s = t: the first to miss this step
        self._steps.numpy()[entry] = step  # where nobody looks yet
        rules = self._rules[self._open :]
        if self.dense:
            extend = functional.prepare_extend_rules(
                self._state, rules, 0, entry + 1 - self._open, self._steps[entry]
            )
        else:
            extend = partial(self._extend_decay, rules, entry + 1 - self._open, step[0])
        return partial(self._advance, entry, step, extend)

    def _extend_decay(self, rules: torch.Tensor, entries: int, decay: float) -> None:
        products = self._state.numpy()[0, :entries]
        products *= 1.0 - decay
        np.subtract(products, 1.0, out=rules.numpy()[:entries, 0])

    def _advance(self, entry: int, step: tuple[float, ...], extend: Callable[[], None]) -> None:
        decay, _, _, _, _, beta2 = step
        self._judge(step)
        extend()
        closed = self._factors.numpy()[: self._open // RULE_CHUNK]
        if len(closed):
            closed[:, 0] -= decay * (1.0 + closed[:, 0])
            closed[:, 1] *= beta2
        self.t += 1
        self._close_chunks()
        self._begin_entry(entry + 1)

    def _judge_anew(self) -> None:
        self._max_ratio = 0.0  # of beta1 / sqrt(beta2)
        self._first_eps: tuple[float, float] | None = None  # beside √v̂, beside √v
        self._last_eps = 0.0  # beside √v, in the last step
        #: whether steps must be replayed one by one, since rules would not be exact enough
        self.is_exact_only = False

    def _judge(self, step: Sequence[float]) -> None:
        """Whether rules are exact enough with this step among the others."""
        _, _, inv_sqrt_correction2, eps, beta1, beta2 = step
        self._max_ratio = max(self._max_ratio, beta1 / math.sqrt(beta2) if beta2 else 0.0)
        beside_v = eps / inv_sqrt_correction2
        if self._first_eps is None:
            self._first_eps, self._last_eps = (eps, beside_v), beside_v
        stays = any(  # one of them does, by eps_mode
            _is_within(now, first, RULES_NEED_EPS_WITHIN)
            for now, first in zip((eps, beside_v), self._first_eps, strict=True)
        )
        jumps = not _is_within(beside_v, self._last_eps, RULES_NEED_JUMPS_BELOW)
        self._last_eps = beside_v
        fades_slowly = beta1 > beta2**RULES_NEED_POWER_OF_BETA2
        self.is_exact_only |= jumps or not stays or fades_slowly

    def _begin_entry(self, entry: int) -> None:
        """Begin the rule of rows that were updated just now: they have missed nothing."""
        state, rules = self._state.numpy(), self._rules.numpy()
        state[:3, entry - self._open] = 1.0
        state[3:, entry - self._open] = 0.0
        rules[entry] = _NOTHING_MISSED

    def _close_chunks(self) -> None:
        """Leave rules alone from which on there is only decay: the chunk's factor has that."""
        state = self._state.numpy()
        held = self.t - self.first - self._open
        while held >= RULE_CHUNK:
            beta1_power, beta2_power = state[1:3, RULE_CHUNK - 1]
            if self.dense and beta1_power > MOMENTUM_ENDS * math.sqrt(beta2_power):
                return
            self._rules[self._open : self._open + RULE_CHUNK, 1] = 0.0
            self._drop_open(RULE_CHUNK)
            held -= RULE_CHUNK

    def _drop_open(self, entries: int) -> None:
        """Leave the first of the open entries alone from now on."""
        held, state = self.t - self.first - self._open + 1, self._state
        for begin in range(0, held - entries, entries):  # pieces that do not overlap
            end = min(begin + entries, held - entries)
            state[:, begin:end].copy_(state[:, begin + entries : end + entries])
        self._open += entries

    # ------------------------------------------------------------------ the length of the log

    def oldest_to_keep(self) -> int | None:
        """If the log is full: rows whose last update is before this are to be brought up to t."""
        if self.t - self.first + 2 < MAX_ENTRIES:
            return None
        return self.first + MAX_ENTRIES // 2

    def forget_before(self, s: int) -> None:
        """Drop the entries before s, ``oldest_to_keep``: no row has its last update there."""
        begin = s - self.first
        chunks = begin // RULE_CHUNK
        cuts = (self._rules, begin), (self._factors, chunks), (self._steps, begin)
        kept = [array[cut:].clone() for array, cut in cuts]  # all memory before any change
        if begin > self._open:
            self._drop_open(begin - self._open)
        for (array, cut), rest in zip(cuts, kept, strict=True):
            array[: array.shape[0] - cut] = rest
        unused = self._factors[self._factors.shape[0] - chunks :]
        unused[:, 0], unused[:, 1] = 0.0, 1.0
        self.first += begin
        self._open -= begin
        self._judge_anew()  # as one that is loaded will
        for step in self._steps[: self.t - self.first].tolist():
            self._judge(step)

    # ------------------------------------------------------------------ saving

    def export(self) -> dict[str, Any]:
        """What it was made with, and the steps first + 1 to t [t - first, STEP_WIDTH] float64."""
        steps = self._steps[: self.t - self.first].clone()
        return {"dense": self.dense, "first": self.first, "steps": steps}

    @classmethod
    def replayed(cls, saved: Any) -> MissedSteps:
        """The log that ``export`` was called on: all else follows from the steps.

        Of a log, that one itself.

        Raises:
            ValueError: no log is saved so.
        """
        if isinstance(saved, MissedSteps):
            return saved
        dense, first, steps = (
            (saved.get(key) for key in ("dense", "first", "steps"))
            if isinstance(saved, dict)
            else (None, None, None)
        )
        if (
            not isinstance(dense, bool)
            or not isinstance(first, int)
            or not isinstance(steps, torch.Tensor)
            or steps.dtype is not torch.float64
            or steps.shape[1:] != (STEP_WIDTH,)
            or not 0 <= first <= 2**31 - 1 - MAX_ENTRIES
            or not len(steps) <= MAX_ENTRIES
            or not bool(_can_be_steps(steps, dense).all())
        ):
            raise ValueError("a saved log of missed steps is none")
        log = cls(dense, first)
        for step in steps.tolist():
            log.advance(tuple(step))
        return log


def _can_be_steps(steps: torch.Tensor, dense: bool) -> torch.Tensor:
    """Which rows of [n, STEP_WIDTH] are what ``step_scalars`` gives, as a bool tensor [n]."""
    decay, _, inv_sqrt_correction2, eps, beta1, beta2 = steps.unbind(1)
    can_be = steps.isfinite().all(1) & (steps >= 0).all(1) & (decay < 1) & (beta1 < 1) & (beta2 < 1)
    can_be &= inv_sqrt_correction2 >= 1
    if dense:
        can_be &= (eps > 0) & (beta1 * beta1 < beta2)
    return can_be


def _is_within(x: float, y: float, factor: float) -> bool:
    return y <= factor * x and x <= factor * y


def _steps_until(end: float, ratio: float) -> int:
    """The least k with ratio^k at most ``end``; ratio is below 1."""
    return 1 if ratio <= 0.0 else max(1, math.ceil(math.log(end) / math.log(ratio)))


def _longer(array: torch.Tensor, size: int) -> torch.Tensor:
    with torch.inference_mode(False):
        longer = array.new_zeros(size, array.shape[1])
    longer[: array.shape[0]] = array
    return longer


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that a GPU can fetch while the host goes on."""
    return tensor.contiguous().pin_memory()


def _send(tensor: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(_pinned(tensor), non_blocking=True)


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return _pinned(tensor).to(device, non_blocking=True)
