"""The three switches: eps_mode, bias_correction, maximize, each beside a formula of its own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from oracle import Oracle, relative_error

from cupy_sparse_adamw import HashTable, SparseAdamW, SparseOptimizer, functional

ROWS, DIM = 12, 3


def hash_table(weights: torch.Tensor, dtype: torch.dtype) -> HashTable:
    table = HashTable([DIM], block_size=4, dtype=dtype)
    table.insert(torch.arange(ROWS), weights.to(dtype))
    return table


def batches(steps: int, seed: int = 1):
    """Rows [N], which may repeat, and gradients [N, D] float64."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(0, ROWS, (4,), generator=random, device="cpu")
        grads = torch.randn(4, DIM, generator=random, dtype=torch.float64, device="cpu")
        device = torch.get_default_device()
        yield rows.to(device), grads.to(device)


def initial() -> torch.Tensor:
    random = torch.Generator().manual_seed(2)
    weights = torch.randn(ROWS, DIM, generator=random, dtype=torch.float64, device="cpu")
    return weights.to(torch.get_default_device())


def train(table: HashTable, optimizer: SparseAdamW, given) -> None:
    for rows, grads in given:
        table(rows).backward(grads.to(table.dtype))
        optimizer.step()
        optimizer.zero_grad()


def values_of(table: HashTable) -> torch.Tensor:
    with torch.no_grad():
        return table.eval()(torch.arange(ROWS))


class RowOracle(Oracle):
    """Bias corrected by each row's own count; ε beside √v̂, or beside √v if ``tf``."""

    def __init__(self, param, tf: bool, per_row: bool, **settings) -> None:
        super().__init__(param, **settings)
        self.tf, self.per_row, self.counts = tf, per_row, np.zeros(ROWS, dtype=int)

    def step(self, rows, grads) -> None:
        self.t += 1
        rows, grads = rows.cpu().numpy(), grads.cpu().numpy()
        for row in np.unique(rows):
            self.counts[row] += 1
            n = self.counts[row] if self.per_row else self.t
            g = grads[rows == row].sum(0)
            m, v, w = self.exp_avg[row], self.exp_avg_sq[row], self.param[row]
            m += (1 - self.beta1) * (g - m)
            v += (1 - self.beta2) * (g * g - v)
            c1, c2 = 1 - self.beta1**n, 1 - self.beta2**n
            if self.tf:
                motion = self.lr * np.sqrt(c2) / c1 * m / (np.sqrt(v) + self.eps)
            else:
                motion = self.lr * (m / c1) / (np.sqrt(v / c2) + self.eps)
            w -= motion + self.lr * self.weight_decay * w


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias_correction", ["table", "row"])
@pytest.mark.parametrize("eps_mode", ["torch", "tf"])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_beside_the_formula(engine, dtype, bias_correction, eps_mode, eps):
    table = hash_table(initial(), dtype)
    settings = {"lr": 1e-2, "eps": eps, "weight_decay": 0.1}
    optimizer = SparseAdamW(
        {"t": table}, **settings, eps_mode=eps_mode, bias_correction=bias_correction
    )
    exact = RowOracle(initial().to(dtype), eps_mode == "tf", bias_correction == "row", **settings)
    given = [(rows, grads.to(dtype).double()) for rows, grads in batches(40)]
    train(table, optimizer, given)
    for rows, grads in given:
        exact.step(rows, grads)
    limit = 2e-6 if dtype is torch.float32 else 1e-12
    assert relative_error(values_of(table), exact.param) <= limit
    state = optimizer.state_dict()["state"]["t"]
    order = state["ids"].argsort()
    for key in ("exp_avg", "exp_avg_sq"):
        assert relative_error(state[key][order], getattr(exact, key)) <= limit
    if bias_correction == "row":
        assert state["row_step"][order].flatten().tolist() == exact.counts.tolist()
    else:
        assert "row_step" not in state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tf_without_decay_is_torchs_sparse_adam(engine, dtype):
    """100 steps of torch.optim.SparseAdam itself, every row touched or not."""
    ours, theirs = (
        torch.nn.Embedding.from_pretrained(initial().to(dtype), freeze=False, sparse=True)
        for _ in range(2)
    )
    settings = {"lr": 1e-2, "eps": 1e-3}
    optimizer = SparseAdamW({"e": ours}, **settings, weight_decay=0.0, eps_mode="tf")
    sparse_adam = torch.optim.SparseAdam(theirs.parameters(), **settings)
    for rows, grads in batches(100):
        for module, step in ((ours, optimizer), (theirs, sparse_adam)):
            module(rows).backward(grads.to(dtype))
            step.step()
            step.zero_grad()
    exact = theirs.weight.detach().double().cpu().numpy()
    assert relative_error(ours.weight, exact) <= (4e-6 if dtype is torch.float32 else 1e-12)
    # and it is the switch that does it
    other = torch.nn.Embedding.from_pretrained(initial().to(dtype), freeze=False, sparse=True)
    optimizer = SparseAdamW({"e": other}, **settings, weight_decay=0.0)
    for rows, grads in batches(100):
        other(rows).backward(grads.to(dtype))
        optimizer.step()
        optimizer.zero_grad()
    assert relative_error(other.weight, exact) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_run_that_sparse_adam_began_goes_on(engine, dtype):
    """Its state, taken over as docs/untouched.md says; moments as well as weights."""
    settings = {"lr": 1e-2, "eps": 1e-3}
    modules = [
        torch.nn.Embedding.from_pretrained(initial().to(dtype), freeze=False, sparse=True)
        for _ in range(2)
    ]
    begun, whole = (torch.optim.SparseAdam(m.parameters(), **settings) for m in modules)

    def train(module, optimizer, given):
        for rows, grads in given:
            module(rows).backward(grads.to(dtype))
            optimizer.step()
            optimizer.zero_grad()

    given = list(batches(100))
    train(modules[0], begun, given[:40])
    train(modules[1], whole, given)
    ours = SparseAdamW({"e": modules[0]}, **settings, weight_decay=0.0, eps_mode="tf")
    state = ours.state_dict()
    state["state"]["e"] = begun.state_dict()["state"][0]
    ours.load_state_dict(state)
    train(modules[0], ours, given[40:])
    limit = 4e-6 if dtype is torch.float32 else 1e-12
    exact, found = whole.state_dict()["state"][0], ours.state_dict()["state"]["e"]
    pairs = {"weights": (modules[0].weight, modules[1].weight)}
    pairs |= {key: (found[key], exact[key]) for key in ("exp_avg", "exp_avg_sq")}
    for key, (value, wanted) in pairs.items():
        assert relative_error(value, wanted.detach().double().cpu().numpy()) <= limit, key
    assert found["step"] == exact["step"] == 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_maximize_is_torchs(engine, dtype):
    """Every row in every batch, beside torch.optim.AdamW(maximize=True) in float64."""
    weights = initial().to(dtype)
    table, dense = hash_table(weights, dtype), torch.nn.Parameter(weights.double())
    settings = {"lr": 1e-2, "weight_decay": 0.1, "maximize": True}
    optimizer = SparseAdamW({"t": table}, **settings)
    theirs = torch.optim.AdamW([dense], **settings)
    everyone = torch.arange(ROWS)
    for rows, grads in batches(40):
        ids, values = torch.cat([rows, everyone]), torch.cat([grads, grads.new_ones(ROWS, DIM)])
        values = values.to(dtype)
        table(ids).backward(values)
        dense.grad = torch.zeros_like(dense).index_add_(0, ids, values.double())
        for each in (optimizer, theirs):
            each.step()
        optimizer.zero_grad()
    limit = 2e-6 if dtype is torch.float32 else 1e-12
    assert relative_error(values_of(table), dense.detach().cpu().numpy()) <= limit


@pytest.mark.parametrize("mode", ["skip", "decay", "dense"])
def test_maximize_turns_the_gradients_sign(engine, mode):
    ends = []
    for maximize in (False, True):
        table = hash_table(initial(), torch.float32)
        optimizer = SparseAdamW({"t": table}, lr=1e-2, maximize=maximize, untouched=mode)
        train(table, optimizer, ((r, -g if maximize else g) for r, g in batches(15)))
        ends.append(values_of(table))
        moments = optimizer.state_dict()["state"]["t"]["exp_avg"]
        ends.append(moments)
    assert torch.equal(ends[0], ends[2])
    assert torch.equal(ends[1], ends[3])


@pytest.mark.parametrize("eps_mode", ["torch", "tf"])
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_untouched_rows_follow_eps_mode(engine, eps_mode, eps):
    """With missed steps made up for by rules: beside the formula with zero gradients."""
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        table = hash_table(initial(), dtype)
        settings = {"lr": 1e-2, "eps": eps, "weight_decay": 0.1}
        optimizer = SparseAdamW({"t": table}, **settings, eps_mode=eps_mode, untouched="dense")
        exact = RowOracle(initial().to(dtype), eps_mode == "tf", False, **settings)
        everyone = torch.arange(ROWS)
        for rows, grads in batches(30):
            grads = grads.to(dtype).double()
            table(rows).backward(grads.to(dtype))
            optimizer.step()
            optimizer.zero_grad()
            exact.step(torch.cat([rows, everyone]), torch.cat([grads, grads.new_zeros(ROWS, DIM)]))
        assert relative_error(values_of(table), exact.param) <= limit


@pytest.mark.parametrize("kind", ["HashTable", "Embedding"])
def test_counts_of_rows_are_state(engine, kind):
    """They resume bitwise, go with a deleted row, and begin at zero for a new one."""

    def make():
        if kind == "HashTable":
            table = hash_table(initial(), torch.float32)
        else:
            table = torch.nn.Embedding.from_pretrained(initial().float(), freeze=False, sparse=True)
            table.dtype = torch.float32
        return table, SparseAdamW({"t": table}, lr=1e-2, bias_correction="row")

    table, optimizer = make()
    train(table, optimizer, batches(10))
    saved = copy.deepcopy((table.state_dict(), optimizer.state_dict()))
    counts = saved[1]["state"]["t"]["row_step"]
    assert counts.dtype is torch.int32
    assert list(counts.shape) == [ROWS, 1]
    assert int(counts.sum()) == sum(len(rows.unique()) for rows, _ in batches(10))
    train(table, optimizer, batches(10, seed=7))
    other, its_optimizer = make()
    other.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    train(other, its_optimizer, batches(10, seed=7))
    assert torch.equal(values_of(other), values_of(table))
    if kind == "HashTable":
        table.train()
        table.delete(torch.tensor([3]))
        train(table, optimizer, [(torch.tensor([3]), torch.ones(1, DIM, dtype=torch.float64))])
        state = optimizer.state_dict()["state"]["t"]
        assert state["row_step"][state["ids"] == 3].tolist() == [[1]]
    damaged = copy.deepcopy(saved[1])
    damaged["state"]["t"]["row_step"] = counts.long()
    with pytest.raises(ValueError, match=r"'t': the saved row_step must be int32 \[12, 1\]"):
        its_optimizer.load_state_dict(damaged)


def test_refusals():
    table = HashTable([2])
    for settings, error, text in (
        ({"eps_mode": "keras"}, ValueError, "eps_mode must be one of 'torch', 'tf', got 'keras'"),
        ({"bias_correction": 1}, ValueError, "bias_correction must be one of 'table', 'row', got"),
        ({"maximize": 1}, TypeError, "maximize must be True or False, got 1"),
    ):
        with pytest.raises(error, match=text):
            SparseAdamW({"t": table}, **settings)
    with pytest.raises(TypeError, match="positional"):
        SparseAdamW({"t": table}, 1e-3, 0.9, 0.999, 1e-8, 1e-2, False, "dense")
    optimizer = SparseAdamW({"t": table})
    saved = SparseAdamW({"t": HashTable([2])}, bias_correction="row").state_dict()
    with pytest.raises(ValueError, match="bias_correction='row', this optimizer with bias_corr"):
        optimizer.load_state_dict(saved)


def test_a_state_of_before_the_switches_loads():
    table = HashTable([2])
    optimizer = SparseAdamW({"t": table})
    table(torch.tensor([1])).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    for key in ("untouched", "eps_mode", "bias_correction", "maximize"):
        del saved["param_groups"][0][key]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["eps_mode"] == "torch"
    assert optimizer.state_dict()["param_groups"][0]["untouched"] == "skip"


def test_an_optimizer_that_has_no_switches_has_their_defaults():
    class Plain(SparseOptimizer):
        def _prepare_updates(self, updates, segments):
            return functional.prepare_sparse_adamw(updates, segments)

    ours, plain = (hash_table(initial(), torch.float32) for _ in range(2))
    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
    for table, optimizer in (
        (ours, SparseAdamW({"t": ours})),
        (plain, Plain({"t": plain}, settings)),
    ):
        train(table, optimizer, batches(3))
        optimizer.load_state_dict(optimizer.state_dict())
        train(table, optimizer, batches(3))
    assert torch.equal(values_of(ours), values_of(plain))
