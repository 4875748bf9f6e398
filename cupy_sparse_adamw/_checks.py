"""Checks of what users pass in: the only wording of argument errors.

TypeError for a type or dtype, ValueError for a shape, a range or a device. Every text names the
argument, what was got, and the way out.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ._types import MOMENT_DTYPE, Hyperparams

#: What becomes of rows that no batch touches.
UNTOUCHED = ("skip", "decay", "dense")
#: Whose number of updates bias is corrected by.
BIAS = ("table", "row")


def require_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    below_high: bool = False,
) -> float:
    """``value`` as a finite float in [low, high], or [low, high) if ``below_high``."""
    if type(value) is float and -math.inf < value < math.inf and low <= value < high:
        return value  # every step asks
    try:
        if isinstance(value, (str, bool)):  # YAML reads 1e-3 as a string
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if (
        not math.isfinite(number)
        or number < low
        or number > high
        or (below_high and number == high)
    ):
        limits = "a finite number"
        if math.isfinite(high):
            limits += f" in [{low:g}, {high:g}{')' if below_high else ']'}"
        elif math.isfinite(low):
            limits += f" of at least {low:g}"
        raise ValueError(f"{name} must be {limits}, got {number!r}")
    return number


def require_int(name: str, value: Any, low: int) -> int:
    """``value`` as an int of at least ``low``. NumPy's integers are ints too."""
    try:
        if isinstance(value, bool) or (isinstance(value, torch.Tensor) and value.dim()):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}") from None
    if number < low:
        raise ValueError(f"{name} must be at least {low}, got {number}")
    return number


def require_bool(name: str, value: Any) -> bool:
    """``value``, if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def require_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """``value``, if it is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def require_betas(betas: Any) -> tuple[Any, Any]:
    """A pair."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair (beta1, beta2), got {betas!r}")
    return betas[0], betas[1]


def require_lr(lr: Any) -> float | torch.Tensor:
    """A learning rate, finite and at least 0; of one on a GPU, which is not read, the dtype."""
    if not isinstance(lr, torch.Tensor):
        return require_number("lr", lr, 0.0)
    rate: torch.Tensor = lr.detach()
    if rate.device.type == "cpu" or rate.numel() != 1:
        require_number("lr", rate, 0.0)
    elif rate.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"an lr on a GPU must be float32 or float64, got {rate.dtype}; use lr.float()"
        )
    return rate


def lr_error(name: str, lr: torch.Tensor, device: torch.device) -> RuntimeError:
    """What to raise for a table on ``device`` whose captured step would not follow ``lr``."""
    return RuntimeError(
        f"table {name!r}: a CUDA graph cannot follow an lr on {lr.device}; use "
        f"torch.tensor(lr, device={str(device)!r})"
    )


#: What ``require_hyperparams`` reads of a param group.
SETTINGS = (
    *("lr", "betas", "eps", "weight_decay", "maximize", "eps_mode"),
    *("untouched", "bias_correction"),
)


def require_hyperparams(group: Mapping[str, Any]) -> Hyperparams:
    """The settings of a param group, each finite and in its range."""
    betas = require_betas(group["betas"])
    hyper = Hyperparams(
        require_lr(group["lr"]),
        require_number("beta1", betas[0], 0.0, 1.0, below_high=True),
        require_number("beta2", betas[1], 0.0, 1.0, below_high=True),
        require_number("eps", group["eps"], 0.0),
        require_number("weight_decay", group["weight_decay"], 0.0),
        require_bool("maximize", group["maximize"]),
        require_choice("eps_mode", group["eps_mode"], ("torch", "tf")),
    )
    untouched = require_choice("untouched", group["untouched"], UNTOUCHED)
    per_row = require_choice("bias_correction", group["bias_correction"], BIAS)
    if untouched != "skip":
        _require_can_catch_up(untouched, hyper)
        if untouched == "dense" and per_row == "row":
            raise ValueError(
                "untouched='dense' does what torch.optim.AdamW does, which corrects bias by the "
                "table's steps; use bias_correction='table', or untouched='decay'"
            )
    return hyper


def _require_can_catch_up(untouched: str, hyper: Hyperparams) -> None:
    """Raise unless what a row misses with these settings can be made up for."""
    if isinstance(hyper.lr, torch.Tensor) and hyper.lr.device.type != "cpu":
        raise TypeError(
            f"with untouched={untouched!r} the host must read the lr, got one on "
            f"{hyper.lr.device}; use a float, or a tensor on the CPU"
        )
    decay = float(hyper.lr) * hyper.weight_decay
    if decay >= 1.0:
        raise ValueError(
            f"with untouched={untouched!r} lr * weight_decay must be below 1, got {decay:g}: a "
            f"single step would leave nothing of a row"
        )
    if untouched == "dense" and hyper.eps == 0.0:
        raise ValueError("with untouched='dense' eps must be above 0, got 0.0")
    if untouched == "dense" and hyper.beta1**2 >= hyper.beta2:
        raise ValueError(
            f"with untouched='dense' beta1**2 must be below beta2, or the motion of a row that is "
            f"not touched would not come to an end; got beta1 = {hyper.beta1}, "
            f"beta2 = {hyper.beta2}"
        )


def require_table_dtype(name: str, dtype: Any) -> torch.dtype:
    """A dtype that a table can have."""
    if dtype not in MOMENT_DTYPE:
        raise TypeError(f"{name}: tables are float32, float64, float16 or bfloat16, got {dtype}")
    return dtype  # type: ignore[no-any-return]


def require_shape(embedding_shape: Any) -> tuple[int, ...]:
    """The shape of one row: an int or a non-empty sequence of positive ints."""
    if hasattr(embedding_shape, "__index__"):
        embedding_shape = (embedding_shape,)
    if not isinstance(embedding_shape, Sequence) or not embedding_shape:
        raise TypeError(
            f"embedding_shape must be an int or a sequence of ints such as [64], "
            f"got {embedding_shape!r}"
        )
    return tuple(require_int("embedding_shape", size, 1) for size in embedding_shape)


def row_error(name: str, row: int, num_rows: int) -> IndexError:
    """What to raise for a gradient of a row that the table does not have."""
    if 0 <= row < num_rows:
        return IndexError(
            f"table {name!r}: a step captured in a CUDA graph names row {row}, which the table did "
            f"not have at capture; capture the step anew"
        )
    return IndexError(
        f"table {name!r}: a gradient names row {row}, but the table has {num_rows} rows"
    )


def require_world_size() -> int:
    """The number of workers, as torchrun sets it in the environment; 1 without it."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"environment variable WORLD_SIZE must be a positive int, got {text!r}")
    return int(text)


def require_ids(ids: Any, name: str = "ids") -> torch.Tensor:
    """An int64 or int32 tensor of ids of any shape."""
    if not isinstance(ids, torch.Tensor):
        raise TypeError(
            f"{name} must be an int64 tensor, got {type(ids).__name__}; use torch.tensor(...)"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {ids.dtype}; use {name}.long()")
    return ids


def require_rows_of(
    name: str, what: str, values: Any, count: int, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """``values`` [count, *shape] (or flat, [count, D]) on ``device``, as [count, D]."""
    if not isinstance(values, torch.Tensor):
        raise TypeError(f"table {name!r}: {what} must be a tensor, got {type(values).__name__}")
    dim = math.prod(shape)
    if values.shape not in ((count, *shape), (count, dim)):
        raise ValueError(
            f"table {name!r}: {what} must have shape {[count, *shape]}, one row each, "
            f"got {list(values.shape)}"
        )
    if values.device != device:
        raise ValueError(
            f"table {name!r}: {what} must be on {device}, got {values.device}; "
            f"use .to({str(device)!r})"
        )
    return values.flatten(1) if values.dim() > 2 else values


def require_dtype(
    name: str, what: str, values: torch.Tensor, allowed: Sequence[torch.dtype]
) -> torch.Tensor:
    """``values`` of one of the allowed dtypes."""
    if values.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise TypeError(
            f"table {name!r}: {what} must be {names}, got {values.dtype}; use .to({allowed[0]})"
        )
    return values
