"""Deleting ids from a HashTable: what goes, what stays, who gets the rows, where gradients go."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools

import pytest
import torch
from oracle import bits

from cupy_sparse_adamw import HashTable, NormalInitializer, SparseAdamW, functional
from cupy_sparse_adamw.row_store import MAX_LOAD


def normal_table(dim=3, **options) -> HashTable:
    generator = torch.Generator(device="cpu").manual_seed(0)
    options = {"device": torch.ones(0).device, **options}
    return HashTable(
        [dim], block_size=4, initializer=NormalInitializer(generator=generator), **options
    )


def trained(ids, **options) -> tuple[HashTable, SparseAdamW]:
    """A table with moments, after one step over ``ids``."""
    table = normal_table(**options)
    optimizer = SparseAdamW({"items": table}, lr=0.1)
    step(table, optimizer, ids)
    return table, optimizer


def step(table, optimizer, ids):
    (table(torch.tensor(ids)) * torch.arange(1.0, 4.0)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def moments(optimizer) -> dict[int, list]:
    """exp_avg and exp_avg_sq of each id."""
    state = optimizer.state_dict()["state"]["items"]
    values = torch.cat([state["exp_avg"], state["exp_avg_sq"]], 1)
    return dict(zip(state["ids"].tolist(), values.tolist(), strict=True))


def read(table, ids) -> torch.Tensor:
    table.eval()
    values = table(torch.tensor(ids)).detach()
    table.train()
    return values


def test_deleted_ids_are_gone_and_others_stay_bit_for_bit(engine):
    table, optimizer = trained(range(10))
    before, moments_before = read(table, range(10)), moments(optimizer)
    table.delete(torch.tensor([[3, 9], [3, 77]], dtype=torch.int32))  # any shape; 77 is not there
    assert len(table) == 8
    assert sorted(table.ids().tolist()) == [0, 1, 2, 4, 5, 6, 7, 8]
    after = read(table, range(10))
    assert after[[3, 9]].tolist() == [[0, 0, 0]] * 2
    stay = [0, 1, 2, 4, 5, 6, 7, 8]
    assert torch.equal(bits(after[stay]), bits(before[stay]))
    assert moments(optimizer) == {id_: moments_before[id_] for id_ in stay}
    ids, rows = table.ids_map()
    assert torch.equal(table.embeddings()[rows], read(table, ids.tolist()))
    assert table.embeddings().shape == (10, 3)


def test_a_reused_row_starts_with_fresh_weights_and_zero_moments(engine):
    table, optimizer = trained(range(10))
    rows = dict(zip(*(x.tolist() for x in table.ids_map()), strict=True))
    freed = {rows.pop(id_) for id_ in (2, 5)}
    table.delete(torch.tensor([2, 5]))
    held = table._store.embedding.num_rows()
    fresh = normal_table()(torch.tensor([100, 5])).detach()
    assert torch.equal(table(torch.tensor([100, 5])), fresh)  # 5 is drawn anew, as it first was
    now = dict(zip(*(x.tolist() for x in table.ids_map()), strict=True))
    assert {now[100], now[5]} == freed
    assert moments(optimizer)[100] == moments(optimizer)[5] == [0] * 6
    assert table._store.embedding.num_rows() == held


def test_deleting_and_inserting_for_ever_takes_no_more_memory(engine):
    """The index forgets entries of deleted ids; at no time is it too full to end a search."""
    table = normal_table()
    table.reserve(120)
    held = None
    for turn in range(40):
        ids = torch.arange(turn * 100, turn * 100 + 100)
        table(ids)
        table.delete(ids[: 100 if turn % 3 else 60])
        if turn % 3 == 0:
            table.delete(ids[60:])
        entries = table._store._index.entries
        assert int((entries[:, 1] != -1).sum()) <= entries.shape[0] * MAX_LOAD
        held = held or table.nbytes
        assert table.nbytes == held
    assert len(table) == 0


def test_free_rows_are_used_before_memory_is_taken(engine):
    table = normal_table()
    table(torch.arange(1000))
    held = table._store.embedding.num_rows()
    table.delete(torch.arange(0, 1000, 2))
    table(torch.arange(1000, 1500))
    assert len(table) == 1000
    assert table._store.embedding.num_rows() == held
    assert torch.equal(read(table, range(1400, 1500)), normal_table()(torch.arange(1400, 1500)))


@pytest.mark.parametrize("when", ["before backward", "after backward"])
def test_gradients_find_their_rows_by_id(engine, when):
    """Ids 0 to 3 are looked up; 1 and 2 are deleted, and 2 comes back on another row."""
    table, optimizer = trained(range(4))
    expected, expected_optimizer = trained(range(4))
    out = table(torch.arange(4))
    if when == "after backward":
        out.sum().backward()
    table.delete(torch.tensor([1, 2]))
    table(torch.tensor([90]))  # takes the row of one of them
    before = read(table, [90])
    table(torch.tensor([2, 91]))
    if when == "before backward":
        out.sum().backward()
    optimizer.step()
    # the same in one go: 2 is new, and 1 is nowhere
    expected.delete(torch.tensor([1, 2]))
    expected(torch.tensor([0, 2, 3])).sum().backward()
    expected_optimizer.step()
    assert torch.equal(bits(read(table, [0, 1, 2, 3])), bits(read(expected, [0, 1, 2, 3])))
    assert torch.equal(bits(read(table, [90])), bits(before))
    theirs = moments(expected_optimizer)
    assert {k: v for k, v in moments(optimizer).items() if k < 90} == theirs


def test_only_the_followed_pay(engine):
    """A lookup that nobody keeps is not followed; one that is noted once is not noted again."""
    table = normal_table()
    table(torch.arange(4))
    assert len(table._store._followed) == 0
    out = table(torch.arange(4))
    (found,) = table._store._followed
    assert found.ids is None
    table.delete(torch.tensor([9]))
    ids = found.ids
    table.delete(torch.tensor([0]))
    assert found.ids is ids
    assert ids.tolist() == [0, 1, 2, 3]
    out.sum().backward()
    assert table.grad().coalesce().values().shape == (3, 3)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copys_gradients_are_followed_too(how):
    table = normal_table()
    table(torch.arange(4)).sum().backward()
    if how == "deepcopy":
        twin = copy.deepcopy(table)
    else:
        buffer = io.BytesIO()
        torch.save(table, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    twin.delete(torch.tensor([0]))
    twin(torch.tensor([50]))  # on the row that 0 had
    rows = dict(zip(*(x.tolist() for x in twin.ids_map()), strict=True))
    assert sorted(twin.grad().indices()[0].tolist()) == sorted(rows[id_] for id_ in (1, 2, 3))
    assert table.grad().indices()[0].tolist() == [0, 1, 2, 3]


def test_state_of_a_table_with_free_rows_loads_anywhere(engine):
    table, optimizer = trained(range(10))
    table.delete(torch.tensor([0, 4, 9]))
    twin = normal_table()
    twin.load_state_dict(table.state_dict())
    twin_optimizer = SparseAdamW({"items": twin}, lr=0.1)
    twin_optimizer.load_state_dict(optimizer.state_dict())
    for t, o in ((table, optimizer), (twin, twin_optimizer)):
        step(t, o, [9, 1, 2, 30, 1])
    ids = sorted(table.ids().tolist())
    assert ids == sorted(twin.ids().tolist()) == [1, 2, 3, 5, 6, 7, 8, 9, 30]
    assert torch.equal(bits(read(table, ids)), bits(read(twin, ids)))
    assert moments(optimizer) == moments(twin_optimizer)


def test_accept_grad_refuses_a_free_row(engine):
    table = normal_table()
    table(torch.arange(4))
    table.delete(torch.tensor([2]))
    free = int(table._store._index.free_rows[0])
    others = torch.tensor([row for row in range(4) if row != free])
    table.accept_grad(others, torch.ones(3, 3))
    with pytest.raises(IndexError, match=f"row {free}"):
        table.accept_grad(torch.tensor([int(others[0]), free]), torch.ones(2, 3))
    assert len(table._grads) == 1


def test_a_table_moves_with_its_free_rows():
    table = normal_table()
    table(torch.arange(6))
    table(torch.arange(6)).sum().backward()
    table.delete(torch.tensor([1, 2]))
    table.double()
    assert sorted(table.ids().tolist()) == [0, 3, 4, 5]
    assert table.grad().values().tolist() == [[1, 1, 1]] * 4
    table(torch.tensor([7, 8, 9]))
    assert len(table) == 7
    assert sorted(table.ids_map()[1].tolist()) == list(range(7))


def test_clear_after_deletes_gives_the_memory_back():
    table = normal_table()
    table(torch.arange(100))
    table.delete(torch.arange(50))
    table.clear()
    assert (len(table), table.embeddings().shape) == (0, (0, 3))
    assert table.nbytes < 2000
    assert table(torch.tensor([3])).shape == (1, 3)


class OutOfMemory(Exception):
    pass


@pytest.mark.parametrize("at", range(1, 6))
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_delete_that_fails_is_done_or_not_begun(name, at, monkeypatch):
    """An exception at the ``at``-th operation; whoever gets the rows later starts with zeros."""
    with functional.use_engine(name):
        table, optimizer = trained(range(6))
        kept = moments(optimizer)
        out = table(torch.arange(6))  # whose ids must be noted
        calls = itertools.count(1)

        def failing(operation):
            def call(*args):
                if next(calls) == at:
                    raise OutOfMemory
                return operation(*args)

            return call

        with monkeypatch.context() as patch:
            for operation in ("gather", "scatter_", "delete_", "find"):
                patch.setattr(functional, operation, failing(getattr(functional, operation)))
            with pytest.raises(OutOfMemory) if at < 5 else contextlib.nullcontext():
                table.delete(torch.tensor([1, 2]))
        held = sorted(table.ids().tolist())
        assert held == ([0, 1, 2, 3, 4, 5] if at < 3 else [0, 3, 4, 5])
        assert moments(optimizer) == {id_: kept[id_] for id_ in held}
        out.sum().backward()
        assert table.grad().values().shape[0] == len(held)
        table(torch.tensor([50, 51, 52]))
        assert all(moments(optimizer)[id_] == [0] * 6 for id_ in (50, 51, 52))


def test_an_insertion_that_fails_while_memory_stays_short(monkeypatch):
    """The index is built anew at the next use that has the memory for it."""
    table = normal_table()
    before = table(torch.arange(9)).detach()
    right = functional.find_or_insert_

    def failing(index, *args):
        counters = index.counters.clone()
        right(index, *args)
        index.counters.copy_(counters)  # as it is until the rows are counted
        raise OutOfMemory

    def short(*args):
        raise OutOfMemory

    with monkeypatch.context() as patch:
        patch.setattr(functional, "find_or_insert_", failing)
        with pytest.raises(OutOfMemory):
            table(torch.tensor([70, 71]))
        patch.setattr(functional, "insert_", short)
        with pytest.raises(OutOfMemory):
            read(table, range(9))
    assert torch.equal(read(table, range(9)), before)
    assert read(table, [70, 71]).tolist() == [[0, 0, 0]] * 2
    assert sorted(table.ids().tolist()) == list(range(9))


def test_ids_that_are_no_integers():
    with pytest.raises(TypeError, match="ids"):
        normal_table().delete(torch.ones(2))
