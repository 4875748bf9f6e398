"""Hash tables of the CUDA engine on the emulator: rows that threads race for, growth, training.

Which row an id has depends on the order of threads; everything else must not, so it is compared by
id, in many orders.
"""

from __future__ import annotations

import emulator
import pytest
import torch
from oracle import bits, relative_error, slot_of
from test_initializers import ANY_IDS, CASES, draw

from cupy_sparse_adamw import HashTable, NormalInitializer, SparseAdamW, functional
from cupy_sparse_adamw._slots import Slot
from cupy_sparse_adamw._types import MISSING, RowIndex

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("emulated")]

SEEDS = [0, 1, 2]
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


def trained(seed: int, engine: str = "emulated", dtype=F32, dim=5, **options):
    """A table after steps with new and known ids, duplicates and growth: id -> [row, m, v]."""
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(1)
    with functional.use_engine(engine), emulator.using(seed=seed):
        initializer = NormalInitializer(generator=torch.Generator().manual_seed(2))
        table = HashTable([dim], 8, dtype, initializer=initializer, **options)
        optimizer = SparseAdamW({"t": table}, lr=0.05)
        for size in (3, 40, 300, 300):
            ids = torch.randint(-size, size, (2 * size,), generator=generator) * 2**33
            table(ids).float().pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state_dict()["state"]["t"]
        columns = [table.embeddings(), state["exp_avg"], state["exp_avg_sq"]]
        assert torch.equal(state["ids"], table.ids())
        order = table.ids().argsort()
        return table.ids()[order], [x[order] for x in columns]


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_training_does_not_depend_on_the_order_of_threads(dtype):
    ids, values = trained(0, dtype=dtype)
    for seed in (1, 2, 3):
        other_ids, others = trained(seed, dtype=dtype)
        assert torch.equal(ids, other_ids)
        for x, y in zip(values, others, strict=True):
            assert torch.equal(bits(x), bits(y))


@pytest.mark.parametrize(("dtype", "limit"), [(F32, 2e-6), (F64, 1e-12), (F16, 2e-3), (BF16, 2e-2)])
def test_training_agrees_with_the_cpu_engine(dtype, limit):
    for options in ({}, {"grad_reduce_by": "id"}):
        ids, values = trained(0, dtype=dtype, **options)
        cpu_ids, expected = trained(0, "cpu", dtype=dtype, **options)
        assert torch.equal(ids, cpu_ids)
        for x, y in zip(values, expected, strict=True):
            assert relative_error(x, y.double().numpy()) <= limit


def test_many_threads_claim_few_ids():
    """The claims of one launch, hundreds of threads for each id, in many orders."""
    ids = torch.randint(0, 40, (700,)) * 2**20
    for seed in range(6):
        with emulator.using(seed=seed):
            table = HashTable([3], 16, initializer=NormalInitializer(), name="claims")
            table.reserve(64)
            rows = table._store.find_or_insert(ids)
            by_id = dict(zip(ids.tolist(), rows.tolist(), strict=True))
            assert all(by_id[i] == r for i, r in zip(ids.tolist(), rows.tolist(), strict=True))
            assert sorted(by_id.values()) == list(range(len(by_id)))
            assert table._store._index.counters.tolist() == [len(by_id), 0, 0]
            assert [by_id[i] for i in table.ids().tolist()] == list(range(len(by_id)))
            assert torch.equal(table._store.find(ids), rows)


def test_an_index_that_is_nearly_full_wraps_around():
    """Searches run over the end of the index, past entries that others claim meanwhile."""
    for seed in SEEDS:
        with emulator.using(seed=seed):
            entries = torch.full((64, 2), MISSING)
            index = RowIndex(entries, torch.zeros(3, dtype=torch.int64), torch.empty(0).long())
            slots = [Slot("ids", 1, 64, torch.int64, torch.device("cpu"))]
            slots.append(Slot("x", 2, 64, F32, torch.device("cpu")))
            for slot in slots:
                slot.reserve(64)
            ids = torch.randint(-(2**62), 2**62, (60,)).repeat(3)[torch.randperm(180)]
            distribution = NormalInitializer().distribution(2, 2)
            rows = functional.find_or_insert_(index, ids, *slots, 3, distribution)
            assert int(index.counters[0]) == 60
            assert sorted(set(rows.tolist())) == list(range(60))
            assert torch.equal(functional.find(entries, ids), rows)
            assert functional.find(entries, ids + 1).tolist() == [MISSING] * 180
            assert torch.equal(functional.gather(slots[0], rows).flatten(), ids)
            again = functional.find_or_insert_(index, ids, *slots, 3, distribution)
            assert torch.equal(again, rows)
            copy = torch.full((128, 2), MISSING)
            functional.insert_(copy, ids.unique(), functional.find(entries, ids.unique()))
            assert torch.equal(functional.find(copy, ids), rows)


def test_an_index_is_the_same_on_every_engine():
    """What the CPU engine entered is found, and the other way round, wherever searches begin."""
    ids = torch.cat([torch.arange(-40, 40), torch.arange(1, 40) << 40, torch.tensor([2**63 - 1])])
    rows = torch.randperm(ids.numel())
    for writer, reader in (("cpu", "emulated"), ("emulated", "cpu")):
        entries = torch.full((256, 2), MISSING)
        with functional.use_engine(writer):
            functional.insert_(entries, ids, rows)
        with functional.use_engine(reader):
            assert torch.equal(functional.find(entries, ids), rows)


@pytest.mark.parametrize("dim", [33, 64, 130, 1000])
@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=str)
def test_rows_of_more_units_than_threads(dtype, dim):
    """Gathered, scattered, and read as zeros where there is no row."""
    values = torch.randn(9, dim).to(dtype)
    slot = slot_of(values, 4)
    rows = torch.tensor([8, MISSING, 0, 3, 8])
    expected = values[rows]
    expected[1] = 0
    assert torch.equal(bits(functional.gather(slot, rows)), bits(expected))
    new = torch.randn(3, dim).to(dtype)
    functional.scatter_(slot, torch.tensor([7, 2, 7]), new)
    values[2], values[7] = new[1], new[2]
    assert torch.equal(bits(slot.value()[:9]), bits(values))


@pytest.mark.parametrize("dim", [124, 128, 300])
def test_new_rows_wider_than_a_warp_draws_at_once(dim):
    """A lookup's new rows, drawn by 32 threads of four columns, hold what ``init_rows_`` draws."""
    initializer, ids = NormalInitializer(), torch.arange(-20, 20)
    table = HashTable([dim], initializer=initializer)
    expected = draw(
        functional.load_engine("emulated"), initializer, ids, dim, table._store.seed, F32
    )
    assert torch.equal(table(ids).detach(), expected)


@pytest.mark.parametrize("dim", [1, 6, 130])
@pytest.mark.parametrize("name", CASES)
def test_initial_values_are_those_of_the_reference(name, dim):
    """To the accuracy of two good quantile functions, in every part of the distribution."""
    ids = torch.cat([torch.tensor(ANY_IDS), torch.arange(1200 // dim)])
    values = [
        draw(functional.load_engine(engine), CASES[name], ids, dim)
        for engine in ("emulated", "reference")
    ]
    _, loc, scale, low, high = CASES[name].distribution(16, 64)
    size = abs(loc) + scale or high - low
    torch.testing.assert_close(*values, rtol=0, atol=1e-13 * size)


def test_growing_moves_no_row():
    table = HashTable([4], 8, initializer=NormalInitializer())
    table(torch.arange(30))
    values, addresses = table.embeddings(), table._store.embedding.addresses().tolist()
    ids = table.ids()
    table(torch.arange(2000))
    assert table._store.embedding.addresses().tolist()[: len(addresses)] == addresses
    assert torch.equal(table.embeddings()[:30], values)
    assert torch.equal(table.ids()[:30], ids)
    assert len(table) == 2000


def test_a_full_table_resumes_bitwise_in_other_rows():
    """Saved, loaded in another order of threads, trained on: as if never stopped."""

    def model(seed):
        initializer = NormalInitializer(generator=torch.Generator().manual_seed(2))
        table = HashTable([4], 8, initializer=initializer)
        with emulator.using(seed=seed):
            table(torch.arange(-20, 20))
        return table, SparseAdamW({"t": table}, lr=0.1)

    def train(table, optimizer, batches):
        for i in batches:
            table(torch.tensor([i, 3, 3, -i, 100 + i])).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    table, optimizer = model(0)
    train(table, optimizer, range(3))
    saved = table.state_dict(), optimizer.state_dict()
    train(table, optimizer, range(3, 6))
    other, other_optimizer = model(9)
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    train(other, other_optimizer, range(3, 6))
    ids = table.ids()
    table.eval(), other.eval()
    assert torch.equal(bits(table(ids)), bits(other(ids)))
