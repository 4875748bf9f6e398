"""Where compiled kernels are kept on disk, and that none is ever found in another's place."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import os
import pathlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np

fcntl: Any = None
with contextlib.suppress(ImportError):  # Windows has none
    fcntl = importlib.import_module("fcntl")

#: Seconds to wait for another process that puts a kernel into the cache.
LOCK_S = 10.0

_warned = False


def _source_digest() -> str:
    """Names Numba, NumPy and the source text behind kernels: a stale one can never be loaded.

    Numba's own key is the modification time of the one file a kernel stands in, which misses
    edits to the helpers that it calls.
    """
    digest = hashlib.sha256(f"{numba.__version__} {np.__version__}".encode())
    engine = pathlib.Path(__file__).parent
    for path in (*sorted(engine.glob("*.py")), engine.parents[1] / "_types.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_dir() -> str:
    base = os.environ.get("NUMBA_CACHE_DIR")
    if base is None:
        cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        base = os.path.join(cache_home, "cupy_sparse_adamw")
    return os.path.join(base, "numba-" + _source_digest())


_CACHE_DIR = _cache_dir()

if not any(pathlib.Path(_CACHE_DIR).glob("**/*.nbi")):  # Numba's index files
    logging.getLogger("cupy_sparse_adamw").warning(
        "compiling the CPU kernels, which takes some seconds when one is first used; they are kept "
        "in %s",
        _CACHE_DIR,
    )


@contextlib.contextmanager
def _our_cache_dir() -> Iterator[None]:
    """Numba reads its cache directory when a function is decorated; put the user's back after."""
    users = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = _CACHE_DIR
    try:
        yield
    finally:
        numba.config.CACHE_DIR = users


def compiled(function: Any, **options: Any) -> Any:
    """``numba.njit`` of a function, kept on disk where a cache directory can be written."""
    global _warned
    try:
        with _our_cache_dir():
            dispatcher = numba.njit(cache=True, **options)(function)
    except RuntimeError as error:  # Numba: "cannot cache function: no locator available"
        if not _warned:
            _warned = True
            warnings.warn(
                f"compiled kernels cannot be kept on disk, so every process compiles them anew; "
                f"set NUMBA_CACHE_DIR to a directory you can write ({error})",
                stacklevel=3,
            )
        return numba.njit(**options)(function)
    _keep_one_at_a_time(dispatcher._cache)
    return dispatcher


def _keep_one_at_a_time(cache: Any) -> None:
    """Have processes take turns to put kernels into a cache, one of Numba's.

    Numba reads which files a function has, notes the next number for its types, and writes that
    file, each without a lock. Of two processes that compiled the function for different types, each
    may take the same number: then what is found for the one's types is the other's code. A kernel
    that cannot be kept is compiled anew by the next process.
    """
    save = cache.save_overload

    def save_overload(*args: Any) -> None:
        with _turn() as is_ours, contextlib.suppress(OSError):  # as of a disk that is full
            if is_ours:
                save(*args)

    cache.save_overload = save_overload


@contextlib.contextmanager
def _turn() -> Iterator[bool]:
    """Whether it is this process's turn in the block, after at most ``LOCK_S`` seconds.

    True as well where the system has no locks for files.
    """
    if fcntl is None:
        yield True
        return
    try:
        os.makedirs(_CACHE_DIR, exist_ok=True)
        file = os.open(os.path.join(_CACHE_DIR, "lock"), os.O_WRONLY | os.O_CREAT, 0o666)
    except OSError:  # nor could a kernel be written
        yield False
        return
    try:
        yield _lock(file)
    finally:
        # A child that was forked meanwhile has the file open, too: closing alone would not do.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


def _lock(file: int) -> bool:
    end = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        except OSError:  # a file system without locks
            return True
        else:
            return True
