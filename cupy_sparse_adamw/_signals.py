"""Ctrl-C that waits."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's own functions make enums, for 15 us
import threading
from typing import Any


class uninterrupted:
    """Within the block Ctrl-C waits: what handles SIGINT is called at its end.

    Only the main thread is ever interrupted, so in others nothing is done, nor where Python does
    not handle SIGINT.
    """

    def __enter__(self) -> None:
        self._came: list[Any] = []
        self._handler = None
        if threading.get_ident() == threading.main_thread().ident:
            handler = _signal.getsignal(_signal.SIGINT)
            if callable(handler):
                self._handler = handler
                _signal.signal(_signal.SIGINT, self._note)

    def _note(self, *received: Any) -> None:
        self._came.append(received)

    def __exit__(self, *raised: Any) -> None:
        if self._handler is not None:
            _signal.signal(_signal.SIGINT, self._handler)
            if self._came:  # also where the block raised
                self._handler(*self._came[0])
