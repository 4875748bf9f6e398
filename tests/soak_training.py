"""Kills a training with SIGKILL, again and again: ``python soak_training.py FOLDER KILLS SEED``.

One process imports everything, compiles what Numba compiles and trains once without interruption.
Every training that is to be killed is a fork of it, so that a start takes no seconds. Prints one
line of JSON; raises at the first difference. Run by test_soak_checkpoints.py.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import statistics
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from checkpoint_runs import Resumable
from test_state import differences

from cupy_sparse_adamw import (
    AdmitHook,
    FilterHook,
    HashTable,
    NormalInitializer,
    SparseAdamW,
    checkpoint,
    filter_out_sparse_param,
)

DIM, BATCH, STEPS, EVERY, KEEP, ACCUMULATE, MAX_ROWS = 8, 64, 60, 3, 3, 2, 150
#: Checkpoints that may be there: those that are kept, and a full one and an increment below them.
AT_MOST = KEEP + 2
PHASES = ("starting", "training", "saving", "removing old ones", "at its end")
START, TRAIN, SAVE, REMOVE, END = range(len(PHASES))


class Model(torch.nn.Module):
    """Users are admitted at their second look-up, and the oldest go; films are an Embedding.

    Words and films that no batch touches move as with dense AdamW.
    """

    def __init__(self) -> None:
        super().__init__()
        self.users = HashTable(
            [DIM],
            16,
            initializer=NormalInitializer(std=0.1),
            admit_hook=AdmitHook("Frequency", {"min_frequency": 2, "width": 512}),
            filter_hook=FilterHook("LRU", {"max_rows": MAX_ROWS}),
        )
        self.words = HashTable([DIM], 16, initializer=NormalInitializer(std=0.1))
        self.films = torch.nn.Embedding(100, DIM, sparse=True)
        self.head = torch.nn.Linear(DIM, 1)

    def forward(self, users: torch.Tensor, words: torch.Tensor, films: torch.Tensor) -> Any:
        return self.head(torch.tanh(self.users(users) * self.films(films) + self.words(words)))


class Training(Resumable):
    """Step i is a function of i, and of a generator whose state is in the checkpoints."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Model()
        tables = filter_out_sparse_param(self.model)
        self.tables = SparseAdamW({"users": tables.pop("users")}, lr=0.05)
        self.tables.add_param_group({"params": tables, "untouched": "dense"})
        self.tables.set_grad_accum_steps(ACCUMULATE)
        self.dense = torch.optim.AdamW(self.model.head.parameters(), lr=0.01)
        self.schedulers = [
            torch.optim.lr_scheduler.StepLR(self.dense, 5, 0.9),
            torch.optim.lr_scheduler.LinearLR(self.tables, 0.1, total_iters=20),
        ]
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, i: int) -> str:
        """Train with micro-batch i. Returns the loss, all bits of it."""
        data = torch.Generator().manual_seed(i)
        users = torch.randint(4 * i, 4 * i + 200, (BATCH,), generator=data)
        words = torch.randint(-5 * i - 9, 1, (BATCH,), generator=data)
        films = torch.randint(0, 100, (BATCH,), generator=data)
        noise = torch.randn(BATCH, 1, generator=self.generator)
        loss = (self.model(users, words, films) - 0.1 * noise - (users % 3)[:, None]).square()
        loss.mean().backward()
        self.tables.step()
        self.tables.zero_grad()
        if i % ACCUMULATE == ACCUMULATE - 1:
            self.dense.step()
            self.dense.zero_grad()
            for scheduler in self.schedulers:
                scheduler.step()
        return loss.mean().item().hex()

    def save(self, root: Path, i: int) -> None:
        """Two increments follow each full checkpoint."""
        checkpoint.save(
            root,
            self.model,
            self.optimizers,
            step=i,
            keep=KEEP,
            incremental=i // EVERY % 3 != 0,
            extra=self.extra(),
        )

    def load(self, path: Path) -> int:
        """Go back to a checkpoint. Returns the first step that comes after it."""
        return self.go_on(path) + 1


def train(root: Path, phase: mmap.mmap) -> None:
    """What a user's script does: go on from the latest checkpoint, or begin; note each loss."""
    phase[0] = START
    diary = os.open(root / "diary", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    path = checkpoint.latest(root)
    training = Training(seed=0 if path is None else 1)  # all that was drawn is loaded
    for i in range(0 if path is None else training.load(path), STEPS):
        phase[0] = TRAIN
        os.write(diary, f"{i} {training.step(i)}\n".encode())
        if i % EVERY == EVERY - 1:
            phase[0] = SAVE
            training.save(root, i)
            os.write(diary, f"{i} saved\n".encode())
    phase[0] = END


class Campaign:
    """Kills trainings until there were so many kills, and lets the last one reach its end."""

    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.folder, self.kills, self.choice = folder, kills, random.Random(seed)
        self.phase = mmap.mmap(-1, 1)  # shared with the forks
        self.killed: Counter[str] = Counter()
        self.leftovers = self.without = self.runs = 0
        self._train_once()
        self._time_saves()

    def _train_once(self) -> None:
        training = Training(seed=0)
        self.losses: dict[int, str] = {}
        self.states: dict[int, Any] = {}
        for i in range(STEPS):
            self.losses[i] = training.step(i)
            if i % EVERY == EVERY - 1:
                self.states[i] = training.state()
        seen = {u for i in range(STEPS) for u in range(4 * i, 4 * i + 200)}
        assert 0 < len(training.model.users) <= MAX_ROWS < len(seen)  # some were let go

    def _time_saves(self) -> None:
        training, root = Training(seed=0), self.folder / "timed"
        steps, saves = [], []
        for i in range(STEPS):
            began = time.perf_counter()
            training.step(i)
            steps.append(time.perf_counter() - began)
            if i % EVERY == EVERY - 1:
                began = time.perf_counter()
                training.save(root, i)
                saves.append(time.perf_counter() - began)
        self.step_s, self.save_s = statistics.median(steps), statistics.median(saves)
        began = time.perf_counter()
        Training(seed=1).load(checkpoint.latest(root))
        self.start_s = time.perf_counter() - began
        shutil.rmtree(root)

    def run(self) -> None:
        """One training after another, each from nothing to its end."""
        while self.killed.total() < self.kills:
            root = self.folder / f"run-{self.runs}"
            root.mkdir()
            while not self._killed_before_its_end(root):
                self._look(root)
            self._look(root)
            assert checkpoint.latest(root).name == f"step-{STEPS - 1:010d}"
            last = Training(seed=2)
            last.load(checkpoint.latest(root))
            last.save(root, STEPS)  # removes what a kill after the last rename left
            self.states[STEPS] = self.states[STEPS - 1]
            there = [path for path in root.iterdir() if path.name.startswith("step-")]
            assert KEEP <= len(there) <= AT_MOST, there
            for path in there:
                self._is_whole(path)
            steps = {int(line.split()[0]) for line in (root / "diary").read_text().splitlines()}
            assert steps == set(range(STEPS))
            shutil.rmtree(root)
            self.runs += 1

    def _killed_before_its_end(self, root: Path) -> bool:
        """Fork a training and kill it. Returns True if it was at its end before."""
        self.phase[0] = START
        child = os.fork()
        if child == 0:
            code = 1
            try:
                remove_old = checkpoint.remove_old

                def removing(*args: Any) -> None:
                    self.phase[0] = REMOVE
                    remove_old(*args)

                checkpoint.remove_old = removing
                train(root, self.phase)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        if self.killed.total() < self.kills:
            if self.killed.total() % 2:  # at a moment of a save or soon after it
                while (
                    self.phase[0] < SAVE
                    and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
                ):
                    time.sleep(1e-4)
                time.sleep(self.choice.uniform(0, 1.3 * self.save_s))
            else:  # at any moment
                interval = EVERY * self.step_s + self.save_s
                time.sleep(self.choice.uniform(0, self.start_s + 4 * interval))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), f"a training ended with {status}"
        if status:
            self.killed[PHASES[self.phase[0]]] += 1
        return status == 0

    def _look(self, root: Path) -> None:
        """The losses so far, and the checkpoint that a restart will find."""
        diary = root / "diary"
        lines = [line.split() for line in diary.read_text().splitlines()] if diary.exists() else []
        for i, what in lines:
            assert what in ("saved", self.losses[int(i)]), f"step {i}: {what}"
        saved = max((int(i) for i, what in lines if what == "saved"), default=-1)
        self.leftovers += any(
            path.name.startswith((".saving", ".removing")) for path in root.iterdir()
        )
        path = checkpoint.latest(root)
        if path is None:
            self.without += 1
        assert saved <= (-1 if path is None else self._is_whole(path)), "a checkpoint is lost"

    def _is_whole(self, path: Path) -> int:
        training = Training(seed=2)
        i = training.load(path) - 1
        assert differences(training.state(), self.states[i]) == [], path
        return i


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)  # before the first fork
    checkpoint.CHUNK_BYTES = 1 << 12
    campaign = Campaign(folder, kills, seed)
    began = time.perf_counter()
    campaign.run()
    print(
        json.dumps(
            {
                "kills": campaign.killed.total(),
                "by phase": dict(campaign.killed),
                "left half a folder": campaign.leftovers,
                "before the first checkpoint": campaign.without,
                "trainings": campaign.runs,
                "save ms": round(campaign.save_s * 1e3, 1),
                "step ms": round(campaign.step_s * 1e3, 1),
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
