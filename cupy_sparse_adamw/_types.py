"""The data structures that every layer shares: rows in blocks, pending gradients, one update."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ._memory import empty

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


_NO_ADDRESSES = np.empty(0, dtype=np.int64)


class _Memory:
    """Where the rows of a slot are, or those of several slots side by side.

    Args:
        shape: (n, D): of n slots, elements a row of each.
        block_size: rows per block.
        dtype: element type.
        device: where the blocks live.

    Attributes:
        slabs: each [k * block_size, n, D]; columns are contiguous.
        rows: of all slabs.
    """

    def __init__(
        self, shape: tuple[int, int], block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape = shape
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self.slabs: list[torch.Tensor] = []
        self.rows = 0

    def reserve(self, rows: int) -> None:
        """See ``Slot.reserve``."""
        if rows <= self.rows:
            return
        blocks = -(-(rows - self.rows) // self.block_size)
        blocks = max(blocks, self.rows // self.block_size // 8)
        with torch.inference_mode(False):  # a slab outlives the mode that it is allocated in
            shape = (blocks * self.block_size, *self.shape)
            slab = empty(shape, self.dtype, self.device).zero_()
        self.append(slab)

    def append(self, slab: torch.Tensor) -> None:
        """Add rows at the end."""
        self.slabs.append(slab)
        self.rows += slab.shape[0]  # last: Ctrl-C may come at any line


class Slot:
    """One value of width D for each row of a table: its weights, or a moment.

    Rows live in blocks of ``block_size`` rows: row r is row ``r % block_size`` of block
    ``r // block_size``. Growing appends blocks, so no row ever moves. Blocks are cut from slabs
    whose size grows with the slot, so a large table needs few allocations. A block's rows lie
    ``row_bytes`` apart.

    Args:
        name: the slot's name, as in RecIS ("embedding", "sparse_adamw_exp_avg", ...).
        dim: D, the width of a row in elements.
        block_size: rows per block.
        dtype: element type.
        device: where the blocks live.

    Attributes:
        row_bytes: from a row of a block to the next.
        has_gaps: whether that is more than a row takes.
    """

    def __init__(
        self, name: str, dim: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._lie_in(_Memory((1, dim), block_size, dtype, device), name, 0)

    def _lie_in(self, memory: _Memory, name: str, place: int) -> None:
        """Be the slot at a place in each row of the memory."""
        self._name = name
        self._place = place
        self._memory = memory
        self._block_size = memory.block_size
        self.dim = memory.shape[1]
        self.dtype = memory.dtype
        self.device = memory.device
        self.row_bytes = math.prod(memory.shape) * memory.dtype.itemsize
        self.has_gaps = memory.shape[0] > 1
        self._known_rows = -1  # those of the memory as it was for what follows
        self._addresses = _NO_ADDRESSES
        self._addresses_at = 0
        self._block_table: torch.Tensor | None = None

    @classmethod
    def side_by_side(
        cls,
        names: Sequence[str],
        dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[Slot]:
        """Slots whose rows lie side by side: memory for a row of one is memory for one of each."""
        memory = _Memory((len(names), dim), block_size, dtype, device)
        slots = [cls.__new__(cls) for _ in names]
        for place, (slot, name) in enumerate(zip(slots, names, strict=True)):
            slot._lie_in(memory, name, place)
        return slots

    @classmethod
    def over(cls, name: str, weight: torch.Tensor) -> Slot:
        """The slot whose only block is ``weight`` [R, D] itself; its columns are contiguous."""
        slot = cls(name, weight.shape[1], max(weight.shape[0], 1), weight.dtype, weight.device)
        slot._memory.append(weight[:, None])
        if not weight.is_contiguous():
            slot.row_bytes, slot.has_gaps = weight.stride(0) * weight.itemsize, True
        return slot

    @classmethod
    def over_blocks(
        cls,
        name: str,
        dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        blocks: list[torch.Tensor],
    ) -> Slot:
        """The slot whose blocks are ``blocks``, each [block_size, D] (contiguous), themselves."""
        slot = cls(name, dim, block_size, dtype, device)
        for block in blocks:
            slot._memory.append(block[:, None])
        return slot

    def __getstate__(self) -> dict[str, object]:
        # Addresses mean nothing in a copy.
        return {**self.__dict__, "_known_rows": -1, "_block_table": None}

    @property
    def _slabs(self) -> list[torch.Tensor]:
        return [slab[:, self._place] for slab in self._memory.slabs]

    def name(self) -> str:
        """The slot's name."""
        return self._name

    def block_size(self) -> int:
        """Rows per block."""
        return self._block_size

    def flat_size(self) -> int:
        """Elements per row, D."""
        return self.dim

    def num_rows(self) -> int:
        """Rows that memory is held for, in use or not."""
        return self._memory.rows

    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.num_rows() * self.dim * self.dtype.itemsize

    def values(self) -> list[torch.Tensor]:
        """The blocks in order, each [block_size, D]. Views, no copies."""
        return [block for slab in self._slabs for block in slab.split(self._block_size)]

    def value(self) -> torch.Tensor:
        """All rows that memory is held for, [rows, D]: a copy unless there is only one slab."""
        slabs = self._slabs
        if not slabs:
            return torch.empty(0, self.dim, dtype=self.dtype, device=self.device)
        return slabs[0] if len(slabs) == 1 else torch.cat(slabs)

    def copy_(self, other: Slot) -> None:
        """Hold memory for as many rows as another slot, and copy its rows, converted."""
        self.reserve(other.num_rows())
        begin, target = 0, self.value()
        for slab in other._slabs:
            target[begin : begin + slab.shape[0]].copy_(slab)
            begin += slab.shape[0]

    def addresses(self) -> np.ndarray:
        """The address of each block, [blocks] int64. Kept until the slot grows."""
        if self._known_rows != self._memory.rows:
            rows, size = self._memory.rows, self._block_size
            firsts = [
                slab.data_ptr() + size * self.row_bytes * np.arange(-(-slab.shape[0] // size))
                for slab in self._slabs
            ]
            addresses = np.concatenate([_NO_ADDRESSES, *firsts])
            self._addresses_at = addresses.ctypes.data  # asked for at every step: it is slow
            self._addresses, self._block_table = addresses, None
            self._known_rows = rows
        return self._addresses

    def addresses_at(self) -> int:
        """Where ``addresses`` begins in memory. Kept as long."""
        if self._known_rows != self._memory.rows:
            self.addresses()
        return self._addresses_at

    def has_block_table(self) -> bool:
        """Whether ``block_table`` is there, so that asking for it copies nothing."""
        return self._block_table is not None and self._known_rows == self._memory.rows

    def block_table(self) -> torch.Tensor:
        """``addresses`` as a tensor on the slot's device, [blocks] int64. Kept as long."""
        addresses = self.addresses()
        if self._block_table is None:
            table = torch.from_numpy(addresses.copy())
            if self.device.type == "cuda":  # from pinned memory, so that nobody waits
                table = table.pin_memory()
            self._block_table = table.to(self.device, non_blocking=True, copy=True)
        return self._block_table

    def reserve(self, rows: int) -> None:
        """Hold zeroed memory for at least ``rows`` rows; existing rows stay where they are."""
        self._memory.reserve(rows)

    def fill(self, value: float) -> None:
        """Set all elements, also of rows that are not in use."""
        for slab in self._slabs:
            slab.fill_(value)


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
