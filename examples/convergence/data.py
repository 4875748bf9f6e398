"""The two data sets of the study, each split by time into training, validation and test.

A run sees a `Fold`. The one for tuning is made of the training and validation examples alone, so
that nothing chosen by it can depend on the test set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from movielens.data import Ratings, split_by_time
from movielens.data import load as load_ratings
from torch import Tensor

LIKED = 4.0  # a rating from here on is a positive for the AUC


@dataclass(frozen=True)
class Examples:
    """N examples. ids: [N] int64, the row in each of two tables. target: [N] float32.

    planted: [N] float32, the logits that clicks were drawn from; None for ratings.
    """

    ids: dict[str, Tensor]
    target: Tensor
    planted: Tensor | None = None

    def __len__(self) -> int:
        return len(self.target)

    def take(self, positions: Tensor) -> Examples:
        """The examples at positions [B], in that order."""
        ids = {name: rows[positions] for name, rows in self.ids.items()}
        planted = None if self.planted is None else self.planted[positions]
        return Examples(ids, self.target[positions], planted)

    def batches(self, size: int) -> Iterator[Examples]:
        """The examples in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.take(torch.arange(start, min(start + size, len(self))))


@dataclass(frozen=True)
class Fold:
    """Examples to train on and later ones to measure with.

    rows: of each table; the second one holds the items. dim: factors of a row.
    clicks: whether targets are clicks (0 or 1) rather than ratings.
    """

    train: Examples
    held_out: Examples
    rows: dict[str, int]
    dim: int
    clicks: bool


@dataclass(frozen=True)
class DataSet:
    """A data set in order of time, and its parts: positions into it.

    name: tells it from every other: a digest of what it holds, or what it is made from.
    """

    name: str
    examples: Examples
    rows: dict[str, int]
    dim: int
    clicks: bool
    train: Tensor
    validation: Tensor
    test: Tensor

    def tuning_fold(self) -> Fold:
        """Trains on the training part and measures on the validation part."""
        return self._fold(self.train, self.validation)

    def test_fold(self) -> Fold:
        """Trains on the training and validation parts and measures on the test part."""
        return self._fold(torch.cat([self.train, self.validation]), self.test)

    def _fold(self, train: Tensor, held_out: Tensor) -> Fold:
        parts = self.examples.take(train), self.examples.take(held_out)
        return Fold(*parts, self.rows, self.dim, self.clicks)


def split(timestamp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the training, validation and test parts, by time [N].

    The test part is the last tenth, the validation part the last tenth of what is before it.
    """
    before, test = split_by_time(timestamp)
    train, validation = split_by_time(timestamp[before])
    return before[train], before[validation], test


def movielens(path: Path | None = None) -> DataSet:
    """Ratings of users for films; None is MovieLens-100K from RecBole."""
    return from_ratings(load_ratings(path))


def from_ratings(ratings: Ratings) -> DataSet:
    """Users and films only: the other fields are left out."""
    fields = {name: ratings.fields[name] for name in ("user", "film")}
    return DataSet(
        f"{ratings.name} {ratings.digest()}",
        Examples({name: field.index for name, field in fields.items()}, ratings.rating),
        {name: len(field.values) for name, field in fields.items()},
        16,
        False,
        *split(ratings.timestamp),
    )


def clicks(
    count: int = 1_500_000, items: int = 1_000_000, users: int = 10_000, seed: int = 0
) -> DataSet:
    """Clicks drawn from planted factors, as good as a model of this kind can explain them.

    An example shows an item, drawn from Zipf(1.1), to a user, drawn uniformly. It is clicked with
    the probability sigmoid(-1 + user's bias + item's bias + dot product of 8 factors); the biases
    have a standard deviation of 0.5 and 1, the products one of 1.5.
    """
    dim = 8
    rng = np.random.default_rng(seed)
    weight = np.arange(1, items + 1, dtype=np.float64) ** -1.1
    ceiling = np.cumsum(weight) / weight.sum()
    item = np.searchsorted(ceiling, rng.random(count), side="right").clip(max=items - 1)
    user = rng.integers(users, size=count)
    user_bias, item_bias = rng.normal(0, 0.5, users), rng.normal(0, 1, items)
    user_factors = rng.normal(0, 1.5 / dim**0.5, (users, dim))
    item_factors = rng.normal(0, 1, (items, dim))
    product = np.einsum("nd,nd->n", user_factors[user], item_factors[item])
    logits = -1 + user_bias[user] + item_bias[item] + product
    clicked = rng.random(count) < 1 / (1 + np.exp(-logits))
    examples = Examples(
        {"user": torch.from_numpy(user), "item": torch.from_numpy(item)},
        torch.from_numpy(clicked.astype(np.float32)),
        torch.from_numpy(logits.astype(np.float32)),
    )
    name = f"clicks {count} {items} {users} {seed}"
    # Examples are drawn alike, so their order is as good a time as any.
    return DataSet(
        name, examples, {"user": users, "item": items}, dim, True, *split(torch.arange(count))
    )
