"""Memory that runs out wherever it is taken: an exception, and all is as before or as after.

An operation is run on new copies of one state, and each time another allocation fails: of torch
(every operation that makes a tensor, and all in-place ones but the plainest, which may take memory
within) and of NumPy in this package. SOAK=1 fails at every allocation of the CPU engine, with
MemoryError and with RuntimeError, which is what torch raises; else a part of them fails.
"""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from operations import CASES, SOAK
from torch.utils._python_dispatch import TorchDispatchMode

import cupy_sparse_adamw
from cupy_sparse_adamw import (
    BaseFilterHookImpl,
    FilterHook,
    HashTable,
    HashtableHookFactory,
    NormalInitializer,
    SparseAdamW,
    functional,
)

PACKAGE = str(Path(cupy_sparse_adamw.__file__).parent)

#: In-place operations that take no memory.
TAKE_NONE = {"fill_", "zero_", "copy_", "add_", "sub_", "mul_", "neg_", "requires_grad_"}
#: What this package asks NumPy for.
NUMPY = ("empty", "zeros", "ones", "full", "array", "arange", "concatenate", "cumsum", "repeat")


class Shortage(TorchDispatchMode):
    """Counts allocations, and fails at one of them."""

    def __init__(self, at: int, error: type[Exception]) -> None:
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def take(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise self.error("out of memory, injected")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if takes_memory(func):
            self.take()
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self._numpy = {name: getattr(np, name) for name in NUMPY}
        for name, right in self._numpy.items():
            setattr(np, name, self._counted(right))
        return super().__enter__()

    def __exit__(self, *raised):
        for name, right in self._numpy.items():
            setattr(np, name, right)
        return super().__exit__(*raised)

    def _counted(self, right: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args, **kwargs):
            if sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
                self.take()
            return right(*args, **kwargs)

        return call


def takes_memory(func: Any) -> bool:
    """Whether an operation of torch may allocate."""
    returned = func._schema.returns
    if any(x.alias_info is not None and x.alias_info.is_write for x in returned):
        return func._schema.name.split("::")[1] not in TAKE_NONE
    return any(x.alias_info is None and "Tensor" in str(x.type) for x in returned)


@pytest.mark.parametrize("name", CASES)
def test_an_allocation_that_fails_leaves_all_as_before_or_after(engine, name):
    at_most = 15 if engine == "cpu" else 3
    if SOAK:
        at_most = 10_000 if engine == "cpu" else 12  # the reference takes memory for each row
    failures = CASES[name].run(Shortage, [MemoryError, RuntimeError], at_most)
    print(f"{engine}, {name}: {failures} failures")


class Uses(BaseFilterHookImpl):
    """A policy of a user's: counts uses, and fails when it has."""

    def __init__(self, ht, name="uses"):
        super().__init__(ht, name)
        self.fails = False
        ht.append_filter_slot(name, torch.int64, 1)

    def update(self, index):
        slot = self._ht.get_slot(self._name)
        self._ht.update_slot(self._name, index, functional.gather(slot, index) + 1)
        if self.fails:
            raise RuntimeError("failed")


def test_rows_that_a_failed_lookup_had_taken_are_as_new(engine, monkeypatch):
    """Three of them fresh, two used before: nothing of what was noted of them stays."""
    monkeypatch.setitem(HashtableHookFactory()._filters, "Uses", Uses)
    device = torch.get_default_device()
    table = HashTable([2], 4, device=device, filter_hook=FilterHook("Uses"))
    optimizer = SparseAdamW({"t": table})
    table(torch.arange(5)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    table.delete(torch.tensor([1, 3]))
    table._filter_hook_impl.fails = True
    new = torch.arange(10, 15)
    with pytest.raises(RuntimeError, match="failed"):
        table(new)
    pickle.dumps(table)  # and with it how to put back what was there
    assert sorted(table.ids().tolist()) == [0, 2, 4]
    table._filter_hook_impl.fails = False
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
