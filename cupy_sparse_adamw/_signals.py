"""Ctrl-C that waits."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's own functions make enums, for 15 us
import contextlib
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the block Ctrl-C waits: what handles SIGINT is called at its end.

    Only the main thread is ever interrupted, so in others nothing is done, nor where Python does
    not handle SIGINT.
    """
    handler = None
    if threading.get_ident() == threading.main_thread().ident:
        handler = _signal.getsignal(_signal.SIGINT)
    if not callable(handler):
        yield
        return
    came: list[Any] = []
    try:
        _signal.signal(_signal.SIGINT, lambda *received: came.append(received))
        yield
    finally:
        _signal.signal(_signal.SIGINT, handler)
        if came:  # also where the block raised
            handler(*came[0])
