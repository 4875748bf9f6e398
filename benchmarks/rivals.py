"""Who is timed: this package, and what else updates the touched rows of a table.

Each class takes a ``Workload``, builds tables of its own, and then ``load`` (not timed) hands it a
gradient set that ``step`` (timed) applies. ``check`` compares what came out with float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from types import MappingProxyType

import torch
from cases import CHECKED, SETS, Workload, find

from cupy_sparse_adamw import SparseAdamW, _memory, functional

LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8
DECAY = 0.01

#: Of max|x - x64| after the checked steps: fp32 rounding of steps of LR on weights of a few units.
TOLERANCE = 5e-6


class NotPossible(Exception):
    """A rival cannot do a case here; the text says why."""


class Contender:
    """Somebody whose ``step`` is timed.

    Attributes:
        name: the column in the table of results.
        rule: what it computes: "adamw" of touched rows, "dense adamw" of all rows, "sparse adam",
            whose ε is beside √v and not √v̂, or "adagrad" with one accumulator a row.
        decay: its weight decay.
        copies: how many times the tables' bytes it needs, for the check of free memory.
    """

    name = ""
    rule = "adamw"
    decay = DECAY
    copies = 3.0

    def __init__(self, work: Workload) -> None:
        self.work = work

    def load(self, turn: int) -> None:
        """Make the gradients of set ``turn`` those of the next step. Not timed."""
        raise NotImplementedError

    def step(self) -> None:
        """Apply the gradients. Timed."""
        raise NotImplementedError

    def weights(self) -> list[torch.Tensor]:
        """Each table's weights [rows, dim] as they are now."""
        raise NotImplementedError


class WithOptimizer(Contender):
    """Parameters with sparse gradients and an optimizer made by ``make``."""

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.params = [torch.nn.Parameter(weight) for weight in work.new_weights()]
        self.optimizer = self.make()

    def make(self) -> torch.optim.Optimizer:
        raise NotImplementedError

    def grads(self, turn: int) -> list[torch.Tensor]:
        return self.work.grads[turn % SETS]

    def load(self, turn: int) -> None:
        for param, grad in zip(self.params, self.grads(turn), strict=True):
            param.grad = grad

    def step(self) -> None:
        self.optimizer.step()

    def weights(self) -> list[torch.Tensor]:
        return [param.detach() for param in self.params]


class Ours(WithOptimizer):
    name = "SparseAdamW"

    def make(self) -> torch.optim.Optimizer:
        tables = {f"table {i}": param for i, param in enumerate(self.params)}
        return SparseAdamW(tables, LR, BETA1, BETA2, EPS, DECAY)


class Reference(Ours):
    """This package's plain torch, the specification in code."""

    name = "reference"
    #: Gradient rows and tables beyond which it is left out: a million and 1,200 take 1 to 2 s.
    MOST_ROWS, MOST_TABLES = 280_000, 300

    def __init__(self, work: Workload) -> None:
        case = work.case
        if case.tables * case.count > self.MOST_ROWS or case.tables > self.MOST_TABLES:
            raise NotPossible(
                f"left out beyond {self.MOST_ROWS:,} gradient rows or {self.MOST_TABLES} tables, "
                f"for time's sake"
            )
        super().__init__(work)

    def step(self) -> None:
        with functional.use_engine("reference"):
            self.optimizer.step()


class SparseAdam(WithOptimizer):
    """torch's: no weight decay, and ε beside √v instead of √v̂."""

    name = "SparseAdam"
    rule = "sparse adam"
    decay = 0.0

    def make(self) -> torch.optim.Optimizer:
        return torch.optim.SparseAdam(self.params, LR, (BETA1, BETA2), EPS)


class DenseAdamW(WithOptimizer):
    """torch's AdamW on whole tables.

    Its dense gradient is there already: making it is not timed. It is one and the same for all
    timed steps, which no cache shows, since gradient, weights and moments are walked as a whole.
    """

    rule = "dense adamw"
    copies = 4.0
    implementation: Mapping[str, bool]

    def make(self) -> torch.optim.Optimizer:
        settings = {"weight_decay": DECAY, **self.implementation}
        return torch.optim.AdamW(self.params, LR, (BETA1, BETA2), EPS, **settings)

    def grads(self, turn: int) -> list[torch.Tensor]:
        return self.work.dense_grads(min(turn, 1))


class DenseForeach(DenseAdamW):
    name = "AdamW foreach"
    copies = 7.0  # its temporaries
    implementation = MappingProxyType({"foreach": True})


class DenseFused(DenseAdamW):
    name = "AdamW fused"
    implementation = MappingProxyType({"fused": True})


class GatherScatter(Contender):
    """What a careful user writes around torch's fused AdamW.

    Duplicates are summed by ``unique`` and ``index_add_``, which take a third to a half of
    ``coalesce``'s time. Rows are then gathered, updated and written back in chunks that stay in
    the cache.
    """

    name = "gather+fused+scatter"
    #: The best of 1,024 to 2^20 over D = 16, 64 and 128.
    CHUNK = 4096

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.tables = [
            (weight, torch.zeros_like(weight), torch.zeros_like(weight))
            for weight in work.new_weights()
        ]
        self.t = torch.tensor(0.0)
        self.turn = 0

    def load(self, turn: int) -> None:
        self.turn = turn % SETS

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        sets = zip(self.tables, self.work.ids[self.turn], self.work.values[self.turn], strict=True)
        for table, ids, values in sets:
            rows, inverse = torch.unique(ids, return_inverse=True)
            sums = values.new_zeros(len(rows), values.shape[1]).index_add_(0, inverse, values)
            for part, grad in zip(rows.split(self.CHUNK), sums.split(self.CHUNK), strict=True):
                weight, exp_avg, exp_avg_sq = gathered = [x.index_select(0, part) for x in table]
                torch._fused_adamw_(
                    [weight],
                    [grad],
                    [exp_avg],
                    [exp_avg_sq],
                    [],
                    [self.t],
                    lr=LR,
                    beta1=BETA1,
                    beta2=BETA2,
                    weight_decay=DECAY,
                    eps=EPS,
                    amsgrad=False,
                    maximize=False,
                )
                for whole, changed in zip(table, gathered, strict=True):
                    whole.index_copy_(0, part, changed)

    def weights(self) -> list[torch.Tensor]:
        return [table[0] for table in self.tables]


class Fbgemm(Contender):
    """FBGEMM's backward with row-wise Adagrad in it: on a CPU it has no Adam.

    One accumulator a row instead of two moments an element: 8 U D bytes of table traffic instead
    of 24 U D. The forward before it is not timed. Bags of one id each, because that is its fast
    kernel: without pooling it takes twenty times as long.
    """

    name = "FBGEMM (row-wise Adagrad)"
    rule = "adagrad"
    decay = 0.0
    copies = 1.2

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        case = work.case
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it has parts that need a GPU, and says so
                from fbgemm_gpu.split_embedding_configs import EmbOptimType
                from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
                    BoundsCheckMode,
                    ComputeDevice,
                    EmbeddingLocation,
                    PoolingMode,
                )
                from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
                    SplitTableBatchedEmbeddingBagsCodegen,
                )
        except Exception as error:  # not installed, or built for another torch
            raise NotPossible(f"FBGEMM cannot be imported: {error}".splitlines()[0]) from error
        table = (case.rows, case.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)
        self.bags = SplitTableBatchedEmbeddingBagsCodegen(
            [table] * case.tables,
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=LR,
            eps=EPS,
            stochastic_rounding=False,
            pooling_mode=PoolingMode.SUM,
            bounds_check_mode=BoundsCheckMode.NONE,
        )
        initial = work.initial()
        for weight in self.weights():
            if initial is None:
                weight.zero_()
            else:
                weight.copy_(initial)
        self.indices = [torch.cat(ids) for ids in work.ids]
        self.offsets = torch.arange(case.tables * case.count + 1)
        if case.tables == 1:
            self.grads = [values[0] for values in work.values]
        else:  # [count, tables * dim]
            self.grads = [values.transpose(0, 1).flatten(1) for values in work.values]

    def load(self, turn: int) -> None:
        self.output = self.bags(self.indices[turn % SETS], self.offsets)
        self.grad = self.grads[turn % SETS]

    def step(self) -> None:
        self.output.backward(self.grad)

    def weights(self) -> list[torch.Tensor]:
        return [weight.detach() for weight in self.bags.split_embedding_weights()]


#: Everybody beside us, in the order of the table's columns.
RIVALS: tuple[type[Contender], ...] = (
    SparseAdam,
    DenseForeach,
    DenseFused,
    GatherScatter,
    Fbgemm,
    Reference,
)


def enter(
    work: Workload, kinds: tuple[type[Contender], ...], free_bytes: float
) -> tuple[list[Contender], dict[str, str]]:
    """Build and check contenders.

    Args:
        kinds: their classes.
        free_bytes: memory that their tables may take altogether.

    Returns:
        Those that can do the case, and for the others: name -> why not.

    Raises:
        AssertionError: one gives a wrong result.
    """
    contenders: list[Contender] = []
    missing: dict[str, str] = {}
    for kind in kinds:
        needed = kind.copies * work.table_bytes
        if needed > free_bytes:
            missing[kind.name] = (
                f"needs {needed / 1e9:.1f} GB beside the others, {max(free_bytes, 0) / 1e9:.1f} GB "
                f"are free"
            )
            continue
        try:
            contender = kind(work)
        except NotPossible as reason:
            missing[kind.name] = str(reason)
            continue
        check(contender)
        contenders.append(contender)
        free_bytes -= needed
    return contenders, missing


def check(contender: Contender) -> None:
    """Run the first ``CHECKED`` steps; compare rows with float64, others bit for bit with before.

    Compared are the 16 rows with the most gradients, up to 4,096 others that are touched, drawn at
    random, and rows next to those that no gradient names.

    Raises:
        AssertionError: a row is not what it must be; the text names who and which table.
    """
    work = contender.work
    for turn in range(CHECKED):
        contender.load(turn)
        contender.step()
    _memory.wait_until_moved()  # begun by our first step; done before anybody is timed
    initial = work.initial()
    for table, weight in enumerate(contender.weights()):
        touched, untouched = work.sample(table)
        key = (table, contender.rule, contender.decay)
        if key not in work.expected:
            work.expected[key] = expected(work, touched, *key)
        error = (weight[touched].double() - work.expected[key]).abs().max().item()
        if not error <= TOLERANCE:
            raise AssertionError(
                f"{contender.name} is wrong on {work.case.name}: touched rows of table {table} are "
                f"off by {error:.1e}, allowed is {TOLERANCE:.0e}"
            )
        before = torch.zeros(1) if initial is None else initial[untouched]
        after = weight[untouched]
        if contender.rule == "dense adamw":
            decayed = before.double() * (1 - LR * contender.decay) ** CHECKED
            same = bool(((after.double() - decayed).abs() <= TOLERANCE).all())
        else:
            same = bool((after == before).all())
        if not same:
            raise AssertionError(
                f"{contender.name} is wrong on {work.case.name}: rows of table {table} that no "
                f"gradient names are not what they were"
            )


def expected(
    work: Workload, rows: torch.Tensor, table: int, rule: str, decay: float
) -> torch.Tensor:
    """What those steps must make of some rows of a table.

    Args:
        rows: [n] int64, ascending.

    Returns:
        Their weights [n, dim] float64.
    """
    initial = work.initial()
    shape = (len(rows), work.case.dim)
    weight = torch.zeros(shape).double() if initial is None else initial[rows].double()
    exp_avg, exp_avg_sq = torch.zeros_like(weight), torch.zeros_like(weight)
    for t in range(1, CHECKED + 1):
        places, found = find(rows, work.ids[t - 1][table])
        values = work.values[t - 1][table][found].double()
        grad = torch.zeros_like(weight).index_add_(0, places[found], values)
        mask = torch.zeros(len(rows), 1, dtype=torch.bool)
        mask[places[found]] = True
        if rule == "adagrad":
            exp_avg_sq += grad.square().mean(1, keepdim=True)
            weight -= torch.where(mask, LR * grad / (exp_avg_sq.sqrt() + EPS), 0.0)
            continue
        if rule == "dense adamw":
            mask[:] = True
        exp_avg += torch.where(mask, (1 - BETA1) * (grad - exp_avg), 0.0)
        exp_avg_sq += torch.where(mask, (1 - BETA2) * (grad.square() - exp_avg_sq), 0.0)
        correction2 = math.sqrt(1 - BETA2**t)
        if rule == "sparse adam":
            denom = (exp_avg_sq.sqrt() + EPS) / correction2
        else:
            denom = exp_avg_sq.sqrt() / correction2 + EPS
        change = exp_avg / (1 - BETA1**t) / denom + decay * weight
        weight -= torch.where(mask, LR * change, 0.0)
    return weight
