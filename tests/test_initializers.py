"""Initial values: what they are drawn from, and that they depend on (seed, id, column) alone."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from types import ModuleType

import numpy as np
import pytest
import torch

import cupy_sparse_adamw as csa
from cupy_sparse_adamw import functional
from cupy_sparse_adamw._slots import Slot
from cupy_sparse_adamw._types import Distribution, DistributionKind
from cupy_sparse_adamw.initializers import require_fits

D, BLOCK = 16, 64  # fan_in and fan_out of the distributions below
SEED = 0x0123456789ABCDEF
ANY_IDS = [0, 1, -1, 7, 2**31, 2**32, -(2**32), 2**63 - 1, -(2**63)]

UNIFORM = csa.UniformInitializer(-1.0, 3.0)
NORMAL = csa.NormalInitializer(2.0, 3.0)
TRUNC_NORMAL = csa.TruncNormalInitializer(0.5, 2.0, -1.0, 4.0)


@pytest.fixture(name="engine")
def module_of_engine(engine: str) -> ModuleType:
    return functional.load_engine(engine)


def draw(
    engine: ModuleType,
    initializer: csa.Initializer,
    ids: torch.Tensor | list[int],
    dim: int = D,
    seed: int = SEED,
    dtype: torch.dtype = torch.float64,
    block_size: int = BLOCK,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Initial values [n, dim] of ids [n], written to ``rows`` of a table, 0 to n - 1 if None."""
    ids = torch.as_tensor(ids)
    rows = torch.arange(ids.numel()) if rows is None else rows
    slot = Slot("embedding", dim, block_size, dtype, ids.device)
    slot.reserve(int(rows.max()) + 1)
    engine.init_rows_(slot, rows, ids, seed, initializer.distribution(D, BLOCK))
    return slot.value()[rows]


# ---------------------------------------------------------------------------- random words


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 from the paper's definition, in Python's exact integers."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 % 2**32, (p0 >> 32) ^ x3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [x0, x1, x2, x3]


# Random123's kat_vectors: counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter: str, key: str, words: str):
    counter, key, words = ([int(x, 16) for x in text.split()] for text in (counter, key, words))
    seed = key[0] | key[1] << 32
    seed -= 2**64 if seed >= 2**63 else 0
    assert philox(counter, key) == words
    reference = functional.load_engine("reference").random
    assert reference.philox4x32(torch.tensor(counter), seed).tolist() == words
    cpu = functional.load_engine("cpu").random
    # A tile of counters: word 0 of all, then word 1 of all, ...; the first and last are the same.
    tile = np.zeros((4, cpu.TILE), dtype=np.uint32)
    tile[:, 0] = tile[:, -1] = counter
    cpu.philox4x32_(tile.reshape(-1), seed)
    assert tile[:, 0].tolist() == words
    assert tile[:, -1].tolist() == words
    assert tile[:, 1].tolist() == philox([0, 0, 0, 0], key)


def test_first_values_worked_by_hand(engine: ModuleType):
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # the known answer for zeros
    values = draw(engine, csa.UniformInitializer(-1.0, 1.0), [0], dim=4, seed=0)
    assert values[0].tolist() == [-1.0 + 2.0 * ((word + 0.5) / 2**32) for word in words]


@pytest.mark.parametrize("dim", [1, 3, 17, 130, 300])  # below, off and above 4 and a whole tile
def test_each_value_comes_from_its_own_word(engine: ModuleType, dim: int):
    seed = -(2**63) + 5
    values = draw(engine, csa.UniformInitializer(), ANY_IDS, dim=dim, seed=seed)
    for id_, row in zip(ANY_IDS, values.tolist(), strict=True):
        for j in {0, 1, dim // 2, dim - 1} & set(range(dim)):
            counter = [id_ % 2**32, (id_ >> 32) % 2**32, j // 4, 0]
            word = philox(counter, [seed % 2**32, (seed >> 32) % 2**32])[j % 4]
            assert row[j] == (word + 0.5) / 2**32, (id_, j)


# --------------------------------------------------------------------------- distributions


def expected(stats: ModuleType, name: str) -> object:
    """The distribution that an initializer of CASES stands for, as SciPy has it."""
    xavier = 1.5 * math.sqrt(2.0 / (D + BLOCK))
    kaiming = math.sqrt(2.0 / (1.0 + 0.25)) / math.sqrt(D)
    relu = math.sqrt(2.0) / math.sqrt(BLOCK)
    return {
        "uniform": stats.uniform(-1.0, 4.0),
        "normal": stats.norm(2.0, 3.0),
        "trunc_normal": stats.truncnorm(-0.75, 1.75, 0.5, 2.0),
        "xavier_uniform": stats.uniform(-math.sqrt(3) * xavier, 2 * math.sqrt(3) * xavier),
        "xavier_normal": stats.norm(0.0, xavier),
        "kaiming_uniform": stats.uniform(-math.sqrt(3) * kaiming, 2 * math.sqrt(3) * kaiming),
        "kaiming_normal": stats.norm(0.0, relu),
        "far above": stats.truncnorm(5.0, 6.0),
        "far below": stats.truncnorm(-6.0, -5.0),
        "farther above": stats.truncnorm(20.0, 21.0, 1.0, 0.1),
        "all above": stats.truncnorm(-1.0, 50.0),
        "narrow": stats.uniform(1.0, 1e-6),
    }[name]


CASES = {
    "uniform": UNIFORM,
    "normal": NORMAL,
    "trunc_normal": TRUNC_NORMAL,
    "xavier_uniform": csa.XavierUniformInitializer(1.5),
    "xavier_normal": csa.XavierNormalInitializer(1.5),
    "kaiming_uniform": csa.KaimingUniformInitializer(0.5),
    "kaiming_normal": csa.KaimingNormalInitializer(mode="fan_out", nonlinearity="relu"),
    # Intervals in a tail, where a cumulative probability near 1 would have no digits left.
    "far above": csa.TruncNormalInitializer(0.0, 1.0, 5.0, 6.0),
    "far below": csa.TruncNormalInitializer(0.0, 1.0, -6.0, -5.0),
    "farther above": csa.TruncNormalInitializer(1.0, 0.1, 3.0, 3.1),
    "all above": csa.TruncNormalInitializer(0.0, 1.0, -1.0, 50.0),
    "narrow": csa.TruncNormalInitializer(0.0, 1.0, 1.0, 1.000001),  # there all but uniform
}


def check_distribution(values: torch.Tensor, dist: object) -> None:
    """Mean, variance, bounds and a Kolmogorov-Smirnov test; each by chance at most 1 in 1,000."""
    stats = pytest.importorskip("scipy.stats")
    sample = values.double().flatten().numpy()
    n, (mean, variance, kurtosis) = sample.size, (float(x) for x in dist.stats("mvk"))
    assert abs(sample.mean() - mean) < 4 * math.sqrt(variance / n)
    assert abs(sample.var() - variance) < 4 * variance * math.sqrt((kurtosis + 2) / n)
    low, high = dist.support()
    assert low <= sample.min() <= sample.max() <= high
    assert stats.kstest(sample, dist.cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_values_have_the_distribution(engine: ModuleType, name: str):
    dist = expected(pytest.importorskip("scipy.stats"), name)
    ids = torch.arange(-600, 600)
    check_distribution(draw(engine, CASES[name], ids, dim=17), dist)


def test_a_constant_is_that_constant(engine: ModuleType):
    assert (draw(engine, csa.ConstantInitializer(0.1), ANY_IDS) == 0.1).all()
    assert (draw(engine, csa.UniformInitializer(0.1, 0.1), ANY_IDS) == 0.1).all()
    assert (draw(engine, csa.NormalInitializer(0.1, 0.0), ANY_IDS) == 0.1).all()


@pytest.mark.parametrize("dim", [1, 3, 17, 130])
@pytest.mark.parametrize("name", CASES)
def test_engines_agree(name: str, dim: int):
    reference, cpu = functional.load_engine("reference"), functional.load_engine("cpu")
    ids = torch.cat([torch.tensor(ANY_IDS), torch.randint(-(2**63), 2**63 - 1, (2000 // dim,))])
    _, loc, scale, low, high = CASES[name].distribution(D, BLOCK)
    size = abs(loc) + scale or high - low
    values = [draw(engine, CASES[name], ids, dim) for engine in (reference, cpu)]
    # SPEC allows 1e-6; two good quantile functions in float64 differ much less.
    torch.testing.assert_close(*values, rtol=0, atol=1e-11 * size)
    single = torch.float32
    values = [draw(engine, CASES[name], ids, dim, dtype=single) for engine in (reference, cpu)]
    torch.testing.assert_close(*values, rtol=2**-23, atol=0)  # one unit in the last place
    assert (values[0] == values[1]).float().mean() > 0.999


# ------------------------------------------------------------------------------ determinism


@pytest.mark.parametrize("initializer", [UNIFORM, NORMAL, TRUNC_NORMAL], ids=repr)
def test_a_value_depends_on_seed_id_and_column_alone(
    engine: ModuleType, initializer: csa.Initializer
):
    ids = torch.cat([torch.tensor(ANY_IDS), torch.arange(100, 2000)])
    values = draw(engine, initializer, ids, dim=17)
    order = torch.randperm(ids.numel())
    assert torch.equal(draw(engine, initializer, ids[order], dim=17), values[order])
    rows = torch.randperm(3 * ids.numel())[: ids.numel()]
    assert torch.equal(draw(engine, initializer, ids, dim=17, rows=rows), values)
    for block_size in (1, 7, 5000):
        assert torch.equal(draw(engine, initializer, ids, dim=17, block_size=block_size), values)
    for i in (0, 8, 9, 1500):
        assert torch.equal(draw(engine, initializer, ids[i : i + 1], dim=17), values[i : i + 1])
    for dim in (1, 3, 16):  # a narrower table has the same first columns
        assert torch.equal(draw(engine, initializer, ids, dim=dim), values[:, :dim])
    assert torch.equal(draw(engine, initializer, ids[::3], dim=17), values[::3])  # strided ids


def test_a_value_does_not_depend_on_the_number_of_threads():
    cpu = functional.load_engine("cpu")
    ids = torch.arange(3000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        values = draw(cpu, NORMAL, ids, dim=17)
        torch.set_num_threads(3)
        parts = cpu._threads.num_parts(ids.numel(), cpu.random.GRAIN_ELEMENTS // 17)
        assert parts >= 3
        assert torch.equal(draw(cpu, NORMAL, ids, dim=17), values)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 7])  # every remainder of the four per counter
def test_only_the_named_rows_are_written(engine: ModuleType, dim: int):
    memory = torch.full((14, dim), -7.0)  # the table and a row on either side of it
    rows = torch.tensor([11, 0, 6])
    slot = Slot.over("embedding", memory[1:13])
    engine.init_rows_(slot, rows, rows, SEED, UNIFORM.distribution(dim, 12))
    written = memory != -7.0
    assert written.all(1).nonzero().flatten().tolist() == [1, 7, 12]
    assert written.sum() == 3 * dim


def test_no_rows_is_nothing_to_do(engine: ModuleType):
    none = torch.empty(0, dtype=torch.int64)
    slot = Slot("embedding", 5, 4, torch.float32, torch.device("cpu"))
    engine.init_rows_(slot, none, none, SEED, NORMAL.distribution(5, 4))
    assert slot.num_rows() == 0


def test_every_id_and_seed_has_values_of_its_own(engine: ModuleType):
    values = draw(engine, NORMAL, ANY_IDS)
    assert values.unique().numel() == values.numel()
    seeds = [0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63)]
    values = torch.stack([draw(engine, NORMAL, ANY_IDS, seed=seed) for seed in seeds])
    assert values.unique().numel() == values.numel()


def test_neighbours_are_uncorrelated(engine: ModuleType):
    standard = csa.NormalInitializer()
    ids = torch.arange(2000)
    values = draw(engine, standard, ids, dim=8)
    for name, x, y in [
        ("next id", values[:-1], values[1:]),
        ("next column", values[:, :-1], values[:, 1:]),
        ("four columns on", values[:, :-4], values[:, 4:]),
        ("next id and column", values[:-1, :-1], values[1:, 1:]),
        ("next seed", values, draw(engine, standard, ids, dim=8, seed=SEED + 1)),
        ("high bit of the seed", values, draw(engine, standard, ids, dim=8, seed=SEED - 2**63)),
        ("high half of the id", values, draw(engine, standard, ids + 2**32, dim=8)),
        ("minus the id", values[1:], draw(engine, standard, -ids[1:], dim=8)),
        ("id and seed swapped", values[1:8], swapped(engine, standard, range(1, 8))),
    ]:
        bound = 4.5 / math.sqrt(x.numel())  # standard deviations of a mean of x·y
        assert abs((x * y).mean()) < bound, name
        assert abs(((x**2 - 1) * (y**2 - 1)).mean() / 2) < bound, name


def swapped(engine: ModuleType, initializer: csa.Initializer, seeds: range) -> torch.Tensor:
    return torch.cat([draw(engine, initializer, [SEED], dim=8, seed=seed) for seed in seeds])


# ------------------------------------------------------------------------ rounding to dtypes

SIXTEEN_BIT = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT], ids=str)
@pytest.mark.parametrize("initializer", [UNIFORM, NORMAL, csa.ConstantInitializer(0.1)], ids=repr)
def test_narrow_tables_hold_the_rounded_values(
    engine: ModuleType, initializer: csa.Initializer, dtype: torch.dtype
):
    ids = torch.arange(500)
    exact = draw(engine, initializer, ids, dim=3)
    rounded = draw(engine, initializer, ids, dim=3, dtype=dtype)
    inside = exact.float().to(dtype).double() < (3.0 if initializer is UNIFORM else math.inf)
    assert torch.equal(rounded[inside], exact.float().to(dtype)[inside])
    assert inside.double().mean() > 0.99


@pytest.mark.parametrize(
    ("initializer", "dtype", "least", "greatest"),
    [
        # Rounding to nearest would give 1 once in 512 (bf16) and 4,096 (fp16) draws.
        (csa.UniformInitializer(), torch.bfloat16, 0.0, 1.0 - 2**-8),
        (csa.UniformInitializer(), torch.float16, 0.0, 1.0 - 2**-11),
        # Two float32 numbers and the excluded bound.
        (csa.UniformInitializer(1.0, 1.0 + 2**-22), torch.float32, 1.0, 1.0 + 2**-23),
        (csa.UniformInitializer(-1e-9, 0.0), torch.float16, 0.0, 0.0),  # low is the nearest to all
        # bf16(0.1) is above 0.1.
        (csa.TruncNormalInitializer(0.0, 9.0, -0.1, 0.1), torch.bfloat16, -0.1, 0.1),
        (csa.UniformInitializer(0.1, 0.1 + 1e-12), torch.float32, *[float(torch.tensor(0.1))] * 2),
        # Nothing overflows to infinity.
        (csa.NormalInitializer(0.0, 1e5), torch.float16, -65504.0, 65504.0),
    ],
    ids=repr,
)  # fmt: skip
def test_rounded_values_stay_in_the_interval(
    engine: ModuleType,
    initializer: csa.Initializer,
    dtype: torch.dtype,
    least: float,
    greatest: float,
):
    values = draw(engine, initializer, torch.arange(3000), dim=17, dtype=dtype).double()
    assert least <= values.min()
    assert values.max() <= greatest
    if least < greatest:
        assert values.min() < values.max()


def test_half_open_intervals_end_one_unit_below(engine: ModuleType):
    # The closed end of TRUNC_NORMAL may be reached, the open end of UNIFORM may not.
    ids = torch.arange(3000)
    uniform = draw(engine, csa.UniformInitializer(), ids, dim=17, dtype=torch.bfloat16)
    assert uniform.max() == 1.0 - 2**-8
    cut = csa.TruncNormalInitializer(0.0, 9.0, 0.0, 1.0)
    assert draw(engine, cut, ids, dim=17, dtype=torch.bfloat16).max() == 1.0


# -------------------------------------------------------------------------- the classes

#: RecIS 1.0.0's arguments and defaults, in order.
SIGNATURES = {
    "ConstantInitializer": {"init_val": 0.0, "dtype": torch.float32},
    "UniformInitializer": {"a": 0.0, "b": 1.0, "generator": None},
    "NormalInitializer": {"mean": 0.0, "std": 1.0, "generator": None},
    "TruncNormalInitializer": {"mean": 0.0, "std": 1.0, "a": -2.0, "b": 2.0, "generator": None},
    "XavierUniformInitializer": {"gain": 1.0, "generator": None},
    "XavierNormalInitializer": {"gain": 1.0, "generator": None},
    "KaimingUniformInitializer": {
        "a": 0.0, "mode": "fan_in", "nonlinearity": "leaky_relu", "generator": None,
    },
    "KaimingNormalInitializer": {
        "shape": None, "dtype": torch.float32,
        "a": 0.0, "mode": "fan_in", "nonlinearity": "leaky_relu", "generator": None,
    },
}  # fmt: skip
BUILDER = ["set_shape", "set_dtype", "build", "impl", "generate"]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_recis(name: str):
    cls = getattr(csa, name)
    parameters = inspect.signature(cls).parameters
    assert list(parameters) == list(SIGNATURES[name])
    assert {p.name: p.default for p in parameters.values()} == SIGNATURES[name]
    assert issubclass(cls, csa.Initializer)
    assert all(callable(getattr(cls, method)) for method in BUILDER)


def test_distributions_worked_by_hand():
    kind = DistributionKind
    uniform, normal = csa.KaimingUniformInitializer, csa.KaimingNormalInitializer
    root = math.sqrt(3.0 / 6.0)
    for initializer, want in [
        (csa.ConstantInitializer(2), Distribution(kind.CONSTANT, loc=2.0)),
        (csa.UniformInitializer(-1, 2), Distribution(kind.UNIFORM, low=-1.0, high=2.0)),
        (csa.NormalInitializer(1, 2), Distribution(kind.NORMAL, loc=1.0, scale=2.0)),
        (csa.TruncNormalInitializer(1, 2, 3, 4), Distribution(kind.TRUNC_NORMAL, 1, 2, 3, 4)),
        # fan_in 6, fan_out 18: √(6 / 24) = 0.5 and √(2 / 32) = 0.25.
        (csa.XavierUniformInitializer(3.0), Distribution(kind.UNIFORM, low=-1.5, high=1.5)),
        (uniform(nonlinearity="LINEAR"), Distribution(kind.UNIFORM, low=-root, high=root)),
        (normal(mode="FAN_OUT", nonlinearity="relu"), Distribution(kind.NORMAL, scale=1 / 3)),
        (normal(None, torch.float16, 1.0), Distribution(kind.NORMAL, scale=6**-0.5)),
        (normal(a=1.0, nonlinearity="linear"), Distribution(kind.NORMAL, scale=6**-0.5)),
    ]:
        got = initializer.distribution(fan_in=6, fan_out=18)
        assert got.kind == want.kind
        assert tuple(got) == pytest.approx(tuple(want), rel=1e-15)
    xavier = csa.XavierNormalInitializer(2.0).distribution(fan_in=6, fan_out=26)
    assert xavier == Distribution(kind.NORMAL, scale=0.5)


def test_repr_shows_the_settings():
    assert repr(csa.UniformInitializer(-1, 2)) == "UniformInitializer(a=-1.0, b=2.0)"
    assert str(csa.KaimingNormalInitializer()) == (
        "KaimingNormalInitializer(a=0.0, mode='fan_in', nonlinearity='leaky_relu')"
    )
    for cls in map(csa.__dict__.get, SIGNATURES):
        assert repr(eval(repr(cls()), vars(csa))) == repr(cls())


def test_seeds_come_from_the_generator():
    generator = torch.Generator().manual_seed(5)
    initializer = csa.NormalInitializer(generator=generator)
    seeds = [initializer.draw_seed() for _ in range(200)]
    assert len(set(seeds)) == 200
    # All 64 bits vary: each is set in half of the seeds.
    for bit in range(64):
        assert 60 < sum(seed >> bit & 1 for seed in seeds) < 140, bit
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    generator.manual_seed(5)
    repr(initializer)
    assert initializer.draw_seed() == seeds[0]


def test_without_a_generator_seeds_come_from_torchs():
    torch.manual_seed(3)
    first = csa.NormalInitializer().draw_seed()
    other = csa.NormalInitializer(generator=torch.Generator().manual_seed(4))
    torch.manual_seed(3)
    other.draw_seed()
    with torch.device("meta"):
        assert csa.NormalInitializer().draw_seed() == first


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("seed", [None, 5])
def test_copies_go_on_from_the_same_state(copy_of, seed: int | None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    initializer = csa.TruncNormalInitializer(0.5, std=0.1, generator=generator)
    initializer.set_shape([3, 4])
    initializer.set_dtype(torch.float64)
    initializer.build()
    initializer.draw_seed()
    twin = copy_of(initializer)
    assert repr(twin) == repr(initializer)
    torch.manual_seed(9)
    twins = twin.draw_seed(), twin.generate()
    torch.manual_seed(9)
    assert initializer.draw_seed() == twins[0]
    assert torch.equal(initializer.generate(), twins[1])


# ---------------------------------------------------------------------------- RecIS's builder


def built(
    initializer: csa.Initializer, shape: list[int], dtype: torch.dtype = torch.float32
) -> csa.Initializer:
    initializer.set_shape(shape)
    initializer.set_dtype(dtype)
    initializer.build()
    return initializer


@pytest.mark.parametrize("name", CASES)
def test_generate_has_the_distribution(name: str):
    dist = expected(pytest.importorskip("scipy.stats"), name)
    initializer = copy.deepcopy(CASES[name])
    # fan_out = 64, and fan_in = 16 however the row is shaped; many draws of that shape.
    built(initializer, [BLOCK, 2, 8], torch.float64)
    torch.manual_seed(1)
    values = torch.stack([initializer.generate() for _ in range(20)])
    assert values.shape == (20, BLOCK, 2, 8)
    check_distribution(values, dist)
    assert initializer.impl() == initializer.distribution(D, BLOCK)


def test_generate_draws_what_torch_draws():
    generator = torch.Generator().manual_seed(6)
    uniform = built(csa.UniformInitializer(-1.0, 2.0, generator), [8, 3], torch.float32)
    normal = built(csa.NormalInitializer(1.0, 2.0, generator), [8, 3], torch.float16)
    got = [uniform.generate(), normal.generate(), uniform.generate()]
    generator.manual_seed(6)
    want = [
        torch.empty(8, 3).uniform_(-1.0, 2.0, generator=generator),
        torch.empty(8, 3, dtype=torch.float16).normal_(1.0, 2.0, generator=generator),
        torch.empty(8, 3).uniform_(-1.0, 2.0, generator=generator),
    ]
    assert [x.dtype for x in got] == [x.dtype for x in want]
    assert all(map(torch.equal, got, want))


def test_generate_constants_and_16_bit_cuts():
    values = built(csa.ConstantInitializer(0.1), [5], torch.bfloat16).generate()
    assert torch.equal(values, torch.full((5,), 0.1, dtype=torch.bfloat16))
    cut = built(csa.TruncNormalInitializer(std=9.0), [50, 7], torch.float16).generate()
    assert cut.dtype == torch.float16
    assert cut.abs().max() <= 2.0


def test_the_builder_says_what_is_missing():
    initializer = csa.NormalInitializer()
    assert initializer.impl() is None
    with pytest.raises(RuntimeError, match=r"call set_shape\(.*\) before build\(\)"):
        initializer.build()
    initializer.set_shape([2, 3])
    with pytest.raises(RuntimeError, match=r"call build\(\) before generate\(\)"):
        initializer.generate()
    initializer.set_dtype()  # RecIS's own default
    initializer.build()
    assert initializer.generate().dtype == torch.float32


def test_what_is_built_stays():
    initializer = built(csa.XavierNormalInitializer(), [2, 3], torch.float64)
    fixed = initializer.impl()
    for change in (
        initializer.build,
        lambda: initializer.set_shape([4]),
        lambda: initializer.set_dtype(torch.float16),
    ):
        text = r"rebuild initializer: Xavier.* shape \[2, 3\] and torch.float64; make a new one"
        with pytest.raises(RuntimeError, match=text):
            change()
    assert initializer.impl() is fixed
    values = initializer.generate()
    assert (values.shape, values.dtype) == ((2, 3), torch.float64)


def test_a_build_that_failed_may_be_repeated():
    initializer = csa.ConstantInitializer(1e5)
    with pytest.raises(ValueError, match=r"initial values must fit torch\.float16"):
        built(initializer, [2, 3], torch.float16)
    assert initializer.impl() is None
    assert (built(initializer, [2], torch.float32).generate() == 1e5).all()


def test_a_built_initializer_serves_tables_as_one_that_is_not():
    ids = torch.tensor(ANY_IDS)

    def tables(initializer: csa.Initializer) -> list[torch.Tensor]:
        shapes = [(D, BLOCK), (D, BLOCK), (5, 7)]  # each has fans of its own
        return [csa.HashTable([d], n, initializer=initializer)(ids).detach() for d, n in shapes]

    def xavier() -> csa.Initializer:
        return csa.XavierNormalInitializer(generator=torch.Generator().manual_seed(3))

    want = tables(xavier())
    assert not torch.equal(want[0], want[1])  # a seed each
    got = tables(built(xavier(), [2, 2], torch.float16))
    assert all(map(torch.equal, got, want))


# ---------------------------------------------------------------------------- bad arguments

TRUNC, KAIMING = csa.TruncNormalInitializer, csa.KaimingNormalInitializer


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: csa.ConstantInitializer("x"), TypeError, "init_val must be a number, got 'x'"),
        (lambda: csa.ConstantInitializer(math.nan), ValueError, "init_val must be .*, got nan"),
        (lambda: csa.UniformInitializer(a=-math.inf), ValueError, "a must be .*, got -inf"),
        (lambda: csa.UniformInitializer(b=math.nan), ValueError, "b must be .*, got nan"),
        (lambda: csa.UniformInitializer(2, 1), ValueError, "a must not be above b, got a=2.0, b=1"),
        (lambda: csa.NormalInitializer(mean=math.nan), ValueError, "mean must be .*, got nan"),
        (lambda: csa.NormalInitializer(std=-0.1), ValueError, "std must be .* 0, got -0.1"),
        (lambda: csa.NormalInitializer(std=math.inf), ValueError, "std must be .*, got inf"),
        (lambda: csa.NormalInitializer(std=None), TypeError, "std must be a number, got None"),
        (lambda: TRUNC(std=0.0), ValueError, "std must be above 0, got 0.0; .*ConstantInit"),
        (lambda: TRUNC(std=-1.0), ValueError, "std must be .* 0, got -1.0"),
        (lambda: TRUNC(a=math.nan), ValueError, "a must be .*, got nan"),
        (lambda: TRUNC(b=math.inf), ValueError, "b must be .*, got inf"),
        (lambda: TRUNC(a=2.0), ValueError, "a must be below b, got a=2.0, b=2.0"),
        (lambda: TRUNC(a=50.0, b=51.0), ValueError, r"must reach \[a, b\]; .*\[50.0, 51.0\] at"),
        (lambda: TRUNC(a=-51.0, b=-50.0), ValueError, r"must reach \[a, b\].* probability is 0"),
        (lambda: csa.XavierUniformInitializer(-1.0), ValueError, "gain must be .* 0, got -1.0"),
        (lambda: csa.XavierNormalInitializer(math.inf), ValueError, "gain must be .*, got inf"),
        (lambda: csa.KaimingUniformInitializer(math.nan), ValueError, "a must be .*, got nan"),
        (lambda: KAIMING(a=1e200), ValueError, r"got 'leaky_relu' \(a=1e\+200\)"),
        (lambda: KAIMING(mode="in"), ValueError, "mode must be 'fan_in' or 'fan_out', got 'in'"),
        (lambda: KAIMING(mode=1), TypeError, "mode must be a string, got int 1"),
        (lambda: KAIMING(nonlinearity="liner"), ValueError, "nonlinearity .* got 'liner'"),
        (lambda: KAIMING(nonlinearity=None), TypeError, "nonlinearity must be a string"),
        (lambda: csa.NormalInitializer(generator=3), TypeError, "must be a torch.Generator .* int"),
        (lambda: csa.Initializer().distribution(1, 1), NotImplementedError, "define distribution"),
        (lambda: KAIMING().distribution(0, 4), ValueError, "fan_in must be at least 1, got 0"),
        (lambda: csa.NormalInitializer().set_shape(5), TypeError, "shape must be a sequence of"),
        (lambda: csa.NormalInitializer().set_shape([]), TypeError, "shape must be a sequence of"),
        (lambda: csa.NormalInitializer().set_shape([4, 0]), ValueError, "shape must be at least 1"),
        (lambda: csa.NormalInitializer().set_shape([4.0]), TypeError, "shape must be an int"),
        (lambda: csa.NormalInitializer().set_dtype(torch.int64), TypeError, "got torch.int64"),
    ],
)  # fmt: skip
def test_bad_arguments(make, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("initializer", "dtype", "fits"),
    [
        (csa.ConstantInitializer(65504.0), torch.float16, True),
        (csa.ConstantInitializer(65536.0), torch.float16, False),
        (csa.ConstantInitializer(65536.0), torch.bfloat16, True),
        (csa.UniformInitializer(-1e5, 0.0), torch.float16, False),
        (csa.NormalInitializer(0.0, 9000.0), torch.float16, True),
        (csa.NormalInitializer(0.0, 9500.0), torch.float16, False),  # 7 standard deviations
        (csa.NormalInitializer(0.0, 1e38), torch.float32, False),
        (csa.NormalInitializer(0.0, 1e38), torch.float64, True),
        (csa.TruncNormalInitializer(0.0, 1e6, -2.0, 2.0), torch.float16, True),
        (csa.TruncNormalInitializer(0.0, 1e6, -2.0, 1e6), torch.float16, False),
        (csa.UniformInitializer(-1e308, 1e308), torch.float64, False),  # b - a overflows
    ],
    ids=repr,
)
def test_values_that_do_not_fit_the_dtype(
    initializer: csa.Initializer, dtype: torch.dtype, fits: bool
):
    distribution = initializer.distribution(D, BLOCK)
    if fits:
        require_fits(distribution, dtype)
        built(initializer, [BLOCK, D], dtype)
        return
    with pytest.raises(ValueError, match=f"initial values must fit {dtype} .*got Distribution"):
        require_fits(distribution, dtype)
    with pytest.raises(ValueError, match="initial values must fit"):
        built(initializer, [BLOCK, D], dtype)
