"""HashTable as a module: lookup, growth, autograd, contents, copies, conversions."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from oracle import DTYPES, Oracle, bits, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from cupy_sparse_adamw import (
    AdmitHook,
    HashTable,
    NormalInitializer,
    SparseAdamW,
    UniformInitializer,
    XavierNormalInitializer,
    filter_out_sparse_param,
    functional,
)
from cupy_sparse_adamw.row_store import MAX_LOAD

EXTREMES = [0, -1, 1, 2**63 - 1, -(2**63), 2**32]


def normal_table(dim=4, seed=0, **options) -> HashTable:
    generator = torch.Generator().manual_seed(seed)
    return HashTable([dim], initializer=NormalInitializer(generator=generator), **options)


# ---------------------------------------------------------------------- lookup


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 4), (1, 1, 1, 2)])
@pytest.mark.parametrize("embedding_shape", [[4], [2, 3], 5], ids=str)
def test_output_shape(shape, embedding_shape):
    table = HashTable(embedding_shape)
    row_shape = (embedding_shape,) if isinstance(embedding_shape, int) else tuple(embedding_shape)
    out = table(torch.zeros(shape, dtype=torch.int64))
    assert out.shape == shape + row_shape


def test_ids_of_any_value():
    table = normal_table()
    ids = torch.tensor(EXTREMES)
    first = table(ids).detach()
    assert len(table) == len(EXTREMES)
    assert len({tuple(row.tolist()) for row in first}) == len(EXTREMES)
    order = torch.randperm(len(EXTREMES))
    assert torch.equal(table(ids[order]), first[order])
    assert table.ids().tolist() == EXTREMES


def test_rows_come_in_order_of_first_occurrence():
    table = HashTable([2])
    table(torch.tensor([[5, 9], [5, 7]]))
    ids, rows = table.ids_map()
    assert ids.tolist() == [5, 9, 7]
    assert rows.tolist() == [0, 1, 2]


def test_int32_ids_are_widened_and_strided_ids_read_right():
    table = normal_table()
    ids = torch.arange(12).view(3, 4)
    wide = table(ids)
    assert torch.equal(table(ids.int()), wide)
    assert torch.equal(table(ids.t()), wide.transpose(0, 1))
    assert torch.equal(table(ids[:, ::2]), wide[:, ::2])
    assert torch.equal(table(ids[1:2].expand(3, 4)), wide[1:2].expand(3, 4, 4))


@pytest.mark.parametrize("read_only", ["eval", "admit hook"])
def test_a_read_only_lookup_changes_nothing(read_only):
    table = normal_table()
    known = table(torch.tensor([1, 2])).detach()
    hook = None
    if read_only == "eval":
        table.eval()
    else:
        hook = AdmitHook("ReadOnly")
    out = table(torch.tensor([[3, 1], [2, 4]]), hook)
    assert len(table) == 2
    assert torch.equal(out[0, 1], known[0])
    assert torch.equal(out[1, 0], known[1])
    assert not out[0, 0].any()
    assert not out[1, 1].any()
    out.sum().backward()  # the gradients of 3 and 4 are dropped
    assert table.grad().indices().tolist() == [[0, 1]]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_mode_does_not_matter_to_insertion(mode):
    table = normal_table()
    optimizer = SparseAdamW({"table": table})
    with mode():
        inside = table(torch.tensor([1, 2]))
    assert len(table) == 2
    assert not inside.requires_grad
    outside = table(torch.tensor([1, 2]))
    assert torch.equal(outside, inside)
    outside.sum().backward()
    optimizer.step()
    assert not torch.equal(table.embeddings(), inside)


def test_values_depend_on_seed_and_id_alone():
    ids = torch.randint(-1000, 1000, (500,))
    one, other = normal_table(block_size=3), normal_table(block_size=64)
    one(ids)
    for part in ids.flip(0).split(7):
        other(part)
    one.eval(), other.eval()
    assert torch.equal(one(ids), other(ids))
    assert not torch.equal(one(ids), normal_table(seed=1)(ids))


def test_the_seed_comes_from_the_generator_or_torch():
    torch.manual_seed(3)
    first = HashTable([4], initializer=UniformInitializer())(torch.tensor([1]))
    second = HashTable([4], initializer=UniformInitializer())(torch.tensor([1]))
    torch.manual_seed(3)
    again = HashTable([4], initializer=UniformInitializer())(torch.tensor([1]))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_no_initializer_means_zeros():
    assert not HashTable([3])(torch.arange(5)).any()


# ---------------------------------------------------------------------- growth


def test_growing_never_moves_a_row():
    table = normal_table(block_size=8)
    optimizer = SparseAdamW({"table": table})
    table(torch.arange(20)).sum().backward()
    optimizer.step()
    slots = list(table._store.slots.values())
    assert len(slots) == 3
    before = [slot.addresses().tolist() for slot in slots]
    values = table.embeddings()
    table(torch.arange(5000))
    for slot, addresses in zip(slots, before, strict=True):
        assert slot.addresses().tolist()[: len(addresses)] == addresses
        assert slot.num_rows() >= 5000
    assert torch.equal(table.embeddings()[:20], values)
    assert len(table) == 5000


def test_a_large_table_needs_few_allocations_and_wastes_little():
    table = HashTable([2], block_size=16)
    for part in torch.arange(100_000).split(1000):
        table(part)
    slot = table._store.embedding
    assert len(slot._slabs) <= 80
    assert slot.num_rows() <= 1.13 * 100_000


@pytest.mark.parametrize("with_moments", [False, True])
def test_memory_follows_what_is_needed(with_moments):
    """At every size from some thousand rows on: rows, their ids, and keys at the load factor."""
    table = HashTable([8], block_size=64)
    if with_moments:
        optimizer = SparseAdamW({"items": table})
        table(torch.arange(4)).sum().backward()
        optimizer.step()
    a_row = 8 * 4 * (3 if with_moments else 1) + 8 + 16 / MAX_LOAD
    ratios = []
    for first in range(0, 200_000, 500):
        with torch.no_grad():
            table(torch.arange(first, first + 500))
        if first > 5000:
            ratios.append(table.nbytes / (len(table) * a_row))
    assert 1.0 <= min(ratios) < max(ratios) < 1.3


def test_a_repeated_new_id_takes_one_row_of_memory():
    table = HashTable([2], block_size=1)
    table(torch.zeros(100_000, dtype=torch.int64))
    assert len(table) == 1
    assert table._store.embedding.num_rows() == 1


def test_reserve_takes_the_memory_at_once():
    table = normal_table(block_size=16)
    table.reserve(1000)
    addresses = table._store.embedding.addresses().tolist()
    entries = table._store._index.entries
    table(torch.arange(1000))
    assert table._store.embedding.addresses().tolist() == addresses
    assert table._store._index.entries is entries
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        table.reserve(-1)


def test_a_failed_growth_changes_nothing(monkeypatch):
    """Out of memory, or Ctrl-C, in the initializer: neither ids nor rows of the batch are left."""
    table = normal_table(block_size=2)
    table(torch.arange(5))
    before = table.state_dict()

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cupy_sparse_adamw.engines.cpu.index.init_rows_", fail)
        with pytest.raises(KeyboardInterrupt):
            table(torch.arange(200))
    assert len(table) == 5
    assert table.state_dict().keys() == before.keys()
    for key, value in table.state_dict().items():
        assert torch.equal(value, before[key])
    fresh = normal_table()
    ids = torch.arange(200).flip(0)
    assert torch.equal(table(ids), fresh(ids))


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_equals_an_embedding(dtype):
    """Same ids, same numbers: a HashTable and nn.Embedding(sparse=True) give the same bits."""
    torch.manual_seed(0)
    size, dim = 60, 5
    embedding = torch.nn.Embedding(size, dim, sparse=True, dtype=dtype)
    table = HashTable([dim], dtype=dtype, block_size=7)
    keys = torch.randperm(1000)[:size] - 500  # the id of each row
    shuffled = torch.randperm(size)
    table.insert(keys[shuffled], embedding.weight.detach()[shuffled])
    optimizer = SparseAdamW({"embedding": embedding, "table": table}, lr=0.01, weight_decay=0.1)
    for _ in range(10):
        rows = torch.randint(0, size, (4, 8))
        target = torch.randn(4, 8, dim, dtype=dtype)
        for out in (embedding(rows), table(keys[rows])):
            (out * target).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    table.eval()
    assert torch.equal(bits(table(keys)), bits(embedding.weight))


def test_gradients_of_two_lookups_and_backward_through_the_output():
    table = HashTable([2])
    optimizer = SparseAdamW({"table": table}, lr=0.1)
    oracle = Oracle(torch.zeros(3, 2), lr=0.1)
    first, second = table(torch.tensor([7, 8])), table(torch.tensor([[8], [9]]))
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    loss = (first * weight).sum() + second.flatten(1).mul(weight).sum()
    loss.backward()
    optimizer.step()
    oracle.step([0, 1, 1, 2], torch.cat([weight, weight]))
    assert relative_error(table.embeddings(), oracle.param) < 1e-6


def test_grad_is_coalesced_by_row():
    table = HashTable([2, 2], block_size=2)
    table(torch.tensor([5, 6, 7]))
    ids = torch.tensor([7, 5, 7])
    grads = torch.arange(12.0).view(3, 2, 2)
    (table(ids) * grads).sum().backward()
    grad = table.grad(acc_step=2)
    assert grad.is_coalesced()
    assert grad.shape == (3, 2, 2)
    assert grad.indices().tolist() == [[0, 2]]
    assert torch.equal(grad.values(), torch.stack([grads[1], grads[0] + grads[2]]) / 2)
    table.clear_grad()
    assert table.grad()._nnz() == 0
    with pytest.raises(ValueError, match="acc_step must be at least 1, got 0"):
        table.grad(0)


@pytest.mark.parametrize("how", ["worker", "id"])
def test_grad_reduce_by(monkeypatch, how):
    monkeypatch.setenv("WORLD_SIZE", "4")
    table = HashTable([1], grad_reduce_by=how)
    table(torch.tensor([1, 2, 1])).mul(torch.tensor([[1.0], [2.0], [5.0]])).sum().backward()
    expected = [6 / 4, 2 / 4] if how == "worker" else [6 / 2, 2.0]
    assert table.grad().values().flatten().tolist() == expected


def test_accept_grad_takes_float32_for_a_16_bit_table():
    for dtype in (torch.float16, torch.bfloat16):
        table = HashTable([2], dtype=dtype)
        table(torch.arange(3)).sum().backward()  # one piece in the table's dtype, one in float32
        table.accept_grad(torch.tensor([2, 0]), torch.full((2, 2), 1 / 3))
        grad = table.grad()
        assert grad.dtype == torch.float32
        assert grad.to_dense()[:, 0].tolist() == pytest.approx([4 / 3, 1, 4 / 3], abs=1e-7)
        optimizer = SparseAdamW({"table": table})
        optimizer.step()
        assert torch.allclose(
            table._store.slots["sparse_adamw_exp_avg"].value()[2], torch.tensor(4 / 30)
        )


def test_gradients_are_kept_by_reference():
    table = HashTable([3])
    out = table(torch.arange(4))
    grad = torch.randn(4, 3)
    out.backward(grad)
    assert table._grads._grads[0].grad.data_ptr() == grad.data_ptr()


def test_copy_grads_allows_in_place_changes():
    table = HashTable([3], copy_grads=True)
    grad = torch.ones(2, 3)
    table(torch.arange(2)).backward(grad)
    grad.mul_(0)
    assert table.grad().values().sum() == 6


def test_expanded_gradients_are_not_materialized():
    table = HashTable([3])
    table(torch.arange(4)).sum().backward()
    assert table._grads._grads[0].grad.stride() == (0, 0)
    assert table.grad().values().sum() == 12


def test_frozen_table():
    table = normal_table()
    model = torch.nn.Sequential(table)
    model.requires_grad_(False)  # documented: does not reach a HashTable
    assert table(torch.arange(3)).requires_grad
    assert table.requires_grad_(False) is table
    assert not table(torch.arange(3)).requires_grad
    assert table.requires_grad_()(torch.arange(3)).requires_grad


def test_model_zero_grad_does_not_reach_a_table_but_its_own_does():
    table = HashTable([3])
    model = torch.nn.Sequential(table)
    model(torch.arange(3)).sum().backward()
    model.zero_grad()
    assert table.grad()._nnz() == 3
    table.zero_grad()
    assert table.grad()._nnz() == 0


def test_second_backward_is_torchs_error_and_retain_graph_adds():
    table = HashTable([3])
    loss = table(torch.arange(3)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert table.grad().values().sum() == 18
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("event", ["clear", "load"])
def test_gradients_find_their_rows_again_by_id(event):
    """Rows change between forward and step: those of ids that stay follow, the others go."""
    table = HashTable([1])
    out = table(torch.tensor([1, 2, 3, 4]))
    weights = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    (out * weights).sum().backward()
    late = (table(torch.tensor([4, 3, 2, 1])) * weights).sum()
    if event == "clear":
        table.clear()
        table(torch.tensor([3, 9, 1]))
    else:
        ids = torch.tensor([3, 9, 1])
        source = HashTable([1])
        source.insert(ids, torch.zeros(3, 1))
        table.load_state_dict(source.state_dict())
    late.backward()
    grad = table.grad()
    assert grad.indices().tolist() == [[0, 2]]
    assert grad.values().flatten().tolist() == [4.0 + 2.0, 1.0 + 8.0]


# ---------------------------------------------------------------------- contents


def test_insert_overwrites_and_adds():
    table = normal_table(2)
    table(torch.tensor([1, 2]))
    values = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    table.insert(torch.tensor([2, 8, 2]), values)
    assert table.ids().tolist() == [1, 2, 8]
    assert torch.equal(table.embeddings()[1:], values[[2, 1]])


def test_insert_keeps_moments():
    table = normal_table(2)
    optimizer = SparseAdamW({"table": table})
    table(torch.tensor([1])).sum().backward()
    optimizer.step()
    table.insert(torch.tensor([1, 2]), torch.zeros(2, 2))
    state = optimizer.state_dict()["state"]["table"]
    assert state["exp_avg"][0].tolist() == pytest.approx([0.1, 0.1])
    assert not state["exp_avg"][1].any()


def test_clear():
    table = normal_table(block_size=4)
    optimizer = SparseAdamW({"table": table})
    first = table(torch.arange(10))
    first.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    table.clear()
    assert len(table) == 0
    assert table._store.embedding.nbytes() == 0
    assert torch.equal(table(torch.arange(10)), first)  # fresh weights
    assert not optimizer.state_dict()["state"]["table"]["exp_avg"].any()  # zero moments


def test_embeddings_are_a_copy_by_row():
    table = normal_table()
    out = table(torch.tensor([9, 4, 6]))
    embeddings = table.embeddings()
    assert torch.equal(embeddings, out)
    embeddings.zero_()
    assert table(torch.tensor([9])).any()


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.users = HashTable([4], initializer=NormalInitializer(), name="users", block_size=3)
        self.items = HashTable([4], initializer=XavierNormalInitializer())
        self.head = torch.nn.Linear(8, 1)

    def forward(self, users, items):
        return self.head(torch.cat([self.users(users), self.items(items)], dim=-1))


def test_state_dict_is_a_normal_modules():
    model, ids = Model(), torch.randint(0, 50, (2, 30))
    expected = model(*ids)
    state = model.state_dict()
    assert {k for k in state if k.startswith("users")} == {
        "users.ids",
        "users.embedding",
        "users.seed",
        "users.fan",
    }
    assert state["users.embedding"].shape == (len(model.users), 4)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other = Model()
    other(*(ids + 17))  # rows of its own, which loading replaces
    assert other.load_state_dict(torch.load(buffer, weights_only=True)).missing_keys == []
    assert torch.equal(other(*ids), expected)
    assert len(other.users) == len(model.users)
    new = torch.arange(100, 110).expand(2, -1)
    assert torch.equal(other(*new), model(*new))  # the seed came along


def test_loading_restores_the_fan():
    small = HashTable([4], block_size=2, initializer=XavierNormalInitializer())
    large = HashTable([4], block_size=4096, initializer=XavierNormalInitializer())
    large.load_state_dict(small.state_dict())
    assert torch.equal(large(torch.arange(9)), small(torch.arange(9)))


def test_loading_keeps_moments_of_ids_that_stay():
    table = HashTable([1])
    optimizer = SparseAdamW({"table": table})
    table(torch.tensor([1, 2, 3])).mul(torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
    optimizer.step()
    other = HashTable([1])
    other.insert(torch.tensor([3, 5, 1]), torch.zeros(3, 1))
    table.load_state_dict(other.state_dict())
    state = optimizer.state_dict()["state"]["table"]
    assert state["ids"].tolist() == [3, 5, 1]
    assert state["exp_avg"].flatten().tolist() == pytest.approx([0.3, 0.0, 0.1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.update(ids=s["ids"].float()), "ids must be int64 or int32, got torch.float32"),
        (
            lambda s: s.update(embedding=s["embedding"][:, :3]),
            r"embedding must have shape \[3, 4\]",
        ),
        (lambda s: s.update(embedding=s["embedding"][:2]), r"got \[2, 4\]"),
        (
            lambda s: s.update(embedding=s["embedding"].long()),
            "embedding must be torch.float32, got torch.int64",
        ),
        (lambda s: s.update(ids=s["ids"] * 0), "ids holds an id twice"),
        (lambda s: s.pop("embedding"), "Missing key.*embedding"),
        (lambda s: s.pop("seed"), "Missing key.*seed"),
        (lambda s: s.update(extra=torch.zeros(1)), "Unexpected key.*extra"),
    ],
)
def test_loading_what_does_not_fit(change, text):
    table = normal_table()
    table(torch.arange(3))
    state = table.state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=text):
        normal_table().load_state_dict(state)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent(how):
    model, ids = Model(), torch.arange(40).view(2, 20)
    expected = model(*ids).detach()
    expected_state = copy.deepcopy(model.state_dict())
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    optimizer = SparseAdamW(filter_out_sparse_param(other))
    assert torch.equal(other(*ids), expected)
    other(*ids).sum().backward()
    optimizer.step()
    other(*(ids + 1000))
    assert not torch.equal(other(*ids), expected)
    assert torch.equal(model(*ids), expected)
    assert len(model.users) == 20
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected_state[key])


def test_conversions():
    table = normal_table(block_size=4)
    optimizer = SparseAdamW({"table": table})
    out = table(torch.arange(10))
    out.sum().backward()
    optimizer.step()
    moment = table._store.slots["sparse_adamw_exp_avg"]
    model = torch.nn.Sequential(table)
    values = table.embeddings()
    for convert, dtype, moment_dtype in (
        (model.double, torch.float64, torch.float64),
        (model.half, torch.float16, torch.float32),
        (model.bfloat16, torch.bfloat16, torch.float32),
        (lambda: model.to(torch.float32), torch.float32, torch.float32),
    ):
        convert()
        values = values.to(dtype)
        assert table.dtype == table(torch.arange(3)).dtype == dtype
        assert torch.equal(table.embeddings(), values)
        moments = [s.dtype for name, s in table._store.slots.items() if name != "embedding"]
        assert moments == [moment_dtype] * 2
        table.clear_grad()
        table(torch.arange(20)).sum().backward()
        optimizer.step()
        values = table.embeddings()
    assert moment.dtype == torch.float32


def test_conversion_takes_pending_gradients_along():
    """Also those of lookups whose rows were renumbered since, and of a lookup still to come."""
    table = HashTable([1])
    early = table(torch.tensor([5, 6]))
    early.backward(torch.tensor([[1.0], [2.0]]))
    table.clear()
    table(torch.tensor([6, 7])).backward(torch.tensor([[4.0], [8.0]]))
    table.double()
    grad = table.grad()
    assert grad.dtype == torch.float64
    assert grad.to_dense().flatten().tolist() == [6.0, 8.0]
    table.accept_grad(torch.tensor([1]), torch.ones(1, 1, dtype=torch.float64))
    assert table.grad().to_dense().flatten().tolist() == [6.0, 9.0]


def test_a_changed_gradient_stays_changed_through_a_conversion():
    table = HashTable([1])
    grad = torch.ones(1, 1)
    table(torch.tensor([5])).backward(grad)
    grad.mul_(7)
    table.double()
    with pytest.raises(RuntimeError, match="changed in place"):
        table.grad()


def test_values_that_do_not_fit_the_dtype():
    initializer = UniformInitializer(0.0, 1e6)
    with pytest.raises(ValueError, match=r"must fit torch.float16"):
        HashTable([1], dtype=torch.float16, initializer=initializer)
    table = HashTable([1], initializer=initializer)
    with pytest.raises(ValueError, match=r"must fit torch.float16"):
        table.half()
    assert table.dtype == torch.float32


def test_accept_grad_copies_rows():
    table = HashTable([1])
    table(torch.arange(3))
    rows = torch.tensor([0, 1])
    table.accept_grad(rows, torch.ones(2, 1))
    rows.fill_(2)
    assert table.grad().indices().tolist() == [[0, 1]]


def test_accept_grad_of_a_negative_view(engine):
    """torch keeps the sign of such a view beside the memory, which kernels do not see."""
    table = HashTable([2])
    table(torch.arange(2))
    table.accept_grad(torch.tensor([1]), torch._neg_view(torch.ones(1, 2)))
    assert table.grad().to_dense().tolist() == [[0.0, 0.0], [-1.0, -1.0]]


def test_accept_grad_in_inference_mode():
    table = HashTable([1])
    table(torch.arange(3))
    with torch.inference_mode():
        grad = torch.ones(1, 1)
        table.accept_grad(torch.tensor([1]), grad)
        grad.zero_()
    assert table.grad().to_dense().flatten().tolist() == [0.0, 1.0, 0.0]


def test_a_table_cannot_be_shared_between_processes():
    table = HashTable([1], name="users")
    table(torch.arange(3))
    with pytest.raises(RuntimeError, match="'users' cannot be shared between processes"):
        torch.nn.Sequential(table).share_memory()
    assert len(table) == 3


def test_a_subclass_may_have_children_and_buffers():
    class Named(HashTable):
        def __init__(self):
            super().__init__([2])
            self.extra = torch.nn.Linear(2, 2)
            self.register_buffer("count", torch.tensor(3))

        def forward(self, ids):
            return self.extra(super().forward(ids))

    source, target = Named(), Named()
    out = source(torch.arange(4))
    source.count += 4
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(torch.arange(4)), out)
    assert target.count == 7


def test_world_size_is_that_of_the_step(monkeypatch):
    table = HashTable([1])
    monkeypatch.setenv("WORLD_SIZE", "2")
    table(torch.tensor([1])).sum().backward()
    assert table.grad().values().item() == 0.5
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE must be a positive int, got 'two'"):
        HashTable([1])


def test_to_the_same_device_moves_nothing():
    table = normal_table()
    table(torch.arange(3))
    addresses = table._store.embedding.addresses().tolist()
    assert table.to("cpu") is table
    assert table._store.embedding.addresses().tolist() == addresses


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_inside_a_compiled_model():
    model, ids = Model(), torch.randint(0, 50, (2, 30))
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = SparseAdamW(filter_out_sparse_param(model))
    expected = model(*ids)
    out = compiled(*ids)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert model.users.grad()._nnz() == len(model.users)
    optimizer.step()
    assert not torch.equal(compiled(*ids), expected)


def test_printing_says_what_it_is():
    text = repr(torch.nn.Sequential(normal_table(name="users")))
    assert "HashTable([4], rows=0, dtype=torch.float32, device=cpu" in text
    assert "name='users'" in text


def test_lookups_from_several_threads():
    """Eval lookups of one table in four threads at once, each of a size that uses the pool."""
    table = normal_table()
    ids = torch.arange(40_000)
    expected = table(ids).detach()
    table.eval()
    wrong = []

    def look(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(5):
            order = torch.randint(0, 40_000, (40_000,), generator=generator)
            if not torch.equal(table(ids[order]), expected[order]):
                wrong.append(seed)

    threads = [threading.Thread(target=look, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("untouched", ["skip", "decay", "dense"])
@pytest.mark.parametrize("share_new", [0.0, 0.5])
def test_training_leaves_torchs_threads_asleep(untouched, share_new):
    """They would spin for milliseconds on the cores that the next kernel wants.

    torch shares an operation among them from 32,768 elements on: here memory that is cleared for
    new rows. (More new ids than that, and hooks, wake them as well.)
    """
    known, count = 40_960, 40_000  # whole blocks: there is no room for a batch more
    table = HashTable([2])
    optimizer = SparseAdamW({"table": table}, untouched=untouched)
    with functional.use_engine("cpu"):
        table(torch.arange(known)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ids, grad = torch.arange(count) + int(share_new * count), torch.ones(count, 2)
        with SharedWork() as shared:
            table(ids).backward(grad)
            optimizer.step()
        assert len(table.embeddings()) == max(known, int(ids[-1]) + 1)
    assert set(shared.names) == (
        {"aten.zero_.default", "aten.full.default"} if share_new else set()
    )


class SharedWork(TorchDispatchMode):
    """Notes torch's operations on many elements, but for those that only allocate or make views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in (*args, result) if isinstance(x, torch.Tensor)]
        if max(sizes, default=0) >= 32_768 and not (func.is_view or "empty" in str(func)):
            self.names.append(str(func))
        return result


# ---------------------------------------------------------------------- nothing to update


@pytest.mark.parametrize("case", ["eval", "no ids", "cleared"])
def test_a_step_of_a_table_without_rows(engine, case):
    """t advances, and there is nothing else to do (SPEC §1)."""
    table = HashTable([4], device=torch.ones(0).device)
    optimizer = SparseAdamW({"t": table})
    table.train(case != "eval")
    table(torch.arange(0 if case == "no ids" else 3)).sum().backward()
    if case == "cleared":
        table.clear()
    optimizer.step()
    assert optimizer.state_dict()["state"]["t"]["step"] == 1
    assert len(table) == 0
