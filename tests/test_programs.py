"""A HashTable under SparseAdamW against a dict of rows, on programs that Hypothesis makes up.

SOAK=1 runs all of docs/reliability.md, of which every other test run does a tenth. Programs are the
same in every run, so a failure repeats.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from cupy_sparse_adamw import (
    AdmitHook,
    FilterHook,
    HashTable,
    NormalInitializer,
    SparseAdamW,
    checkpoint,
    functional,
)
from cupy_sparse_adamw.policies import SPARE
from cupy_sparse_adamw.row_store import EMBEDDING, EXP_AVG, EXP_AVG_SQ, MAX_LOAD

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SHARE = 1 if os.environ.get("SOAK") else 10
PROGRAMS = 5000 // SHARE

LR, WEIGHT_DECAY, BETA1, BETA2, EPS = 0.1, 0.01, 0.9, 0.999, 1e-8
SKETCH = 1024  # counters in a line: too many for the few ids of a program to share all of theirs

#: Few values, so that programs hit known ids often, and the ends of the range.
IDS = st.one_of(st.integers(-3, 12), st.sampled_from([2**63 - 1, -(2**63), 2**32, 2**62]))
#: Some more often than others, or few programs would get as far as a second update.
OPERATIONS = (
    ["train"] * 8
    + ["backward"] * 8
    + ["step"] * 6
    + ["zero_grad"] * 3
    + ["delete"] * 4
    + ["insert"] * 3
    + ["without gradient"] * 2
    + ["eval"] * 2
    + ["read-only"] * 2
    + ["save"] * 2
    + ["load"] * 2
    + ["load into a new one", "save a checkpoint", "clear", "accept_grad"]
)
PROGRAM = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.lists(IDS, max_size=7), st.integers(0, 16)),
    min_size=6,
    max_size=24,
)
SETTINGS = st.fixed_dictionaries(
    {
        "dim": st.sampled_from([1, 3]),
        "block_size": st.sampled_from([1, 2, 4, 64]),
        "evicts": st.sampled_from([None, None, "LRU", "LFU"]),
        "max_rows": st.sampled_from([6, 10, 18]),
        "min_frequency": st.sampled_from([None, None, 2, 3]),
        "grad_reduce_by": st.sampled_from(["worker", "id"]),
        "grad_accum_steps": st.sampled_from([1, 1, 2, 3]),
        "untouched": st.sampled_from(["skip", "skip", "decay", "dense"]),
    }
)


def values(number: int, count: int, dim: int) -> np.ndarray:
    """[count, dim] multiples of 1/8, whose sums are exact."""
    places = np.arange(count)[:, None] * 3 + np.arange(dim) * 5
    return ((number * 7 + places) % 17 - 8) / 8


class Row:
    """What the model keeps of an id."""

    def __init__(self, weight: np.ndarray) -> None:
        self.weight = weight.copy()
        self.exp_avg = np.zeros_like(weight)
        self.exp_avg_sq = np.zeros_like(weight)
        self.rank = 0  # what LRU or LFU keeps


class Grads:
    """A lookup that waits for backward, or gradients that wait for a step."""

    def __init__(self, ids: list[int], has_row: list[bool]) -> None:
        self.ids, self.has_row = ids, has_row
        self.grad: np.ndarray | None = None
        self.is_pinned = True

    def pinned(self) -> set[int]:
        has_row = zip(self.ids, self.has_row, strict=True)
        return {id_ for id_, has in has_row if has} if self.is_pinned else set()


class State:
    """All that the model knows, in plain Python; a saved state is a deep copy."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.t = 0
        self.accumulated = 0
        self.pending: list[Grads] = []
        self.clock = 0
        self.sightings: Counter[int] = Counter()

    def saved(self) -> State:
        """As ``state_dict`` has it: gradients only of micro-batches that a step has counted."""
        twin = copy.deepcopy(self)
        twin.pending = []
        for grads in self.pending if self.accumulated else []:
            kept = [
                has and id_ in self.rows for id_, has in zip(grads.ids, grads.has_row, strict=True)
            ]
            left = Grads([id_ for id_, k in zip(grads.ids, kept, strict=True) if k], [])
            left.has_row = [True] * len(left.ids)
            left.grad = grads.grad[np.array(kept, dtype=bool)]
            twin.pending.append(left)
        return twin


class World:
    """A table, and beside it the model: both run every operation, then ``check`` compares."""

    def __init__(self, settings: dict, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.dim = settings["dim"]
        self.table, self.optimizer = self.new_table()
        self.fresh = HashTable([self.dim], dtype=torch.float64, initializer=self.initializer())
        self.state = State()
        self.lookups: list[tuple[torch.Tensor, Grads]] = []
        self.saves: list[tuple[object, State]] = []
        self.checks = 0

    @staticmethod
    def initializer() -> NormalInitializer:
        return NormalInitializer(generator=torch.Generator().manual_seed(5))

    def new_table(self) -> tuple[HashTable, SparseAdamW]:
        settings = self.settings
        filter_hook = admit_hook = None
        if settings["evicts"]:
            filter_hook = FilterHook(settings["evicts"], {"max_rows": settings["max_rows"]})
        if settings["min_frequency"]:
            params = {"min_frequency": settings["min_frequency"], "width": SKETCH}
            admit_hook = AdmitHook("Frequency", params)
        table = HashTable(
            [self.dim],
            settings["block_size"],
            torch.float64,
            initializer=self.initializer(),
            grad_reduce_by=settings["grad_reduce_by"],
            filter_hook=filter_hook,
            admit_hook=admit_hook,
        )
        optimizer = SparseAdamW(
            {"table": table}, LR, BETA1, BETA2, EPS, WEIGHT_DECAY, untouched=settings["untouched"]
        )
        optimizer.set_grad_accum_steps(settings["grad_accum_steps"])
        return table, optimizer

    # ------------------------------------------------------------------ the model

    def pinned(self) -> set[int]:
        grads = [*self.state.pending, *(grads for _, grads in self.lookups)]
        return set().union(*(x.pinned() for x in grads)) & self.state.rows.keys()

    def use(self, ids: list[int]) -> None:
        """What LRU and LFU note of a lookup in training mode."""
        state = self.state
        state.clock += 1
        for id_ in ids:
            if id_ in state.rows:
                row = state.rows[id_]
                row.rank = state.clock if self.settings["evicts"] == "LRU" else row.rank + 1

    def admit(self, ids: list[int], min_frequency: int | None) -> bool:
        """Give new ids their rows; False if a full table can let none go."""
        rows, sightings = self.state.rows, self.state.sightings
        new = sorted({id_ for id_ in ids if id_ not in rows})
        if min_frequency:
            sightings.update(id_ for id_ in ids if id_ not in rows)
            new = [id_ for id_ in new if sightings[id_] >= min_frequency]
        excess = len(rows) + len(new) - self.settings["max_rows"]
        if self.settings["evicts"] and new and excess > 0:
            free = rows.keys() - set(ids) - self.pinned()
            if len(free) < excess:
                return False
            going = sorted(free, key=lambda id_: (rows[id_].rank, id_))
            for id_ in going[: excess + self.settings["max_rows"] // SPARE]:
                del rows[id_]
        for id_ in new:
            rows[id_] = Row(self.fresh(torch.tensor([id_])).detach().numpy()[0])
        self.use(ids)
        return True

    def update(self) -> None:
        state = self.state
        if not state.pending:
            return
        state.t += 1
        sums: dict[int, np.ndarray] = {}
        counts: Counter[int] = Counter()
        for grads in state.pending:
            for id_, has, grad in zip(grads.ids, grads.has_row, grads.grad, strict=True):
                if has and id_ in state.rows:
                    sums[id_] = sums.get(id_, 0.0) + grad
                    counts[id_] += 1
        untouched = self.settings["untouched"]
        for id_, row in state.rows.items():
            if id_ not in sums and untouched != "dense":
                row.weight *= 1 - LR * WEIGHT_DECAY if untouched == "decay" else 1
                continue
            g = sums.get(id_, np.zeros(self.dim))
            if self.settings["grad_reduce_by"] == "id":
                g = g / max(counts[id_], 1)
            row.exp_avg += (1 - BETA1) * (g - row.exp_avg)
            row.exp_avg_sq += (1 - BETA2) * (g * g - row.exp_avg_sq)
            denom = np.sqrt(row.exp_avg_sq / (1 - BETA2**state.t)) + EPS
            step = row.exp_avg / (1 - BETA1**state.t) / denom
            row.weight -= LR * (step + WEIGHT_DECAY * row.weight)

    # ------------------------------------------------------------------ operations

    def run(self, what: str, ids: list[int], number: int) -> None:
        if what in ("train", "without gradient", "eval", "read-only"):
            self.look_up(what, ids)
        elif what.startswith("save"):
            self.save(is_checkpoint=what == "save a checkpoint")
        elif what.startswith("load"):
            self.load(number, is_new=what == "load into a new one")
        else:
            getattr(self, what)(ids, number)

    def look_up(self, what: str, ids: list[int]) -> None:
        keys = torch.tensor(ids, dtype=torch.int64)
        hook = AdmitHook("ReadOnly") if what == "read-only" else None
        fits = True
        if what in ("train", "without gradient"):
            fits = self.admit(ids, self.settings["min_frequency"])
        elif what == "read-only":
            self.use(ids)
        self.table.train(what != "eval")
        with torch.set_grad_enabled(what != "without gradient"):
            if not fits:
                with pytest.raises(RuntimeError, match="max_rows"):
                    self.table(keys)
                return
            found = self.table(keys, hook)
        zeros = np.zeros(self.dim)
        rows = self.state.rows
        expected = [rows[id_].weight if id_ in rows else zeros for id_ in ids]
        assert_close(found, expected, self.dim)
        if what != "without gradient":
            self.lookups.append((found, Grads(ids, [id_ in rows for id_ in ids])))
            del self.lookups[:-4]

    def backward(self, ids: list[int], number: int) -> None:
        if not self.lookups:
            return
        found, grads = self.lookups.pop(number % len(self.lookups))
        grads.grad = values(number, len(grads.ids), self.dim)
        grads.is_pinned = True
        found.backward(torch.tensor(grads.grad))
        self.state.pending.append(grads)

    def accept_grad(self, ids: list[int], number: int) -> None:
        ids = [id_ for id_ in ids if id_ in self.state.rows]
        rows = self.table._store.find(torch.tensor(ids, dtype=torch.int64))
        grads = Grads(ids, [True] * len(ids))
        grads.grad = values(number, len(ids), self.dim)
        self.table.accept_grad(rows, torch.tensor(grads.grad))
        self.state.pending.append(grads)

    def step(self, ids: list[int], number: int) -> None:
        self.optimizer.step()
        self.state.accumulated += 1
        if self.state.accumulated >= self.settings["grad_accum_steps"]:
            self.state.accumulated = 0
            self.update()

    def zero_grad(self, ids: list[int], number: int) -> None:
        self.optimizer.zero_grad()
        if self.state.accumulated == 0:
            self.drop_gradients()

    def drop_gradients(self) -> None:
        self.state.pending = []
        for _, grads in self.lookups:
            grads.is_pinned = False

    def delete(self, ids: list[int], number: int) -> None:
        self.table.delete(torch.tensor(ids, dtype=torch.int64))
        for id_ in ids:
            self.state.rows.pop(id_, None)

    def clear(self, ids: list[int], number: int) -> None:
        self.table.clear()
        self.state.rows.clear()

    def insert(self, ids: list[int], number: int) -> None:
        keys, new = torch.tensor(ids, dtype=torch.int64), values(number, len(ids), self.dim)
        if not self.admit(ids, None):
            with pytest.raises(RuntimeError, match="max_rows"):
                self.table.insert(keys, torch.tensor(new))
            return
        self.table.insert(keys, torch.tensor(new))
        for id_, value in zip(ids, new, strict=True):
            self.state.rows[id_].weight = value.copy()

    def save(self, is_checkpoint: bool) -> None:
        if is_checkpoint:
            path = self.folder / str(len(self.saves))
            module = torch.nn.ModuleDict({"table": self.table})
            saved = checkpoint.save(path, model=module, optimizer=self.optimizer, step=0)
        else:
            saved = copy.deepcopy((self.table.state_dict(), self.optimizer.state_dict()))
        self.saves.append((saved, self.state.saved()))

    def load(self, number: int, is_new: bool) -> None:
        if not self.saves:
            return
        saved, state = self.saves[number % len(self.saves)]
        if is_new:
            self.table, self.optimizer = self.new_table()
            self.lookups.clear()
            self.state = State()
        if isinstance(saved, tuple):
            self.table.load_state_dict(saved[0])
            self.optimizer.load_state_dict(saved[1])
        else:
            module = torch.nn.ModuleDict({"table": self.table})
            checkpoint.load(saved, model=module, optimizer=self.optimizer)
        before, self.state = self.state, copy.deepcopy(state)
        if state.accumulated:
            return  # the saved micro-batches are in place of those here
        self.state.pending = before.pending
        if before.accumulated:
            self.drop_gradients()

    # ------------------------------------------------------------------ comparison

    def check(self) -> None:
        table, store, rows = self.table, self.table._store, self.state.rows
        ids, places = table.ids_map()
        keys = ids.tolist()
        assert Counter(keys) == Counter(rows.keys())
        assert len(table) == len(rows)
        numbered, num_free, _ = store._index.counters.tolist()
        free = store._index.free_rows[:num_free].tolist()
        assert sorted(free + places.tolist()) == list(range(numbered))
        entries = store._index.entries
        assert int((entries[:, 1] != -1).sum()) <= entries.shape[0] * MAX_LOAD
        names = {EMBEDDING: "weight", EXP_AVG: "exp_avg", EXP_AVG_SQ: "exp_avg_sq"}
        if self.settings["untouched"] != "skip":
            current = self.optimizer.caught_up("table", ids)
            assert_close(current, [rows[id_].weight for id_ in keys], self.dim)
            self.checks += 1
            if self.checks % 5:
                names = {}  # rows may be behind; every fifth time they are not
            else:
                self.optimizer.flush()
        for name, attribute in names.items():
            expected = [getattr(rows[id_], attribute) for id_ in keys]
            if name in store.slots:
                assert_close(functional.gather(store.slots[name], places), expected, self.dim)
            else:
                assert not np.any(expected)
        assert int(self.optimizer.state.get(table, {}).get("step", 0)) == self.state.t
        if self.settings["evicts"]:
            slot = table.slot_group().slot_by_index(1)
            ranks = functional.gather(slot, places).flatten().tolist()
            assert ranks == [rows[id_].rank for id_ in keys]
        id_of = dict(zip(places.tolist(), keys, strict=True))
        assert {id_of[row] for row in table.pending_rows().tolist()} == self.pinned()


def assert_close(found: torch.Tensor, expected: list[np.ndarray], dim: int) -> None:
    right = np.array(expected).reshape(len(expected), dim)
    np.testing.assert_allclose(found.detach().numpy(), right, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "engine", ["cpu", pytest.param("emulated", marks=pytest.mark.emulated)], indirect=True
)
def test_a_table_under_its_optimizer_is_a_dict_of_rows(engine):
    """Lookups, gradients, steps, insertions, deletions, evictions, saves and loads in any order."""

    @hypothesis.settings(
        max_examples=PROGRAMS,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(SETTINGS, PROGRAM)
    def run(settings, program):
        with tempfile.TemporaryDirectory() as folder:
            world = World(settings, Path(folder))
            for operation in program:
                world.run(*operation)
                world.check()

    run()
