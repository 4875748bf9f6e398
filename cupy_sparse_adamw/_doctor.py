"""What ``python -m cupy_sparse_adamw`` asks of an engine: are its results right, how fast is it.

Everything goes through ``functional`` on small slots of its own; no state outlives a call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from . import functional
from ._slots import Slot
from ._types import (
    MISSING,
    MOMENT_DTYPE,
    Distribution,
    DistributionKind,
    Hyperparams,
    Kind,
    Lagging,
    Pending,
    PendingGrad,
    RowIndex,
    Update,
)
from .missed_steps import MissedSteps, step_scalars

#: A rate and a decay whose effect a 16-bit table can show, and an eps that underflows in float16.
HYPER = Hyperparams(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)

#: What new rows are drawn from.
SEED = 2026
NORMAL = Distribution(DistributionKind.NORMAL, loc=0.5, scale=2.0)

#: Largest max|x - x64| / max|x64| of (weights, moments): SPEC §1. 16-bit weights must instead lie
#: within one unit in the last place of the float64 result.
TOLERANCE = {
    torch.float32: (2e-6, 1e-6),
    torch.float64: (1e-12, 1e-12),
    torch.float16: (None, 1e-6),
    torch.bfloat16: (None, 1e-6),
}

#: What rows that missed steps get, and in which tables: "dense" is by rules, or step by step.
UNTOUCHED = (("decay", torch.float32), ("dense", torch.float32), ("dense", torch.float64))


class Case(NamedTuple):
    """One update: a table's values [R, D] before it, and gradients ``grad`` [N, D] of ``rows``."""

    param: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    rows: torch.Tensor
    grad: torch.Tensor
    step: int = 3


class Size(NamedTuple):
    """What the speed is measured on: a table [rows, dim], ``ids`` gradient rows a step."""

    rows: int
    ids: int
    dim: int


class Speed(NamedTuple):
    """Per second, medians: rows touched and bytes moved by steps of ``ids``; bytes copied."""

    ids: int
    rows: float
    step_bytes: float
    copy_bytes: float


def check(engine: str) -> list[str]:
    """What is wrong with an engine's results, one phrase each; nothing if they are right."""
    problems = [problem for dtype in TOLERANCE for problem in check_update(engine, dtype)]
    for case in UNTOUCHED:
        problems += check_untouched(engine, *case)
    return problems + check_index(engine) + check_deletion(engine) + check_initial_rows(engine)


def check_update(engine: str, dtype: torch.dtype) -> list[str]:
    """Compare one update with float64: with the reference, and that with torch.optim.AdamW."""
    draw = torch.Generator().manual_seed(0)
    shape, moment_dtype = (50, 33), MOMENT_DTYPE[dtype]  # 33: whole vectors and a tail
    rows = torch.randint(0, 45, (5000,), generator=draw)  # rows 45 to 49 get no gradient
    rows[::2] = 7  # so long that an engine splits it
    case = Case(
        torch.randn(shape, generator=draw).to(dtype),
        torch.randn(shape, generator=draw).to(moment_dtype),
        torch.rand(shape, generator=draw).to(moment_dtype),
        rows,
        torch.randn(5000, 33, generator=draw).to(dtype),
    )
    for row, scale in ((3, 0.0), (4, 1e-7)):  # here eps decides
        case.exp_avg[row] = case.exp_avg_sq[row] = 0.0
        case.grad[rows == row] *= scale
    wide = case._replace(
        param=case.param.double(),
        exp_avg=case.exp_avg.double(),
        exp_avg_sq=case.exp_avg_sq.double(),
        grad=case.grad.double(),
    )
    exact = torch_adamw(wide) if engine == "reference" else updated("reference", wide)
    limit, moment_limit = TOLERANCE[dtype]
    limits = {"weights": limit, "exp_avg": moment_limit, "exp_avg_sq": moment_limit}
    problems = []
    for name, before, x, x64 in zip(limits, case[:3], updated(engine, case), exact, strict=True):
        where = f"{name} of a {str(dtype).removeprefix('torch.')} table"
        if not torch.equal(x[45:], before[45:]):
            problems.append(f"{where} change where there is no gradient")
        problems += too_far(where, x, x64, limits[name])
    return problems


def too_far(where: str, x: torch.Tensor, x64: torch.Tensor, allowed: float | None) -> list[str]:
    """What is wrong with ``x``, which should be ``x64``; see ``TOLERANCE``."""
    if allowed is None:
        if within_one_ulp(x, x64):
            return []
        return [f"{where} are more than one unit in the last place off"]
    error = float((x - x64).abs().max() / x64.abs().max())
    if error <= allowed:
        return []
    return [f"{where} are off by {error:.1e}, allowed is {allowed:.0e}"]  # NaN too


def within_one_ulp(x: torch.Tensor, exact: torch.Tensor) -> bool:
    """Each element is the exact value rounded to its dtype, or a neighbour of that."""
    rounded, infinity = exact.to(x.dtype), torch.full_like(x, torch.inf)
    below, above = torch.nextafter(rounded, -infinity), torch.nextafter(rounded, infinity)
    return bool(((x >= below) & (x <= above)).all())


def updated(engine: str, case: Case) -> list[torch.Tensor]:
    """Weights and moments [R, D] after one update by an engine, on the CPU."""
    device, size = device_of(engine), case.param.shape[0]
    every_row = torch.arange(size, device=device)
    with functional.use_engine(engine):
        slots = [slot_of(values, device) for values in case[:3]]
        t = torch.tensor(case.step - 1, device=device)
        step(slots, case.rows.to(device), case.grad.to(device), size, t)
        return [functional.gather(slot, every_row).cpu() for slot in slots]


def slot_of(values: torch.Tensor, device: torch.device) -> Slot:
    """A slot that holds ``values`` [R, D], by the engine in use."""
    slot = Slot("doctor", values.shape[1], 16, values.dtype, device)
    slot.reserve(1)  # the first block apart from the others
    slot.reserve(values.shape[0])
    functional.scatter_(slot, torch.arange(values.shape[0], device=device), values.to(device))
    return slot


def step(
    slots: list[Slot],
    rows: torch.Tensor,
    grad: torch.Tensor,
    size: int,
    t: torch.Tensor,
    lagging: Lagging | None = None,
) -> None:
    """The step after ``t`` [] int64 of a table of ``size`` rows, on the engine in use."""
    param, exp_avg, exp_avg_sq = slots
    pending = Pending("doctor", param, size, [PendingGrad(rows, grad)])
    update = Update(pending, exp_avg, exp_avg_sq, t, HYPER)
    if lagging is not None:
        pending.kind = Kind(lagging.untouched)
        update.last_step, update.missed = lagging.last_step, lagging.missed
    functional.prepare_sparse_adamw([update], functional.segment([pending]))()


def torch_adamw(case: Case) -> list[torch.Tensor]:
    """The same update by torch.optim.AdamW, which gets the touched rows alone."""
    result = [values.clone() for values in case[:3]]
    touched = case.rows.unique()
    param, exp_avg, exp_avg_sq = (values[touched] for values in result)
    weight = torch.nn.Parameter(param)
    weight.grad = torch.zeros_like(case.param).index_add(0, case.rows, case.grad)[touched]
    lr, beta1, beta2, eps, weight_decay, *_ = HYPER
    optimizer = torch.optim.AdamW([weight], lr, (beta1, beta2), eps, weight_decay)
    state = {"step": torch.tensor(case.step - 1.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    optimizer.state[weight] = state
    optimizer.step()
    for values, after in zip(result, (weight.detach(), exp_avg, exp_avg_sq), strict=True):
        values[touched] = after
    return result


def check_untouched(engine: str, untouched: str, dtype: torch.dtype) -> list[str]:
    """Read rows that missed steps, update half of them, bring the others up to date.

    All beside torch.optim.AdamW in float64 with zero gradients, or the decay alone.
    """
    draw = torch.Generator().manual_seed(0)
    t, shape, moment_dtype = 30, (40, 33), MOMENT_DTYPE[dtype]
    last_step = torch.tensor([10, 20, t - 1, t]).repeat(10)
    values = [
        torch.randn(shape, generator=draw).to(dtype),
        torch.randn(shape, generator=draw).to(moment_dtype),
        torch.rand(shape, generator=draw).to(moment_dtype),
    ]
    values[1][4:8] *= 1e-8  # here eps decides
    values[2][4:8] *= 1e-16
    touched, others = torch.arange(40).chunk(2)
    grad = torch.randn(20, 33, generator=draw).to(dtype)

    param, exp_avg, exp_avg_sq = (x.double() for x in values)
    for j in range(int(last_step.min()) + 1, t + 1):
        behind = (last_step < j).nonzero().flatten()
        if untouched == "decay":
            param[behind] *= 1 - HYPER.lr * HYPER.weight_decay
        else:
            zeros = param.new_zeros(len(behind), 33)
            missing = Case(param, exp_avg, exp_avg_sq, behind, zeros, j)
            param, exp_avg, exp_avg_sq = torch_adamw(missing)
    exact = torch_adamw(Case(param, exp_avg, exp_avg_sq, touched, grad.double(), t + 1))

    device = device_of(engine)
    every_row = torch.arange(40, device=device)
    with functional.use_engine(engine):
        log = MissedSteps(untouched == "dense")
        for j in range(1, t + 1):
            log.advance(step_scalars(HYPER, j))
        slots = [slot_of(x, device) for x in values]
        last = slot_of(last_step.int()[:, None], device)
        missed, kind = log.on(device, dtype), log.kind(dtype)
        lagging = Lagging(slots[0], slots[1], slots[2], last, missed, kind)
        read = functional.gather_current(lagging, every_row).cpu()
        now = torch.tensor(t, device=device)
        step(slots, touched.to(device), grad.to(device), 40, now, lagging)
        functional.catch_up_(lagging, others.to(device))
        after = [functional.gather(slot, every_row).cpu() for slot in slots]
        steps = functional.gather(last, every_row).flatten().tolist()
    where = f"in a {str(dtype).removeprefix('torch.')} table with untouched={untouched!r}"
    limit, moment_limit = TOLERANCE[dtype]
    problems = too_far(f"weights read {where}", read, param, limit)
    names, limits = ("weights", "exp_avg", "exp_avg_sq"), (limit, moment_limit, moment_limit)
    for name, x, x64, allowed in zip(names, after, exact, limits, strict=True):
        problems += too_far(f"{name} {where}", x, x64, allowed)
    if steps != [t + 1] * 20 + [t] * 20:
        problems.append(f"steps of last updates {where} are wrong")
    return problems


def check_index(engine: str) -> list[str]:
    """Insert ids, some twice, into a hash table and find them; look at what their rows hold."""
    device = device_of(engine)
    ids = 2 * torch.randint(-300, 300, (1000,), generator=torch.Generator().manual_seed(0))
    ids[:4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    absent = torch.tensor([1, 3, 5])
    index, ids_by_row, embedding = empty_index(device)
    with functional.use_engine(engine):
        inserted = functional.find_or_insert_(
            index, ids.to(device), ids_by_row, embedding, SEED, NORMAL
        )
        found = functional.find(index.entries, torch.cat([ids, absent]).to(device)).cpu()
        noted = functional.gather(ids_by_row, inserted).cpu().flatten()
        values = functional.gather(embedding, inserted).cpu()
    rows, problems = inserted.cpu(), []
    pairs, count = set(zip(ids.tolist(), rows.tolist(), strict=True)), ids.unique().numel()
    counters = index.counters.tolist()
    if sorted(row for _, row in pairs) != list(range(count)) or counters != [count, 0, 0]:
        problems.append("the hash table does not give each id a row of its own")
    if not torch.equal(found, torch.cat([rows, torch.full_like(absent, MISSING)])):
        problems.append("the hash table does not find what it holds")
    if not torch.equal(noted, ids):
        problems.append("the hash table notes other ids")
    if not near(values, initial_rows("reference", ids)):
        problems.append("rows of new ids do not hold their initial values")
    return problems


def empty_index(device: torch.device) -> tuple[RowIndex, Slot, Slot]:
    """An index, and slots for ids and embeddings: with more room than rows, as engines may err."""
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    entries = torch.full((2048, 2), MISSING, device=device)
    free_rows = torch.empty(2048, dtype=torch.int64, device=device)
    ids_by_row = Slot("doctor", 1, 16, torch.int64, device)
    embedding = Slot("doctor", 33, 16, torch.float32, device)
    for slot in (ids_by_row, embedding):
        slot.reserve(2048)
    return RowIndex(entries, counters, free_rows), ids_by_row, embedding


def check_deletion(engine: str) -> list[str]:
    """Take ids out of a hash table, some named twice; the next new ids must get their rows."""
    device = device_of(engine)
    ids, new_ids = torch.arange(600), torch.arange(1000, 1100)
    gone = torch.cat([ids[::6], ids[:60:6], torch.tensor([-5])])
    index, ids_by_row, embedding = empty_index(device)

    def insert(ids: torch.Tensor) -> torch.Tensor:
        return functional.find_or_insert_(
            index, ids.to(device), ids_by_row, embedding, SEED, NORMAL
        ).cpu()

    with functional.use_engine(engine):
        rows = insert(ids)
        freed = functional.delete_(index, gone.to(device)).cpu()
        found = functional.find(index.entries, ids.to(device)).cpu()
        reused = insert(new_ids)
    is_gone, problems = torch.isin(ids, gone), []
    its_rows = sorted(rows[is_gone].tolist())
    if sorted(freed[freed != MISSING].tolist()) != its_rows:
        problems.append("deleting ids does not free each of their rows once")
    if not torch.equal(found, torch.where(is_gone, MISSING, rows)):
        problems.append("the hash table finds what was deleted, or loses what was not")
    if sorted(reused.tolist()) != its_rows or index.counters.tolist() != [ids.numel(), 0, 0]:
        problems.append("new ids do not get the rows of deleted ones")
    return problems


def check_initial_rows(engine: str) -> list[str]:
    """Draw rows of new ids; compare with the reference, and a row with itself drawn alone."""
    ids = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), *range(100, 150)])
    rows, problems = initial_rows(engine, ids), []
    if not near(rows, initial_rows("reference", ids)):
        problems.append("initial rows differ from the reference's")
    if not torch.equal(rows[3:4], initial_rows(engine, ids[3:4])):
        problems.append("an initial row depends on the ids beside it")
    return problems


def near(rows: torch.Tensor, expected: torch.Tensor) -> bool:
    """Values drawn from ``NORMAL`` agree as SPEC §2 wants across kinds of devices."""
    return bool((rows - expected).abs().max() <= 1e-6 * (NORMAL.loc + NORMAL.scale))


def initial_rows(engine: str, ids: torch.Tensor) -> torch.Tensor:
    """Rows [n, 33] drawn for ids [n] from ``NORMAL``, on the CPU."""
    device = device_of(engine)
    slot = Slot("doctor", 33, 16, torch.float32, device)
    slot.reserve(ids.numel())
    rows = torch.arange(ids.numel(), device=device)
    with functional.use_engine(engine):
        functional.init_rows_(slot, rows, ids.to(device), SEED, NORMAL)
        return functional.gather(slot, rows).cpu()


def measure(engine: str, size: Size) -> Speed:
    """Time steps of a float32 table and plain copies in turn, for about 1.5 seconds.

    A step of N gradient rows of width D that touches U rows reads each gradient (4 N D bytes) and
    its row number (8 N), and reads and writes weights and moments (24 U D). A copy of half the
    weights (128 MB) also sees to it that no step finds its rows in a cache.
    """
    device = device_of(engine)
    slots = [
        Slot.over(name, torch.full((size.rows, size.dim), 0.01, device=device))
        for name in ("weights", "exp_avg", "exp_avg_sq")
    ]
    grad = torch.full((size.ids, size.dim), 0.01, device=device)
    source = slots[0].value()[: size.rows // 2]
    target = torch.empty_like(source)
    t = torch.tensor(0, device=device)
    rates: list[tuple[float, float, float]] = []
    begin = time.perf_counter()
    with functional.use_engine(engine):
        # The first round is not counted.
        while len(rates) < 3 or (len(rates) < 50 and time.perf_counter() - begin < 1.5):
            rows = torch.randint(size.rows, (size.ids,), device=device)
            touched = rows.unique().numel()
            copying = seconds(partial(target.copy_, source))
            stepping = seconds(partial(step, slots, rows, grad, size.rows, t))
            moved = 24 * touched * size.dim + 4 * size.ids * size.dim + 8 * size.ids
            rates.append((touched / stepping, moved / stepping, 2 * source.nbytes / copying))
    return Speed(size.ids, *(statistics.median(rate) for rate in zip(*rates[1:], strict=True)))


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes, the GPU's part of it included."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def device_of(engine: str) -> torch.device:
    """Where an engine's tables lie."""
    return torch.device("cuda" if engine == "cuda" else "cpu")
