"""Rows that no batch touched: dense AdamW's result, and decay alone (docs/untouched.md).

What is compared with is torch.optim.AdamW in float64 on the whole table. What is saved and copied
of such rows: test_untouched_state.py.
"""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from untouched_runs import DIM, KINDS, ROWS, Run, bits, look_up, make_table, settings_of

from cupy_sparse_adamw import (
    ConstantInitializer,
    FilterHook,
    HashTable,
    NormalInitializer,
    SparseAdamW,
    functional,
    missed_steps,
)
from cupy_sparse_adamw.row_table import RowTable

# ---------------------------------------------------------------------- dense AdamW's result


@pytest.mark.parametrize("kind", KINDS)
def test_as_dense_adamw_in_float64(engine, kind):
    run = Run(kind)
    run.train(1000)
    assert run.error() <= 1e-12
    state = run.optimizer.state_dict()["state"]["table"]  # brings everything up to date
    dense = run.dense_optimizer.state[run.dense]
    order = state.get("ids", torch.arange(ROWS)).argsort()
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(state[key][order], dense[key], rtol=1e-10, atol=1e-16)
    if kind != "HashTable":
        assert torch.allclose(run.table.weight.detach(), run.dense.detach(), rtol=0, atol=1e-12)


def test_stale_reads_are_not_dense_adamw(engine, monkeypatch):
    """Catching up in ``step`` alone would not do: the same run is off by far more."""
    monkeypatch.setattr(
        RowTable, "read", lambda table, rows: functional.gather(table._store.embedding, rows)
    )
    run = Run("HashTable")
    run.train(1000)
    assert run.error() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_as_dense_adamw_by_rules(engine, dtype):
    run = Run("HashTable", dtype)
    run.train(300)
    limit = {torch.float32: 2e-6, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    assert run.error() <= limit


def zipf_ids(count: int, rows: int, exponent: float, random: torch.Generator) -> torch.Tensor:
    shares = torch.arange(1, rows + 1, dtype=torch.float64, device="cpu") ** -exponent
    return torch.multinomial(shares, count, replacement=True, generator=random)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta1": 0.95, "weight_decay": 0.1},
        {"beta1": 0.99},
        {"beta2": 0.95},
        {"beta1": 0.99, "beta2": 0.995},
        {"beta1": 0.99, "beta2": 0.985},
        {"beta1": 0.99, "beta2": 0.9802},
    ],
    ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()) or "default",
)
def test_error_is_at_most_twice_that_of_dense_float32(engine, settings):
    """Zipf ids, warmup and cosine to 1e-2, 1,000 steps, gradients that depend on what was read."""
    rows, steps = 60 if engine == "reference" else 300, 1000  # it replays step by step
    run = Run("HashTable", torch.float32, rows=rows, **settings)
    float32 = torch.nn.Parameter(run.dense.detach().float())
    group = run.dense_optimizer.param_groups[0]
    keys = ("lr", "betas", "eps", "weight_decay")
    theirs = torch.optim.AdamW([float32], **{key: group[key] for key in keys})
    for i in range(steps):
        lr = 1e-2 * min(10 * (i + 1) / steps, 0.5 + 0.5 * math.cos(math.pi * i / steps))
        for optimizer in (run.optimizer, run.dense_optimizer, theirs):
            optimizer.param_groups[0]["lr"] = lr
        ids = zipf_ids(8, rows, 1.1, run.random).to(run.dense.device)
        run.backward(ids, float32)
        run.step()
        theirs.step()
        theirs.zero_grad()
    scale = run.dense.abs().max()
    ours = (run.weights() - run.dense.detach()).abs().max() / scale
    torchs = (float32.double() - run.dense).abs().max() / scale
    assert ours <= 2 * torchs


@pytest.mark.parametrize("drift", [1.05, 1.4, 1 / 1.1])
def test_an_eps_that_drifts(engine, drift):
    run = Run("HashTable", torch.float32)
    run.train(120, prepare=settings_of(eps=lambda i: 1e-6 * drift**i))
    assert run.error() <= 2e-6


def test_decay_alone(engine):
    """Rows that are not touched get the decay they missed, exactly, and keep their moments."""
    run = Run("HashTable", mode="decay")
    ids, expected = torch.arange(ROWS), None
    for i in range(40):
        lr = 1e-2 * (1 + i % 3)
        run.optimizer.param_groups[0]["lr"] = lr
        if i == 10:
            expected = run.weights()
            moments = run.optimizer.state_dict()["state"]["table"]
            row = int((moments["ids"] == 5).nonzero())
            kept = moments["exp_avg"][row].clone(), moments["exp_avg_sq"][row].clone()
        if i >= 10:
            expected = expected * (1 - lr * 0.1)
            run.backward(torch.tensor([1, 2]))
        else:
            run.backward(ids)
        run.optimizer.step()
        run.optimizer.zero_grad()
    others = ids[(ids != 1) & (ids != 2)]
    assert torch.allclose(run.weights()[others], expected[others], rtol=1e-13, atol=0)
    after = run.optimizer.state_dict()["state"]["table"]
    row = int((after["ids"] == 5).nonzero())
    assert bits(after["exp_avg"][row]) == bits(kept[0])
    assert bits(after["exp_avg_sq"][row]) == bits(kept[1])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_a_zero_gradient_is_no_gradient(engine, dtype, limit):
    """A row that gets a zero gradient in each step moves as one that no batch touches."""
    ends = []
    for explicit in (False, True):
        run = Run("HashTable", dtype)
        run.train(20)
        for _ in range(30):
            ids = torch.tensor([1, 4, 7])
            values = run.table(torch.cat([ids, torch.arange(10, 16)]) if explicit else ids)
            (torch.tanh(values[:3]) * 3).sum().backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        ends.append(run.weights())
    assert torch.allclose(ends[0], ends[1], rtol=0, atol=limit)


class Model(torch.nn.Module):
    """Users and bags of items, multiplied; a layer on top of it."""

    def __init__(self, users, items, layer):
        super().__init__()
        self.users, self.items, self.layer = users, items, layer

    def forward(self, users, items):
        return self.layer(torch.tanh(look_up(self.users, users) * self.items(items)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_a_layer_above_two_tables(engine, kind):
    """Gradients of each part depend on all others: one row that is off moves everything."""
    random = torch.Generator().manual_seed(5)

    def draw(*shape):
        values = torch.randn(*shape, generator=random, dtype=torch.float64, device="cpu")
        return values.to(torch.get_default_device())

    users, items, layer = draw(ROWS, DIM), draw(40, DIM), torch.nn.Linear(DIM, 1).double()
    ours = Model(make_table(kind, users), make_table("EmbeddingBag", items), layer)
    dense = Model(
        torch.nn.Embedding.from_pretrained(users.clone(), freeze=False),
        torch.nn.EmbeddingBag.from_pretrained(items.clone(), freeze=False),
        copy.deepcopy(layer),
    )
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    tables = SparseAdamW({"u": ours.users, "i": ours.items}, untouched="dense", **settings)
    both = [
        (ours, [tables, torch.optim.AdamW(ours.layer.parameters(), **settings)]),
        (dense, [torch.optim.AdamW(dense.parameters(), **settings)]),
    ]
    for _ in range(200):
        ids = zipf_ids(3, ROWS, 1.1, random), zipf_ids(6, 40, 1.1, random).view(3, 2)
        ids = [x.to(users.device) for x in ids]
        target = draw(3, 1)
        for model, optimizers in both:
            (model(*ids) - target).pow(2).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for name, rows in (("u", ROWS), ("i", 40)):
        table = dense.users if name == "u" else dense.items
        off = tables.caught_up(name, torch.arange(rows)) - table.weight
        assert off.abs().max() <= 1e-12
    assert torch.allclose(ours.layer.weight, dense.layer.weight, rtol=0, atol=1e-12)


def test_a_step_that_a_grad_scaler_skipped_is_none():
    """Torch's own dense AdamW beside it, which the scaler makes skip the same step."""
    run = Run("Embedding", torch.float32)
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2)]
    for i in range(30):
        ids = run.ids(3)
        for scaler, optimizer, values in (
            (scalers[0], run.optimizer, look_up(run.table, ids)),
            (scalers[1], run.dense_optimizer, run.dense[ids]),
        ):
            loss = torch.tanh(2 * values.double()).sum()
            scaler.scale(loss * (torch.inf if i == 7 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert [scaler.get_scale() for scaler in scalers] == [32.0, 32.0]
    assert run.optimizer.state_dict()["state"]["table"]["step"] == 29
    assert run.error() <= 2e-6


# ---------------------------------------------------------------------- time


def test_a_learning_rate_of_zero_first(engine):
    run = Run("HashTable")
    run.train(40, prepare=settings_of(lr=lambda i: 0.0 if i < 6 else 1e-2))
    assert run.error() <= 1e-12
    run = Run("HashTable", torch.float32)
    run.train(40, prepare=settings_of(lr=lambda i: 0.0 if i < 6 else 1e-2))
    assert run.error() <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_settings_that_change(engine, dtype):
    run = Run("Embedding", dtype)
    change = settings_of(
        betas=lambda i: (0.9 if i % 20 < 10 else 0.8, 0.999 if i < 30 else 0.99),
        eps=lambda i: 1e-8 if i % 7 else 1e-3,
        weight_decay=lambda i: 0.1 * (i % 3),
    )
    run.train(60, prepare=change)
    assert run.error() <= (1e-12 if dtype is torch.float64 else 4e-6)


def test_time_passes_for_a_table_with_a_gradient_only(engine):
    """Of two tables one misses every third step: both as dense AdamW has it."""
    runs = Run("HashTable"), Run("HashTable")
    tables = {"a": runs[0].table, "b": runs[1].table}
    together = SparseAdamW(tables, lr=1e-2, weight_decay=0.1, untouched="dense")
    for run, name in zip(runs, tables, strict=True):
        run.optimizer = together
        run.weights = lambda name=name: together.caught_up(name, torch.arange(ROWS))
    for i in range(50):
        going = runs if i % 3 else runs[:1]
        for run in going:
            run.backward(run.ids(3))
        together.step()
        together.zero_grad()
        for run in going:
            run.dense_optimizer.step()
            run.dense_optimizer.zero_grad()
    assert max(run.error() for run in runs) <= 1e-12
    state = together.state_dict()["state"]
    assert (state["a"]["step"], state["b"]["step"]) == (50, 33)


def test_tables_share_a_log_until_they_part(engine):
    tables = {name: make_table("HashTable", torch.ones(4, 2)) for name in "abcd"}
    optimizer = SparseAdamW(tables, untouched="dense")

    def step(names):
        for name in names:
            tables[name](torch.tensor([1])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def sharers():
        logs = [id(table.missed) for table in tables.values()]
        return [logs.index(log) for log in logs]

    step("abcd")
    step("abcd")
    assert sharers() == [0, 0, 0, 0]
    step("ab")
    assert sharers() == [0, 0, 2, 2]
    step("abcd")
    step("bc")
    assert len({id(table.missed) for table in tables.values()}) == 4
    assert [table.missed.t for table in tables.values()] == [4, 5, 4, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_are_one_step(engine, kind):
    run = Run(kind)
    run.optimizer.set_grad_accum_steps(3)
    for _ in range(12):
        for _ in range(3):
            run.backward(run.ids(2))
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.dense_optimizer.step()
        run.dense_optimizer.zero_grad()
    assert run.error() <= 1e-12
    (state,) = run.optimizer.state_dict()["state"].values()
    assert state["step"] == 12


def test_a_gradient_without_rows_is_a_step(engine):
    run = Run("HashTable")
    run.train(5)
    for _ in range(7):
        run.backward(torch.empty(0, dtype=torch.int64))
        run.step()
    assert run.table.missed.t == 12
    assert run.error() <= 1e-12


SCHEDULERS = {
    "StepLR": lambda o, s: s.StepLR(o, 5, 0.5),
    "MultiStepLR": lambda o, s: s.MultiStepLR(o, [5, 20], 0.3),
    "ConstantLR": lambda o, s: s.ConstantLR(o, 0.5, 8),
    "LinearLR": lambda o, s: s.LinearLR(o, 0.1, 1.0, 10),
    "ExponentialLR": lambda o, s: s.ExponentialLR(o, 0.95),
    "PolynomialLR": lambda o, s: s.PolynomialLR(o, 25, 2.0),
    "CosineAnnealingLR": lambda o, s: s.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o, s: s.CosineAnnealingWarmRestarts(o, 7),
    "CyclicLR": lambda o, s: s.CyclicLR(o, 1e-3, 1e-2, 5, base_momentum=0.8, max_momentum=0.9),
    "OneCycleLR": lambda o, s: s.OneCycleLR(o, 1e-2, total_steps=40),
    "LambdaLR": lambda o, s: s.LambdaLR(o, lambda i: 1 / (1 + i)),
    "MultiplicativeLR": lambda o, s: s.MultiplicativeLR(o, lambda i: 0.9),
    "SequentialLR": lambda o, s: s.SequentialLR(
        o, [s.ConstantLR(o, 0.1, 5), s.ExponentialLR(o, 0.9)], [5]
    ),
    "ChainedScheduler": lambda o, s: s.ChainedScheduler(
        [s.ConstantLR(o, 0.1, 5), s.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_every_scheduler(engine, name):
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        run = Run("HashTable", dtype)
        schedulers = [
            SCHEDULERS[name](optimizer, torch.optim.lr_scheduler)
            for optimizer in (run.optimizer, run.dense_optimizer)
        ]
        for _ in range(30):
            run.train(1)
            for scheduler in schedulers:
                scheduler.step()
        assert run.error() <= limit


def test_plateau_scheduler(engine):
    run = Run("HashTable")
    schedulers = [
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
        for optimizer in (run.optimizer, run.dense_optimizer)
    ]
    for _ in range(30):
        run.train(1)
        for scheduler in schedulers:
            scheduler.step(1.0)
    assert run.optimizer.param_groups[0]["lr"] < 1e-3
    assert run.error() <= 1e-12


def test_a_full_log_forgets_its_older_half(engine, monkeypatch):
    monkeypatch.setattr(missed_steps, "MAX_ENTRIES", 512)
    run = Run("HashTable", torch.float32, rows=6)
    longest = 0
    for i in range(800 if engine == "cpu" else 600):
        run.train(1, count=1)
        longest = max(longest, run.table.missed.t - run.table.missed.first)
        if i == 20:  # from now on row 5 is behind
            run.ids = partial(run.ids, below=5)
    assert longest < 512
    assert run.table.missed.first > 0
    assert run.error() <= 2e-6


# ---------------------------------------------------------------------- rows that come and go


def test_a_reused_row_carries_no_old_motion(engine):
    run = Run("HashTable")
    run.train(10)
    table = run.table
    rows = dict(zip(*(x.tolist() for x in table.ids_map()), strict=True))
    table.delete(torch.tensor([3]))
    table(torch.tensor([1003]))
    assert dict(zip(*(x.tolist() for x in table.ids_map()), strict=True))[1003] == rows[3]
    assert run.optimizer.caught_up("table", torch.tensor([1003])).tolist() == [[0.0] * DIM]
    table.insert(torch.tensor([1003]), torch.ones(1, DIM, dtype=torch.float64))
    for _ in range(8):
        table(torch.tensor([0])).sum().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    value = run.optimizer.caught_up("table", torch.tensor([1003]))
    expected = torch.full_like(value, (1 - 1e-2 * 0.1) ** 8)  # decay is all it missed
    assert torch.allclose(value, expected, rtol=1e-13, atol=0)


def test_an_evicted_row_begins_anew(engine):
    table = HashTable(
        [2],
        dtype=torch.float64,
        initializer=NormalInitializer(std=1.0),
        filter_hook=FilterHook("LRU", {"max_rows": 4}),
    )
    optimizer = SparseAdamW({"t": table}, lr=0.1, weight_decay=0.1, untouched="dense")
    first = table(torch.tensor([7])).detach().clone()
    for id_ in range(7, 30):
        table(torch.tensor([id_])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 7 not in table.ids().tolist()
    assert bits(table(torch.tensor([7])).detach()) == bits(first)


def test_insert_over_a_row_sets_it_as_of_now(engine):
    run = Run("HashTable")
    run.train(10)
    run.backward(torch.tensor([0]))  # row 5 is behind
    run.step()
    new = torch.full((1, DIM), 7.0, dtype=torch.float64)
    run.table.insert(torch.tensor([5]), new)
    with torch.no_grad():
        run.dense[5] = 7.0
    assert bits(run.weights()[5]) == bits(new[0])
    run.train(20)
    assert run.error() <= 1e-12


def test_slots_written_by_hand_are_as_of_now(engine):
    run = Run("HashTable")
    run.train(10)
    _, rows = run.table.ids_map()
    run.table.update_slot("embedding", rows, torch.zeros(1, dtype=torch.float64))
    assert not run.weights().any()


def test_new_rows_miss_nothing_of_before(engine):
    table = HashTable([2], dtype=torch.float64, block_size=2, initializer=ConstantInitializer(1.0))
    optimizer = SparseAdamW({"t": table}, lr=0.1, weight_decay=0.5, untouched="decay")
    for i in range(20):  # the table grows by blocks
        with torch.no_grad():
            assert table(torch.tensor([100 + i])).tolist() == [[1.0, 1.0]]
        table.insert(torch.tensor([200 + i]), torch.ones(1, 2, dtype=torch.float64))
        table(torch.tensor([0])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = 0.95 ** (20.0 - torch.arange(20)).double()
    for first in (100, 200):
        values = optimizer.caught_up("t", first + torch.arange(20))[:, 0]
        assert torch.allclose(values, expected, rtol=1e-13, atol=0)


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_flush_and_evaluation(engine, kind, dtype):
    """Flushing twice is flushing once; an evaluation in between changes no bit of training."""
    ends = []
    for evaluates in (False, True):
        run = Run(kind, dtype)
        for _ in range(5):
            run.train(4)
            if evaluates:
                run.table.eval()
                with torch.no_grad():
                    read = look_up(run.table, torch.arange(ROWS))
                run.table.train()
                assert bits(read) == bits(run.optimizer.caught_up("table", torch.arange(ROWS)))
        run.optimizer.flush()
        once = run.weights()
        run.optimizer.flush(["table"])
        run.optimizer.flush()
        assert bits(run.weights()) == bits(once)
        ends.append(once)
    assert bits(ends[0]) == bits(ends[1])


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 3, -2])
def test_a_bag_in_eval_mode(engine, mode, padding):
    torch.manual_seed(3)
    bag = torch.nn.EmbeddingBag(
        10, 2, sparse=True, mode=mode, padding_idx=padding, dtype=torch.float64
    )
    optimizer = SparseAdamW({"bag": bag}, lr=0.1, untouched="dense")
    for i in range(6):
        bag(torch.tensor([[i, 9]])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    ids, offsets = torch.tensor([1, 3, 8, 8, 3, 2]), torch.tensor([0, 2, 5])
    factors = torch.rand(6, dtype=torch.float64) if mode == "sum" else None
    bag.eval()
    with torch.no_grad():
        read = [bag(ids, offsets, factors), bag(ids.view(2, 3)), bag(input=ids, offsets=offsets)]
        optimizer.flush()
        again = [bag(ids, offsets, factors), bag(ids.view(2, 3)), bag(input=ids, offsets=offsets)]
    for one, other in zip(read, again, strict=True):
        assert torch.allclose(one, other, rtol=1e-14, atol=1e-15)
        assert one.abs().sum() > 0


@pytest.mark.parametrize("shape", [(0,), (0, 3)])
def test_no_ids_in_eval_mode(engine, shape):
    run = Run("Embedding")
    run.train(5)
    run.table.eval()
    assert run.table(torch.empty(shape, dtype=torch.int64)).shape == (*shape, DIM)
    assert run.optimizer.caught_up("table", torch.empty(shape).long()).shape == (*shape, DIM)


def test_gradients_in_eval_mode_arrive_and_the_step_refuses_them(engine):
    run = Run("Embedding")
    run.train(10)
    run.table.eval()
    ids = torch.tensor([0, 5, 5, 9])
    values = run.table(ids)
    assert bits(values.detach()) == bits(run.weights()[ids])
    values.sum().backward()
    before = run.weights()
    with pytest.raises(RuntimeError, match=r"table 'table': gradients came for rows that were beh"):
        run.optimizer.step()
    assert bits(run.weights()) == bits(before)


def test_reads_past_the_hook_raise(engine):
    run = Run("Embedding")
    run.train(3, count=20)
    run.train(1, count=1)
    run.optimizer.zero_grad()
    torch.nn.functional.embedding(
        torch.arange(ROWS), run.table.weight, sparse=True
    ).sum().backward()
    before = run.weights()
    with pytest.raises(RuntimeError, match="through the module that the optimizer was given"):
        run.optimizer.step()
    assert bits(run.weights()) == bits(before)
    run.optimizer.flush()  # all are up to date now, whoever reads them
    run.optimizer.step()


def test_modules_that_look_up_otherwise(engine):
    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 10

    with pytest.raises(TypeError, match="Scaled has a forward of its own; give the optimizer an"):
        SparseAdamW({"e": Scaled(4, 2, sparse=True)}, untouched="dense")
    SparseAdamW({"e": Scaled(4, 2, sparse=True)})
    run = Run("Embedding")
    run.table.register_forward_hook(lambda module, args, output: output * 10)
    other = Run("Embedding")
    other.table.register_forward_hook(lambda module, args, output: output * 10)
    for each in (run, other):
        for i in range(6):
            (look_up(each.table, torch.tensor([i])) / 10).sum().backward()
            each.optimizer.step()
            each.optimizer.zero_grad()
        each.table.eval()
    assert bits(run.table(torch.arange(4))) == bits(10 * run.weights()[:4])


def test_two_lookups_with_learned_factors(engine):
    """The second one brings rows up to date in a weight that the first has saved for backward."""
    bag = torch.nn.EmbeddingBag(8, 2, sparse=True, mode="sum")
    optimizer = SparseAdamW({"bag": bag}, untouched="dense")
    factors = torch.ones(1, 1, requires_grad=True)
    for _ in range(3):
        for ids in ([[1]], [[2]]):
            bag(torch.tensor(ids), per_sample_weights=factors).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    one = bag(torch.tensor([[3]]), per_sample_weights=factors)
    two = bag(torch.tensor([[4]]), per_sample_weights=factors)
    (one + two).sum().backward()
    bag.eval()
    assert bag(torch.tensor([[3]]), per_sample_weights=factors).requires_grad  # it is not behind


def test_frozen_factors_of_a_bag_only(engine):
    bag = torch.nn.EmbeddingBag(4, 2, sparse=True, mode="sum")
    optimizer = SparseAdamW({"bag": bag}, untouched="dense")
    bag(torch.tensor([[1]])).sum().backward()
    optimizer.step()
    bag.eval()
    factors = torch.ones(1, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradients of per_sample_weights"):
        bag(torch.tensor([[1, 2]]), per_sample_weights=factors)


def test_out_of_range_ids_are_torchs_to_refuse():
    run = Run("Embedding")
    run.train(4)
    before = bits(run.table.weight.detach())
    with pytest.raises(IndexError):
        run.table(torch.tensor([ROWS]))
    assert bits(run.table.weight.detach()) == before
    with pytest.raises(IndexError, match=rf"it has {ROWS} rows, there is no row {ROWS}"):
        run.optimizer.caught_up("table", torch.tensor([ROWS]))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("steps", [0, 4])
def test_max_norm_that_is_set_later_is_refused_before_a_row_is_rescaled(training, steps):
    run = Run("Embedding")
    run.train(steps)
    run.table.max_norm = 1e-3
    before = bits(run.table.weight.detach())
    with pytest.raises(ValueError, match=r"table: max_norm .* untouched='dense'"):
        run.table.train(training)(torch.arange(ROWS))
    assert bits(run.table.weight.detach()) == before


def test_refusals():
    weight = torch.nn.Embedding(4, 2, sparse=True)
    with pytest.raises(TypeError, match=r"^w: with untouched='dense' give the module"):
        SparseAdamW({"w": weight.weight}, untouched="dense")
    clipped = torch.nn.Embedding(4, 2, sparse=True, max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm=None or untouched='skip'"):
        SparseAdamW({"w": clipped}, untouched="decay")
    with pytest.raises(ValueError, match="untouched must be one of 'skip', 'decay', 'dense', got"):
        SparseAdamW({}, untouched="lazy")
    with pytest.raises(ValueError, match=r"lr \* weight_decay must be below 1, got 1"):
        SparseAdamW({}, lr=1.0, weight_decay=1.0, untouched="decay")
    with pytest.raises(ValueError, match="eps must be above 0"):
        SparseAdamW({}, eps=0.0, untouched="dense")
    with pytest.raises(ValueError, match=r"beta1\*\*2 must be below beta2"):
        SparseAdamW({}, beta1=0.9, beta2=0.81, untouched="dense")
    with pytest.raises(ValueError, match="use bias_correction='table', or untouched='decay'"):
        SparseAdamW({}, bias_correction="row", untouched="dense")
    table = HashTable([2])
    optimizer = SparseAdamW({"t": table}, untouched="dense")
    with pytest.raises(KeyError, match="no table 'x'; it has 't'"):
        optimizer.flush(["x"])
    with pytest.raises(KeyError, match="no table 'x'; it has 't'"):
        optimizer.caught_up("x", torch.tensor([1]))
    table(torch.tensor([1])).sum().backward()
    optimizer.param_groups[0]["untouched"] = "skip"
    with pytest.raises(ValueError, match=r"'t': untouched was changed from 'dense' to 'skip'"):
        optimizer.step()


def test_other_settings_by_hand():
    run = Run("HashTable", mode="decay")
    run.train(2)
    run.optimizer.param_groups[0]["bias_correction"] = "row"
    run.backward(torch.tensor([1]))
    with pytest.raises(ValueError, match="bias_correction was changed in param_groups"):
        run.optimizer.step()
    with pytest.raises(IndexError, match=f"it has {ROWS} rows, there is no row -1"):
        Run("Embedding").optimizer.caught_up("table", torch.tensor([3, -1]))


def test_skip_keeps_nothing_of_the_kind(engine):
    table = make_table("HashTable", torch.ones(4, 2))
    module = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = SparseAdamW({"t": table, "m": module})
    (table(torch.tensor([1])).sum() + module(torch.tensor([1])).sum()).backward()
    optimizer.step()
    assert list(table._store.slots) == [
        "embedding",
        "sparse_adamw_exp_avg",
        "sparse_adamw_exp_avg_sq",
    ]
    assert not module._forward_pre_hooks
    assert not module._forward_hooks
    assert set(optimizer.state[module.weight]) == {"step", "row_fault", "exp_avg", "exp_avg_sq"}
