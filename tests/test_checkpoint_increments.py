"""Incremental checkpoints: base and increments together are what a full checkpoint is."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_runs import Training, rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_state import differences

from cupy_sparse_adamw import (
    FilterHook,
    HashTable,
    NormalInitializer,
    SparseAdamW,
    checkpoint,
)
from cupy_sparse_adamw.checkpoint import CheckpointError


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 256)


def index_of(path: Path) -> dict:
    return json.loads((path / "index.json").read_bytes())["index"]


def written(path: Path) -> dict[str, int]:
    """Rows that a checkpoint holds of each table."""
    tables = index_of(path)["tables"]
    return {name: sum(x["rows"] for x in entry["chunks"]) for name, entry in tables.items()}


def is_whole(path: Path) -> dict[str, bool]:
    return {name: entry["whole"] for name, entry in index_of(path)["tables"].items()}


# ---------------------------------------------------------------------- random programs


OPERATIONS = (
    ["train"] * 6
    + ["look up"] * 2
    + ["insert", "delete", "delete and train", "save", "save", "save"] * 2
    + ["clear", "write to the embedding", "reload state", "resume", "full save", "failed load"]
)


@pytest.mark.parametrize("seed", range(10))
def test_random_programs(tmp_path, seed):
    """At every save, base and increments and a full one come to what is in memory, bit for bit."""
    choice = random.Random(seed)
    run, root, step = Training(accumulate=choice.choice([1, 1, 2])).play(0, 2), tmp_path / "run", 0
    increments = 0
    for number in range(40):
        operation = choice.choice(OPERATIONS)
        ids = torch.tensor([choice.randint(-9, 70) for _ in range(choice.randint(1, 8))])
        table = choice.choice([run.model.plain, run.model.hooked])
        if operation == "train":
            run.play(number, number + 1)
        elif operation == "look up":
            with torch.no_grad():
                table(ids)
        elif operation == "insert":
            table.insert(ids, torch.randn(ids.numel(), 3))
        elif operation == "delete":
            table.delete(ids)
        elif operation == "delete and train":
            table.delete(ids)
            run.play(number, number + 1)
        elif operation == "clear":
            table.clear()
        elif operation == "write to the embedding":
            with torch.no_grad():
                run.model.embedding.weight[3] += 1
        elif operation == "reload state":
            run.tables.load_state_dict(run.tables.state_dict())
        elif operation == "failed load" and root.exists():
            other = Training(accumulate=run.accumulate)
            other.model.more = torch.nn.Linear(1, 1)
            with pytest.raises(RuntimeError, match="Missing key"):
                other.load(checkpoint.latest(root))
        elif operation == "resume" and root.exists():
            before = checkpoint.latest(root)
            run = Training(block_size=choice.randint(1, 9), seed=2, accumulate=run.accumulate)
            run.load(before)
        elif operation in ("save", "full save"):
            step += 1
            increment = run.save(root, step, incremental=operation == "save")
            full = run.save(tmp_path / "full", step)
            for path in (increment, full):
                other = Training(seed=3, block_size=7, accumulate=run.accumulate).load(path)
                assert differences(other.state(), run.state()) == [], (number, operation)
            # Its own reading of the table, beside state_dict's.
            assert rows_of(other.model.hooked) == rows_of(run.model.hooked)
            increments += index_of(increment)["base"] is not None
            assert index_of(full)["base"] is None
    assert increments or step < 6


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["look up", "train", "insert", "delete", "save"]),
            st.lists(st.integers(-3, 9), min_size=1, max_size=4),
        ),
        max_size=14,
    )
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_programs_of_one_table(tmp_path, program):
    """A table so small that rows are reused and evicted all the time."""
    root = tmp_path / "run"
    shutil.rmtree(root, ignore_errors=True)

    def made():
        hook = FilterHook("LFU", {"max_rows": 6})
        table = HashTable([1], 2, initializer=NormalInitializer(), filter_hook=hook)
        return table, SparseAdamW({"t": table})

    table, optimizer = made()
    for step, (operation, numbers) in enumerate([*program, ("save", [])]):
        ids = torch.tensor(numbers, dtype=torch.int64)
        if operation in ("look up", "train"):
            out = table(ids)
            if operation == "train":
                out.sum().backward()
                optimizer.step()
            optimizer.zero_grad()
        elif operation == "insert":
            table.insert(ids, ids[:, None].float() + step)
        elif operation == "delete":
            table.delete(ids)
        else:
            path = checkpoint.save(root, table, optimizer, step, incremental=True)
            other = made()
            checkpoint.load(path, *other)
            assert rows_of(other[0]) == rows_of(table)


# ---------------------------------------------------------------------- what is written


def trained(rows=60):
    model = torch.nn.ModuleDict(
        {
            "table": HashTable([3], initializer=NormalInitializer()),
            "embedding": torch.nn.Embedding(rows, 3, sparse=True),
        }
    )
    optimizer = SparseAdamW({"t": model["table"], "e": model["embedding"]})
    touch(model, optimizer, range(rows))
    return model, optimizer


def touch(model, optimizer, ids):
    ids = torch.tensor(list(ids))
    (model["table"](ids).sum() + model["embedding"](ids).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_an_increment_holds_what_changed(tmp_path):
    model, optimizer = trained()
    table = model["table"]
    path = checkpoint.save(tmp_path, model, optimizer, 1, incremental=True)
    assert written(path) == {"table": 60, "embedding": 60}
    assert index_of(path)["base"] is None
    path = checkpoint.save(tmp_path, model, optimizer, 2, incremental=True)
    assert written(path) == {"table": 0, "embedding": 0}
    touch(model, optimizer, [3, 4, 3])
    table.insert(torch.tensor([5, 1000]), torch.ones(2, 3))
    table.delete(torch.tensor([7, 8]))
    with torch.no_grad():
        table(torch.tensor([8, 2000, 9]))  # 8 comes back, 9 is only read
    path = checkpoint.save(tmp_path, model, optimizer, 3, incremental=True)
    assert index_of(path)["base"]["name"] == "step-0000000002"
    assert written(path) == {"table": 6, "embedding": 2}  # 3, 4, 5, 8, 1000, 2000
    table.eval()
    table(torch.tensor([11, 3000]))
    path = checkpoint.save(tmp_path, model, optimizer, 4, incremental=True)
    assert written(path) == {"table": 0, "embedding": 0}
    assert is_whole(path) == {"table": False, "embedding": False}


def test_lookups_change_rows_where_a_hook_counts_them(tmp_path):
    table = HashTable([3], filter_hook=FilterHook("LRU", {"max_rows": 100}))
    table(torch.arange(50))
    checkpoint.save(tmp_path, table, step=1, incremental=True)
    table(torch.tensor([3, 3, 4]))
    assert written(checkpoint.save(tmp_path, table, step=2, incremental=True)) == {"HashTable": 2}


def changes_of_everything():
    return [
        ("clear", lambda model, optimizer: model["table"].clear(), "table"),
        ("load", lambda model, optimizer: model.load_state_dict(model.state_dict()), "both"),
        (
            "load moments",
            lambda model, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
            "both",
        ),
        ("double and back", lambda model, optimizer: model["table"].double().float(), "table"),
        (
            "add a slot",
            lambda model, optimizer: model["table"].append_filter_slot("new", torch.int64),
            "table",
        ),
        (
            "write to the weight",
            lambda model, optimizer: torch.nn.init.ones_(model["embedding"].weight),
            "embedding",
        ),
        (
            "replace its memory",
            lambda model, optimizer: setattr(
                model["embedding"].weight, "data", model["embedding"].weight.data.clone()
            ),
            "embedding",
        ),
        (
            "write to its moments",
            lambda model, optimizer: optimizer.state[model["embedding"].weight]["exp_avg"].zero_(),
            "embedding",
        ),
    ]


@pytest.mark.parametrize(
    ("change", "whole"),
    [x[1:] for x in changes_of_everything()],
    ids=[x[0] for x in changes_of_everything()],
)
def test_what_cannot_be_followed_is_written_whole(tmp_path, change, whole):
    model, optimizer = trained()
    checkpoint.save(tmp_path, model, optimizer, 1, incremental=True)
    change(model, optimizer)
    path = checkpoint.save(tmp_path, model, optimizer, 2, incremental=True)
    assert is_whole(path) == {
        "table": whole in ("table", "both"),
        "embedding": whole in ("embedding", "both"),
    }
    assert (index_of(path)["base"] is None) == (whole == "both")
    touch(model, optimizer, [3])
    path = checkpoint.save(tmp_path, model, optimizer, 3, incremental=True)
    assert written(path) == {"table": 1, "embedding": 1}


def test_nobody_pays_who_does_not_ask(tmp_path):
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, model, optimizer, 1)
    checkpoint.load(path, model, optimizer)
    assert model["table"].saved_rows is None
    assert all(table.saved_rows is None for table in optimizer._tables.values())


def test_a_full_one_among_increments_is_built_on(tmp_path):
    model, optimizer = trained()
    checkpoint.save(tmp_path, model, optimizer, 1, incremental=True)
    touch(model, optimizer, [3])
    checkpoint.save(tmp_path, model, optimizer, 2)
    checkpoint.save(tmp_path / "elsewhere", model, optimizer, 2)
    touch(model, optimizer, [4])
    path = checkpoint.save(tmp_path, model, optimizer, 3, incremental=True)
    assert index_of(path)["base"]["name"] == "step-0000000002"
    assert written(path) == {"table": 1, "embedding": 1}


@pytest.mark.parametrize("gone", ["base", "a file of it", "replaced"])
def test_without_a_base_it_is_a_full_one(tmp_path, gone):
    model, optimizer = trained()
    base = checkpoint.save(tmp_path, model, optimizer, 1, incremental=True)
    if gone == "a file of it":
        (base / "table-0-0.safetensors").unlink()
    else:
        shutil.rmtree(base)
    if gone == "replaced":
        checkpoint.save(tmp_path, *trained(), 1)
    touch(model, optimizer, [3])
    path = checkpoint.save(tmp_path, model, optimizer, 2, incremental=True)
    assert written(path) == {"table": 60, "embedding": 60}
    other = trained()
    checkpoint.load(path, *other)
    assert rows_of(other[0]["table"]) == rows_of(model["table"])


def test_a_failed_save_forgets_nothing(tmp_path, monkeypatch):
    model, optimizer = trained()
    checkpoint.save(tmp_path, model, optimizer, 1, incremental=True)
    touch(model, optimizer, [3])

    def rename(*args):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", rename)
        with pytest.raises(OSError, match="Input/output"):
            checkpoint.save(tmp_path, model, optimizer, 2, incremental=True)
    touch(model, optimizer, [4])
    path = checkpoint.save(tmp_path, model, optimizer, 3, incremental=True)
    assert index_of(path)["base"]["name"] == "step-0000000001"
    assert written(path) == {"table": 2, "embedding": 2}


def test_a_failed_load_forgets_nothing(tmp_path):
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, model, optimizer, 1, incremental=True)
    other = checkpoint.save(tmp_path / "other", *trained(), 1)
    touch(model, optimizer, [3])
    optimizer.param_groups[0]["params"].reverse()
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": []})
    with pytest.raises(ValueError, match="make the same groups"):
        checkpoint.load(other, model, optimizer)
    optimizer.param_groups.pop()
    path = checkpoint.save(tmp_path, model, optimizer, 2, incremental=True)
    assert written(path) == {"table": 1, "embedding": 1}


def test_increments_go_on_after_a_resume(tmp_path):
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, model, optimizer, 1, incremental=True)
    for step in (2, 3):
        model, optimizer = trained()
        checkpoint.load(path, model, optimizer)
        touch(model, optimizer, [step, 40])
        path = checkpoint.save(tmp_path, model, optimizer, step, incremental=True)
        assert index_of(path)["base"]["name"] == f"step-{step - 1:010d}"
        assert written(path) == {"table": 2, "embedding": 2}


def test_a_table_that_took_part_of_a_checkpoint_is_written_whole(tmp_path):
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, model, optimizer, 1, incremental=True)
    half = torch.nn.ModuleDict(
        {"table": HashTable([3], dtype=torch.float16), "embedding": model["embedding"]}
    )
    optimizer = SparseAdamW({"t": half["table"], "e": half["embedding"]})
    checkpoint.load(path, half, optimizer)
    path = checkpoint.save(tmp_path, half, optimizer, 2, incremental=True)
    assert is_whole(path) == {"table": True, "embedding": False}


def test_rows_beyond_an_increments_base_and_copies(tmp_path):
    """A copy of a table knows of no checkpoint; what it does is not noted for the original."""
    model, optimizer = trained()
    checkpoint.save(tmp_path, model, optimizer, 1, incremental=True)
    pair = copy.deepcopy((model, optimizer))
    touch(*pair, [5])
    path = checkpoint.save(tmp_path, *pair, 2, incremental=True)
    assert written(path) == {"table": 60, "embedding": 60}
    path = checkpoint.save(tmp_path, model, optimizer, 3, incremental=True)
    assert written(path) == {"table": 0, "embedding": 0}


def test_keep_leaves_what_increments_build_on(tmp_path):
    model, optimizer = trained()
    for step in range(1, 8):
        touch(model, optimizer, [step])
        checkpoint.save(tmp_path, model, optimizer, step, keep=2, incremental=step != 4)
        steps = sorted(int(x.name[5:]) for x in tmp_path.iterdir() if x.name.startswith("step"))
        # 4 is a full one; until 5 builds on it, 3 is one of the newest two, and needs 2 and 1.
        assert steps == list(range(1 if step < 5 else 4, step + 1))
    other = trained()
    checkpoint.load(checkpoint.latest(tmp_path), *other)
    assert rows_of(other[0]["table"]) == rows_of(model["table"])


@pytest.mark.parametrize("damage", ["missing", "replaced", "index", "file"])
def test_a_base_that_is_missing_or_damaged(tmp_path, damage):
    model, optimizer = trained()
    first = checkpoint.save(tmp_path, model, optimizer, 1, incremental=True)
    touch(model, optimizer, [3])
    path = checkpoint.save(tmp_path, model, optimizer, 2, incremental=True)
    if damage in ("missing", "replaced"):
        shutil.rmtree(first)
    if damage == "replaced":
        checkpoint.save(tmp_path, *trained(), 1)
    elif damage != "missing":
        file = first / ("index.json" if damage == "index" else "table-1-0.safetensors")
        file.write_bytes(file.read_bytes()[:-1])
    text = {
        "missing": "step-0000000002 holds the changes since .*step-0000000001, but there is no",
        "replaced": "step-0000000001, but that was replaced by another checkpoint",
        "index": "step-0000000001, but .*index.json is damaged",
        "file": r"step-0000000001/table-1-0.safetensors is damaged: it has",
    }[damage]
    other = trained()
    before = rows_of(other[0]["table"]), other[0]["embedding"].weight.clone()
    with pytest.raises(CheckpointError, match=text):
        checkpoint.load(path, *other)
    assert rows_of(other[0]["table"]) == before[0]
    assert torch.equal(other[0]["embedding"].weight, before[1])
