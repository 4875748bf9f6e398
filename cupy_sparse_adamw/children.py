"""Several logical tables in one physical one: an id's high bits say which child it belongs to.

Names and bits are those of RecIS: 12 bits for the child's index above 52 bits for the id, so ids
that were encoded there are the same ids here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._checks import require_ids, require_int

INDEX_BITS = 12
ID_BITS = 64 - INDEX_BITS
ID_MASK = (1 << ID_BITS) - 1
MAX_CHILDREN = (1 << INDEX_BITS) - 1
#: Names shown in an error text.
SHOWN = 8


class ChildrenInfo:
    """The children of a HashTable, and how an id of theirs becomes an id of the table.

    Args:
        children: their names, distinct. The order matters: a child's index is its place here.
        coalesced: whether ids carry the index of their child. Without it there is one child, and
            ids are what they are, all 64 bits.

    Raises:
        TypeError: children are no list or tuple of strings, or coalesced is no bool.
        ValueError: there are none, more than 4,095, or several without ``coalesced``; or a name
            occurs twice.
    """

    def __init__(self, children: Sequence[str], coalesced: bool = False) -> None:
        if not isinstance(children, (list, tuple)):
            raise TypeError(
                f"children must be a list of names such as ['user', 'item'], got {children!r}"
            )
        for name in children:
            if not isinstance(name, str):
                raise TypeError(f"children must be strings, got {type(name).__name__} {name!r}")
        if not isinstance(coalesced, bool):
            raise TypeError(f"coalesced must be True or False, got {coalesced!r}")
        if not children:
            raise ValueError("children must not be empty; leave them out for a table of its own")
        if len(children) > MAX_CHILDREN:
            raise ValueError(
                f"children must be at most {MAX_CHILDREN}, got {len(children)}; put the others "
                f"into another table"
            )
        if len(children) > 1 and not coalesced:
            raise ValueError(
                f"{len(children)} children need coalesced=True, and ids that encode_id has given "
                f"the index of their child"
            )
        self._index_of = {name: index for index, name in enumerate(children)}
        if len(self._index_of) < len(children):
            twice = next(x for i, x in enumerate(children) if self._index_of[x] != i)
            raise ValueError(f"children must have distinct names, got {twice!r} twice")
        self._children: list[str] = list(children)
        self._coalesced = coalesced

    def __repr__(self) -> str:
        return f"ChildrenInfo({self._children!r}, coalesced={self._coalesced})"

    # ------------------------------------------------------------------ the bits

    @staticmethod
    def index_bits_num() -> int:
        """Bits of an encoded id that hold the child's index: 12."""
        return INDEX_BITS

    @staticmethod
    def id_bits_num() -> int:
        """Bits of an encoded id that hold the id: 52."""
        return ID_BITS

    @staticmethod
    def index_mask() -> int:
        """The index's bits, as an int64: −2**52."""
        return ~ID_MASK

    @staticmethod
    def id_mask() -> int:
        """The id's bits: 2**52 − 1."""
        return ID_MASK

    @staticmethod
    def max_children_num() -> int:
        """The most children that a table can have: 4,095."""
        return MAX_CHILDREN

    # ------------------------------------------------------------------ the children

    def children(self) -> list[str]:
        """Their names, by index."""
        return list(self._children)

    def has_child(self, child: str) -> bool:
        """Whether there is a child of this name."""
        return child in self._index_of

    def child_index(self, child: str) -> int:
        """The index of the child of this name.

        Raises:
            ValueError: there is none. (RecIS 1.0.0 returns 0, the first child's, and from then on
                has it under this name too.)
        """
        if child not in self._index_of:
            known = ", ".join(map(repr, self._children[:SHOWN]))
            more = len(self._children) - SHOWN
            known += f" and {more} more" if more > 0 else ""
            raise ValueError(f"child must be one of {known}, got {child!r}")
        return self._index_of[child]

    def child_at(self, index: int) -> str:
        """The name of the child of this index.

        Raises:
            TypeError, ValueError: ``index`` is no int, or none of a child.
        """
        index = require_int("index", index, 0)
        self._require_index(index)
        return self._children[index]

    def is_coalesce(self) -> bool:
        """Whether ids carry the index of their child."""
        return self._coalesced

    # ------------------------------------------------------------------ ids

    def encode_id(self, id: Any, index: Any, *, truncate: bool = False) -> Any:
        """The table's ids of a child's ids.

        An id must fit 52 bits: cutting it would let ids that differ higher up share a row. RecIS
        cuts without a word, which is harmless for hashes: of a billion random ids, some hundred
        pairs then meet. ``truncate=True`` asks for that.

        Args:
            id: an int or an int64 tensor of any shape, from 0 to 2**52 − 1.
            index: the child's index or name; or an int64 tensor of indices that broadcasts with
                ``id``. Ids or indices on a GPU are waited for, to check them.
            truncate: keep the low 52 bits of any id, as RecIS does. Ids are not checked then, nor
                waited for.

        Returns:
            An int if both are; else an int64 tensor of their common shape, on the device of
            ``id``.

        Raises:
            TypeError: ``id`` or ``index`` is no int, int64 or int32 tensor (or name).
            ValueError: an id does not fit, ``index`` is none of a child or does not broadcast.
        """
        if isinstance(index, str):
            index = self.child_index(index)
        elif isinstance(index, torch.Tensor):
            index = require_ids(index, "index").long()
        else:
            index = require_int("index", index, 0)
        self._require_index(index)
        id = _as_int64("id", id)
        if truncate:
            id = id & ID_MASK
        else:
            _require_52_bits(id)
        if not isinstance(index, torch.Tensor):
            return id | _signed(index << ID_BITS)
        if isinstance(id, torch.Tensor):
            try:
                torch.broadcast_shapes(id.shape, index.shape)
            except RuntimeError:
                raise ValueError(
                    f"index must have a shape that broadcasts with id's, {list(id.shape)}, got "
                    f"{list(index.shape)}"
                ) from None
            index = index.to(id.device)
        return id | index << ID_BITS

    def split_id(self, ids: Any) -> tuple[Any, Any]:
        """The opposite of ``encode_id``: (indices of children, their ids).

        Args:
            ids: ids of the table, an int or an int64 tensor of any shape.

        Returns:
            Two ints, or two int64 tensors of that shape. Without ``coalesced`` every index is 0
            and the ids are those given.

        Raises:
            TypeError: ``ids`` are no int, int64 or int32 tensor.
        """
        ids = _as_int64("ids", ids)
        if not self._coalesced:
            return ids & 0, ids
        return ids >> ID_BITS & MAX_CHILDREN, ids & ID_MASK

    def _require_index(self, index: Any) -> None:
        """Raise ValueError if an int, or one in an int64 tensor, is no child's index."""
        low, high = _range(index)
        if low < 0 or high >= len(self._children):
            raise ValueError(
                f"index must be from 0 to {len(self._children) - 1}, a child's each, got "
                f"{low if low < 0 else high}"
            )


def _as_int64(name: str, ids: Any) -> Any:
    """An int, or an int64 tensor."""
    if isinstance(ids, torch.Tensor):
        return require_ids(ids, name).long()
    return require_int(name, ids, -(2**63))


def _range(ids: Any) -> tuple[int, int]:
    """Least and greatest; (0, 0) of an empty tensor. Waits for the device."""
    if not isinstance(ids, torch.Tensor):
        return ids, ids
    if not ids.numel():
        return 0, 0
    low, high = torch.stack(ids.aminmax()).tolist()
    return low, high


def _require_52_bits(ids: Any) -> None:
    low, high = _range(ids)
    if low < 0 or high > ID_MASK:
        raise ValueError(
            f"id must be from 0 to 2**{ID_BITS} - 1 beside the index of its child, got "
            f"{low if low < 0 else high}; for hashes use encode_id(..., truncate=True), which "
            f"keeps the low {ID_BITS} bits as RecIS does, so that ids that differ only above them "
            f"share a row"
        )


def _signed(word: int) -> int:
    """The int64 of a 64-bit word."""
    return (word ^ 1 << 63) - (1 << 63)
