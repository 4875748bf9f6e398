"""The data structures that every layer shares: rows in blocks, pending gradients, one update."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import NamedTuple

import numpy as np
import torch

#: Table dtype -> dtype of its moments and of its update (SPEC: fp32, fp64 for fp64 tables).
MOMENT_DTYPE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}

#: Row number that means "no row": a lookup that found nothing. Its gradient is dropped.
MISSING = -1


class Slot:
    """One value of width D for each row of a table: its weights, or a moment.

    Rows live in blocks of ``block_size`` rows: row r is row ``r % block_size`` of block
    ``r // block_size``. Growing appends blocks, so no row ever moves. Blocks are cut from slabs
    whose size grows with the slot, so a large table needs few allocations.

    Args:
        name: the slot's name, as in RecIS ("embedding", "sparse_adamw_exp_avg", ...).
        dim: D, the width of a row in elements.
        block_size: rows per block.
        dtype: element type.
        device: where the blocks live.
    """

    def __init__(
        self, name: str, dim: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._name = name
        self._block_size = block_size
        self.dim = dim
        self.dtype = dtype
        self.device = device
        self._slabs: list[torch.Tensor] = []  # each [k * block_size, D], contiguous
        self._addresses: np.ndarray | None = None

    @classmethod
    def over(cls, name: str, weight: torch.Tensor) -> Slot:
        """The slot whose only block is ``weight`` [R, D] (contiguous) itself."""
        slot = cls(name, weight.shape[1], max(weight.shape[0], 1), weight.dtype, weight.device)
        slot._slabs.append(weight)
        return slot

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_addresses": None}  # addresses mean nothing in a copy

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
        return sum(slab.shape[0] for slab in self._slabs)

    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(slab.numel() * slab.element_size() for slab in self._slabs)

    def values(self) -> list[torch.Tensor]:
        """The blocks in order, each [block_size, D]. Views, no copies."""
        return [block for slab in self._slabs for block in slab.split(self._block_size)]

    def value(self) -> torch.Tensor:
        """All rows that memory is held for, [rows, D]: a copy unless there is only one slab."""
        if not self._slabs:
            return torch.empty(0, self.dim, dtype=self.dtype, device=self.device)
        return self._slabs[0] if len(self._slabs) == 1 else torch.cat(self._slabs)

    def to(self, device: torch.device, dtype: torch.dtype) -> Slot:
        """The same rows on another device or in another dtype; shared where nothing changes."""
        moved = Slot(self._name, self.dim, self._block_size, dtype, device)
        moved._slabs = [slab.to(device=device, dtype=dtype) for slab in self._slabs]
        return moved

    def addresses(self) -> np.ndarray:
        """The address of each block, [blocks] int64. Kept until the slot grows or changes."""
        if self._addresses is None:
            self._addresses = np.array([b.data_ptr() for b in self.values()], dtype=np.int64)
        return self._addresses

    def reserve(self, rows: int) -> None:
        """Hold zeroed memory for at least ``rows`` rows; existing rows stay where they are."""
        held = self.num_rows()
        if rows <= held:
            return
        blocks = max(-(-(rows - held) // self._block_size), held // self._block_size // 8)
        with torch.inference_mode(False):  # a slab outlives the mode that it is allocated in
            slab = torch.zeros(
                blocks * self._block_size, self.dim, dtype=self.dtype, device=self.device
            )
        self._slabs.append(slab)
        self._addresses = None


class PendingGrad(NamedTuple):
    """Gradients as backward left them: not reduced, not copied.

    ``rows`` [N] int64 may repeat; ``grad`` [N, D] may have any strides.
    """

    rows: torch.Tensor
    grad: torch.Tensor


class Hyperparams(NamedTuple):
    """The settings of one param group in one step, as Python floats."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclasses.dataclass
class Pending:
    """What one table brings to a step before anything is written.

    Attributes:
        name: the table's name, for error texts.
        param: the weights.
        num_rows: R; a row outside [0, R) is an IndexError.
        pieces: the gradients in order of occurrence, all of one dtype.
        drop_missing: rows equal to ``MISSING`` are dropped rather than out of range.
        grad_scale: factor on the sum of a row's gradients (1 / WORLD_SIZE).
        mean: divide a row's sum by its number of occurrences (``grad_reduce_by="id"``).
    """

    name: str
    param: Slot
    num_rows: int
    pieces: list[PendingGrad]
    drop_missing: bool = False
    grad_scale: float = 1.0
    mean: bool = False


@dataclasses.dataclass
class Update:
    """One table's part of ``sparse_adamw_``: its gradients, its moments and this step's scalars.

    ``step`` is t after this update, so at least 1.
    """

    pending: Pending
    exp_avg: Slot
    exp_avg_sq: Slot
    step: int
    hyper: Hyperparams


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
