"""A DeepFM rating model and the three ways of training its tables.

DeepFM: Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction",
IJCAI 2017 (here with a squared loss on ratings).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from cupy_sparse_adamw import HashTable, NormalInitializer, SparseAdamW, filter_out_sparse_param

RUNS = ("sparse_adamw", "sparse_adam", "adamw")

INIT_STD = 0.01
BLOCK_SIZE = 64  # rows; most of these tables are small, and each slot holds whole blocks
HIDDEN = (64, 32)

Batch = dict[str, tuple[Tensor, Tensor | None]]


class DeepFM(nn.Module):
    """Predicts ratings [B] from a batch of fields (ids [B] or bags [B, W] with weights).

    A table row holds the embedding (D) and, as one more column, the field's linear weight.
    """

    def __init__(
        self, fields: list[str], dim: int, bias: float, make_table: Callable[[str, int], nn.Module]
    ) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))
        widths = [len(fields) * dim, *HIDDEN]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        # The tables come last: the layers above start alike, whatever a table draws.
        self.tables = nn.ModuleDict({name: make_table(name, dim + 1) for name in fields})

    def forward(self, batch: Batch) -> Tensor:
        """Ratings [B], not clipped."""
        rows = torch.stack([self._look_up(name, *batch[name]) for name in self.tables], dim=1)
        embedding, linear = rows[..., :-1], rows[..., -1]  # [B, F, D], [B, F]
        sum_of_squares = embedding.square().sum(dim=1)
        pairs = (embedding.sum(dim=1).square() - sum_of_squares).sum(dim=1) / 2
        deep = self.mlp(embedding.flatten(1)).squeeze(1)
        ratings: Tensor = self.bias + linear.sum(dim=1) + pairs + deep
        return ratings

    def _look_up(self, name: str, ids: Tensor, weight: Tensor | None) -> Tensor:
        rows: Tensor = self.tables[name](ids)
        return rows if weight is None else (rows * weight.unsqueeze(-1)).sum(dim=1)


def build(
    run: str,
    rows: dict[str, int],
    dim: int,
    bias: float,
    lr: float,
    weight_decay: float,
    device: torch.device,
) -> tuple[DeepFM, torch.optim.Optimizer, torch.optim.Optimizer]:
    """The model of a run, the optimizer of its tables, and that of its dense layers.

    rows: for each field the number of rows of an nn.Embedding, the last one for unknown ids;
    a HashTable has no use for it.
    """

    def hash_table(name: str, width: int) -> nn.Module:
        return HashTable(
            [width],
            block_size=BLOCK_SIZE,
            device=device,
            initializer=NormalInitializer(std=INIT_STD),
            name=name,
        )

    def embedding(name: str, width: int) -> nn.Module:
        table = nn.Embedding(rows[name], width, sparse=run == "sparse_adam", device=device)
        nn.init.normal_(table.weight, std=INIT_STD)
        with torch.no_grad():
            table.weight[-1].zero_()  # unknown ids read as zeros, as in a HashTable
        return table

    model = DeepFM(list(rows), dim, bias, hash_table if run == "sparse_adamw" else embedding)
    model.to(device)
    table_params = list(model.tables.parameters())
    tables: torch.optim.Optimizer
    if run == "sparse_adamw":
        tables = SparseAdamW(filter_out_sparse_param(model), lr=lr, weight_decay=weight_decay)
    elif run == "sparse_adam":
        tables = torch.optim.SparseAdam(table_params, lr=lr)
    elif run == "adamw":
        tables = torch.optim.AdamW(table_params, lr=lr, weight_decay=weight_decay)
    else:
        raise ValueError(f"run must be one of {', '.join(RUNS)}, got {run!r}")
    dense_params = [model.bias, *model.mlp.parameters()]
    dense = torch.optim.AdamW(dense_params, lr=lr)
    return model, tables, dense


def table_bytes(model: DeepFM, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of memory held for the tables and their moments, with a HashTable's index and spare."""
    tables = list(filter_out_sparse_param(model).values())
    if tables and isinstance(tables[0], HashTable):
        return sum(table.nbytes for table in tables)  # moments included
    weights = list(model.tables.parameters())
    moments = [
        state[name]
        for state in optimizer.state_dict()["state"].values()
        for name in ("exp_avg", "exp_avg_sq")
    ]
    return sum(tensor.nbytes for tensor in weights + moments)
