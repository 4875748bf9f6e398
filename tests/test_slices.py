"""Slices: which ids a shard holds, against exact integers and RecIS's rule."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from cupy_sparse_adamw.children import ID_MASK
from cupy_sparse_adamw.slices import Slice, gen_slice

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

LOW, HIGH = -(2**63), 2**63 - 1
#: Any int64, the ends of the range often.
IDS = st.integers(LOW, HIGH) | st.sampled_from([0, 1, -1, LOW, LOW + 1, HIGH, HIGH - 1])
#: Powers of two divide 2**64; the others show whether ids are taken as unsigned.
SIZES = st.sampled_from([1, 2, 3, 10, 1000, 65536, 2**52, 2**62 + 1, HIGH]) | st.integers(1, HIGH)


def remainder(id_: int, size: int) -> int:
    """Of an id as RecIS takes it, (uint64_t)id % size, in Python's exact integers."""
    return (id_ % 2**64) % size


@pytest.mark.parametrize(
    ("size", "id_", "want"),
    [
        (65536, 0, 0),
        (65536, 65535, 65535),
        (65536, 65536, 0),
        (65536, -1, 65535),  # 2**64 - 1
        (65536, -65536, 0),
        (65536, HIGH, 65535),
        (65536, LOW, 0),
        (10, -1, 5),  # 2**64 - 1 = 18446744073709551615; a signed remainder is 9, or -1
        (10, -10, 6),
        (10, LOW, 8),  # 9223372036854775808
        (10, HIGH, 7),
        (3, -1, 0),  # 2**64 - 1 is a multiple of 3
        (3, -2, 2),
        (HIGH, -1, 1),  # 2**64 - 1 = 2 * HIGH + 1
        (HIGH, LOW, 1),  # 2**63 = HIGH + 1
    ],
)
def test_remainders_worked_by_hand(size: int, id_: int, want: int):
    assert remainder(id_, size) == want
    ids = torch.tensor([id_])
    assert Slice(want, want + 1, size).contains(ids).tolist() == [True]
    if want > 0:
        assert Slice(0, want, size).contains(ids).tolist() == [False]
    if want + 1 < size:
        assert Slice(want + 1, size, size).contains(ids).tolist() == [False]


@hypothesis.given(size=SIZES, ids=st.lists(IDS, min_size=1), ends=st.tuples(SIZES, SIZES))
def test_contains_is_recis_rule(size: int, ids: list[int], ends: tuple[int, int]):
    begin, end = sorted(x % (size + 1) for x in ends)
    hypothesis.assume(begin < end)
    got = Slice(begin, end, size).contains(torch.tensor(ids))
    assert got.tolist() == [begin <= remainder(id_, size) < end for id_ in ids]


@hypothesis.given(
    size=st.integers(1, 100) | st.just(65536), shards=st.integers(1, 40), ids=st.lists(IDS)
)
def test_shards_hold_every_id_once(size: int, shards: int, ids: list[int]):
    hypothesis.assume(shards <= size)
    slices = [gen_slice(i, shards, size) for i in range(shards)]
    ends = [0, *(x.slice_end for x in slices)]
    assert [x.slice_begin for x in slices] == ends[:-1]
    assert ends[-1] == size
    widths = [x.slice_end - x.slice_begin for x in slices]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] - widths[-1] <= 1
    ids = torch.tensor(ids, dtype=torch.int64)
    held = torch.stack([x.contains(ids) for x in slices])
    assert (held.sum(0) == 1).all()


def test_shards_worked_by_hand():
    assert [gen_slice(i, 3, 10) for i in range(3)] == [
        Slice(0, 4, 10),
        Slice(4, 7, 10),
        Slice(7, 10, 10),
    ]
    assert gen_slice() == Slice(0, 65536, 65536)
    assert gen_slice(1, 4) == Slice(16384, 32768, 65536)
    assert gen_slice(2, 3) == Slice(43691, 65536, 65536)  # 65536 = 21846 + 21845 + 21845


def test_contains_keeps_the_shape_and_takes_any_strides():
    ids = torch.arange(-6, 6).view(3, 4)
    whole = Slice(0, 2, 4).contains(ids)
    assert whole.dtype == torch.bool
    assert whole.tolist() == [[x % 4 < 2 for x in row] for row in ids.tolist()]
    assert torch.equal(Slice(0, 2, 4).contains(ids.t()), whole.t())
    assert Slice(0, 2, 4).contains(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0)
    assert Slice(0, 2, 4).contains(torch.tensor(1)).item() is True


def test_int32_ids_are_widened():
    ids = [0, 7, -1, -(2**31), 2**31 - 1]
    for part in (Slice(2, 6, 10), Slice(7, 2**40 - 1, 2**40)):  # 2**40 is no int32
        got = part.contains(torch.tensor(ids, dtype=torch.int32))
        inside = range(part.slice_begin, part.slice_end)
        assert got.tolist() == [remainder(x, part.slice_size) in inside for x in ids]


@hypothesis.given(ids=st.lists(IDS, min_size=1), index=st.integers(0, 4094))
def test_encoded_ids_belong_where_their_ids_do(ids: list[int], index: int):
    ids = torch.tensor(ids) & ID_MASK
    encoded = ids | index << 52 if index < 2048 else ids | (index << 52) - 2**64
    for part in (gen_slice(0, 3), gen_slice(1, 3), gen_slice(5, 7, 2**52)):
        assert torch.equal(part.contains(encoded), part.contains(ids))


def test_names_are_those_of_recis():
    assert list(inspect.signature(Slice).parameters) == ["slice_beg", "slice_end", "slice_size"]
    parameters = inspect.signature(gen_slice).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    assert defaults == {"shard_index": 0, "shard_num": 1, "slice_size": 65536}
    part = Slice(3, 5, 8)
    assert (part.slice_begin, part.slice_end, part.slice_size) == (3, 5, 8)


def test_equality_and_repr():
    part = Slice(3, 5, 8)
    assert repr(part) == "Slice(3, 5, 8)"
    assert part == Slice(3, 5, 8) == copy.deepcopy(part)
    for other in (Slice(2, 5, 8), Slice(3, 6, 8), Slice(3, 5, 9), (3, 5, 8)):
        assert part != other


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Slice(-1, 5, 8), ValueError, "slice_beg must be at least 0, got -1"),
        (lambda: Slice(0.0, 5, 8), TypeError, "slice_beg must be an int, got float"),
        (lambda: Slice(0, "5", 8), TypeError, "slice_end must be an int, got str"),
        (lambda: Slice(0, 5, None), TypeError, "slice_size must be an int, got NoneType"),
        (lambda: Slice(0, 5, 0), ValueError, "slice_size must be at least 1, got 0"),
        (lambda: Slice(5, 5, 8), ValueError, r"a slice must have .* got Slice\(5, 5, 8\); gen_s"),
        (lambda: Slice(5, 9, 8), ValueError, r"a slice must have .* got Slice\(5, 9, 8\)"),
        (lambda: Slice(0, 1, 2**63), ValueError, "slice_size < 2"),
        (lambda: gen_slice(-1, 4), ValueError, "shard_index must be at least 0, got -1"),
        (lambda: gen_slice(4, 4), ValueError, "shard_index must be from 0 to .* = 3, got 4"),
        (lambda: gen_slice(0, 0), ValueError, "shard_num must be at least 1, got 0"),
        (lambda: gen_slice(0, 9, 8), ValueError, "shard_num must be at most slice_size = 8, got 9"),
        (lambda: gen_slice(0, 1.5), TypeError, "shard_num must be an int, got float"),
        (lambda: Slice(0, 1, 2).contains([1]), TypeError, "ids must be an int64 tensor, got list"),
        (lambda: Slice(0, 1, 2).contains(torch.ones(1)), TypeError, "ids must be int64 or int32"),
    ],
)  # fmt: skip
def test_bad_arguments(make, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        make()
