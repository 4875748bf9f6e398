"""Memory that runs out in a save or a load, and Ctrl-C: see operations.py.

Of the folder the latest checkpoint counts, by what it loads. The one before it must load, too, and
an increment on what is there afterwards must have all that changed.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from operations import (
    SEEN_TWICE,
    SOAK,
    Case,
    World,
    ids_from,
    new_table,
    tensors_of,
    train,
)
from test_allocation import Shortage
from test_interruptions import Pressed

from cupy_sparse_adamw import FilterHook, checkpoint


@pytest.fixture(autouse=True)
def _small_and_fast(monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 2048)
    monkeypatch.setattr("os.fsync", lambda file: None)


class SavedWorld(World):
    """Two tables, an embedding, a dense layer, and a folder of checkpoints."""

    root: Path

    def __init__(self, untouched: str) -> None:
        torch.manual_seed(3)
        lru = FilterHook("LRU", {"max_rows": 60})
        tables = {"t": new_table(filter_hook=lru, **SEEN_TWICE), "p": new_table(5)}
        embeddings = {"weight": torch.nn.Embedding(12, 5, sparse=True)}
        super().__init__(tables, embeddings, steps=2, untouched=untouched)
        self.dense = torch.nn.Linear(3, 3)
        self.dense_optimizer = torch.optim.AdamW(self.dense.parameters(), lr=0.1)
        self.untouched = untouched

    @property
    def all(self) -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
        modules = {**self.tables, **self.embeddings, "dense": self.dense}
        return torch.nn.ModuleDict(modules), [self.optimizer, self.dense_optimizer]

    def train(self, begin: int, end: int) -> None:
        """An update, and a micro-batch that waits for the next."""
        for _ in range(2):
            train(self, ids_from(begin, end))
            self.optimizer.step()
            self.optimizer.zero_grad()
        train(self, ids_from(begin, end - 3))
        self.optimizer.step()
        self.dense(torch.ones(3)).sum().backward()
        self.dense_optimizer.step()

    def save(self, **options: Any) -> str:
        step = 1 + max([0, *(int(path.name[5:]) for path in self.root.glob("step-*"))])
        return checkpoint.save(self.root, *self.all, step=step, **options).name

    def in_memory(self) -> dict[str, Any]:
        found = super().snapshot()
        found |= tensors_of(dict(self.dense.state_dict()), "dense")
        return found | tensors_of(self.dense_optimizer.state_dict(), "its optimizer")

    def snapshot(self) -> dict[str, Any]:
        assert not list(self.root.glob(".saving*"))
        found = self.in_memory()
        for path in sorted(self.root.glob("step-*"))[-2:]:
            twin = SavedWorld(self.untouched)
            checkpoint.load(path, *twin.all)
            saved = {f"saved {key}": value for key, value in twin.in_memory().items()}
        return found | saved | {"latest": path.name}

    def go_on(self) -> World:
        super().go_on()
        self.save(incremental=True)
        return self


def saved(untouched: str = "skip") -> Callable[[], SavedWorld]:
    """A full checkpoint, an increment, and what was trained since."""

    def make() -> SavedWorld:
        world = SavedWorld(untouched)
        world.root = Path(tempfile.mkdtemp())
        weakref.finalize(world, shutil.rmtree, world.root)
        for begin in (0, 4):
            world.train(begin, 20)
            world.save(incremental=True)
        world.tables["p"].delete(ids_from(0, 3))
        world.train(6, 23)
        return world

    return make


def save(**options: Any) -> Callable[[SavedWorld], str]:
    return lambda world: world.save(**options)


def load(which: int) -> Callable[[SavedWorld], int]:
    def act(world: SavedWorld) -> int:
        return checkpoint.load(sorted(world.root.glob("step-*"))[which], *world.all)["step"]

    return act


def load_model(world: SavedWorld) -> None:
    path = sorted(world.root.glob("step-*"))[1]
    checkpoint.load(path, world.all[0])


#: Without memory to note changes a save or load is done all the same, and the next save is full.
CASES = {
    "save": Case(saved(), save(), survives=True),
    "save, an increment": Case(saved(), save(incremental=True), survives=True),
    "save, one kept": Case(saved(), save(keep=1), survives=True),
    "save, rows behind": Case(saved("dense"), save(incremental=True), 1e-5, survives=True),
    "load": Case(saved(), load(0), survives=True),
    "load, an increment": Case(saved(), load(1), survives=True),
    "load, of the model alone": Case(saved(), load_model, survives=True),
    "load, rows behind": Case(saved("dense"), load(1), 1e-5, survives=True),
}


@pytest.mark.parametrize("name", CASES)
def test_an_allocation_that_fails_leaves_all_as_before_or_after(name):
    at_most = 10_000 if SOAK else 10
    failures = CASES[name].run(Shortage, [MemoryError, RuntimeError], at_most)
    print(f"{name}: {failures} failures")


# Ctrl-C between open and with: the file is closed when nobody has it any more.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("name", CASES)
def test_ctrl_c_at_any_line_leaves_all_as_before_or_after(name):
    with torch.random.fork_rng():
        presses = CASES[name].run(Pressed, [KeyboardInterrupt], 200 if SOAK else 10)
    print(f"{name}: {presses} presses")
