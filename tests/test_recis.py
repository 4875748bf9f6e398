"""RecIS's hash tables under SparseAdamW, on a stand-in with RecIS's bindings (recis_stand_in.py).

With RECIS_LIBRARY set to a shared library that registers RecIS's own classes, the same tests run on
those.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import re
from pathlib import Path

import emulator
import pytest
import recis_stand_in as stand_in
import torch
from oracle import bits

import cupy_sparse_adamw
from cupy_sparse_adamw import HashTable, SparseAdamW, filter_out_sparse_param, functional
from cupy_sparse_adamw.recis import MOMENTS, RecisTable

LIBRARY = os.environ.get("RECIS_LIBRARY")
CPU = torch.device("cpu")
# Powers of two, and no epsilon: what comes out can be worked out on paper.
BY_HAND = {"lr": 0.5, "beta1": 0.5, "beta2": 0.75, "eps": 0.0, "weight_decay": 0.5}


@pytest.fixture(autouse=True)
def recis(monkeypatch):
    if LIBRARY:
        torch.classes.load_library(LIBRARY)
    else:
        stand_in.install(monkeypatch)


@pytest.fixture(params=["reference", "cpu", pytest.param("emulated", marks=pytest.mark.emulated)])
def engine(request):
    with contextlib.ExitStack() as stack:
        if request.param == "emulated":
            emulator.load_engine()
            stack.enter_context(emulator.active())
        stack.enter_context(functional.use_engine(request.param))
        yield request.param


def make(dim=2, block_size=4, dtype=torch.float32, value=0.5):
    """An empty HashtableImpl; 16-bit ones, which RecIS cannot fill with a constant, are uniform."""
    generators = torch.classes.recis.Generator
    shape = [block_size, dim]
    if dtype in (torch.float16, torch.bfloat16):
        new = generators.make_uniform_generator(shape, dtype, value, value, None)
    else:
        new = generators.make_constant_generator(shape, dtype, value)
    return torch.ops.recis.make_hashtable(
        block_size, [dim], dtype, CPU, False, ["table"], new, 0, 65536, 65536
    )


def slot(impl, name):
    return impl.slot_group().slot_by_name(name)


def give(impl, ids, grads, readonly=False):
    """One lookup of distinct ids and its backward, as RecIS's module does them."""
    rows, values = impl.embedding_lookup(torch.tensor(ids, dtype=torch.int64), readonly)
    grads = torch.as_tensor(grads, dtype=values.dtype)
    impl.accept_grad(rows, grads.expand(values.shape).contiguous())


def by_id(impl, name="embedding"):
    """{id: the row of a slot}."""
    values = slot(impl, name).value()
    ids, rows = impl.ids_map()
    return {i: values[row].tolist() for i, row in zip(ids.tolist(), rows.tolist(), strict=True)}


def everything(impl):
    """All slots, rows in use or not, as bytes."""
    return [bits(slot(impl, name).value()) for name in ("embedding", *MOMENTS)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------------- the update


def test_two_steps_by_hand(engine):
    impl = make()
    optimizer = SparseAdamW({"table": impl}, **BY_HAND)
    impl.embedding_lookup(torch.tensor([7, -3, 9]), False)
    give(impl, [7, 9], [[2.0, -4.0], [-8.0, 8.0]])
    optimizer.step()
    optimizer.zero_grad()
    # m = g / 2, v = g² / 4, so m̂ / √v̂ = sign(g): 0.5 - 0.5 (±1 + 0.5 · 0.5).
    exp_avg, exp_avg_sq = (by_id(impl, name) for name in MOMENTS)
    assert by_id(impl) == {7: [-0.125, 0.875], 9: [0.875, -0.125], -3: [0.5, 0.5]}
    assert exp_avg == {7: [1.0, -2.0], 9: [-4.0, 4.0], -3: [0.0, 0.0]}
    assert exp_avg_sq == {7: [1.0, 4.0], 9: [16.0, 16.0], -3: [0.0, 0.0]}

    give(impl, [-3, 7], [[1.0, 1.0], [2.0, -4.0]])
    optimizer.step()
    # Row 7: m = 1 + (2 - 1) / 2, v = 1 + (4 - 1) / 4, m̂ = 1.5 / 0.75, v̂ = 1.75 / 0.4375.
    expected = [-0.125 - 0.5 * (1 - 0.0625), 0.875 - 0.5 * (-1 + 0.4375)]
    assert by_id(impl)[7] == pytest.approx(expected, rel=1e-6)
    assert by_id(impl, MOMENTS[0])[7] == [1.5, -3.0]
    assert by_id(impl, MOMENTS[1])[7] == [1.75, 7.0]
    # Row -3 has its first gradient at t = 2: m̂ = 0.5 / 0.75, v̂ = 0.25 / 0.4375.
    assert by_id(impl, MOMENTS[0])[-3] == [0.5, 0.5]
    expected = 0.5 - 0.5 * ((0.5 / 0.75) / (0.25 / 0.4375) ** 0.5 + 0.25)
    assert by_id(impl)[-3] == pytest.approx([expected] * 2, rel=1e-6)
    assert optimizer.state_dict()["state"]["table"]["step"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_it_is_bitwise_a_hash_table_of_this_package(engine, dtype):
    """With 3 rows a block, a step brings about two new blocks."""
    impl, ours = make(5, 3, dtype), HashTable([5], dtype=dtype)
    optimizers = [SparseAdamW({"table": table}, lr=0.1) for table in (impl, ours)]
    for t in range(8):
        ids = torch.randperm(6 * t + 6)[: 4 * t + 4] - 5
        grads = torch.randn(ids.numel(), 5).to(dtype)
        rows, values = impl.embedding_lookup(ids, False)
        ours.insert(ids, values)
        impl.accept_grad(rows, grads)
        ours(ids)
        ours.accept_grad(dict_rows(ours, ids), grads)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert len(slot(impl, "embedding").values()) > 12
    states = [optimizer.state_dict()["state"]["table"] for optimizer in optimizers]
    assert [state["step"] for state in states] == [8, 8]
    order = [state["ids"].argsort() for state in states]
    for key in ("ids", "exp_avg", "exp_avg_sq"):
        recis, expected = (state[key][o] for state, o in zip(states, order, strict=True))
        assert torch.equal(bits(recis), bits(expected)), key
    ids, rows = impl.ids_map()
    weights = slot(impl, "embedding").value()[rows]
    assert torch.equal(bits(weights), bits(ours.embeddings()[dict_rows(ours, ids)]))
    assert states[0]["exp_avg"].any()


def dict_rows(table, ids):
    known = dict(zip(*(x.tolist() for x in table.ids_map()), strict=True))
    return torch.tensor([known[i] for i in ids.tolist()])


def test_moments_of_a_16_bit_table_are_float32():
    impl = make(dtype=torch.float16)
    optimizer = SparseAdamW({"table": impl}, lr=0.5, weight_decay=0.0)
    give(impl, [1], [[2.0**-14, -(2.0**-14)]])
    optimizer.step()  # g² is 2⁻²⁸, and eps is 1e-8: both are 0 in float16
    assert by_id(impl)[1] == pytest.approx([0.0, 1.0], abs=1e-3)
    for name in MOMENTS:
        assert slot(impl, name).value().dtype is torch.float32
    assert by_id(impl, MOMENTS[1])[1] == pytest.approx([1e-3 * 2.0**-28] * 2, rel=1e-5)


def test_rows_of_a_float64_table_have_float64_moments():
    impl = make(dtype=torch.float64)
    SparseAdamW({"table": impl})
    impl.embedding_lookup(torch.tensor([1]), False)
    assert [slot(impl, name).value().dtype for name in MOMENTS] == [torch.float64] * 2


def test_a_module_that_wraps_an_impl_trains(engine):
    model = torch.nn.Module()
    model.users = stand_in.HashTable(make(), "users")
    model.films = HashTable([2], name="films")
    tables = filter_out_sparse_param(model)
    assert list(tables) == ["users", "films"]
    optimizer = SparseAdamW(tables, **BY_HAND)
    out = model.users(torch.tensor([[4, 5], [5, 4]]))
    assert out.shape == (2, 2, 2)
    (out * torch.tensor([2.0, -4.0])).sum().backward()
    optimizer.step()
    assert by_id(model.users._hashtable_impl) == {4: [-0.125, 0.875], 5: [-0.125, 0.875]}
    assert by_id(model.users._hashtable_impl, MOMENTS[0]) == {4: [2.0, -4.0], 5: [2.0, -4.0]}


def test_recis_modules_of_one_name_clash_and_a_shared_one_is_listed_once():
    impl = make()
    model = torch.nn.ModuleList([stand_in.HashTable(impl, "a"), stand_in.HashTable(impl, "a")])
    assert list(filter_out_sparse_param(model)) == ["a"]
    model.append(stand_in.HashTable(make(), "a"))
    with pytest.raises(ValueError, match="two tables are named 'a': 0 and 2"):
        filter_out_sparse_param(model)
    assert list(filter_out_sparse_param(stand_in.HashTable(impl, ""))) == ["HashTable"]


def test_without_a_gradient_t_stays_and_with_an_empty_one_it_advances(engine):
    impl = make()
    optimizer = SparseAdamW({"table": impl})
    impl.embedding_lookup(torch.tensor([1, 2]), False)
    before = everything(impl)
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    give(impl, [], torch.zeros(0, 2))
    optimizer.step()
    assert optimizer.state_dict()["state"]["table"]["step"] == 1
    assert same(everything(impl), before)


def test_an_id_that_a_read_only_lookup_missed_has_no_gradient(engine):
    impl = make()
    optimizer = SparseAdamW({"table": impl}, **BY_HAND)
    impl.embedding_lookup(torch.tensor([1]), False)
    give(impl, [1, 77], [[2.0, -4.0], [5.0, 5.0]], readonly=True)
    optimizer.step()
    assert by_id(impl) == {1: [-0.125, 0.875]}
    assert by_id(impl, MOMENTS[0]) == {1: [1.0, -2.0]}


def test_the_slots_are_made_anew_only_when_blocks_appear():
    impl = make()
    optimizer = SparseAdamW({"table": impl})
    table = optimizer.param_groups[0]["params"][0]
    seen = []
    for ids in ([1, 2], [2, 1], [3, 4, 5]):
        give(impl, ids, 1.0)
        pending = table.pending("table")
        seen.append((pending.param, *table.moments(pending, {})))
        impl.clear_grad()
    first, second, third = seen
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert not any(a is b for a, b in zip(first, third, strict=True))
    assert [s.num_rows() for s in first + third] == [4] * 3 + [8] * 3
    for ours, name in zip(third, ("embedding", *MOMENTS), strict=True):
        theirs = slot(impl, name).values()
        assert [b.data_ptr() for b in ours.values()] == [b.data_ptr() for b in theirs]
        assert ours.addresses().tolist() == [b.data_ptr() for b in theirs]


def test_blocks_that_were_replaced_are_seen():
    """After clear(), RecIS makes the next block for row 4 on, and uses it for row 0 on."""
    impl = make()
    optimizer = SparseAdamW({"table": impl}, **BY_HAND)
    give(impl, [1], 1.0)
    optimizer.step()
    old = [slot(impl, name).values()[0] for name in ("embedding", *MOMENTS)]
    kept = [block.clone() for block in old]
    impl.clear()
    impl.insert(torch.arange(4), torch.full((4, 2), 0.5))
    give(impl, [3], [[2.0, -4.0]])
    optimizer.step()
    assert by_id(impl, MOMENTS[0]) == {0: [0.0] * 2, 1: [0.0] * 2, 2: [0.0] * 2, 3: [1.0, -2.0]}
    assert same(old, kept)


# ---------------------------------------------------------------------- gradients that are wrong


@pytest.mark.parametrize(
    "lookups",
    [
        [[1, 2, 3], [3]],
        [[1], [1]],
        [[1, 2], [1, 2]],
        [[5, 4, 3, 2, 1], [1, 9]],
        [[1], [2], [3, 1]],
    ],
)
def test_rows_that_repeat_across_lookups_are_refused(engine, lookups):
    impl, other = make(), torch.nn.Embedding(3, 2, sparse=True)
    optimizer = SparseAdamW({"other": other, "films": impl})
    give(impl, [8, 1, 9], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    for ids in lookups:
        give(impl, ids, 1.0)
    other(torch.tensor([1])).sum().backward()
    before, weight = everything(impl), other.weight.detach().clone()
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"table 'films'.*several gradients.*clear_grad.*once per update"
        ):
            optimizer.step()
    assert same(everything(impl), before)
    assert torch.equal(other.weight, weight)
    state = optimizer.state_dict()["state"]
    assert list(state) == ["films"]
    assert state["films"]["step"] == 1
    assert impl.grad(1)._nnz() == sum(map(len, lookups))  # they are still there

    impl.clear_grad()
    give(impl, [1, 3], 1.0)
    optimizer.step()
    assert optimizer.state_dict()["state"]["films"]["step"] == 2
    assert not same(everything(impl), before)


def test_every_list_of_rows_is_told_right_from_wrong():
    """All 1,365 lists of up to 5 rows of 4, as one lookup and as two."""
    impl = make()
    table = RecisTable.of("table", impl)
    table.drop_moments()
    impl.embedding_lookup(torch.arange(4), False)
    refused = 0
    lists = [[]]
    for _ in range(5):
        lists += [[*rows, row] for rows in lists if len(rows) == len(lists[-1]) for row in range(4)]
    for rows in lists:
        for cut in {0, len(rows) // 2}:
            impl.clear_grad()
            for part in (rows[:cut], rows[cut:]):
                impl.accept_grad(
                    torch.tensor(part, dtype=torch.int64),
                    torch.tensor(part)[:, None].float().expand(-1, 2),
                )
            if len(set(rows)) == len(rows):
                (piece,) = table.pending("table").pieces
                assert piece.rows.tolist() == rows
                assert piece.grad[:, 0].tolist() == rows
            else:
                refused += 1
                with pytest.raises(RuntimeError, match="several gradients"):
                    table.pending("table")
    assert refused == 2 * (1365 - 1 - 4 - 12 - 24 - 24)


def test_two_ids_that_a_read_only_lookup_missed_are_refused():
    impl = make()
    optimizer = SparseAdamW({"table": impl})
    impl.embedding_lookup(torch.tensor([1]), False)
    give(impl, [1, 77, 78], 1.0, readonly=True)
    with pytest.raises(RuntimeError, match="a read-only lookup may miss one id at most"):
        optimizer.step()


def test_micro_batches_with_a_row_in_common_are_refused_and_disjoint_ones_accumulate(engine):
    impl = make()
    optimizer = SparseAdamW({"table": impl}, **BY_HAND)
    optimizer.set_grad_accum_steps(2)
    give(impl, [1], [[2.0, -4.0]])
    optimizer.step()
    optimizer.zero_grad()
    give(impl, [2], [[-2.0, 4.0]])
    optimizer.step()
    optimizer.zero_grad()
    assert by_id(impl) == {1: [-0.125, 0.875], 2: [0.875, -0.125]}
    assert by_id(impl, MOMENTS[0]) == {1: [1.0, -2.0], 2: [-1.0, 2.0]}
    before = everything(impl)
    give(impl, [1], 1.0)
    optimizer.step()
    give(impl, [1], 1.0)
    with pytest.raises(RuntimeError, match="several gradients"):
        optimizer.step()
    assert same(everything(impl), before)


class OtherVersion:
    """An impl whose grad() returns something else."""

    def __init__(self, impl, grad):
        self._impl, self._grad = impl, grad

    def __getattr__(self, name):
        return (lambda steps: self._grad) if name == "grad" else getattr(self._impl, name)


def sparse(rows, size, values=None):
    values = torch.ones(len(rows), 2) if values is None else values
    return torch.sparse_coo_tensor([rows], values, size, check_invariants=False)


@pytest.mark.parametrize(
    ("grad", "error", "match"),
    [
        (sparse([0, 1], (9, 2)), RuntimeError, r"shape\[0\] = 9 and indices from 0 to 1"),
        (sparse([-2, 1], (2, 2)), RuntimeError, "indices from -2 to 1"),
        (sparse([0, 4], (5, 2)), RuntimeError, "names row 4, but the table holds memory for 4"),
        (torch.ones(2, 2), RuntimeError, "is a torch.strided tensor"),
        (torch.ones(2, 2).to_sparse(), RuntimeError, "has 2 sparse dimensions"),
        (sparse([0], (1, 3), torch.ones(1, 3)), ValueError, r"must have shape \[1, 2\]"),
        (sparse([0], (1, 2), torch.ones(1, 2).double()), TypeError, "must be torch.float32"),
    ],
)
def test_a_gradient_that_does_not_match_the_rows_is_refused(grad, error, match):
    impl = make()
    optimizer = SparseAdamW({"films": OtherVersion(impl, grad)})
    impl.embedding_lookup(torch.tensor([1, 2]), False)
    before = everything(impl)
    with pytest.raises(error, match=f"table 'films'.*{match}"):
        optimizer.step()
    assert same(everything(impl), before)
    assert optimizer.state_dict()["state"] == {}


def test_what_grad_itself_says_is_passed_on():
    impl = make()
    optimizer = SparseAdamW({"films": impl})
    impl.embedding_lookup(torch.tensor([1, 2]), False)
    impl.accept_grad(torch.tensor([0, 1]), torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="table 'films': RecIS cannot put its gradients"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()


def test_rows_without_memory_after_clear_are_refused():
    """RecIS's clear() drops the blocks but counts them still: the next rows have no memory."""
    impl = make()
    optimizer = SparseAdamW({"films": impl})
    give(impl, [1], 1.0)
    optimizer.step()
    impl.clear()
    assert slot(impl, "embedding").values() == []
    impl.accept_grad(torch.tensor([0]), torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="names row 0, but the table holds memory for 0 rows"):
        optimizer.step()


# ---------------------------------------------------------------------- moments in RecIS's slots


def test_rows_that_were_deleted_start_with_zero_moments(engine):
    impl = make()
    optimizer = SparseAdamW({"table": impl}, **BY_HAND)
    give(impl, [1, 2], [[2.0, -4.0], [2.0, -4.0]])
    optimizer.step()
    optimizer.zero_grad()
    ids, rows = impl.ids_map()
    gone = ids == 1
    impl.delete(ids[gone], rows[gone], "")
    give(impl, [3], [[2.0, 2.0]])
    (row_of_3,) = (r for i, r in zip(*(x.tolist() for x in impl.ids_map()), strict=True) if i == 3)
    assert row_of_3 == int(rows[gone])  # reused
    optimizer.step()
    assert by_id(impl, MOMENTS[0]) == {2: [1.0, -2.0], 3: [1.0, 1.0]}
    assert by_id(impl, MOMENTS[1]) == {2: [1.0, 4.0], 3: [1.0, 1.0]}
    assert by_id(impl)[2] == [-0.125, 0.875]


def test_slots_appear_when_the_optimizer_is_made_and_only_then():
    impl = make()
    with pytest.raises(TypeError, match="other: expected"):
        SparseAdamW({"table": impl, "other": 3})
    assert [s.name() for s in impl.slot_group().slots()] == ["embedding"]
    SparseAdamW({"table": impl})
    assert [s.name() for s in impl.slot_group().slots()] == ["embedding", *MOMENTS]
    SparseAdamW({"table": impl})
    assert len(impl.slot_group().slots()) == 3
    assert [slot(impl, name).flat_size() for name in MOMENTS] == [2, 2]


@pytest.mark.parametrize("there", [(), MOMENTS[:1]])
def test_a_table_that_has_rows_and_no_slots_is_refused(there):
    """RecIS gives a slot memory from the next block on, as of which its rows would be shifted."""
    impl = make()
    for name in there:
        append(impl, name, torch.float32)
    impl.embedding_lookup(torch.tensor([1]), False)
    with pytest.raises(RuntimeError, match=r"table 'films' has rows already.*before its first"):
        SparseAdamW({"films": impl})
    assert len(impl.slot_group().slots()) == 1 + len(there)


def append(impl, name, dtype, dim=2):
    zeros = torch.classes.recis.Generator.make_constant_generator([4, dim], dtype, 0.0)
    impl.append_filter_slot(name, dtype, dim, zeros)


def test_slots_that_were_appended_too_late_are_refused():
    impl = make()
    impl.embedding_lookup(torch.tensor([1]), False)
    for name in MOMENTS:
        append(impl, name, torch.float32)
    with pytest.raises(RuntimeError, match="has memory for 0 rows, its embeddings for 4"):
        SparseAdamW({"films": impl})


@pytest.mark.skipif(bool(LIBRARY), reason="RecIS's own table cannot be made to run out of memory")
def test_slots_that_went_out_of_step_are_refused():
    """Out of memory between two slots: RecIS leaves the first with one block more."""
    impl = make()
    optimizer = SparseAdamW({"films": impl})
    give(impl, [1], 1.0)
    stand_in.unwrapped(impl.slot_group()).slot_by_name("embedding").grow()
    with pytest.raises(RuntimeError, match="has memory for 4 rows, its embeddings for 8"):
        optimizer.step()
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize(
    ("dtype", "dim", "match"),
    [
        (torch.float64, 2, "is torch.float64 with D = 2"),
        (torch.float32, 3, "is torch.float32 with D = 3"),
    ],
)
def test_slots_that_do_not_fit_are_refused(dtype, dim, match):
    impl = make()
    append(impl, MOMENTS[0], torch.float32)
    append(impl, MOMENTS[1], dtype, dim)
    with pytest.raises(TypeError, match=f"table 'films': its slot {MOMENTS[1]} {match}"):
        SparseAdamW({"films": impl})


def test_float16_slots_of_recis_own_optimizer_are_refused():
    impl = make(dtype=torch.float16)
    new = torch.classes.recis.Generator.make_uniform_generator([4, 2], torch.float16, 0, 0, None)
    for name in MOMENTS:
        impl.append_filter_slot(name, torch.float16, 2, new)
    with pytest.raises(TypeError, match=r"is torch.float16.*must be torch.float32"):
        SparseAdamW({"films": impl})


def test_slots_of_an_earlier_owner_are_zeroed(engine):
    impl = make()
    first = SparseAdamW({"table": impl}, **BY_HAND)
    give(impl, [1], [[2.0, -4.0]])
    first.step()
    del first
    second = SparseAdamW({"table": impl}, **BY_HAND)
    assert by_id(impl, MOMENTS[0]) == {1: [0.0, 0.0]}
    assert by_id(impl, MOMENTS[1]) == {1: [0.0, 0.0]}
    assert by_id(impl) == {1: [-0.125, 0.875]}
    assert second.state_dict()["state"] == {}
    second.step()  # with the gradient that is still there, t = 1 again
    assert by_id(impl, MOMENTS[0]) == {1: [1.0, -2.0]}
    expected = [-0.125 - 0.5 * (1 - 0.0625), 0.875 - 0.5 * (-1 + 0.4375)]
    assert by_id(impl) == {1: pytest.approx(expected, rel=1e-6)}


def test_slots_that_something_else_filled_are_not_used_at_an_unknown_t():
    impl = make()
    optimizer = SparseAdamW({"films": impl})
    impl.embedding_lookup(torch.tensor([1, 2]), False)
    impl.update_slot(MOMENTS[1], torch.tensor([1]), torch.ones(1, 2))  # as RecIS's loader does
    before = everything(impl)
    give(impl, [1], 1.0)
    with pytest.raises(RuntimeError, match=r"table 'films'.*filled.*optimizer.load_state_dict"):
        optimizer.step()
    assert same(everything(impl), before)
    second = SparseAdamW({"films": impl})  # takes the table over: zeroes what was there
    second.step()
    optimizer = SparseAdamW({"films": impl})
    impl.update_slot(MOMENTS[0], torch.tensor([1]), torch.ones(1, 2))
    with pytest.raises(RuntimeError, match=r"films'.*filled"):
        optimizer.step()
    state = optimizer.state_dict()
    state["state"]["films"] = {
        "step": 5,
        "ids": torch.tensor([1]),
        "exp_avg": torch.full((1, 2), 2.0),
        "exp_avg_sq": torch.full((1, 2), 4.0),
        "dtype": "float32",
    }
    optimizer.load_state_dict(state)
    optimizer.step()
    assert optimizer.state_dict()["state"]["films"]["step"] == 6
    assert by_id(impl, MOMENTS[0]) == {1: pytest.approx([1.9, 1.9]), 2: [0.0, 0.0]}


def test_a_table_has_one_owner_and_one_name():
    impl = make()
    with pytest.raises(ValueError, match="'a' and 'b' are the same table"):
        SparseAdamW({"a": impl, "b": stand_in.HashTable(impl, "b")})
    first = SparseAdamW({"films": impl})
    second = SparseAdamW({"films": impl})
    give(impl, [1], 1.0)
    with pytest.raises(RuntimeError, match="table 'films' now belongs to another optimizer"):
        first.step()
    second.step()
    with pytest.raises(ValueError, match="'films' and 'again' are the same table"):
        second.add_params({"again": impl})


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused(copied):
    optimizer = SparseAdamW({"table": make()})
    with pytest.raises(TypeError, match=r"neither copied nor pickled; save optimizer.state_dict"):
        copied(optimizer)


def test_tables_that_cannot_be_trained_are_refused():
    generators = torch.classes.recis.Generator
    zeros = generators.make_constant_generator([4, 2], torch.int64, 0.0)
    whole = torch.ops.recis.make_hashtable(
        4, [2], torch.int64, CPU, False, ["a"], zeros, 0, 65536, 65536
    )
    with pytest.raises(TypeError, match=r"films: tables are float32.*got torch.int64"):
        SparseAdamW({"films": whole})
    zeros = generators.make_constant_generator([4, 2, 3], torch.float32, 0.0)
    deep = torch.ops.recis.make_hashtable(
        4, [2, 3], torch.float32, CPU, False, ["b"], zeros, 0, 65536, 65536
    )
    with pytest.raises(TypeError, match=r"films: .*embedding_shape \[D\].*shape \[2, 3\]"):
        SparseAdamW({"films": deep})


def test_grad_scaler_is_refused():
    optimizer = SparseAdamW({"table": make()})
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1, requires_grad=True).sum())
    with pytest.raises(RuntimeError, match="GradScaler cannot"):
        scaler.step(optimizer)


# ---------------------------------------------------------------------- state


def train(impl, optimizer, begin, end):
    for t in range(begin, end):
        generator = torch.Generator().manual_seed(t)
        ids = torch.randperm(30, generator=generator)[:9].tolist()
        give(impl, ids, torch.randn(9, 2, generator=generator))
        optimizer.step()
        optimizer.zero_grad()


def test_resume_in_a_table_with_other_rows_is_bitwise(engine):
    whole, source = make(), make()
    optimizer = SparseAdamW({"table": whole}, lr=0.1)
    train(whole, optimizer, 0, 6)
    optimizer = SparseAdamW({"table": source}, lr=0.1)
    train(source, optimizer, 0, 3)
    state = optimizer.state_dict()

    target = make(block_size=7)
    resumed = SparseAdamW({"table": target}, lr=0.3)
    give(target, [-1, -2, -3], 1.0)  # rows of ids that the checkpoint does not know
    resumed.step()
    resumed.zero_grad()
    ids, rows = source.ids_map()
    target.insert(ids.flip(0), slot(source, "embedding").value()[rows].flip(0))
    resumed.load_state_dict(state)
    assert by_id(target, MOMENTS[0])[-1] == [0.0, 0.0]  # not part of the saved state
    mapped = dict(zip(*(x.tolist() for x in target.ids_map()), strict=True))
    assert [mapped[i] for i in ids.tolist()] != rows.tolist()
    train(target, resumed, 3, 6)
    for name in ("embedding", *MOMENTS):
        there = by_id(target, name)
        assert {i: there[i] for i in by_id(whole, name)} == by_id(whole, name), name
    assert resumed.state_dict()["state"]["table"]["step"] == 6


@pytest.mark.parametrize("back", [False, True], ids=["from RecIS", "to RecIS"])
def test_moments_move_between_recis_and_this_package(back):
    impl, ours = make(), HashTable([2])
    source, target = (ours, impl) if back else (impl, ours)
    optimizers = {id(x): SparseAdamW({"table": x}, lr=0.1) for x in (impl, ours)}
    ids = torch.tensor([4, -7, 2**62])
    for table in (impl, ours):
        table.insert(ids, torch.ones(3, 2))
    rows = ours.ids_map()[1] if back else impl.embedding_lookup(ids, False)[0]
    source.accept_grad(rows, torch.tensor([[1.0, -2.0], [3.0, 4.0], [5.0, 6.0]]))
    optimizers[id(source)].step()
    state = optimizers[id(source)].state_dict()
    optimizers[id(target)].load_state_dict(state)
    moved = optimizers[id(target)].state_dict()["state"]["table"]
    saved = state["state"]["table"]
    one, other = moved["ids"].argsort(), saved["ids"].argsort()
    for key in ("ids", "exp_avg", "exp_avg_sq"):
        assert torch.equal(moved[key][one], saved[key][other])
    assert moved["step"] == 1
    assert moved["exp_avg"].any()


def test_an_empty_table_holds_no_saved_ids():
    impl = make()
    optimizer = SparseAdamW({"films": impl})
    train(impl, optimizer, 0, 1)
    with pytest.raises(ValueError, match="name 9 ids that the table does not hold"):
        SparseAdamW({"films": make()}).load_state_dict(optimizer.state_dict())


def test_state_loads_with_weights_only(tmp_path):
    impl = make()
    optimizer = SparseAdamW({"table": impl})
    train(impl, optimizer, 0, 1)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    before = everything(impl)
    optimizer.load_state_dict(state)
    assert same(everything(impl), before)


def test_state_without_the_table_zeroes_its_moments():
    impl = make()
    optimizer = SparseAdamW({"table": impl})
    state = optimizer.state_dict()
    train(impl, optimizer, 0, 1)
    assert slot(impl, MOMENTS[0]).value().any()
    optimizer.load_state_dict(state)
    assert not any(slot(impl, name).value().any() for name in MOMENTS)
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ids": torch.tensor([1, 99])}, "name 1 ids that the table does not hold; load the model"),
        ({"ids": torch.tensor([1, 1])}, "name an id twice"),
        ({"ids": torch.tensor([1])}, "1 ids are saved with 2 moments"),
        ({"ids": None}, "have no ids"),
        ({"exp_avg": torch.ones(2, 3)}, "D = 3, the table D = 2"),
        ({"exp_avg_sq": torch.ones(2, 2).double()}, "torch.float64"),
    ],
)
def test_state_that_does_not_fit_changes_nothing(change, match):
    impl = make()
    optimizer = SparseAdamW({"films": impl})
    give(impl, [1, 2], 1.0)
    optimizer.step()
    before = everything(impl)
    state = optimizer.state_dict()
    state["state"]["films"] = {**state["state"]["films"], "step": 9, **change}
    with pytest.raises(ValueError, match=f"table 'films'.*{match}"):
        optimizer.load_state_dict(state)
    assert same(everything(impl), before)
    assert optimizer.state_dict()["state"]["films"]["step"] == 1
    assert impl.grad(1)._nnz() == 2


def test_gradients_of_a_micro_batch_are_saved_by_id_and_restored(engine):
    def start(block_size, first):
        impl = make(block_size=block_size)
        optimizer = SparseAdamW({"table": impl}, lr=0.1)
        optimizer.set_grad_accum_steps(2)
        impl.embedding_lookup(torch.tensor(first), False)
        return impl, optimizer

    impl, optimizer = start(4, [1, 2, 3, 4])
    give(impl, [1, 3], [[1.0, 2.0], [3.0, 4.0]])
    give(impl, [77], 9.0, readonly=True)  # a miss has no id
    optimizer.step()
    state = optimizer.state_dict()
    (piece,) = state["accumulation"]["grads"]["table"]
    assert piece["ids"].tolist() == [1, 3]
    assert piece["values"].tolist() == [[1.0, 2.0], [3.0, 4.0]]

    other, resumed = start(3, [9, 4, 3, 2, 1])
    give(other, [9], 1.0)
    resumed.load_state_dict(state)
    piece["values"].zero_()  # what was loaded is a copy
    for table, its in ((impl, optimizer), (other, resumed)):
        give(table, [2, 4], [[-1.0, 1.0], [2.0, -2.0]])
        its.step()
        its.zero_grad()
    for name in ("embedding", *MOMENTS):
        there = by_id(other, name)
        assert {i: there[i] for i in (1, 2, 3, 4)} == by_id(impl, name), name
    assert by_id(other, MOMENTS[0])[9] == [0.0, 0.0]
    assert by_id(other, MOMENTS[0])[3] == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize(
    ("pieces", "match"),
    [
        ([{"ids": torch.tensor([5]), "values": torch.ones(1, 2)}], "name 1 ids"),
        ([{"ids": torch.tensor([1]), "grad": torch.ones(1, 2)}], "not of a RecIS table"),
        ([{"indices": torch.tensor([[1]]), "values": torch.ones(1, 2)}], "have no ids"),
        ([{"ids": torch.tensor([1]), "values": torch.ones(1, 2)}] * 2, "name an id twice"),
        ([{"ids": torch.tensor([1]), "values": torch.ones(2, 2)}], r"must have shape \[1, 2\]"),
        ([3], "must be a dict"),
    ],
)
def test_saved_gradients_that_do_not_fit_change_nothing(pieces, match):
    impl = make()
    optimizer = SparseAdamW({"films": impl})
    optimizer.set_grad_accum_steps(2)
    give(impl, [1, 2], 1.0)
    optimizer.step()
    state = optimizer.state_dict()
    state["accumulation"]["grads"]["films"] = pieces
    with pytest.raises(ValueError, match=f"table 'films'.*{match}"):
        optimizer.load_state_dict(state)
    assert impl.grad(1)._nnz() == 2


# ---------------------------------------------------------------------- the stand-in itself


def test_grad_is_wrong_as_in_recis_own_test():
    """tests/hashtable/ht_grad_ga_test.py expects positions 0, 1, 2 for the rows 1, 2, 3."""
    impl = make(4)
    impl.accept_grad(torch.tensor([1, 2, 3]), torch.ones(3, 4))
    impl.accept_grad(torch.tensor([1, 1, 1]), torch.full((3, 4), 2.0))
    impl.accept_grad(torch.tensor([2, 2, 2]), torch.full((3, 4), 3.0))
    grad = impl.grad(3)
    assert grad.shape == (4, 4)
    assert grad._nnz() == 9
    grad = grad.coalesce()
    assert grad.indices().tolist() == [[0, 1, 2]]
    assert torch.allclose(grad.values()[:, 0], torch.tensor([7.0, 10.0, 1.0]) / 3)


def test_only_what_is_bound_is_there():
    impl = make()
    assert impl.hashtable_tag == -1
    for name in ("has_grad", "ids_num", "_grads", "reserve", "device", "dtype"):
        assert not hasattr(impl, name)
        assert not hasattr(slot(impl, "embedding"), name)
    with pytest.raises((TypeError, RuntimeError)):
        impl.grad()
    with pytest.raises((TypeError, RuntimeError)):
        impl.grad(accmulate_steps=1)
    with pytest.raises(NotImplementedError):
        impl == impl  # noqa: B015
    with pytest.raises(RuntimeError):
        slot(impl, "absent")
    with pytest.raises(RuntimeError):
        impl.children_info().encode_id(1)
    assert impl.slot_group() is not impl.slot_group()


def test_rows_and_slots_are_as_in_recis():
    impl = make()
    rows, values = impl.embedding_lookup(torch.tensor([7, 8, 9]), False)
    assert rows.tolist() == [2, 1, 0]
    assert values.tolist() == [[0.5, 0.5]] * 3
    append(impl, "late", torch.float32)
    impl.embedding_lookup(torch.arange(10), False)
    assert len(slot(impl, "late").values()) == 2
    assert len(slot(impl, "embedding").values()) == 3
    assert impl.embedding_lookup(torch.tensor([55]), True)[0].tolist() == [-1]
    impl = make()
    impl.embedding_lookup(torch.arange(6), False)
    impl.delete(torch.tensor([3]), torch.tensor([2]), "")
    assert impl.embedding_lookup(torch.tensor([99, 100]), False)[0].tolist() == [6, 2]
    with pytest.raises(NotImplementedError):
        torch.ops.recis.make_hashtable(
            4,
            [2],
            torch.float16,
            CPU,
            False,
            ["half"],
            torch.classes.recis.Generator.make_constant_generator([4, 2], torch.float16, 0.0),
            0,
            65536,
            65536,
        ).embedding_lookup(torch.tensor([1]), False)


# ---------------------------------------------------------------------- docs/from-recis.md


def write_shard(folder, number, tensors):
    """A file as RecIS's TableWriter lays it out."""
    names = {torch.float32: "F32", torch.int64: "I64"}
    header, data = {}, b""
    for key, tensor in tensors.items():
        content = tensor.numpy().tobytes()
        header[key] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (8 - len(text) % 8)
    path = folder / f"model-{number:06d}-of-000002.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_the_documented_way_loads_a_checkpoint(tmp_path, monkeypatch):
    text = Path(__file__).parents[1].joinpath("docs", "from-recis.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "checkpoint").mkdir()
    for shard, ids in enumerate(([5, -9], [2**62])):
        rows = torch.tensor(ids).float()[:, None].expand(-1, 2).contiguous()
        tensors = {
            f"users.id/part_{shard}_2": torch.tensor(ids),
            f"users.sparse_adamw_exp_avg/part_{shard}_2": rows / 2,
            f"users.embedding/part_{shard}_2": rows,
            f"users.sparse_adamw_exp_avg_sq/part_{shard}_2": rows * rows,
        }
        if shard == 0:
            tensors["sparse_adamw_step^ "] = torch.tensor([0])
            tensors["sparse_adamw_beta2^ "] = torch.tensor(0.999**1234)
        write_shard(tmp_path / "checkpoint", shard, tensors)
    monkeypatch.chdir(tmp_path)
    space = {}
    for snippet in snippets[2:]:
        exec(snippet, space)
    optimizer, users = space["optimizer"], space["users"]
    state = optimizer.state_dict()["state"]["users"]
    assert state["step"] == 1234
    assert state["ids"].tolist() == [5, -9, 2**62]
    assert state["exp_avg"].tolist() == [[2.5, 2.5], [-4.5, -4.5], [2.0**61] * 2]
    assert state["exp_avg_sq"].tolist() == [[25.0, 25.0], [81.0, 81.0], [2.0**124] * 2]
    assert users.embeddings().tolist() == [[5.0, 5.0], [-9.0, -9.0], [2.0**62] * 2]
    exec(snippets[0], {})
    model = torch.nn.ModuleDict({"users": stand_in.HashTable(make(), "users")})
    table = make()
    exec(snippets[1], {**vars(cupy_sparse_adamw), "recis_table": table, "model": model})
    assert len(table.slot_group().slots()) == 3
