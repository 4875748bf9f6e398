"""Rows of a table in blocks of memory that stay where they are while the table grows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ._memory import empty

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
