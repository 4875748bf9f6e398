"""The hash index, gather and scatter_ on every engine, against a dict and plain indexing."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, bits, slot_of

from cupy_sparse_adamw import functional
from cupy_sparse_adamw._slots import Slot
from cupy_sparse_adamw._types import (
    DELETED,
    MISSING,
    Distribution,
    DistributionKind,
    RowIndex,
)
from cupy_sparse_adamw.reference.index import _home as reference_home

EXTREMES = [0, -1, 1, 2**63 - 1, -(2**63), 2**32, -(2**32)]
UNIFORM = Distribution(DistributionKind.UNIFORM, low=1.0, high=2.0)
SEED = 5


def empty_index(capacity: int) -> torch.Tensor:
    return torch.full((capacity, 2), MISSING)


class Rows:
    """An index of ids and the slots of their rows, which are known to be in use from 0 up."""

    def __init__(self, capacity: int, rows: int, numbered: int = 0, free: tuple[int, ...] = ()):
        """Room for ``rows`` rows; ``numbered`` of them are taken, but those in ``free``."""
        counters = torch.tensor([numbered, len(free), 0])
        behind = [77, 78]  # what stands behind the free rows means nothing
        self.index = RowIndex(empty_index(capacity), counters, torch.tensor([*free, *behind]))
        self.ids_by_row = Slot("ids", 1, 7, torch.int64, counters.device)
        self.embedding = Slot("embedding", 5, 7, torch.float32, counters.device)
        for slot in (self.ids_by_row, self.embedding):
            slot.reserve(rows)
        self.expected: dict[int, int] = {}

    def insert(self, ids: list[int]) -> list[int]:
        """Rows of ids: those that had one before have it still, others have one of their own."""
        keys = torch.tensor(ids, dtype=torch.int64)
        rows = functional.find_or_insert_(
            self.index, keys, self.ids_by_row, self.embedding, SEED, UNIFORM
        )
        for id_, row in zip(ids, rows.tolist(), strict=True):
            assert self.expected.setdefault(id_, row) == row
        assert len(set(self.expected.values())) == len(self.expected)
        assert functional.gather(self.ids_by_row, rows).flatten().tolist() == ids
        return rows.tolist()

    def find(self, ids: list[int]) -> list[int]:
        return functional.find(self.index.entries, torch.tensor(ids)).tolist()


def initial_values(ids: torch.Tensor) -> torch.Tensor:
    slot = Slot("expected", 5, 100, torch.float32, ids.device)
    slot.reserve(ids.numel())
    rows = torch.arange(ids.numel())
    functional.init_rows_(slot, rows, ids, SEED, UNIFORM)
    return functional.gather(slot, rows)


def test_literal_inserts(engine):
    table = Rows(8, 5)
    rows = table.insert([7, -3, 7, 0, -3])
    assert sorted(set(rows)) == [0, 1, 2]
    assert table.index.counters.tolist() == [3, 0, 0]
    assert table.find([0, 1, -3]) == [rows[3], MISSING, rows[1]]
    assert table.insert([0, 7]) == [rows[3], rows[0]]
    assert table.insert([4, 0]) == [3, rows[3]]
    assert table.insert([]) == []
    assert table.index.counters.tolist() == [4, 0, 0]


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_rows_come_in_order_of_first_occurrence(name):
    """On the CPU; a GPU gives them in any order. Free rows first, from the end of their list."""
    with functional.use_engine(name):
        assert Rows(8, 5).insert([7, -3, 7, 0, -3]) == [0, 1, 0, 2, 1]
        assert Rows(16, 12, numbered=10, free=(9, 2)).insert([7, -3, 7, 0, 1]) == [2, 9, 2, 10, 11]


def test_extreme_ids(engine):
    table = Rows(16, 7)
    assert table.find(EXTREMES) == [MISSING] * len(EXTREMES)
    rows = table.insert(EXTREMES)
    assert sorted(rows) == list(range(7))
    assert table.find(EXTREMES) == rows


def test_free_rows_are_taken_before_fresh_ones(engine):
    table = Rows(32, 13, numbered=10, free=(9, 2, 5))
    for slot in table.ids_by_row, table.embedding:
        slot.value().fill_(3)  # what freed rows may hold
    assert table.insert([-1]) == [5]
    assert table.index.counters.tolist() == [10, 2, 0]
    assert table.insert([-1, 8]) == [5, 2]
    assert table.index.counters.tolist() == [10, 1, 0]
    assert set(table.insert([40, 41, 40, 42])) == {9, 10, 11}
    assert table.index.counters.tolist() == [12, 0, 0]
    assert table.insert([43]) == [12]
    ids = torch.tensor(list(table.expected))
    values = functional.gather(table.embedding, torch.tensor(list(table.expected.values())))
    assert torch.equal(values, initial_values(ids))


def test_against_a_dict(engine):
    """Batches with hits, misses and duplicates, up to a load of 0.9, where probes wrap around."""
    torch.manual_seed(0)
    table = Rows(1024, 12 * 120)
    for _ in range(12):
        ids = torch.randint(-400, 400, (120,)) * 2**40
        table.insert(ids.tolist())
        probes = torch.cat([ids, ids + 1]).tolist()
        assert table.find(probes) == [table.expected.get(id_, MISSING) for id_ in probes]
        count = len(table.expected)
        assert sorted(table.expected.values()) == list(range(count))
        assert table.index.counters.tolist() == [count, 0, 0]
    assert count > 600
    ids, rows = (torch.tensor(list(x)) for x in zip(*table.expected.items(), strict=True))
    values = functional.gather(table.embedding, rows)
    assert torch.equal(values, initial_values(ids))


def test_insert_takes_the_rows_that_it_is_given(engine):
    """Up to a load of 0.9, in two calls; what was there stays."""
    entries = empty_index(256)
    ids = torch.randperm(10_000)[:230] * 2**30
    rows = torch.randperm(10_000)[:230]
    functional.insert_(entries, ids[:100], rows[:100])
    functional.insert_(entries, ids[100:], rows[100:])
    functional.insert_(entries, ids[:0], rows[:0])
    assert torch.equal(functional.find(entries, ids), rows)
    assert functional.find(entries, ids + 1).tolist() == [MISSING] * 230
    assert int((entries[:, 1] >= 0).sum()) == 230


def test_literal_deletes(engine):
    table = Rows(16, 5)
    table.index.free_rows = torch.full((5,), 77)
    rows = dict(zip((7, -3, 0), table.insert([7, -3, 0]), strict=True))
    assert functional.delete_(table.index, torch.tensor([], dtype=torch.int64)).tolist() == []
    freed = functional.delete_(table.index, torch.tensor([-3, 4, 7, -3])).tolist()
    assert sorted([freed[0], freed[3]]) == [MISSING, rows[-3]]  # one of the two
    assert freed[1:3] == [MISSING, rows[7]]
    assert table.index.counters.tolist() == [3, 2, 0]
    assert sorted(table.index.free_rows[:2].tolist()) == sorted([rows[-3], rows[7]])
    assert table.find([7, -3, 0]) == [MISSING, MISSING, rows[0]]
    assert functional.delete_(table.index, torch.tensor([7])).tolist() == [MISSING]
    table.expected = {0: rows[0]}
    assert set(table.insert([50, 7])) == {rows[-3], rows[7]}
    assert table.insert([51]) == [3]
    assert table.index.counters.tolist() == [4, 0, 0]


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_freed_rows_are_taken_last_first(name):
    """On the CPU; a GPU takes them in any order."""
    with functional.use_engine(name):
        table = Rows(16, 5)
        table.index.free_rows = torch.empty(5, dtype=torch.int64)
        table.insert([7, -3, 0, 9])
        assert functional.delete_(table.index, torch.tensor([9, -3])).tolist() == [3, 1]
        table.expected = {7: 0, 0: 2}
        assert table.insert([60, 61, 62]) == [1, 3, 4]


def test_searches_go_on_behind_a_deleted_id(engine):
    """An index of one cluster: every entry but one is taken, then half of them are deleted."""
    table = Rows(64, 200)
    table.index.free_rows = torch.empty(200, dtype=torch.int64)
    ids = list(range(63))
    rows = table.insert(ids)
    functional.delete_(table.index, torch.tensor(ids[::2]))
    assert int((table.index.entries[:, 1] == DELETED).sum()) == 32
    expected = [MISSING if i % 2 == 0 else row for i, row in enumerate(rows)]
    assert table.find(ids) == expected


@pytest.mark.parametrize(("small", "large"), [(64, 64), (64, 97), (100, 1000)])
def test_rehash_takes_along_what_is_not_deleted(engine, small, large):
    table = Rows(small, 60)
    table.index.free_rows = torch.empty(60, dtype=torch.int64)
    ids = [id_ * 2**40 - 7 for id_ in range(60)]
    rows = table.insert(ids)
    functional.delete_(table.index, torch.tensor(ids[:20]))
    target = empty_index(large)
    functional.rehash_(table.index.entries, target)
    assert functional.find(target, torch.tensor(ids)).tolist() == [MISSING] * 20 + rows[20:]
    assert int((target[:, 1] == MISSING).sum()) == large - 40


def test_an_index_of_any_capacity():
    """All engines agree on where an id is searched first: the upper bits of mixed id * capacity."""
    ids = torch.randint(-(2**63), 2**63 - 1, (500,))
    for capacity in (701, 2**20, 3 * 2**33 + 1):
        homes = [(mixed(id_) * capacity) >> 64 for id_ in ids.tolist()]
        assert reference_home(ids, capacity).tolist() == homes


def mixed(id_: int) -> int:
    """SplitMix64's finalizer in Python's integers."""
    low = 2**64 - 1
    z = id_ & low
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & low
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & low
    return z ^ (z >> 31)


def test_entries_stand_in_the_order_of_mixed_ids(engine):
    """So that copying an index into a larger one is one pass over both."""
    entries = empty_index(1000)
    ids = torch.randint(-(2**63), 2**63 - 1, (300,))
    functional.insert_(entries, ids, torch.arange(300))
    taken = entries[entries[:, 1] >= 0]
    homes = torch.tensor([(mixed(id_) * 1000) >> 64 for id_ in taken[:, 0].tolist()])
    places = (entries[:, 1] >= 0).nonzero().flatten()
    assert int(((places - homes) % 1000).max()) < 20  # none is far from where its search begins


def test_a_cluster_across_the_end_of_an_index(engine):
    """As another engine would have left it: the search goes over the last entry to the first."""
    ids = [id_ for id_ in range(2000) if (mixed(id_) * 64) >> 64 == 61][:6]
    entries = empty_index(64)
    for id_, place in zip(ids, (61, 62, 63, 0, 1, 2), strict=True):
        entries[place] = torch.tensor([id_, place])
    assert functional.find(entries, torch.tensor(ids)).tolist() == [61, 62, 63, 0, 1, 2]
    more = [id_ for id_ in range(2000, 9000) if (mixed(id_) * 64) >> 64 == 62][:1]
    functional.insert_(entries, torch.tensor(more), torch.tensor([7]))
    assert entries[3].tolist() == [more[0], 7]


def test_engines_share_an_index():
    """What one engine inserted, the other finds."""
    entries = empty_index(4096)
    ids = torch.randint(-(2**63), 2**63 - 1, (1000,))
    with functional.use_engine("cpu"):
        functional.insert_(entries, ids[:500], torch.arange(500))
    with functional.use_engine("reference"):
        functional.insert_(entries, ids[500:], torch.arange(500, 1000))
        assert torch.equal(functional.find(entries, ids), torch.arange(1000))
    with functional.use_engine("cpu"):
        assert torch.equal(functional.find(entries, ids), torch.arange(1000))


@pytest.mark.parametrize(
    "ids",
    [
        torch.arange(200_000),
        torch.arange(200_000) << 32,
        torch.arange(200_000) * 4096,
        torch.arange(200_000) - (2**63 - 1) - 1,
    ],
    ids=["sequential", "high bits", "equal modulo 4096", "from the lowest"],
)
def test_pathological_ids_spread(ids):
    """Longest search for ids that a weak hash would pile up: no longer than for random ones."""
    with functional.use_engine("cpu"):
        entries = empty_index(1 << 19)
        functional.insert_(entries, ids, torch.arange(ids.numel()))
    taken = entries[:, 1] >= 0
    gaps = (~taken).nonzero().flatten()
    longest_cluster = int(gaps.diff().max())
    assert longest_cluster < 100  # random ids at this load: about 40


@pytest.mark.parametrize("dim", [1, 3, 17])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64], ids=str)
def test_gather_and_scatter(engine, dtype, dim):
    torch.manual_seed(dim)
    values = (torch.randn(50, dim) * 100).to(dtype)
    slot = slot_of(values, 7)
    rows = torch.randint(0, 50, (300,))
    rows[5] = MISSING
    expected = values[rows]
    expected[5] = 0
    assert torch.equal(bits(functional.gather(slot, rows)), bits(expected))

    target = torch.randperm(50)[:20]
    target[7] = MISSING  # its value goes nowhere
    target[11] = target[2]  # of a row that is named twice the last value stays
    new = (torch.randn(20, dim) * 100).to(dtype)
    functional.scatter_(slot, target, new)
    for row, value in zip(target.tolist(), new, strict=True):
        if row != MISSING:
            values[row] = value
    assert torch.equal(bits(slot.value()[:50]), bits(values))
    assert functional.gather(slot, rows[:0]).shape == (0, dim)


@pytest.mark.emulated
def test_a_gpu_passes_over_rows_out_of_range(emulated):
    """No wait, so no error; but nothing is written beyond the slot."""
    slot = slot_of(torch.zeros(4, 3), 2)
    functional.scatter_(slot, torch.tensor([3, 4, 99, -7]), torch.ones(4, 3))
    assert slot.value().sum(1).tolist() == [0, 0, 0, 3]


def test_scatter_reads_strided_values(engine):
    slot = slot_of(torch.zeros(4, 3), 2)
    values = torch.arange(6.0).view(3, 2).t()
    functional.scatter_(slot, torch.tensor([3, 0]), values)
    assert slot.value().tolist() == [[1, 3, 5], [0, 0, 0], [0, 0, 0], [0, 2, 4]]


def test_a_large_gather_uses_every_thread():
    """More rows than one thread takes, in blocks that parts of the work share."""
    values = torch.randn(100_000, 4)
    rows = torch.randint(0, 100_000, (150_001,))
    with functional.use_engine("cpu"):
        assert torch.equal(functional.gather(slot_of(values, 30_000), rows), values[rows])
