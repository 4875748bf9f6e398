"""find, find_or_insert_, gather and scatter_ on every engine, against a dict and plain indexing."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, bits, slot_of

from cupy_sparse_adamw import functional
from cupy_sparse_adamw._types import MISSING

EXTREMES = [0, -1, 1, 2**63 - 1, -(2**63), 2**32, -(2**32)]


def empty_index(capacity: int) -> torch.Tensor:
    return torch.full((capacity, 2), MISSING)


def test_literal_inserts(engine):
    entries = empty_index(8)
    ids = torch.tensor([7, -3, 7, 0, -3])
    rows, new_ids = functional.find_or_insert_(entries, ids, torch.tensor([10, 20, 30, 40]))
    assert rows.tolist() == [10, 20, 10, 30, 20]
    assert new_ids.tolist() == [7, -3, 0]
    assert functional.find(entries, torch.tensor([0, 1, -3])).tolist() == [30, MISSING, 20]


def test_extreme_ids(engine):
    entries = empty_index(16)
    ids = torch.tensor(EXTREMES)
    assert functional.find(entries, ids).tolist() == [MISSING] * len(EXTREMES)
    rows, new_ids = functional.find_or_insert_(entries, ids, torch.arange(7))
    assert rows.tolist() == list(range(7))
    assert torch.equal(new_ids, ids)
    assert torch.equal(functional.find(entries, ids), rows)


def test_against_a_dict(engine):
    """Batches with hits, misses and duplicates, up to a load of 0.9, where probes wrap around."""
    torch.manual_seed(0)
    entries, expected = empty_index(1024), {}
    for _ in range(12):
        ids = torch.randint(-400, 400, (120,)) * 2**40
        for id_ in ids.tolist():
            expected.setdefault(id_, len(expected))
        before = int((entries[:, 1] >= 0).sum())
        rows, _ = functional.find_or_insert_(entries, ids, torch.arange(before, before + 120))
        assert rows.tolist() == [expected[id_] for id_ in ids.tolist()]
        probes = torch.cat([ids, ids + 1])
        found = functional.find(entries, probes).tolist()
        assert found == [expected.get(id_, MISSING) for id_ in probes.tolist()]
    assert len(expected) > 600


def test_engines_share_an_index():
    """What one engine inserted, the other finds."""
    entries = empty_index(4096)
    ids = torch.randint(-(2**63), 2**63 - 1, (1000,))
    with functional.use_engine("cpu"):
        functional.find_or_insert_(entries, ids[:500], torch.arange(500))
    with functional.use_engine("reference"):
        functional.find_or_insert_(entries, ids[500:], torch.arange(500, 1000))
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
        functional.find_or_insert_(entries, ids, torch.arange(ids.numel()))
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
