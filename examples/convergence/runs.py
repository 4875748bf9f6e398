"""One run: train with given settings, measure, and keep the result as a line of a file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from movielens.report import auc, rmse
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

import cupy_sparse_adamw

from .data import LIKED, Examples, Fold
from .model import Factors, initial_weights, make_optimizer

PROTOCOL = 1  # to be raised if runs with the same settings come out differently
PATIENCE = 2  # epochs without a better validation error, after which a tuning run ends
EVAL_BATCH = 65_536
BUCKETS = {"0": 0, "1": 1, "2–3": 2, "4–15": 4, "16–63": 16, "64 and more": 64}  # name: from


@dataclass(frozen=True)
class Setting:
    """All that the result of a run depends on.

    data: name of the data set. mode, batch, decay, lr: what is compared.
    seed: of initial weights and batch order; the same in all modes.
    epochs: of a tuning run the most it takes. final: measured on the test part (see `DataSet`).
    """

    data: str
    mode: str
    batch: int
    decay: float
    lr: float
    seed: int
    epochs: int
    final: bool
    protocol: int = PROTOCOL


def train(setting: Setting, fold: Fold) -> dict[str, Any]:
    """Train and measure; lists have one value per epoch, or in a final run one for the last.

    error: RMSE or log loss. seconds: of training alone, on the clock; cpu_seconds: of these, those
    in which the process had a core. bucket_auc: AUC within the groups of BUCKETS.
    """
    begun = time.perf_counter()
    model = Factors(
        initial_weights(fold.rows, fold.dim, fold.train.ids, setting.seed),
        _offset(fold),
        sparse=setting.mode != "adamw",
    )
    optimizer = make_optimizer(setting.mode, model, setting.lr, setting.decay)
    result: dict[str, Any] = {"error": [], "auc": [], "seconds": [], "cpu_seconds": []}
    for epoch in range(setting.epochs):
        start = time.perf_counter(), time.process_time()
        train_epoch(model, optimizer, fold, setting.batch, [setting.seed, epoch])
        result["seconds"].append(round(time.perf_counter() - start[0], 3))
        result["cpu_seconds"].append(round(time.process_time() - start[1], 3))
        if setting.final and epoch + 1 < setting.epochs:
            continue
        scores = predict(model, fold.held_out)
        result["error"].append(error(scores, fold))
        result["auc"].append(auc(scores, labels(fold)))
        if not setting.final and _stalled(result["error"]):
            break
    if setting.final:
        result["bucket_auc"] = bucket_auc(scores, fold)
        if fold.held_out.planted is not None:
            result["planted_auc"] = auc(fold.held_out.planted, labels(fold))
            result["planted_bucket_auc"] = bucket_auc(fold.held_out.planted, fold)
    result["run_seconds"] = round(time.perf_counter() - begun, 3)
    result["torch"], result["package"] = torch.__version__, cupy_sparse_adamw.__version__
    return result


def train_epoch(
    model: Factors, optimizer: torch.optim.Optimizer, fold: Fold, batch: int, seed: list[int]
) -> None:
    """One pass over the training examples in an order that depends on `seed` alone."""
    loss: Callable[[Tensor, Tensor], Tensor]
    loss = binary_cross_entropy_with_logits if fold.clicks else mse_loss
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(fold.train)))
    model.train()
    for part in fold.train.take(order).batches(batch):
        loss(model(part.ids), part.target).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def predict(model: Factors, examples: Examples) -> Tensor:
    """Scores [N] in eval mode, where a table of any mode reads as it is now."""
    model.eval()
    return torch.cat([model(part.ids) for part in examples.batches(EVAL_BATCH)])


def error(scores: Tensor, fold: Fold) -> float:
    """RMSE of ratings, clamped to the training ratings' range; or the log loss of clicks."""
    target = fold.held_out.target
    if fold.clicks:
        return float(binary_cross_entropy_with_logits(scores.double(), target.double()))
    lowest, highest = fold.train.target.aminmax()
    return rmse(scores.clamp(lowest, highest), target)


def labels(fold: Fold) -> Tensor:
    """[N] bool: clicked, or rated LIKED and better."""
    return fold.held_out.target >= (1 if fold.clicks else LIKED)


def bucket_auc(scores: Tensor, fold: Fold) -> dict[str, float]:
    """AUC within each of BUCKETS, by how often training showed the item; NaN for one class."""
    item = list(fold.rows)[1]
    seen = torch.bincount(fold.train.ids[item], minlength=fold.rows[item])
    seen = seen[fold.held_out.ids[item]]
    least = [*BUCKETS.values(), math.inf]
    within = [(seen >= low) & (seen < high) for low, high in pairwise(least)]
    liked = labels(fold)
    return {name: auc(scores[one], liked[one]) for name, one in zip(BUCKETS, within, strict=True)}


def _offset(fold: Fold) -> float:
    mean = fold.train.target.double().mean()
    return float(mean.logit() if fold.clicks else mean)


def _stalled(errors: list[float]) -> bool:
    """Whether the last PATIENCE epochs brought nothing; also if training has blown up."""
    if not math.isfinite(errors[-1]):
        return True
    return len(errors) > PATIENCE and min(errors[-PATIENCE:]) >= min(errors[:-PATIENCE])


class Results:
    """Results by setting, in a file with one line of JSON each; a torn last line is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._by_setting: dict[Setting, dict[str, Any]] = {}
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        for line in whole.splitlines():
            result = json.loads(line)
            self._by_setting[Setting(**result.pop("setting"))] = result

    def get(self, setting: Setting) -> dict[str, Any] | None:
        """The result of a run, or None if it is still to be made."""
        return self._by_setting.get(setting)

    def items(self) -> list[tuple[Setting, dict[str, Any]]]:
        """All settings with their results, in the file's order."""
        return list(self._by_setting.items())

    def append(self, setting: Setting, result: dict[str, Any]) -> None:
        """Keep a result, in one write, so that it is in the file whole or not at all."""
        line = json.dumps({"setting": dataclasses.asdict(setting), **result}) + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())
        self._by_setting[setting] = result
