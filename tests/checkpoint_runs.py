"""What the tests of checkpoints train: tables of all kinds, a dense part, two optimizers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch.optim import lr_scheduler

from cupy_sparse_adamw import (
    AdmitHook,
    FilterHook,
    HashTable,
    NormalInitializer,
    SparseAdamW,
    checkpoint,
    filter_out_sparse_param,
)

DIM = 3
MOMENTS = ("exp_avg", "exp_avg_sq")


class Model(torch.nn.Module):
    """Two HashTables, one of them with hooks, a sparse Embedding, tied weights, an extra state."""

    def __init__(self, dtype: torch.dtype, block_size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        initializer = NormalInitializer(generator=generator)
        self.plain = HashTable([DIM], block_size, dtype, initializer=initializer)
        self.hooked = HashTable(
            [DIM],
            block_size,
            dtype,
            initializer=initializer,
            filter_hook=FilterHook("LRU", {"max_rows": 40}),
            admit_hook=AdmitHook("Frequency", {"min_frequency": 2, "width": 64}),
            name="of another name",
        )
        self.embedding = torch.nn.Embedding(20, DIM, sparse=True, dtype=dtype)
        self.head = torch.nn.Linear(DIM, DIM, dtype=dtype)
        self.tied = torch.nn.Linear(DIM, DIM, dtype=dtype)
        self.tied.weight = self.head.weight
        with torch.no_grad():
            for x in (self.embedding.weight, self.head.weight, self.head.bias, self.tied.bias):
                x.copy_(torch.randn(x.shape, generator=generator))
        self.register_buffer("zero_dim", torch.tensor(1.5, dtype=torch.float64))
        self.register_buffer("none_there", torch.empty(0, 4))
        self.notes: dict[Any, Any] = {"seen": 0, 3: (None, float("-inf"), "ü")}

    def get_extra_state(self) -> Any:
        return self.notes

    def set_extra_state(self, state: Any) -> None:
        self.notes = state

    def forward(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.notes["seen"] += 1
        self.zero_dim.add_(0.25)
        x = self.plain(ids) + self.hooked(ids % 60)
        if self.embedding.weight.dtype.itemsize > 2 or self.embedding.weight.grad is None:
            x = x + self.embedding(rows)  # torch cannot add 16-bit sparse gradients
        return self.tied(self.head(x).tanh())


class Resumable:
    """What two trainings of tests have in common: all that a checkpoint must bring back."""

    model: torch.nn.Module
    tables: SparseAdamW
    dense: torch.optim.Optimizer
    schedulers: list[Any]
    generator: torch.Generator

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"tables": self.tables, "dense": self.dense}

    def extra(self) -> dict[str, Any]:
        return {
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "generator": self.generator.get_state(),
            # Dense gradients of micro-batches that wait are the loop's, as with torch.
            "grads": [p.grad for p in self.dense.param_groups[0]["params"]],
        }

    def go_on(self, path: Path) -> int:
        """Go back to a checkpoint. Returns its step."""
        loaded = checkpoint.load(path, self.model, self.optimizers)
        extra = loaded["extra"]
        for scheduler, state in zip(self.schedulers, extra["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        self.generator.set_state(extra["generator"])
        for p, grad in zip(self.dense.param_groups[0]["params"], extra["grads"], strict=True):
            p.grad = grad
        return loaded["step"]

    def state(self) -> dict[str, Any]:
        """All there is, a copy, tables by ascending id. Rows that are behind stay so here."""
        model, tables = copy.deepcopy((self.model, self.tables))
        return {
            "model": by_id(model.state_dict()),
            "tables": by_id(tables.state_dict()),
            **copy.deepcopy({"dense": self.dense.state_dict(), "extra": self.extra()}),
        }


class Training(Resumable):
    """Step i is a function of i alone. ``accumulate``: micro-batches in an update."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, block_size: int = 4, seed: int = 1, accumulate=1
    ) -> None:
        self.model = Model(dtype, block_size, seed)
        self.tables = SparseAdamW(
            {"embedding": self.model.embedding, "p": self.model.plain}, lr=torch.tensor(0.01)
        )
        hooked = filter_out_sparse_param(self.model)["of another name"]
        others = {"lr": 0.02, "weight_decay": 0.1, "untouched": "dense"}
        self.tables.add_param_group({"params": {"h": hooked}, **others})
        self.tables.set_grad_accum_steps(accumulate)
        rest = [*self.model.head.parameters(), self.model.tied.bias]
        self.dense = torch.optim.AdamW(rest, lr=0.01, amsgrad=True)
        self.schedulers = [
            lr_scheduler.MultiStepLR(self.dense, [2, 5, 5]),
            lr_scheduler.LinearLR(self.tables, 0.5, total_iters=6),
        ]
        self.accumulate = accumulate
        self.generator = torch.Generator().manual_seed(7)

    def micro_batch(self, i: int) -> None:
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(-9, 12 + 4 * i, (14,), generator=generator)
        rows = torch.randint(0, 20, (14,), generator=generator)
        noise = torch.randn(14, DIM, generator=self.generator)
        out = self.model(ids, rows)
        out.backward(noise.to(out.dtype))
        self.tables.step()
        self.tables.zero_grad()
        if i % self.accumulate == self.accumulate - 1:
            self.dense.step()
            self.dense.zero_grad()
            for scheduler in self.schedulers:
                scheduler.step()

    def play(self, begin: int, end: int) -> Training:
        for i in range(begin, end):
            self.micro_batch(i)
        return self

    def save(self, root: Path, step: int, **options: Any) -> Path:
        return checkpoint.save(
            root, self.model, self.optimizers, step=step, extra=self.extra(), **options
        )

    def load(self, path: Path) -> Training:
        self.go_on(path)
        return self


def by_id(state: Any) -> Any:
    """A state with the rows of each table, moments with them, in the order of their ids."""
    if not isinstance(state, dict):
        return state
    state = type(state)((key, by_id(value)) for key, value in state.items())
    for key in [key for key in state if isinstance(key, str) and f".{key}".endswith(".ids")]:
        prefix, ids = key.removesuffix("ids"), state[key]
        if "grad" in state:
            continue  # gradients are in the order of their occurrence
        for other, value in state.items():
            mine = isinstance(other, str) and other.startswith(prefix)
            name = other.removeprefix(prefix) if mine else ""
            if mine and "." not in name and name not in ("seed", "fan", "step", "dtype"):
                state[other] = value[ids.argsort()]
    return OrderedDict(state) if isinstance(state, OrderedDict) else state


def rows_of(table: HashTable) -> dict[int, list[list[float]]]:
    """Every value of every row, moments too, by id."""
    ids, rows = table.ids_map()
    slots = sorted(table.slot_group().slots(), key=lambda slot: slot.name())
    values = [torch.cat([*slot.values(), slot.value()[:0]])[rows].double() for slot in slots]
    return {int(i): [v[n].tolist() for v in values] for n, i in enumerate(ids)}
