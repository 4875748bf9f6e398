"""MovieLens ratings as fields of ids, their split by time, and batches of them.

Integer ids (users, films, ages) are used as they are; strings (genres, occupations, ZIP codes)
become int64 ids by a stable hash. A hash table takes either kind, so nothing is renumbered.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .formats import (
    ACCEPTED,
    FORMATS,
    DataError,
    Format,
    find_file,
    read_films,
    read_ratings,
    read_users,
    stable_id,
)


@dataclass(frozen=True)
class Field:
    """One feature of every rating, stored once per distinct user or film.

    values: [K] or [K, W] int64 ids (W: a padded bag of ids).
    index: [N] int64, which row of `values` each rating has.
    weight: [K, W] float32 pooling weights of a bag, 0 where padded; None for a single id.
    """

    values: Tensor
    index: Tensor
    weight: Tensor | None = None

    def select(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ids [B] or [B, W] and weights [B, W] or None of the ratings at positions [B]."""
        rows = self.index.index_select(0, positions)
        weight = None if self.weight is None else self.weight.index_select(0, rows)
        return self.values.index_select(0, rows), weight

    def to(self, device: torch.device) -> Field:
        """The field on a device."""
        weight = None if self.weight is None else self.weight.to(device)
        return Field(self.values.to(device), self.index.to(device), weight)


@dataclass(frozen=True)
class Ratings:
    """N ratings in file order. rating: [N] float32, timestamp: [N] float64 (seconds)."""

    name: str
    fields: dict[str, Field]
    rating: Tensor
    timestamp: Tensor

    def digest(self) -> str:
        """Hash of the contents, by which a checkpoint knows its data."""
        state = hashlib.blake2b(digest_size=8)
        for name, field in self.fields.items():
            state.update(name.encode())
            state.update(field.values.numpy().tobytes())
            state.update(field.index.numpy().tobytes())
        state.update(self.rating.numpy().tobytes())
        state.update(self.timestamp.numpy().tobytes())
        return state.hexdigest()

    def to(self, device: torch.device) -> Ratings:
        """The fields and ratings on a device."""
        fields = {name: field.to(device) for name, field in self.fields.items()}
        return dataclasses.replace(self, fields=fields, rating=self.rating.to(device))


def bundled_folder() -> Path:
    """The folder of MovieLens-100K inside the installed RecBole wheel, which is not imported."""
    advice = "`pip install --no-deps recbole==1.2.1`, or pass --data DIR with MovieLens files"
    try:
        files = importlib.metadata.files("recbole") or []
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"MovieLens-100K comes with RecBole, which is missing: {advice}") from None
    for file in files:
        if file.name == "ml-100k.inter":
            return Path(str(file.locate())).parent
    raise DataError(f"the installed RecBole brings no ml-100k.inter: {advice}")


def load(path: Path | None = None) -> Ratings:
    """Ratings of a folder (or of a ratings file in it); None is MovieLens-100K from RecBole."""
    path = bundled_folder() if path is None else path
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; {ACCEPTED}")
    folder = path if path.is_dir() else path.parent
    for form in FORMATS:
        file = find_file(folder, form.ratings.file)
        if file is not None and path in (folder, file):
            return _read(form, file)
    raise DataError(f"{path}: not a MovieLens file or folder that this example reads; {ACCEPTED}")


def _read(form: Format, ratings_file: Path) -> Ratings:
    table = read_ratings(ratings_file, form.ratings)
    user_ids, user_index = np.unique(table["user"], return_inverse=True)
    film_ids, film_index = np.unique(table["film"], return_inverse=True)
    by_user, by_film = torch.from_numpy(user_index), torch.from_numpy(film_index)
    fields = {
        "user": Field(torch.from_numpy(user_ids), by_user),
        "film": Field(torch.from_numpy(film_ids), by_film),
    }
    films_file = find_file(ratings_file.parent, form.films.file)
    if films_file is not None:
        bags = read_films(films_file, form.films, form.genre_separator)
        _require_rows(films_file, "film", film_ids, bags)
        values, weight = _pad([bags[film] for film in film_ids.tolist()])
        fields["genres"] = Field(values, by_film, weight)
    users_file = None if form.users is None else find_file(ratings_file.parent, form.users.file)
    if users_file is not None and form.users is not None:
        users = read_users(users_file, form.users)
        _require_rows(users_file, "user", user_ids, users)
        columns = torch.tensor([users[user] for user in user_ids.tolist()]).T.contiguous()
        for name, column in zip(("age", "occupation", "zip"), columns, strict=True):
            fields[name] = Field(column, by_user)
    rating = torch.from_numpy(table["rating"].copy())
    timestamp = torch.from_numpy(table["timestamp"].copy())
    name = form.name or ratings_file.stem
    return Ratings(name, fields, rating, timestamp)


def _require_rows(path: Path, kind: str, ids: np.ndarray, rows: Container[int]) -> None:
    missing = [one for one in ids.tolist() if one not in rows]
    if missing:
        raise DataError(f"{path}: no row for {kind} {missing[0]}, which has ratings")


def _pad(bags: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Bags as ids [K, W] and mean-pooling weights [K, W]; padding has weight 0."""
    width = max(1, max(map(len, bags)))
    values = torch.full((len(bags), width), stable_id(""))
    weight = torch.zeros(len(bags), width)
    for row, bag in enumerate(bags):
        values[row, : len(bag)] = torch.tensor(bag, dtype=torch.int64)
        weight[row, : len(bag)] = 1 / max(1, len(bag))
    return values, weight


def split_by_time(timestamp: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the ratings before the last tenth by time, and of that tenth.

    Ratings of the same second keep their order in the file.
    """
    order = torch.argsort(timestamp, stable=True)
    held_out = len(order) // 10
    if held_out == 0:
        raise DataError(f"a split by time needs 10 ratings or more, got {len(order)}")
    return order[:-held_out], order[-held_out:]


def renumber(field: Field, train: Tensor) -> tuple[Field, int]:
    """The field in row numbers of an nn.Embedding, and how many rows that needs.

    Ids that occur in training are numbered 0 … n-1; all others share row n.
    """
    vocabulary = torch.unique(field.select(train)[0])
    row = torch.searchsorted(vocabulary, field.values)
    known = vocabulary[row.clamp(max=len(vocabulary) - 1)] == field.values
    row = torch.where(known, row, len(vocabulary))
    return dataclasses.replace(field, values=row), len(vocabulary) + 1
