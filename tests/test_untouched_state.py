"""Untouched rows saved, loaded, copied and handed on: in state_dicts, checkpoints and modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import ENGINES
from untouched_runs import DIM, KINDS, ROWS, Run, bits, look_up, make_table

from cupy_sparse_adamw import (
    HashTable,
    NormalInitializer,
    SparseAdamW,
    checkpoint,
    filter_out_sparse_param,
    missed_steps,
)


class Model(torch.nn.Module):
    def __init__(self, dtype=torch.float32, block_size=4):
        super().__init__()
        random = torch.Generator().manual_seed(3)
        self.table = HashTable(
            [DIM],
            block_size=block_size,
            dtype=dtype,
            initializer=NormalInitializer(std=0.5, generator=random),
        )
        self.embedding = torch.nn.Embedding(ROWS, DIM, sparse=True, dtype=dtype)
        self.bag = torch.nn.EmbeddingBag(ROWS, DIM, sparse=True, dtype=dtype)

    def forward(self, ids):
        return torch.tanh(self.table(ids) * self.embedding(ids) + self.bag(ids[:, None])).sum()


def model_and_optimizer(mode, **settings):
    torch.manual_seed(5)
    model = Model(**settings)
    tables = filter_out_sparse_param(model)
    return model, SparseAdamW(tables, lr=1e-2, weight_decay=0.1, untouched=mode)


def train(model, optimizer, begin, end):
    for i in range(begin, end):
        random = torch.Generator().manual_seed(i)
        ids = torch.randint(0, ROWS, (3,), generator=random, device="cpu")
        ids = ids.to(model.embedding.weight.device)
        if i % 5 == 4:  # two tables miss the step
            model.embedding(ids).pow(2).sum().backward()
        else:
            model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()


def current(model):
    """What the tables read as, by id or row."""
    training = model.training
    model.eval()
    ids = torch.arange(ROWS)
    with torch.no_grad():
        read = [model.table(ids), model.embedding(ids), model.bag(ids[:, None])]
    model.train(training)
    return [bits(x) for x in read]


def exp_avg_by_id(optimizer):
    """(table, id) -> first moments."""
    result = {}
    for name, state in optimizer.state_dict()["state"].items():
        ids = state.get("ids", torch.arange(ROWS)).tolist()
        result |= {(name, i): bits(x) for i, x in zip(ids, state["exp_avg"], strict=True)}
    return result


# ---------------------------------------------------------------------- state_dicts


@pytest.mark.parametrize("mode", ["decay", "dense"])
def test_state_dicts_resume_bitwise(engine, mode):
    model, optimizer = model_and_optimizer(mode)
    train(model, optimizer, 0, 20)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 20, 40)
    other, its_optimizer = model_and_optimizer(mode)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    its_optimizer.load_state_dict(saved["optimizer"])
    train(other, its_optimizer, 20, 40)
    assert current(other) == current(model)


def test_loading_weights_sets_them_as_of_now(engine):
    for kind in KINDS:
        run = Run(kind)
        run.train(10)
        saved = copy.deepcopy(run.table.state_dict())
        with torch.no_grad():
            kept = run.weights()
        run.train(5)
        if kind == "HashTable":  # one of them is new
            run.table.delete(torch.tensor([4]))
            for key in ("exp_avg", "exp_avg_sq"):
                run.dense_optimizer.state[run.dense][key][4] = 0.0
        run.table.load_state_dict(saved)
        assert torch.allclose(run.weights(), kept, rtol=0, atol=1e-15)
        with torch.no_grad():
            run.dense.copy_(kept)
        run.train(10)
        assert run.error() <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_loading_the_optimizer_alone_leaves_weights_as_they_are_now(engine, kind):
    run = Run(kind)
    run.train(5)
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.train(5)
    now = run.weights()
    run.optimizer.load_state_dict(saved)
    assert torch.allclose(run.weights(), now, rtol=0, atol=1e-15)
    assert int(run.optimizer.state_dict()["state"]["table"]["step"]) == 5


def test_a_state_of_another_mode_is_refused(engine):
    states = {}
    for mode in ("skip", "dense"):
        table = make_table("HashTable", torch.ones(4, 2))
        optimizer = SparseAdamW({"t": table}, untouched=mode)
        table(torch.tensor([1])).sum().backward()
        optimizer.step()
        states[mode] = optimizer.state_dict()
    with pytest.raises(ValueError, match="untouched='skip', this optimizer with untouched='dense'"):
        optimizer.load_state_dict(states["skip"])
    old = copy.deepcopy(states["skip"])  # saved before there were modes
    del old["param_groups"][0]["untouched"]
    with pytest.raises(ValueError, match="untouched='skip'"):
        optimizer.load_state_dict(old)
    old["param_groups"][0]["untouched"] = "dense"  # what the text says
    optimizer.load_state_dict(old)
    assert table.missed.t == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_was_cleared_by_hand(engine, kind):
    """Adam begins anew; what rows had missed by then stays what it was."""
    run = Run(kind)
    run.train(30)
    now = run.weights()
    run.optimizer.state.clear()
    ids = torch.tensor([0])
    look_up(run.table, ids).sum().backward()
    run.optimizer.step()
    decayed = now * (1 - 1e-2 * 0.1)
    if kind != "HashTable":  # whose moments are with its rows
        assert torch.allclose(run.weights()[1:], decayed[1:], rtol=0, atol=1e-13)
    assert run.optimizer._tables["table"].missed.t == 1
    run.optimizer.zero_grad()
    run.train(5)
    assert bool(run.weights().isfinite().all())


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("mode", ["decay", "dense"])
def test_a_checkpoint_changes_no_bit_and_resumes(engine, mode, tmp_path):
    """Full and incremental; rows are saved as they are, so the run that saved goes on the same."""
    ends = []
    for saves in (False, True):
        model, optimizer = model_and_optimizer(mode)
        for i in range(4):
            train(model, optimizer, 10 * i, 10 * i + 10)
            if saves and i < 3:
                checkpoint.save(
                    tmp_path, model=model, optimizer=optimizer, step=i, incremental=True
                )
        ends.append(current(model))
    assert ends[0] == ends[1]
    other, its_optimizer = model_and_optimizer(mode, block_size=7)
    checkpoint.load(checkpoint.latest(tmp_path), model=other, optimizer=its_optimizer)
    train(other, its_optimizer, 30, 40)
    assert current(other) == ends[0]


def test_a_checkpoint_without_the_optimizer_is_up_to_date(engine, tmp_path):
    model, optimizer = model_and_optimizer("dense")
    train(model, optimizer, 0, 30)
    whole = checkpoint.save(tmp_path / "whole", model=model, optimizer=optimizer, step=1)
    expected = current(model)
    alone, _ = model_and_optimizer("skip")
    checkpoint.load(whole, model=alone)
    assert current(alone) == expected
    later, its_optimizer = model_and_optimizer("dense")
    train(later, its_optimizer, 0, 12)
    twin, twins_optimizer = model_and_optimizer("dense")
    train(twin, twins_optimizer, 0, 12)
    checkpoint.load(whole, model=later)  # its moments stay with their rows, as of now
    assert current(later) == expected
    assert current(twin) != expected
    kept, loaded = exp_avg_by_id(twins_optimizer), exp_avg_by_id(its_optimizer)
    zeros = bits(torch.zeros(DIM))
    assert loaded == {key: kept.get(key, zeros) for key in loaded}
    assert len(kept.keys() & loaded.keys()) > 2 * ROWS
    train(later, its_optimizer, 12, 14)
    model_alone = checkpoint.save(tmp_path / "alone", model=model, step=1)
    again, _ = model_and_optimizer("skip")
    checkpoint.load(model_alone, model=again)
    assert current(again) == expected


@pytest.mark.parametrize("kind", ["HashTable", "Embedding"])
@pytest.mark.parametrize("between", ["flush", "state_dict", "forgetting"])
def test_increments_after_the_log_forgot(engine, kind, between, tmp_path, monkeypatch):
    """Rows of an older file that a later one replaces may be from before the log."""
    if between == "forgetting":
        monkeypatch.setattr(missed_steps, "MAX_ENTRIES", 512)

    def make():
        run = Run(kind, torch.float32)
        return run, torch.nn.ModuleDict({"table": run.table})

    run, model = make()
    run.train(10)
    checkpoint.save(tmp_path, model=model, optimizer=run.optimizer, step=0, incremental=True)
    if between == "forgetting":
        run.train(510, count=1)
        assert run.optimizer._tables["table"].missed.first > 10
    else:
        run.optimizer.flush() if between == "flush" else run.optimizer.state_dict()
        run.train(3)
    path = checkpoint.save(tmp_path, model=model, optimizer=run.optimizer, step=1, incremental=True)
    other, its_model = make()
    checkpoint.load(path, model=its_model, optimizer=other.optimizer)
    assert bits(other.weights()) == bits(run.weights())


def test_a_model_saved_alone_does_not_make_an_increment_of_less(engine, tmp_path):
    model, optimizer = model_and_optimizer("dense")
    train(model, optimizer, 0, 10)
    checkpoint.save(tmp_path, model=model, step=0, incremental=True)
    path = checkpoint.save(tmp_path, model=model, optimizer=optimizer, step=1, incremental=True)
    other, its_optimizer = model_and_optimizer("dense")
    checkpoint.load(path, model=other, optimizer=its_optimizer)
    assert exp_avg_by_id(its_optimizer) == exp_avg_by_id(optimizer)


@pytest.mark.parametrize("damage", ["later", "earlier", "log", "shorter"])
def test_a_forged_checkpoint_is_refused(engine, tmp_path, damage, monkeypatch):
    model, optimizer = model_and_optimizer("dense")
    train(model, optimizer, 0, 10)
    if damage in ("later", "earlier"):
        slot = model.table.get_slot("sparse_adamw_last_step")
        slot.fill(11 if damage == "later" else -1)
    else:
        export = missed_steps.MissedSteps.export

        def forged(log):
            saved = export(log)
            if damage == "log":
                saved["steps"][0, 4] = 1.0
            else:
                saved["steps"] = saved["steps"][1:]
            return saved

        monkeypatch.setattr(missed_steps.MissedSteps, "export", forged)
    path = checkpoint.save(tmp_path, model=model, optimizer=optimizer, step=1)
    other, its_optimizer = model_and_optimizer("dense")
    before = current(other)
    with pytest.raises((checkpoint.CheckpointError, ValueError), match=r"step|log"):
        checkpoint.load(path, model=other, optimizer=its_optimizer)
    assert current(other) == before


# ---------------------------------------------------------------------- copies, and other owners

#: A copied storage takes its memory past the emulator, which would call it out of bounds.
COPYING = pytest.mark.parametrize(
    "engine", [e for e in ENGINES if getattr(e, "values", (e,)) != ("emulated",)], indirect=True
)


@COPYING
def test_copies_read_what_the_original_reads(engine):
    model, optimizer = model_and_optimizer("dense")
    train(model, optimizer, 0, 20)
    expected = current(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert current(copied) == expected
    del optimizer
    assert current(model) == expected  # nor does it take the optimizer
    both = copy.deepcopy((model, model_and_optimizer("dense")[1]))
    assert current(both[0]) == expected


@COPYING
def test_a_copy_of_a_module_is_on_its_own(engine):
    run = Run("Embedding")
    run.train(10)
    now = run.weights()
    target = copy.deepcopy(run.table)
    assert bits(target.weight.detach()) == bits(now)
    with torch.no_grad():
        target.weight.fill_(3.0)
    assert bool((target.eval()(torch.arange(ROWS)) == 3.0).all())
    averaged = torch.optim.swa_utils.AveragedModel(run.table, avg_fn=lambda a, b, n: b)
    run.train(5)
    run.optimizer.flush()
    averaged.update_parameters(run.table)
    averaged.eval()
    assert bits(averaged(torch.arange(ROWS))) == bits(run.weights())
    for order in (lambda r: (r.table, r.optimizer), lambda r: (r.optimizer, r.table)):
        both = copy.deepcopy(order(run))
        table, optimizer = both if isinstance(both[0], torch.nn.Module) else both[::-1]
        table(torch.tensor([1, 1])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert bits(table.eval()(torch.arange(ROWS))) == bits(
            optimizer.caught_up("table", torch.arange(ROWS))
        )
        assert bits(table.weight.detach()) != bits(table(torch.arange(ROWS)))


def test_a_model_that_is_converted(engine):
    run = Run("Embedding", torch.float32)
    run.train(10)
    now = run.weights()
    run.table.double()
    assert torch.allclose(run.weights(), now, rtol=0, atol=1e-6)
    run.table.eval()
    assert run.table(torch.arange(ROWS)).dtype is torch.float64
    SparseAdamW({"t": run.table}, untouched="dense")
    assert torch.allclose(run.table.weight.detach(), now, rtol=0, atol=1e-6)


def test_a_new_owner_gets_rows_that_are_up_to_date(engine):
    model, optimizer = model_and_optimizer("dense")
    train(model, optimizer, 0, 20)
    expected = current(model)
    tables = {**filter_out_sparse_param(model), "embedding": model.embedding.weight}
    SparseAdamW(tables)
    assert current(model) == expected
    assert bits(model.embedding.weight.detach()) == expected[1]
    with pytest.raises(RuntimeError, match="belongs to another optimizer"):
        optimizer.step()
