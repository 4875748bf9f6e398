"""What SparseOptimizer and SparseAdamW promise in normal use; state is in test_state.py."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools

import pytest
import torch
from oracle import DTYPES, TOLERANCE, Oracle, bits, relative_error, within_one_ulp
from torch.nn.functional import mse_loss
from torch.optim import lr_scheduler as lrs
from torch.optim import optimizer as torch_optimizer

from cupy_sparse_adamw import HashTable, SparseAdamW, SparseOptimizer, filter_out_sparse_param
from cupy_sparse_adamw.tables import as_table

SIZE, DIM = 12, 3
IDS = 17 * torch.arange(SIZE) - 40  # the id of each row of a HashTable


def embedding_of(values: torch.Tensor) -> torch.nn.Embedding:
    return torch.nn.Embedding.from_pretrained(values.clone(), freeze=False, sparse=True)


def table_of(values: torch.Tensor) -> HashTable:
    table = HashTable([values.shape[1]], block_size=5, dtype=values.dtype)  # a last block not full
    table.insert(IDS, values)
    return table


class Case:
    """A table, what SPEC §1 says becomes of it, and the gradients it got since the last update."""

    def __init__(self, make, dtype=torch.float64, values=None, **settings) -> None:
        values = torch.randn(SIZE, DIM).to(dtype) if values is None else values
        self.table, self.dtype = make(values), dtype
        self.oracle, self.batches = Oracle(values, **settings), []

    def lookup(self, rows: torch.Tensor) -> torch.Tensor:
        return self.table(IDS[rows] if isinstance(self.table, HashTable) else rows)

    def backward(self, count=20, scale=1.0) -> torch.Tensor:
        """Random gradients of random rows, the last row never among them; returns the loss."""
        rows, grads = torch.randint(0, SIZE - 1, (count,)), torch.randn(count, DIM).to(self.dtype)
        self.batches.append((rows, grads))
        loss = (self.lookup(rows) * grads).sum()
        (loss * scale).backward()
        return loss

    def updated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The optimizer is to have used all gradients so far as one batch, which is returned."""
        rows, grads = (torch.cat(parts) for parts in zip(*self.batches, strict=True))
        self.oracle.step(rows, grads)
        self.batches.clear()
        return rows, grads

    def weights(self) -> torch.Tensor:
        table = self.table
        return table.embeddings() if isinstance(table, HashTable) else table.weight.detach().clone()

    def check(self, optimizer, name="table") -> None:
        """Weights, moments and t are the oracle's."""
        state = optimizer.state_dict()["state"][name]
        param_tolerance, moment_tolerance = TOLERANCE[self.dtype]
        assert state["step"] == self.oracle.t
        assert relative_error(state["exp_avg"], self.oracle.exp_avg) <= moment_tolerance
        assert relative_error(state["exp_avg_sq"], self.oracle.exp_avg_sq) <= moment_tolerance
        if param_tolerance is None:
            assert within_one_ulp(self.weights(), self.oracle.param)
        else:
            assert relative_error(self.weights(), self.oracle.param) <= param_tolerance


def train(optimizer, *cases, steps=1) -> None:
    for _ in range(steps):
        for case in cases:
            case.backward()
        optimizer.step()
        optimizer.zero_grad()
        for case in cases:
            case.updated()


def single(make, **options) -> tuple[Case, SparseAdamW]:
    case = Case(make, **options)
    return case, SparseAdamW({"table": case.table})


@pytest.fixture(params=[embedding_of, table_of])
def make(request):
    return request.param


def test_signature():
    empty = inspect.Parameter.empty
    switches = {
        "untouched": "skip",
        "eps_mode": "torch",
        "bias_correction": "table",
        "maximize": False,
    }
    every = inspect.signature(SparseAdamW).parameters.values()
    own = [p for p in every if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert {p.name: p.default for p in own} == switches
    parameters = [p for p in every if p not in own]
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    names = ["param_dict", "lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad"]
    assert [p.name for p in parameters] == names
    assert [p.default for p in parameters] == [empty, 1e-3, 0.9, 0.999, 1e-8, 1e-2, False]
    assert SparseAdamW.__mro__[1:3] == (SparseOptimizer, torch.optim.Optimizer)
    assert inspect.signature(SparseOptimizer.step).parameters["closure"].default is None
    assert inspect.signature(SparseOptimizer.zero_grad).parameters["set_to_none"].default is True


def test_param_groups_hold_what_schedulers_look_for():
    table, embedding = Case(table_of).table, Case(embedding_of).table
    optimizer = SparseAdamW({"a": table, "b": embedding}, 0.25, 0.75, 0.99, 1e-6, 0.5)
    (group,) = optimizer.param_groups
    settings = {"lr": 0.25, "betas": (0.75, 0.99), "eps": 1e-6, "weight_decay": 0.5}
    settings |= {"untouched": "skip", "eps_mode": "torch"}
    settings |= {"bias_correction": "table", "maximize": False}
    assert group == {**settings, "params": group["params"]}
    assert [id(key) for key in group["params"]] == [id(table), id(embedding.weight)]
    assert repr(optimizer).startswith("SparseAdamW (")
    assert "betas: (0.75, 0.99)" in repr(optimizer)
    assert "lr: 0.25" in repr(optimizer)


def test_groups_with_settings_of_their_own():
    settings = [
        {"lr": 0.1},
        {"lr": 0.1},
        {"lr": 0.01, "beta1": 0.5, "weight_decay": 0.3},
        {"lr": 0.1, "beta1": 0.7, "beta2": 0.9, "eps": 0.1},
        {"lr": 0.1, "beta2": 0.5},
    ]
    cases = [Case((table_of, embedding_of)[n % 2], **each) for n, each in enumerate(settings)]
    tables = [{str(n): case.table} for n, case in enumerate(cases)]
    optimizer = SparseAdamW(tables[0], lr=0.1)
    given = {"params": tables[2], **settings[2]}
    optimizer.add_param_group(given)
    optimizer.add_params(tables[1])  # to the first group
    assert given == {"params": tables[2], **settings[2]}  # the caller's dict stays as it is
    optimizer.add_param_group({"params": tables[3], "betas": (0.7, 0.9), "eps": 0.1})
    optimizer.add_param_group({"params": tables[4], "beta2": 0.5})
    train(optimizer, *cases, steps=5)
    for number, case in enumerate(cases):
        case.check(optimizer, str(number))


def test_no_tables_at_first_and_tables_that_come_later(make):
    first, second = Case(make), Case(make)
    optimizer = SparseAdamW({})
    assert optimizer.step() is None
    assert optimizer.step(lambda: 7) == 7
    optimizer.zero_grad()
    optimizer.add_params({"first": first.table})
    train(optimizer, first, steps=2)
    optimizer.add_params({"second": second.table})
    train(optimizer, first, second, steps=2)
    first.check(optimizer, "first")
    second.check(optimizer, "second")


def test_takeover(make):
    """A second optimizer starts from zero moments and t = 0; the first one's step raises."""
    case, first = single(make)
    train(first, case, steps=3)
    saved = first.state_dict()
    case.oracle = Oracle(case.weights(), lr=0.1)
    second = SparseAdamW({"table": case.table}, lr=0.1)
    assert second.state_dict()["state"] == {}
    train(second, case, steps=2)
    case.backward()
    for attempt in (first.step, first.state_dict, lambda: first.load_state_dict(saved)):
        with pytest.raises(RuntimeError, match="'table' now belongs to another optimizer"):
            attempt()
        case.check(second)


def test_t_counts_the_updates_of_each_table(make):
    """No gradient: skipped, t stays. A gradient without rows: t advances, nothing else changes."""
    cases = {name: Case(make) for name in ("always", "sometimes", "never", "empty")}
    optimizer = SparseAdamW({name: case.table for name, case in cases.items()})
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    before = {name: bits(cases[name].weights()) for name in ("never", "empty")}
    for number in range(6):
        cases["empty"].backward(count=0)
        train(optimizer, cases["always"], *([cases["sometimes"]] if number % 2 else []))
        cases["empty"].updated()
        optimizer.step()  # nothing has a gradient
    for name, old in before.items():
        assert torch.equal(bits(cases[name].weights()), old)
    train(optimizer, cases["empty"])  # with the bias correction of a seventh update
    assert optimizer.state_dict()["state"].keys() == {"always", "sometimes", "empty"}
    for name in ("always", "sometimes", "empty"):
        cases[name].check(optimizer, name)
    assert [case.oracle.t for case in cases.values()] == [6, 3, 0, 7]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_a_model_against_float64(make, dtype):
    """SPEC §1's norms, with the gradients that come out of a model as it learns."""
    (case, optimizer), factors = single(make, dtype=dtype), torch.randn(DIM).to(dtype)
    untouched = bits(case.weights()[SIZE - 1])
    for _ in range(100 if dtype.itemsize > 2 else 1):
        rows = torch.randint(0, SIZE - 1, (32,))
        out = case.lookup(rows)
        out.register_hook(lambda grad, rows=rows: case.oracle.step(rows, grad.double()))
        mse_loss((out * factors).tanh().sum(1), (rows % 2).to(dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()
    case.check(optimizer)
    assert torch.equal(bits(case.weights()[SIZE - 1]), untouched)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(make, set_to_none):
    case, optimizer = single(make)
    for _ in range(3):
        case.backward()
        case.batches.clear()  # never used
        optimizer.zero_grad(set_to_none)
        grad = case.table.grad() if make is table_of else case.table.weight.grad
        assert grad is None if set_to_none and make is embedding_of else grad._nnz() == 0
        train(optimizer, case)
    case.check(optimizer)


def test_without_zero_grad_gradients_add_up_as_in_torch(make):
    case, optimizer = single(make)
    case.backward()
    optimizer.step()
    case.batches.append(case.updated())
    train(optimizer, case)
    case.check(optimizer)


@pytest.mark.parametrize("script", ["3bbbU-b-U", "3bb5bbbU", "5bbb3bUbbbU", "3XbXbbUbbXbU"])
def test_accumulation(make, script):
    """A digit sets n, b is a micro-batch, - a step without a gradient, X a step that raises.

    An update is to come where a U follows, and nowhere else: at the n-th step since the last one,
    n being what it is by then; a step that raised does not count. It is that of one big batch.
    """
    case, culprit = Case(make, torch.float32), Case(embedding_of).table
    optimizer = SparseAdamW({"table": case.table, "culprit": culprit})
    big, other = single(make, values=case.weights())
    for event, following in itertools.pairwise(script + "."):
        before = bits(case.weights())
        if event.isdigit():
            optimizer.set_grad_accum_steps(int(event))
        elif event == "X":
            culprit.weight.grad = torch.ones_like(culprit.weight)
            with pytest.raises(RuntimeError, match=r"'culprit'.*dense"):
                optimizer.step()
            culprit.weight.grad = None
        elif event != "U":
            optimizer.zero_grad()  # at the head of the loop or at its end: keeps what is pending
            if event == "b":
                case.backward()
            assert optimizer.step(lambda event=event: event) == event
            optimizer.zero_grad()
        if following != "U":
            assert torch.equal(bits(case.weights()), before)
            continue
        rows, grads = case.updated()
        case.check(optimizer)
        (big.lookup(rows) * grads).sum().backward()
        other.step()
        other.zero_grad()
        if make is table_of:  # torch adds an Embedding's entries in an order of its own
            assert torch.equal(bits(case.weights()), bits(big.weights()))


@torch.no_grad()  # the optimizer turns gradients on for the closure
def test_closure(make):
    (case, optimizer), losses = single(make), []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        losses.append(case.backward())
        return losses[-1]

    for _ in range(3):
        assert optimizer.step(closure) is losses[-1]
        case.updated()
    assert len(losses) == case.oracle.t == 3
    case.check(optimizer)


SCHEDULERS = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, [lambda k: 0.9**k, lambda k: 1 / (1 + k)]),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda k: 0.97),
    "StepLR": lambda o: lrs.StepLR(o, 7, 0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [3, 20, 40], 0.3),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.3, 11),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, 0.9, 30),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.93),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 40, 2.0),  # 0 from the 40th on
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 20, 1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 5, 2),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.001, [0.1, 0.2], 6, cycle_momentum=True),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, [0.1, 0.3], total_steps=51),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=2, factor=0.5),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.StepLR(o, 4), lrs.StepLR(o, 9)], [10]),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.StepLR(o, 3), lrs.StepLR(o, 7)]),
}


def test_every_scheduler_of_torch_is_tested():
    base = lrs.LRScheduler
    found = {n for n, c in vars(lrs).items() if inspect.isclass(c) and issubclass(c, base)}
    missing = found - SCHEDULERS.keys() - {"LRScheduler", "_LRScheduler"}
    assert not missing, f"torch {torch.__version__} has schedulers that SCHEDULERS lacks: {missing}"


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR's own, in older torch
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name, as_tensor):
    """The rate and beta1 in each of 50 updates are those that torch.optim.AdamW is given.

    Two groups with rates of their own; a dense AdamW under the same scheduler says what they are.
    """
    rates, as_type = (0.125, 0.5), torch.tensor if as_tensor else float  # exact in float32
    cases = {"a": Case(table_of), "b": Case(embedding_of)}
    optimizer = SparseAdamW({"a": cases["a"].table}, lr=as_type(rates[0]))
    optimizer.add_param_group({"params": {"b": cases["b"].table}, "lr": as_type(rates[1])})
    judge = torch.optim.AdamW([{"params": [torch.ones(1)], "lr": as_type(r)} for r in rates])
    schedulers, seen = [SCHEDULERS[name](optimizer), SCHEDULERS[name](judge)], set()
    for i in range(50):
        for case, group in zip(cases.values(), judge.param_groups, strict=True):
            case.oracle.lr, case.oracle.beta1 = float(group["lr"]), float(group["betas"][0])
            seen.add((case.oracle.lr, case.oracle.beta1))
        train(optimizer, *cases.values())
        judge.step()
        for scheduler in schedulers:
            scheduler.step(*([1 + i % 5] if name == "ReduceLROnPlateau" else []))
    assert len(seen) > 2  # the scheduler did something
    assert {type(group["lr"]) is torch.Tensor for group in optimizer.param_groups} == {as_tensor}
    for key, case in cases.items():
        case.check(optimizer, key)


def test_hooks_and_profiler_run_around_step(make):
    (case, optimizer), seen = single(make), []
    initial = case.weights()

    def note(what):
        def hook(given, args, kwargs):
            assert given is optimizer
            seen.append((what, torch.equal(case.weights(), initial)))

        return hook

    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(note("global pre")),
        torch_optimizer.register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        # a pre hook may replace the arguments, here by another closure
        optimizer.register_step_pre_hook(lambda given, args, kwargs: ((given, lambda: 5), {})),
    ]
    case.backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = optimizer.step()
    assert "Optimizer.step#SparseAdamW.step" in {event.key for event in profile.key_averages()}
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert (loss, len(seen)) == (5, 4)
    assert dict(seen) == {"global pre": True, "pre": True, "post": False, "global post": False}


@pytest.mark.parametrize("who", ["pre", "post", "global pre", "global post"])
def test_one_hook_alone_is_called(who):
    (case, optimizer), seen = single(table_of), []
    register = {
        "pre": optimizer.register_step_pre_hook,
        "post": optimizer.register_step_post_hook,
        "global pre": torch_optimizer.register_optimizer_step_pre_hook,
        "global post": torch_optimizer.register_optimizer_step_post_hook,
    }[who]
    handle = register(lambda *given: seen.append(given))
    case.backward()
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert seen == [(optimizer, (optimizer,), {})]


class Calling(SparseAdamW):
    """A step of its own, which calls the base class's."""

    def step(self, closure=None):
        return super().step(closure)


class Wrapping(SparseAdamW):
    """The same with the attributes of the base class's step, of which torch reads one."""

    @functools.wraps(SparseAdamW.step)
    def step(self, closure=None):
        return super().step(closure)


class Decorated(SparseAdamW):
    step = torch.no_grad()(SparseAdamW.step)


@pytest.mark.parametrize("cls", [SparseAdamW, Calling, Wrapping, Decorated])
@pytest.mark.parametrize("closure", [None, lambda: 3])
def test_hooks_are_called_once_whatever_a_subclass_makes_of_step(cls, closure):
    case, _ = single(table_of)
    optimizer, seen = cls({"again": case.table}), []
    optimizer.register_step_pre_hook(lambda *given: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *given: seen.append("post"))
    case.backward()
    assert optimizer.step(closure) == (closure and 3)
    assert seen == ["pre", "post"]


def test_a_hook_that_a_closure_registers_is_called():
    (case, optimizer), seen = single(table_of), []
    case.backward()
    optimizer.step(lambda: optimizer.register_step_post_hook(lambda *given: seen.append(given)))
    assert len(seen) == 1


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_a_hook_that_comes_after_a_compiled_step_is_called():
    case, optimizer = single(table_of)
    seen = []

    @torch.compile(backend="eager")
    def step():
        optimizer.step()

    case.backward()
    step()
    optimizer.register_step_pre_hook(lambda *given: seen.append("pre"))
    step()
    assert seen == ["pre"]
    assert optimizer.state_dict()["state"]["table"]["step"] == 2


def test_a_profiler_alone_is_told():
    case, optimizer = single(table_of)
    case.backward()
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#SparseAdamW.step" in {event.key for event in profile.key_averages()}


def test_without_hooks_and_profiler_a_step_pays_for_none(monkeypatch):
    def record(name):
        raise AssertionError(f"{name} was recorded")

    monkeypatch.setattr(torch.autograd.profiler, "record_function", record)
    case, optimizer = single(table_of)
    case.backward()
    optimizer.step()
    with torch.autograd.profiler.profile(), pytest.raises(AssertionError, match="#SparseAdamW"):
        optimizer.step()


def test_grad_scaler_with_an_embedding():
    """Gradients scaled by 1024 and unscaled: the very update; infinite ones: no update."""
    case, optimizer = single(embedding_of, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(6):
        case.backward(scale=scaler.scale(torch.tensor(torch.inf if number == 2 else 1.0)))
        if number % 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        case.batches.clear() if number == 2 else case.updated()
    assert case.oracle.t == 5
    case.check(optimizer)


class Tied(torch.nn.Module):
    """Two modules on one weight."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.one = torch.nn.Embedding(SIZE, DIM, sparse=sparse)
        self.other = torch.nn.Embedding(SIZE, DIM, sparse=sparse)
        self.other.weight = self.one.weight

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return 2 * self.one(rows) + self.other(rows.flip(0))


MODULES = {
    "embedding": lambda sparse: torch.nn.Embedding(SIZE, DIM, sparse=sparse),
    "padding": lambda sparse: torch.nn.Embedding(SIZE, DIM, padding_idx=2, sparse=sparse),
    "sum": lambda sparse: torch.nn.EmbeddingBag(SIZE, DIM, mode="sum", sparse=sparse),
    "mean": lambda sparse: torch.nn.EmbeddingBag(SIZE, DIM, mode="mean", sparse=sparse),
    "tied": Tied,
}


@pytest.mark.parametrize("coalesced", [False, True], ids=["as it comes", "coalesced"])
@pytest.mark.parametrize("name", MODULES)
def test_module(name, coalesced):
    """Against the gradients of the same module made dense."""
    module, dense = MODULES[name](True).double(), MODULES[name](False).double()
    dense.load_state_dict(module.state_dict())
    (table,), (judge, *_) = filter_out_sparse_param(module).values(), dense.parameters()
    case = Case(lambda values: table, values=table.weight.detach().clone())
    optimizer = SparseAdamW({"table": table.weight if coalesced else table})
    padding = bits(case.weights()[2])
    for _ in range(10):
        rows = torch.randint(0, SIZE - 1, (3, 4))  # for a bag, three bags of four rows
        out = module(rows)
        grad = torch.randn_like(out)
        out.backward(grad)
        dense(rows).backward(grad)
        if coalesced:
            table.weight.grad = table.weight.grad.coalesce()
        assert table.weight.grad.is_coalesced() == coalesced
        touched = judge.grad.any(1).nonzero().flatten()
        case.oracle.step(touched, judge.grad[touched])
        optimizer.step()
        optimizer.zero_grad()
        judge.grad = None
    case.check(optimizer)
    assert torch.equal(bits(case.weights()[2]), padding) == (name == "padding")


def test_filter_out_sparse_param():
    def build():
        model = torch.nn.Module()
        model.tied, model.bag = Tied(True), torch.nn.EmbeddingBag(4, 2, sparse=True)
        model.inner = torch.nn.ModuleList([HashTable([2]), HashTable([2], name="users")])
        model.again = model.inner[1]
        model.dense = torch.nn.ModuleList([Tied(False), torch.nn.Linear(2, 2)])
        return model

    model = build()
    expected = {"tied.one": model.tied.one, "bag": model.bag, "inner.0": model.inner[0]}
    assert filter_out_sparse_param(model) == {**expected, "users": model.again}
    SparseAdamW(filter_out_sparse_param(build()))  # names are unique per model, not per process
    assert filter_out_sparse_param(model.dense) == {}
    assert filter_out_sparse_param(model.again) == {"users": model.again}
    for root in (model.inner[0], model.bag, model.tied.one):  # a model that is itself a table
        assert list(filter_out_sparse_param(root).values()) == [root]


def test_weights_and_moments_may_move_in_place():
    """``share_memory_`` and resizing a storage (FSDP) leave the tensor but move its memory."""
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    twin = copy.deepcopy(embedding)
    optimizers = [SparseAdamW({"e": each}, lr=0.1) for each in (embedding, twin)]
    for move in (lambda: None, embedding.share_memory, lambda: None):
        move()
        if move is embedding.share_memory:
            for moment in optimizers[0].state[embedding.weight].values():
                if isinstance(moment, torch.Tensor):
                    moment.share_memory_()
        for each, optimizer in zip((embedding, twin), optimizers, strict=True):
            each(torch.tensor([1, 2, 1])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(embedding.weight, twin.weight)
    states = [optimizer.state_dict()["state"]["e"] for optimizer in optimizers]
    assert torch.equal(states[0]["exp_avg"], states[1]["exp_avg"])


@pytest.mark.parametrize("how", ["same group", "another group", "unknown"])
def test_param_groups_changed_by_hand(how):
    first, second = (torch.nn.Embedding(3, 2, sparse=True) for _ in range(2))
    optimizer = SparseAdamW({"first": first, "second": second})
    for each in (first, second):
        each(torch.tensor([1])).sum().backward()
    optimizer.step()  # what it has found out by now does not outlive the change
    before = [each.weight.detach().clone() for each in (first, second)]
    if how == "another group":
        optimizer.param_groups.append({**optimizer.param_groups[0], "params": [second.weight]})
    else:
        extra = second.weight if how == "same group" else torch.nn.Parameter(torch.zeros(3, 2))
        optimizer.param_groups[0]["params"].append(extra)
    with pytest.raises(RuntimeError, match=r"by hand, or a table twice; .*add_param_group"):
        optimizer.step()
    assert torch.equal(first.weight, before[0])
    assert torch.equal(second.weight, before[1])


def test_a_group_removed_by_hand_may_come_back():
    tables = {name: torch.nn.Embedding(3, 2, sparse=True) for name in ("a", "b")}
    optimizer = SparseAdamW({"a": tables["a"]})
    optimizer.add_param_group({"params": {"b": tables["b"]}, "lr": 1.0})
    del optimizer.param_groups[1]
    optimizer.add_param_group({"params": {"b": tables["b"]}, "lr": 0.5})
    assert optimizer.param_groups[1]["lr"] == 0.5
    optimizer.param_groups.clear()
    optimizer.add_params(tables)
    assert optimizer.state_dict()["param_groups"][0]["params"] == ["a", "b"]


def test_a_coalesced_gradient_says_so_to_the_engines():
    weight = torch.nn.Parameter(torch.zeros(4, 2))
    grad = torch.sparse_coo_tensor([[3, 1, 3]], torch.ones(3, 2), (4, 2), check_invariants=True)
    for weight.grad in (grad, grad.coalesce()):
        pending = as_table("table", weight).pending("table")
        assert pending is not None
        assert pending.coalesced == weight.grad.is_coalesced()


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_moments_replaced_by_hand_are_seen(key):
    weight = torch.nn.Parameter(torch.zeros(3, 3))
    optimizer = SparseAdamW({"table": weight})
    weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 3), (3, 3), check_invariants=True)
    optimizer.step()
    optimizer.state[weight][key] = torch.zeros(3, 3)
    optimizer.step()
    assert optimizer.state[weight][key][1].ne(0).all()
    optimizer.state[weight][key] = optimizer.state[weight][key].t()
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match=f"table 'table': its {key} is not contiguous"):
        optimizer.step()
    assert torch.equal(weight, before)


def two_steps(rows: int = 4, dim: int = 3) -> tuple[SparseAdamW, torch.nn.Parameter]:
    """An optimizer of one table, after two steps, with the next gradient in place."""
    weight = torch.nn.Parameter(torch.zeros(rows, dim))
    optimizer = SparseAdamW({"table": weight}, lr=0.1)
    for _ in range(2):
        set_grad(weight)
        optimizer.step()
    set_grad(weight)
    return optimizer, weight


def set_grad(weight: torch.nn.Parameter) -> None:
    """One gradient of ones for the first row, if there is one."""
    count = min(len(weight), 1)
    weight.grad = torch.sparse_coo_tensor(
        torch.zeros(1, count, dtype=torch.int64),
        torch.ones(count, weight.shape[1], dtype=weight.dtype),
        weight.shape,
        check_invariants=True,
    )


def test_weights_replaced_through_data_are_updated():
    optimizer, weight = two_steps()
    before = weight.data
    copied = before.clone()
    weight.data = torch.full((4, 3), 5.0)
    optimizer.step()
    assert torch.equal(before, copied)
    torch.testing.assert_close(weight[0], torch.full((3,), 5.0 - 0.1 * (1 + 0.01 * 5.0)))


@pytest.mark.parametrize(
    ("rows", "change"),
    [
        pytest.param(4, lambda data: data[:2], id="fewer rows, at the same address"),
        pytest.param(4, lambda data: data.double(), id="another dtype"),
        pytest.param(0, lambda data: data.double(), id="empty, so without an address"),
    ],
)
def test_weights_changed_through_data_after_the_first_update(rows, change):
    optimizer, weight = two_steps(rows)
    weight.grad = None
    weight.data = change(weight.data)
    set_grad(weight)
    with pytest.raises(RuntimeError, match=r"its weight became .* after its first update"):
        optimizer.step()


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_moments_replaced_through_data_are_seen(key):
    optimizer, weight = two_steps()
    moment = optimizer.state[weight][key]
    before = moment.data
    copied = before.clone()
    moment.data = torch.zeros(4, 3)
    optimizer.step()
    assert torch.equal(before, copied)
    assert moment[0].ne(0).all()
    moment.data = moment.data.double()
    set_grad(weight)
    with pytest.raises(RuntimeError, match=r"its moments are \[4, 3\] torch.float64"):
        optimizer.step()


def test_a_step_put_into_the_state_by_hand():
    """t may be of any dtype there, as in torch.optim's own states, which hold float32."""
    optimizers, weights = zip(*(two_steps() for _ in range(2)), strict=True)
    for optimizer, weight, dtype in zip(
        optimizers, weights, (torch.int64, torch.float32), strict=True
    ):
        optimizer.state[weight]["step"] = torch.tensor(1000, dtype=dtype)
        optimizer.step()
        assert optimizer.state_dict()["state"]["table"]["step"] == 1001
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.5),
        ("betas", (0.5, 0.75)),
        ("eps", 0.5),
        ("weight_decay", 0.5),
        ("maximize", True),
        ("eps_mode", "tf"),
    ],
)
def test_a_setting_holds_from_the_step_after_it_was_changed_on(key, value):
    optimizer, weight = two_steps()
    optimizer.param_groups[0]["eps"] = 0.25
    optimizer.step()
    twin, plain = (copy.deepcopy((optimizer, weight)) for _ in range(2))
    for each, its_weight in ((optimizer, weight), twin, plain):
        if each is not plain[0]:
            each.param_groups[0][key] = value
        set_grad(its_weight)
        each.step()
    assert torch.equal(weight, twin[1])  # whose settings nobody had asked for
    assert not torch.equal(weight, plain[1])
