"""Tables, gradients and optimizers that the parts of gpu_check.py work on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from gpu_harness import sparse
from oracle import bits

from cupy_sparse_adamw import AdmitHook, HashTable, NormalInitializer, SparseAdamW


def draw_rows(count: int, num_rows: int, draw: torch.Generator) -> torch.Tensor:
    """Rows [count] on the CPU, a third of them row 3: a run that is summed in several parts."""
    rows = torch.randint(num_rows, (count,), generator=draw)
    rows[::3] = 3
    return rows


class Setup:
    """Tables of four groups with gradients that stay, and their optimizer. Each one is the same.

    torch.sort takes up to 4,096 keys in one block, and more by a radix sort: two groups have so
    many gradients.

    Args:
        lr: a float, or a tensor on the GPU.
    """

    ROWS, COUNT = 200, 1500
    MANY = 6000

    def __init__(self, lr: float | torch.Tensor = 1e-2) -> None:
        draw = torch.Generator().manual_seed(0)
        self.weights = {}
        for name, dtype, dim, count in (
            ("wide", torch.float32, 64, self.MANY),
            ("odd", torch.float32, 7, self.COUNT),
            ("half", torch.float16, 16, self.COUNT),
        ):
            values = torch.randn(self.ROWS, dim, generator=draw)
            weight = torch.nn.Parameter(values.to("cuda", dtype))
            rows = draw_rows(count, self.ROWS, draw).cuda()
            grad = torch.randn(count, dim, generator=draw).to("cuda", dtype)
            weight.grad = sparse(rows, grad, self.ROWS)
            self.weights[name] = weight
        initializer = NormalInitializer(generator=torch.Generator().manual_seed(1))
        self.table = HashTable([16], 64, device="cuda", initializer=initializer)
        with torch.no_grad():
            self.table(torch.arange(self.ROWS, device="cuda"))
        # Which new id gets which row is not determined: find them.
        ids, rows = self.table.ids_map()
        rows = rows[ids.argsort()][draw_rows(self.MANY, self.ROWS, draw).cuda()]
        self.table.accept_grad(rows, torch.randn(self.MANY, 16, generator=draw).cuda())
        self.lr = lr
        self.optimizer = SparseAdamW({**self.weights, "table": self.table}, lr=lr)

    def contents(self) -> dict[str, torch.Tensor]:
        """Weights, moments and t of every table; a HashTable's in the order of its ids."""
        found: dict[str, torch.Tensor] = {}
        ids, _ = self.table.ids_map()
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        weights["table"] = self.table.embeddings()[ids.argsort()]
        for name, state in self.optimizer.state_dict()["state"].items():
            order = state["ids"].argsort() if "ids" in state else slice(None)
            found[f"{name} weights"] = weights[name].clone()
            found[f"{name} step"] = torch.tensor([state["step"]])
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name} {key}"] = state[key][order].clone()
        return found


class Pair:
    """Two HashTables of one group, trained by lookups that insert nothing. Each one is the same."""

    KNOWN, COUNT = 300, 5000

    def __init__(self) -> None:
        self.ids = torch.zeros(self.COUNT, dtype=torch.int64, device="cuda")
        self.tables = {}
        for i, name in enumerate("ab"):
            table = self.tables[name] = hash_table(16, name, seed=i)
            table.reserve(2000)
            table(torch.arange(self.KNOWN, device="cuda"))
        self.optimizer = SparseAdamW(self.tables, lr=0.05)

    def step(self) -> None:
        """Lookup, loss, backward, step."""
        read_only = AdmitHook("ReadOnly")
        losses = [table(self.ids, read_only).pow(2).sum() for table in self.tables.values()]
        sum(losses).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def contents(self) -> dict[str, torch.Tensor]:
        """What is in the tables and in their state."""
        return contents_by_id(self.tables, self.optimizer)


def hash_table(dim: int, name: str | None = None, seed: int = 0) -> HashTable:
    """A table whose new rows depend on the seed alone."""
    initializer = NormalInitializer(generator=torch.Generator().manual_seed(seed))
    return HashTable([dim], 64, device="cuda", initializer=initializer, name=name)


def contents_by_id(
    tables: Mapping[str, HashTable], optimizer: SparseAdamW
) -> dict[str, torch.Tensor]:
    """Copies of the embeddings, moments and t of HashTables, rows in the order of their ids."""
    found: dict[str, torch.Tensor] = {}
    for name, state in optimizer.state_dict()["state"].items():
        order = state["ids"].argsort()
        found[f"{name} embedding"] = tables[name].embeddings()[order]
        found[f"{name} step"] = torch.tensor([state["step"]])
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{name} {key}"] = state[key][order]
    return found


def differences(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> list[str]:
    """Names of tensors that are not the same bit for bit."""
    return [
        name
        for name in expected
        if name not in found or not torch.equal(bits(found[name]), bits(expected[name]))
    ]
