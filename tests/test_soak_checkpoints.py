"""Campaigns against checkpoints: a tenth of each here, all of it with SOAK=1 (`make soak`)."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import Training
from test_checkpoint_faults import Victim, rewrite, saved  # noqa: F401
from test_state import differences

from cupy_sparse_adamw import checkpoint

ROOT = Path(__file__).resolve().parents[1]
SHARE = 1 if os.environ.get("SOAK") == "1" else 10
#: Half of the kills wait for a save to begin; most of them fall into it.
IN_SAVES = 0.25

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks trainings and loads")


def campaign(script: str, *args: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / script, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    print(f"\n{script}: {done.stdout}")
    return json.loads(done.stdout)


def test_kills(tmp_path):
    """No checkpoint is lost, and every loss and the end are those of a run without kills."""
    told = campaign("soak_training.py", tmp_path, 200 // SHARE, 0)
    assert told["kills"] == 200 // SHARE
    assert told["by phase"]["saving"] >= IN_SAVES * told["kills"]
    assert told["left half a folder"] > 0
    assert told["trainings"] >= 1


def test_mutants(tmp_path):
    told = campaign("soak_mutants.py", tmp_path, 0, 10_000 // SHARE)
    assert told["findings"] == []
    assert told["mutants"] == 10_000 // SHARE
    seen = told["outcomes"]
    assert seen["damaged, refused with CheckpointError"] > 0.3 * told["mutants"]
    assert seen["forged, refused with CheckpointError"] > 0.1 * told["mutants"]
    assert seen["forged, loaded: what the checkpoint says"] > 0.01 * told["mutants"]


# ---------------------------------------------------------------------- disks that fail


class Disk:
    """Fails at one system call of a save: a full one from there on, else only there."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, error: int) -> None:
        self.at, self.error, self.count, self.failed = at, error, 0, ""
        for name in ("open", "mkdir", "write", "fsync", "rename"):
            patch.setattr(os, name, functools.partial(self.call, name, getattr(os, name)))

    def call(self, name: str, real: Any, *args: Any, **options: Any) -> Any:
        if "dir_fd" in options:  # shutil, which removes something
            return real(*args, **options)
        self.count += 1
        is_first = self.count == self.at
        if is_first:
            self.failed = name
            if name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
        if is_first or (self.failed and self.error == errno.ENOSPC):
            raise OSError(self.error, os.strerror(self.error))
        return real(*args, **options)


#: By what is there before, and how is saved.
SAVES: dict[str, tuple[bool, dict[str, Any]]] = {
    "the first": (False, {}),
    "a full one": (True, {}),
    "an increment": (True, {"incremental": True}),
    "a full one, one kept": (True, {"keep": 1}),
}


def test_disks_that_fail(tmp_path, saved, monkeypatch):  # noqa: F811
    """An error that names a file, what was there as it was, memory as it was; then a save works."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 1024)
    monkeypatch.setattr("os.fsync", lambda file: None)  # nobody pulls the plug here
    begin, root = time.monotonic(), tmp_path / "run"
    before, failed, outcomes = None, Counter(), Counter()
    kinds = itertools.product(SAVES.values(), (errno.ENOSPC, errno.EIO))
    for number, ((has_some, options), error) in enumerate(kinds):
        for at in itertools.count(1 + number % SHARE, SHARE):
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(saved, root)
            run = Training().load(checkpoint.latest(root)).play(7, 9)
            before = before or run.state()
            if not has_some:
                shutil.rmtree(root)
            there = {path: path.read_bytes() for path in root.glob("step-*/*")}
            with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                disk, caught = Disk(patch, at, error), None
                try:
                    run.save(root, 9, **options)
                except OSError as raised:
                    caught = raised
            if not disk.failed:
                break
            failed[disk.failed] += 1
            is_saved = (root / "step-0000000009").exists()
            if caught is not None:
                assert caught.errno == error
                assert str(root) in str(caught.filename), caught
                outcomes["refused, though it is there" if is_saved else "refused"] += 1
            else:
                assert is_saved
                outcomes["an old one stays" if warned else "saved"] += 1
            assert len(warned) == (caught is None and "keep" in options and disk.failed == "rename")
            if caught is not None:
                assert {path: path.read_bytes() for path in there} == there
            for path in root.glob("step-*"):  # no increment without its base
                Training().load(path)
            assert not list(root.glob(".saving*"))
            assert differences(run.state(), before) == []
            if is_saved:
                twin = Training(seed=2).load(checkpoint.latest(root))
                assert differences(twin.state(), before) == []
            path = run.save(root, 10 if is_saved else 9, **options)
            assert differences(Training(seed=2).load(path).state(), before) == []
    seconds = time.monotonic() - begin
    print(f"\ndisks: {dict(failed)} failed, {dict(outcomes)}, {seconds:.1f} s")
    assert sum(failed.values()) > 200 / SHARE
    assert outcomes["refused"] > 0.8 * sum(failed.values())


# ---------------------------------------------------------------------- what they found


def no_checksum_of_the_base(index):
    index["base"] = {"name": "step-0000000004"}


def no_owner(index):
    del index["tables"]["plain"]["owner"]


def more_rows_than_memory(index):
    table = index["tables"]["plain"]
    table["rows"] = table["chunks"][0]["rows"] = 10**15
    index["files"][table["chunks"][0]["file"]]["bytes"] = 10**18


def one_moment(index):
    for table in index["tables"].values():
        table["slots"].pop("sparse_adamw_exp_avg_sq", None)


def a_module_as_dtype(index):
    index["tables"]["plain"]["slots"]["embedding"]["dtype"] = "_dynamo"


def a_key_that_is_a_number(index):
    values = dict(index["state"]["model"]["dict"])["values"]["OrderedDict"]
    values[0][0] = 7


def a_weight_in_extra(index):
    index["state"]["extra"] = {"reference": "plain"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (no_checksum_of_the_base, "index.json is no index of a checkpoint: 'sha256'"),
        (no_owner, "index.json is no index of a checkpoint: 'owner'"),
        (more_rows_than_memory, r"table-\d-0.safetensors is damaged: it has \d+ bytes, not 10+"),
        (a_module_as_dtype, "index.json is no index of a checkpoint: '_dynamo'"),
        (a_key_that_is_a_number, "holds a state that is none: a state has a key 7"),
        (a_weight_in_extra, "holds a state that is none: a weight of table 'plain' is not in"),
    ],
)
def test_forged(tmp_path, saved, change, text):  # noqa: F811
    shutil.copytree(saved, tmp_path / "run")
    path = tmp_path / "run" / "step-0000000005"
    rewrite(path / "index.json", change)
    Victim().cannot_load(path, text)


def test_one_of_two_moments(tmp_path, saved):  # noqa: F811
    shutil.copytree(saved, tmp_path / "run")
    path = tmp_path / "run" / "step-0000000005"
    rewrite(path / "index.json", one_moment)
    with pytest.raises(ValueError, match="has one of two moments"):
        Training().load(path)


def test_a_dtype_is_no_lookup_in_torch():
    from cupy_sparse_adamw.checkpoint.files import restored

    tensor = torch.zeros(7, dtype=torch.uint8)
    for dtype, shape in (("load", [7]), ("complex64", [1]), ("complex64", [2**70])):
        with pytest.raises(ValueError, match=r"torch has no dtype|a tensor is"):
            restored(tensor, dtype, shape)
