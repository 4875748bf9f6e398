"""What keeps a GPU's step from waiting, tested on the CPU: bounds, late reports, t in a tensor.

What a graph capture would get wrong is refused; ``functional.is_capturing`` stands in for one.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from oracle import bits

from cupy_sparse_adamw import (
    AdmitHook,
    HashTable,
    NormalInitializer,
    SparseAdamW,
    functional,
    row_store,
)
from cupy_sparse_adamw._checks import require_hyperparams, row_error
from cupy_sparse_adamw.optimizer_state import DEFAULTS
from cupy_sparse_adamw.row_bound import RowBound
from cupy_sparse_adamw.row_store import FoundRows

# ---------------------------------------------------------------------- how many rows there are


@pytest.fixture
def counts(monkeypatch) -> list[int]:
    """Counting waits, as on a GPU; how often it was done since the list was cleared."""
    done: list[int] = []
    exactly = RowBound.exactly
    monkeypatch.setattr(RowBound, "reading_waits", lambda bound: True)
    monkeypatch.setattr(RowBound, "exactly", lambda bound: done.append(1) or exactly(bound))
    return done


class Copy:
    """A HostCopy that arrives when a test says so; waiting for it is noted."""

    sent: list[Copy] = []  # noqa: RUF012 - of one test

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.is_ready, self.was_waited_for = tensor.clone(), False, False
        self.sent.append(self)

    def ready(self) -> bool:
        return self.is_ready

    def values(self):
        self.was_waited_for |= not self.is_ready
        return self.tensor.numpy()


@pytest.fixture
def copies(monkeypatch) -> list[Copy]:
    """Those that are sent, in order; none arrives by itself."""
    Copy.sent = []
    monkeypatch.setattr(functional, "copy_to_host", Copy)
    return Copy.sent


def normal_table(**options) -> HashTable:
    generator = torch.Generator().manual_seed(0)
    return HashTable([2], initializer=NormalInitializer(generator=generator), **options)


def test_lookups_count_only_where_memory_may_not_do(counts, copies):
    table = normal_table(block_size=10)
    store = table._store
    table.reserve(100)
    counts.clear()
    for first in range(0, 100, 20):
        table(torch.arange(first, first + 20))
    assert counts == []
    assert store.num_rows_bound == len(table) == 100


def test_the_bound_counts_ids_that_were_known(counts, copies):
    table = normal_table(block_size=10)
    store = table._store
    table.reserve(100)
    counts.clear()
    for _ in range(10):
        table(torch.arange(10))
    assert counts == []
    assert (store.num_rows_bound, len(table)) == (100, 10)


def test_a_copy_that_has_come_lowers_the_bound(counts, copies):
    """It is sent when two more batches may not fit, and taken over as soon as it is there."""
    table = normal_table(block_size=10)
    store = table._store
    table.reserve(60)  # 63 entries of 90 may be filled, memory holds 60
    counts.clear()
    for expected in (0, 0, 0, 0, 1):
        table(torch.arange(10))
        assert len(copies) == expected
    table(torch.arange(10, 20))  # one more batch behind the copy
    assert store.num_rows_bound == 60
    copies[0].is_ready = True
    assert store.num_rows_bound == 10 + 10
    assert not copies[0].was_waited_for
    assert counts == []
    assert len(table) == 20


def test_a_lookup_waits_for_the_copy_before_it_counts(counts, copies):
    table = normal_table(block_size=10)
    table.reserve(60)
    counts.clear()
    for _ in range(7):
        table(torch.arange(10))
    assert counts == []
    assert copies[0].was_waited_for
    assert table._store.num_rows_bound == 10 + 20  # the batch behind the copy, and this one
    assert table._store.embedding.num_rows() == 60


def test_in_the_long_run_no_lookup_counts(counts):
    """Copies arrive at once here; known ids, looked up in a table that is as full as it gets."""
    table = normal_table(block_size=16)
    ids = torch.arange(1000)
    for part in ids.split(100):
        table(part)
    counts.clear()
    for _ in range(200):
        table(ids[torch.randint(0, 1000, (100,))])
    assert counts == []
    assert len(table) == 1000


def test_growing_leaves_room_for_two_more_batches(counts, copies):
    table = normal_table(block_size=1)
    store = table._store
    ids = torch.tensor([1, 2, 3, 4, 4, 4, 4, 4])
    table(ids)
    assert (store.num_rows_bound, store.embedding.num_rows()) == (4, 4 + 2 * 8)
    counts.clear()
    for more in (100, 200):
        table(ids + more)
    assert counts == []
    assert len(table) == 12


def test_a_lookup_that_was_interrupted_is_in_the_bound(counts, monkeypatch):
    """Its rows may have been numbered all the same."""
    table = normal_table(block_size=10)
    table.reserve(100)
    right = functional.find_or_insert_

    def interrupted(*args):
        right(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(functional, "find_or_insert_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        table(torch.arange(30))
    assert table._store.num_rows_bound >= len(table) == 30
    assert table._store.find(torch.arange(30)).sort().values.tolist() == list(range(30))


def test_rows_and_values_do_not_depend_on_bounds(monkeypatch):
    """The same program with and without counting: the same ids, rows and values."""
    tables = []
    for waits in (True, False):
        monkeypatch.setattr(RowBound, "reading_waits", lambda bound, waits=waits: waits)
        torch.manual_seed(1)
        table = normal_table(block_size=3)
        for size in (1, 0, 40, 7, 300, 300, 5, 300):
            table(torch.randint(-150, 150, (size,)))
            held = {slot.num_rows() for slot in table._store.slots.values()}
            assert min(held) >= table._store.num_rows_bound >= len(table)
        tables.append(table)
    one, other = tables
    assert torch.equal(one.ids(), other.ids())
    assert torch.equal(one.embeddings(), other.embeddings())


def test_a_bound_is_no_row(counts):
    """Rows between the true number and its bound are out of range, and the text says so."""
    table = normal_table()
    optimizer = SparseAdamW({"items": table})
    table.reserve(100)
    for _ in range(3):
        table(torch.arange(5))
    assert table._store.num_rows_bound == 15
    table._grads.append(FoundRows(torch.tensor([5])), torch.ones(1, 2))
    with pytest.raises(IndexError, match=r"'items': a gradient names row 5.*has 5 rows"):
        optimizer.step()


def test_clear_and_load_set_the_bound(counts):
    table, other = normal_table(), normal_table()
    table(torch.arange(50))
    other.load_state_dict(table.state_dict())
    assert other._store.num_rows_bound == 50
    table.clear()
    assert table._store.num_rows_bound == 0
    table(torch.arange(5))
    assert len(table) == 5


def test_a_failed_insertion_takes_its_count_back(monkeypatch):
    """Free rows stay free, and ids of the failed batch have no row."""
    table = normal_table(block_size=2)
    table(torch.arange(5))

    def fail(*args):
        table._store._index.counters[2] += 7  # the CUDA engine takes tickets before it counts
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("cupy_sparse_adamw.engines.cpu.index.init_rows_", fail)
        with pytest.raises(MemoryError):
            table(torch.arange(100))
    assert table._store._index.counters.tolist() == [5, 0, 0]
    assert table._store.find(torch.arange(7)).tolist() == [0, 1, 2, 3, 4, -1, -1]


def test_a_large_index_is_filled_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr(row_store, "ROWS_AT_A_TIME", 7)
    table = normal_table(block_size=2)
    for part in torch.arange(500).split(50):
        table(part)
    assert table._store.find(torch.arange(500)).tolist() == list(range(500))


# ---------------------------------------------------------------------- t


def embedding_and_optimizer(**settings) -> tuple[torch.nn.Embedding, SparseAdamW]:
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    return embedding, SparseAdamW({"items": embedding}, **settings)


def train(embedding, optimizer, steps=1) -> None:
    for _ in range(steps):
        embedding(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_t_is_a_tensor_that_steps_advance_in_place():
    embedding, optimizer = embedding_and_optimizer()
    train(embedding, optimizer)
    state = optimizer.state[embedding.weight]
    step, fault = state["step"], state["row_fault"]
    train(embedding, optimizer, 2)
    assert state["step"] is step
    assert state["row_fault"] is fault
    assert (step.shape, step.dtype, step.item()) == ((), torch.int64, 3)
    assert (fault.dtype, fault.tolist()) == (torch.int64, [0, 0])
    saved = optimizer.state_dict()["state"]["items"]
    assert saved["step"] == 3
    assert type(saved["step"]) is int
    assert "row_fault" not in saved
    optimizer.load_state_dict({**optimizer.state_dict()})
    assert optimizer.state[embedding.weight]["step"] is not step
    train(embedding, optimizer)
    assert optimizer.state_dict()["state"]["items"]["step"] == 4
    assert step.item() == 3


def test_t_made_in_inference_mode_goes_on_outside():
    embedding, optimizer = embedding_and_optimizer()
    embedding(torch.tensor([1])).sum().backward()
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    assert optimizer.state_dict()["state"]["items"]["step"] == 2


def test_t_stays_where_a_step_fails():
    embedding, optimizer = embedding_and_optimizer()
    bad = torch.sparse_coo_tensor([[4]], torch.ones(1, 2), (4, 2), check_invariants=False)
    embedding.weight.grad = bad
    for _ in range(2):
        with pytest.raises(IndexError, match=r"'items'.*row 4.*has 4 rows"):
            optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    embedding.weight.grad = None
    train(embedding, optimizer)
    assert optimizer.state_dict()["state"]["items"]["step"] == 1


@pytest.mark.gpu
def test_t_follows_a_table_to_another_device():
    pytest.importorskip("numba")
    table = HashTable([2])
    optimizer = SparseAdamW({"users": table})
    for device in ("cpu", "cuda", "cpu"):
        table.to(device)
        for _ in range(2):
            table(torch.tensor([5])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state[table]
        assert state["step"].device == state["row_fault"].device == table.device
    assert optimizer.state_dict()["state"]["users"]["step"] == 6


# ---------------------------------------------------------------------- lr


def test_an_lr_on_the_cpu_is_checked_and_handed_on():
    group = {**DEFAULTS, "betas": (0.9, 0.99), "eps": 0.1, "weight_decay": 0.0}
    lr = torch.tensor([0.25], requires_grad=True)
    found = require_hyperparams({**group, "lr": lr}).lr
    assert found.data_ptr() == lr.data_ptr()
    assert not found.requires_grad
    assert require_hyperparams({**group, "lr": 0.25}).lr == 0.25
    for bad in (torch.tensor(-1.0), torch.tensor(torch.nan)):
        with pytest.raises(ValueError, match="lr must be a finite number of at least 0"):
            require_hyperparams({**group, "lr": bad})


def test_an_lr_elsewhere_is_not_read():
    group = {**DEFAULTS, "betas": (0.9, 0.99), "eps": 0.1, "weight_decay": 0.0}
    lr = torch.empty((), device="meta")  # reading it raises
    assert require_hyperparams({**group, "lr": lr}).lr.device.type == "meta"
    with pytest.raises(TypeError, match="lr must be a number, got tensor"):
        require_hyperparams({**group, "lr": torch.empty(2, device="meta")})
    with pytest.raises(TypeError, match=r"lr on a GPU must be float32 or float64, got torch.int64"):
        require_hyperparams({**group, "lr": torch.empty((), device="meta", dtype=torch.int64)})


def test_an_lr_tensor_is_followed():
    lr, values = torch.tensor(0.5), torch.randn(4, 2)
    one, first = embedding_and_optimizer(lr=lr)
    other, second = embedding_and_optimizer(lr=0.5)
    for embedding in (one, other):
        embedding.weight.data.copy_(values)
    for rate in (0.5, 0.125):
        lr.fill_(rate)
        second.param_groups[0]["lr"] = rate
        train(one, first)
        train(other, second)
    assert torch.equal(bits(one.weight), bits(other.weight))


# ---------------------------------------------------------------------- reports


class Report:
    """A RowReport of the table "items" whose answer comes when a test says so."""

    def __init__(self, row: int | None) -> None:
        self.row, self.is_ready = row, False

    def ready(self) -> bool:
        return self.is_ready

    def error(self) -> IndexError | None:
        assert self.is_ready, "this would wait"
        return None if self.row is None else row_error("items", self.row, 4)


@pytest.fixture
def reported(monkeypatch) -> list[Report]:
    """Reports that the next updates return, in order."""
    following: list[Report] = []
    right = functional.prepare_sparse_adamw

    def prepare_sparse_adamw(updates, segments):
        apply = right(updates, segments)
        return lambda: [*apply(), *([following.pop(0)] if updates else [])]

    monkeypatch.setattr(functional, "prepare_sparse_adamw", prepare_sparse_adamw)
    return following


def test_a_report_is_raised_once_by_the_first_step_that_finds_it_ready(reported):
    embedding, optimizer = embedding_and_optimizer()
    reports = [Report(None), Report(7), Report(7), Report(None)]
    reported += reports
    train(embedding, optimizer, 3)
    assert optimizer._reports == reports[:3]
    reports[0].is_ready = reports[1].is_ready = True
    optimizer.state[embedding.weight]["row_fault"].copy_(torch.tensor([1, 7]))
    before = bits(embedding.weight)
    called = []
    with pytest.raises(IndexError, match=r"'items': a gradient names row 7.*has 4 rows"):
        optimizer.step(lambda: called.append(1))
    assert not called  # it comes first
    assert torch.equal(bits(embedding.weight), before)
    assert optimizer._reports == []
    assert optimizer.state[embedding.weight]["row_fault"].tolist() == [0, 0]
    train(embedding, optimizer)
    assert optimizer.state_dict()["state"]["items"]["step"] == 4


def test_a_good_report_is_dropped_when_it_is_ready(reported):
    embedding, optimizer = embedding_and_optimizer()
    reports = [Report(None) for _ in range(4)]
    reported += reports
    train(embedding, optimizer, 2)
    reports[1].is_ready = True
    train(embedding, optimizer)
    assert optimizer._reports == [reports[0], reports[2]]
    reports[0].is_ready = reports[2].is_ready = True
    train(embedding, optimizer)
    assert optimizer._reports == [reports[3]]


def test_state_dict_raises_a_fault_once(reported):
    embedding, optimizer = embedding_and_optimizer()
    reported += [Report(9)]
    train(embedding, optimizer)
    optimizer.state[embedding.weight]["row_fault"].copy_(torch.tensor([1, 9]))
    with pytest.raises(IndexError, match=r"'items': a gradient names row 9.*has 4 rows"):
        optimizer.state_dict()
    assert optimizer.state_dict()["state"]["items"]["step"] == 1
    optimizer.step()  # has no gradient, and nothing to raise either
    assert optimizer._reports == []


def test_the_fault_of_a_hash_table_names_the_true_number_of_rows(counts):
    table = HashTable([2])
    optimizer = SparseAdamW({"users": table})
    for _ in range(2):
        table(torch.tensor([5, 6])).sum().backward()
    optimizer.step()
    optimizer.state[table]["row_fault"].copy_(torch.tensor([1, 3]))
    with pytest.raises(IndexError, match=r"'users': a gradient names row 3.*has 2 rows"):
        optimizer.state_dict()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_reports_are_no_part_of_copies(reported, copied):
    embedding, optimizer = embedding_and_optimizer()
    reported += [Report(None)]
    train(embedding, optimizer)
    other = copied(optimizer)
    assert other._reports == []
    assert len(optimizer._reports) == 1
    weight = other.param_groups[0]["params"][0]
    assert other.state[weight]["step"] is not optimizer.state[embedding.weight]["step"]
    assert other.state_dict()["state"]["items"]["step"] == 1


def test_loading_drops_reports(reported):
    embedding, optimizer = embedding_and_optimizer()
    reported += [Report(7)]
    train(embedding, optimizer)
    state = optimizer.state_dict()
    optimizer.state[embedding.weight]["row_fault"].fill_(1)
    optimizer.load_state_dict(state)
    assert optimizer._reports == []
    assert optimizer.state_dict()["state"]["items"]["step"] == 1


# ---------------------------------------------------------------------- capture


@pytest.fixture
def capturing(monkeypatch) -> list[bool]:
    """A graph is being captured while the list holds something."""
    switch: list[bool] = []
    monkeypatch.setattr(functional, "is_capturing", lambda device: bool(switch))
    return switch


def test_engines_of_the_cpu_capture_nothing():
    for name in ("reference", "cpu"):
        with functional.use_engine(name):
            assert functional.is_capturing(torch.device("cpu")) is False


def test_a_lookup_that_may_insert_cannot_be_captured(capturing):
    table = normal_table()
    known = table(torch.tensor([1])).detach()
    capturing.append(True)
    text = r"cannot be captured into a CUDA graph.*eval mode.*AdmitHook\('ReadOnly'\)"
    for ids in ([1], [2]):  # known or not: a replay may bring others
        with pytest.raises(RuntimeError, match=text):
            table(torch.tensor(ids))
    assert torch.equal(table(torch.tensor([1]), AdmitHook("ReadOnly")), known)
    assert torch.equal(table.eval()(torch.tensor([1])), known)
    assert len(table) == 1


def refuses(optimizer, embedding, text) -> None:
    embedding(torch.tensor([1, 2])).sum().backward()
    before = bits(embedding.weight)
    with pytest.raises(RuntimeError, match=text):
        optimizer.step()
    assert torch.equal(bits(embedding.weight), before)
    assert optimizer._accumulated == 0


def test_a_first_update_cannot_be_captured(capturing):
    embedding, optimizer = embedding_and_optimizer()
    capturing.append(True)
    refuses(optimizer, embedding, "'items': its first update.*run one step before capturing")
    assert embedding.weight not in optimizer.state
    capturing.clear()
    optimizer.step()
    capturing.append(True)
    optimizer.step()
    capturing.clear()
    assert optimizer.state_dict()["state"]["items"]["step"] == 2


def test_accumulation_cannot_be_captured(capturing):
    embedding, optimizer = embedding_and_optimizer()
    train(embedding, optimizer)
    optimizer.set_grad_accum_steps(3)
    capturing.append(True)
    refuses(optimizer, embedding, "with 3 accumulation steps cannot be captured into a CUDA graph")


def test_an_lr_elsewhere_cannot_be_captured(capturing):
    embedding, optimizer = embedding_and_optimizer()
    train(embedding, optimizer)
    optimizer.param_groups[0]["lr"] = torch.empty((), device="meta")
    capturing.append(True)
    refuses(optimizer, embedding, "'items': a CUDA graph cannot follow an lr on meta")


def test_reports_are_not_asked_under_capture(capturing, reported):
    embedding, optimizer = embedding_and_optimizer()
    reports = [Report(7), Report(None)]
    reported += reports
    train(embedding, optimizer)
    reports[0].is_ready = True
    capturing.append(True)
    train(embedding, optimizer)
    capturing.clear()
    with pytest.raises(IndexError, match="row 7"):
        optimizer.step()
