"""What new rows of a HashTable are drawn from: the eight initializers of RecIS, by its names.

An initializer says which distribution; the engines draw from it, each value a pure function of
(seed, id, column). Names and argument order are RecIS's, and so is its builder (``set_shape``,
``set_dtype``, ``build``, ``generate``). A HashTable needs none of it: it takes an initializer that
is built or not, and one may serve several tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ._checks import require_int, require_number, require_table_dtype
from ._types import Distribution, DistributionKind

#: No engine draws a normal value further than this from its mean, in standard deviations.
FARTHEST = 7.0


def _require_generator(generator: Any) -> torch.Generator | None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}; "
            f"for a fixed seed pass torch.Generator().manual_seed(seed)"
        )
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(
            f"generator must be on cpu, got one on {generator.device}: it only draws the seed, "
            f"and tables on every device take theirs from torch.Generator()"
        )
    return generator


def require_fits(distribution: Distribution, dtype: torch.dtype) -> None:
    """Raise ValueError if values of ``distribution`` can be too large for ``dtype``."""
    reach = FARTHEST * distribution.scale if distribution.kind == DistributionKind.NORMAL else 0.0
    largest = max(
        abs(distribution.loc) + reach,
        abs(distribution.low),
        abs(distribution.high),
        distribution.high - distribution.low,
    )
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"initial values must fit {dtype} (at most {torch.finfo(dtype).max:g} in size), "
            f"got {distribution}"
        )


class Initializer:
    """Base of the initializers; a subclass says what its ``distribution`` is.

    Public attributes are the settings, shown by ``repr``.

    Args:
        generator: CPU generator that seeds are drawn from; None means torch's default one.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self._generator = _require_generator(generator)
        self._shape: tuple[int, ...] | None = None
        self._dtype = torch.float32
        self._impl: Distribution | None = None

    def distribution(self, fan_in: int, fan_out: int) -> Distribution:
        """What each element is drawn from.

        Args:
            fan_in: D, elements per row.
            fan_out: rows per block.
        """
        raise NotImplementedError(f"{type(self).__name__} must define distribution()")

    def draw_seed(self) -> int:
        """One int64, any of the 2**64, drawn from the generator."""
        # Without an upper bound, random_ draws from the full range above the lower one.
        word = torch.empty((), dtype=torch.int64, device="cpu")
        return int(word.random_(-(2**63), None, generator=self._generator))

    def set_shape(self, shape: Sequence[int]) -> None:
        """Set what ``generate`` returns: [block_size, *embedding_shape].

        Raises:
            TypeError, ValueError: ``shape`` is no sequence of ints of at least 1.
            RuntimeError: the initializer is built.
        """
        self._require_not_built()
        if not isinstance(shape, Sequence) or not shape:
            raise TypeError(f"shape must be a sequence of ints such as [1024, 64], got {shape!r}")
        self._shape = tuple(require_int("shape", size, 1) for size in shape)

    def set_dtype(self, dtype: torch.dtype = torch.float32) -> None:
        """Set the dtype of what ``generate`` returns.

        Raises:
            TypeError: ``dtype`` is none of a table.
            RuntimeError: the initializer is built.
        """
        self._require_not_built()
        self._dtype = require_table_dtype(type(self).__name__, dtype)

    def build(self) -> None:
        """Fix the distribution for the shape and dtype that are set, once.

        fan_in is the product of all sizes but the first, fan_out the first.

        Raises:
            RuntimeError: no shape is set, or the initializer is built.
            ValueError: values would not fit the dtype.
        """
        self._require_not_built()
        if self._shape is None:
            raise RuntimeError("call set_shape([block_size, *embedding_shape]) before build()")
        distribution = self.distribution(math.prod(self._shape[1:]), self._shape[0])
        require_fits(distribution, self._dtype)
        self._impl = distribution

    def _require_not_built(self) -> None:
        if self._impl is not None:
            raise RuntimeError(
                f"rebuild initializer: {self} is built for shape {list(self._shape or ())} and "
                f"{self._dtype}; make a new one for another shape or dtype"
            )

    def impl(self) -> Distribution | None:
        """What ``build`` has fixed, None before."""
        return self._impl

    def generate(self) -> torch.Tensor:
        """A CPU tensor of the shape and dtype that are set, drawn by torch from the generator.

        Each call draws anew. A HashTable's rows come from its seed and ids instead.

        Raises:
            RuntimeError: ``build`` was not called.
        """
        if self._impl is None or self._shape is None:
            raise RuntimeError("call build() before generate()")
        kind, loc, scale, low, high = self._impl
        values = torch.empty(self._shape, dtype=self._dtype, device="cpu")
        if kind == DistributionKind.CONSTANT:
            return values.fill_(loc)
        if kind == DistributionKind.UNIFORM:
            return values.uniform_(low, high, generator=self._generator)
        if kind == DistributionKind.NORMAL:
            return values.normal_(loc, scale, generator=self._generator)
        u = torch.rand(self._shape, dtype=torch.float64, device="cpu", generator=self._generator)
        # Above the mean through the mirror image: near 1, probabilities have no digits to spare.
        sign = 1.0 if low - loc < loc - high else -1.0
        start, stop = (math.erfc(-sign * (x - loc) / scale / math.sqrt(2)) / 2 for x in (low, high))
        draws = loc + scale * sign * torch.special.ndtri(start + (stop - start) * u)
        return values.copy_(draws.clamp_(low, high))

    def __repr__(self) -> str:
        settings = [f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_")]
        return f"{type(self).__name__}({', '.join(settings)})"

    def __getstate__(self) -> dict[str, Any]:
        # The generator goes as its state: pickling one fails, or miscounts a reference, in
        # several versions of torch.
        generator = self._generator
        state = None if generator is None else generator.get_state()
        return {**self.__dict__, "_generator": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["_generator"] is not None:
            self._generator = torch.Generator()
            self._generator.set_state(state["_generator"])


class ConstantInitializer(Initializer):
    """Every element is ``init_val``.

    Args:
        init_val: the value.
        dtype: ignored, as in RecIS; the table's dtype counts.
    """

    def __init__(self, init_val: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.init_val = require_number("init_val", init_val)

    def distribution(self, fan_in: int, fan_out: int) -> Distribution:
        """The point ``init_val``."""
        return Distribution(DistributionKind.CONSTANT, loc=self.init_val)


class UniformInitializer(Initializer):
    """Uniform over [a, b); ``a == b`` gives a constant, as in torch.

    Args:
        a: lower bound.
        b: upper bound. A HashTable's values stay below it, also after rounding to its dtype.
        generator: CPU generator that seeds are drawn from; None means torch's default one.
    """

    def __init__(
        self, a: float = 0.0, b: float = 1.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(generator)
        self.a = require_number("a", a)
        self.b = require_number("b", b)
        if self.a > self.b:
            raise ValueError(f"a must not be above b, got a={self.a}, b={self.b}")

    def distribution(self, fan_in: int, fan_out: int) -> Distribution:
        """Uniform over [a, b)."""
        return Distribution(DistributionKind.UNIFORM, low=self.a, high=self.b)


class NormalInitializer(Initializer):
    """Normal with the given mean and standard deviation.

    Args:
        mean: the mean.
        std: the standard deviation, at least 0.
        generator: CPU generator that seeds are drawn from; None means torch's default one.
    """

    def __init__(
        self, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(generator)
        self.mean = require_number("mean", mean)
        self.std = require_number("std", std, 0.0)

    def distribution(self, fan_in: int, fan_out: int) -> Distribution:
        """Normal around ``mean``."""
        return Distribution(DistributionKind.NORMAL, loc=self.mean, scale=self.std)


class TruncNormalInitializer(Initializer):
    """Normal, cut to [a, b].

    ``a`` and ``b`` are values, not multiples of ``std``: so it is in torch.nn.init.trunc_normal_
    and in RecIS's C++, though RecIS's docstring says otherwise.

    Args:
        mean: the mean before cutting.
        std: the standard deviation before cutting, above 0.
        a: least value.
        b: greatest value, above ``a``.
        generator: CPU generator that seeds are drawn from; None means torch's default one.
    """

    def __init__(
        self,
        mean: float = 0.0,
        std: float = 1.0,
        a: float = -2.0,
        b: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(generator)
        self.mean = require_number("mean", mean)
        self.std = require_number("std", std, 0.0)
        self.a = require_number("a", a)
        self.b = require_number("b", b)
        if self.std == 0.0:
            raise ValueError("std must be above 0, got 0.0; for one value use ConstantInitializer")
        if self.a >= self.b:
            raise ValueError(f"a must be below b, got a={self.a}, b={self.b}")
        low, high = (self.a - self.mean) / self.std, (self.b - self.mean) / self.std
        low, high = min(low, -high), min(high, -low)  # the mirror image if mostly above the mean
        probability = (math.erfc(-high / math.sqrt(2)) - math.erfc(-low / math.sqrt(2))) / 2
        if probability < torch.finfo(torch.float64).tiny:
            raise ValueError(
                f"the normal distribution must reach [a, b]; mean={self.mean}, std={self.std} puts "
                f"[{self.a}, {self.b}] at {low:g} to {high:g} standard deviations, where its "
                f"probability is {probability:g} in double precision"
            )

    def distribution(self, fan_in: int, fan_out: int) -> Distribution:
        """Normal around ``mean``, cut to [a, b]."""
        return Distribution(
            DistributionKind.TRUNC_NORMAL, loc=self.mean, scale=self.std, low=self.a, high=self.b
        )


class _Xavier(Initializer):
    """std = gain · √(2 / (fan_in + fan_out)) (Glorot and Bengio, 2010)."""

    def __init__(self, gain: float = 1.0, generator: torch.Generator | None = None) -> None:
        super().__init__(generator)
        self.gain = require_number("gain", gain, 0.0)

    def _std(self, fan_in: int, fan_out: int) -> float:
        fans = require_int("fan_in", fan_in, 1) + require_int("fan_out", fan_out, 1)
        return self.gain * math.sqrt(2.0 / fans)


class XavierUniformInitializer(_Xavier):
    """Uniform over ±gain · √(6 / (fan_in + fan_out)): fan_in is D, fan_out the block size.

    Args:
        gain: factor, at least 0.
        generator: CPU generator that seeds are drawn from; None means torch's default one.
    """

    def distribution(self, fan_in: int, fan_out: int) -> Distribution:
        """Uniform around 0."""
        return _uniform_with(self._std(fan_in, fan_out))


class XavierNormalInitializer(_Xavier):
    """Normal with std gain · √(2 / (fan_in + fan_out)): fan_in is D, fan_out the block size.

    Args:
        gain: factor, at least 0.
        generator: CPU generator that seeds are drawn from; None means torch's default one.
    """

    def distribution(self, fan_in: int, fan_out: int) -> Distribution:
        """Normal around 0."""
        return Distribution(DistributionKind.NORMAL, scale=self._std(fan_in, fan_out))


class _Kaiming(Initializer):
    """std = gain(nonlinearity, a) / √fan (He, Zhang, Ren and Sun, 2015)."""

    def __init__(
        self,
        a: float = 0.0,
        mode: str = "fan_in",
        nonlinearity: str = "leaky_relu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(generator)
        self.a = require_number("a", a)
        self.mode = _require_string("mode", mode)
        self.nonlinearity = _require_string("nonlinearity", nonlinearity)
        if self.mode not in ("fan_in", "fan_out"):
            raise ValueError(f"mode must be 'fan_in' or 'fan_out', got {mode!r}")
        calculate_gain: Any = torch.nn.init.calculate_gain  # newer torch wants literals
        try:
            self._gain = float(calculate_gain(self.nonlinearity, self.a))
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"nonlinearity must be one that torch.nn.init.calculate_gain knows, such as "
                f"'leaky_relu', 'relu', 'tanh' or 'linear', got {nonlinearity!r} (a={a})"
            ) from error

    def _std(self, fan_in: int, fan_out: int) -> float:
        fan = fan_in if self.mode == "fan_in" else fan_out
        return self._gain / math.sqrt(require_int(self.mode, fan, 1))


class KaimingUniformInitializer(_Kaiming):
    """Uniform over ±gain · √(3 / fan), where fan is D or, with "fan_out", the block size.

    Args:
        a: negative slope, for "leaky_relu" only.
        mode: "fan_in" or "fan_out".
        nonlinearity: as torch.nn.init.calculate_gain takes it.
        generator: CPU generator that seeds are drawn from; None means torch's default one.
    """

    def distribution(self, fan_in: int, fan_out: int) -> Distribution:
        """Uniform around 0."""
        return _uniform_with(self._std(fan_in, fan_out))


class KaimingNormalInitializer(_Kaiming):
    """Normal with std gain / √fan, where fan is D or, with "fan_out", the block size.

    (RecIS 1.0.0 builds a uniform distribution here, by mistake.)

    Args:
        shape: ignored, as in RecIS; see ``set_shape``.
        dtype: ignored, as in RecIS; see ``set_dtype``.
        a: negative slope, for "leaky_relu" only.
        mode: "fan_in" or "fan_out".
        nonlinearity: as torch.nn.init.calculate_gain takes it.
        generator: CPU generator that seeds are drawn from; None means torch's default one.
    """

    def __init__(
        self,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        a: float = 0.0,
        mode: str = "fan_in",
        nonlinearity: str = "leaky_relu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(a, mode, nonlinearity, generator)

    def distribution(self, fan_in: int, fan_out: int) -> Distribution:
        """Normal around 0."""
        return Distribution(DistributionKind.NORMAL, scale=self._std(fan_in, fan_out))


def _uniform_with(std: float) -> Distribution:
    """The uniform distribution around 0 of this standard deviation."""
    bound = math.sqrt(3.0) * std
    return Distribution(DistributionKind.UNIFORM, low=-bound, high=bound)


def _require_string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__} {value!r}")
    return value.lower()
