"""Checkpoint files: written whole or not at all, and read only with the same settings."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .training import Config, Run


class CheckpointError(ValueError):
    """A checkpoint that is missing, unreadable, or made with other settings."""


def save(path: Path, config: Config, finished: dict[str, Any], run: Run | None) -> None:
    """Write a checkpoint over the last one.

    finished: the metrics of the finished runs by name. run: the one under way.
    """
    state = {
        "config": asdict(config),
        "finished": finished,
        "run": None if run is None else run.state_dict(),
    }
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: Path, config: Config) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The metrics of the finished runs by name, and the state of the run under way."""
    afresh = "start afresh without --resume"
    if not path.exists():
        raise CheckpointError(f"--resume: no checkpoint at {path}; {afresh}, or pass its --out")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        saved = state["config"]
        finished, run = state["finished"], state["run"]
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"--resume: cannot read {path} ({error}); {afresh}") from error
    for name, value in asdict(config).items():
        if saved.get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise CheckpointError(
                f"{flag}: the checkpoint at {path} was made with {saved.get(name)}, now it is "
                f"{value}; resume with the same {flag}, or {afresh}"
            )
    return finished, run
