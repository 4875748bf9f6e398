"""Bad input: the type and the text of each error, and that nothing has moved after it.

Most tests take two tables that have trained for a while, "first" and "second", let the second be
at fault, and compare every bit of both before and after. Then training goes on, and must arrive
at the bits of a run that never saw the error.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import why_no_gpu
from oracle import bits

from cupy_sparse_adamw import (
    AdmitHook,
    FilterHook,
    HashTable,
    SparseAdamW,
    filter_out_sparse_param,
)

ROWS, DIM = 6, 4
IDS = torch.tensor([[1, 4, 1], [5, 1, 0]])
NAN, INF = float("nan"), float("inf")

KINDS = {
    "embedding": lambda dtype: torch.nn.Embedding(ROWS, DIM, sparse=True, dtype=dtype),
    "hash": lambda dtype: HashTable([DIM], block_size=3, dtype=dtype),
}
BOTH = pytest.mark.parametrize("kind", KINDS)


class Run:
    """An optimizer over two tables, each in a param group of its own, after two updates."""

    def __init__(self, kind="hash", dtype=torch.float32, accumulate=1, updates=2):
        torch.manual_seed(0)
        other = "hash" if kind == "embedding" else "embedding"
        self.tables = {"first": KINDS[other](torch.float32), "second": KINDS[kind](dtype)}
        self.second = self.tables["second"]
        self.optimizer = SparseAdamW({"first": self.tables["first"]}, lr=0.1)
        self.optimizer.add_param_group({"params": {"second": self.second}, "lr": 0.2})
        for _ in range(updates):
            self.train()
        self.optimizer.set_grad_accum_steps(accumulate)

    def backward(self, *names):
        for name in names or self.tables:
            (self.tables[name](IDS) - 1).square().sum().backward()

    def train(self):
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def key_of(table):
    return table if isinstance(table, HashTable) else table.weight


def snapshot(optimizer, tables):
    """Everything that an error must leave alone, in a form in which == means bitwise equal."""
    names, groups = {id(key_of(t)): name for name, t in tables.items()}, optimizer.param_groups
    result = {
        "counts": (optimizer._grad_accum_steps, optimizer._accumulated),
        "groups": [{**g, "params": [names[id(p)] for p in g["params"]]} for g in groups],
    }
    for name, table in tables.items():
        state = optimizer.state.get(key_of(table), {})
        if isinstance(table, HashTable):
            values = {"ids": table.ids(), "weight": table.embeddings()}
            moments = [x.value() for key, x in table._store.slots.items() if key != "embedding"]
            grads = [x for entry in table._grads._grads for x in (entry.found.rows, entry.grad)]
        else:
            values = {"weight": table.weight}
            moments = [state[key] for key in ("exp_avg", "exp_avg_sq") if key in state]
            grads = [] if table.weight.grad is None else [table.weight.grad]
            if grads and grads[0].layout == torch.sparse_coo:
                grads = [grads[0]._indices(), grads[0]._values()]
        values |= {f"moment {i}": x for i, x in enumerate(moments) if x.any()}  # none means zeros
        values |= {f"pending {i}": x for i, x in enumerate(grads)}
        result[name] = {key: (x.dtype, x.shape, bits(x).tolist()) for key, x in values.items()}
        result[name]["step"] = int(state.get("step", 0))
    return result


def refuses(run, error, text, act):
    """``act`` raises, and no bit of the run has changed."""
    before = repr(snapshot(run.optimizer, run.tables))  # repr: a NaN setting equals itself
    with pytest.raises(error, match=text):
        act()
    assert repr(snapshot(run.optimizer, run.tables)) == before


def goes_on(run, twin):
    """Two more updates give the bits of ``twin``, which never saw an error."""
    for each in (run, twin):
        for _ in range(2 * each.optimizer._grad_accum_steps):
            each.train()
    after = snapshot(run.optimizer, run.tables)
    assert after == snapshot(twin.optimizer, twin.tables)
    assert all(after[name]["step"] >= 2 for name in run.tables)


# ---------------------------------------------------------------------- what step() refuses


def put(name, value):
    """Set the weight's ``grad`` or ``data``; a function changes what is there."""
    return lambda table: setattr(
        table.weight, name, value(getattr(table.weight, name)) if callable(value) else value
    )


def sparse(row, dtype=torch.float32):
    """A gradient as torch's backward makes it, without torch's check of the rows."""
    values = torch.ones(2, DIM, dtype=dtype)
    return torch.sparse_coo_tensor([[1, row]], values, (ROWS, DIM), check_invariants=False)


def shrink(table):
    """Growing is the same fault, and writes behind the moments where it is not found."""
    table.zero_grad()
    put("data", lambda w: w[:3])(table)
    table(TWO).sum().backward()


TWO, FULL = torch.arange(2), torch.ones(2, DIM)
DENSE = "'second'.* dense.*sparse=True.*torch.optim.AdamW"
WIDER = r"'second'.*torch.float64, got torch.float32.*\.to\(torch.float64\)"
EARLY = {  # what spoils the second table's gradients, error, text
    "dense": (put("grad", torch.zeros(ROWS, DIM)), RuntimeError, DENSE),
    "both": (lambda t: t.weight.sum().backward(), RuntimeError, DENSE),
    "elements": (put("grad", torch.ones(ROWS, DIM).to_sparse()), ValueError, "2 sparse dimensions"),
    "shape": (put("data", lambda w: w[:3]), ValueError, r"\[3, 4\], got shape \[6, 4\]"),
    "dtype": (put("data", lambda w: w.double()), TypeError, WIDER),
    "strides": (put("data", lambda w: w.t().contiguous().t()), ValueError, "'second'.*contiguous"),
    "changed": (
        lambda t: t._grads._grads[-1].grad.mul_(2),
        RuntimeError,
        "'second'.*copy_grads=True",
    ),
}
DUE = {  # found when the update is due
    "converted": (lambda t: t.double(), RuntimeError, "'second'.*float64.*new optimizer"),
    "resized": (shrink, RuntimeError, r"'second'.*\[3, 4\].*new optimizer"),
    "row": (put("grad", sparse(99)), IndexError, "'second'.*row 99.*has 6 rows"),
    "negative row": (put("grad", sparse(-1)), IndexError, "'second'.*row -1.*has 6 rows"),
    "float64": (put("grad", sparse(6, torch.float64)), IndexError, "'second'.*row 6.*has 6 rows"),
}


@pytest.mark.parametrize(("accumulate", "at"), [(1, 0), (3, 1), (3, 2)])
@pytest.mark.parametrize("case", [*EARLY, *DUE])
def test_bad_gradients(case, accumulate, at):
    """The fault comes in micro-batch ``at`` of ``accumulate``; the earlier ones stay."""
    spoil, error, text = {**EARLY, **DUE}[case]
    at = accumulate - 1 if case in DUE else at
    kind = "hash" if case == "changed" else "embedding"
    dtype = torch.float64 if case == "float64" else torch.float32  # not in one pass with the first
    run, twin = Run(kind, dtype, accumulate), Run(kind, dtype, accumulate)
    for each in (run, twin):
        for _ in range(at):
            each.train()
        each.backward()
    good = run.second.weight.data.clone() if kind == "embedding" else None
    spoil(run.second)
    refuses(run, error, text, run.optimizer.step)
    refuses(run, error, text, run.optimizer.step)  # the second time as the first

    if good is not None:
        run.second.weight.data = good
    run.second.zero_grad()
    for _ in range(at + 1):  # the first table's gradients are still there
        run.backward("second")
    for each in (run, twin):
        each.optimizer.step()
        assert each.optimizer._accumulated == (at + 1) % accumulate
        each.optimizer.zero_grad()
        for _ in range(at + 1, accumulate):
            each.train()
    goes_on(run, twin)


SETTINGS = [  # a setting, a value, the error, its text
    *[
        (key, value, ValueError, f"{key} must be a finite number of at least 0, got {value}")
        for key in ("lr", "eps", "weight_decay")
        for value in (-0.1, NAN, INF)
    ],
    *[
        (f"beta{i}", value, ValueError, rf"beta{i} must be .* in \[0, 1\), got {value}")
        for i in (1, 2)
        for value in (1.0, -0.1, NAN, INF)
    ],
    ("lr", torch.tensor(NAN), ValueError, "lr must be .*got nan"),
    ("lr", torch.tensor([0.1, 0.2]), TypeError, "lr must be a number, got tensor"),
    ("lr", None, TypeError, "lr must be a number, got None"),
    ("lr", "1e-3", TypeError, "lr must be a number, got '1e-3'"),  # as YAML reads 1e-3
    *[
        ("betas", value, TypeError, r"betas must be a pair \(beta1, beta2\), got")
        for value in (0.9, (0.9,), (0.9, 0.99, 0.999), None)
    ],
]


@pytest.mark.parametrize(("key", "value", "error", "text"), SETTINGS)
def test_bad_settings(key, value, error, text):
    """Given at once, for a group, or set later by hand: then the next step finds them."""
    run, twin = Run(), Run()
    for each in (run, twin):
        each.backward()
    if key != "betas":
        refuses(run, error, text, lambda: SparseAdamW(run.tables, **{key: value}))
    added = {"params": {"third": HashTable([2])}, key: value}
    refuses(run, error, text, lambda: run.optimizer.add_param_group(added))
    group = run.optimizer.param_groups[1]
    good = dict(group)
    pairs = {"beta1": {"betas": (value, 0.9)}, "beta2": {"betas": (0.9, value)}}
    group.update(pairs.get(key, {key: value}))
    refuses(run, error, text, run.optimizer.step)
    group.update(good)
    goes_on(run, twin)


def test_settings_that_change_in_place_are_checked_at_every_step():
    run = Run()
    lr, betas = torch.tensor(0.1), [0.9, 0.99]
    run.optimizer.param_groups[1].update(lr=lr, betas=betas)
    run.train()
    run.backward()
    lr.fill_(NAN)
    refuses(run, ValueError, "lr must be .*got nan", run.optimizer.step)
    lr.fill_(0.1)
    betas[0] = 1.0
    refuses(run, ValueError, "beta1 must be .*got 1", run.optimizer.step)


@pytest.mark.parametrize("steps", [1, 2])
def test_grad_scaler(steps):
    """Never a step with scaled gradients."""
    run, scaler = Run("embedding"), torch.amp.GradScaler("cpu")
    if steps > 1:  # without a HashTable
        del run.tables["first"]
        run.optimizer = SparseAdamW(run.tables)
        run.optimizer.set_grad_accum_steps(steps)
    scaler.scale(run.second(IDS).sum()).backward()
    text = "GradScaler.*HashTable.*accumulated.*bfloat16"
    for _ in range(steps):
        refuses(run, RuntimeError, text, lambda: scaler.step(run.optimizer))


OTHERS = "HashTable.*Embedding.*sparse=True.*weight"
NOT_TABLES = {  # all under the key "bad"
    "dense": (torch.nn.Embedding(3, 2), TypeError, "Embedding has dense.*sparse=True.*AdamW"),
    "bag": (torch.nn.EmbeddingBag(3, 2), TypeError, "EmbeddingBag has dense.*sparse=True.*AdamW"),
    "layer": (torch.nn.Linear(3, 2), TypeError, f"{OTHERS}.*got Linear"),
    "list": ([HashTable([2])], TypeError, f"{OTHERS}.*got list"),
    "1-D": (torch.nn.Parameter(torch.ones(3)), TypeError, rf"\[3\].*{OTHERS}"),
    "0 wide": (torch.nn.Parameter(torch.ones(3, 0)), TypeError, rf"\[3, 0\].*{OTHERS}"),
    "not a leaf": (torch.ones(3, 2, requires_grad=True) * 2, TypeError, f"leaf.*{OTHERS}"),
    "ints": (torch.ones(3, 2, dtype=torch.int64), TypeError, "float32, float64.*got torch.int64"),
    "strided": (torch.nn.Parameter(torch.ones(3, 2).t()), ValueError, r"use .*\.contiguous\(\)"),
}


@pytest.mark.parametrize("case", NOT_TABLES)
def test_not_a_table(case):
    """The good tables beside it are not taken over either."""
    value, error, text = NOT_TABLES[case]
    run, new = Run(), {"good": HashTable([2]), "bad": value}
    for act in (
        lambda: SparseAdamW({**run.tables, **new}),
        lambda: run.optimizer.add_params(new),
        lambda: run.optimizer.add_param_group({"params": new}),
    ):
        refuses(run, error, f"bad.*{text}", act)
    goes_on(run, Run())


@BOTH
def test_a_table_given_twice(kind):
    run, new = Run(kind), HashTable([2])
    again = key_of(run.second)  # for an embedding its weight: the optimizer was given the module
    same = "'second' and 'again' are the same table"
    refuses(run, ValueError, same, lambda: SparseAdamW({**run.tables, "again": again}))
    for params, error, text in (
        ({"new": new, "again": again}, ValueError, same),
        ({"second": new}, ValueError, "already has a table named 'second'"),
        ({3: new}, TypeError, "names are strings, got 3"),
    ):
        refuses(run, error, text, lambda p=params: run.optimizer.add_params(p))
        refuses(run, error, text, lambda p=params: run.optimizer.add_param_group({"params": p}))
    goes_on(run, Run(kind))


@BOTH
def test_a_second_optimizer_takes_over(kind):
    """Moments zero, t = 0; the former owner can neither step nor touch the moments."""
    run = Run(kind)
    former, state = run.optimizer, run.optimizer.state_dict()
    former.step()  # what it has found out by now does not outlive the change
    new = SparseAdamW({"mine": run.second})
    assert new.state_dict()["state"] == {}
    run.backward()
    text = "'second' now belongs to another optimizer.*new optimizer"
    refuses(run, RuntimeError, text, former.step)
    new.step()
    mine = new.state_dict()["state"]["mine"]
    assert mine["step"] == 1
    once = 0.001 * (mine["exp_avg"] / 0.1).square()  # v = (1 - β2) g², m = (1 - β1) g
    torch.testing.assert_close(mine["exp_avg_sq"], once)
    refuses(run, RuntimeError, text, lambda: former.load_state_dict(state))
    if kind == "hash":  # the moments in it are another optimizer's now
        refuses(run, RuntimeError, text, former.state_dict)


@BOTH
def test_two_tables_of_one_name(kind):
    films = KINDS[kind](torch.float32)
    model = torch.nn.ModuleDict({"users": HashTable([2], name="films"), "films": films})
    with pytest.raises(ValueError, match=r"named 'films': users and films; give .*another name"):
        filter_out_sparse_param(model)
    with pytest.raises(TypeError, match=r"torch.nn.Module, got dict"):
        filter_out_sparse_param({"films": films})


# ---------------------------------------------------------------------- calls that raise at once


def make(**options):
    return lambda run: HashTable(**{"embedding_shape": [DIM], **options})


def optimizer(method, *args):
    return lambda run: getattr(run.optimizer, method)(*args)


def second(method, *args):
    return lambda run: getattr(run.second, method)(*args)


SPARSE = torch.nn.Embedding(3, 2, sparse=True)
HALVES = HashTable([DIM], dtype=torch.bfloat16)
DICT = "must be a dict.*name -> table.*filter_out_sparse_param"
GROUP = "'params' is a dict of name -> table.*filter_out_sparse_param"
NO_GPU = pytest.mark.skipif(why_no_gpu() is None, reason="a CUDA table is no error here")
CALLS = [  # on a Run whose second table is a HashTable of 4 rows
    (lambda run: SparseAdamW(SPARSE), TypeError, f"param_dict {DICT}"),
    (lambda run: SparseAdamW(SPARSE.parameters()), TypeError, DICT),
    (lambda run: SparseAdamW(run.tables, amsgrad=True), ValueError, "amsgrad must be False"),
    (optimizer("add_params", [SPARSE]), TypeError, f"params {DICT}"),
    (optimizer("add_param_group", [SPARSE]), TypeError, GROUP),
    (optimizer("add_param_group", {"params": SPARSE}), TypeError, GROUP),
    (optimizer("step", lambda: 1 / 0), ZeroDivisionError, "division by zero"),
    (optimizer("set_grad_accum_steps", 0), ValueError, "steps must be at least 1, got 0"),
    (optimizer("set_grad_accum_steps", 1.5), TypeError, "steps must be an int, got float 1.5"),
    (optimizer("set_grad_accum_steps", True), TypeError, "steps must be an int, got bool True"),
    (make(embedding_shape=[4, 0]), ValueError, "embedding_shape must be at least 1, got 0"),
    (make(embedding_shape=[]), TypeError, r"ints such as \[64\], got \[\]"),
    (make(embedding_shape=[4.0]), TypeError, "embedding_shape must be an int, got float 4.0"),
    (make(embedding_shape=True), TypeError, "embedding_shape must be .*int.*got .*True"),
    (make(block_size=0), ValueError, "block_size must be at least 1, got 0"),
    (make(block_size=1.5), TypeError, "block_size must be an int, got float 1.5"),
    (make(dtype=torch.int64), TypeError, "dtype: .*float32, float64, .*got torch.int64"),
    pytest.param(make(device="cuda"), RuntimeError, "cuda engine cannot load", marks=NO_GPU),
    (make(device="meta"), ValueError, "device must be cpu or cuda, got meta"),
    (make(initializer=0.0), TypeError, "such as NormalInitializer.*got float"),
    (make(name=3), TypeError, "name must be a string or None, got int"),
    (make(grad_reduce_by="mean"), ValueError, "'worker' or 'id', got 'mean'"),
    (second("forward", IDS.float()), TypeError, r"int64.*torch.float32; use ids.long\(\)"),
    (second("forward", IDS > 1), TypeError, r"int64.*torch.bool; use ids.long\(\)"),
    (second("forward", [1, 2]), TypeError, "ids must be an int64 .*got list; use torch.tensor"),
    (
        second("forward", IDS, "ReadOnly"),
        TypeError,
        r"admit_hook.*AdmitHook\('ReadOnly'\), got str",
    ),
    (
        second("forward", IDS, AdmitHook("All")),
        ValueError,
        "must be one of 'ReadOnly', 'Frequency'.*, got 'All'; .*regist_admit",
    ),
    (lambda run: AdmitHook(3), TypeError, "name must be a string, got 3"),
    (lambda run: FilterHook("LRU", [3]), TypeError, r"params must be a dict, got \[3\]"),
    (
        second("forward", IDS, AdmitHook("ReadOnly", {"k": 1})),
        TypeError,
        r"ReadOnlyHookImpl takes no parameters \['k'\]",
    ),
    (
        lambda run: HashTable([2], filter_hook="LRU"),
        TypeError,
        r"filter_hook.*FilterHook\('GlobalStepFilter'\), got str",
    ),
    (
        lambda run: HashTable([2], filter_hook=FilterHook("LRU")),
        TypeError,
        r"filter_hook .*LRU.*missing a required argument: 'max_rows'; .* takes max_rows, name",
    ),
    (
        lambda run: HashTable([2], filter_hook=FilterHook("LRU", {"rows": 3, "max_rows": 3})),
        TypeError,
        "unexpected keyword argument 'rows'.* takes max_rows, name",
    ),
    (
        lambda run: HashTable([2], filter_hook=FilterHook("LRU", {"max_rows": 0})),
        ValueError,
        "max_rows must be.* at least 1",
    ),
    (
        lambda run: HashTable([2], filter_hook=FilterHook("LRU", {"max_rows": 5, "name": "seed"})),
        ValueError,
        "a slot's name.*got 'seed'",
    ),
    (make(slice=(0, 1, 2)), TypeError, r"slice.*gen_slice\(0, 4\), got \(0"),
    (make(children=["a", "b"]), ValueError, "coalesced=True"),
    (second("to", "meta"), ValueError, "device must be cpu or cuda, got meta"),
    (second("reserve", -1), ValueError, "n must be at least 0, got -1"),
    (second("grad", 0), ValueError, "acc_step must be at least 1, got 0"),
    (second("insert", TWO * 0.5, FULL), TypeError, "ids must be int64.*float32"),
    (second("insert", IDS[0], FULL), ValueError, r"\[3, 4\].*got \[2, 4\]"),
    (second("insert", TWO, FULL[:, 1:]), ValueError, r"\[2, 4\].*got \[2, 3\]"),
    (second("insert", TWO, FULL.double()), TypeError, r"got torch.float64; use \.to\("),
    (second("accept_grad", TWO * 0.5, FULL), TypeError, "rows must be int64.*float32"),
    (second("accept_grad", [0, 1], FULL), TypeError, "rows must be .*int64.*got list"),
    (second("accept_grad", TWO[None], FULL), ValueError, r"rows .* \[N\], got \[1, 2\]"),
    (second("accept_grad", TWO + 3, FULL), IndexError, "names row 4, .* has 4 rows"),
    (second("accept_grad", TWO - 1, FULL), IndexError, "names row -1, .* has 4 rows"),
    (second("accept_grad", TWO, FULL[:1]), ValueError, r"grad .*\[2, 4\].*got \[1, 4\]"),
    (second("accept_grad", TWO, FULL[:, 1:]), ValueError, r"grad .*\[2, 4\].*got \[2, 3\]"),
    (second("accept_grad", TWO, FULL.double()), TypeError, "float32, got torch.float64; use"),
    (second("accept_grad", TWO, [1.0]), TypeError, "grad must be a tensor, got list"),
    (lambda run: HALVES.accept_grad(TWO[:0], FULL[:0].double()), TypeError, "16 or torch.float32"),
]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(("call", "error", "text"), CALLS)
def test_bad_calls(call, error, text, steps):
    run, twin = Run(accumulate=steps), Run(accumulate=steps)
    for each in (run, twin):
        each.backward()
    refuses(run, error, text, lambda: call(run))
    goes_on(run, twin)


# ---------------------------------------------------------------------- load_state_dict

GONE = object()


def edit(state, path, value):
    """Set ``state[a][b][...]`` of the path "a.b..."; a function changes what is there."""
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    for key in parents:
        state = state[key]
    if value is GONE:
        del state[last]
    else:
        state[last] = value(state[last]) if callable(value) else value


def moments(change):
    return {"state.second.exp_avg": change, "state.second.exp_avg_sq": change}


def pending(**values):
    return {f"accumulation.grads.second.0.{key}": value for key, value in values.items()}


G0, G1 = "param_groups.0", "param_groups.1"
STEP = "'second'.*saved step must be an int of at least 1, got"
LOADS = {  # what is changed in a good state_dict, the text of the error
    "no state": ({"state": GONE}, "has no 'state'; is it"),
    "no groups": ({"param_groups": GONE}, "has no 'param_groups'; is it"),
    "new state": ({"state.third": {}}, "'third' that this optimizer has not"),
    "new gradients": ({"accumulation.grads.third": []}, "'third' that this optimizer has not"),
    "unknown": ({f"{G1}.params": ["third"]}, r"this optimizer has not: \['third'\]"),
    "missing": ({f"{G1}.params": []}, r"lacks tables that this optimizer has: \['second'\]"),
    "swapped": ({f"{G0}.params": ["second"], f"{G1}.params": ["first"]}, "make the same groups"),
    "merged": ({f"{G0}.params": ["first", "second"], G1: GONE}, "make the same groups"),
    "no lr": ({f"{G1}.lr": GONE}, "a saved param group has no 'lr'"),
    "no betas": ({f"{G1}.betas": GONE}, "a saved param group has no 'betas'"),
    "bad lr": ({f"{G1}.lr": NAN}, "lr must be .*got nan"),
    "bad betas": ({f"{G1}.betas": (0.9, 1.0)}, r"beta2 must be .*\[0, 1\), got 1.0"),
    **{
        f"step {'gone' if x is GONE else x}": ({"state.second.step": x}, STEP)
        for x in (GONE, 0, -3, 1.5, "3")
    },
    "no exp_avg": ({"state.second.exp_avg": GONE}, "'second'.*no matrix 'exp_avg'"),
    "other D": (moments(lambda x: x[:, :2]), "'second'.*D = 2, the table D = 4"),
    "float64": (moments(lambda x: x.double()), "'second'.*not converted between float64"),
    "other size": ({"state.second.exp_avg_sq": lambda x: x[1:]}, "'second'.*differ in shape"),
    "accumulation 0": ({"accumulation.grad_accum_steps": 0}, "grad_accum_steps .*least 1, got 0"),
    "state list": ({"state": []}, "saved 'state' must be a dict, got list"),
    "entry list": ({"state.second": []}, "'second'.*saved state must be a dict"),
    "accumulation None": ({"accumulation": None}, "saved 'accumulation' must be a dict"),
    "grads list": ({"accumulation.grads": []}, "saved 'grads' must be a dict, got list"),
    "piece": ({"accumulation.grads.second.0": 7}, "'second'.*gradient must be a dict, got 7"),
    "step True": ({"state.second.step": True}, STEP),
    "step tensor": ({"state.second.step": torch.tensor(1.5)}, STEP),
    "amsgrad": ({f"{G1}.amsgrad": True}, "amsgrad must be False"),
    "group": ({G1: 3}, "every saved param group must be a dict"),
    "accumulated -1": ({"accumulation.accumulated": -1}, "accumulated .*at least 0, got -1"),
}
NOT_IN_EMBEDDING = {
    "rows": (moments(lambda x: x[:3]), r"'second'.*shape \[3, 4\], the weight \[6, 4\]"),
    "of a HashTable": ({"state.second.ids": torch.arange(ROWS)}, "'second'.*HashTable"),
    "grads of one": ({"accumulation.grads.second.0": {"ids": IDS}}, "'second'.*are of a HashTable"),
    "no values": (pending(values=GONE), "'second'.*saved gradient.*values"),
    "two pieces": ({"accumulation.grads.second": lambda x: x * 2}, "2 gradients are saved"),
    "values' width": (pending(values=lambda x: x[:, 1:]), r"'second'.*\[6, 4\], one.*\[6, 3\]"),
    "dtype": (pending(values=lambda x: x.double()), "'second'.*float32, got torch.float64"),
    "row range": (pending(indices=lambda x: x + 6), "'second'.*saved gradient.*has 6 rows"),
}
NOT_IN_HASH = {
    "unknown ids": ({"state.second.ids": lambda x: x + 99}, "'second'.*4 ids.*load the model"),
    "no ids": ({"state.second.ids": GONE}, "'second'.*no ids.*HashTable"),
    "id twice": ({"state.second.ids": lambda x: x * 0 + x[0]}, "'second'.*name an id twice"),
    "count of ids": ({"state.second.ids": lambda x: x[1:]}, "'second': 3 ids.* 4 moments"),
    "no grad": (pending(grad=GONE), "'second'.*saved gradient.*grad"),
    "grads of none": ({"accumulation.grads.second.0": {"indices": IDS}}, "'second'.*have no ids"),
    "grad width": (pending(grad=lambda x: x[:, 1:]), r"'second'.*\[6, 4\], one row.*\[6, 3\]"),
    "dtype": (pending(grad=lambda x: x.double()), "'second'.*float32, got torch.float64"),
    "grad ids": (pending(ids=lambda x: x + 99), "'second'.*gradients.*load the model first"),
}


@pytest.mark.parametrize(
    ("kind", "case", "error"),
    [
        pytest.param(kind, case, TypeError if name == "dtype" else ValueError, id=f"{kind}-{name}")
        for kind, own in [("embedding", NOT_IN_EMBEDDING), ("hash", NOT_IN_HASH)]
        for name, case in {**LOADS, **own}.items()
    ],
)
def test_loading_what_does_not_fit(kind, case, error):
    """Into an optimizer that has trained less and has a micro-batch pending."""
    changes, text = case
    source = Run(kind, accumulate=3, updates=3)
    run, twin = Run(kind, accumulate=2), Run(kind, accumulate=2)
    for each in (source, run, twin):
        each.train()
    source.optimizer.param_groups[1]["lr"] = 0.3
    state = copy.deepcopy(source.optimizer.state_dict())
    for path, value in changes.items():
        edit(state, path, value)
    refuses(run, error, text, lambda: run.optimizer.load_state_dict(state))
    for each in (run, twin):
        each.train()
    goes_on(run, twin)


@BOTH
def test_moments_are_not_converted_to_doubles(kind):
    run, state = Run(kind, torch.float64), Run(kind, torch.bfloat16).optimizer.state_dict()
    text = "'second'.*moments are not converted between float64"
    refuses(run, ValueError, text, lambda: run.optimizer.load_state_dict(state))
    goes_on(run, Run(kind, torch.float64))


def test_the_model_is_loaded_first():
    source, run = Run(updates=3), Run(updates=0)
    state = source.optimizer.state_dict()
    text = "'second'.*4 ids that the table does not hold; load the model first"
    refuses(run, ValueError, text, lambda: run.optimizer.load_state_dict(state))
    for ours, theirs in zip(run.tables.values(), source.tables.values(), strict=True):
        ours.load_state_dict(theirs.state_dict())
    run.optimizer.load_state_dict(state)
    goes_on(run, source)
