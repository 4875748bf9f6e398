"""Processes that are forked beside live tables, and threads that change them."""

from __future__ import annotations

import multiprocessing
import random
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from test_threads import SOAK, beside, drawn, often, require_sound, tell, train  # noqa: F401
from torch.utils.data import DataLoader, Dataset

from cupy_sparse_adamw import HashTable, SparseAdamW

pytestmark = [
    pytest.mark.skipif(
        "fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork"
    ),
    # Since Python 3.12 a fork beside threads is warned of: that is what is tested.
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]


def in_child(function: Callable[[], object], timeout: float = 60) -> object:
    """What a function returns in a forked child, or the text of what it raised."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def run() -> None:
        try:
            there.send(function())
        except BaseException as error:
            there.send(f"{type(error).__name__}: {error}")

    process = context.Process(target=run)
    process.start()
    there.close()
    try:
        assert here.poll(timeout), "the child hangs"
        return here.recv()
    finally:
        process.kill()
        process.join()


def bringer(table: HashTable) -> Callable[[], None]:
    """What makes a table grow at each call, and at each twentieth empties it."""
    next_id = 0

    def bring() -> None:
        nonlocal next_id
        with torch.no_grad():
            table(torch.arange(next_id, next_id + 3000))
        next_id += 3000
        if next_id % 60_000 == 0:
            table.clear()  # or children would look at more and more

    return bring


def test_a_child_gets_whole_tables_whatever_threads_do_in_the_parent():
    table, other = HashTable([32], 64), drawn()
    optimizer = SparseAdamW({"t": table}, lr=0.1)
    ids = torch.arange(1500)
    table(ids).sum().backward()
    optimizer.step()
    rows = table._store.find(ids)

    def step() -> None:
        table.accept_grad(rows, torch.ones(1, 32).expand(1500, 32))
        optimizer.step()
        optimizer.zero_grad()

    def look() -> tuple[int, bool]:
        torch.set_num_threads(1)  # torch's own threads do not survive a fork
        require_sound(other)
        require_sound(table)
        step()  # trains a copy
        table.eval()
        return table(ids).unique().numel(), bool(table(ids)[0, 0] != 0)

    begin, choice, forks = time.monotonic(), random.Random(0), 300 if SOAK else 30
    with beside(step, bringer(other)):
        for _ in range(forks):
            time.sleep(choice.uniform(0, 0.01))
            assert in_child(look) == (1, True)
    tell(f"{forks} forks", begin)
    require_sound(other)
    before = table(ids)[:1].detach().clone()
    in_child(lambda: step())
    assert torch.equal(table(ids)[:1], before)


class Lookups(Dataset):
    """Items that a table looks up in the worker."""

    def __init__(self, table: HashTable, first: int = 0, insert: bool = False) -> None:
        self.table, self.first, self.insert = table, first, insert

    def __len__(self) -> int:
        return 20

    def __getitem__(self, item: int) -> torch.Tensor:
        ids = torch.tensor([self.first + item])
        if self.insert:
            self.table.insert(ids, torch.ones(1, 8))
        with torch.no_grad():
            return self.table(ids)[0]


def batches(dataset: Dataset, workers: int = 2) -> torch.Tensor:
    context = "fork" if workers else None
    loader = DataLoader(dataset, 5, num_workers=workers, multiprocessing_context=context)
    return torch.cat(list(loader))


def test_workers_of_a_dataloader_read_but_do_not_insert():
    table = drawn()
    optimizer = SparseAdamW({"t": table}, lr=0.1)
    train(table, optimizer, torch.arange(20))
    with torch.no_grad():
        expected = table(torch.arange(20))
    assert torch.equal(batches(Lookups(table)), expected)  # in training mode, but none is new
    table.eval()
    assert torch.equal(batches(Lookups(table)), expected)
    assert torch.equal(batches(Lookups(table, 15))[5:], torch.zeros(15, 8))
    with pytest.raises(RuntimeError, match=r"worker has a copy.*is lost"):
        batches(Lookups(table, insert=True))
    table.train()
    with pytest.raises(RuntimeError, match=r"they would be lost; call table.eval\(\) in the"):
        batches(Lookups(table, 15))
    assert len(table) == 20
    assert torch.equal(batches(Lookups(table, 15), workers=0)[:5], expected[15:])
    assert len(table) == 35


class Whole(Dataset):
    """How many different rows a worker finds in tables that others change in the parent."""

    def __init__(self, trained: HashTable, growing: HashTable) -> None:
        self.trained, self.growing = trained, growing

    def __len__(self) -> int:
        return 20

    def __getitem__(self, item: int) -> int:
        require_sound(self.growing)
        return self.trained.eval()(torch.arange(1500)).detach().unique().numel()


def test_workers_of_a_dataloader_beside_threads_that_train():
    """Their tables are those of one moment: all rows are the same at each, see above."""
    table, other = HashTable([32], 64), drawn()
    optimizer = SparseAdamW({"t": table}, lr=0.1)

    def step() -> None:
        table(torch.arange(1500)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    begin, loaders, items = time.monotonic(), 60 if SOAK else 6, 0
    with beside(step, bringer(other)):
        for _ in range(loaders):
            found = batches(Whole(table, other))
            assert found.tolist() == [1] * 20
            items += found.numel()
    tell(f"{items} items from {2 * loaders} workers", begin)


class OwnTable(Dataset):
    """Each worker numbers its ids with a table that it makes itself."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, item: int) -> int:
        table = drawn()
        table(torch.arange(item + 1))
        return len(table)


def require_says(script: str, expected: str) -> None:
    """Run a script that may hang in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == expected, done.stderr


MAKES_LOCKS_BESIDE_FORKS = """
import copy, os, sys, threading, torch
from cupy_sparse_adamw import HashTable, SparseAdamW

table = HashTable([4])
optimizer = SparseAdamW({"t": table})
table(torch.arange(100)).sum().backward()
optimizer.step()
count = 0

def copies():
    global count
    while True:
        with optimizer.locked():
            copy.deepcopy(table)  # has a lock of its own
        count += 1

threading.Thread(target=copies, daemon=True).start()
forks = 0
while forks < 100 or count < 20:
    pid = os.fork()
    if pid == 0:
        os._exit(len(table) != 100)
    assert os.waitpid(pid, 0)[1] == 0
    forks += 1
sys.stdout.write("done")
sys.stdout.flush()
os._exit(0)
"""


def test_forks_beside_a_thread_that_makes_tables_under_a_lock():
    require_says(MAKES_LOCKS_BESIDE_FORKS, "done")


CTRL_C_WHILE_A_FORK_WAITS = """
import os, signal, sys, threading, time
from cupy_sparse_adamw import HashTable

signal.signal(signal.SIGINT, signal.default_int_handler)
table = HashTable([4])
held = threading.Event()

def hold():
    with table.lock:
        held.set()
        time.sleep(0.3)

threading.Thread(target=hold).start()
held.wait()
threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    pid = os.fork()
    if pid == 0:
        os._exit(len(table))
    assert os.waitpid(pid, 0)[1] == 0
    time.sleep(5)
    sys.stdout.write("no KeyboardInterrupt")
except KeyboardInterrupt:
    made = threading.Thread(target=lambda: HashTable([4]))
    made.start()
    made.join(5)
    sys.stdout.write("alive" if not made.is_alive() else "a thread hangs")
sys.stdout.flush()
os._exit(0)
"""


def test_ctrl_c_while_a_fork_waits_comes_after_it():
    require_says(CTRL_C_WHILE_A_FORK_WAITS, "alive")


def test_a_worker_trains_tables_of_its_own():
    assert torch.cat([x.view(-1) for x in DataLoader(OwnTable(), num_workers=2)]).tolist() == [
        1,
        2,
        3,
        4,
    ]
