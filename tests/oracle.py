"""What the tests compare with: SPEC §1 in NumPy float64, one row at a time, and the tolerances.

It shares no code with the package on purpose.
"""

from __future__ import annotations

import numpy as np
import torch

from cupy_sparse_adamw import functional
from cupy_sparse_adamw._slots import Slot
from cupy_sparse_adamw._types import MISSING

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

#: Largest max|x - x64| / max|x64| over 100 steps, as (param, moments) (SPEC §1). 16-bit weights are
#: held to their own rounding by ``within_one_ulp`` instead; their moments are float32.
TOLERANCE = {
    torch.float32: (2e-6, 1e-6),
    torch.float64: (1e-12, 1e-12),
    torch.float16: (None, 1e-6),
    torch.bfloat16: (None, 1e-6),
}


def _array(x) -> np.ndarray:
    return torch.as_tensor(x).detach().double().cpu().numpy()


class Oracle:
    """One table in float64. ``step`` takes rows [N] and grads [N, D] with duplicates."""

    def __init__(
        self, param: torch.Tensor, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2
    ) -> None:
        self.param = _array(param).copy()
        self.exp_avg = np.zeros_like(self.param)
        self.exp_avg_sq = np.zeros_like(self.param)
        self.lr, self.beta1, self.beta2 = lr, beta1, beta2
        self.eps, self.weight_decay = eps, weight_decay
        self.t = 0

    def step(self, rows, grads, scale: float = 1.0, mean: bool = False) -> None:
        self.t += 1
        sums: dict[int, np.ndarray] = {}
        counts: dict[int, int] = {}
        for row, grad in zip(_array(rows).astype(int).tolist(), _array(grads), strict=True):
            sums[row] = sums.get(row, 0.0) + grad
            counts[row] = counts.get(row, 0) + 1
        for row, total in sums.items():
            g = total * scale / (counts[row] if mean else 1)
            m, v, w = self.exp_avg[row], self.exp_avg_sq[row], self.param[row]
            m += (1 - self.beta1) * (g - m)
            v += (1 - self.beta2) * (g * g - v)
            m_hat = m / (1 - self.beta1**self.t)
            v_hat = v / (1 - self.beta2**self.t)
            w -= self.lr * (m_hat / (np.sqrt(v_hat) + self.eps) + self.weight_decay * w)


def relative_error(x: torch.Tensor, exact: np.ndarray) -> float:
    """SPEC §1's norm, max|x - x64| / max|x64|."""
    return float(np.abs(_array(x) - exact).max() / np.abs(exact).max())


def within_one_ulp(x: torch.Tensor, exact: np.ndarray) -> bool:
    """Each element of a 16-bit tensor is the rounded exact value or one of its two neighbours."""
    x = x.cpu()
    rounded = torch.from_numpy(exact).to(x.dtype)
    below, above = (
        torch.nextafter(rounded, torch.full_like(rounded, end)) for end in (-torch.inf, torch.inf)
    )
    return bool(((x >= below) & (x <= above)).all())


def slot_of(values: torch.Tensor, block_size: int) -> Slot:
    """A slot of several blocks that holds ``values`` [R, D], then zeros to the end of a block."""
    slot = Slot("test", values.shape[1], block_size, values.dtype, values.device)
    return _filled(slot, values)


def moments_of(exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, block_size: int) -> list[Slot]:
    """The same for both moments, each [R, D], as a table on this engine has them."""
    if not functional.pairs_moments(exp_avg.device):
        return [slot_of(values, block_size) for values in (exp_avg, exp_avg_sq)]
    names, dim = ("exp_avg", "exp_avg_sq"), exp_avg.shape[1]
    slots = Slot.side_by_side(names, dim, block_size, exp_avg.dtype, exp_avg.device)
    return [_filled(slot, x) for slot, x in zip(slots, (exp_avg, exp_avg_sq), strict=True)]


def _filled(slot: Slot, values: torch.Tensor) -> Slot:
    size = slot.block_size()
    for begin in range(0, values.shape[0], size):  # one slab a block: the worst layout
        slot.reserve(begin + 1)
        part = values[begin : begin + size]
        slot.values()[begin // size][: part.shape[0]] = part
    return slot


def hot_batch(size: int, counts: list[int]) -> torch.Tensor:
    """Rows [N] in random order: row i ``counts[i]`` times, 50 others, and 9 that are missing.

    The last of the ``size`` rows is not among them.
    """
    rows = [torch.full((n,), row) for row, n in enumerate(counts)]
    rows.append(torch.randint(0, size - 1, (50,)))
    rows.append(torch.full((9,), MISSING))
    together = torch.cat(rows)
    return together[torch.randperm(together.numel())]


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, for bitwise comparison (NaN equals itself, -0.0 is not 0.0)."""
    return x.detach().contiguous().view(torch.uint8) if x.numel() else x.detach().reshape(-1)
