"""What steps are compared: this package's and others', each on the same tables and gradients.

A rival is made from a ``Case``; its ``work(k)`` is one step with the k-th gradient set. What it
times is what removes duplicates and updates. Of the dense optimizers that leaves out how the dense
gradient comes about, which backward does; of FBGEMM and dynamicemb it is the backward pass, into
which their optimizers are fused, with the output's gradient given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import gpu_harness
import torch
from gpu_harness import Work, require, sparse

from cupy_sparse_adamw import SparseAdamW, functional

#: Of every optimizer here.
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 1e-2

#: A table's gradients: rows [N] int64 and values [N, D].
Grads = tuple[torch.Tensor, torch.Tensor]


class Case:
    """Tables and sets of their gradients.

    Args:
        num_rows: R of each table.
        dim: D.
        rows: for each set, the rows [N] int64 of each table.
        dtype: of tables and gradients.
        is_coalesced: each table's rows are distinct and ascend, and gradients say so.
    """

    def __init__(
        self,
        num_rows: Sequence[int],
        dim: int,
        rows: Sequence[Sequence[torch.Tensor]],
        dtype: torch.dtype = torch.float32,
        is_coalesced: bool = False,
    ) -> None:
        device = gpu_harness.DEVICE
        self.dim, self.dtype = dim, dtype
        self.weights = [
            torch.nn.Parameter(torch.full((n, dim), 0.01, dtype=dtype, device=device))
            for n in num_rows
        ]
        self.sets: list[list[Grads]] = [
            [(r, torch.randn(len(r), dim, dtype=dtype, device=device)) for r in of_tables]
            for of_tables in rows
        ]
        self.grads = [
            [
                sparse(*pair, n)._coalesced_(is_coalesced)
                for pair, n in zip(of_tables, num_rows, strict=True)
            ]
            for of_tables in self.sets
        ]
        self.size = sum(len(r) for r, _ in self.sets[0])
        self.touched = sum(r.unique().numel() for r, _ in self.sets[0])

    def floor_bytes(self) -> int:
        """What an ideal step moves.

        Weights and moments of touched rows are read and written, each gradient and its row number
        are read: in fp32 24 U D + 4 N D + 8 N.
        """
        moment, element = 4, self.dtype.itemsize
        row = 2 * self.dim * (element + 2 * moment)
        return self.touched * row + self.size * (self.dim * element + 8)

    def views(self) -> list[torch.nn.Parameter]:
        """Parameters over the same memory: an optimizer of ours owns its parameters."""
        return [torch.nn.Parameter(weight.detach()) for weight in self.weights]


class Rival:
    """A step of somebody's.

    Attributes:
        work: the step with the k-th gradient set.
        optimizer: where there is one.
    """

    def __init__(
        self,
        step: Callable[[], object],
        prepare: Callable[[int], object] = lambda k: None,
        may_wait: bool = True,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self._step, self._prepare, self._may_wait = step, prepare, may_wait
        self.optimizer = optimizer

    def work(self, k: int) -> Work:
        return Work(self._step, lambda: self._prepare(k), self._may_wait)

    def rotating(self, sets: int) -> Work:
        """The gradient sets in turn."""
        turn = iter(range(1 << 62))
        return Work(self._step, lambda: self._prepare(next(turn) % sets), self._may_wait)


def give(weights: Sequence[torch.nn.Parameter], case: Case, k: int) -> None:
    """Let the weights have the k-th gradient set."""
    for weight, grad in zip(weights, case.grads[k], strict=True):
        weight.grad = grad


def ours(case: Case) -> Rival:
    """This package, checked for its first step."""
    weights = case.views()
    tables = {f"table {i}": weight for i, weight in enumerate(weights)}
    optimizer = SparseAdamW(tables, LR, *BETAS, EPS, DECAY)

    give(weights, case, 0)
    require_right(case, weights[-1], optimizer)
    return Rival(optimizer.step, partial(give, weights, case), False, optimizer)


def require_right(case: Case, weight: torch.nn.Parameter, optimizer: SparseAdamW) -> None:
    """Take the first step; raise CheckFailed unless the last table is what the formula says."""
    rows, values = case.sets[0][-1]
    unique, inverse = rows.unique(return_inverse=True)
    before = weight.detach()[unique].double()
    optimizer.step()
    total = torch.zeros(unique.numel(), case.dim, dtype=torch.float64, device=values.device)
    total.index_add_(0, inverse, values.double())
    # After one step the corrected moments are the gradient and its square.
    expected = before - LR * (total / (total.abs() + EPS) + DECAY * before)
    error = (weight.detach()[unique].double() - expected).abs()
    error[total.abs() < 1e-4] = 0  # the sign of a sum near 0 may be anything
    limit = 1e-6 if case.dtype == torch.float32 else torch.finfo(case.dtype).eps * 0.01
    require(error.max() <= limit, f"a step of {case.dtype} tables is off by {error.max():.1e}")


def reference(case: Case) -> Rival:
    """This package's plain torch implementation."""
    weights = case.views()
    tables = {f"table {i}": weight for i, weight in enumerate(weights)}
    optimizer = SparseAdamW(tables, LR, *BETAS, EPS, DECAY)

    def step() -> None:
        with functional.use_engine("reference"):
            optimizer.step()

    return Rival(step, partial(give, weights, case), optimizer=optimizer)


def sparse_adam(case: Case) -> Rival:
    """torch.optim.SparseAdam, which has no weight decay."""
    weights = case.views()
    optimizer = torch.optim.SparseAdam(weights, LR, BETAS, EPS)

    return Rival(optimizer.step, partial(give, weights, case), optimizer=optimizer)


def dense_adamw(case: Case, **options: bool) -> Rival:
    """torch.optim.AdamW on whole tables; their dense gradients are there already."""
    weights = case.views()
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW(weights, LR, BETAS, EPS, DECAY, **options)

    def prepare(k: int) -> None:
        for weight, (rows, values) in zip(weights, case.sets[k], strict=True):
            weight.grad.zero_().index_add_(0, rows, values)

    return Rival(optimizer.step, prepare, optimizer=optimizer)


def foreach_adamw(case: Case) -> Rival:
    """torch.optim.AdamW(foreach=True)."""
    return dense_adamw(case, foreach=True)


def fused_adamw(case: Case) -> Rival:
    """torch.optim.AdamW(fused=True)."""
    return dense_adamw(case, fused=True)


def chunked_adamw(case: Case, chunk: int = 1 << 18) -> Rival:
    """What a careful user would write: gather rows, torch's fused AdamW on them, scatter."""
    weights = [weight.detach() for weight in case.weights]
    moments = [
        [torch.zeros(w.shape, dtype=torch.float32, device=w.device) for w in weights]
        for _ in range(2)
    ]
    t = [torch.zeros((), device=weights[0].device)]
    current: list[list[Grads]] = []

    def step() -> None:
        torch._foreach_add_(t, 1)
        for weight, first, second, (rows, values) in zip(
            weights, *moments, current[0], strict=True
        ):
            unique, inverse = rows.unique(return_inverse=True)
            total = torch.zeros(unique.numel(), case.dim, device=rows.device)
            total.index_add_(0, inverse, values.float())
            for part, grad in zip(unique.split(chunk), total.split(chunk), strict=True):
                x = [weight[part].float(), first[part], second[part]]
                torch._fused_adamw_(
                    [x[0]], [grad], [x[1]], [x[2]], [], t, lr=LR, beta1=BETAS[0], beta2=BETAS[1],
                    weight_decay=DECAY, eps=EPS, amsgrad=False, maximize=False,
                )  # fmt: skip
                for whole, values_of_part in zip((weight, first, second), x, strict=True):
                    whole[part] = values_of_part.to(whole.dtype)

    def prepare(k: int) -> None:
        current[:] = [case.sets[k]]

    return Rival(step, prepare)


# ---------------------------------------------------------------------- other packages


def fbgemm_adam(case: Case) -> Rival:
    """FBGEMM's backward with Adam fused into it, its output's gradient given."""
    import fbgemm_gpu  # noqa: F401 - loads the operators
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
        BoundsCheckMode,
        EmbeddingLocation,
        PoolingMode,
    )
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(weight.shape[0], case.dim, *place) for weight in case.weights],
        optimizer=EmbOptimType.ADAM,
        learning_rate=LR,
        eps=EPS,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=DECAY,
        stochastic_rounding=False,
        pooling_mode=PoolingMode.NONE,
        bounds_check_mode=BoundsCheckMode.NONE,
        device=torch.device(gpu_harness.DEVICE),
    )
    return _by_backward(case, tables)


def dynamicemb_adam(case: Case) -> Rival:
    """NVIDIA's dynamicemb: backward with Adam in it, and its own removal of duplicates."""
    from dynamicemb import (
        DynamicEmbInitializerArgs,
        DynamicEmbInitializerMode,
        DynamicEmbPoolingMode,
        DynamicEmbScoreStrategy,
        DynamicEmbTableOptions,
        EmbOptimType,
    )
    from dynamicemb.batched_dynamicemb_tables import BatchedDynamicEmbeddingTablesV2

    options = [
        DynamicEmbTableOptions(
            index_type=torch.int64,
            embedding_dtype=case.dtype,
            dim=case.dim,
            max_capacity=2 * weight.shape[0],
            local_hbm_for_values=8 * weight.shape[0] * case.dim * 4,
            initializer_args=DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.NORMAL),
            score_strategy=DynamicEmbScoreStrategy.TIMESTAMP,
        )
        for weight in case.weights
    ]
    tables = BatchedDynamicEmbeddingTablesV2(
        table_options=options,
        table_names=[f"table {i}" for i in range(len(options))],
        pooling_mode=DynamicEmbPoolingMode.NONE,
        output_dtype=case.dtype,
        device=torch.device(gpu_harness.DEVICE),
        optimizer=EmbOptimType.ADAM,
        learning_rate=LR,
        eps=EPS,
        weight_decay=DECAY,
        beta1=BETAS[0],
        beta2=BETAS[1],
    )
    return _by_backward(case, tables)


def _by_backward(case: Case, tables: Callable[..., torch.Tensor]) -> Rival:
    """Steps of tables that update in backward: the lookup is not timed, backward is."""
    device = gpu_harness.DEVICE
    inputs = [
        (
            torch.cat([rows for rows, _ in of_tables]),
            torch.arange(case.size + 1, device=device),
            torch.cat([values for _, values in of_tables]),
        )
        for of_tables in case.sets
    ]
    current: list[tuple[torch.Tensor, torch.Tensor]] = []

    def prepare(k: int) -> None:
        indices, offsets, grad = inputs[k]
        current[:] = [(tables(indices, offsets), grad)]

    def step() -> None:
        out, grad = current[0]
        out.backward(grad.view_as(out))

    return Rival(step, prepare)


def recis_adamw(case: Case) -> Rival:
    """RecIS's HashTables and SparseAdamW: its step, which removes duplicates."""
    from recis.nn.modules.hashtable import HashTable, filter_out_sparse_param
    from recis.optim import SparseAdamW as RecisAdamW

    tables = torch.nn.ModuleList(
        HashTable([case.dim], 1024, case.dtype, torch.device(gpu_harness.DEVICE), name=f"table {i}")
        for i in range(len(case.weights))
    )
    optimizer = RecisAdamW(filter_out_sparse_param(tables), lr=LR, weight_decay=DECAY)

    def prepare(k: int) -> None:
        optimizer.zero_grad()
        for table, (rows, values) in zip(tables, case.sets[k], strict=True):
            table(rows).backward(values)

    return Rival(optimizer.step, prepare)


#: By the name in results. The first four know any case; the rest need packages, or whole tables.
TORCHS = {
    "torch SparseAdam": sparse_adam,
    "gather, fused AdamW, scatter": chunked_adamw,
}
WHOLE_TABLES = {
    "torch AdamW (foreach), whole tables": foreach_adamw,
    "torch AdamW (fused), whole tables": fused_adamw,
}
PACKAGES = {
    "FBGEMM backward + Adam": fbgemm_adam,
    "dynamicemb backward + Adam": dynamicemb_adam,
    "RecIS SparseAdamW": recis_adamw,
}
OWN = {"this package's reference": reference}
