"""State: its layout, resuming bitwise, copies, and loading into tables of another shape."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from oracle import DTYPES, Oracle, bits, relative_error
from torch.optim import lr_scheduler

from cupy_sparse_adamw import HashTable, NormalInitializer, SparseAdamW, filter_out_sparse_param

DIM = 3
PLAIN = (torch.Tensor, bool, int, float, str, list, dict)
CYCLE = 3  # micro-batches per update


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two states differ in a type, a key or a bit."""
    if type(one) is not type(other):
        return [f"{path}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return (
            [] if alike and torch.equal(bits(one.reshape(-1)), bits(other.reshape(-1))) else [path]
        )
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: {list(one)} and {list(other)}"]
        return [d for key in one for d in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)} entries"]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{path}[{i}]")]
    return [] if one == other else [f"{path}: {one} and {other}"]


def not_plain(state: Any, path: str = "state") -> list[str]:
    """Where a state holds a type that is not plain. ``betas`` is a pair, as in torch."""
    if isinstance(state, dict):
        wrong = [f"{path}: key {key!r}" for key in state if type(key) is not str]
        return wrong + [d for key in state for d in not_plain(state[key], f"{path}.{key}")]
    if type(state) is list or (type(state) is tuple and path.endswith(".betas")):
        return [d for i, value in enumerate(state) for d in not_plain(value, f"{path}[{i}]")]
    return [] if type(state) in PLAIN else [f"{path}: {type(state).__name__}"]


def saved_and_loaded(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Run:
    """Two tables, their optimizer and a scheduler; micro-batch i is a function of i alone.

    The three micro-batches of an update differ: gradients from a random loss; expanded ones, from
    ``sum``; and, for a 16-bit HashTable, float32 ones through ``accept_grad``.
    """

    def __init__(self, dtype=torch.float32, block_size=4, cycle=CYCLE, lr: Any = 0.01) -> None:
        generator = torch.Generator().manual_seed(1)
        initializer = NormalInitializer(generator=generator)
        table = HashTable([DIM], block_size, dtype, initializer=initializer)
        embedding = torch.nn.Embedding(30, DIM, sparse=True, dtype=dtype)
        embedding.weight.data = torch.randn(30, DIM, generator=generator).to(dtype)
        self.dtype = dtype
        self.model = torch.nn.ModuleDict({"table": table, "embedding": embedding})
        self.optimizer = SparseAdamW(filter_out_sparse_param(self.model), lr, weight_decay=0.1)
        self.optimizer.set_grad_accum_steps(cycle)
        self.scheduler = lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=20)

    def backward(self, i: int) -> None:
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(-5, 10 + 3 * i, (25,), generator=generator)  # ever new ones
        rows = torch.randint(0, 30, (25,), generator=generator)
        weight = torch.randn(25, DIM, generator=generator)
        table, embedding = self.model["table"], self.model["embedding"]
        scale = weight.to(self.dtype)
        if i % CYCLE == 1:
            scale = scale[0, 0].expand(25, DIM)
        table(ids).backward(scale)
        if i % CYCLE == 2 and self.dtype.itemsize == 2:
            known, row = table.ids_map()
            table.accept_grad(row[known.argsort()][:9], weight[:9])  # the 9 smallest ids
        if self.dtype.itemsize > 2 or i % CYCLE == 1:  # torch cannot add 16-bit sparse gradients
            embedding(rows).backward(scale)

    def play(self, begin: int, end: int) -> Run:
        """Events ``begin`` to ``end``: three a micro-batch, backward, step and zero_grad."""
        for event in range(begin, end):
            i, what = divmod(event, 3)
            if what == 0:
                self.backward(i)
            elif what == 1:
                self.optimizer.step()
                if i % CYCLE == CYCLE - 1:
                    self.scheduler.step()
            else:
                self.optimizer.zero_grad()
        return self

    def state(self) -> dict[str, Any]:
        parts = ("model", "optimizer", "scheduler")
        return {part: getattr(self, part).state_dict() for part in parts}

    def load(self, state: dict[str, Any]) -> Run:
        for part, saved in state.items():
            getattr(self, part).load_state_dict(saved)
        return self

    def used(self) -> Run:
        """The run with ids, rows, moments and pending gradients of its own, all to be replaced."""
        self.model["table"](torch.arange(40).flip(0))
        return self.play(60, 71)


EVENTS = 3 * 3 * CYCLE  # three updates

#: Every point of two cycles but the one between an update's first backward and its step: as in
#: torch, a gradient that no step has seen is no state.
POINTS = [event for event in range(2 * 3 * CYCLE + 1) if event % (3 * CYCLE) != 1]


# ---------------------------------------------------------------------- layout


def test_layout():
    run = Run(cycle=1).play(0, 6)
    state = run.optimizer.state_dict()
    assert state.keys() == {"state", "param_groups", "accumulation"}
    assert list(state["state"]) == ["table", "embedding"]
    keys = {"step", "exp_avg", "exp_avg_sq", "dtype"}
    table, embedding = state["state"]["table"], state["state"]["embedding"]
    assert embedding.keys() == keys
    assert table.keys() == keys | {"ids"}
    ids = run.model["table"].ids()
    assert torch.equal(table["ids"], ids)
    for entry, rows in ((table, ids.numel()), (embedding, 30)):
        assert type(entry["step"]) is int
        assert entry["step"] == 2
        assert entry["dtype"] == "float32"
        for key in ("exp_avg", "exp_avg_sq"):
            assert entry[key].shape == (rows, DIM)
            assert entry[key].dtype == torch.float32
    (group,) = state["param_groups"]
    assert group["params"] == ["table", "embedding"]
    assert {"lr", "betas", "eps", "weight_decay", "initial_lr"} <= group.keys()


def test_tables_without_an_update_have_no_state():
    tables = {"a": HashTable([2]), "b": torch.nn.Embedding(4, 2, sparse=True)}
    optimizer = SparseAdamW(tables)
    empty = optimizer.state_dict()
    assert empty["state"] == {}
    tables["b"](torch.tensor([1])).sum().backward()
    optimizer.step()
    assert list(optimizer.state_dict()["state"]) == ["b"]
    assert optimizer.state_dict()["param_groups"][0]["params"] == ["a", "b"]
    optimizer.load_state_dict(empty)
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("events", range(EVENTS - 9, EVENTS + 1))
def test_state_is_plain(dtype, lr, events):
    state = Run(dtype, lr=lr).play(0, events).optimizer.state_dict()
    assert not_plain(state) == []
    assert differences(saved_and_loaded(state), state) == []


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resume_is_bitwise_the_uninterrupted_run(dtype, used):
    """At every point, into a table of other blocks, fresh or full of other ids and gradients."""
    expected = Run(dtype).play(0, EVENTS).state()
    for point in POINTS:
        state = saved_and_loaded(Run(dtype).play(0, point).state())
        resumed = Run(dtype, block_size=7)
        resumed = (resumed.used() if used else resumed).load(state).play(point, EVENTS)
        assert differences(resumed.state(), expected) == [], f"saved after event {point}"


def by_id(table: HashTable, optimizer: SparseAdamW, name: str) -> list[torch.Tensor]:
    """Ids, ascending, and weights and moments in their order."""
    entry, order = optimizer.state_dict()["state"][name], table.ids().argsort()
    its = [entry[key][entry["ids"].argsort()] for key in ("exp_avg", "exp_avg_sq")]
    return [table.ids()[order], table.embeddings()[order], *its]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("point", [EVENTS - 9, EVENTS - 3])  # nothing pending, two micro-batches
def test_resume_into_reversed_rows(dtype, point):
    """The same bits for each id, whatever row it has."""
    whole = Run(dtype).play(0, point)
    state = saved_and_loaded(whole.state())
    for key in ("table.ids", "table.embedding"):
        state["model"][key] = state["model"][key].flip(0)
    turned = Run(dtype).load(state).play(point, EVENTS)
    whole.play(point, EVENTS)
    one, other = (by_id(run.model["table"], run.optimizer, "table") for run in (turned, whole))
    assert differences(one, other) == []
    assert not torch.equal(turned.model["table"].ids(), whole.model["table"].ids())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_table_split_over_two(dtype):
    """Half of the ids in each of two tables, split in mid-training: each id's bits stay (§1)."""

    def fresh(seed):
        generator = torch.Generator().manual_seed(seed)
        return HashTable([DIM], 4, dtype, initializer=NormalInitializer(generator=generator))

    def train(optimizer, tables, last_id):
        for _ in range(4):
            ids, grads = torch.randint(0, last_id, (600,)), torch.randn(600, DIM).to(dtype)
            for number, table in enumerate(tables):
                mine = ids % len(tables) == number
                table(ids[mine]).backward(grads[mine])
            optimizer.step()
            optimizer.zero_grad()

    whole, halves = fresh(0), {"even": fresh(1), "odd": fresh(2)}
    optimizer, split = SparseAdamW({"table": whole}), SparseAdamW(halves)
    train(optimizer, [whole], 30)
    model, state = whole.state_dict(), copy.deepcopy(optimizer.state_dict())
    entry = state["state"].pop("table")
    state["param_groups"][0]["params"] = list(halves)
    for number, (name, half) in enumerate(halves.items()):
        mine = entry["ids"] % 2 == number
        part = {key: entry[key][mine] for key in ("ids", "exp_avg", "exp_avg_sq")}
        state["state"][name] = {**entry, **part}
        half.load_state_dict({**model, **{key: model[key][mine] for key in ("ids", "embedding")}})
    split.load_state_dict(state)
    for each, tables in ((optimizer, [whole]), (split, list(halves.values()))):
        torch.manual_seed(1)
        train(each, tables, 40)  # with new ids, whose first values depend on seed and id alone
    expected = by_id(whole, optimizer, "table")
    for number, (name, half) in enumerate(halves.items()):
        mine = expected[0] % 2 == number
        assert differences(by_id(half, split, name), [x[mine] for x in expected]) == []


@pytest.mark.parametrize("coalesced", [False, True])
def test_pending_gradients_come_back_as_they_were(coalesced):
    """float32 ones of a 16-bit table as float32, expanded ones, and a Parameter's in ``.grad``."""
    table = HashTable([DIM], dtype=torch.float16)
    embedding = torch.nn.Embedding(4, DIM, sparse=True)
    optimizer = SparseAdamW({"table": table, "embedding": embedding})
    optimizer.set_grad_accum_steps(3)
    table(torch.tensor([7, 8, 7])).sum().backward()
    optimizer.step()
    embedding(torch.tensor([3, 1, 3])).sum().backward()
    table.accept_grad(torch.tensor([1]), torch.full((1, DIM), 1 / 3))
    optimizer.step()
    if coalesced:
        embedding.weight.grad = embedding.weight.grad.coalesce()
    state = saved_and_loaded(optimizer.state_dict())
    original = copy.deepcopy(state)
    table.clear_grad()
    grad, embedding.weight.grad = embedding.weight.grad, None
    optimizer.load_state_dict(state)
    assert table.grad().dtype == torch.float32
    assert table.grad().to_dense()[:, 0].tolist() == pytest.approx([2.0, 4 / 3], rel=1e-7)
    restored = embedding.weight.grad
    assert restored.is_coalesced() == coalesced
    assert torch.equal(restored._indices(), grad._indices())
    assert torch.equal(bits(restored._values()), bits(grad._values()))
    for values in (restored._values(), *(entry.grad for entry in table._grads._grads)):
        values.zero_()  # as a clipping of gradients may do
    assert differences(state, original) == []


def test_loading_a_state_without_pending_gradients_drops_those_at_hand():
    run = Run().play(0, 9)
    state = saved_and_loaded(run.state())
    run.play(9, 13).load(state)
    assert run.model["table"].grad()._nnz() == 0
    assert run.model["embedding"].weight.grad is None
    assert differences(run.state(), state) == []


# ---------------------------------------------------------------------- loading, otherwise


@pytest.mark.parametrize("point", [9, 14])
def test_loading_twice_is_loading_once_and_aliases_nothing(point):
    state = saved_and_loaded(Run().play(0, point).state())
    state["optimizer"]["param_groups"][0]["tags"] = ["mine"]
    original = copy.deepcopy(state)
    run = Run().load(state).load(state)
    assert differences(run.state(), original) == []
    run.play(point, EVENTS).optimizer.param_groups[0]["tags"].append("more")
    assert differences(state, original) == []
    again = Run().load(state).play(point, EVENTS).model
    assert differences(again.state_dict(), Run().play(0, EVENTS).model.state_dict()) == []


def test_saved_moments_may_have_any_strides():
    state = saved_and_loaded(Run().play(0, 9).state())
    expected = Run().load(state).play(9, EVENTS).state()
    for entry in state["optimizer"]["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            entry[key] = entry[key].t().contiguous().t()
    assert differences(Run().load(state).play(9, EVENTS).state(), expected) == []


def test_loading_does_not_alias_a_tensor_lr():
    state = saved_and_loaded(Run(lr=torch.tensor(0.01)).play(0, 9).state())
    original = copy.deepcopy(state)
    run = Run(lr=torch.tensor(0.5)).load(state)
    assert differences(run.state(), original) == []
    run.play(9, EVENTS)  # the scheduler writes into the tensor
    assert differences(state, original) == []


def test_the_order_of_names_does_not_matter():
    run = Run().play(0, 11)
    other = Run()
    tables = dict(reversed(filter_out_sparse_param(other.model).items()))
    other.optimizer = SparseAdamW(tables)
    other.scheduler = lr_scheduler.OneCycleLR(other.optimizer, 0.1, total_steps=20)
    other.load(run.state()).play(11, EVENTS)
    run.play(11, EVENTS)
    assert differences(other.model.state_dict(), run.model.state_dict()) == []
    ours, its = (r.optimizer.state_dict()["state"] for r in (run, other))
    assert differences(ours["table"], its["table"]) == []
    assert differences(ours["embedding"], its["embedding"]) == []


def test_keys_of_schedulers_and_counters_survive():
    run = Run().play(0, 14)
    other = Run(cycle=1).load(saved_and_loaded(run.state()))
    group = other.optimizer.param_groups[0]
    extra = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}  # OneCycleLR's
    assert extra <= group.keys()
    assert {key: group[key] for key in group if key != "params"} == {
        key: value for key, value in run.optimizer.param_groups[0].items() if key != "params"
    }
    resumed = lr_scheduler.StepLR(other.optimizer, 5, last_epoch=3)  # needs initial_lr
    assert resumed.base_lrs == [run.scheduler.base_lrs[0]]
    accumulation = other.optimizer.state_dict()["accumulation"]
    assert accumulation == {**accumulation, "grad_accum_steps": 3, "accumulated": 2}


def test_tables_added_after_a_resume():
    run = Run().load(saved_and_loaded(Run().play(0, 9).state()))
    table, oracle = HashTable([2], name="new"), Oracle(torch.zeros(1, 2), lr=1e-3)
    run.optimizer.add_param_group({"params": {"new": table}, "lr": 1e-3, "weight_decay": 0.0})
    oracle.weight_decay = 0.0
    for i in range(3):
        run.backward(3 + i)
        table(torch.tensor([4])).sum().backward()
        run.optimizer.step()
    oracle.step([0], torch.full((1, 2), 3.0))
    state = run.optimizer.state_dict()["state"]
    assert (state["table"]["step"], state["new"]["step"]) == (2, 1)
    assert relative_error(state["new"]["exp_avg"], oracle.exp_avg) <= 1e-6
    expected = Run().play(0, 17).optimizer.state_dict()["state"]["embedding"]
    assert differences(state["embedding"], expected) == []


# ---------------------------------------------------------------------- copies


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_a_table_between_backward_and_step(copied):
    table = Run().play(0, 1).model["table"]
    assert torch.equal(copied(table).grad().to_dense(), table.grad().to_dense())


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_of_model_and_optimizer(copied, dtype):
    """At every point: names, counters and pending gradients; then each goes its own way."""
    expected = Run(dtype).play(0, EVENTS).state()
    for point in POINTS[8:]:  # torch's schedulers warn if they are copied before their first step
        run = Run(dtype).play(0, point)
        before = copy.deepcopy(run.state())
        other = copied(run)
        assert differences(other.optimizer.state_dict(), before["optimizer"]) == []
        assert differences(other.play(point, EVENTS).state(), expected) == [], point
        assert differences(run.state(), before) == []
        assert differences(run.play(point, EVENTS).state(), expected) == [], point


def test_a_copy_of_the_optimizer_alone_has_tables_of_its_own():
    run = Run().play(0, 13)
    before = copy.deepcopy(run.state())
    other = copy.deepcopy(run.optimizer)
    assert differences(other.state_dict(), before["optimizer"]) == []
    table, weight = other.param_groups[0]["params"]
    assert table is not run.model["table"]
    assert torch.equal(weight, run.model["embedding"].weight)
    table(torch.arange(50)).sum().backward()
    for _ in range(2):
        other.step()
    assert other.state_dict()["state"]["table"]["step"] == 2
    assert differences(run.state(), before) == []
    run.play(13, EVENTS)  # still the owner of its own tables
    assert differences(run.state(), Run().play(0, EVENTS).state()) == []


def test_hooks_of_state_dict_and_load_state_dict():
    optimizer, seen = Run().play(0, 9).optimizer, []

    def save_pre(given):
        seen.append(("save pre", given is optimizer))
        given.param_groups[0]["lr"] = 0.5  # comes before the state is read

    def save_post(given, state):
        seen.append(("save post", given is optimizer))
        return {**state, "mine": 1}

    def load_pre(given, state):
        seen.append(("load pre", given is optimizer))
        del state["mine"]
        return {**state, "param_groups": [{**state["param_groups"][0], "lr": 0.25}]}

    def load_post(given):
        seen.append(("load post", given.param_groups[0]["lr"] == 0.25))

    optimizer.register_state_dict_pre_hook(save_pre)
    optimizer.register_state_dict_post_hook(save_post)
    optimizer.register_load_state_dict_pre_hook(load_pre)
    optimizer.register_load_state_dict_post_hook(load_post)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["lr"] == 0.5
    optimizer.load_state_dict(state)
    assert state["mine"] == 1  # a hook of load_state_dict gets a copy
    order = ("save pre", "save post", "load pre", "load post")
    assert seen == [(what, True) for what in order]
