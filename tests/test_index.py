"""The hash index, gather and scatter_ on every engine, against a dict and plain indexing."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, bits, slot_of

from cupy_sparse_adamw import functional
from cupy_sparse_adamw._types import MISSING, Distribution, DistributionKind, RowIndex, Slot

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
    target[11] = target[2]  # of a row that is named twice the last value stays
    new = (torch.randn(20, dim) * 100).to(dtype)
    functional.scatter_(slot, target, new)
    for row, value in zip(target.tolist(), new, strict=True):
        values[row] = value
    assert torch.equal(bits(slot.value()[:50]), bits(values))
    assert functional.gather(slot, rows[:0]).shape == (0, dim)


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
