"""A few threads for kernels that run without the Python lock.

Numba's own threading layers are not used: the default one aborts the process when two threads
enter it at once, and the OpenMP one kills a forked child. This one allows both.

Work is cut into more parts than there are threads, and who is free takes the next one. A thread
that comes late, since torch's idle OpenMP threads spin on its core, takes fewer, and nobody waits
for one that has not come at all.
"""

from __future__ import annotations

import collections
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

#: Parts for each thread, at the most.
PARTS_PER_THREAD = 4


class _Job:
    """One ``parallel_for``: whoever calls ``help`` takes parts until there are none left.

    No lock is needed: each of the operations on its containers is one step to all threads.
    """

    def __init__(self, kernel: Callable[..., int], cuts: list[int], args: tuple[Any, ...]) -> None:
        self._kernel = kernel
        self._cuts = cuts
        self._args = args
        self._left = collections.deque(range(len(cuts) - 1))
        self._results = [0] * (len(cuts) - 1)
        self._entered: list[None] = []  # one for each helper
        self._ended: list[BaseException | None] = []  # one for each of them that has ended
        self._end = queue.SimpleQueue[None]()  # and a sign of it

    def _take_parts(self) -> None:
        cuts = self._cuts
        while True:
            try:
                part = self._left.popleft()
            except IndexError:
                return
            self._results[part] = self._kernel(part, cuts[part], cuts[part + 1], *self._args)

    def help(self) -> None:
        """Take parts, in a thread of the pool."""
        self._entered.append(None)
        error = None
        try:
            self._take_parts()
        except BaseException as raised:
            error = raised
        self._ended.append(error)
        self._end.put(None)

    def run(self, helpers: int) -> list[int]:
        """Call helpers, take parts, wait for theirs, and return what all calls returned."""
        error: BaseException | None = None
        try:
            for _ in range(helpers):
                _jobs.put(self)
            self._take_parts()
        except BaseException as raised:  # Ctrl-C
            error = raised
        # A helper that enters from now on finds nothing left. The others write to memory that the
        # caller holds: whatever happens, do not return before they have ended.
        while True:
            try:
                self._left.clear()
                while len(self._ended) < len(self._entered):
                    self._end.get()
                break
            except BaseException as interrupt:  # Ctrl-C
                error = interrupt
        self._args = ()  # a late helper would keep them alive
        for failure in (error, *self._ended):
            if failure is not None:
                raise failure
        return self._results


_jobs = queue.SimpleQueue[_Job]()
_threads: list[threading.Thread] = []


def _forget_threads() -> None:
    """A forked child has none of its parent's threads, and their queue may be half changed."""
    global _jobs
    _jobs = queue.SimpleQueue[_Job]()
    _threads.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def _help_forever(jobs: queue.SimpleQueue[_Job]) -> None:
    while True:
        jobs.get().help()


def num_parts(size: int, grain: int) -> int:
    """How many parts to cut ``size`` items into: some for each thread that torch would use.

    No part has fewer than ``grain`` items, since waking a thread costs tens of microseconds. Ask
    once for all that a call allocates and runs: torch.set_num_threads may change the number.
    """
    most = size // max(grain, 1)
    if most <= 1:
        return 1
    threads = torch.get_num_threads()
    return min(threads * PARTS_PER_THREAD, most) if threads > 1 else 1


def cuts(size: int, parts: int) -> list[int]:
    """Where ``parallel_for`` cuts ``size`` items, from 0 to ``size``."""
    return [size * i // parts for i in range(parts + 1)] if parts > 1 else [0, size]


def start_threads(parts: int) -> None:
    """Have the threads that ``parallel_for`` wants for so many parts.

    Raises:
        RuntimeError: the system grants no more threads.
    """
    while len(_threads) < min(torch.get_num_threads(), parts) - 1:
        thread = threading.Thread(
            target=_help_forever, args=(_jobs,), name="sparse_adamw", daemon=True
        )
        thread.start()
        _threads.append(thread)


def parallel_for(kernel: Callable[..., int], size: int, parts: int, *args: Any) -> list[int]:
    """Call ``kernel(part, begin, end, *args)`` on ``parts`` consecutive parts of [0, size).

    The calling thread and the pool's take parts in turn, as many at once as torch has threads.
    Returns what the calls returned, in order of their parts. An exception in any part is raised
    after all that had begun have ended.
    """
    if parts > 1:
        start_threads(parts)
    return run_parts(kernel, cuts(size, parts), *args)


def run_parts(kernel: Callable[..., int], cuts: list[int], *args: Any) -> list[int]:
    """``parallel_for`` between given cuts, with the threads that have been started.

    It does with any number of them.
    """
    parts = len(cuts) - 1
    if parts == 1:
        return [kernel(0, *cuts, *args)]
    helpers = min(torch.get_num_threads(), parts, len(_threads) + 1) - 1
    return _Job(kernel, cuts, args).run(helpers)
