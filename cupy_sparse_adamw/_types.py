"""The data structures that every layer shares: ids and rows, pending gradients, one update."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ._slots import Slot

#: Table dtype -> dtype of its moments and of its update (SPEC: fp32, fp64 for fp64 tables).
MOMENT_DTYPE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}

#: Row number that means "no row": a lookup that found nothing. Its gradient is dropped.
MISSING = -1
#: In an index: the entry's id was taken out, and searches go on behind it.
DELETED = -2


@dataclasses.dataclass
class RowIndex:
    """Which row each id has, and which rows are free; all on one device.

    Attributes:
        entries: [C, 2] int64 (id, row), open addressing with linear probing; the row of a free
            entry is ``MISSING``, that of one whose id was taken out ``DELETED``.
        counters: [3] int64: rows numbered so far, which is the next fresh row; free rows among
            them; and room for the CUDA engine to count in, 0 between calls.
        free_rows: [F] int64, of which the first ``counters[1]`` are free rows. New ids take them
            from the end of that part, and fresh rows once there are none.
    """

    entries: torch.Tensor
    counters: torch.Tensor
    free_rows: torch.Tensor

    def next_rows(self, count: int) -> torch.Tensor:
        """The rows [count] int64 that the next new ids get, in order. Waits for the device."""
        numbered, free, _ = self.counters.tolist()
        reused = self.free_rows[max(free - count, 0) : free].flip(0)
        fresh = count - reused.numel()
        return torch.cat([reused, numbered + torch.arange(fresh, device=reused.device)])

    def take_rows(self, count: int) -> None:
        """Count the first ``count`` of ``next_rows`` as given. Waits for the device."""
        reused = min(count, int(self.counters[1]))
        self.counters += self.counters.new_tensor([count - reused, -reused, 0])


class PendingGrad(NamedTuple):
    """Gradients as backward left them: not reduced, not copied.

    ``indices`` int64, contiguous, are the rows: [N], or [1, N] as sparse tensors have them (a view
    of another shape costs more than all else that a step asks of a small table). They may repeat.
    ``grad`` [N, D] may have any strides.
    """

    indices: torch.Tensor
    grad: torch.Tensor

    @property
    def rows(self) -> torch.Tensor:
        """The indices as [N]."""
        return self.indices.view(-1)


class Hyperparams(NamedTuple):
    """The settings of one param group in one step: Python floats; ``lr`` may be a tensor.

    An ``lr`` [] or [1] on a CUDA device is read there, so that a captured step follows it.

    With ``eps_mode`` "torch" ε is added to √v̂; with "tf" to √v, so that it becomes
    eps / sqrt(1 - beta2^t) beside √v̂. ``maximize`` turns the gradients' sign.
    """

    lr: float | torch.Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool = False
    eps_mode: str = "torch"


class Kind(NamedTuple):
    """Which update a table gets: tables of one group have one kind.

    ``untouched`` is what rows missed while no batch touched them: "skip" (nothing), "decay",
    "dense" (decay and momentum, by rules, see ``Missed``) or "replay" (as "dense", step by step).
    ``per_row``: bias is corrected by the row's own number of updates instead of the table's.
    """

    untouched: str = "skip"
    per_row: bool = False


#: Rows that no gradient names stay as they are.
SKIP = Kind()

#: Nodes of a rule: see ``Missed``.
RULE_NODES = 6
#: Entries of ``Missed`` that share a factor.
RULE_CHUNK = 256
#: Columns of ``Missed.rules``: see there.
RULE_WIDTH = 16
#: Columns of ``Missed.steps``.
STEP_WIDTH = 6


@dataclasses.dataclass(slots=True, eq=False)
class Missed:
    """What the steps up to t have done to a row that missed them, by the step s of its last update.

    Entry i stands for s = ``first`` + i, and factor i // RULE_CHUNK belongs to it. With r = √v_s,
    a row that is behind (s < t) becomes, elementwise,

        param      += decay * param - exp_avg * S(r)
        exp_avg    *= beta1_power              (0 where the result would not be a normal number)
        exp_avg_sq *= beta2_power

    where, of the entry's columns (a, b1, b2, W, c, d_1..d_5, e_1..e_5, unused) and its factor
    (f, f2), decay = a + f + a f, beta1_power = b1, beta2_power = b2 f2, and

        u = r / (c + r)
        D_5 = 1 + d_5 u,   D_k = (1 + d_k u) D_{k+1} - e_{k+1} u² D_{k+2},   D_6 = 1
        S(r) = W (1 + f) / (c + r) * (D_1 - e_1 u D_2) / (D_1 - e_1 u² D_2)

    and S = 0 where r is infinite.

    S is the Gauss quadrature rule with RULE_NODES nodes of the sum over the missed steps
    (docs/untouched.md), evaluated as a continued fraction. In mode "decay" the moments stay and
    only ``decay`` matters.

    Attributes:
        t: the table's number of updates so far.
        first: the least s that has an entry.
        window: after so many missed steps momentum is nothing.
        rules: [at least t - first + 1, RULE_WIDTH] float64, on the table's device.
        factors: [enough, 2] float64, on the table's device.
        steps: [at least t - first, STEP_WIDTH] float64, on the table's device: row j - first - 1 is
            what step j did: (lr * weight_decay, lr / (1 - beta1^j), 1 / sqrt(1 - beta2^j), eps
            beside √v̂, beta1, beta2). "replay" reads these instead of rules.
    """

    t: int
    first: int
    window: int
    rules: torch.Tensor
    factors: torch.Tensor
    steps: torch.Tensor


@dataclasses.dataclass(slots=True, eq=False)
class Lagging:
    """A table whose rows may be behind.

    ``last_step`` is of width 1, int32: the step s of each row's last update. ``untouched`` is
    "decay", "dense" or "replay"; in mode "decay" the moments are neither read nor written.
    """

    param: Slot
    exp_avg: Slot
    exp_avg_sq: Slot
    last_step: Slot
    missed: Missed
    untouched: str


@dataclasses.dataclass(slots=True)
class Pending:
    """What one table brings to a step before anything is written.

    Attributes:
        name: the table's name, for error texts.
        param: the weights.
        num_rows: R, or a bound on it that memory is held for; a row outside [0, R) is an
            IndexError.
        pieces: the gradients in order of occurrence, all of one dtype.
        drop_missing: rows equal to ``MISSING`` are dropped rather than out of range.
        grad_scale: factor on the sum of a row's gradients (1 / WORLD_SIZE).
        mean: divide a row's sum by its number of occurrences (``grad_reduce_by="id"``).
        row_count: [1] int64 on the table's device: R, where ``num_rows`` is only a bound on it.
        fault: [2] int64 on the table's device (flag, row), where an engine that cannot raise at
            once notes a row out of range; None if nobody will ask.
        coalesced: the rows of the only piece are distinct and ascend, so that an engine need not
            sort. Whoever sets it vouches for it: torch's ``is_coalesced()`` does.
        kind: which update the table gets; the optimizer says so.
    """

    name: str
    param: Slot
    num_rows: int
    pieces: list[PendingGrad]
    drop_missing: bool = False
    grad_scale: float = 1.0
    mean: bool = False
    row_count: torch.Tensor | None = None
    fault: torch.Tensor | None = None
    coalesced: bool = False
    kind: Kind = SKIP

    def count_rows(self) -> int:
        """R itself. Waits for the device where only it knows."""
        return self.num_rows if self.row_count is None else int(self.row_count)


@dataclasses.dataclass(slots=True)
class Update:
    """One table's part of ``prepare_sparse_adamw``: gradients, moments and this step's scalars.

    ``step`` [] int64 on the table's device is t before this update, which advances it by 1.

    Unless the kind is "skip", a touched row is first brought up to t as ``missed`` says, then
    updated, and its ``last_step`` (width 1, int32) becomes t + 1. With ``per_row`` its ``row_step``
    (width 1, int32) rises by 1 and takes the place of t in the bias corrections and in ε's.
    """

    pending: Pending
    exp_avg: Slot
    exp_avg_sq: Slot
    step: torch.Tensor
    hyper: Hyperparams
    last_step: Slot | None = None
    missed: Missed | None = None
    row_step: Slot | None = None


class HostCopy(Protocol):
    """A copy of a small tensor on its way to the host."""

    def ready(self) -> bool:
        """Whether it has arrived. Never waits."""

    def values(self) -> np.ndarray[Any, Any]:
        """The copy. Waits for it, but not for what the device was asked to do since."""


class Arrived:
    """A ``HostCopy`` that is there at once: the tensor is waited for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._values: np.ndarray[Any, Any] = tensor.detach().cpu().numpy().copy()

    def ready(self) -> bool:
        """It is."""
        return True

    def values(self) -> np.ndarray[Any, Any]:
        """The copy."""
        return self._values


class RowReport(Protocol):
    """What a step that could not raise at once will say of its rows."""

    def ready(self) -> bool:
        """Whether the answer is there. Never waits."""

    def error(self) -> Exception | None:
        """What is to be raised, if there is anything. Waits for the answer."""


class DistributionKind(enum.IntEnum):
    """What a new row is drawn from."""

    CONSTANT = 0
    UNIFORM = 1
    NORMAL = 2
    TRUNC_NORMAL = 3


class Distribution(NamedTuple):
    """A distribution and its parameters: the fields that its kind does not use are 0.

    CONSTANT: ``loc``. UNIFORM: [``low``, ``high``). NORMAL: mean ``loc``, standard deviation
    ``scale``. TRUNC_NORMAL: the same, cut to [``low``, ``high``].
    """

    kind: DistributionKind
    loc: float = 0.0
    scale: float = 0.0
    low: float = 0.0
    high: float = 0.0

    def limits(self, dtype: torch.dtype) -> tuple[float, float]:
        """Least and greatest element: the values of ``dtype`` in the interval, if it holds any."""
        low, high = self.low, self.high
        if self.kind == DistributionKind.CONSTANT:
            low = high = self.loc
        elif self.kind == DistributionKind.NORMAL:
            low, high = -math.inf, math.inf
        largest = torch.finfo(dtype).max
        bounds = torch.tensor([low, high], dtype=torch.float64, device="cpu")
        low, high = bounds.clamp_(-largest, largest).tolist()
        least, greatest = nearest, _ = bounds.to(dtype)
        infinity = torch.full_like(least, math.inf)
        if least.item() < low:
            least = torch.nextafter(least, infinity)
        open_above = self.kind == DistributionKind.UNIFORM
        if greatest.item() > high or (open_above and greatest.item() == high):
            greatest = torch.nextafter(greatest, -infinity)
        if least > greatest:
            least = greatest = nearest
        return least.item(), greatest.item()

    def plan(self, dtype: torch.dtype) -> Plan:
        """How engines draw from it for a table of ``dtype``."""
        return _plan(self, dtype)


class Plan(NamedTuple):
    """How a share u in (0, 1) becomes a value: the quantile of p = ``start`` + ``step`` u.

    The value is p itself or, if ``normal``, ``loc`` + ``scale`` times the standard normal quantile
    of p; then it is cut to [``least``, ``greatest``], see ``Distribution.limits``.
    """

    normal: bool
    start: float
    step: float
    loc: float
    scale: float
    least: float
    greatest: float


@functools.lru_cache(maxsize=256)  # a lookup may bring a single new row
def _plan(distribution: Distribution, dtype: torch.dtype) -> Plan:
    kind, *numbers = distribution
    loc, scale, low, high = map(float, numbers)  # an int would compile another kernel
    limits = distribution.limits(dtype)
    if kind == DistributionKind.CONSTANT:
        return Plan(False, loc, 0.0, 0.0, 1.0, *limits)
    if kind == DistributionKind.UNIFORM:
        return Plan(False, low, high - low, 0.0, 1.0, *limits)
    if kind == DistributionKind.NORMAL:
        return Plan(True, 0.0, 1.0, loc, scale, *limits)
    # An interval that lies mostly above the mean goes through its mirror image below: there its
    # probabilities are small numbers with all their digits, here they crowd against 1.
    sign = 1.0 if low - loc <= loc - high else -1.0
    start, stop = (math.erfc(sign * (loc - x) / scale / math.sqrt(2.0)) / 2.0 for x in (low, high))
    return Plan(True, start, stop - start, loc, sign * scale, *limits)
