"""The benchmarks' own parts: what is counted, who is timed, and how."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import rivals  # noqa: E402
import timing  # noqa: E402
from cases import Case, Workload, draw_ids, floor_bytes  # noqa: E402

from cupy_sparse_adamw import functional  # noqa: E402

# ---------------------------------------------------------------------- what is counted


def test_floor_bytes_by_hand():
    """Two rows of three elements, five gradients of them.

    Rows: 2 rows × 3 elements × 4 bytes × (weights and two moments, each read and written: 6) = 144.
    Gradients: 5 × 3 × 4 = 60. Row numbers: 5 × 8 = 40.
    """
    assert floor_bytes(touched=2, count=5, dim=3) == 144 + 60 + 40


def test_a_workloads_floor_counts_each_touched_row_once():
    work = Workload(Case("one row", dim=4, count=10, rows=1, tables=2))
    assert work.floor == 2 * (24 * 4 + 4 * 10 * 4 + 8 * 10)


def test_distinct_ids_are_distinct_and_in_range():
    ids = draw_ids(Case("", 1, 500, rows=600, distinct=True), torch.Generator().manual_seed(0))
    assert ids.unique().numel() == 500
    assert 0 <= ids.min() <= ids.max() < 600


def test_a_hot_id_replaces_a_tenth_and_leaves_the_rest():
    plain = Case("", 1, 1000, rows=100_000)
    ids = draw_ids(plain, torch.Generator().manual_seed(0))
    hot = draw_ids(plain._replace(hot=0.1), torch.Generator().manual_seed(0))
    changed = ids != hot
    assert hot[changed].unique().numel() == 1
    assert 99 <= int(changed.sum()) <= 100  # one may have been the hot row by chance


def test_zipf_ids_have_the_shares_of_the_law():
    """With exponent 1.2 over 1,000 rows, the first rank has 1 / Σ k^-1.2 = 23.1% of the ids."""
    ids = draw_ids(Case("", 1, 100_000, rows=1000, zipf=1.2), torch.Generator().manual_seed(0))
    shares = ids.bincount().sort(descending=True).values / len(ids)
    weights = torch.arange(1, 1001).double() ** -1.2
    exact = weights / weights.sum()
    assert shares[0].item() == pytest.approx(exact[0].item(), abs=0.005)
    assert shares[1].item() == pytest.approx(exact[1].item(), abs=0.005)


# ---------------------------------------------------------------------- who is timed

TINY = Case("tiny", dim=8, count=60, rows=40)
WIDE_KINDS = [rivals.Ours, *rivals.RIVALS]


@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize("kind", WIDE_KINDS, ids=lambda kind: kind.name)
def test_rivals_compute_what_they_claim(kind, tables):
    """Two steps against float64: duplicates, rows met in one step only, untouched rows."""
    work = Workload(TINY._replace(tables=tables))
    try:
        contender = kind(work)
    except rivals.NotPossible as reason:
        pytest.skip(str(reason))
    rivals.check(contender)


def test_expected_values_are_torchs():
    """The oracle of the check against torch.optim.AdamW in float64, on rows met in both steps."""
    work = Workload(TINY._replace(count=400))  # every row in every set
    rows, untouched = work.sample(0)
    exact = rivals.expected(work, rows, 0, "adamw", rivals.DECAY)
    weight = torch.nn.Parameter(work.initial().double())
    optimizer = torch.optim.AdamW([weight], lr=rivals.LR, weight_decay=rivals.DECAY)
    for turn in range(2):
        weight.grad = work.grads[turn][0].double().to_dense()
        optimizer.step()
    assert (rows.tolist(), untouched.tolist()) == (list(range(40)), [])
    torch.testing.assert_close(exact, weight.detach(), rtol=1e-12, atol=1e-12)


class Lazy(rivals.Ours):
    name = "lazy"

    def step(self):
        pass


class Sloppy(rivals.Ours):
    name = "sloppy"

    def step(self):
        super().step()
        with torch.no_grad():
            self.params[0] += 1e-3


@pytest.mark.parametrize("kind", [Lazy, Sloppy])
def test_a_wrong_rival_is_named(kind):
    with pytest.raises(AssertionError, match=f"{kind.name} is wrong on tiny"):
        rivals.enter(Workload(TINY._replace(count=10)), (kind,), 1e9)


def test_changed_untouched_rows_are_found():
    class Neighbour(rivals.Ours):
        name = "neighbour"

        def step(self):
            super().step()
            touched = torch.cat([ids[0] for ids in self.work.ids[:2]])
            free = next(row for row in range(40) if row not in touched)
            with torch.no_grad():
                self.params[0][free] += 1e-7

    with pytest.raises(AssertionError, match="that no gradient names"):
        rivals.enter(Workload(TINY._replace(count=10)), (Neighbour,), 1e9)


def test_who_does_not_fit_into_memory_is_listed_with_the_reason():
    work = Workload(TINY)
    entered, missing = rivals.enter(work, (rivals.Ours, rivals.DenseFused), 4 * work.table_bytes)
    assert [contender.name for contender in entered] == ["SparseAdamW"]
    assert "needs 0.0 GB" in missing["AdamW fused"]


# ---------------------------------------------------------------------- how it is timed


class Rounds:
    """pytest-benchmark's fixture as far as a race uses it, without its table at the end."""

    def pedantic(self, target, setup, rounds, warmup_rounds):
        seconds = []
        for _ in range(warmup_rounds + rounds):
            setup()
            begin = time.perf_counter()
            target()
            seconds.append(time.perf_counter() - begin)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=seconds[warmup_rounds:]))


class Sleeper:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def load(self, turn):
        self.log.append((self.name, "load", turn))

    def step(self):
        self.log.append((self.name, "step"))


def test_a_race_interleaves_and_begins_with_another_rival_each_round():
    log = []
    ours, first, second = (Sleeper(name, log) for name in ("ours", "a", "b"))
    race = timing.Race(ours, [first, second], rounds=4, warmup=2, met=2, wait=0.0)
    seconds = race.run(Rounds())
    steps = [entry[0] for entry in log if entry[1] == "step"]
    assert steps == ["a", "b", "ours", "b", "a", "ours"] * 3
    assert [entry[2] for entry in log if entry[:2] == ("ours", "load")] == [2, 3, 4, 5, 6, 7]
    assert len(seconds) == 4
    assert len(race.seconds["a"]) == len(race.seconds["b"]) == 4


@pytest.mark.parametrize(("cache", "parts"), [(0, 1), (100, 1), (200, 2), (480, 4)])
def test_the_copy_goes_through_four_times_the_cache(monkeypatch, cache, parts):
    monkeypatch.setattr(timing, "COPY_BYTES", 512)
    copy = timing.Copy(cache)
    assert copy.source.nbytes + copy.target.nbytes >= 4 * cache
    copied = []
    for turn in range(2 * parts):
        copy.target.fill_(2)
        copy.load(turn)
        copy.step()
        copied.append((copy.target == 1).all(1).tolist().index(True))
        assert int((copy.target == 1).sum()) == 512 // 8
    assert copied == 2 * list(range(parts))


def test_a_dense_rival_has_one_gradient_in_all_timed_steps():
    contender = rivals.DenseFused(Workload(TINY))
    for turn in range(2, 12):
        contender.load(turn)
        assert torch.equal(contender.params[0].grad, contender.work.grads[1][0].to_dense())


def test_the_ratio_is_the_median_over_rounds():
    """Not the ratio of medians, which would be 2 / 1: here a round was slow for both alike."""
    ours = [1.0, 1.0, 10.0]
    assert timing.ratio([2.0, 3.0, 30.0], ours)[0] == 3.0


def test_the_engines_clock_counts_the_engine_and_nothing_else():
    contender = rivals.Ours(Workload(TINY))
    contender.load(0)
    clock = timing.EngineClock()
    with clock.running():
        contender.step()
    assert clock.seconds > 0
    with pytest.raises(RuntimeError, match="must follow"), clock.running():
        pass
    assert functional.segment.__module__ == "cupy_sparse_adamw.functional"  # put back
