"""The emulator computes what a GPU would: built-ins, orders, 16-bit formats."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import emulator
from emulator.testing import SEEDS, ints, kernel

pytestmark = pytest.mark.emulated


@pytest.mark.parametrize("by", [0, 1, 5, 16])
@pytest.mark.parametrize("width", [32, 16, 8, 2, 1])
def test_shuffles(width, by, checked):
    y = ints(128)
    kernel("builtins.cu", "shuffle")(32, y, width, by)
    lanes = range(32)
    first = [lane // width * width for lane in lanes]
    last = [begin + width - 1 for begin in first]
    assert (y.view(4, 32) - 100).tolist() == [
        [begin + by % width for begin in first],
        [lane - by if lane - by >= first[lane] else lane for lane in lanes],
        [lane + by if lane + by <= last[lane] else lane for lane in lanes],
        [lane ^ by if lane ^ by <= last[lane] else lane for lane in lanes],
    ]


def test_shuffles_of_each_type():
    y = torch.zeros(32, 6, dtype=torch.float64)
    kernel("builtins.cu", "sum_in_each_type")(32, y)
    total = sum(range(32))
    row = [-total, total, -1e10 * total, 1e10 * total, total / 2, total / 4]
    assert y.tolist() == [row] * 32


@pytest.mark.parametrize("seed", SEEDS)
def test_votes(seed, checked):
    x = torch.randint(0, 4, (32,), dtype=torch.int32)
    y = ints(256)
    with emulator.using(seed=seed):
        kernel("builtins.cu", "vote")(32, x, y)
    values = x.tolist()
    expected = []
    for lane in range(32):
        group = range(8) if lane < 8 else range(8, 32)
        here = [values[i] for i in group]
        ballot = sum(1 << i for i in group if values[i] & 1)
        match = sum(1 << i for i in group if values[i] == values[lane])
        union = int(np.bitwise_or.reduce(here))
        expected.append([ballot, 3 in here, max(here) < 3, match, sum(here), max(here)])
        expected[-1] += [len(here), union]
    assert (y.view(32, 8).numpy().view(np.uint32) == np.array(expected, np.uint32)).all()


def test_votes_of_a_block(checked):
    x = torch.arange(50, dtype=torch.int32)
    y = ints(150)
    kernel("builtins.cu", "vote_in_block")(50, x, y)
    assert y.view(50, 3).tolist() == [[1, 1, 25]] * 50


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics_under_contention(seed, checked):
    i, u = ints(4), torch.tensor([0, 0, -1, 0], dtype=torch.int32)
    long, f, d = torch.zeros(2, dtype=torch.int64), torch.zeros(1), torch.zeros(1).double()
    with emulator.using(seed=seed):
        kernel("builtins.cu", "contend")(64, i, u, long, f, d, grid=(3,))
    assert i.tolist() == [192, -384, 191, -191]
    assert u.tolist() == [192, -1, 0, 192 % 10]
    assert long.tolist() == [192 << 33, 191 << 40]
    assert (f.item(), d.item()) == (96.0, 48.0)


def test_threads_come_between_the_atomics_of_others(checked):
    total, failures = torch.zeros(1, dtype=torch.int64), ints(1)
    kernel("builtins.cu", "add_by_cas")(256, total, failures)
    assert total.item() == 256
    assert failures.item() > 256


def tickets(seed: int) -> list[int]:
    order = ints(256)
    with emulator.using(seed=seed):
        kernel("builtins.cu", "take_tickets")(64, ints(1), order, grid=(4,))
    return order.tolist()


def test_a_seed_is_an_order(checked):
    orders = [tickets(seed) for seed in SEEDS]
    assert [tickets(seed) for seed in SEEDS] == orders
    assert len({tuple(order) for order in orders}) == len(SEEDS)
    assert all(sorted(order) == list(range(256)) for order in orders)
    for unit in (64, 32):  # blocks, and warps of the first block, change places too
        firsts = {tuple(dict.fromkeys(t // unit for t in order[:64])) for order in orders}
        assert len(firsts) > 1


def test_vectors(checked):
    f, long = torch.arange(128.0), torch.arange(64)
    s, c = torch.arange(128, dtype=torch.int16), torch.arange(128, dtype=torch.uint8)
    kernel("builtins.cu", "double_vectors")(32, f, long, s, c)
    assert f.tolist() == [2.0 * i for i in range(128)]
    assert long.tolist() == [2 * i for i in range(64)]
    assert s.view(32, 4)[:, 3].tolist() == [8 * i for i in range(32)]
    assert c.view(32, 4).tolist() == [[4 * i + 3, 4 * i + 2, 4 * i + 1, 4 * i] for i in range(32)]


def test_indices(checked):
    y = ints(24 * 30)
    kernel("builtins.cu", "indices")((5, 3, 2), y, grid=(2, 3, 4))
    inner = [100 * z + 10 * k + x for z in range(2) for k in range(3) for x in range(5)]
    assert y.tolist() == [1000 * block + i for block in range(24) for i in inner]


def test_16_bit_numbers_become_floats_exactly():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    y = torch.zeros(2**16, 2)
    with emulator.using(checked=False):
        kernel("builtins.cu", "widen")(256, bits, bits, y, 2**16, grid=(256,))
    expected = torch.stack([bits.view(torch.float16).float(), bits.view(torch.bfloat16).float()], 1)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.signbit(), expected.signbit())


def test_floats_become_16_bit_numbers_rounded_to_nearest_even():
    # Every representable number and every point halfway between two, with both neighbours in fp32.
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    points = []
    for dtype in (torch.float16, torch.bfloat16):
        exact = every.view(dtype).float()
        exact = exact[exact.isfinite()].sort().values
        halfway = ((exact[1:].double() + exact[:-1].double()) / 2).float()
        for x in (exact, halfway):
            points += [x, x.nextafter(torch.tensor(np.inf)), x.nextafter(torch.tensor(-np.inf))]
    points += [torch.tensor([65519.0, 65520.0, -65520.0, 3.4e38, np.inf, -np.inf, np.nan])]
    points += [torch.randint(-(2**31), 2**31, (2**18,), dtype=torch.int64).int().view(torch.float)]
    x = torch.cat(points)
    half, brain = (torch.zeros(len(x), dtype=torch.int16) for _ in range(2))
    with emulator.using(checked=False):
        kernel("builtins.cu", "narrow")(256, x, half, brain, len(x), grid=(-(-len(x) // 256),))
    for bits, dtype in ((half, torch.float16), (brain, torch.bfloat16)):
        # CUDA knows one NaN, torch several.
        same = (bits == x.to(dtype).view(torch.int16)) | (x.isnan() & bits.view(dtype).isnan())
        assert same.all()


def test_bit_counting(checked):
    y = torch.zeros(13, dtype=torch.int64)
    x, long = 0x00F0_1230, 0x0012_3400_0000_0000
    kernel("builtins.cu", "count_bits")(1, np.uint32(x), np.uint64(long), y)
    reversed_x = int(f"{x:032b}"[::-1], 2)
    assert y.tolist() == [
        *(x.bit_count(), 5, 8, reversed_x, x * x >> 32),
        *(long.bit_count(), 43, 11, long * long >> 64, (-5 << 30) >> 32),
        *(0x3F800000, 0x3FF0000000000000, 5),
    ]


def test_arithmetic(checked):
    y = torch.zeros(11, dtype=torch.float64)
    x = np.float32(1.7)
    kernel("builtins.cu", "arithmetic")(1, x, y)
    root = np.sqrt(x)
    fused = np.float32(np.float64(x) * np.float64(x) - np.float64(x))
    assert y.tolist() == pytest.approx(
        [
            *(root, root, np.float32(1) / root, fused, x * x - x),
            *(0.9**3, np.log(2), np.float32(np.exp(1)), 0.125, 0, x + np.float32(2)),
        ],
        rel=1e-15,
    )


def test_templates_have_shared_memory_of_their_own_and_so_have_modules(checked):
    first = kernel("builtins.cu", "two_tiles", "-DOFFSET=100")
    second = kernel("builtins.cu", "two_tiles", "--define-macro=OFFSET=200", "--use_fast_math")
    for _ in range(2):
        for launch, offset in ((first, 100), (second, 200)):
            y = ints(32)
            launch(32, y)
            assert y.tolist() == [offset + 31 - i for i in range(32)]
