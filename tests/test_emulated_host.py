"""What the CUDA engine asks of the host and of a GPU: launches, waits, late errors, graph capture.

On the emulator (tests/emulator), whose model of capture refuses what CUDA would refuse.
"""

from __future__ import annotations

import contextlib
import gc
import sys

import emulator
import numpy as np
import pytest
import torch
from oracle import Oracle, bits, relative_error
from test_update import Table, step
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cupy_sparse_adamw import (
    AdmitHook,
    HashTable,
    NormalInitializer,
    SparseAdamW,
    _checks,
    functional,
)
from cupy_sparse_adamw._slots import Slot
from cupy_sparse_adamw._types import MISSING

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("emulated")]

SEEDS = [0, 1, 2]
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16

# ---------------------------------------------------------------------- launches and waits


def tables_of_one_kind(count: int) -> tuple[SparseAdamW, list[torch.nn.Embedding]]:
    embeddings = [torch.nn.Embedding(5 + i % 7, 4, sparse=True) for i in range(count)]
    return SparseAdamW({f"e{i}": e for i, e in enumerate(embeddings)}), embeddings


@pytest.mark.parametrize("count", [1, 10, 300])
def test_launches_do_not_count_tables(count):
    optimizer, embeddings = tables_of_one_kind(count)
    sum(e(torch.tensor([1, 3, 1])).sum() for e in embeddings).backward()
    optimizer.step()
    emulator.launches.clear()
    optimizer.step()
    assert [x.kernel for x in emulator.launches] == [
        "make_keys_32",
        "advance_float",
        "update",
        "finish",
    ]


def test_what_a_step_costs_the_host_does_not_count_tables(monkeypatch):
    """No tensor is exchanged, which takes microseconds; two uploads tell of all tables."""
    optimizer, embeddings = tables_of_one_kind(7)
    sum(e(torch.tensor([1, 3, 1])).sum() for e in embeddings).backward()
    optimizer.step()
    calls = []
    for name in ("array_of", "to_device"):
        right = getattr(emulator.interop, name)

        def counted(*args, right=right, name=name):
            calls.append(name)
            return right(*args)

        monkeypatch.setattr(emulator.interop, name, counted)
    optimizer.step()
    assert calls == ["to_device", "to_device"]


def test_each_of_many_tables_is_updated():
    """More tables than threads in a block, each with a count of steps of its own."""
    size = 300
    tables = [Table(torch.randn(2, 1, dtype=F64)) for _ in range(size)]
    oracles = [Oracle(table.values()[0]) for table in tables]
    for i, table in enumerate(tables):
        table.t += i
    grads = torch.randn(size, 1, dtype=F64)
    pending = [table.pending(([1], grads[i : i + 1])) for i, table in enumerate(tables)]
    step(tables, pending)
    for i, (table, oracle) in enumerate(zip(tables, oracles, strict=True)):
        oracle.t = i
        oracle.step([1], grads[i : i + 1])
        assert table.t.item() == i + 1
        assert relative_error(table.values()[0], oracle.param) <= 1e-14
    pending[200] = tables[200].pending(([2], grads[:1]), name="t200")
    with pytest.raises(IndexError, match="table 't200': a gradient names row 2,"):
        step(tables, pending)


def test_a_lookup_is_three_launches():
    table = HashTable([4], initializer=NormalInitializer())
    ids = torch.arange(50)
    table(ids)
    emulator.launches.clear()
    table(ids + 20)
    kernels = [x.kernel for x in emulator.launches if x.kernel != "insert"]  # growth's
    assert kernels[-3:] == ["find_or_claim", "settle", "gather"]
    table.eval()
    emulator.launches.clear()
    table(ids)
    assert [x.kernel for x in emulator.launches] == ["find", "gather"]


# What gives the host a number from the device, or makes it wait for a copy, by the name that users
# call it by.
WAITING_CALLS = frozenset((
    "item", "tolist", "cpu", "numpy", "nonzero", "unique", "unique_consecutive", "equal",
    "allclose", "masked_select", "argwhere", "bincount", "coalesce", "repeat_interleave", "copy_",
    "tensor", "as_tensor", "__bool__", "__int__", "__float__", "__index__", "__contains__",
    "__array__", "__repr__",
))  # fmt: skip
# Those that move what users pass in to the table's device, or make a table's block addresses.
MAY_MOVE = {"_flat", "block_table"}


def package_frame():
    """The frame of the package, or of a planted wait, that calls into torch; None for others."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("emulator"):
            return None
        if not module.startswith(("torch", "numpy")) and module != __name__:
            return frame if module.startswith("cupy_sparse_adamw") else None
        if frame.f_code.co_name == "<lambda>" and module == __name__:
            return frame
        if module == __name__ and not frame.f_code.co_name.startswith("__torch_"):
            return None
        frame = frame.f_back
    return None


class NoWaitingCalls(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if frame := package_frame():
            where = f"{frame.f_globals['__name__']}.{frame.f_code.co_name}"
            assert name not in WAITING_CALLS, f"{where} waits in {name}"
            assert name != "to" or frame.f_code.co_name in MAY_MOVE, f"{where} waits in {name}"
            masks = [
                x
                for index in args[1:2]
                for x in (index if isinstance(index, tuple) else (index,))
                if isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
            ]
            by_mask = name in ("__getitem__", "__setitem__", "index_put_", "index_put") and masks
            assert not by_mask, f"{where} waits for a mask"
            assert name != "where" or len(args) + len(kwargs) > 1, f"{where} waits in {name}"
        return func(*args, **kwargs)


class NoWaitingOperations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in emulator.SYNCHRONIZING and (frame := package_frame()):
            raise AssertionError(f"{frame.f_code.co_name} waits in {func._schema.name}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_waits(monkeypatch):
    """A context in which whatever would make the host wait for a GPU raises AssertionError."""

    def synchronize(*args):
        raise AssertionError("something waits in synchronize")

    right = emulator.interop.HostCopy.values

    def values(copy):
        assert copy.ready(), "something waits for a copy"
        return right(copy)

    @contextlib.contextmanager
    def trap():
        with monkeypatch.context() as patch, NoWaitingCalls(), NoWaitingOperations():
            patch.setattr(torch.cuda, "synchronize", synchronize)
            patch.setattr(emulator.interop.HostCopy, "values", values)
            yield

    return trap


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.to(device="cpu", dtype=torch.float64),
        lambda x: torch.empty(2).copy_(x),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, 1.0),
        lambda x: x.nonzero(),
        lambda x: torch.nonzero(x),
        lambda x: torch.where(x > 0),
        lambda x: bool(x.any()),
        lambda x: int(x[0]),
        lambda x: float(x[0]),
        lambda x: 1 if x.any() else 0,
        lambda x: x.unique(),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: repr(x),
        lambda x: [1, 2, 3][x[0].long()],
        lambda x: x[: x[0].long()],
        lambda x: torch.repeat_interleave(x, x.long()),
        lambda x: torch.sparse_coo_tensor(
            x[None].long(), x, (3,), check_invariants=False
        ).coalesce(),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_the_trap_catches_a_wait(wait, no_waits):
    x = torch.ones(2)
    with no_waits(), pytest.raises(AssertionError, match="waits"):
        wait(x)


def test_nothing_on_the_steps_path_waits(no_waits):
    """Lookup, backward, step."""
    table = HashTable([6], initializer=NormalInitializer(), block_size=16)
    by_id = HashTable([6], dtype=BF16, grad_reduce_by="id")
    embedding = torch.nn.Embedding(20, 6, sparse=True)
    bag = torch.nn.EmbeddingBag(20, 4, sparse=True, mode="sum")
    optimizer = SparseAdamW({"t": table, "i": by_id, "e": embedding, "b": bag})
    for t in (table, by_id):
        t.reserve(1000)

    def train(ids):
        y = table(ids) + by_id(ids).float() + embedding(ids % 20) + bag(ids % 20).sum()
        y.pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    with emulator.using(copies_complete=False):
        train(torch.arange(30).view(5, 6))  # moments appear; they may be allocated, not waited for
        with no_waits():
            train(torch.arange(10, 40).view(5, 6))
            train(torch.randint(0, 40, (5, 6)))
            table.eval()
            table(torch.arange(1000))
    assert len(table) == 40


def test_first_steps_and_steps_after_growth_do_not_wait(no_waits):
    """Moments, step counts and block addresses are made there; lookups that grow may wait."""
    table = HashTable([4], 16, initializer=NormalInitializer())
    embedding = torch.nn.Embedding(9, 4, sparse=True)
    optimizer = SparseAdamW({"t": table, "e": embedding})
    for size in (5, 2000):
        (table(torch.arange(size)).sum() + embedding(torch.arange(4)).sum()).backward()
        with no_waits():
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.state_dict()["state"]["t"]["step"] == 2


# ---------------------------------------------------------------------- rows out of range


def test_a_row_out_of_range_is_raised_when_the_copy_has_come():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    good = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = SparseAdamW({"good": good, "bad": embedding})

    def give(row):
        for e, r in ((good, 1), (embedding, row)):
            e.weight.grad = torch.sparse_coo_tensor(
                torch.tensor([[r, 2]]), torch.ones(2, 2), (4, 2), check_invariants=False
            )

    give(7)
    before = embedding.weight.detach().clone()
    with emulator.using(copies_complete=False):
        optimizer.step()
        give(1)
        optimizer.step()  # the first report is not there yet
    assert torch.equal(embedding.weight[[0, 3]], before[[0, 3]])
    with pytest.raises(IndexError, match=r"table 'bad': a gradient names row 7.*has 4 rows"):
        optimizer.step()
    optimizer.step()
    assert optimizer.state_dict()["state"]["bad"]["step"] == 3

    give(-1)
    optimizer.step()
    with pytest.raises(IndexError, match=r"table 'bad': a gradient names row -1"):
        optimizer.state_dict()
    assert optimizer.state_dict()["state"]["good"]["step"] == 4


def test_of_many_rows_out_of_range_one_is_noted():
    """The one that was first, in whatever order threads run; and the first fault stays."""
    rows = torch.tensor([-5, 1, 99, MISSING, 6] * 100)
    for seed in SEEDS:
        with emulator.using(seed=seed):
            table, fault = Table(torch.zeros(6, 2)), torch.zeros(2, dtype=torch.int64)
            options = {"drop_missing": True, "fault": fault}
            for batch in (rows, torch.full((500,), -7)):
                with pytest.raises(IndexError, match=r"row (-5|99|6),"):
                    step([table], [table.pending((batch, torch.ones(500, 2)), **options)])
                assert fault.tolist() in ([1, -5], [1, 99], [1, 6])


def test_rows_below_missing_are_never_dropped():
    for drop_missing in (True, False):
        table = Table(torch.zeros(6, 2))
        pending = table.pending(([-2], torch.ones(1, 2)), drop_missing=drop_missing)
        with pytest.raises(IndexError, match="row -2,"):
            step([table], [pending])


def test_row_0_of_an_empty_table_is_out_of_range():
    table = Table(torch.zeros(2, 2))
    counted = {"num_rows": 2, "row_count": torch.tensor([0])}
    with pytest.raises(IndexError, match="row 0, but the table has 0 rows"):
        step([table], [table.pending(([0], torch.ones(1, 2)), **counted)])
    assert not table.values()[1].any()


# ---------------------------------------------------------------------- graph capture


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01), torch.tensor(0.01, dtype=F64)], ids=str)
def test_replays_are_eager_steps(lr, monkeypatch):
    """K replays of a captured step equal K steps, bit for bit; an lr tensor is followed."""
    # As if it were on a GPU, where the host does not read it.
    monkeypatch.setattr(_checks, "require_lr", lambda lr: lr)

    def model():
        torch.manual_seed(0)
        table = HashTable([5], initializer=NormalInitializer())
        embeddings = [torch.nn.Embedding(6, d, sparse=True) for d in (5, 4, 4)]
        rate = lr.clone() if isinstance(lr, torch.Tensor) else lr
        names = {f"e{i}": e for i, e in enumerate(embeddings)}
        optimizer = SparseAdamW({"t": table, **names}, lr=rate)
        return table, embeddings, optimizer, rate

    def backward(table, embeddings):
        ids = torch.tensor([1, 4, 4, 2])
        loss = table(ids).pow(2).sum() + sum(e(ids).pow(2).sum() for e in embeddings)
        loss.backward()

    results = []
    for captured in (False, True):
        table, embeddings, optimizer, rate = model()
        backward(table, embeddings)
        optimizer.step()
        graph = None
        if captured:
            before = [e.weight.detach().clone() for e in embeddings]
            with emulator.capture() as graph:
                optimizer.step()
            assert all(torch.equal(e.weight, x) for e, x in zip(embeddings, before, strict=True))
        for k in range(4):
            if isinstance(rate, torch.Tensor):
                rate.fill_(0.01 / (k + 1))
            graph.replay() if graph else optimizer.step()
        saved = optimizer.state_dict()["state"]
        assert all(state["step"] == 5 for state in saved.values())
        results.append(
            [table.embeddings(), *(e.weight for e in embeddings)]
            + [state[key] for state in saved.values() for key in ("exp_avg", "exp_avg_sq")]
        )
    for x, y in zip(*results, strict=True):
        assert torch.equal(bits(x), bits(y))


def test_a_captured_step_with_many_tables_holds_its_own_descriptors():
    """More words than one launch takes by value."""
    optimizer, embeddings = tables_of_one_kind(60)
    sum(e(torch.tensor([1, 3, 1])).sum() for e in embeddings).backward()
    optimizer.step()
    emulator.launches.clear()
    with emulator.capture() as graph:
        optimizer.step()
    assert sum(x.kernel == "store_words" for x in emulator.launches) >= 3
    weights = [e.weight.detach().clone() for e in embeddings]
    graph.replay()
    for e, before in zip(embeddings, weights, strict=True):
        changed = (e.weight != before).any(1)
        assert changed.tolist() == [i in (1, 3) for i in range(before.shape[0])]


def test_replays_of_a_step_that_does_not_sort(monkeypatch):
    """Which rows ascend was known at the capture; a replay reads the rows anew."""
    tables = [Table(torch.ones(6, 4)) for _ in range(2)]
    rows, grads = torch.tensor([0, 2, 5]), torch.randn(3, 4)
    pending = [t.pending((rows.clone(), grads), coalesced=True) for t in tables]
    for table, of_table in zip(tables, pending, strict=True):
        step([table], [of_table])
    monkeypatch.setattr(torch, "sort", None)
    with emulator.capture() as graph:
        step(tables[:1], pending[:1])
    for new in ([0, 2, 5], [1, 2, 3]):
        for of_table in pending:
            of_table.pieces[0].rows.copy_(torch.tensor(new))
        graph.replay()
        step(tables[1:], pending[1:])
    for x, y in zip(tables[0].values(), tables[1].values(), strict=True):
        assert torch.equal(bits(x), bits(y))


def test_replays_report_rows_out_of_range():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = SparseAdamW({"e": embedding})
    indices = torch.tensor([[1]])
    embedding.weight.grad = torch.sparse_coo_tensor(
        indices, torch.ones(1, 2), (4, 2), check_invariants=False
    )
    optimizer.step()
    with emulator.capture() as graph:
        optimizer.step()
    graph.replay()
    embedding.weight.grad._indices().fill_(9)
    graph.replay()
    embedding.weight.grad._indices().fill_(1)
    graph.replay()
    optimizer.step()  # collects what replays noted
    with pytest.raises(IndexError, match="table 'e': a gradient names row 9"):
        optimizer.step()
    optimizer.step()


def test_what_cannot_be_captured_says_so():
    table = HashTable([4])
    optimizer = SparseAdamW({"t": table})
    table(torch.tensor([1, 2])).sum().backward()
    with emulator.using(capturing=True):
        with pytest.raises(RuntimeError, match=r"'t'.*run one step before capturing"):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"cannot be captured.*eval mode"):
            table(torch.tensor([3]))
        with pytest.raises(RuntimeError, match="has grown or is new since the last"):
            functional.gather(Slot("new", 2, 4, F32, torch.device("cpu")), torch.tensor([MISSING]))
        table(torch.tensor([1, 2, 9]), AdmitHook("ReadOnly"))


def test_a_replay_knows_the_rows_of_its_capture_only():
    """Rows that a table got since would have the keys of the next table's: they are reported."""

    def normal(name):
        return HashTable([4], 16, initializer=NormalInitializer(), name=name)

    tables = [normal("a"), normal("b")]
    optimizer = SparseAdamW({t.name: t for t in tables}, lr=0.1)
    read_only, ids = AdmitHook("ReadOnly"), torch.arange(10)
    for table in tables:
        table.reserve(500)

    def backward():
        sum(table(ids, read_only).pow(2).sum() for table in tables).backward()

    for table in tables:
        table(torch.arange(10))
    for _ in range(2):
        backward()
        optimizer.step()
        optimizer.zero_grad()
    with emulator.capture() as graph:
        backward()
        optimizer.step()
    graph.replay()
    tables[0](torch.arange(10, 400))  # memory was held, so nothing grows
    before = tables[1].embeddings()
    ids += 380
    graph.replay()
    assert torch.equal(tables[1].embeddings(), before)
    with pytest.raises(IndexError, match="table 'a': a step captured in a CUDA graph names row"):
        optimizer.state_dict()


def test_a_capture_asks_after_no_copy():
    """The number of rows is on its way when the step is captured, as it is after most lookups."""
    table = HashTable([4], 16, initializer=NormalInitializer())
    optimizer = SparseAdamW({"t": table}, lr=0.1)
    table(torch.arange(10)).sum().backward()
    optimizer.step()
    table._store._bound.send_copy()
    with emulator.capture() as graph:  # HostCopy.ready raises here
        optimizer.step()
    graph.replay()
    assert optimizer.state_dict()["state"]["t"]["step"] == 2


def test_what_a_graph_reads_stays_when_the_table_changes():
    table = HashTable([4], 16, initializer=NormalInitializer())
    table(torch.arange(10))
    read_only = AdmitHook("ReadOnly")
    ids = torch.arange(10)
    with torch.no_grad():
        table(ids, read_only)
        with emulator.capture() as graph:
            out = table(ids, read_only)
    graph.replay()
    expected = out.clone()
    kept = emulator.engine_module("_group")._kept_for_graphs
    store = table._store
    assert any(x is store._index.entries for x in kept)
    assert any(isinstance(x, tuple) and x[0] is store.embedding.block_table() for x in kept)
    with pytest.warns(UserWarning, match="captured in a CUDA graph grows, or is replaced"):
        table(torch.arange(10, 1000))
    graph.replay()
    assert torch.equal(out, expected)
    table.clear()
    graph.replay()  # of memory that is still there
    assert torch.equal(out, expected)


def test_a_kernel_that_is_not_loaded_breaks_no_capture():
    table = Table(torch.randn(4, 6))
    grads = torch.randn(2, 6)
    step([table], [table.pending(([1, 2], grads))])
    compiled = emulator.engine_module("_compile")
    compiled._function.cache_clear()
    group = emulator.engine_module("_group")
    group._load_store_words.cache_clear()  # so that the next step outside of a capture loads it
    with (
        emulator.using(capturing=True),
        pytest.raises(RuntimeError, match=r"kernel store_words.*not loaded yet.*run one such step"),
    ):
        step([table], [table.pending(([1, 2], grads))])


def test_what_a_captured_step_reads_stays(monkeypatch):
    """Its tables are cleared and loaded; the old step writes to memory that is still there."""
    monkeypatch.setattr(_checks, "require_lr", lambda lr: lr)  # as if it were on a GPU
    table = HashTable([4], 16, initializer=NormalInitializer())
    embedding = torch.nn.Embedding(9, 4, sparse=True)
    rate = torch.tensor(0.1)
    optimizer = SparseAdamW({"t": table, "e": embedding}, lr=rate)
    (table(torch.arange(5)).sum() + embedding(torch.arange(4)).sum()).backward()
    optimizer.step()
    saved = optimizer.state_dict()
    with emulator.capture() as graph:
        optimizer.step()
    graph.replay()
    optimizer.load_state_dict(saved)
    with contextlib.suppress(UserWarning):
        table.clear()
    gc.collect()
    graph.replay()  # the emulator reports accesses to freed memory


def test_a_kernel_that_does_not_load_counts_no_step(monkeypatch):
    compiled = emulator.engine_module("_compile")
    table = Table(torch.randn(4, 6))
    before = table.values()
    right = compiled._function

    def function(device, variant, name):
        if name == "finish":
            raise RuntimeError("it does not compile")
        return right(device, variant, name)

    monkeypatch.setattr(compiled, "_function", function)
    with pytest.raises(RuntimeError, match="does not compile"):
        step([table], [table.pending(([1, 2], torch.randn(2, 6)))])
    assert table.t.item() == 0
    for x, y in zip(before, table.values(), strict=True):
        assert torch.equal(bits(x), bits(y))
