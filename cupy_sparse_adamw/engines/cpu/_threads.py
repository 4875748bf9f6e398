"""One small pool of threads for kernels that run without the Python lock.

Numba's own threading layers are not used: the default one aborts the process when two threads
enter it at once, and the OpenMP one kills a forked child. This one allows both.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable
from typing import Any

import torch

_pool: concurrent.futures.ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None  # a forked child has none of its parent's threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def num_parts(size: int, grain: int) -> int:
    """How many parts to cut ``size`` items into: one a thread of torch (torch.set_num_threads).

    No part has fewer than ``grain`` items, since waking a thread costs tens of microseconds. Ask
    once for all that a call allocates and runs: another thread may change torch's number.
    """
    return max(1, min(torch.get_num_threads(), size // max(grain, 1)))


def parallel_for(kernel: Callable[..., int], size: int, parts: int, *args: Any) -> list[int]:
    """Call ``kernel(part, begin, end, *args)`` on ``parts`` consecutive parts of [0, size).

    Returns what the calls returned, in order of their parts. An exception in any part is raised
    after all have ended.
    """
    global _pool
    if parts == 1:
        return [kernel(0, 0, size, *args)]
    if _pool is None:
        _pool = concurrent.futures.ThreadPoolExecutor(
            max_workers=os.cpu_count(), thread_name_prefix="sparse_adamw"
        )
    cuts = [size * i // parts for i in range(parts + 1)]
    others: list[concurrent.futures.Future[int]] = []
    try:
        others.extend(_pool.submit(kernel, i, cuts[i], cuts[i + 1], *args) for i in range(1, parts))
        first = kernel(0, cuts[0], cuts[1], *args)
    finally:
        _wait_for_all(others)
    return [first, *(other.result() for other in others)]


def _wait_for_all(futures: list[concurrent.futures.Future[int]]) -> None:
    """Return when all have ended, whatever happens: they write to memory that the caller holds."""
    interrupt: BaseException | None = None
    while True:
        try:
            concurrent.futures.wait(futures)
            break
        except BaseException as error:  # Ctrl-C
            interrupt = error
    if interrupt is not None:
        raise interrupt
