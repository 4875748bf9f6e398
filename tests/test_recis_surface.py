"""RecIS's surface of a HashTable: slots, several logical tables in one, slices."""

from __future__ import annotations

import pytest
import torch
from oracle import bits

from cupy_sparse_adamw import (
    ChildrenInfo,
    FilterHook,
    HashTable,
    NormalInitializer,
    SparseAdamW,
    filter_out_sparse_param,
    gen_slice,
    is_hashtable,
)


def normal_table(dim=3, **options) -> HashTable:
    generator = torch.Generator(device="cpu").manual_seed(0)
    options = {"device": torch.ones(0).device, "block_size": 4, **options}
    return HashTable([dim], initializer=NormalInitializer(generator=generator), **options)


def step(table, optimizer, ids):
    (table(ids) ** 2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------------- slots


def test_slot_group(engine):
    table = normal_table(filter_hook=FilterHook("LRU", {"max_rows": 100}))
    group = table.slot_group()
    assert [slot.name() for slot in group.slots()] == ["embedding", "lru_clock"]
    step(table, SparseAdamW({"items": table}), torch.arange(6))
    names = ["embedding", "lru_clock", "sparse_adamw_exp_avg", "sparse_adamw_exp_avg_sq"]
    assert [slot.name() for slot in group.slots()] == names
    for index, name in enumerate(names):
        assert group.slot_index(name) == index
        assert group.slot_by_index(index) is group.slot_by_name(name)
        assert group.slot_by_name(name).flat_size() == (1 if name == "lru_clock" else 3)
        assert group.slot_by_name(name).block_size() == 4
    with pytest.raises(KeyError, match="no slot 'x'; there are 'embedding', 'lru_clock', "):
        group.slot_index("x")
    with pytest.raises(IndexError, match="no slot 4; there are 4"):
        group.slot_by_index(4)


def test_blocks_are_the_rows_themselves(engine):
    """Row r is row r % block_size of block r // block_size, not a copy of it."""
    table = normal_table()
    table(torch.arange(6))
    ids, rows = table.ids_map()
    blocks = table.slot_group().slot_by_name("embedding").values()
    assert [list(block.shape) for block in blocks] == [[4, 3], [4, 3]]
    for id_, row in zip(ids.tolist(), rows.tolist(), strict=True):
        blocks[row // 4][row % 4] = id_
    table.eval()
    assert table(torch.arange(6)).tolist() == [[i] * 3 for i in range(6)]
    assert torch.equal(table.slot_group().slot_by_name("embedding").value()[:8], torch.cat(blocks))


def test_a_group_shows_the_slots_of_after_a_load():
    table, group = normal_table(), None
    table(torch.arange(3))
    group = table.slot_group()
    table.clear()
    assert group.slot_by_name("embedding").num_rows() == 0


def test_a_slot_with_a_first_value_for_rows_that_are_there(engine):
    table = normal_table()
    table(torch.arange(3))
    table.append_step_filter_slot("seen", torch.tensor([7]))
    table(torch.tensor([9]))
    table.delete(torch.tensor([1]))
    values = table.state_dict()
    assert dict(zip(values["ids"].tolist(), values["seen"].flatten().tolist(), strict=True)) == {
        0: 7,
        2: 7,
        9: 0,
    }


# ---------------------------------------------------------------------- several tables in one


def test_children_share_a_table_and_nothing_else(engine):
    """Two logical tables in one, beside two tables: the same weights, bit for bit."""
    both = normal_table(coalesced=True, children=["user", "item"], name="both")
    info = both.children_info()
    assert isinstance(info, ChildrenInfo)
    assert both.children_hashtable == ["user", "item"]
    assert both.coalesce is True
    apart = [HashTable([3], block_size=4, device=both.device) for _ in range(2)]
    ids = torch.tensor([5, 6, 5, 2**52 - 1])
    encoded = [info.encode_id(ids, child) for child in info.children()]
    for table, those in zip(apart, encoded, strict=True):
        table.insert(ids, both(those).detach())
    optimizers = [SparseAdamW({"t": table}, lr=0.1) for table in (both, *apart)]
    for factor in (1.0, 2.0):
        (
            both(torch.cat(encoded)) * torch.tensor([factor] * 4 + [-factor] * 4)[:, None]
        ).sum().backward()
        (apart[0](ids) * factor).sum().backward()
        (apart[1](ids) * -factor).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for table, those in zip(apart, encoded, strict=True):
        assert torch.equal(bits(both(those)), bits(table(ids)))
    state = both.state_dict()
    children, plain = info.split_id(state["ids"])
    assert sorted(children.tolist()) == [0, 0, 0, 1, 1, 1]
    assert sorted(set(plain.tolist())) == [5, 6, 2**52 - 1]
    twin = normal_table(coalesced=True, children=["user", "item"])
    twin.load_state_dict(state)
    assert torch.equal(bits(twin(encoded[1])), bits(both(encoded[1])))


def test_a_table_of_its_own_is_its_only_child():
    assert normal_table(name="users").children_hashtable == ["users"]
    assert normal_table().coalesce is False


# ---------------------------------------------------------------------- slices


@pytest.mark.parametrize("shards", [2, 3])
def test_one_table_loads_into_shards_and_training_goes_on(engine, shards):
    """Weights, moments and gradients that wait: each shard takes those of its ids."""
    torch.manual_seed(0)
    ids = torch.randint(-(2**63), 2**63 - 1, (60,))
    whole = normal_table()
    optimizer = SparseAdamW({"items": whole}, lr=0.1)
    step(whole, optimizer, ids)
    optimizer.set_grad_accum_steps(2)
    (whole(ids) ** 2).sum().backward()
    optimizer.step()  # counts a micro-batch
    saved = whole.state_dict(), optimizer.state_dict()
    parts = []
    for index in range(shards):
        part = normal_table(slice=gen_slice(index, shards), block_size=7)
        part_optimizer = SparseAdamW({"items": part}, lr=0.1)
        part.load_state_dict(saved[0])
        part_optimizer.load_state_dict(saved[1])
        parts.append((part, part_optimizer, gen_slice(index, shards).contains(ids)))
    assert sum(len(part) for part, *_ in parts) == len(whole)
    (whole(ids) ** 3).sum().backward()
    optimizer.step()
    for part, part_optimizer, mine in parts:
        (part(ids[mine]) ** 3).sum().backward()
        part_optimizer.step()
        assert torch.equal(bits(part(ids[mine])), bits(whole(ids[mine])))
        assert len(part) == int(mine.sum())


def test_is_hashtable_and_the_tables_of_a_model():
    table = normal_table(name="users")
    model = torch.nn.ModuleDict({"a": table, "b": torch.nn.Linear(2, 2)})
    assert is_hashtable(table)
    assert not is_hashtable(model["b"])
    assert filter_out_sparse_param(model) == {"users": table}
