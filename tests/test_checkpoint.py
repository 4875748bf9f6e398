"""Checkpoints: what comes back, in every mode; other layouts, slices, memory, folders."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import recis_stand_in
import torch
from checkpoint_runs import Training, by_id
from oracle import DTYPES, bits
from test_state import EVENTS, POINTS, Run, differences

from cupy_sparse_adamw import (
    FilterHook,
    HashTable,
    NormalInitializer,
    SparseAdamW,
    checkpoint,
    gen_slice,
)
from cupy_sparse_adamw.checkpoint import CheckpointError

ROOT = Path(__file__).resolve().parents[1]
#: Every test writes tables in several files.
SMALL = 256


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", SMALL)


def index_of(path: Path) -> dict:
    return json.loads((path / "index.json").read_bytes())["index"]


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_goes_on_bit_for_bit(tmp_path, dtype, accumulate):
    """Hooks, tied weights, two optimizers and schedulers."""
    steps = 12
    expected = Training(dtype, accumulate=accumulate).play(0, steps).state()
    for point in (6, 7, 8):  # none, one and two micro-batches wait
        run = Training(dtype, accumulate=accumulate).play(0, point)
        path = run.save(tmp_path, point)
        fresh = Training(dtype, block_size=7, seed=2, accumulate=accumulate)
        used = Training(dtype, seed=3, accumulate=accumulate).play(30, 37)
        for other in (fresh, used):
            assert differences(other.load(path).state(), run.state()) == []
            assert differences(other.play(point, steps).state(), expected) == []


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_micro_batches_between_backward_and_step(tmp_path, dtype, used):
    expected = Run(dtype).play(0, EVENTS).state()
    for point in POINTS[1:]:
        run = Run(dtype).play(0, point)
        path = checkpoint.save(
            tmp_path, run.model, run.optimizer, step=point, extra=run.scheduler.state_dict()
        )
        other = Run(dtype, block_size=7)
        other = other.used() if used else other
        loaded = checkpoint.load(path, other.model, [other.optimizer])
        other.scheduler.load_state_dict(loaded["extra"])
        assert loaded["step"] == point
        assert differences(other.play(point, EVENTS).state(), expected) == [], point


def test_saving_changes_nothing(tmp_path):
    run, untouched = Training().play(0, 5), Training().play(0, 5)
    before = run.state()
    for step, incremental in enumerate([False, True, True, False]):
        run.save(tmp_path, step, incremental=incremental)
    assert differences(run.state(), before) == []
    assert differences(run.play(5, 9).state(), untouched.play(5, 9).state()) == []


def test_nothing_that_is_loaded_is_shared_with_what_was_saved(tmp_path):
    run = Training().play(0, 5)
    path, before = run.save(tmp_path, 5), run.state()
    Training(seed=2).load(path).play(5, 8)
    assert differences(run.state(), before) == []
    assert differences(Training(seed=2).load(path).state(), before) == []


def test_a_model_alone(tmp_path):
    run = Training().play(0, 5)
    path = run.save(tmp_path, 5)
    other = Training(seed=2)
    checkpoint.load(path, other.model)
    assert differences(by_id(other.model.state_dict()), run.state()["model"]) == []
    assert other.tables.state_dict()["state"] == {}


def test_a_model_alone_keeps_the_moments_of_ids_that_stay(tmp_path):
    run = Training().play(0, 5)
    path = run.save(tmp_path, 5)
    other = Training(seed=2).play(30, 36)
    before = other.tables.state_dict()["state"]["p"]
    moments = dict(zip(before["ids"].tolist(), before["exp_avg"].tolist(), strict=True))
    checkpoint.load(path, other.model)
    after = other.tables.state_dict()["state"]["p"]
    stayed = 0
    for id_, exp_avg in zip(after["ids"].tolist(), after["exp_avg"].tolist(), strict=True):
        assert exp_avg == moments.get(id_, [0.0] * 3)
        stayed += id_ in moments
    assert 0 < stayed < len(moments)


def test_tables_of_an_optimizer_alone(tmp_path):
    def made(seed):
        generator = torch.Generator().manual_seed(seed)
        table = HashTable(
            [2],
            4,
            initializer=NormalInitializer(generator=generator),
            filter_hook=FilterHook("LRU", {"max_rows": 9}),
        )
        weight = torch.nn.Parameter(torch.randn(5, 2, generator=generator))
        return table, weight, SparseAdamW({"t": table, "w": weight}, lr=0.1)

    table, weight, optimizer = made(1)
    table(torch.arange(6)).sum().backward()
    weight.grad = torch.sparse_coo_tensor([[1, 4]], torch.ones(2, 2), (5, 2), check_invariants=True)
    optimizer.step()
    path = checkpoint.save(tmp_path, None, optimizer, 1)
    other_table, other_weight, other = made(2)
    assert checkpoint.load(path, optimizer=other) == {"step": 1, "extra": None}
    assert differences(by_id(other_table.state_dict()), by_id(table.state_dict())) == []
    assert differences(by_id(other.state_dict()), by_id(optimizer.state_dict())) == []
    assert torch.equal(other_weight, weight)
    with torch.no_grad():  # the seed came with it
        assert torch.equal(other_table(torch.tensor([77])), table(torch.tensor([77])))


def test_on_every_engine(tmp_path, engine):
    """Full and incremental, with rows that go and come."""

    def made():
        model = torch.nn.ModuleDict(
            {
                "table": HashTable(
                    [3], 4, device=str(torch.empty(0).device), initializer=NormalInitializer()
                ),
                "embedding": torch.nn.Embedding(20, 3, sparse=True),
            }
        )
        return model, SparseAdamW({"t": model["table"], "e": model["embedding"]})

    def train(model, optimizer, ids):
        (model["table"](ids * 77).sum() + model["embedding"](ids).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = made()
    train(model, optimizer, torch.arange(15))
    checkpoint.save(tmp_path, model, optimizer, 1, incremental=True)
    model["table"].delete(torch.tensor([3 * 77, 4 * 77]))
    train(model, optimizer, torch.tensor([18, 4, 2]))
    path = checkpoint.save(tmp_path, model, optimizer, 2, incremental=True)
    assert index_of(path)["base"] is not None
    other = made()
    checkpoint.load(path, *other)
    for one, its in zip((model, optimizer), other, strict=True):
        assert differences(by_id(its.state_dict()), by_id(one.state_dict())) == []


def test_whatever_the_default_device(tmp_path):
    run = Training().play(0, 4)
    other = Training(seed=2)
    with torch.device("meta"):
        checkpoint.save(tmp_path, run.model, run.optimizers, 4, incremental=True)
        path = checkpoint.save(tmp_path, run.model, run.optimizers, 5, incremental=True)
        checkpoint.load(path, other.model, other.optimizers)
    assert differences(by_id(other.model.state_dict()), run.state()["model"]) == []
    assert differences(by_id(other.tables.state_dict()), run.state()["tables"]) == []


def test_views_of_large_memory_are_small_files(tmp_path):
    model = torch.nn.Linear(2, 2)
    flat = torch.randn(100_000)
    model.weight.data, model.bias.data = flat[:4].view(2, 2), flat[4:6]
    path = checkpoint.save(tmp_path, model)
    assert sum(file.stat().st_size for file in path.iterdir()) < 4000
    other = torch.nn.Linear(2, 2)
    checkpoint.load(path, other)
    assert torch.equal(other.weight, model.weight)


@pytest.mark.parametrize("wrapped", [False, True])
def test_tables_of_recis_are_refused(tmp_path, monkeypatch, wrapped):
    recis_stand_in.install(monkeypatch)
    new = torch.classes.recis.Generator.make_constant_generator([4, 2], torch.float32, 0.0)
    impl = torch.ops.recis.make_hashtable(
        4, [2], torch.float32, torch.device("cpu"), False, ["t"], new, 0, 65536, 65536
    )
    table = recis_stand_in.HashTable(impl, "users") if wrapped else impl
    optimizer = SparseAdamW({"users": table})
    model = table if wrapped else None
    with pytest.raises(NotImplementedError, match="'users': checkpoints do not hold RecisTable"):
        checkpoint.save(tmp_path / "root", model, optimizer)
    assert not (tmp_path / "root").exists()


def test_empty_tables_and_no_optimizer(tmp_path):
    model = torch.nn.ModuleDict(
        {"a": HashTable([3]), "b": torch.nn.Embedding(0, 3, sparse=True), "c": torch.nn.ReLU()}
    )
    path = checkpoint.save(tmp_path, model)
    model["a"](torch.arange(5))
    assert checkpoint.load(path, model) == {"step": 0, "extra": None}
    assert len(model["a"]) == 0


# ---------------------------------------------------------------------- dense tensors and extra


TYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint16, torch.uint64),
    *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    raw = torch.randint(0, 256, (48 * dtype.itemsize,), dtype=torch.uint8)
    whole = (raw % 2 if dtype is torch.bool else raw).view(dtype).view(6, 8)
    tensors = {
        "whole": whole,
        "transposed": whole.t(),
        "strided": whole[::2, 1::3],
        "expanded": whole[0, 0].expand(3, 2),
        "zero_dim": whole[0, 0],
        "empty": whole[:0],
    }
    path = checkpoint.save(tmp_path, extra=tensors)
    for name, tensor in checkpoint.load(path)["extra"].items():
        assert tensor.dtype == dtype
        assert tensor.shape == tensors[name].shape
        assert tensor.is_contiguous()
        one, other = (x.contiguous().reshape(-1).view(torch.uint8) for x in (tensor, tensors[name]))
        assert torch.equal(one, other), name


def test_conjugated_and_negated_views(tmp_path):
    z = torch.randn(5, dtype=torch.complex64)
    x = torch.randn(5)
    path = checkpoint.save(tmp_path, extra=[z.conj(), z.conj().imag, torch._neg_view(x)])
    conj, imag, negated = checkpoint.load(path)["extra"]
    assert torch.equal(conj, z.conj().resolve_conj())
    assert torch.equal(bits(imag), bits(-z.imag))
    assert torch.equal(bits(negated), bits(-x))


def test_plain_values_come_back_as_they_were(tmp_path):
    extra = {
        "ints": [0, -1, 2**63, -(2**200), True, False, None],
        "floats": (0.1, -0.0, 1e-320, float("inf"), -float("inf")),
        7: {"nested": [[], (), {}, ((1,),)]},
        -1: OrderedDict([("b", 1), ("a", Counter({3: 2}))]),
        "text": 'ü\n"\\\x00\ud800',
        "": {"tensor": 5, "dict": [["reference", "x"]]},
    }
    got = checkpoint.load(checkpoint.save(tmp_path, extra=extra))["extra"]
    assert differences(got, extra) == []
    assert repr(got) == repr(extra)  # -0.0, and the order of keys
    nan = checkpoint.load(checkpoint.save(tmp_path, step=1, extra=[float("nan")]))["extra"][0]
    assert nan != nan


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ([{"a": object()}], r"extra\[0\]\['a'\] is a object"),
        ({(1, 2): 3}, r"extra has a key \(1, 2\)"),
        ({"x": b"bytes"}, r"extra\['x'\] is a bytes"),
        ([torch.eye(2).to_sparse()], r"extra\[0\] is a Tensor with layout torch.sparse_coo"),
        (torch.empty(2, device="meta"), "extra is a Tensor .* on meta"),
        ([{1, 2}], r"extra\[0\] is a set"),
    ],
)
def test_what_would_need_pickle_is_refused_before_anything_is_written(tmp_path, extra, text):
    with pytest.raises(TypeError, match=text):
        checkpoint.save(tmp_path / "root", extra=extra)
    assert not (tmp_path / "root").exists()


def test_an_extra_state_that_is_not_plain(tmp_path):
    run = Training()
    run.model.notes = {"model": run.model}
    with pytest.raises(TypeError, match=r"_extra_state'\]\['model'\] is a Model"):
        run.save(tmp_path / "root", 1)
    assert not (tmp_path / "root").exists()


def test_tied_tensors_are_written_once(tmp_path):
    path = Training().play(0, 2).save(tmp_path, 2)
    values = dict(index_of(path)["state"]["model"]["dict"])["values"]["OrderedDict"]
    at = dict(values)
    assert at["head.weight"] == at["tied.weight"]
    assert at["head.bias"] != at["tied.bias"]
    assert at["embedding.weight"] == {"reference": "embedding"}


# ---------------------------------------------------------------------- tables of another kind


def test_a_table_split_over_slices(tmp_path):
    """Each shard takes its ids, moments and waiting gradients with them, and trains on alike."""

    def made(shard=None, seed=1):
        generator = torch.Generator().manual_seed(seed)
        table = HashTable(
            [3],
            5 if shard is None else 3 + shard,
            slice=None if shard is None else gen_slice(shard, 3),
            initializer=NormalInitializer(generator=generator),
        )
        optimizer = SparseAdamW({"t": table}, lr=0.1)
        optimizer.set_grad_accum_steps(2)
        return table, optimizer

    def train(tables, begin, end):
        for i in range(begin, end):
            generator = torch.Generator().manual_seed(i)
            ids = torch.randint(-(2**63), 2**63 - 1, (30,), generator=generator)
            ids = torch.cat([ids[:5], ids % 50])
            grads = torch.randn(35, 3, generator=generator)
            for table, optimizer in tables:
                mine = table._slice.contains(ids)
                table(ids[mine]).backward(grads[mine])
                optimizer.step()
                optimizer.zero_grad()

    whole = made()
    train([whole], 0, 5)  # one micro-batch waits
    path = checkpoint.save(tmp_path, *whole, 5)
    shards = [made(shard, seed=9) for shard in range(3)]
    for shard in shards:
        checkpoint.load(path, *shard)
    assert sum(len(table) for table, _ in shards) == len(whole[0])
    train([whole], 5, 9)
    train(shards, 5, 9)
    model, state = by_id(whole[0].state_dict()), by_id(whole[1].state_dict())["state"]["t"]
    for table, optimizer in shards:
        mine = table._slice.contains(model["ids"])
        assert 10 < int(mine.sum()) < len(whole[0])
        got, moments = by_id(table.state_dict()), by_id(optimizer.state_dict())["state"]["t"]
        for key in ("ids", "embedding"):
            assert torch.equal(got[key], model[key][mine])
        for key in ("ids", "exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[key], state[key][mine])


def test_a_table_of_another_dtype_of_the_same_kind(tmp_path):
    table = HashTable([2], initializer=NormalInitializer())
    table(torch.arange(9))
    path = checkpoint.save(tmp_path, table)
    half = HashTable([2], dtype=torch.bfloat16)
    checkpoint.load(path, half)
    assert torch.equal(half.embeddings(), table.embeddings().bfloat16())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"embedding_shape": [4]}, ValueError, "'plain'.* embedding has D = 3, the table D = 4"),
        ({"dtype": torch.float64}, ValueError, "'plain'.*not converted between float64"),
        (
            {"filter_hook": FilterHook("LFU", {"max_rows": 9})},
            ValueError,
            "'plain': the checkpoint has no slot 'lfu_count'",
        ),
        ({"name": "other"}, ValueError, r"has tables that are not here: \['plain'\]"),
    ],
)
def test_a_table_that_does_not_fit(tmp_path, change, error, text):
    path = Training().play(0, 4).save(tmp_path, 4)
    other = Training(seed=2).play(30, 33)
    table = HashTable(**{"embedding_shape": [3], "block_size": 4, **change})
    other.model.plain = table
    other.tables = SparseAdamW({"embedding": other.model.embedding, "p": table}, lr=0.01)
    other.tables.add_param_group({"params": {"h": other.model.hooked}})
    other.schedulers[1] = other.schedulers[0]
    before = other.state()
    with pytest.raises(error, match=text):
        checkpoint.load(path, other.model, other.optimizers)
    assert differences(other.state(), before) == []


def changed_models():
    def another_head(run):
        run.model.head = torch.nn.Linear(3, 4)

    def one_more(run):
        run.model.more = torch.nn.Linear(1, 1)

    def one_less(run):
        del run.model.tied

    def dense_embedding(run):
        run.model.embedding.sparse = False
        run.tables = SparseAdamW({"p": run.model.plain, "h": run.model.hooked})

    def other_rows(run):
        run.model.embedding = torch.nn.Embedding(21, 3, sparse=True)
        run.tables = SparseAdamW({"embedding": run.model.embedding, "p": run.model.plain})
        run.tables.add_param_group({"params": {"h": run.model.hooked}})

    def other_groups(run):
        tables = {"embedding": run.model.embedding, "p": run.model.plain, "h": run.model.hooked}
        run.tables = SparseAdamW(tables)

    def other_names(run):
        run.tables = SparseAdamW({"embedding": run.model.embedding, "q": run.model.plain})
        run.tables.add_param_group({"params": {"h": run.model.hooked}})

    def dense_groups(run):
        run.dense.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})

    def tied_to_a_table(run):
        run.model.zero_dim = None
        run.model.head.weight = torch.nn.Parameter(run.model.embedding.weight.detach()[:20])

    return [
        (another_head, RuntimeError, "size mismatch for head.weight"),
        (one_more, RuntimeError, "Missing key.*more.weight"),
        (one_less, RuntimeError, "Unexpected key.*tied.weight"),
        (dense_embedding, ValueError, r"tables that are not here: \['embedding'\]"),
        (
            other_rows,
            ValueError,
            "'embedding': the checkpoint has 20 rows .* the weight has 21",
        ),
        (other_groups, ValueError, "make the same groups before loading"),
        (other_names, ValueError, r"'plain' is that of \(optimizer, name\) \['tables', 'q'\]"),
        (dense_groups, ValueError, "different number of parameter groups"),
        (tied_to_a_table, ValueError, "head.weight is the weight of table 'embedding'"),
    ]


@pytest.mark.parametrize(
    ("change", "error", "text"), changed_models(), ids=[x[0].__name__ for x in changed_models()]
)
def test_a_model_or_optimizer_that_does_not_fit(tmp_path, change, error, text):
    """Whatever raises, and however late: all in memory stays."""
    path = Training().play(0, 4).save(tmp_path, 4)
    other = Training(seed=2).play(30, 33)
    change(other)
    before = other.state()
    with pytest.raises(error, match=text):
        checkpoint.load(path, other.model, other.optimizers)
    assert differences(other.state(), before) == []


def test_other_optimizers(tmp_path):
    run = Training().play(0, 3)
    path = run.save(tmp_path, 3)
    with pytest.raises(ValueError, match=r"has optimizers that are not here: \['tables'\]"):
        checkpoint.load(path, run.model, {"dense": run.dense})
    with pytest.raises(ValueError, match=r"lacks optimizers that are here: \['more'\]"):
        checkpoint.load(path, run.model, {**run.optimizers, "more": run.dense})
    with pytest.raises(ValueError, match="was saved with a model, so it loads with one"):
        checkpoint.load(path, optimizer=run.optimizers)


def test_a_gradient_that_came_before_finds_its_rows_after_a_load(tmp_path):
    run = Training().play(0, 4)
    path = run.save(tmp_path, 4)
    other = Training(seed=2)
    table = other.model.plain
    table(torch.arange(30).flip(0))
    ids, _ = run.model.plain.ids_map()
    out = table(ids[[5, 2]])
    checkpoint.load(path, other.model, other.optimizers)
    out.backward(torch.tensor([[1.0] * 3, [2.0] * 3]))
    grad = table.grad()
    assert table.ids()[grad.indices()[0]].tolist() == ids[[2, 5]].tolist()
    assert grad.values()[:, 0].tolist() == [2.0, 1.0]


# ---------------------------------------------------------------------- folders


def test_latest_and_keep(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    assert checkpoint.latest(tmp_path) is None
    for name in ("step-12", "step-00000000099", "other", ".saving-of-mine"):
        (tmp_path / name).mkdir()
    for step in (5, 7, 10**10, 8):
        path = checkpoint.save(tmp_path, step=step)
        assert path.name == f"step-{step:010d}"
    assert checkpoint.latest(tmp_path).name == "step-10000000000"
    path = checkpoint.save(tmp_path, step=6, keep=2)  # stays, though it is not among the newest
    names = {x.name for x in tmp_path.iterdir()} - {".lock"}
    assert names == {
        *("step-12", "step-00000000099", "other", ".saving-of-mine"),
        *("step-10000000000", path.name),
    }


def test_a_step_that_is_there(tmp_path):
    path = checkpoint.save(tmp_path, step=3, extra=1)
    with pytest.raises(FileExistsError, match=r"step-0000000003 exists; save at another step"):
        checkpoint.save(tmp_path, step=3, extra=2)
    assert checkpoint.load(path)["extra"] == 1


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"step": -1}, ValueError, "step must be at least 0"),
        ({"step": 1.5}, TypeError, "step must be an int"),
        ({"step": 10**19}, ValueError, "step must be below"),
        ({"keep": 0}, ValueError, "keep must be at least 1"),
        ({"model": {}}, TypeError, "model must be a torch.nn.Module, got dict"),
        ({"optimizer": 3}, TypeError, "optimizer must be a torch.optim.Optimizer, .* got int"),
        ({"optimizer": {"a": 3}}, TypeError, "got int as 'a'"),
    ],
)
def test_arguments(tmp_path, options, error, text):
    with pytest.raises(error, match=text):
        checkpoint.save(tmp_path / "root", **options)
    assert not (tmp_path / "root").exists()


# ---------------------------------------------------------------------- memory, and docs

MEMORY = """
import resource, sys, torch
from cupy_sparse_adamw import HashTable, SparseAdamW, checkpoint
from cupy_sparse_adamw.checkpoint import tables as checkpoint_tables

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def train(rows):
    model = torch.nn.ModuleDict(
        {"t": HashTable([32]), "e": torch.nn.Embedding(rows, 32, sparse=True)}
    )
    optimizer = SparseAdamW({"t": model["t"], "e": model["e"]})
    for begin in range(0, rows, 20_000):
        ids = torch.arange(begin, min(begin + 20_000, rows))
        (model["t"](ids * 7919).sum() + model["e"](ids).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer

checkpoint.CHUNK_BYTES = 4 << 20
root, what, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
if what == "save":
    warm = train(5_000)
    checkpoint.save(root + "-warm", *warm, 0)
    model, optimizer = train(rows)
    table = sum(x.nbytes() for x in model["t"].slot_group().slots())
    before = peak()
    checkpoint.save(root, model, optimizer, 1)
    print(peak() - before, table)
else:
    warm = train(5_000)
    checkpoint.load(checkpoint.latest(root + "-warm"), *warm)
    model, optimizer = train(1)[0], None
    model["e"] = torch.nn.Embedding(rows, 32, sparse=True)
    with torch.no_grad():
        model["e"].weight.fill_(0.0)
    optimizer = SparseAdamW({"t": model["t"], "e": model["e"]})
    before = peak()
    checkpoint.load(checkpoint.latest(root), model, optimizer)
    print(peak() - before, sum(x.nbytes() for x in model["t"].slot_group().slots()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_memory_that_save_and_load_take(tmp_path):
    """A save takes a few chunks. A load: the new contents beside the old, and a few chunks."""
    chunk, rows = 4 << 20, 250_000

    def run(what):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / "root"), what, str(rows)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stderr
        return map(int, done.stdout.split())

    extra, table = run("save")
    assert table > 20 * chunk
    assert extra < 8 * chunk, f"{extra >> 20} MiB for chunks of 4 MiB"
    extra, table = run("load")
    contents = (table + rows * 32 * 4 * 3) * 1.05 + rows * 34
    assert extra < contents + 12 * chunk, f"{extra >> 20} MiB for {int(contents) >> 20} MiB"


SNIPPETS = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8"), re.DOTALL
)


def test_the_snippets_of_the_docs_run(tmp_path):
    assert len(SNIPPETS) >= 2
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(SNIPPETS)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        checkpoint.save(tmp_path / "root")
    with pytest.raises(ImportError, match="pip install safetensors"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "root").exists()


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*/nowhere"):
        checkpoint.load(tmp_path / "nowhere")
    checkpoint.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"index.json is missing.*latest"):
        checkpoint.load(tmp_path)
