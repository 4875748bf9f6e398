"""What kernels are told about tables and gradients: the structs of ``group.cuh``, and their way."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ..._slots import Slot
from ..._types import Missed
from . import _interop
from ._compile import GROUP, launch

_DIVISOR = [("divisor", "i8"), ("magic", "u8"), ("shift", "i8")]
DIVISOR = np.dtype(_DIVISOR)

PIECE = np.dtype(
    [
        ("first_position", "i8"),
        ("rows", "i8"),
        ("grad", "i8"),
        ("row_stride", "i8"),
        ("column_stride", "i8"),
        ("table", "i8"),
    ]
)
ROWS = np.dtype(
    [
        ("first_key", "i8"),
        ("num_rows", "i8"),
        ("row_count", "i8"),
        ("fault", "i8"),
        ("drop_missing", "i8"),
    ]
)
TABLE = np.dtype(
    [
        ("first_key", "i8"),
        *_DIVISOR,
        ("param", "i8"),
        ("exp_avg", "i8"),
        ("exp_avg_sq", "i8"),
        ("step", "i8"),
        ("fault", "i8"),
        ("lr_address", "i8"),
        ("lr_bytes", "i8"),
        ("lr", "f8"),
        ("beta1", "f8"),
        ("beta2", "f8"),
        ("eps", "f8"),
        ("weight_decay", "f8"),
        ("grad_scale", "f8"),
        ("mean", "f8"),
        ("corrects_eps", "f8"),
    ]
)
MISSED = np.dtype(
    [
        ("last_step", "i8"),
        ("row_step", "i8"),
        ("rules", "i8"),
        ("factors", "i8"),
        ("steps", "i8"),
        ("t", "i8"),
        ("first", "i8"),
        ("window", "i8"),
    ]
)
#: Words that one launch of ``store_words`` takes by value.
WORDS = 496


@functools.lru_cache(maxsize=1024)
def divisor(number: int) -> tuple[int, int, int]:
    """The fields of ``Divisor`` for a block size; blocks.cuh has the formula."""
    shift = (number - 1).bit_length()
    return number, -(-(1 << (63 + shift)) // number), shift


def divisor_struct(number: int) -> np.ndarray[Any, Any]:
    """``Divisor`` as a kernel argument by value: 0-d, which every CuPy takes."""
    return np.array(divisor(number), dtype=DIVISOR)


#: What captured graphs read, and nothing else may hold any more. Nobody tells when a graph is gone.
_kept_for_graphs: list[object] = []


def keep_for_graph(things: Iterable[Slot | torch.Tensor], device: torch.device) -> None:
    """Under capture, keep tensors, and slots' memory as it is now: a replay reads it."""
    if _interop.is_capturing(device):
        for thing in things:
            if isinstance(thing, Slot):
                _kept_for_graphs.append((thing.block_table(), thing.values()))
            else:
                _kept_for_graphs.append(thing)


def block_table(slot: Slot) -> torch.Tensor:
    """The addresses of a slot's blocks, on its device.

    Raises:
        RuntimeError: they are not there yet, and the stream is being captured.
        ValueError: its rows have gaps between them, which kernels know nothing of.
    """
    if slot.has_gaps:
        raise ValueError(
            f"slot {slot.name()!r}: the CUDA engine takes rows without gaps between them, these "
            f"lie {slot.row_bytes} bytes apart; use moments.contiguous()"
        )
    if not slot.has_block_table() and _interop.is_capturing(slot.device):
        raise RuntimeError(
            "a table has grown or is new since the last step outside of CUDA graph capture; run "
            "one step, or one lookup, before capturing"
        )
    return slot.block_table()


def missed_fields(
    missed: Missed | None, last_step: Slot | None, row_step: Slot | None = None
) -> tuple[int, ...]:
    """The fields of ``MISSED``. What is None is a null pointer to the kernels."""
    slots = [0 if slot is None else block_table(slot).data_ptr() for slot in (last_step, row_step)]
    if missed is None:
        return (*slots, *[0] * 6)
    for log in (missed.rules, missed.factors, missed.steps):
        if log.dtype != torch.float64 or not log.is_contiguous():
            raise ValueError(
                f"a log of missed steps must be contiguous float64, got {log.dtype}, strides "
                f"{log.stride()}"
            )
    logs = [log.data_ptr() for log in (missed.rules, missed.factors, missed.steps)]
    return (*slots, *logs, missed.t, missed.first, missed.window)


def is_aligned(address: int, dtype: torch.dtype, vec: int) -> bool:
    """Whether ``vec`` elements from an address on can move together."""
    return address % (vec * dtype.itemsize) == 0


def slots_are_aligned(slots: Iterable[Slot], vec: int) -> bool:
    """Whether ``vec`` elements of each slot's rows can move together, if D is a multiple.

    Only the first block of a slot is looked at: the others follow in its slab, or begin slabs of
    their own, which are aligned.
    """
    held = (slot for slot in slots if slot.num_rows())
    return all(is_aligned(int(slot.addresses()[0]), slot.dtype, vec) for slot in held)


def _store_words(words: np.ndarray[Any, Any], target: torch.Tensor) -> None:
    struct = np.zeros((), dtype=[("word", "i8", WORDS)])
    struct["word"][: words.size] = words
    args = (struct, _interop.address_of(target), np.int64(words.size))
    launch(target.device, GROUP, "store_words", 1, 128, args)


@functools.cache
def _load_store_words(device: torch.device) -> None:
    """Launch the kernel once: CUDA may load it at its first launch, which a capture forbids."""
    _store_words(np.zeros(1, dtype=np.int64), torch.empty(1, dtype=torch.int64, device=device))


def upload(device: torch.device, *arrays: np.ndarray[Any, Any]) -> Sequence[torch.Tensor]:
    """Copies of arrays of structs on a device, as int64 words of one tensor. Nobody waits.

    Under capture it is made by launches that hold the words themselves: a graph that is replayed
    later must not read host memory, which has another use by then.
    """
    parts = [array.view(np.int64) for array in arrays]
    words, sizes = np.concatenate(parts), [part.size for part in parts]
    if _interop.is_capturing(device):
        target = torch.empty(words.size, dtype=torch.int64, device=device)
        for begin in range(0, words.size, WORDS):
            _store_words(words[begin : begin + WORDS], target[begin : begin + WORDS])
    else:
        _load_store_words(device)
        target = _interop.to_device(words, device)
    copies: Sequence[torch.Tensor] = target.split(sizes)
    return copies
