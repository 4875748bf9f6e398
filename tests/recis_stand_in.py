"""RecIS's hash table as Python sees it: what ``csrc/bind.cc`` of RecIS 1.0.0 binds, nothing more.

Written from RecIS's sources (commit b004c56), faults included:

* ``grad()`` returns positions in the list of distinct rows where a row repeats, and fails where
  nothing was accepted (nothing bound tells whether something was);
* a slot that is appended gets no blocks for the rows that exist, and its later blocks are then
  rows too early; appending a name twice makes two slots;
* ``clear()`` drops all blocks but goes on counting them, so that the next rows have no memory;
* ``slot_index`` takes an index and returns a slot; ``encode_id`` and the constants of ChildrenInfo
  are static functions bound as methods, so that every call fails;
* constants cannot be drawn in a 16-bit dtype; on the CPU there are no bfloat16 lookups.

As with torch's custom classes, arguments are positional, every object that comes out of a call is
a new wrapper, ``==`` raises, and nothing can be copied, pickled or given attributes. Where the C++
code reads or writes beyond its blocks, this raises IndexError.
"""

from __future__ import annotations

import types
from typing import Any

import torch

BOUND = {
    "Generator": "",
    "ChildrenInfo": "index_bits_num id_bits_num index_mask id_mask max_children_num encode_id "
    "children child_index has_child child_at is_coalesce",
    "Slot": "block_size name flat_size value values",
    "SlotGroup": "slot_by_name slot_by_index slot_index slots",
    "HashtableImpl": "accept_grad grad clear_grad embedding_lookup insert clear clear_id ids "
    "slot_group children_info append_filter_slot append_step_filter_slot update_slot get_slot "
    "delete ids_map",
}


class ScriptObject:
    """What torch shows of a custom class."""

    __slots__ = ("__held", "__weakref__")

    def __init__(self, held: Any) -> None:
        object.__setattr__(self, "_ScriptObject__held", held)

    def __getattr__(self, name: str) -> Any:
        held = self.__held
        kind = type(held).__name__
        if kind == "HashtableImpl" and name == "hashtable_tag":
            return -1
        if name not in BOUND[kind].split():
            raise AttributeError(f"{kind} does not have a field with name {name!r}")
        method = getattr(held, name)

        def call(*args: Any) -> Any:
            return wrapped(method(*map(unwrapped, args)))

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        raise RuntimeError(f"does not have an attribute with name {name!r}")

    def __eq__(self, other: object) -> bool:
        raise NotImplementedError("'__eq__' is not implemented")

    __hash__ = object.__hash__

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("Tried to serialize object which does not have a __getstate__ method!")


def wrapped(value: Any) -> Any:
    """As it comes out of a bound call."""
    if isinstance(value, list):
        return [wrapped(x) for x in value]
    return ScriptObject(value) if type(value).__name__ in BOUND else value


def unwrapped(value: Any) -> Any:
    """As it gets into one."""
    return value._ScriptObject__held if isinstance(value, ScriptObject) else value


class Generator:
    def __init__(self, shape: list[int], dtype: torch.dtype, fill: Any) -> None:
        self.shape, self.dtype, self.fill = list(shape), dtype, fill
        self.device = torch.device("cpu")

    def draw(self, rows: int | None = None) -> torch.Tensor:
        shape = self.shape if rows is None else [rows, *self.shape[1:]]
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.fill(values)
        return values


class Generators:
    """``torch.classes.recis.Generator``: those that the tests draw from."""

    @staticmethod
    def make_constant_generator(
        shape: list[int], dtype: torch.dtype, value: float, /
    ) -> ScriptObject:
        def fill(values: torch.Tensor) -> None:
            if values.dtype in (torch.float16, torch.bfloat16):
                raise NotImplementedError(f"ConstantGenerator not implemented for {values.dtype}")
            values.fill_(torch.tensor(value, dtype=torch.float32))  # init_val_ is a float

        return ScriptObject(Generator(shape, dtype, fill))

    @staticmethod
    def make_uniform_generator(
        shape: list[int], dtype: torch.dtype, low: float, high: float, generator: Any, /
    ) -> ScriptObject:
        return ScriptObject(
            Generator(shape, dtype, lambda values: values.uniform_(low, high, generator=generator))
        )

    @staticmethod
    def generate(generator: ScriptObject, /) -> torch.Tensor:
        return unwrapped(generator).draw()


class ChildrenInfo:
    def __init__(self, coalesce: bool, children: list[str]) -> None:
        self._coalesce, self._children = coalesce, list(children)

    def children(self) -> list[str]:
        return self._children

    def child_index(self, child: str) -> int:
        return self._children.index(child) if child in self._children else 0

    def has_child(self, child: str) -> bool:
        return child in self._children

    def child_at(self, index: int) -> str:
        return self._children[index]

    def is_coalesce(self) -> bool:
        return self._coalesce

    def index_bits_num(self, *args: Any) -> int:
        raise RuntimeError(f"expected at most 0 argument(s) but received {1 + len(args)}")

    id_bits_num = index_mask = id_mask = max_children_num = index_bits_num

    def encode_id(self, *args: Any) -> int:
        raise RuntimeError(f"expected int, or at most 2 argument(s), received {1 + len(args)}")


class Slot:
    def __init__(
        self, name: str, block_size: int, dtype: torch.dtype, row: list[int], generator: Generator
    ) -> None:
        self._name, self._block_size, self._dtype = name, block_size, dtype
        self._row, self._generator = row, generator
        self._blocks: list[torch.Tensor] = []

    def block_size(self) -> int:
        return self._block_size

    def name(self) -> str:
        return self._name

    def flat_size(self) -> int:
        size = 1
        for n in self._row:
            size *= n
        return size

    def value(self) -> torch.Tensor:
        if self._blocks:
            return torch.cat(self._blocks)
        return torch.empty([0, *self._row], dtype=self._dtype, device=self._generator.device)

    def values(self) -> list[torch.Tensor]:
        return list(self._blocks)

    def grow(self) -> None:
        self._blocks.append(self._generator.draw())

    def put(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        self._require_memory(rows)
        values = values.expand(rows.numel(), *values.shape[1:])
        for row, value in zip(rows.tolist(), values, strict=True):
            self._blocks[row // self._block_size][row % self._block_size] = value

    def get(self, rows: torch.Tensor) -> torch.Tensor:
        self._require_memory(rows[rows != -1])
        found = torch.zeros(
            [rows.numel(), *self._row], dtype=self._dtype, device=self._generator.device
        )
        for i, row in enumerate(rows.tolist()):
            if row != -1:
                found[i] = self._blocks[row // self._block_size][row % self._block_size]
        return found

    def _require_memory(self, rows: torch.Tensor) -> None:
        if self._dtype is torch.bfloat16 and self._generator.device.type == "cpu":
            raise NotImplementedError("block ops not implemented for 'BFloat16'")
        if (
            rows.numel()
            and not 0 <= rows.min() <= rows.max() < len(self._blocks) * self._block_size
        ):
            raise IndexError(f"slot {self._name}: C++ goes beyond its blocks here")


class SlotGroup:
    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size, self._device = block_size, device
        self._count = 0
        self._slots: list[Slot] = []
        self._index: dict[str, int] = {}

    def slot_by_name(self, name: str) -> Slot:
        if name not in self._index:
            raise RuntimeError("Argument passed to at() was not in the map.")
        return self._slots[self._index[name]]

    def slot_by_index(self, index: int) -> Slot:
        if not 0 <= index < len(self._slots):
            raise RuntimeError("vector::_M_range_check")
        return self._slots[index]

    slot_index = slot_by_index

    def slots(self) -> list[Slot]:
        return list(self._slots)

    def append(self, name: str, dtype: torch.dtype, row: list[int], generator: Generator) -> None:
        generator.device = self._device
        self._slots.append(Slot(name, self._block_size, dtype, row, generator))
        self._index[name] = len(self._slots) - 1

    def grow(self, ids: int) -> None:
        while self._count < (ids + self._block_size) // self._block_size:
            for slot in self._slots:
                slot.grow()
            self._count += 1


class HashtableImpl:
    def __init__(
        self,
        block_size: int,
        row: list[int],
        dtype: torch.dtype,
        device: torch.device,
        coalesce: bool,
        children: list[str],
        generator: Generator,
    ) -> None:
        self._group = SlotGroup(block_size, device)
        self._group.append("embedding", dtype, list(row), generator)
        self._children = ChildrenInfo(coalesce, children)
        self._dtype, self._device = dtype, device
        self._rows: dict[int, int] = {}
        self._free: list[int] = []
        self._numbered = 0
        self._grads: list[tuple[torch.Tensor, torch.Tensor]] = []

    # gradients

    def accept_grad(self, index: torch.Tensor, grad: torch.Tensor) -> None:
        if index.dtype is not torch.int64 or grad.dtype is not self._dtype:
            raise RuntimeError("Expected grad.scalar_type() == slot_group_->EmbSlot()->Dtype()")
        self._grads.append((index, grad))

    def grad(self, accumulate_steps: int) -> torch.Tensor:
        index = torch.cat([index for index, _ in self._grads])
        values = torch.cat([grad for _, grad in self._grads])
        unique, inverse = torch._unique(index, sorted=False, return_inverse=True)
        indices = index
        if index.numel() != unique.numel():
            indices = inverse
            values = torch.zeros_like(values).index_add_(0, inverse, values)  # of N rows, not U
        size = int(unique.max()) + 1 if unique.numel() else 0
        return torch.sparse_coo_tensor(
            indices.view(1, -1),
            values / accumulate_steps,
            (size, *values.shape[1:]),
            check_invariants=False,
        ).detach_()

    def clear_grad(self) -> None:
        self._grads.clear()

    # rows

    def embedding_lookup(
        self, ids: torch.Tensor, readonly: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _require_long(ids)
        if readonly:
            found = [self._rows.get(i, -1) for i in ids.tolist()]
            rows = torch.tensor(found, dtype=torch.int64, device=self._device)
        else:
            rows = self._find_or_insert(ids)
        self._group.grow(self._numbered)
        return rows, self._group.slot_by_name("embedding").get(rows)

    def _find_or_insert(self, ids: torch.Tensor) -> torch.Tensor:
        _require_long(ids)
        new = [i for i in ids.tolist() if i not in self._rows]
        for i, row in zip(new, self._generate(len(new)), strict=True):
            self._rows.setdefault(i, row)
        rows = [self._rows[i] for i in ids.tolist()]
        return torch.tensor(rows, dtype=torch.int64, device=self._device)

    def _generate(self, count: int) -> list[int]:
        at = [len(self._free) - count + i for i in range(count)]
        rows = [self._free[i] if i >= 0 else self._numbered - (i + 1) for i in at]
        self._numbered += max(count - len(self._free), 0)
        del self._free[max(len(self._free) - count, 0) :]
        return rows

    def insert(self, ids: torch.Tensor, embedding: torch.Tensor) -> None:
        if embedding.dtype is not self._dtype or ids.shape[0] != embedding.shape[0]:
            raise RuntimeError("embeding type must be")
        rows = self._find_or_insert(ids)
        self._group.grow(self._numbered)
        self._group.slot_by_name("embedding").put(rows, embedding)

    def delete(self, ids: torch.Tensor, index: torch.Tensor, preserve_slot: str) -> None:
        if not ids.numel():
            return
        for i in ids.tolist():
            self._rows.pop(i, None)
        self._free += index.tolist()
        for slot in self._group.slots():
            if slot.name() != preserve_slot:
                slot.put(index, slot._generator.draw(ids.numel()))

    def clear(self) -> None:
        self._grads.clear()
        self.clear_id()
        for slot in self._group.slots():
            slot._blocks.clear()

    def clear_id(self) -> None:
        self._rows.clear()
        self._free.clear()
        self._numbered = 0

    def ids(self) -> torch.Tensor:
        return torch.tensor(list(self._rows), dtype=torch.int64, device=self._device)

    def ids_map(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = list(self._rows.values())
        return self.ids(), torch.tensor(rows, dtype=torch.int64, device=self._device)

    # slots

    def slot_group(self) -> SlotGroup:
        return self._group

    def children_info(self) -> ChildrenInfo:
        return self._children

    def append_filter_slot(
        self, name: str, dtype: torch.dtype, slot_dim: int, generator: Generator
    ) -> None:
        if not (isinstance(name, str) and isinstance(dtype, torch.dtype)):
            raise RuntimeError("append_filter_slot() Expected a value of another type")
        if type(slot_dim) is not int or not isinstance(generator, Generator):
            raise RuntimeError("append_filter_slot() Expected a value of another type")
        self._group.append(name, dtype, [slot_dim], generator)

    def append_step_filter_slot(self, name: str, init_step: int) -> None:
        shape = [self._group._block_size, 1]
        generator = Generator(shape, torch.int64, lambda values: values.fill_(int(init_step)))
        self._group.append(name, torch.int64, [1], generator)

    def update_slot(self, name: str, index: torch.Tensor, value: torch.Tensor) -> None:
        self._group.slot_by_name(name).put(index, value)

    def get_slot(self, name: str) -> Slot:
        return self._group.slot_by_name(name)


def _require_long(ids: torch.Tensor) -> None:
    if ids.dtype is not torch.int64:
        raise RuntimeError(f"expected scalar type Long but found {ids.dtype}")


def make_hashtable(
    block_size: int,
    embedding_shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
    coalesce: bool,
    children: list[str],
    generator: ScriptObject,
    slice_begin: int,
    slice_end: int,
    slice_size: int,
    /,
) -> ScriptObject:
    """``torch.ops.recis.make_hashtable``."""
    return ScriptObject(
        HashtableImpl(
            block_size, embedding_shape, dtype, device, coalesce, children, unwrapped(generator)
        )
    )


def install(monkeypatch: Any) -> None:
    """Have ``torch.classes.recis`` and ``torch.ops.recis``, as ``import recis`` does."""
    monkeypatch.setattr(
        torch.classes, "recis", types.SimpleNamespace(Generator=Generators), raising=False
    )
    monkeypatch.setattr(
        torch.ops, "recis", types.SimpleNamespace(make_hashtable=make_hashtable), raising=False
    )


class HashTable(torch.nn.Module):
    """RecIS's module as far as gradients go: one lookup is one ``accept_grad`` of distinct rows.

    RecIS's own moves rows and gradients to "cuda" on the way, for tables on the CPU too.
    """

    def __init__(self, impl: Any, name: str) -> None:
        super().__init__()
        self._hashtable_impl = impl
        self._name = name
        self._backward_holder = torch.zeros(1, requires_grad=True)

    def forward(self, ids: torch.Tensor, readonly: bool = False) -> torch.Tensor:
        ids, inverse = ids.unique(return_inverse=True)
        return _Lookup.apply(ids, self._hashtable_impl, self._backward_holder, readonly)[inverse]


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, impl, holder, readonly):
        ctx.rows, embedding = impl.embedding_lookup(ids.detach(), readonly)
        ctx.impl = impl
        return embedding

    @staticmethod
    def backward(ctx, grad):
        ctx.impl.accept_grad(ctx.rows, grad)
        return None, None, None, None
