"""Threads that share a table."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import bits

from cupy_sparse_adamw import FilterHook, HashTable, NormalInitializer, SparseAdamW, checkpoint
from cupy_sparse_adamw._locks import Held, give_lock

SOAK = bool(os.environ.get("SOAK"))
SECONDS = 20.0 if SOAK else 1.5


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Let threads take turns after microseconds instead of 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@contextlib.contextmanager
def beside(*functions: Callable[[], None]) -> Iterator[None]:
    """Call each function over and over in a thread of its own; raise what they raised."""
    over, errors, calls, begin = threading.Event(), [], Counter(), time.monotonic()

    def run(function: Callable[[], None]) -> None:
        try:
            while not over.is_set():
                function()
                calls[function] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
    tell(f"{[calls[x] for x in functions]} calls in threads", begin)


def until(seconds: float) -> Iterator[int]:
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        yield number
        number += 1
    tell(f"{number} rounds beside them", end - seconds)


def tell(what: str, begin: float) -> None:
    """Print what docs/reliability.md has."""
    test = os.environ["PYTEST_CURRENT_TEST"].split("::")[1].removesuffix(" (call)")
    print(f"{test}: {what}, {time.monotonic() - begin:.1f} s")


def drawn(dim: int = 8, **settings) -> HashTable:
    generator = torch.Generator().manual_seed(1)
    return HashTable([dim], 64, initializer=NormalInitializer(generator=generator), **settings)


def train(table: HashTable, optimizer: SparseAdamW, ids: torch.Tensor) -> None:
    (table(ids) * torch.linspace(-1, 1, table.embedding_shape[0])).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def contents(table: HashTable, optimizer: SparseAdamW, ids: torch.Tensor) -> list[torch.Tensor]:
    """Weights and moments of ids, by their bits."""
    rows = table._store.find(ids)
    assert (rows >= 0).all()
    state = optimizer.state_dict()["state"]["t"]
    place = {id_: i for i, id_ in enumerate(state["ids"].tolist())}
    order = torch.tensor([place[id_] for id_ in ids.tolist()])
    with torch.no_grad():
        table.eval()
        weights = table(ids)
        table.train()
    return [bits(x) for x in (weights, state["exp_avg"][order], state["exp_avg_sq"][order])]


def require_sound(table: HashTable) -> None:
    """Each id has one row, each row one id, and the index finds it."""
    ids, rows = table.ids_map()
    assert ids.unique().numel() == rows.unique().numel() == ids.numel() == len(table)
    assert torch.equal(table._store.find(ids), rows)


# ---------------------------------------------------------------------- threads


@pytest.mark.parametrize("training", [False, True], ids=["eval mode", "training mode"])
def test_a_lookup_sees_all_rows_before_a_step_or_all_after_it(training):
    """Every row gets the same gradient in every element, so at every moment all are the same."""
    table = HashTable([64], 64, filter_hook=None)
    ids = torch.arange(4000)
    optimizer = SparseAdamW({"t": table}, lr=0.1)
    seen = set()

    def look() -> None:
        with torch.no_grad():
            found = table(ids)
        assert found.unique().numel() == 1, "rows between two steps"
        seen.add(found[0, 0].item())

    table(ids).sum().backward()
    optimizer.step()
    rows = table._store.find(ids)
    table.train(training)
    with beside(look, look):
        for _ in until(SECONDS):
            table.accept_grad(rows, torch.ones(1, 64).expand(4000, 64))
            optimizer.step()
            optimizer.zero_grad()
    assert len(seen) > 3


def test_what_threads_insert_is_as_if_they_had_taken_turns():
    """One thread trains, two bring new ids, some of them the same, and one deletes."""
    table, twin = drawn(), drawn()
    twin._store.seed = table._store.seed
    own, inserted = torch.arange(300) - 500, [0, 0]
    optimizer, twins = SparseAdamW({"t": table}, lr=0.1), SparseAdamW({"t": twin}, lr=0.1)
    initial = drawn()
    initial._store.seed = table._store.seed

    def bring(which: int) -> None:
        begin = inserted[which]
        ids = torch.arange(begin, begin + 40)
        ids = torch.cat([ids, ids * 2 + which])
        with torch.no_grad():
            found = table(ids + 10_000)
        assert found.isfinite().all()
        inserted[which] = begin + 40

    def remove() -> None:
        table(gone).sum()
        table.delete(gone)

    gone, steps = torch.arange(50) + 5_000_000, 0
    with beside(lambda: bring(0), lambda: bring(1), remove):
        for number in until(2 * SECONDS):
            train(table, optimizer, own[number % 200 :])
            steps += 1
    table.delete(gone)
    for number in range(steps):
        train(twin, twins, own[number % 200 :])
    require_sound(table)
    trained = twin.ids()
    for one, other in zip(
        contents(table, optimizer, trained), contents(twin, twins, trained), strict=True
    ):
        assert torch.equal(one, other)
    expected = set(trained.tolist())
    for which in (0, 1):
        run = torch.arange(inserted[which])
        expected |= set((run + 10_000).tolist()) | set((run * 2 + which + 10_000).tolist())
    assert set(table.ids().tolist()) == expected
    rest = torch.tensor(sorted(expected - set(trained.tolist())))
    weights, *moments = contents(table, optimizer, rest)
    with torch.no_grad():
        assert torch.equal(weights, bits(initial(rest)))
    assert all(not x.any() for x in moments)
    assert min(inserted) > 400
    assert steps > 20


def test_backward_in_several_threads_adds_up():
    table, twin = drawn(), drawn()
    twin._store.seed = table._store.seed
    optimizer, twins = SparseAdamW({"t": table}, lr=0.1), SparseAdamW({"t": twin}, lr=0.1)

    def leave(table: HashTable, which: int) -> None:
        for number in range(60):
            ids = torch.arange(20) * 3 + which + 60 * (number % 4)
            (table(ids) * (number + 1.0)).sum().backward()

    threads = [threading.Thread(target=leave, args=(table, which)) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in range(3):
        leave(twin, which)
    optimizer.step()
    twins.step()
    ids = twin.ids()
    assert len(table) == ids.numel() == 240
    for one, other in zip(contents(table, optimizer, ids), contents(twin, twins, ids), strict=True):
        assert torch.equal(one, other)


def test_eviction_beside_training_keeps_the_bound():
    table = drawn(filter_hook=FilterHook("LRU", {"max_rows": 400}))
    optimizer, next_id = SparseAdamW({"t": table}, lr=0.1), [10_000]

    def bring() -> None:
        with torch.no_grad():
            table(torch.arange(next_id[0], next_id[0] + 30))
        next_id[0] += 30

    with beside(bring):
        for number in until(SECONDS):
            train(table, optimizer, torch.arange(100) + number % 7)
            assert len(table) <= 400
    require_sound(table)
    assert next_id[0] > 11_000


def test_state_dict_beside_training_is_of_one_moment():
    """All rows and moments of a table are the same at every moment, see above."""
    table = HashTable([16], 64)
    optimizer = SparseAdamW({"t": table}, lr=0.1)
    train_ids, steps = torch.arange(2000), set()
    table(train_ids).sum().backward()
    optimizer.step()
    rows = table._store.find(train_ids)

    def save() -> None:
        state = optimizer.state_dict()["state"]["t"]
        assert state["exp_avg"].unique().numel() == state["exp_avg_sq"].unique().numel() == 1
        assert table.state_dict()["embedding"].unique().numel() == 1
        steps.add(state["step"])

    with beside(save):
        for _ in until(SECONDS):
            table.accept_grad(rows, torch.ones(1, 16).expand(2000, 16))
            optimizer.step()
            optimizer.zero_grad()
    assert len(steps) > 3


@pytest.mark.parametrize("mode", ["skip", "dense"])
def test_a_checkpoint_beside_training_is_of_one_moment(tmp_path, monkeypatch, mode):
    """Though it is written in chunks, and though rows may be behind."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 1 << 12)

    def make():
        table = HashTable([16], 64)
        return table, SparseAdamW({"t": table}, lr=0.1, untouched=mode)

    table, optimizer = make()
    train_ids, paths = torch.arange(500), []
    table(train_ids).sum().backward()
    optimizer.step()
    rows = table._store.find(train_ids)

    def save() -> None:
        paths.append(checkpoint.save(tmp_path, table, optimizer, step=len(paths), keep=12))

    with beside(save):
        for _ in until(SECONDS):
            table.accept_grad(rows, torch.ones(1, 16).expand(500, 16))
            optimizer.step()
            optimizer.zero_grad()
    assert len(paths) > 3
    for path in paths[-12:]:
        other, its_optimizer = make()
        checkpoint.load(path, other, its_optimizer)
        state = its_optimizer.state_dict()["state"]["t"]
        assert state["exp_avg"].unique().numel() == state["exp_avg_sq"].unique().numel() == 1
        assert other.state_dict()["embedding"].unique().numel() == 1


def test_an_exception_lets_other_threads_in():
    table = drawn(filter_hook=FilterHook("LRU", {"max_rows": 3}))
    optimizer = SparseAdamW({"t": table})
    with pytest.raises(RuntimeError, match="max_rows"):
        table(torch.arange(9))
    found = table(torch.arange(2))
    found.backward(torch.ones_like(found))
    table._grads._grads[0].grad.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        optimizer.step()
    done = []
    thread = threading.Thread(target=lambda: done.append(len(table)), daemon=True)
    thread.start()
    thread.join(10)
    assert done == [2]


def test_locks_are_taken_in_one_order():
    class Owner:
        def __init__(self) -> None:
            give_lock(self)

    owners, count = [Owner() for _ in range(3)], [0]

    def hold(order: list[Owner]) -> None:
        with Held(order), Held(order[:1]):
            before = count[0]
            time.sleep(0)
            count[0] = before + 1

    turns = [0, 0]

    def turn(which: int) -> None:
        hold(owners[:: -1 if which else 1])
        turns[which] += 1

    with beside(lambda: turn(0), lambda: turn(1)):
        time.sleep(0.5)
    assert count[0] == sum(turns) > 100
    assert min(turns) > 0


def test_copies_have_a_lock_of_their_own():
    table = drawn()
    table(torch.arange(3))
    for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert twin.lock is not table.lock
        done = []
        with table.lock:
            thread = threading.Thread(target=lambda t=twin, d=done: d.append(len(t)), daemon=True)
            thread.start()
            thread.join(10)
        assert done == [3]
