"""Group pending gradients by row: one key per gradient row, one stable sort of all keys.

A key numbers a row among all rows of the group's tables, so sorted keys list each row's gradients
as one *run*, in order of occurrence. No table is scanned and no gradient moves. Nothing here waits
for the GPU: a row out of range is dropped and noted in the table's ``fault``.

Where every table's gradient is coalesced the keys ascend as they are, and nothing is sorted. (A
dropped gradient's key, greater than all, may then stand between others. It parts no run, since
every run is one gradient.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from ..._types import MOMENT_DTYPE, Pending
from . import _interop
from ._compile import GROUP, THREADS, blocks_for, launch
from ._group import PIECE, ROWS, upload

#: Sorted positions per block of the update (sparse_adamw.cu).
TILE = 128
#: More gradient rows than torch.sort takes on a GPU.
MAX_SIZE = 2**31 - 1


@dataclasses.dataclass
class Segments:
    """The gradients of one group (one device, dtype, gradient dtype, D), sorted by row.

    Attributes:
        pending: the group's tables, in order; it keeps the gradients' memory alive.
        dim: D.
        grad_dtype: dtype of the gradients.
        first_keys: each table's first key.
        num_keys: rows of all tables; the key of a dropped gradient, after every other.
        keys: [N] int32 or int64, sorted.
        order: [N] int64: position, in order of occurrence, of each sorted gradient; None if they
            came sorted.
        pieces: array of ``Piece`` on the device, as int64 words.
        partials: [2 * tiles, D] in the dtype of moments, and
        long_begin: [tiles] int32: room for the kernels, taken before any table is written to.
        faults: [2] int64 per table: whether a row was out of range, and which.
    """

    pending: Sequence[Pending]
    dim: int
    grad_dtype: torch.dtype
    first_keys: list[int]
    num_keys: int
    keys: torch.Tensor
    order: torch.Tensor | None
    pieces: torch.Tensor
    partials: torch.Tensor
    long_begin: torch.Tensor
    faults: list[torch.Tensor]


def segment(pending: Sequence[Pending]) -> Segments:
    """Sort the gradients of tables that share dtype and D by row. Writes to no table.

    Raises:
        OverflowError: more than 2**31 - 1 gradient rows.
    """
    device, first_grad = pending[0].param.device, pending[0].pieces[0].grad
    first_keys = [0, *np.cumsum([p.num_rows for p in pending]).tolist()]
    num_keys = first_keys.pop()
    faults = [
        p.fault if p.fault is not None else torch.zeros(2, dtype=torch.int64, device=device)
        for p in pending
    ]
    tables, pieces, size = [], [], 0
    for number, (p, first_key, fault) in enumerate(zip(pending, first_keys, faults, strict=True)):
        count = 0 if p.row_count is None else p.row_count.data_ptr()
        tables.append((first_key, p.num_rows, count, fault.data_ptr(), p.drop_missing))
        for rows, grad in p.pieces:
            pieces.append((size, rows.data_ptr(), grad.data_ptr(), *grad.stride(), number))
            size += rows.numel()
    if size > MAX_SIZE:
        raise OverflowError(
            f"{size} gradient rows in one step are more than torch.sort takes on a GPU "
            f"({MAX_SIZE}); use smaller batches, or step more often"
        )

    piece_words, table_words = upload(
        device, np.array(pieces, dtype=PIECE), np.array(tables, dtype=ROWS)
    )
    is_narrow = num_keys <= torch.iinfo(torch.int32).max
    keys = torch.empty(size, dtype=torch.int32 if is_narrow else torch.int64, device=device)
    launch(
        device,
        GROUP,
        "make_keys_32" if is_narrow else "make_keys_64",
        blocks_for(size, THREADS),
        THREADS,
        (
            _interop.address_of(piece_words),
            np.int64(len(pieces)),
            _interop.address_of(table_words),
            _interop.address_of(keys),
            np.int64(size),
            np.int64(num_keys),
        ),
    )
    order = None
    if not all(p.coalesced and len(p.pieces) == 1 for p in pending):
        keys, order = torch.sort(keys, stable=True)
    tiles, dim = blocks_for(size, TILE), first_grad.shape[1]
    acc = MOMENT_DTYPE[pending[0].param.dtype]
    return Segments(
        pending=pending,
        dim=dim,
        grad_dtype=first_grad.dtype,
        first_keys=first_keys,
        num_keys=num_keys,
        keys=keys,
        order=order,
        pieces=piece_words,
        partials=torch.empty(2 * tiles, dim, dtype=acc, device=device),
        long_begin=torch.empty(tiles, dtype=torch.int32, device=device),
        faults=faults,
    )
