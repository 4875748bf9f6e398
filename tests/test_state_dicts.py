"""Splitting a state_dict into tables and the rest, and putting it together again."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict

import pytest
import torch

from cupy_sparse_adamw import HashTable, NormalInitializer, filter_out_sparse_param
from cupy_sparse_adamw.state_dicts import is_hashtable, split_sparse_dense_state_dict


class Model(torch.nn.Module):
    """Two tables at different depths, a sparse Embedding, and layers with names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.users = HashTable([4], initializer=NormalInitializer())
        # Named like a table, and like one of a table's entries.
        self.users_head = torch.nn.Linear(4, 2)
        self.ids = torch.nn.Linear(2, 2)
        self.tower = torch.nn.ModuleDict(
            {"films": HashTable([2, 3]), "norm": torch.nn.BatchNorm1d(4)}
        )
        self.plain = torch.nn.Embedding(5, 4, sparse=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.users_head(self.users(ids)).sum() + self.tower["films"](ids).sum()


TABLES = ("users.", "tower.films.")


def trained() -> Model:
    model = Model()
    model(torch.tensor([5, -7, 2**62]))
    return model


def same(first: dict, second: dict) -> bool:
    return list(first) == list(second) and all(first[key] is second[key] for key in first)


def test_every_entry_is_on_one_side():
    state = trained().state_dict()
    before = copy.copy(state)
    sparse, dense = split_sparse_dense_state_dict(state)
    assert list(sparse) == [key for key in state if key.startswith(TABLES)]
    assert list(dense) == [key for key in state if not key.startswith(TABLES)]
    assert {"users.ids", "users.embedding", "tower.films.seed"} <= set(sparse)
    assert {"users_head.weight", "ids.weight", "tower.norm.running_mean"} <= set(dense)
    assert "plain.weight" in dense
    assert all(part[key] is state[key] for part in (sparse, dense) for key in part)
    assert same(state, before)  # RecIS takes the sparse entries out
    assert state._metadata == before._metadata


def test_together_they_load():
    model, twin = trained(), Model()
    sparse, dense = split_sparse_dense_state_dict(model.state_dict())
    twin.load_state_dict({**sparse, **dense})
    ids = torch.tensor([2**62, 5, -7])
    assert torch.equal(twin.users(ids), model.users(ids))
    assert twin.users.ids().tolist() == [5, -7, 2**62]
    assert torch.equal(twin.users_head.weight, model.users_head.weight)
    new = torch.tensor([11])  # of the same seed
    assert torch.equal(twin.users(new), model.users(new))


@pytest.mark.parametrize(
    "copy_of",
    [
        copy.deepcopy,
        dict,  # without _metadata
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {key: state[key] for key in sorted(state)},
    ],
)
def test_copies_are_split_alike(copy_of):
    state = copy_of(trained().state_dict())
    sparse, dense = split_sparse_dense_state_dict(state)
    keys = {key.removeprefix("module.") for key in sparse}
    assert keys == {key for key in trained().state_dict() if key.startswith(TABLES)}
    assert len(sparse) + len(dense) == len(state)


def test_files_are_split_alike():
    model, twin = trained(), Model()
    buffers = []
    for part in split_sparse_dense_state_dict(model.state_dict()):
        buffers.append(io.BytesIO())
        torch.save(part, buffers[-1])
        buffers[-1].seek(0)
    sparse, dense = (torch.load(buffer, weights_only=True) for buffer in buffers)
    # Each goes into the model alone too, with the versions of its modules.
    assert set(twin.load_state_dict(sparse, strict=False).missing_keys) == set(dense)
    assert set(twin.load_state_dict(dense, strict=False).missing_keys) == set(sparse)
    assert torch.equal(twin.users.embeddings(), model.users.embeddings())
    assert torch.equal(twin.plain.weight, model.plain.weight)
    assert dense._metadata["tower.norm"] == {"version": 2}
    again = split_sparse_dense_state_dict({**dense, **sparse})
    assert [sorted(part) for part in again] == [sorted(sparse), sorted(dense)]


def test_a_model_that_is_a_table_is_all_sparse():
    state = HashTable([4]).state_dict()
    sparse, dense = split_sparse_dense_state_dict(state)
    assert same(sparse, state)
    assert dense == {}


def test_empty_tables_and_other_entries_of_a_table():
    state = Model().state_dict()  # no rows yet
    state["users.filter.last_step"] = torch.zeros(0)
    state["users.more"] = None
    sparse, _ = split_sparse_dense_state_dict(state)
    assert set(sparse) == {key for key in state if key.startswith(TABLES)}


ENTRIES = {
    "ids": torch.zeros(3, dtype=torch.int64),
    "embedding": torch.zeros(3, 2),
    "seed": torch.tensor(5),
    "fan": torch.tensor([2, 1024]),
}


def test_names_alone_make_no_table():
    assert len(split_sparse_dense_state_dict({f"m.{k}": v for k, v in ENTRIES.items()})[0]) == 4
    for change in (
        {"ids": torch.zeros(4, dtype=torch.int64)},  # more ids than embeddings
        {"ids": torch.zeros(3, 2, dtype=torch.int64)},
        {"embedding": torch.zeros(3)},
        {"embedding": "glove"},
        {"seed": torch.zeros(1)},
        {"fan": torch.tensor(3)},
        {"fan": torch.tensor([1, 2, 3])},
        {"fan": None},
    ):
        state = {f"m.{key}": value for key, value in {**ENTRIES, **change}.items()}
        sparse, dense = split_sparse_dense_state_dict(state)
        assert sparse == {}
        assert same(dense, state)
    for left_out in ENTRIES:
        state = {f"m.{key}": value for key, value in ENTRIES.items() if key != left_out}
        assert split_sparse_dense_state_dict(state)[0] == {}


class RecisImpl:
    """Of RecIS's HashtableImpl, what is asked here."""

    hashtable_tag = -1


def test_a_state_dict_of_recis():
    table = RecisImpl()
    state = OrderedDict(dense=torch.ones(2), users=table, nothing=None, more=torch.ones(1))
    sparse, dense = split_sparse_dense_state_dict(state)
    assert sparse == {"users": table}
    assert list(dense) == ["dense", "nothing", "more"]
    assert "users" in state


def test_is_hashtable():
    assert is_hashtable(HashTable([4]))
    assert is_hashtable(RecisImpl())
    tables = filter_out_sparse_param(Model())
    assert {name: is_hashtable(table) for name, table in tables.items()} == {
        "users": True,
        "tower.films": True,
        "plain": False,
    }
    for other in (None, torch.ones(2), torch.nn.Embedding(2, 2, sparse=True), HashTable, "table"):
        assert not is_hashtable(other)


def test_a_model_is_no_state_dict():
    with pytest.raises(TypeError, match=r"state_dict must be a dict, got Model; use model.state"):
        split_sparse_dense_state_dict(Model())
