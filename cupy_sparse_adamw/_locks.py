"""Locks of tables: one thread at a time reads or changes a table's rows, and none while it forks.

A thread that takes several takes them in the order in which their owners were made, so that no two
threads wait for each other.
"""

from __future__ import annotations

import _thread
import collections
import functools
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from ._signals import uninterrupted

_Self = TypeVar("_Self", bound="Guarded")
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


class Lock(Protocol):
    """A ``threading.RLock``, which has no public type."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take it."""

    def release(self) -> None:
        """Give it back."""

    def __enter__(self) -> bool: ...

    def __exit__(self, *raised: Any) -> None: ...


class Owner(Protocol):
    """What has a lock: see ``give_lock``."""

    lock: Lock
    lock_order: int


class Guarded(Protocol):
    """What ``locked`` methods belong to."""

    @property
    def lock(self) -> Lock:
        """The lock."""


_acquire: Any = type(threading.RLock()).acquire
_release: Any = type(threading.RLock()).release
_orders = itertools.count()
_owners: weakref.WeakSet[Any] = weakref.WeakSet()
_owners_lock = threading.RLock()


def give_lock(owner: Any) -> None:
    """Give an owner its lock: ``lock``, and ``lock_order``, its place among all locks."""
    owner.lock, owner.lock_order = threading.RLock(), next(_orders)
    with _owners_lock:
        _owners.add(owner)


def locked(method: Callable[Concatenate[_Self, _Args], _Result]) -> Callable[..., _Result]:
    """A method that holds its object's ``lock``."""

    @functools.wraps(method)
    def call(self: _Self, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        with self.lock:
            return method(self, *args, **kwargs)

    return call


class Held:
    """Within ``with Held(owners)`` the calling thread holds the locks of all owners."""

    _locks: Sequence[Lock] = ()
    _taken: Sequence[bool] = ()

    def __init__(self, owners: Iterable[Owner]) -> None:
        self._locks = [owner.lock for owner in sorted(owners, key=lambda x: x.lock_order)]

    def __enter__(self) -> None:
        taken: list[bool] = []
        self._taken = taken
        try:
            # In one call, so that Ctrl-C cannot come between taking a lock and noting it.
            taken.extend(map(_acquire, self._locks))
        except BaseException:
            self._give_back()
            raise

    def __exit__(self, *raised: Any) -> None:
        self._give_back()

    def __del__(self) -> None:
        self._give_back()  # Ctrl-C at the beginning of __exit__

    def _give_back(self) -> None:
        giving_back = map(_release, self._locks[: len(self._taken)])
        self._taken = ()
        collections.deque(giving_back, maxlen=0)  # again in one call


#: Seconds after which a Ctrl-C that came during a fork is passed on.
AFTER_FORK_S = 0.01

_forking: list[Held] = []
_interrupted = False


def _before_fork() -> None:
    """Wait until no thread is in the middle of a table: the child gets whole ones.

    Python drops what is raised here, so Ctrl-C waits until the fork is done.
    """
    global _interrupted
    try:
        with uninterrupted():
            _forking.append(_hold_all())
    except KeyboardInterrupt:
        _interrupted = True


def _hold_all() -> Held:
    """Take all locks, and last the one that whoever makes a lock needs, maybe while holding one."""
    while True:
        with _owners_lock:
            owners = list(_owners)
        held = Held(owners)
        held.__enter__()
        _owners_lock.acquire()
        if {*map(id, _owners)} <= {*map(id, owners)}:
            return held
        _owners_lock.release()  # somebody made one meanwhile
        held.__exit__()


def _after_fork_in_parent() -> None:
    global _interrupted
    _forking.pop().__exit__()
    _owners_lock.release()
    if _interrupted:
        _interrupted = False
        # Not now: what is raised here is dropped, too.
        threading.Timer(AFTER_FORK_S, _thread.interrupt_main).start()


def _after_fork_in_child() -> None:
    """Threads that waited for a lock are not here: begin with new ones."""
    global _owners_lock, _interrupted
    _forking.pop()._taken = ()
    _interrupted = False
    _owners_lock = threading.RLock()
    for owner in list(_owners):
        owner.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
