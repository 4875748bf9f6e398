"""Train one run, epoch by epoch, so that it can stop after any batch and go on bitwise."""

from __future__ import annotations

import dataclasses
import signal
import time
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm import tqdm

from .data import Ratings, renumber
from .model import build, table_bytes
from .report import auc, rmse

LIKED = 4.0  # a rating from here on is a positive for the AUC
EVAL_BATCH = 16_384
BATCHES_PER_REFRESH = 10  # the progress bar reads the loss, which waits for a GPU


@dataclass(frozen=True)
class Config:
    """What the result depends on; a run is resumed with the same values only."""

    data: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    dim: int
    seed: int
    device: str
    threads: int
    validation: bool


class StopRequest:
    """While entered, Ctrl-C asks to stop after the current batch; a second one stops at once."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopRequest:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True


class Run:
    """One of the three runs: model, optimizers, and how far they have come.

    epoch and batch say what comes next; metrics hold one value per finished epoch.
    """

    def __init__(
        self, name: str, config: Config, ratings: Ratings, train: Tensor, held_out: Tensor
    ) -> None:
        self.name = name
        self.config = config
        self.device = torch.device(config.device)
        self.scale = ratings.rating[train].min().item(), ratings.rating[train].max().item()
        numbered = {key: renumber(field, train) for key, field in ratings.fields.items()}
        if name != "sparse_adamw":
            fields = {key: field for key, (field, _) in numbered.items()}
            ratings = dataclasses.replace(ratings, fields=fields)
        self.ratings = ratings.to(self.device)
        self.train = train.to(self.device)
        self.held_out = held_out.to(self.device)
        torch.manual_seed(config.seed)
        self.model, self.table_optimizer, self.dense_optimizer = build(
            name,
            {key: rows for key, (_, rows) in numbered.items()},
            config.dim,
            ratings.rating[train].mean().item(),
            config.lr,
            config.weight_decay,
            self.device,
        )
        self.epoch = 0
        self.batch = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.metrics: dict[str, Any] = {
            "auc": [],
            "rmse": [],
            "loss": [],
            "optimizer_seconds": 0.0,
            "table_bytes": 0,
        }

    def train_epoch(self, stop: StopRequest) -> None:
        """Train to the end of the epoch and evaluate, or to the batch after which to stop."""
        batches = self.batch_order().split(self.config.batch_size)
        label = f"{self.name} epoch {self.epoch + 1}/{self.config.epochs}"
        with tqdm(total=len(batches), initial=self.batch, desc=label, leave=False) as bar:
            for positions in batches[self.batch :]:
                loss = self.train_batch(positions)
                self.loss_sum += loss.double() * len(positions)
                self.batch += 1
                if self.batch % BATCHES_PER_REFRESH == 0:
                    bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                bar.update()
                if stop.received and self.batch < len(batches):
                    return
        score, error = self.evaluate()
        loss_mean = self.loss_sum.item() / len(self.train)
        self.metrics["auc"].append(score)
        self.metrics["rmse"].append(error)
        self.metrics["loss"].append(loss_mean)
        self.metrics["table_bytes"] = table_bytes(self.model, self.table_optimizer)
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss_sum.zero_()
        print(f"{label}: loss {loss_mean:.4f}, held-out AUC {score:.4f}, RMSE {error:.4f}")

    def batch_order(self) -> Tensor:
        """Positions of the training ratings in this epoch's order, the same for every run."""
        order = np.random.default_rng([self.config.seed, self.epoch]).permutation(len(self.train))
        return self.train[torch.from_numpy(order).to(self.device)]

    def train_batch(self, positions: Tensor) -> Tensor:
        """One step of both optimizers on the ratings at positions [B]; the loss, detached."""
        prediction = self.predict(positions)
        loss = mse_loss(prediction, self.ratings.rating.index_select(0, positions))
        loss.backward()
        self.dense_optimizer.step()
        self.dense_optimizer.zero_grad()
        start = self._clock()
        self.table_optimizer.step()
        self.table_optimizer.zero_grad()
        self.metrics["optimizer_seconds"] += self._clock() - start
        return loss.detach()

    def predict(self, positions: Tensor) -> Tensor:
        """Predicted ratings [B] of the ratings at positions [B]."""
        fields = self.ratings.fields.items()
        prediction: Tensor = self.model({name: field.select(positions) for name, field in fields})
        return prediction

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Held-out AUC and RMSE; in eval mode an id without a row reads as zeros."""
        self.model.eval()
        prediction = torch.cat([self.predict(part) for part in self.held_out.split(EVAL_BATCH)])
        self.model.train()
        rating = self.ratings.rating.index_select(0, self.held_out)
        return auc(prediction, rating >= LIKED), rmse(prediction.clamp(*self.scale), rating)

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        return {
            "name": self.name,
            "epoch": self.epoch,
            "batch": self.batch,
            "loss_sum": self.loss_sum,
            "metrics": self.metrics,
            "model": dict(self.model.state_dict()),
            "table_optimizer": self.table_optimizer.state_dict(),
            "dense_optimizer": self.dense_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.loss_sum.copy_(state["loss_sum"])
        self.metrics = state["metrics"]
        self.model.load_state_dict(state["model"])  # before the moments, which need the rows
        self.table_optimizer.load_state_dict(state["table_optimizer"])
        self.dense_optimizer.load_state_dict(state["dense_optimizer"])
