"""What the tests of untouched rows train: a table of ours beside a dense one of torch's."""

from __future__ import annotations

import torch
from oracle import bits as bytes_of

from cupy_sparse_adamw import HashTable, SparseAdamW

ROWS, DIM = 24, 3
KINDS = ("HashTable", "Embedding", "EmbeddingBag")


def bits(x: torch.Tensor) -> bytes:
    """For bitwise comparison."""
    return bytes_of(x.cpu()).numpy().tobytes()


def make_table(kind: str, weights: torch.Tensor, dtype: torch.dtype = torch.float64):
    """A table of rows 0, 1, ... with these weights [R, D] float64."""
    rows, dim = weights.shape
    if kind == "HashTable":
        table = HashTable([dim], block_size=8, dtype=dtype, device=weights.device)
        table.insert(torch.arange(rows), weights.to(dtype))
        return table
    module = getattr(torch.nn, kind)(rows, dim, sparse=True, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(weights)
    return module


def look_up(table: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return table(ids[:, None]) if isinstance(table, torch.nn.EmbeddingBag) else table(ids)


class Run:
    """Our table and a dense float64 one, trained on the same batches; losses depend on weights."""

    def __init__(self, kind, dtype=torch.float64, mode="dense", rows=ROWS, dim=DIM, **settings):
        self.random = torch.Generator().manual_seed(11)
        weights = torch.randn(rows, dim, generator=self.random, dtype=torch.float64, device="cpu")
        weights = weights.to(torch.get_default_device())
        settings = {"lr": 1e-2, "weight_decay": 0.1, **settings}
        self.table = make_table(kind, weights, dtype)
        self.optimizer = SparseAdamW({"table": self.table}, untouched=mode, **settings)
        betas = settings.pop("beta1", 0.9), settings.pop("beta2", 0.999)
        self.dense = torch.nn.Parameter(weights.clone())
        self.dense_optimizer = torch.optim.AdamW([self.dense], betas=betas, **settings)

    def ids(self, count: int, below: int | None = None) -> torch.Tensor:
        high = self.dense.shape[0] if below is None else below
        ids = torch.randint(0, high, (count,), generator=self.random, device="cpu")
        return ids.to(self.dense.device)

    def backward(self, ids: torch.Tensor, *others: torch.Tensor) -> None:
        """Give ``ids`` gradients in both tables, and in other dense ones."""
        target = torch.randn(
            len(ids), self.dense.shape[1], generator=self.random, dtype=torch.float64, device="cpu"
        ).to(ids.device)
        read = [look_up(self.table, ids), *(dense[ids] for dense in (self.dense, *others))]
        for values in read:
            (torch.tanh(2 * values.double()) - target).pow(2).sum().backward()

    def step(self) -> None:
        for optimizer in (self.optimizer, self.dense_optimizer):
            optimizer.step()
            optimizer.zero_grad()

    def train(self, steps: int, count: int = 3, prepare=lambda run, i: None) -> None:
        for i in range(steps):
            prepare(self, i)
            self.backward(self.ids(count))
            self.step()

    def weights(self) -> torch.Tensor:
        rows = torch.arange(self.dense.shape[0])
        return self.optimizer.caught_up("table", rows).double()

    def error(self) -> float:
        """Largest difference to the dense table, relative to its largest element."""
        dense = self.dense.detach()
        error = (self.weights() - dense).abs().max() / dense.abs().max()
        return float(error)


def settings_of(**changes):
    """What ``prepare`` does to change the settings of both optimizers alike."""

    def prepare(run: Run, i: int) -> None:
        for key, value in changes.items():
            for optimizer in (run.optimizer, run.dense_optimizer):
                optimizer.param_groups[0][key] = value(i)

    return prepare
