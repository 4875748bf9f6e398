"""What the emulator's own tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import emulator


@pytest.fixture(autouse=True)
def _emulating() -> Iterator[None]:
    with emulator.active():
        yield


@pytest.fixture(params=[True, False], ids=["checked", "unchecked"])
def checked(request: pytest.FixtureRequest) -> Iterator[bool]:
    with emulator.using(checked=request.param):
        yield request.param
