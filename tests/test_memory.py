"""Memory that the package allocates for rows, and for copies of them, asks for huge pages."""

from __future__ import annotations

import copy
import mmap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cupy_sparse_adamw import HashTable, SparseAdamW, _memory

CPU = torch.device("cpu")
SMAPS = Path("/proc/self/smaps")
DIM = 8
#: Above 32 MiB, for which malloc takes fresh pages: others may have been asked for before.
ROWS = (1 << 20) + 1024

needs_huge_pages = pytest.mark.skipif(
    not (hasattr(mmap, "MADV_HUGEPAGE") and Path("/sys/kernel/mm/transparent_hugepage").exists()),
    reason="huge pages on demand are a matter of Linux kernels that are built with them",
)


def of_its_mapping(tensor: torch.Tensor, wanted: str) -> list[str]:
    """What the kernel says under a key of the mapping that the tensor's middle is in."""
    address, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in SMAPS.read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            begin, end = (int(x, 16) for x in key.split("-"))
            inside = begin <= address < end
        elif inside and key == wanted:
            return values
    raise AssertionError("the tensor is in no mapping of this process")


def asks_for_huge_pages(tensor: torch.Tensor) -> bool:
    """Whether the kernel was told so of the tensor's mapping.

    Whether it has huge pages to give is another matter, and not ours.
    """
    return "hg" in of_its_mapping(tensor, "VmFlags:")


def embedding_state() -> tuple[SparseAdamW, torch.nn.Parameter]:
    weight = torch.nn.Parameter(torch.zeros(ROWS, DIM))
    weight.grad = torch.sparse_coo_tensor(
        [[1, ROWS - 1]], torch.ones(2, DIM), (ROWS, DIM), check_invariants=True
    )
    optimizer = SparseAdamW({"table": weight})
    optimizer.step()
    return optimizer, weight


def moments_of(optimizer: SparseAdamW, key: object) -> list[torch.Tensor]:
    return [optimizer.state[key]["exp_avg"], optimizer.state[key]["exp_avg_sq"]]


def new_moments() -> list[torch.Tensor]:
    return moments_of(*embedding_state())


def loaded_moments() -> list[torch.Tensor]:
    optimizer, weight = embedding_state()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    moments = moments_of(optimizer, weight)
    assert torch.equal(moments[0], saved["state"]["table"]["exp_avg"])
    return moments


def slots_of_a_hash_table() -> list[torch.Tensor]:
    table = HashTable((DIM,))
    table.reserve(ROWS)
    optimizer = SparseAdamW({"table": table})
    table(torch.arange(5)).sum().backward()
    optimizer.step()
    slots = table.slot_group().slots()
    assert len(slots) == 3
    return [slot.value() for slot in slots]


def lookups() -> list[torch.Tensor]:
    """One of a table that rows are never behind in, and one of rows that are."""
    found = []
    for untouched in ("skip", "dense"):
        table = HashTable((DIM,))
        optimizer = SparseAdamW({"table": table}, untouched=untouched)
        for ids in ([0, 1], [1]):
            table(torch.tensor(ids)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(table(torch.zeros(ROWS, dtype=torch.int64)).detach())
    return found


@needs_huge_pages
@pytest.mark.parametrize("allocate", [new_moments, loaded_moments, slots_of_a_hash_table, lookups])
def test_large_tables_ask_for_huge_pages(allocate: Callable[[], list[torch.Tensor]]):
    for tensor in allocate():
        assert tensor.nbytes >= _memory.LARGE
        assert asks_for_huge_pages(tensor)


def huge_kilobytes(tensor: torch.Tensor) -> int:
    """Kilobytes of huge pages in the tensor's mapping."""
    return int(of_its_mapping(tensor, "AnonHugePages:")[0])


@needs_huge_pages
def test_the_weight_of_an_embedding_moves_to_huge_pages_and_stays_what_it_is():
    probe = torch.ones(ROWS, DIM)
    _memory.move_to_huge_pages(probe)
    _memory.wait_until_moved()
    if not huge_kilobytes(probe):
        pytest.skip("this system moves nothing to huge pages: Linux 6.1 does, if it has some free")
    weight = torch.nn.Parameter(torch.arange(ROWS * DIM, dtype=torch.float32).view(ROWS, DIM))
    before, address = weight.detach().clone(), weight.data_ptr()
    small = huge_kilobytes(weight)  # those of a neighbour
    weight.grad = torch.sparse_coo_tensor(
        [[1]], torch.ones(1, DIM), (ROWS, DIM), check_invariants=True
    )
    SparseAdamW({"table": weight}).step()
    _memory.wait_until_moved()
    assert huge_kilobytes(weight) - small > 0.8 * weight.nbytes / 1024
    assert weight.data_ptr() == address
    assert torch.equal(weight[2:], before[2:])


def test_a_weight_is_moved_once(monkeypatch):
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        _memory, "_madvise", lambda: lambda begin, size, advice: asked.append((begin, advice))
    )
    optimizer, weight = embedding_state()
    optimizer.step()
    _memory.wait_until_moved()
    first = weight.data_ptr() + -weight.data_ptr() % mmap.PAGESIZE
    assert asked.count((first, _memory._COLLAPSE)) == 1
    assert (first, _memory._HUGEPAGE) not in asked


def test_no_thread_to_be_had(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    _memory.move_to_huge_pages(torch.ones(ROWS, DIM))


@pytest.mark.parametrize(
    ("nbytes", "asked"), [(_memory.LARGE, True), (_memory.LARGE - DIM, False)], ids=["large", "not"]
)
def test_only_whole_pages_of_the_tensor_are_named(nbytes, asked, monkeypatch):
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(_memory, "_madvise", lambda: lambda *range_: calls.append(range_))
    tensor = _memory.empty((nbytes // DIM, DIM), torch.uint8, CPU)
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    assert len(calls) == asked
    for address, size, advice in calls:
        assert advice == _memory._HUGEPAGE
        assert address % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
        assert 0 <= address - begin < mmap.PAGESIZE
        assert 0 <= end - (address + size) < mmap.PAGESIZE


@pytest.mark.parametrize(
    "madvise", [None, lambda address, size, advice: -1], ids=["no call", "refused"]
)
def test_systems_without_huge_pages(madvise, monkeypatch):
    monkeypatch.setattr(_memory, "_madvise", lambda: madvise)
    tensor = _memory.empty((_memory.LARGE // 4, 1), torch.float32, CPU).zero_()
    assert (tensor.shape, tensor.dtype) == ((_memory.LARGE // 4, 1), torch.float32)
    assert not tensor.any()
