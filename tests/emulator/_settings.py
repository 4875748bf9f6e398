"""What a test may set, and what the emulator tells it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Fault(Exception):
    """A kernel did what a GPU would not report: says what, which kernel, block, thread and line."""


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]


@dataclass
class Settings:
    seed: int = 0  # of every order: blocks, warps, lanes, who goes on after a meeting
    checked: bool = True  # False: no detector but divergence, and several times faster
    copies_complete: bool = True  # what HostCopy.ready says
    capturing: bool = False  # what is_capturing says outside a capture()


settings = Settings()
launches: list[Launch] = []


@contextlib.contextmanager
def using(**changes: int | bool) -> Iterator[None]:
    """Within the block, other settings: ``using(seed=3, checked=False)``."""
    before = {name: getattr(settings, name) for name in changes}
    for name, value in changes.items():
        setattr(settings, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
