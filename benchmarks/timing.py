"""How it is timed: everybody in one process on the same inputs, one after the other, again and
again; ratios are taken round by round.

A disturbance of seconds, of which a shared machine has many, hits all of a round alike, so the
median of a round's ratios repeats better than the ratio of two medians.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch

from cupy_sparse_adamw import functional

ROUNDS = 20
#: Seconds of waiting before each timed call. An OpenMP thread of torch spins for up to 10 ms after
#: an operation; whoever comes next is not to pay for it. (A wait that sleeps instead would let the
#: scheduler put both threads of the next step on one core.)
SETTLE_S = 0.012
#: Bytes of the copy that tells the memory's bandwidth, read and written.
COPY_BYTES = 1 << 29


class Timed(Protocol):
    """What a race needs of somebody who takes part."""

    name: str

    def load(self, turn: int) -> None: ...

    def step(self) -> None: ...


class Copy:
    """The yardstick: ``copy_`` of memory that no cache holds, all of it written before.

    One part after another of what is four times the cache in all is copied, or of 512 MiB.

    Args:
        cache_bytes: size of the last-level cache.
    """

    name = "copy"

    def __init__(self, cache_bytes: int = 0) -> None:
        self.parts = math.ceil(max(4 * cache_bytes, COPY_BYTES) / COPY_BYTES)
        self.source = torch.ones(self.parts, COPY_BYTES // 8)
        self.target = torch.full_like(self.source, 2.0)
        self.part = 0

    def load(self, turn: int) -> None:
        self.part = turn % self.parts

    def step(self) -> None:
        self.target[self.part].copy_(self.source[self.part])


def settle(seconds: float) -> None:
    """Wait without giving up the core."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def cpu_seconds() -> tuple[float, float]:
    """CPU seconds so far of all processes, and of this one; zeros where the system does not say."""
    try:
        fields = Path("/proc/stat").read_text().split()
    except OSError:
        return 0.0, 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
    own = os.times()
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK"), own.user + own.system


class Race:
    """Rounds in which every rival is timed once and then we are, by pytest-benchmark.

    Args:
        ours: whose time is the benchmark's.
        rivals: the others.
        rounds: how many rounds count.
        warmup: rounds before those; with ``met`` as many as there are gradient sets.
        met: gradient sets that everybody has met.
        wait: seconds of ``settle`` before each timed call.
        before: called right before each of our steps instead of settling.
    """

    def __init__(
        self,
        ours: Timed,
        rivals: Sequence[Timed],
        rounds: int = ROUNDS,
        warmup: int = 4,
        met: int = 0,
        wait: float = SETTLE_S,
        before: Callable[[], object] | None = None,
    ) -> None:
        self.ours, self.rivals = ours, list(rivals)
        self.rounds, self.warmup, self.met, self.wait = rounds, warmup, met, wait
        self.before = before or (lambda: settle(wait))
        #: name -> seconds of each round, without the warm-up
        self.seconds: dict[str, list[float]] = {rival.name: [] for rival in rivals}
        self.others = 0.0  # the share of the busy CPU time that was not this process's
        self.turn = -warmup

    def time_rivals(self) -> None:
        """One round of all but us, beginning with another one each time; then load ours."""
        turn, loaded = self.turn, self.turn + self.warmup + self.met
        self.turn += 1
        first = turn % max(len(self.rivals), 1)
        for rival in self.rivals[first:] + self.rivals[:first]:
            rival.load(loaded)
            settle(self.wait)
            begin = time.perf_counter()
            rival.step()
            seconds = time.perf_counter() - begin
            if turn >= 0:
                self.seconds[rival.name].append(seconds)
        self.ours.load(loaded)
        self.before()

    def run(self, benchmark: Any) -> list[float]:
        """Time everybody. Returns our seconds, round by round."""
        before = cpu_seconds()
        benchmark.pedantic(
            self.ours.step, setup=self.time_rivals, rounds=self.rounds, warmup_rounds=self.warmup
        )
        total, own = (after - then for after, then in zip(cpu_seconds(), before, strict=True))
        self.others = max(total - own, 0.0) / total if total else 0.0
        return list(benchmark.stats.stats.data)


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float]:
    """Their time over ours: the median of the rounds' ratios, and its quartiles' distance.

    Args:
        theirs: seconds of each round, two or more.
        ours: the same of ours.
    """
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), high - low


def summary(race: Race, ours: Sequence[float], floor: float | None = None) -> dict[str, Any]:
    """The figures of a race, for ``extra_info``.

    Args:
        floor: bytes that an ideal step moves, over the bandwidth of ``Copy`` in the same round.
    """
    result: dict[str, Any] = {
        "ours_ms": 1e3 * statistics.median(ours),
        "others": race.others,
        "rivals": {},
    }
    for name, theirs in race.seconds.items():
        middle, spread = ratio(theirs, ours)
        if name == Copy.name:
            copy_s = statistics.median(theirs)
            result["copy_GB_per_s"] = COPY_BYTES / copy_s / 1e9
            if floor is not None:
                result["floor"] = {
                    "bytes": floor,
                    "ms": 1e3 * floor / COPY_BYTES * copy_s,
                    "percent": 100 * floor / COPY_BYTES * middle,
                    "spread": spread / middle,
                    "GB_per_s": floor / statistics.median(ours) / 1e9,
                }
        else:
            result["rivals"][name] = {
                "ms": 1e3 * statistics.median(theirs),
                "ratio": middle,
                "spread": spread / middle,
            }
    return result


class EngineClock:
    """Seconds that a step spends in ``functional.segment`` and ``functional.prepare_sparse_adamw``.

    That is the engine: sorting and updating (what ``prepare_sparse_adamw`` returns), with what
    prepares its kernels' arguments. The rest of a step is what the host pays for groups, tables
    and checks.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens in the block."""
        self.seconds = 0.0

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                begin = time.perf_counter()
                try:
                    return function(*args, **kwargs)
                finally:
                    self.seconds += time.perf_counter() - begin

            return call

        prepare = counted(functional.prepare_sparse_adamw)
        with (
            mock.patch.object(functional, "segment", counted(functional.segment)),
            mock.patch.object(
                functional, "prepare_sparse_adamw", lambda *args: counted(prepare(*args))
            ),
        ):
            yield
        if self.seconds == 0.0:
            raise RuntimeError(
                "the step called neither functional.segment nor functional.prepare_sparse_adamw: "
                "what an engine is has changed, and this clock must follow"
            )
