"""What a lookup or an insertion that fails has done is undone, whoever fails in it."""

from __future__ import annotations

import copy
import pickle
import signal

import pytest
import torch
from operations import by_id, tensors_of

from cupy_sparse_adamw import (
    AdmitHook,
    BaseAdmitHookImpl,
    BaseFilterHookImpl,
    FilterHook,
    HashTable,
    HashtableHookFactory,
    NormalInitializer,
    SparseAdamW,
    functional,
)
from cupy_sparse_adamw.policies import LRUFilterHookImpl


class Uses(BaseFilterHookImpl):
    """A policy of a user's: counts uses, and fails when it has."""

    total: torch.Tensor

    def __init__(self, ht, name="uses"):
        super().__init__(ht, name)
        self.error: BaseException | None = None
        ht.append_filter_slot(name, torch.int64, 1)
        self.register_buffer("total", torch.zeros(1, dtype=torch.int64, device=ht.device))

    def update(self, index):
        slot = self._ht.get_slot(self._name)
        self._ht.update_slot(self._name, index, functional.gather(slot, index) + 1)
        self.total += index.numel()
        if self.error is not None:
            raise self.error


class Interrupted(BaseFilterHookImpl):
    """Ctrl-C comes as it begins to count."""

    total: torch.Tensor

    def __init__(self, ht):
        super().__init__(ht)
        self.register_buffer("total", torch.zeros(1, dtype=torch.int64))

    def update(self, index):
        signal.raise_signal(signal.SIGINT)
        self.total += index.numel()


class RecentlyUsed(LRUFilterHookImpl):
    """One of ours, with an ``update`` that fails when ours is done."""

    def update(self, index):
        super().update(index)
        raise RuntimeError("failed")


class Sightings(BaseAdmitHookImpl):
    """A policy of a user's: counts what it is asked, and fails when it has."""

    def __init__(self):
        super().__init__()
        self.counted, self.last, self.settled = 0, 0, 0
        self.error: BaseException | None = None

    def admit(self, ids, counts):
        self.last = int(counts.sum())
        self.counted += self.last
        if self.error is not None:
            raise self.error
        return torch.ones_like(ids, dtype=torch.bool)

    def take_back(self):
        self.counted -= self.last

    def settle(self):
        self.settled += 1


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    for kinds, policies in (
        (HashtableHookFactory()._filters, (Uses, Interrupted, RecentlyUsed, CalledOtherwise)),
        (HashtableHookFactory()._admits, (Sightings,)),
    ):
        for policy in policies:
            monkeypatch.setitem(kinds, policy.__name__, policy)


def table_with(**hooks) -> HashTable:
    return HashTable([2], 4, device=torch.get_default_device(), **hooks)


def contents(table: HashTable) -> dict[str, object]:
    return tensors_of(by_id(dict(table.state_dict())))


@pytest.mark.parametrize("act", ["lookup", "lookup of known ids", "read-only", "insert"])
def test_uses_are_taken_back_where_a_filter_fails(engine, act):
    table = table_with(filter_hook=FilterHook("Uses"))
    table(torch.tensor([3, 1, 4, 1, 5]))
    before, policy = contents(table), table._filter_hook_impl
    ids = torch.tensor([1, 1, 5] if act == "lookup of known ids" else [1, 9, 5, 2])

    def run() -> None:
        if act == "insert":
            table.insert(ids, torch.ones(ids.numel(), 2))
        else:
            table(ids, AdmitHook("ReadOnly") if act == "read-only" else None)

    policy.error = RuntimeError("failed")
    with pytest.raises(RuntimeError, match="failed"):
        run()
    assert contents(table) == before
    policy.error = None
    run()
    assert contents(table) != before
    assert int(policy.total) == 5 + ids.numel()


def test_uses_of_rows_go_back_to_their_rows(engine):
    """Worked out: rows 0 and 2 are asked for, -1 is no row, and row 1 keeps what it got since."""
    table = table_with(filter_hook=FilterHook("Uses"))
    table(torch.tensor([7, 8, 8, 9]))
    policy = table._filter_hook_impl
    rows = table._store.find(torch.tensor([9, 6, 7]))
    put_back = table._uses_of(rows)
    table(torch.tensor([7, 8, 9, 9]))
    assert policy.total.tolist() == [8]
    put_back()
    assert policy.total.tolist() == [4]
    saved = by_id(dict(table.state_dict()))
    assert saved["ids"].tolist() == [7, 8, 9]
    assert saved["uses"].flatten().tolist() == [1, 2, 1]


def test_an_update_over_one_of_ours_is_taken_back():
    table = table_with(filter_hook=FilterHook("RecentlyUsed", {"max_rows": 9}))
    before = contents(table)
    with pytest.raises(RuntimeError, match="failed"):
        table(torch.arange(3))
    assert contents(table) == before


class CalledOtherwise(Uses):
    """Counts where RecIS calls it."""

    def forward(self, index):
        super().update(index)

    def update(self, index):
        raise AssertionError


def test_a_policy_that_is_called_otherwise_is_taken_back():
    table = table_with(filter_hook=FilterHook("CalledOtherwise"))
    table(torch.arange(3))
    before = contents(table)
    table._filter_hook_impl.error = RuntimeError("failed")
    with pytest.raises(RuntimeError, match="failed"):
        table(torch.arange(2, 5))
    assert contents(table) == before


@pytest.mark.parametrize("fails", ["admit", "update"])
def test_sightings_are_taken_back(engine, fails):
    table = table_with(filter_hook=FilterHook("Uses"), admit_hook=AdmitHook("Sightings"))
    table(torch.tensor([3, 1, 4, 1, 5]))
    admit, update = table.admit_hook_Sightings, table._filter_hook_impl
    before, which = contents(table), admit if fails == "admit" else update
    assert (admit.counted, admit.settled) == (5, 1)
    which.error = RuntimeError("failed")
    with pytest.raises(RuntimeError, match="failed"):
        table(torch.tensor([1, 9, 9, 2]))
    assert contents(table) == before
    assert (admit.counted, admit.settled) == (5, 1)
    which.error = None
    table(torch.tensor([1, 9, 9, 2]))
    assert (admit.counted, admit.settled) == (8, 2)
    assert len(table) == 6


@pytest.mark.parametrize("sightings", [3, 7], ids=["counted", "halved"])
def test_what_frequency_counted_is_taken_back(engine, monkeypatch, sightings):
    """Seven more sightings halve all counts: there are 8 counters in a line, and 2 sightings."""
    hook = AdmitHook("Frequency", {"min_frequency": 2, "width": 8, "depth": 2})
    table = table_with(admit_hook=hook)
    table(torch.tensor([5, 6]))
    policy, before = table.admit_hook_Frequency, contents(table)
    assert policy._undo == []
    ids = torch.arange(sightings)
    ids[:2] = 5

    def fails(*args):
        assert not torch.equal(policy.counts, counts)
        raise MemoryError

    counts = policy.counts.clone()
    with monkeypatch.context() as patch:
        patch.setattr(functional, "find_or_insert_", fails)
        with pytest.raises(MemoryError):
            table(ids)
    assert contents(table) == before
    assert policy._undo == []
    table(ids)
    assert 5 in table.ids()
    assert int(policy.sightings) == (2 + sightings if sightings < 6 else 0)
    assert policy._undo == []
    pickle.dumps(table)


@pytest.mark.usefixtures("ctrl_c")
def test_a_lookup_that_ctrl_c_came_in_is_settled(monkeypatch):
    """So that a table that is saved then is whole, and nobody takes back what was done."""
    table = table_with(admit_hook=AdmitHook("Frequency", {"min_frequency": 2}))
    find = functional.find

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return find(*args)

    with monkeypatch.context() as patch:
        patch.setattr(functional, "find", interrupted)
        with pytest.raises(KeyboardInterrupt):
            table(torch.tensor([5, 5, 6]))
    policy = table.admit_hook_Frequency
    assert (int(policy.sightings), policy._undo) == (3, [])
    assert table.ids().tolist() == [5]
    pickle.dumps(table)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_for_a_lookup_with_hooks():
    table = table_with(filter_hook=FilterHook("Interrupted"))
    with pytest.raises(KeyboardInterrupt):
        table(torch.arange(3))
    assert table._filter_hook_impl.total.tolist() == [3]
    assert table.ids().tolist() == [0, 1, 2]


def test_rows_that_a_failed_lookup_had_taken_are_as_new(engine):
    """Three of them fresh, two used before: nothing of what was noted of them stays."""
    device = torch.get_default_device()
    table = HashTable([2], 4, device=device, filter_hook=FilterHook("Uses"))
    optimizer = SparseAdamW({"t": table})
    table(torch.arange(5)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    table.delete(torch.tensor([1, 3]))
    table._filter_hook_impl.error = RuntimeError("failed")
    new = torch.arange(10, 15)
    with pytest.raises(RuntimeError, match="failed"):
        table(new)
    pickle.dumps(table)  # and with it how to put back what was there
    assert sorted(table.ids().tolist()) == [0, 2, 4]
    table._filter_hook_impl.error = None
    table(new)
    state = optimizer.state_dict()["state"]["t"]
    is_new = table.ids() >= 10
    assert is_new.sum() == 5
    assert (table.state_dict()["uses"] == 1).all()
    assert not state["exp_avg"][is_new].any()
    assert (state["exp_avg"][~is_new] != 0).all()


@pytest.mark.parametrize("look", ["state_dict", "flush", "double", "new owner", "clear", "lookup"])
def test_whoever_looks_first_finds_a_lookup_undone(monkeypatch, look):
    """A lookup that had let rows go, which were behind, fails: they are back, for everybody."""
    table = HashTable(
        [3],
        4,
        initializer=NormalInitializer(std=1.0),
        filter_hook=FilterHook("LRU", {"max_rows": 12}),
    )
    optimizer = SparseAdamW({"t": table}, lr=0.1, untouched="dense")
    for first in (0, 3, 6, 9):
        table(torch.arange(first, first + 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    ids = table.ids()
    assert ids.tolist() == list(range(12))
    before = optimizer.caught_up("t", ids)
    moments = copy.deepcopy(optimizer).state_dict()["state"]["t"]["exp_avg"]
    insert = functional.find_or_insert_

    def fails(*args):
        raise MemoryError

    monkeypatch.setattr(functional, "find_or_insert_", fails)
    with pytest.raises(MemoryError):
        table(torch.arange(100, 104))
    monkeypatch.setattr(functional, "find_or_insert_", insert)
    if look == "flush":
        optimizer.flush()
    elif look == "double":
        table.double()
    elif look == "new owner":
        optimizer = SparseAdamW({"t": table}, untouched="dense")
    elif look == "clear":
        table.clear()
        assert len(table) == 0
        return
    elif look == "lookup":
        table(ids)
    state = table.state_dict()
    order = state["ids"].argsort()
    assert state["ids"][order].tolist() == ids.tolist()
    assert torch.allclose(state["embedding"][order].float(), before, rtol=1e-5, atol=1e-6)
    if look != "new owner":
        saved = optimizer.state_dict()["state"]["t"]
        order = saved["ids"].argsort()
        assert torch.allclose(saved["exp_avg"][order].float(), moments, rtol=1e-5, atol=1e-7)


def test_a_hook_cannot_clear_the_table_it_makes_room_in(monkeypatch):
    table = HashTable([3], filter_hook=FilterHook("LRU", {"max_rows": 4}))
    table(torch.arange(4))
    monkeypatch.setattr(
        type(table._filter_hook_impl), "make_room", lambda hook, *args: table.clear()
    )
    with pytest.raises(RuntimeError, match=r"by a hook that makes room in it.*table\.delete"):
        table(torch.arange(4, 8))
    assert len(table) == 4
