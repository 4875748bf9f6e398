"""The CUDA engine on the emulator: whole steps and lookups, in every order of threads, and what a
GPU would have to wait for.

Kernels run checked (tests/emulator), so each case also says that no access is out of bounds or
misaligned, that there are no races, and that every barrier is met by all.
"""

from __future__ import annotations

import itertools
import sys

import emulator
import numpy as np
import pytest
import torch
from oracle import Oracle, bits, relative_error, within_one_ulp
from test_update import Table, step
from torch.overrides import TorchFunctionMode

from cupy_sparse_adamw import (
    AdmitHook,
    HashTable,
    NormalInitializer,
    SparseAdamW,
    _checks,
    functional,
)
from cupy_sparse_adamw._types import MISSING, RowIndex, Slot
from cupy_sparse_adamw.row_store import RowStore

pytestmark = pytest.mark.emulated

SEEDS = [0, 1, 2]
TILE = 128  # sparse_adamw.cu
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
#: Every pair of a table's dtype and its gradients'.
PAIRS = [(F32, F32), (F64, F64), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)]


@pytest.fixture(autouse=True)
def _emulated():
    emulator.load_engine()
    with emulator.active(), functional.use_engine("emulated"):
        yield


# ---------------------------------------------------------------------- whole steps


def group(dtype, grad_dtype, dim):
    """Three tables in blocks of several sizes and their gradients: tables, pending, plain tensors.

    Between them: rows that occur once, twice, as often as a tile and its neighbours hold, and in
    three tiles; dropped gradients; several pieces a table; a table whose rows are few.
    """
    torch.manual_seed(dim)
    hot = [TILE - 1, TILE, TILE + 1, 3 * TILE + 5] if dim < 1000 else [TILE + 1]
    tables, pending, plain = [], [], []
    for number, (size, block_size) in enumerate([(40, 7), (3, 64), (25, 1)]):
        table = Table(torch.randn(size, dim).to(dtype), block_size)
        counts = hot if number == 0 else [2 * TILE] if number == 1 else []
        rows = [torch.full((n,), row) for row, n in enumerate(counts)]
        rows.append(torch.randint(0, size - 1, (50,)))  # the last row is never touched
        rows.append(torch.full((9,), MISSING))
        rows = torch.cat(rows)
        rows = rows[torch.randperm(rows.numel())]
        grads = (torch.randn(rows.numel(), dim) + 0.5).to(grad_dtype)
        cuts = sorted(torch.randint(0, rows.numel(), (2,)).tolist())
        pieces = [(rows[a:b], grads[a:b]) for a, b in itertools.pairwise([0, *cuts, rows.numel()])]
        options = {"grad_scale": 0.5} if number == 0 else {"mean": number == 1}
        tables.append(table)
        pending.append(table.pending(*pieces, drop_missing=True, name=f"t{number}", **options))
        kept = rows != MISSING
        plain.append((rows[kept], grads[kept], options))
    return tables, pending, plain


@pytest.mark.parametrize("dim", [1, 3, 4, 17, 64, 130, 1024])
@pytest.mark.parametrize(("dtype", "grad_dtype"), PAIRS, ids=str)
def test_steps_against_float64_in_every_order(dtype, grad_dtype, dim):
    results = []
    for seed in SEEDS:
        with emulator.using(seed=seed):
            tables, pending, plain = group(dtype, grad_dtype, dim)
            before = [table.values() for table in tables]
            for _ in range(2):
                step(tables, pending)
        results.append([values for table in tables for values in table.values()])
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(bits(x), bits(y))

    for table, values, (rows, grads, options) in zip(tables, before, plain, strict=True):
        oracle = Oracle(values[0])
        for _ in range(2):
            oracle.step(rows, grads.double(), options.get("grad_scale", 1), options.get("mean"))
        param, exp_avg, exp_avg_sq = table.values()
        limit = 1e-14 if dtype == F64 else 1e-6
        assert relative_error(exp_avg, oracle.exp_avg) <= limit
        assert relative_error(exp_avg_sq, oracle.exp_avg_sq) <= limit
        if dtype.itemsize == 2:  # the second step begins with weights that were rounded
            assert relative_error(param, oracle.param) <= 2 * torch.finfo(dtype).eps
        else:
            assert relative_error(param, oracle.param) <= 2 * limit
        for old, new in zip(values, table.values(), strict=True):
            assert torch.equal(bits(old[-1]), bits(new[-1]))
        for slot in table.slots:
            assert not slot.value()[table.size :].any()
        assert table.t.item() == 2


@pytest.mark.parametrize(("dtype", "grad_dtype"), [p for p in PAIRS if p[0].itemsize == 2], ids=str)
def test_a_16_bit_step_is_the_rounded_one(dtype, grad_dtype):
    tables, pending, plain = group(dtype, grad_dtype, 12)
    oracles = [Oracle(table.values()[0]) for table in tables]
    step(tables, pending)
    for table, oracle, (rows, grads, options) in zip(tables, oracles, plain, strict=True):
        oracle.step(rows, grads.double(), options.get("grad_scale", 1), options.get("mean"))
        assert within_one_ulp(table.values()[0], oracle.param)


def integer_sums(lengths: list[int], dim: int = 1) -> None:
    """Coalesce runs of these lengths, rows in order, gradients whose every sum is exact."""
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    order = torch.randperm(rows.numel())
    grads = torch.randint(-9, 10, (rows.numel(), dim)).float()
    table = Table(torch.zeros(len(lengths) + 1, dim))
    touched, values = functional.coalesce(table.pending((rows[order], grads[order])))
    expected = torch.zeros(len(lengths), dim).index_add_(0, rows, grads)
    present = torch.tensor(lengths) > 0
    assert torch.equal(touched, torch.arange(len(lengths))[present])
    assert torch.equal(values, expected[present])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, *range(126, 131), *range(254, 259), 1300])
@pytest.mark.parametrize("offset", [0, 1, 5, 126, 127])
def test_runs_of_every_length_at_every_place(offset, length):
    """A run that begins anywhere in a tile, with a row before and a long run behind it."""
    integer_sums([offset, length, 2 * TILE + 3, 1])


def test_random_runs():
    generator = torch.Generator().manual_seed(3)
    for case in range(20):
        ends = [1, 3, 140, 500]
        lengths = [
            int(torch.randint(0, ends[(case + i) % 4] + 1, (), generator=generator))
            for i in range(12)
        ]
        integer_sums(lengths, dim=1 + 3 * (case % 2))


def test_eight_streams_of_chunks():
    """More chunks than streams, so that each stream adds several; all chunks differ."""
    integer_sums([3, 19 * TILE + 11, 8 * TILE, 9 * TILE, 16 * TILE])


@pytest.mark.parametrize("length", [TILE, 3 * TILE])
def test_sums_lose_nothing(length):
    """1 + tiny + tiny + ..., each of which float32 alone would round away."""
    tiny = 2.0**-25
    grads = torch.full((length, 1), tiny)
    grads[0] = 1.0
    table = Table(torch.zeros(3, 1))
    for values in (grads, grads.flip(0)):
        _, total = functional.coalesce(table.pending(([2] * length, values)))
        assert total.item() == pytest.approx(1.0 + (length - 1) * tiny, abs=2.0**-24)


def test_keys_beyond_32_bits():
    """Tables of 2**40 rows, as far as keys know: those of the second do not fit 32 bits."""
    tables = [Table(torch.randn(30, 3)) for _ in range(2)]
    expected = [Table(table.values()[0]) for table in tables]
    rows, grads = torch.randint(0, 30, (200,)), torch.randn(200, 3)
    step(
        tables,
        [t.pending((rows, grads), num_rows=2**40, row_count=torch.tensor([30])) for t in tables],
    )
    step(expected, [t.pending((rows, grads)) for t in expected])
    for ours, theirs in zip(tables, expected, strict=True):
        for x, y in zip(ours.values(), theirs.values(), strict=True):
            assert torch.equal(bits(x), bits(y))


def test_rows_beyond_4_gib():
    """Row numbers times bytes a row exceed 32 bits. Memory that nobody touches is not there."""
    size, dim = 2_200_000, 512
    row = size - 2
    pages = [
        torch.from_numpy(np.zeros((size, dim), dtype=kind))
        for kind in (np.float16, np.float32, np.float32)
    ]
    for tensor in pages:
        emulator.register(tensor)
    table = Table(torch.zeros(2, dim, dtype=F16))
    table.slots, table.size = [Slot.over("big", x) for x in pages], size
    grads = torch.randn(3, dim).half()
    step([table], [table.pending(([row, 1, row], grads))])
    oracle = Oracle(torch.zeros(3, dim))
    oracle.step([2, 1, 2], grads)
    assert relative_error(pages[1][row], oracle.exp_avg[2]) <= 1e-6
    assert relative_error(pages[1][1], oracle.exp_avg[1]) <= 1e-6
    values = functional.gather(table.slots[1], torch.tensor([row, 0]))
    assert torch.equal(values, torch.stack([pages[1][row], torch.zeros(dim)]))
    functional.scatter_(table.slots[0], torch.tensor([row + 1]), grads[:1])
    assert torch.equal(pages[0][row + 1], grads[0])


def test_a_row_count_on_the_device_is_the_limit():
    table = Table(torch.randn(10, 2))
    before = table.values()
    pending = table.pending(
        ([3, 4], torch.ones(2, 2)), num_rows=10, row_count=torch.tensor([4]), name="counted"
    )
    with pytest.raises(IndexError, match=r"table 'counted'.*row 4.*has 4 rows"):
        step([table], [pending])
    assert torch.equal(bits(table.values()[0][4:]), bits(before[0][4:]))
    assert not torch.equal(table.values()[0][3], before[0][3])


def test_misaligned_weights_take_the_narrow_path():
    """A weight that begins 4 bytes into an allocation: 16-byte accesses would be misaligned."""
    memory = torch.randn(1 + 6 * 8)
    weight = memory[1:].view(6, 8)
    table, plain = Table(weight.clone()), Table(weight.clone(), block_size=6)
    plain.slots[0] = Slot.over("narrowed", weight)
    rows, grads = [4, 1, 4], torch.randn(3, 8)
    for t in (table, plain):
        step([t], [t.pending((rows, grads))])
    assert torch.equal(bits(plain.values()[0]), bits(table.values()[0]))
    assert torch.equal(bits(plain.values()[2]), bits(table.values()[2]))


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


class NoWaits(TorchFunctionMode):
    """Refuses what would make the host wait for a GPU; the emulator's own code may."""

    WAITS = frozenset((
        "item", "tolist", "cpu", "numpy", "nonzero", "unique", "unique_consecutive", "equal",
        "allclose", "masked_select", "argwhere", "synchronize", "bincount",
        "__bool__", "__int__", "__float__", "__index__", "__contains__",
    ))  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith("emulator"):
            masks = [
                x
                for index in args[1:2]
                for x in (index if isinstance(index, tuple) else (index,))
                if isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
            ]
            by_mask = name in ("__getitem__", "__setitem__", "index_put_", "index_put") and masks
            assert name not in self.WAITS, f"{caller} waits in {name}"
            assert not by_mask, f"{caller} indexes by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.nonzero(x),
        lambda x: bool(x.any()),
        lambda x: int(x[0]),
        lambda x: float(x[0]),
        lambda x: 1 if x.any() else 0,
        lambda x: x.unique(),
        lambda x: x.numpy(),
        lambda x: [1, 2, 3][x[0].long()],
        lambda x: x.masked_fill_(x > 0, 0) and torch.masked_select(x, x > 0),
    ],
)
def test_the_trap_catches_a_wait(wait):
    x = torch.ones(2)
    with NoWaits(), pytest.raises(AssertionError, match=r"waits in|by a mask"):
        wait(x)


def test_nothing_on_the_steps_path_waits(monkeypatch):
    """Training as on a GPU (the count of rows is not known for free): lookup, backward, step."""
    monkeypatch.setattr(RowStore, "_counting_waits", lambda store: True)
    monkeypatch.setattr(
        emulator.interop.HostCopy, "values", lambda copy: pytest.fail("waits for a copy")
    )
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
        with NoWaits():
            train(torch.arange(10, 40).view(5, 6))
            train(torch.randint(0, 40, (5, 6)))
            table.eval()
            table(torch.arange(1000))
    assert len(table) == 40


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


# ---------------------------------------------------------------------- hash tables


def trained(seed: int, engine: str = "emulated", dtype=F32, dim=5, **options):
    """A table after steps with new and known ids, duplicates and growth: id -> [row, m, v]."""
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(1)
    with functional.use_engine(engine), emulator.using(seed=seed):
        initializer = NormalInitializer(generator=torch.Generator().manual_seed(2))
        table = HashTable([dim], 8, dtype, initializer=initializer, **options)
        optimizer = SparseAdamW({"t": table}, lr=0.05)
        for size in (3, 40, 300, 300):
            ids = torch.randint(-size, size, (2 * size,), generator=generator) * 2**33
            table(ids).float().pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state_dict()["state"]["t"]
        columns = [table.embeddings(), state["exp_avg"], state["exp_avg_sq"]]
        assert torch.equal(state["ids"], table.ids())
        order = table.ids().argsort()
        return table.ids()[order], [x[order] for x in columns]


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_training_does_not_depend_on_the_order_of_threads(dtype):
    ids, values = trained(0, dtype=dtype)
    for seed in (1, 2, 3):
        other_ids, others = trained(seed, dtype=dtype)
        assert torch.equal(ids, other_ids)
        for x, y in zip(values, others, strict=True):
            assert torch.equal(bits(x), bits(y))


@pytest.mark.parametrize(("dtype", "limit"), [(F32, 2e-6), (F64, 1e-12), (F16, 2e-3), (BF16, 2e-2)])
def test_training_agrees_with_the_cpu_engine(dtype, limit):
    for options in ({}, {"grad_reduce_by": "id"}):
        ids, values = trained(0, dtype=dtype, **options)
        cpu_ids, expected = trained(0, "cpu", dtype=dtype, **options)
        assert torch.equal(ids, cpu_ids)
        for x, y in zip(values, expected, strict=True):
            assert relative_error(x, y.double().numpy()) <= limit


def test_many_threads_claim_few_ids():
    """The claims of one launch, hundreds of threads for each id, in many orders."""
    ids = torch.randint(0, 40, (700,)) * 2**20
    for seed in range(6):
        with emulator.using(seed=seed):
            table = HashTable([3], 16, initializer=NormalInitializer(), name="claims")
            table.reserve(64)
            rows = table._store.find_or_insert(ids)
            by_id = dict(zip(ids.tolist(), rows.tolist(), strict=True))
            assert all(by_id[i] == r for i, r in zip(ids.tolist(), rows.tolist(), strict=True))
            assert sorted(by_id.values()) == list(range(len(by_id)))
            assert table._store._index.counters.tolist() == [len(by_id), 0, 0]
            assert [by_id[i] for i in table.ids().tolist()] == list(range(len(by_id)))
            assert torch.equal(table._store.find(ids), rows)


def test_an_index_that_is_nearly_full_wraps_around():
    """Searches run over the end of the index, past entries that others claim meanwhile."""
    for seed in SEEDS:
        with emulator.using(seed=seed):
            entries = torch.full((64, 2), MISSING)
            index = RowIndex(entries, torch.zeros(3, dtype=torch.int64), torch.empty(0).long())
            slots = [Slot("ids", 1, 64, torch.int64, torch.device("cpu"))]
            slots.append(Slot("x", 2, 64, F32, torch.device("cpu")))
            for slot in slots:
                slot.reserve(64)
            ids = torch.randint(-(2**62), 2**62, (60,)).repeat(3)[torch.randperm(180)]
            distribution = NormalInitializer().distribution(2, 2)
            rows = functional.find_or_insert_(index, ids, *slots, 3, distribution)
            assert int(index.counters[0]) == 60
            assert sorted(set(rows.tolist())) == list(range(60))
            assert torch.equal(functional.find(entries, ids), rows)
            assert functional.find(entries, ids + 1).tolist() == [MISSING] * 180
            assert torch.equal(functional.gather(slots[0], rows).flatten(), ids)
            again = functional.find_or_insert_(index, ids, *slots, 3, distribution)
            assert torch.equal(again, rows)
            copy = torch.full((128, 2), MISSING)
            functional.insert_(copy, ids.unique(), functional.find(entries, ids.unique()))
            assert torch.equal(functional.find(copy, ids), rows)


def test_growing_moves_no_row():
    table = HashTable([4], 8, initializer=NormalInitializer())
    table(torch.arange(30))
    values, addresses = table.embeddings(), table._store.embedding.addresses().tolist()
    ids = table.ids()
    table(torch.arange(2000))
    assert table._store.embedding.addresses().tolist()[: len(addresses)] == addresses
    assert torch.equal(table.embeddings()[:30], values)
    assert torch.equal(table.ids()[:30], ids)
    assert len(table) == 2000


def test_a_full_table_resumes_bitwise_in_other_rows():
    """Saved, loaded in another order of threads, trained on: as if never stopped."""

    def model(seed):
        initializer = NormalInitializer(generator=torch.Generator().manual_seed(2))
        table = HashTable([4], 8, initializer=initializer)
        with emulator.using(seed=seed):
            table(torch.arange(-20, 20))
        return table, SparseAdamW({"t": table}, lr=0.1)

    def train(table, optimizer, batches):
        for i in batches:
            table(torch.tensor([i, 3, 3, -i, 100 + i])).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    table, optimizer = model(0)
    train(table, optimizer, range(3))
    saved = table.state_dict(), optimizer.state_dict()
    train(table, optimizer, range(3, 6))
    other, other_optimizer = model(9)
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    train(other, other_optimizer, range(3, 6))
    ids = table.ids()
    table.eval(), other.eval()
    assert torch.equal(bits(table(ids)), bits(other(ids)))
