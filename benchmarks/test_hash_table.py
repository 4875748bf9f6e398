"""A HashTable's training step and lookup, beside those of tables whose rows are numbered."""

from __future__ import annotations

import pytest
import timing
import torch
from cases import SETS, Case, Workload, lookup_bytes
from conftest import free_memory, note
from rivals import BETA1, BETA2, DECAY, EPS, LR, Contender, enter

from cupy_sparse_adamw import HashTable, SparseAdamW

CASE = Case("hash", dim=64, count=65_536)


def new_hash_table(work: Workload) -> HashTable:
    """A HashTable whose ids are the rows of the workload's table, inserted in another order."""
    table = HashTable([work.case.dim])
    order = torch.randperm(work.case.rows, generator=torch.Generator().manual_seed(3))
    for ids in order.split(1 << 16):
        table.insert(ids, work.initial()[ids])
    return table


class HashTraining(Contender):
    """Forward, backward and step of a HashTable that knows all ids."""

    name = "HashTable + SparseAdamW"
    copies = 4.0

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.table = new_hash_table(work)
        self.optimizer = SparseAdamW({"table": self.table}, LR, BETA1, BETA2, EPS, DECAY)

    def load(self, turn: int) -> None:
        self.ids, self.grad = self.work.ids[turn % SETS][0], self.work.values[turn % SETS][0]

    def step(self) -> None:
        self.table(self.ids).backward(self.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def weights(self) -> list[torch.Tensor]:
        return [self.table(torch.arange(self.work.case.rows))]


class EmbeddingTraining(HashTraining):
    """The same with torch's sparse embedding and SparseAdam."""

    name = "nn.Embedding + SparseAdam"
    rule = "sparse adam"
    decay = 0.0

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.table = torch.nn.Embedding.from_pretrained(
            work.new_weights()[0], freeze=False, sparse=True
        )
        self.optimizer = torch.optim.SparseAdam(self.table.parameters(), LR, (BETA1, BETA2), EPS)


class HashLookup(Contender):
    """Rows of known ids, in eval mode."""

    name = "HashTable lookup"
    copies = 1.5

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.table = new_hash_table(work).eval()

    def load(self, turn: int) -> None:
        self.ids = self.work.ids[turn % SETS][0]

    @torch.no_grad()
    def step(self) -> None:
        self.result = self.table(self.ids)


class IndexSelect(HashLookup):
    """The same rows, by number, of one tensor."""

    name = "index_select"

    def __init__(self, work: Workload, hashed: HashLookup) -> None:
        self.work = work
        ids, rows = hashed.table.ids_map()
        row_of = torch.empty_like(rows)
        row_of[ids] = rows
        self.rows = [row_of[ids[0]] for ids in work.ids]
        self.weight = torch.empty(work.case.rows, work.case.dim)
        self.weight[rows] = work.initial()[ids]

    def load(self, turn: int) -> None:
        self.ids = self.rows[turn % SETS]

    def step(self) -> None:
        self.result = self.weight.index_select(0, self.ids)


@pytest.mark.quick
def test_training(benchmark, request, copy, shrink, rounds):
    work = Workload(shrink(CASE))
    (ours, theirs), _ = enter(work, (HashTraining, EmbeddingTraining), free_memory())
    work.release()
    race = timing.Race(ours, [copy, theirs], rounds=rounds)
    seconds = race.run(benchmark)
    note(benchmark, request, "hash-train", timing.summary(race, seconds))


@pytest.mark.quick
def test_lookup(benchmark, request, copy, shrink, rounds):
    work = Workload(shrink(CASE))
    ours = HashLookup(work)
    theirs = IndexSelect(work, ours)
    for turn in range(SETS):
        for contender in (ours, theirs):
            contender.load(turn)
            contender.step()
        wanted = work.initial()[work.ids[turn][0]]
        assert torch.equal(ours.result, wanted), "the HashTable's rows are wrong"
        assert torch.equal(theirs.result, wanted), "index_select's rows are wrong"
    race = timing.Race(ours, [copy, theirs], rounds=rounds)
    seconds = race.run(benchmark)
    case = work.case
    figures = timing.summary(race, seconds, lookup_bytes(case.count, case.dim))
    figures["figures"] = {"of index_select": 1 / figures["rivals"][theirs.name]["ratio"]}
    note(benchmark, request, "hash-lookup", figures)
