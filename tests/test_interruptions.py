"""Ctrl-C in an update, and an exception in a closure."""

from __future__ import annotations

import signal
import threading

import pytest
import torch
from oracle import bits

from cupy_sparse_adamw import HashTable, NormalInitializer, SparseAdamW, functional

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
    right, seen = functional.sparse_adamw_, []

    def pressed(updates, segments):
        for group in segments.groups:
            signal.raise_signal(signal.SIGINT)
            seen.append(
                right(
                    [updates[n] for n in group[0]],
                    functional.Segments([([*range(len(group[0]))], *group[1:])]),
                )
            )
        return []

    monkeypatch.setattr(functional, "sparse_adamw_", pressed)
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
