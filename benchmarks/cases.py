"""What is timed: tables, the rows that gradients name, and what an ideal step moves."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

#: Gradient sets that steps rotate among, so that none is still in the cache when its turn comes.
SETS = 4
#: How many of them, the first, are those whose steps are checked before anything is timed.
CHECKED = 2
#: The largest table that is filled with random values; larger ones begin as zeros, for time's sake.
MOST_RANDOM_ELEMENTS = 1 << 28


class Case(NamedTuple):
    """Tables [rows, dim], fp32, each with ``count`` gradient rows a step.

    ``zipf`` is the exponent of the ids' distribution: 0 is uniform, 1.2 has a few rows that fill
    the batch. ``hot`` is the share of a batch's ids that are made one and the same.
    ``distinct`` draws no row twice.
    """

    name: str
    dim: int
    count: int
    rows: int = 1 << 20
    tables: int = 1
    zipf: float = 0.0
    hot: float = 0.0
    distinct: bool = False


def draw_ids(case: Case, draw: torch.Generator) -> torch.Tensor:
    """Rows [count] int64 of one table in one step."""
    if case.distinct:
        ids = torch.randperm(case.rows, generator=draw)[: case.count]
    elif case.zipf == 0.0:
        ids = torch.randint(case.rows, (case.count,), generator=draw)
    else:
        shares = _zipf_shares(case.rows, case.zipf)
        ranks = torch.searchsorted(
            shares, torch.rand(case.count, generator=draw, dtype=torch.float64)
        )
        # Over shuffled rows, so that hot rows lie apart: the same ones in every set.
        places = torch.randperm(case.rows, generator=torch.Generator().manual_seed(1))
        ids = places[ranks.clamp_(max=case.rows - 1)]
    if case.hot:  # the others stay what they are in the same case without the hot id
        hot = torch.randperm(case.count, generator=draw)[: int(case.hot * case.count)]
        ids[hot] = case.rows // 3
    return ids


@functools.lru_cache(maxsize=2)
def _zipf_shares(rows: int, exponent: float) -> torch.Tensor:
    """The share [rows] of ids among the first 1, 2, ... ranks."""
    weights = torch.arange(1, rows + 1, dtype=torch.float64) ** -exponent
    return weights.cumsum(0) / weights.sum()


def floor_bytes(touched: float, count: int, dim: int) -> float:
    """Bytes that an ideal step moves in fp32: 24 U D + 4 N D + 8 N.

    Each touched row's weights and both moments are read and written once, each gradient and each
    row number is read once.

    Args:
        touched: U, the distinct rows.
        count: N, the gradient rows.
        dim: D.
    """
    return 24 * touched * dim + 4 * count * dim + 8 * count


def lookup_bytes(count: int, dim: int) -> int:
    """Bytes that an ideal lookup moves in fp32: each row and id is read once, each row written.

    Args:
        count: N, the ids.
        dim: D.
    """
    return 8 * count * dim + 8 * count


def find(rows: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where ids [N] are among ascending rows [n].

    Returns:
        Places [N] int64, and whether [N] bool the row there is the id.
    """
    places = torch.searchsorted(rows, ids).clamp_(max=len(rows) - 1)
    return places, rows[places] == ids


class Workload:
    """A case's inputs, the same for everybody who is timed on it.

    Attributes:
        ids: [set][table] -> rows [count] int64.
        values: [set] -> gradients [tables, count, dim] fp32.
        grads: [set][table] -> the sparse gradient, not coalesced, as backward leaves it.
        floor: bytes that an ideal step moves, the mean over the sets.
    """

    def __init__(self, case: Case, sets: int = SETS) -> None:
        self.case = case
        draw = torch.Generator().manual_seed(0)
        shape = (case.tables, case.count, case.dim)
        self.ids = [[draw_ids(case, draw) for _ in range(case.tables)] for _ in range(sets)]
        self.values = [torch.randn(shape, generator=draw) for _ in range(sets)]
        self.grads = [
            [
                torch.sparse_coo_tensor(
                    rows[None], values, (case.rows, case.dim), check_invariants=True
                )
                for rows, values in zip(ids, set_values, strict=True)
            ]
            for ids, set_values in zip(self.ids, self.values, strict=True)
        ]
        distinct = sum(len(rows.unique()) for ids in self.ids for rows in ids) / sets
        self.floor = floor_bytes(distinct, case.tables * case.count, case.dim)
        #: (table, rule, decay) -> what their steps make of the sampled rows, see rivals.expected
        self.expected: dict[tuple[int, str, float], torch.Tensor] = {}
        self._samples: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._initial: torch.Tensor | None = None
        self._dense: tuple[int, list[torch.Tensor]] | None = None

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables' weights."""
        return 4 * self.case.tables * self.case.rows * self.case.dim

    def initial(self) -> torch.Tensor | None:
        """What every table's weights [rows, dim] begin as, or None for zeros."""
        shape = (self.case.rows, self.case.dim)
        if self._initial is None and self.case.rows * self.case.dim <= MOST_RANDOM_ELEMENTS:
            self._initial = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        return self._initial

    def new_weights(self) -> list[torch.Tensor]:
        """Weights [rows, dim] of every table, before the first step."""
        initial, shape = self.initial(), (self.case.rows, self.case.dim)
        return [
            torch.zeros(shape) if initial is None else initial.clone()
            for _ in range(self.case.tables)
        ]

    def sample(self, table: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows to look at after the first ``CHECKED`` sets, ascending.

        Returns:
            Touched ones: the 16 that have the most gradients and up to 4,096 others; and up to
            twice as many that are not touched, right beside those.
        """
        if table not in self._samples:
            ids = torch.cat([self.ids[turn][table] for turn in range(CHECKED)])
            touched, counts = ids.unique(return_counts=True)
            draw = torch.Generator().manual_seed(4)
            some = torch.randperm(len(touched), generator=draw)[:4096]
            hottest = counts.topk(min(16, len(counts))).indices
            rows = touched[torch.cat([some, hottest]).unique()]
            near = torch.cat([rows - 1, rows + 1]).clamp_(0, self.case.rows - 1).unique()
            self._samples[table] = rows, near[~find(touched, near)[1]]
        return self._samples[table]

    def dense_grads(self, turn: int) -> list[torch.Tensor]:
        """The gradients of a set as dense tables; the last asked for are kept."""
        if self._dense is None or self._dense[0] != turn:
            self._dense = None
            self._dense = (turn, [grad.to_dense() for grad in self.grads[turn]])
        return self._dense[1]

    def release(self) -> None:
        """Drop what only construction and checks need."""
        self._initial = None
        self.expected.clear()
        self._samples.clear()
