"""The example's data: the file formats, errors in them, the split by time, renumbering."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from movielens import data, formats

# Three users, three films, four ratings; every writer below puts down the same.
RATINGS = [(7, 30, 4, 100), (9, 10, 3, 90), (7, 20, 5, 110), (8, 30, 1, 95)]
USERS = {7: (25, "writer", "90210"), 8: (35, "artist", "V3N4P"), 9: (25, "artist", "00501")}
FILMS = {10: ["Comedy"], 20: ["Action", "Sci-Fi"], 30: []}


def write(folder, **files):
    """Write files named like u_data for u.data, in latin-1 as GroupLens does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        text = "".join(f"{line}\n" for line in lines)
        (folder / name.replace("_", ".")).write_bytes(text.encode("latin-1"))
    return folder


def write_ml_100k(folder):
    genres = formats.GENRES_100K.split()
    flags = {film: "|".join(str(int(g in names)) for g in genres) for film, names in FILMS.items()}
    return write(
        folder,
        u_data=["\t".join(map(str, row)) for row in RATINGS],
        u_user=[f"{user}|{age}|F|{job}|{code}" for user, (age, job, code) in USERS.items()],
        u_item=[f"{film}|Amélie (2001)|01-Jan-2001||http://x|{flags[film]}" for film in FILMS],
    )


def write_ml_1m(folder):
    return write(
        folder,
        ratings_dat=["::".join(map(str, row)) for row in RATINGS],
        users_dat=[f"{user}::F::{age}::{job}::{code}" for user, (age, job, code) in USERS.items()],
        movies_dat=[f"{film}::Amélie (2001)::{'|'.join(FILMS[film])}" for film in FILMS],
    )


def write_ml_25m(folder):
    genres = {film: "|".join(names) or "(no genres listed)" for film, names in FILMS.items()}
    return write(
        folder,
        ratings_csv=["userId,movieId,rating,timestamp"]
        + [f"{user},{film},{rating:.1f},{time}" for user, film, rating, time in RATINGS],
        movies_csv=["movieId,title,genres"]
        + [f'{film},"American President, The (1995)",{genres[film]}' for film in FILMS],
    )


def write_recbole(folder):
    rows = [f"{time}\t{rating}\t{film}\t{user}" for user, film, rating, time in RATINGS]
    return write(
        folder,
        own_inter=["timestamp:float\trating:float\titem_id:token\tuser_id:token", *rows],
        own_user=["user_id:token\tage:token\toccupation:token\tzip_code:token"]
        + [f"{user}\t{age}\t{job}\t{code}" for user, (age, job, code) in USERS.items()],
        own_item=["item_id:token\tmovie_title:token_seq\tclass:token_seq"]
        + [f"{film}\tA title\t{' '.join(FILMS[film])}" for film in FILMS],
    )


@pytest.mark.parametrize("writer", [write_ml_100k, write_ml_1m, write_ml_25m, write_recbole])
def test_every_format_gives_the_same_ratings(tmp_path, writer):
    ratings = data.load(writer(tmp_path))
    every = torch.arange(4)
    ids = {name: field.select(every)[0].tolist() for name, field in ratings.fields.items()}
    assert ratings.rating.tolist() == [4, 3, 5, 1]
    assert ratings.timestamp.tolist() == [100, 90, 110, 95]
    assert ids["user"] == [7, 9, 7, 8]
    assert ids["film"] == [30, 10, 20, 30]
    action, comedy, scifi, pad = map(formats.stable_id, ("Action", "Comedy", "Sci-Fi", ""))
    assert ids["genres"] == [[pad, pad], [comedy, pad], [action, scifi], [pad, pad]]
    weight = ratings.fields["genres"].select(every)[1]
    assert weight.tolist() == [[0, 0], [1, 0], [0.5, 0.5], [0, 0]]
    if writer is write_ml_25m:  # which has no file of users
        assert list(ratings.fields) == ["user", "film", "genres"]
        return
    assert ids["age"] == [25, 25, 25, 35]
    writer_id, artist = formats.stable_id("writer"), formats.stable_id("artist")
    assert ids["occupation"] == [writer_id, artist, writer_id, artist]
    assert ids["zip"] == [formats.stable_id(code) for code in ("90210", "00501", "90210", "V3N4P")]


def test_a_ratings_file_may_be_named_itself_and_stand_alone(tmp_path):
    folder = write_ml_1m(tmp_path)
    (folder / "users.dat").unlink()
    (folder / "movies.dat").unlink()
    assert list(data.load(folder / "ratings.dat").fields) == ["user", "film"]


def test_stable_ids_are_the_same_in_every_process():
    # blake2b with an 8-byte digest, read little-endian
    assert formats.stable_id("90210") == 1964558267411329712
    assert formats.stable_id("é") != formats.stable_id("e")


def test_half_stars_and_ids_beyond_int32(tmp_path):
    rows = ["userId,movieId,rating,timestamp", "9000000000000000000,5,0.5,1", "", "-3,5,4.5,2"]
    ratings = data.load(write(tmp_path, ratings_csv=rows))
    assert ratings.fields["user"].select(torch.arange(2))[0].tolist() == [9 * 10**18, -3]
    assert ratings.rating.tolist() == [0.5, 4.5]


RATING_COLUMNS = "expected 4 columns separated by '::' with whole user and film ids"


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"ratings_dat": ["1::2::3::4", "1::2::3"]}, f"ratings.dat, line 2: {RATING_COLUMNS}"),
        ({"ratings_dat": ["1::2::3::4", "", "1::2::3::4::5"]}, "ratings.dat, line 3: "),
        ({"ratings_dat": ["x::2::3::4"]}, "got 'x::2::3::4'"),
        ({"ratings_dat": ["1.5::2::3::4"]}, "ratings.dat, line 1: "),
        ({"ratings_dat": ["1::2::6::4"]}, "a rating of 0.5 to 5"),
        ({"ratings_dat": ["1::2::nan::4"]}, "ratings.dat, line 1: "),
        ({"ratings_dat": ["1::2::3::inf"]}, "ratings.dat, line 1: "),
        ({"ratings_dat": ["99999999999999999999::2::3::4"]}, "ratings.dat, line 1: "),
        ({"ratings_dat": []}, "ratings.dat: no ratings"),
        ({"u_data": ["1,2,3,4"]}, r"u.data, line 1: expected 4 columns separated by '\t'"),
        ({"ratings_csv": ["1,2,3,4"]}, "names userId, movieId, rating, timestamp, got '1,2,3,4'"),
        ({"ratings_csv": []}, "ratings.csv, line 1: expected a header row"),
        ({"a_inter": [], "b_inter": []}, "more than one *.inter: a.inter, b.inter"),
        ({"notes_txt": ["hello"]}, "accepted is a folder with one of"),
        (
            {"ratings_dat": ["1::2::3::4"], "users_dat": ["1::F::young::0::1"]},
            "users.dat, line 1: expected 5 columns separated by '::' with a whole user id",
        ),
        (
            {"ratings_dat": ["1::2::3::4"], "users_dat": ["2::F::25::0::1"]},
            "users.dat: no row for user 1, which has ratings",
        ),
        (
            {"ratings_dat": ["1::2::3::4"], "movies_dat": ["2::Title"]},
            "movies.dat, line 1: expected 3 columns",
        ),
        (
            {"u_data": ["1\t2\t3\t4"], "u_item": ["2|T|||u" + "|2" * 19]},
            "u.item, line 1: expected 24 columns separated by '|' with a whole film id",
        ),
    ],
)
def test_malformed_files_are_named_with_line_and_what_is_accepted(tmp_path, files, text):
    with pytest.raises(formats.DataError) as error:
        data.load(write(tmp_path, **files))
    assert text in str(error.value)


def test_errors_past_the_first_chunk_name_the_right_line(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "CHUNK_LINES", 2)
    rows = ["userId,movieId,rating,timestamp", "1,2,3,4", "1,2,3,4", "", "1,2,3,4", "1,2,3"]
    folder = write(tmp_path, ratings_csv=rows)
    with pytest.raises(formats.DataError, match="line 6"):
        data.load(folder)
    write(tmp_path, ratings_csv=rows[:-1])
    assert len(data.load(folder).rating) == 3


@pytest.mark.parametrize("name", ["nowhere", "ratings.txt"])
def test_other_paths_are_refused(tmp_path, name):
    write(tmp_path, ratings_txt=["1::2::3::4"])
    with pytest.raises(
        formats.DataError, match=rf"{name}: (no such|not a MovieLens) file or folder"
    ):
        data.load(tmp_path / name)


def test_without_recbole_the_error_says_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(formats.DataError, match=r"install --no-deps recbole.*--data DIR"):
        data.load()


def test_movielens_100k_from_recbole():
    if not any(importlib.metadata.distributions(name="recbole")):
        pytest.skip("recbole, which holds the data, is not installed")
    ratings = data.load()
    rows = {name: len(torch.unique(field.values)) for name, field in ratings.fields.items()}
    assert (ratings.name, len(ratings.rating), "recbole" in sys.modules) == (
        "ml-100k",
        100_000,
        False,
    )
    # 18 genres, "unknown" and the padding
    assert rows == {
        "user": 943,
        "film": 1682,
        "genres": 20,
        "age": 61,
        "occupation": 21,
        "zip": 795,
    }


def test_the_last_tenth_by_time_is_held_out():
    time = torch.tensor([5, 1, 9, 9, 2, 3, 9, 4, 0, 6, 7, 8, 9, 1, 1, 1, 1, 1, 1, 1])
    train, held_out = data.split_by_time(time.double())
    assert held_out.tolist() == [6, 12]  # of four at second 9 the last two in the file
    assert sorted([*train.tolist(), 6, 12]) == list(range(20))
    with pytest.raises(formats.DataError, match="needs 10 ratings or more, got 9"):
        data.split_by_time(time[:9].double())


def test_renumbering_shares_one_row_among_ids_unknown_in_training():
    field = data.Field(torch.tensor([50, -3, 70, 60]), torch.tensor([0, 1, 2, 3, 0]))
    numbered, rows = data.renumber(field, torch.tensor([0, 1]))
    assert rows == 3
    assert numbered.select(torch.arange(5))[0].tolist() == [1, 0, 2, 2, 1]
