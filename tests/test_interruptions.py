"""Ctrl-C wherever it may come, and an exception in a closure.

The campaign presses Ctrl-C as the n-th line of this package begins, for n = 1, 2, 3, ..., or for
400 of them, if there are more (SOAK=1), or for 20 (every other run).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from operations import (
    CASES,
    LRU,
    SEEN_TWICE,
    SOAK,
    World,
    behind,
    crowded,
    ids_from,
    later,
    many,
    train,
)
from oracle import bits

import cupy_sparse_adamw
from cupy_sparse_adamw import HashTable, NormalInitializer, SparseAdamW, functional

PACKAGE = str(Path(cupy_sparse_adamw.__file__).parent)

pytestmark = pytest.mark.usefixtures("ctrl_c")

SIZES = {"wide": (8, torch.float32), "narrow": (3, torch.float32), "exact": (3, torch.float64)}


def training() -> tuple[dict[str, HashTable], SparseAdamW]:
    """Three tables that no engine updates in one launch."""
    tables = {
        name: HashTable(
            [dim],
            64,
            dtype,
            initializer=NormalInitializer(generator=torch.Generator().manual_seed(1)),
        )
        for name, (dim, dtype) in SIZES.items()
    }
    return tables, SparseAdamW(tables, lr=0.1)


def backward(tables: dict[str, HashTable], batch: int) -> None:
    ids = torch.arange(300) * 7 % 101 + batch
    for table in tables.values():
        (
            table(ids) * torch.linspace(-1, 1, table.embedding_shape[0], dtype=table.dtype)
        ).sum().backward()


def contents(tables: dict[str, HashTable], optimizer: SparseAdamW) -> dict[str, torch.Tensor]:
    found = {}
    for name, table in tables.items():
        found[f"{name} weights"] = bits(table.embeddings())
        for key, value in optimizer.state_dict()["state"].get(name, {}).items():
            is_tensor = isinstance(value, torch.Tensor)
            found[f"{name} {key}"] = bits(value) if is_tensor else torch.tensor([len(str(value))])
            if key == "step":
                found[f"{name} step"] = torch.tensor([value])
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_ctrl_c_between_two_groups_waits_for_the_second(monkeypatch):
    tables, optimizer = training()
    backward(tables, 0)
    right, seen = functional.prepare_sparse_adamw, []

    def pressed(updates, segments):
        steps = [
            right(
                [updates[n] for n in group[0]],
                functional.Segments([([*range(len(group[0]))], *group[1:])]),
            )
            for group in segments.groups
        ]

        def apply():
            for step in steps:
                signal.raise_signal(signal.SIGINT)
                seen.append(step())
            return []

        return apply

    monkeypatch.setattr(functional, "prepare_sparse_adamw", pressed)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert len(seen) == 3
    assert [s["step"] for s in optimizer.state_dict()["state"].values()] == [1, 1, 1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_in_another_thread_is_left_alone():
    done = []

    def run():
        with functional.uninterrupted():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]


def test_an_exception_in_a_closure_changes_nothing():
    """The gradients that it had left wait for the next step, as in torch."""
    tables, optimizer = training()
    twins, twin = training()
    optimizer.set_grad_accum_steps(2)
    twin.set_grad_accum_steps(2)

    def closure():
        backward(tables, 0)
        raise ValueError("in the closure")

    before = optimizer.state_dict()["accumulation"]["accumulated"]
    with pytest.raises(ValueError, match="in the closure"):
        optimizer.step(closure)
    assert optimizer.state_dict()["state"] == {}
    assert optimizer.state_dict()["accumulation"]["accumulated"] == before == 0
    backward(twins, 0)
    for its in (optimizer, twin):
        its.step()
        its.step()
    assert equal(contents(tables, optimizer), contents(twins, twin))


#: What closures are made of.
PARTS: list[Callable[[World], object]] = [
    lambda world: train(world, ids_from(2, 14)),
    lambda world: train(world, ids_from(10, 22), ids_from(20, 23)),
    lambda world: world.optimizer.zero_grad(),
    lambda world: [table.delete(ids_from(4, 12)) for table in world.tables.values()],
    lambda world: [
        table.insert(ids_from(3, 6), torch.ones(3, *table.embedding_shape, dtype=table.dtype))
        for table in world.tables.values()
    ],
    lambda world: world.optimizer.state_dict(),
]
STATES = [many, later, behind("decay"), behind("dense"), crowded(**LRU), crowded(**SEEN_TWICE)]


def test_closures_that_raise():
    """A step whose closure raises does what the closure had done till then, and nothing else."""
    begin, raised, updates = time.monotonic(), 0, 0
    for number in range(500 if SOAK else 50):
        choice = random.Random(number)
        make = choice.choice(STATES)
        world, twin = make(), make()
        for _ in range(4):
            parts = choice.choices(PARTS, k=choice.randint(1, 4))
            stop = choice.choice([None, *range(len(parts) + 1)])
            error = choice.choice([ValueError, MemoryError, KeyboardInterrupt])

            def closure(parts=parts, stop=stop, error=error, world=world) -> float:
                for part in parts[:stop]:
                    part(world)
                if stop is not None:
                    raise error("in the closure")
                return 0.5

            for part in parts[:stop]:
                part(twin)
            if stop is None:
                assert world.optimizer.step(closure) == 0.5
                twin.optimizer.step()
                updates += 1
            else:
                with pytest.raises(error, match="in the closure"):
                    world.optimizer.step(closure)
                raised += 1
            assert torch.is_grad_enabled()
            assert world.snapshot() == twin.snapshot(), (number, error)
    print(f"closures: {raised} raised, {updates} others, {time.monotonic() - begin:.1f} s")


@functools.cache
def skipped_lines(path: str) -> set[int]:
    """Where Python never looks for signals: as a ``finally`` begins. It does so after calls."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try) and node.finalbody]
    return {node.finalbody[0].lineno for node in tries}


class Pressed(contextlib.AbstractContextManager):
    """Counts the lines of this package that are run, and presses Ctrl-C as one of them begins.

    The signal is a real one: where it is held back, so it is here.
    """

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.at, self.count = at, 0

    def __enter__(self) -> Pressed:
        sys.settrace(self._called)
        return self

    def __exit__(self, *raised) -> None:
        sys.settrace(None)
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def _called(self, frame, event, arg):
        # What a finalizer raises, Python prints and forgets.
        if "__del__" in (frame.f_code.co_name, frame.f_back and frame.f_back.f_code.co_name):
            return None
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame, event, arg):
        if event == "line" and frame.f_lineno not in skipped_lines(frame.f_code.co_filename):
            self.count += 1
            if self.count == self.at:
                signal.raise_signal(signal.SIGINT)
        return self._line


@pytest.mark.parametrize("name", CASES)
def test_ctrl_c_at_any_line_leaves_all_as_before_or_after(name):
    with torch.random.fork_rng():
        at_most = 400 if SOAK else 20
        presses = CASES[name].run(Pressed, [KeyboardInterrupt], at_most)
    print(f"{name}: {presses} presses")
