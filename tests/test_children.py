"""ChildrenInfo: the bits of encoded ids, by hand and there and back, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from cupy_sparse_adamw.children import ChildrenInfo

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

TOP = 2**52 - 1  # the greatest id
MOST = 4095
NAMES = [f"child{i}" for i in range(MOST)]
ALL = ChildrenInfo(NAMES, coalesced=True)
PAIR = ChildrenInfo(["user", "item"], coalesced=True)
ALONE = ChildrenInfo(["user"])


def as_int64(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def test_the_bits_are_those_of_recis():
    assert (PAIR.index_bits_num(), PAIR.id_bits_num()) == (12, 52)
    assert PAIR.id_mask() == 0x000F_FFFF_FFFF_FFFF
    assert PAIR.index_mask() == as_int64(0xFFF0_0000_0000_0000)
    assert PAIR.max_children_num() == 0xFFF
    for mask in (PAIR.id_mask(), PAIR.index_mask()):
        assert torch.tensor([mask]).item() == mask  # each fits an int64


def test_children_by_name_and_index():
    assert PAIR.children() == ["user", "item"]
    assert [PAIR.child_index(name) for name in ("user", "item")] == [0, 1]
    assert [PAIR.child_at(i) for i in (0, 1)] == ["user", "item"]
    assert PAIR.has_child("item")
    assert not PAIR.has_child("ad")
    assert not PAIR.has_child("ad")  # RecIS has it once child_index was asked
    assert (PAIR.is_coalesce(), ALONE.is_coalesce()) == (True, False)
    assert (ALL.child_at(MOST - 1), ALL.child_index(NAMES[-1])) == (NAMES[-1], MOST - 1)


def test_nobody_changes_the_names():
    names = ["user", "item"]
    info = ChildrenInfo(names, coalesced=True)
    names.append("ad")
    info.children().append("ad")
    assert info.children() == ["user", "item"]
    assert ChildrenInfo(("user", "item"), True).children() == ["user", "item"]


def test_repr_and_copies():
    assert repr(PAIR) == "ChildrenInfo(['user', 'item'], coalesced=True)"
    twin = copy.deepcopy(PAIR)
    assert repr(twin) == repr(PAIR)
    assert twin.encode_id(7, "item") == PAIR.encode_id(7, "item")


# ---------------------------------------------------------------------- ids

WORKED = [
    (0, 0, 0),
    (5, 0, 5),
    (5, 1, 0x0010_0000_0000_0005),
    (TOP, 0, TOP),
    (TOP, 1, 0x001F_FFFF_FFFF_FFFF),
    (0x123, 2047, 0x7FF0_0000_0000_0123),
    (0, 2048, as_int64(0x8000_0000_0000_0000)),  # the index reaches the sign bit
    (0xABC, 4094, as_int64(0xFFE0_0000_0000_0ABC)),
]


@pytest.mark.parametrize(("id_", "index", "want"), WORKED)
def test_encoding_worked_by_hand(id_: int, index: int, want: int):
    assert ALL.encode_id(id_, index) == want
    assert ALL.encode_id(id_, NAMES[index]) == want
    ids, indices = torch.tensor([id_]), torch.tensor([index])
    for encoded in (
        ALL.encode_id(ids, index),
        ALL.encode_id(ids, indices),
        ALL.encode_id(id_, indices),
        ALL.encode_id(ids, index, truncate=True),
    ):
        assert encoded.dtype == torch.int64
        assert encoded.tolist() == [want]
    assert ALL.split_id(want) == (index, id_)
    assert [x.tolist() for x in ALL.split_id(torch.tensor([want]))] == [[index], [id_]]


def test_ints_give_ints_and_tensors_tensors():
    assert type(PAIR.encode_id(5, 1)) is int
    assert type(PAIR.encode_id(np.int64(5), np.int32(1))) is int
    assert PAIR.encode_id(torch.tensor(5), 1).shape == ()
    assert [type(x) for x in PAIR.split_id(5)] == [int, int]


def test_tensors_broadcast():
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    assert torch.equal(PAIR.encode_id(ids, "item"), ids + 2**52)
    each = torch.tensor([[0], [1]])
    assert torch.equal(PAIR.encode_id(ids, each), ids + each * 2**52)
    row = ids[0]
    assert torch.equal(PAIR.encode_id(row, each), row + each * 2**52)
    assert torch.equal(PAIR.encode_id(ids.t(), 1), ids.t() + 2**52)
    none = torch.empty(0, 3, dtype=torch.int64)
    assert PAIR.encode_id(none, 1).shape == (0, 3)
    assert PAIR.encode_id(none, none.new_zeros(3)).shape == (0, 3)
    assert [x.shape for x in PAIR.split_id(ids)] == [ids.shape, ids.shape]


def test_int32_is_widened():
    ids = torch.tensor([5, 2**31 - 1], dtype=torch.int32)
    indices = torch.tensor([4094, 1], dtype=torch.int32)
    assert torch.equal(ALL.encode_id(ids, indices), ALL.encode_id(ids.long(), indices.long()))
    assert ALL.encode_id(ids, 1).tolist() == [2**52 + 5, 2**52 + 2**31 - 1]
    assert [x.dtype for x in ALL.split_id(ids)] == [torch.int64, torch.int64]
    assert ALL.split_id(ids)[1].tolist() == ids.tolist()


def test_arguments_are_not_changed():
    ids, indices = torch.tensor([3, -4]), torch.tensor([0, 1])
    ALL.encode_id(ids, indices, truncate=True)
    ALL.split_id(ids)
    assert (ids.tolist(), indices.tolist()) == ([3, -4], [0, 1])


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, TOP), st.integers(0, MOST - 1)), min_size=1, unique=True)
)
def test_there_and_back(pairs: list[tuple[int, int]]):
    ids, indices = torch.tensor(pairs).unbind(1)
    encoded = ALL.encode_id(ids, indices)
    assert encoded.unique().numel() == len(pairs)
    back = ALL.split_id(encoded)
    assert torch.equal(back[0], indices)
    assert torch.equal(back[1], ids)
    assert [ALL.encode_id(*pair) for pair in pairs] == encoded.tolist()


@hypothesis.given(id_=st.integers(-(2**63), 2**63 - 1), index=st.integers(0, MOST - 1))
def test_truncated_ids_are_those_of_recis(id_: int, index: int):
    want = as_int64((id_ & TOP) | (index << 52))
    assert ALL.encode_id(id_, index, truncate=True) == want
    assert ALL.encode_id(torch.tensor([id_]), index, truncate=True).tolist() == [want]


def test_without_coalesced_ids_are_whole():
    ids = torch.tensor([5, -1, 2**62])
    index, same = ALONE.split_id(ids)
    assert torch.equal(same, ids)
    assert index.tolist() == [0, 0, 0]
    assert ALONE.split_id(-1) == (0, -1)
    assert ALONE.encode_id(5, "user") == 5


# ---------------------------------------------------------------------- errors

TOO_LONG = (
    r"id must be from 0 to 2\*\*52 - 1 .* got {}; for hashes use .*truncate=True.* share a row"
)


@pytest.mark.parametrize("id_", [2**52, -1, 2**63 - 1, -(2**63)])
def test_an_id_that_does_not_fit_is_not_cut(id_: int):
    for ids in (id_, torch.tensor(id_), torch.tensor([1, id_, 2])):
        with pytest.raises(ValueError, match=TOO_LONG.format(id_)):
            PAIR.encode_id(ids, 1)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: ChildrenInfo([]), ValueError, "children must not be empty"),
        (lambda: ChildrenInfo([], True), ValueError, "children must not be empty"),
        (lambda: ChildrenInfo("user"), TypeError, r"children must be a list .* got 'user'"),
        (lambda: ChildrenInfo(None), TypeError, "children must be a list .* got None"),
        (lambda: ChildrenInfo(["a", 3], True), TypeError, "children must be strings, got int 3"),
        (lambda: ChildrenInfo(["a"], "yes"), TypeError, "coalesced must be True or False, got 'y"),
        (lambda: ChildrenInfo(["a", "b"]), ValueError, "2 children need coalesced=True"),
        (lambda: ChildrenInfo(["a", "b", "a"], True), ValueError, "distinct names, got 'a' twice"),
        (
            lambda: ChildrenInfo([*NAMES, "x"], True),
            ValueError,
            "children must be at most 4095, got 4096",
        ),
        (lambda: PAIR.child_index("ad"), ValueError, "must be one of 'user', 'item', got 'ad'"),
        (lambda: ALL.child_index("ad"), ValueError, "'child7' and 4087 more, got 'ad'"),
        (lambda: PAIR.child_at(2), ValueError, "index must be from 0 to 1, .* got 2"),
        (lambda: PAIR.child_at(-1), ValueError, "index must be at least 0, got -1"),
        (lambda: PAIR.child_at("user"), TypeError, "index must be an int, got str"),
        (lambda: PAIR.encode_id(1, 2), ValueError, "index must be from 0 to 1, .* got 2"),
        (lambda: PAIR.encode_id(1, -1), ValueError, "index must be at least 0, got -1"),
        (lambda: PAIR.encode_id(1, "ad"), ValueError, "child must be one of"),
        (lambda: PAIR.encode_id(1, 1.0), TypeError, "index must be an int, got float"),
        (lambda: PAIR.encode_id(1.0, 1), TypeError, "id must be an int, got float"),
        (lambda: PAIR.encode_id([1], 1), TypeError, "id must be an int, got list"),
        (lambda: PAIR.encode_id(torch.ones(2), 1), TypeError, "id must be int64 or int32, got"),
        (
            lambda: PAIR.encode_id(1, torch.tensor([True])),
            TypeError,
            "index must be int64 or int32, got torch.bool",
        ),
        (lambda: PAIR.encode_id(1, torch.tensor([0, 2])), ValueError, "from 0 to 1, .* got 2"),
        (
            lambda: PAIR.encode_id(1, torch.tensor([0, -1]), truncate=True),
            ValueError,
            "from 0 to 1, .* got -1",
        ),
        (
            lambda: PAIR.encode_id(torch.arange(3), torch.zeros(2, dtype=torch.int64)),
            ValueError,
            r"broadcasts with id's, \[3\], got \[2\]",
        ),
        (lambda: ALONE.encode_id(1, 1), ValueError, "index must be from 0 to 0, .* got 1"),
        (lambda: PAIR.split_id("5"), TypeError, "ids must be an int, got str"),
        (lambda: PAIR.split_id(torch.ones(1)), TypeError, "ids must be int64 or int32"),
    ],
)
def test_bad_arguments(make, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        make()
