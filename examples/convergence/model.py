"""The one model of the study, and the optimizers that are compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cupy_sparse_adamw import SparseAdamW

INIT_STD = 0.1
OURS = ("skip", "decay", "dense")
MODES = (*OURS, "adamw", "sparse_adam")


class Factors(nn.Module):
    """Scores [B]: an offset, two biases and the dot product of two rows of factors.

    A row of a table holds D factors and, as one more column, the bias.
    """

    def __init__(self, weights: dict[str, Tensor], offset: float, sparse: bool) -> None:
        super().__init__()
        self.offset = offset
        self.tables = nn.ModuleDict(
            {
                name: nn.Embedding.from_pretrained(weight, freeze=False, sparse=sparse)
                for name, weight in weights.items()
            }
        )

    def forward(self, ids: dict[str, Tensor]) -> Tensor:
        """Scores [B] for ids [B] of each table: ratings, or logits of a click."""
        left, right = (table(ids[name]) for name, table in self.tables.items())
        products = (left[:, :-1] * right[:, :-1]).sum(dim=1)
        return self.offset + left[:, -1] + right[:, -1] + products


def initial_weights(
    rows: dict[str, int], dim: int, seen: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Weights [rows, dim + 1] of each table, a function of the arguments alone.

    seen: the ids that training shows. All other rows are zeros and stay so in every mode, so that
    random numbers which nobody trained take no part in a score.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, count in rows.items():
        weight = torch.zeros(count, dim + 1)
        weight[:, :-1].normal_(std=INIT_STD, generator=generator)
        unseen = torch.ones(count, dtype=torch.bool)
        unseen[seen[name]] = False
        weight[unseen] = 0
        weights[name] = weight
    return weights


def make_optimizer(mode: str, model: Factors, lr: float, decay: float) -> torch.optim.Optimizer:
    """The optimizer of a mode; whether it needs sparse gradients says `mode != "adamw"`."""
    if mode in OURS:
        return SparseAdamW(dict(model.tables.items()), lr=lr, weight_decay=decay, untouched=mode)
    params = list(model.parameters())
    if mode == "adamw":  # fused is the quickest on the CPU
        return torch.optim.AdamW(params, lr=lr, weight_decay=decay, fused=True)
    if mode != "sparse_adam":
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if decay:
        raise ValueError(f"torch.optim.SparseAdam has no weight decay, got {decay}; pass 0")
    return torch.optim.SparseAdam(params, lr=lr)
