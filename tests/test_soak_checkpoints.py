"""Campaigns against checkpoints: a tenth of each here, all of it with SOAK=1 (`make soak`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import Training
from test_checkpoint_faults import Victim, rewrite, saved  # noqa: F401

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
