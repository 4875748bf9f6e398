"""Rows of exp_avg and exp_avg_sq lie side by side in memory where an engine is quicker then."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from oracle import bits

from cupy_sparse_adamw import HashTable, SparseAdamW, checkpoint, functional
from cupy_sparse_adamw._slots import Slot
from cupy_sparse_adamw.row_store import EXP_AVG, EXP_AVG_SQ

DIM, ROWS = 6, 40


class Training:
    """A HashTable and an Embedding under one optimizer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.ModuleDict(
            {
                "table": HashTable((DIM,), block_size=16, dtype=dtype),
                "embedding": torch.nn.Embedding(ROWS, DIM, sparse=True, dtype=dtype),
            }
        )
        self.optimizer = SparseAdamW(dict(self.model.items()), lr=0.01)

    def step(self, *seeds: int) -> Training:
        for seed in seeds:
            ids = torch.randint(ROWS, (23,), generator=torch.Generator().manual_seed(seed))
            sum(module(ids).square().sum() for module in self.model.values()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def moments(self, name: str) -> list[torch.Tensor]:
        """exp_avg and exp_avg_sq in memory, the first block."""
        module = self.model[name]
        if name == "table":
            slots = module.slot_group()
            return [slots.slot_by_name(slot).values()[0] for slot in (EXP_AVG, EXP_AVG_SQ)]
        state = self.optimizer.state[module.weight]
        return [state["exp_avg"], state["exp_avg_sq"]]

    def bits(self) -> list[torch.Tensor]:
        rows = torch.arange(ROWS)
        with torch.no_grad(), functional.use_engine("reference"):
            weights = [self.model.eval()[name](rows) for name in self.model]
        self.model.train()
        return [bits(x) for name in self.model for x in (*weights, *self.moments(name))]


def are_side_by_side(first: torch.Tensor, second: torch.Tensor) -> bool:
    width = first.shape[1]
    return (
        first.stride() == second.stride() == (2 * width, 1)
        and second.data_ptr() - first.data_ptr() == width * first.itemsize
    )


def save_and_load_states(training: Training, path) -> Training:
    buffer = io.BytesIO()
    torch.save([x.state_dict() for x in (training.model, training.optimizer)], buffer)
    buffer.seek(0)
    other = Training()
    for x, state in zip((other.model, other.optimizer), torch.load(buffer), strict=True):
        x.load_state_dict(state)
    return other


def save_and_load_checkpoint(training: Training, path) -> Training:
    where = {"model": training.model, "optimizer": training.optimizer}
    saved = checkpoint.save(path, **where, step=1)
    other = Training()
    checkpoint.load(saved, model=other.model, optimizer=other.optimizer)
    return other


def load_the_model_alone(training: Training, path) -> Training:
    training.model.load_state_dict(copy.deepcopy(training.model.state_dict()))
    return training


CHANGES = {
    "a step": lambda training, path: training,
    "growth": lambda training, path: (training.model["table"].reserve(500), training)[1],
    "state_dict": save_and_load_states,
    "checkpoint": save_and_load_checkpoint,
    "model's": load_the_model_alone,
}


@pytest.mark.parametrize("change", CHANGES)
def test_moments_are_where_the_engine_wants_them(engine, change, tmp_path):
    training = CHANGES[change](Training().step(1), tmp_path).step(2)
    for name in training.model:
        first, second = training.moments(name)
        if functional.pairs_moments(first.device):
            assert are_side_by_side(first, second)
        else:
            assert first.is_contiguous()
            assert second.is_contiguous()
    assert all(map(torch.equal, training.bits(), Training().step(1, 2).bits()))


def test_the_cpu_engine_wants_pairs():
    assert functional.pairs_moments(torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_moments_that_lie_apart_give_the_same_bits(dtype):
    training, other = Training(dtype).step(1), Training(dtype).step(1)
    state = other.optimizer.state[other.model["embedding"].weight]
    state["exp_avg"] = state["exp_avg"].contiguous()  # one of them, and later both
    assert all(map(torch.equal, training.step(2).bits(), other.step(2).bits()))
    state["exp_avg_sq"] = state["exp_avg_sq"].contiguous()
    assert all(map(torch.equal, training.step(3).bits(), other.step(3).bits()))
    assert other.moments("embedding")[1].is_contiguous()


def test_copies_are_side_by_side():
    training = Training().step(1)
    other = copy.deepcopy(training).step(2)
    for name in other.model:
        assert are_side_by_side(*other.moments(name))
    other.model["table"].reserve(500)
    assert all(map(torch.equal, training.bits(), Training().step(1).bits()))
    assert all(map(torch.equal, other.bits(), Training().step(1, 2).bits()))


def test_a_saved_state_holds_moments_once():
    embedding = torch.nn.Embedding(5_000, DIM, sparse=True)
    optimizer = SparseAdamW({"embedding": embedding})
    embedding(torch.tensor([1])).sum().backward()
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    assert buffer.tell() <= 1.1 * 2 * embedding.weight.nbytes


def test_converted_tables_go_on():
    training, other = Training().step(1), Training().step(1)
    table, its = training.model["table"], other.moments("table")
    table.double()
    assert all(map(torch.equal, training.moments("table"), [x.double() for x in its]))
    assert are_side_by_side(*training.moments("table"))
    table.float()
    assert are_side_by_side(*training.moments("table"))
    assert all(map(torch.equal, training.step(2).bits(), other.step(2).bits()))


def test_one_moment_that_is_gone_begins_at_zero():
    training = Training().step(1)
    state = training.optimizer.state[training.model["embedding"].weight]
    kept = state.pop("exp_avg").new_tensor(0.5).expand(ROWS, DIM).contiguous()
    state["exp_avg_sq"] = kept
    training.step(2)
    assert state["exp_avg_sq"] is kept
    assert state["exp_avg"].is_contiguous()


STRIDES = {
    "expanded": lambda x: x.new_zeros(1, DIM).expand(ROWS, DIM),
    "overlapping": lambda x: x.new_zeros(ROWS + DIM).as_strided((ROWS, DIM), (1, 1)),
    "columns apart": lambda x: x.t().contiguous().t(),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_other_strides_are_refused(strides):
    training = Training().step(1)
    state = training.optimizer.state[training.model["embedding"].weight]
    state["exp_avg_sq"] = STRIDES[strides](state["exp_avg_sq"])
    with pytest.raises(RuntimeError, match=r"exp_avg_sq is not contiguous; use .*contiguous"):
        training.step(2)


def test_strides_of_a_single_column_mean_nothing():
    embedding = torch.nn.Embedding(ROWS, 1, sparse=True)
    optimizer = SparseAdamW({"embedding": embedding})
    for strides in (None, (1, 10)):
        embedding(torch.tensor([3])).sum().backward()
        optimizer.step()
        state = optimizer.state[embedding.weight]
        if strides:
            assert not state["exp_avg"][:3].any()
        state["exp_avg"] = torch.zeros(ROWS).as_strided((ROWS, 1), (1, 10))


@pytest.mark.emulated
def test_the_cuda_engine_refuses_gaps(emulated):
    slots = Slot.side_by_side(["exp_avg", "exp_avg_sq"], 4, 8, torch.float32, torch.device("cpu"))
    slots[0].reserve(8)
    assert [slot.num_rows() for slot in slots] == [8, 8]
    with pytest.raises(ValueError, match=r"'exp_avg_sq'.* 32 bytes apart.*contiguous"):
        functional.gather(slots[1], torch.arange(2))
