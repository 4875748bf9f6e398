"""The MovieLens file formats: ml-100k, ml-1m, ml-25m (and its like), and RecBole's."""

from __future__ import annotations

import csv
import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeVar

import numpy as np

ACCEPTED = """accepted is a folder with one of
  u.data          ml-100k; u.user and u.item beside it add their fields
  ratings.dat     ml-1m; users.dat and movies.dat beside it add their fields
  ratings.csv     ml-25m, ml-20m, ml-latest; movies.csv beside it adds its field
  *.inter         RecBole; *.user and *.item beside it add their fields"""

GENRES_100K = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy "
    "Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western"
)

NO_GENRES = "(no genres listed)"

RATING_ROW = np.dtype([("user", "i8"), ("film", "i8"), ("rating", "f4"), ("timestamp", "f8")])

Value = TypeVar("Value")

CHUNK_LINES = 200_000  # keeps the text of a large file out of memory


class DataError(ValueError):
    """A file or folder that is not in one of the accepted formats."""


@dataclass(frozen=True)
class Source:
    """One file of a format.

    columns: those to read, by header name, or by position where there is no header row.
    width: the number of columns where there is no header row; None if there is one.
    """

    file: str
    separator: str
    columns: tuple[str | int, ...]
    width: int | None = None
    encoding: str = "utf-8-sig"


@dataclass(frozen=True)
class Format:
    """The files of a data set and the columns to read from each.

    name: of the data set; empty where it is the file's own.
    ratings: user, film, rating, timestamp. users: user, age, occupation, ZIP code.
    films: film, genres; without a genre_separator there is a 0/1 column for each genre.
    """

    name: str
    ratings: Source
    users: Source | None
    films: Source
    genre_separator: str | None


FORMATS = (
    Format(
        "ml-100k",
        Source("u.data", "\t", (0, 1, 2, 3), 4, "latin-1"),
        Source("u.user", "|", (0, 1, 3, 4), 5, "latin-1"),
        Source("u.item", "|", (0, *range(5, 24)), 24, "latin-1"),
        genre_separator=None,
    ),
    Format(
        "ml-1m",
        Source("ratings.dat", "::", (0, 1, 2, 3), 4, "latin-1"),
        Source("users.dat", "::", (0, 2, 3, 4), 5, "latin-1"),
        Source("movies.dat", "::", (0, 2), 3, "latin-1"),
        genre_separator="|",
    ),
    Format(
        "ml-25m",
        Source("ratings.csv", ",", ("userId", "movieId", "rating", "timestamp")),
        None,
        Source("movies.csv", ",", ("movieId", "genres")),
        genre_separator="|",
    ),
    Format(
        "",
        Source("*.inter", "\t", ("user_id", "item_id", "rating", "timestamp")),
        Source("*.user", "\t", ("user_id", "age", "occupation", "zip_code")),
        Source("*.item", "\t", ("item_id", "class")),
        genre_separator=" ",
    ),
)


def stable_id(text: str) -> int:
    """An int64 id for a string, the same in every process."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def find_file(folder: Path, pattern: str) -> Path | None:
    """The one file of that name, or None."""
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        raise DataError(f"{folder}: more than one {pattern}: {', '.join(f.name for f in found)}")
    return found[0] if found else None


def read_ratings(path: Path, source: Source) -> np.ndarray:
    """All ratings as a structured array [N] of RATING_ROW."""
    chunks = []
    with path.open(encoding=source.encoding, errors="replace") as file:
        columns, width, line = _locate_columns(path, source, file)
        while lines := list(itertools.islice(file, CHUNK_LINES)):
            try:
                chunks.append(_parse_ratings(lines, source, columns, width))
            except ValueError as error:
                bad = [not _is_rating(text, source, columns, width) for text in lines].index(True)
                wanted = "whole user and film ids, a rating of 0.5 to 5 and a timestamp in seconds"
                text = lines[bad].rstrip("\n")
                raise _row_error(path, line + bad, text, source, width, wanted) from error
            line += len(lines)
    ratings = np.concatenate(chunks) if chunks else np.empty(0, RATING_ROW)
    if len(ratings) == 0:
        raise DataError(f"{path}: no ratings")
    return ratings


def _parse_ratings(lines: list[str], source: Source, columns: list[int], width: int) -> np.ndarray:
    """Lines as RATING_ROW, blank ones left out; ValueError if one does not fit."""
    rows = [line.replace(source.separator, "\t") for line in lines if line.strip()]
    if not rows:
        return np.empty(0, RATING_ROW)
    if any(row.count("\t") != width - 1 for row in rows):
        raise ValueError(f"a row has not {width} columns")
    with warnings.catch_warnings():
        # NumPy before 2.4 reads 1.5 as the whole number 1, and warns.
        warnings.simplefilter("error", DeprecationWarning)
        try:
            ratings = np.loadtxt(
                rows, RATING_ROW, comments=None, delimiter="\t", usecols=columns, ndmin=1
            )
        except DeprecationWarning as warning:
            raise ValueError(str(warning)) from warning
    in_range = (ratings["rating"] >= 0.5) & (ratings["rating"] <= 5.0)
    if not (in_range & np.isfinite(ratings["timestamp"])).all():
        raise ValueError("a rating or a timestamp is out of range")
    return ratings


def _is_rating(line: str, source: Source, columns: list[int], width: int) -> bool:
    try:
        _parse_ratings([line], source, columns, width)
    except ValueError:
        return False
    return True


def read_users(path: Path, source: Source) -> dict[int, tuple[int, int, int]]:
    """User id to (age, occupation id, ZIP code id)."""

    def ids(cells: list[str]) -> tuple[int, int, int]:
        age, occupation, zip_code = cells
        if not 0 <= int(age) < 150:
            raise ValueError(f"age {age}")
        return int(age), stable_id(occupation), stable_id(zip_code)

    return _read_rows(path, source, "a whole user id and an age in years", ids)


def read_films(path: Path, source: Source, genre_separator: str | None) -> dict[int, list[int]]:
    """Film id to the ids of its genres."""

    def ids(cells: list[str]) -> list[int]:
        if genre_separator is not None:
            names = [name for name in cells[0].split(genre_separator) if name != NO_GENRES]
        elif set(cells) <= {"0", "1"}:
            names = [
                name for name, flag in zip(GENRES_100K.split(), cells, strict=True) if flag == "1"
            ]
        else:
            raise ValueError(f"genre columns {cells}")
        return [stable_id(name) for name in names if name]

    wanted = "a whole film id and its genres"
    return _read_rows(path, source, wanted, ids)


def _read_rows(
    path: Path, source: Source, wanted: str, convert: Callable[[list[str]], Value]
) -> dict[int, Value]:
    """The first of the columns to read, an id, to what `convert` makes of the others."""
    result = {}
    with path.open(encoding=source.encoding, errors="replace") as file:
        columns, width, start = _locate_columns(path, source, file)
        rows = csv.reader(file) if source.separator == "," else _split(file, source.separator)
        for number, row in enumerate(rows, start):
            if row in ([], [""]):
                continue
            try:
                if len(row) != width:
                    raise ValueError(f"{len(row)} columns")
                key, *cells = (row[column] for column in columns)
                result[int(key)] = convert(cells)
            except ValueError as error:
                text = source.separator.join(row)
                raise _row_error(path, number, text, source, width, wanted) from error
    return result


def _split(lines: Iterable[str], separator: str) -> Iterator[list[str]]:
    return (line.rstrip("\n").split(separator) for line in lines)


def _locate_columns(path: Path, source: Source, file: TextIO) -> tuple[list[int], int, int]:
    """Positions of the columns, the width of a row, and the number of the first line of data."""
    if source.width is not None:
        return [int(column) for column in source.columns], source.width, 1
    line = file.readline().rstrip("\n")
    header = [name.split(":")[0] for name in line.split(source.separator)]
    missing = [str(column) for column in source.columns if column not in header]
    if missing:
        raise DataError(
            f"{path}, line 1: expected a header row, separated by {source.separator!r}, that "
            f"names {', '.join(missing)}, got {line[:80]!r}"
        )
    return [header.index(str(column)) for column in source.columns], len(header), 2


def _row_error(
    path: Path, number: int, line: str, source: Source, width: int, wanted: str
) -> DataError:
    return DataError(
        f"{path}, line {number}: expected {width} columns separated by {source.separator!r} "
        f"with {wanted}, got {line[:80]!r}"
    )
