"""The emulator itself finds each fault that is planted here, and none where there is none.

That it computes rightly is tested in ``test_builtins.py``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import emulator
from emulator import interop
from emulator.testing import DEVICE, SEEDS, descriptor, found, function, ints, kernel, line_of

pytestmark = pytest.mark.emulated


# Out of bounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("shift", "thread", "where"),
    [
        (1, 31, "4 bytes past the end of an allocation of 128 bytes"),
        (-1, 0, "4 bytes before the start of an allocation of 128 bytes"),
    ],
)
def test_overrun_by_one_element(seed, shift, thread, where):
    x = torch.zeros(32)
    with emulator.using(seed=seed):
        kernel("planted_faults.cu", "write_shifted")(32, x, 0)
        assert x.tolist() == [1.0] * 32
        text = found("write_shifted", 32, x, shift)
    assert text.startswith("out of bounds: kernel write_shifted, block (0, 0, 0), thread")
    assert f"thread ({thread}, 0, 0): write of 4 bytes, {where}" in text
    assert text.endswith(line_of("x[static_cast<int>(threadIdx.x) + shift] = 1.0f;"))


@pytest.mark.parametrize("n", [1, 127, 128, 129, 256, 512])  # at and around the arena's rounding
def test_overrun_of_every_size(n):
    x, y = torch.zeros(n, dtype=torch.int16), ints(n)
    kernel("planted_faults.cu", "read_shifted")(n, x, y, 0)
    assert "read of 2 bytes, 2 bytes past the end" in found("read_shifted", n, x, y, 1)
    assert "2 bytes before the start" in found("read_shifted", n, x, y, -1)


def test_memory_that_no_tensor_has():
    x, y = torch.zeros(4, dtype=torch.int16), ints(1)
    assert "outside every allocation" in found("read_shifted", 1, x, y, 2**30)


def test_copies_are_checked_too():
    x, y = torch.zeros(8), torch.ones(9)
    kernel("planted_faults.cu", "copy_out_of_bounds")(32, x, y, 8)
    text = found("copy_out_of_bounds", 32, x, y, 9)
    assert "thread (5, 0, 0): write of 36 bytes, 4 bytes past the end" in text


def test_tensors_reached_by_address_and_use_after_free():
    x = torch.zeros(16)
    to = descriptor(x.data_ptr(), 16)
    kernel("planted_faults.cu", "write_at_address")(32, to)
    assert x.tolist() == [2.0] * 16
    text = found("write_at_address", 32, descriptor(x.data_ptr(), 17))
    assert "thread (16, 0, 0): write of 4 bytes, 4 bytes past the end" in text
    del x
    assert "that has been freed" in found("write_at_address", 32, to)


def test_null_pointers():
    assert "at 0x0, outside every" in found("write_at_address", 1, descriptor(0, 1))


def test_memory_from_before_is_known_once_registered():
    runtime = emulator._runtime.library()
    runtime.emulator_remove_allocator()  # as if active() had not begun
    x = torch.zeros(64)
    to = descriptor(x.data_ptr(), 32)
    assert "outside every allocation" in found("write_at_address", 32, to)
    emulator.register(x)
    kernel("planted_faults.cu", "write_at_address")(32, to)
    assert x.tolist() == [2.0] * 32 + [0.0] * 32
    # array_of registers too: a view's whole storage, and no byte more.
    y = torch.zeros(64)
    assert "4 bytes past the end" in found("write_shifted", 32, y[16:], 17)


def test_fresh_memory_is_poisoned():
    assert torch.empty(5).isnan().all()
    assert torch.empty(5, dtype=torch.int64).tolist() == [-1] * 5


def test_numpy_arrays_are_no_kernel_memory():
    array = np.zeros(32, np.float32)
    with pytest.raises(TypeError, match="argument 0 is an array in the host's memory"):
        kernel("planted_faults.cu", "write_shifted")(32, array, 0)
    assert "outside every" in found("write_at_address", 1, descriptor(array.ctypes.data, 1))


@pytest.mark.parametrize("shift", [1, 32, -1])
def test_overrun_of_a_shared_array_into_its_neighbour(shift):
    kernel("planted_faults.cu", "index_shared")(32, ints(32), 0)
    assert "of an array of type 'int [32]'" in found("index_shared", 32, ints(32), shift)


# Alignment ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_misaligned_vectors(shift):
    x, y = torch.arange(136.0), torch.zeros(32)
    kernel("planted_faults.cu", "load_vector")(32, x, y, 4)
    assert y.tolist() == [16.0 * i + 22 for i in range(32)]
    text = found("load_vector", 32, x, y, shift)
    assert text.startswith("misaligned access: ")
    assert f"float4' at an address that is no multiple of 16 bytes but {4 * shift} bytes" in text
    assert text.endswith(line_of("const float4 v = "))
    kernel("planted_faults.cu", "store_vector")(32, x, 2)
    if shift != 2:
        assert "multiple of 8 bytes but 4" in found("store_vector", 32, x, shift)


def test_misaligned_atomics():
    x = torch.zeros(16, dtype=torch.int8)
    kernel("planted_faults.cu", "atomic_unaligned")(1, x, 4)
    assert "misaligned access" in found("atomic_unaligned", 1, x, 2)


# Races --------------------------------------------------------------------------------------------

RACES = [
    # kernel, grid, block, size of y, what the text says
    ("reverse_block", 1, 128, 128, "of shared variable tile"),
    ("reuse_tile", 1, 64, 64, "in shared memory"),
    ("reverse_warp", 1, 32, 32, "of shared variable tile"),
    ("exchange_halves", 1, 32, 32, "of shared variable tile"),
    ("write_from_each_block", 2, 32, 2, "write at byte 0 of an allocation of 8 bytes and, unorder"),
    ("read_what_other_block_writes", 2, 32, 64, "of another block"),
    ("count_by_all", 1, 64, 1, "at byte 0 of an allocation of 4 bytes"),
    ("peek_at_counter", 1, 64, 1, "at byte 0 of an allocation of 4 bytes"),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "grid", "block", "n", "says"), RACES, ids=[r[0] for r in RACES])
def test_races(seed, name, grid, block, n, says):
    with emulator.using(seed=seed):
        kernel("planted_faults.cu", name)(block, ints(n), False, grid=(grid,))
        text = found(name, block, ints(n), True, grid=(grid,))
    # A thread may read shared memory even before another one writes it.
    assert text.startswith(("race: ", "uninitialised shared memory: "))
    if text.startswith("race"):
        assert says in text
        assert "by thread (" in text
        assert text.count("[planted_faults.cu:") == 2  # where each of the two is


def test_a_race_names_both_threads():
    text = found("write_from_each_block", 32, ints(2), True, grid=(2,))
    assert "thread (3, 0, 0): write at byte 0 of an allocation of 8 bytes and, unordered, " in text
    assert "a write by thread (3, 0, 0) of another block" in text
    assert text.count(line_of("if (threadIdx.x == 3) y[broken")) == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbouring_bytes_do_not_race(seed):
    args = (torch.zeros(32, dtype=torch.uint8), torch.zeros(32, dtype=torch.int16))
    with emulator.using(seed=seed):
        kernel("planted_faults.cu", "write_bytes")(32, *args, False)
        assert "race" in found("write_bytes", 32, *args, True)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("op", range(7))
def test_of_the_warp_operations_only_syncwarp_orders_memory(seed, op):
    y = ints(64)
    with emulator.using(seed=seed):
        kernel("planted_faults.cu", "meet_by_warp_op")(32, y, op, False)
        text = found("meet_by_warp_op", 32, ints(64), op, True)
    assert y[:32].tolist() == [(t + 1) % 32 for t in range(32)]
    assert text.startswith("race: ")
    assert "of shared variable tile" in text
    assert line_of("tile[t] = t;") in text
    assert text.count(line_of("tile[(t + 1) % 32]")) == 1


def test_launches_are_ordered():
    y = ints(2)
    for _ in range(3):
        kernel("planted_faults.cu", "write_from_each_block")(32, y, False, grid=(2,))
    assert y.tolist() == [7, 7]


# Barriers and warp operations ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_barriers_that_some_threads_miss(seed, checked):
    with emulator.using(seed=seed):
        kernel("planted_faults.cu", "meet_all")(64, ints(64), False)
        text = found("meet_all", 64, ints(64), True)
        assert text.startswith("barrier divergence: ")
        assert "(0, 0, 0) and 47 more (the last is (47, 0, 0)) waits at __syncthreads [" in text
        assert "thread (48, 0, 0) and 15 more (the last is (63, 0, 0)) has exited" in text
        kernel("planted_faults.cu", "barrier_in_branch")(64, ints(64), False)
        text = found("barrier_in_branch", 64, ints(64), True)
    assert "__syncthreads_or" in text
    assert "waits at __syncthreads" in text


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "call", "lines"),
    [
        ("barrier_in_each_branch", "__syncthreads", ["// the upper", "// the lower"]),
        ("count_in_each_branch", "__syncthreads_count", ["_count(1)", "_count(2)"]),
    ],
)
def test_threads_that_come_to_different_barriers(seed, name, call, lines, checked):
    with emulator.using(seed=seed):
        kernel("planted_faults.cu", name)(64, ints(64), False)
        text = found(name, 64, ints(64), True)
    assert text.startswith("barrier divergence: ")
    assert f"calls {call} while thread (" in text
    assert f"waits at {call}" in text
    if checked:  # otherwise the compiler may make one call of the two
        assert all(line_of(line) in text for line in lines)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_that_the_compiler_may_copy(seed, checked):
    y = ints(64)
    with emulator.using(seed=seed):
        kernel("planted_faults.cu", "barrier_between_branches")(64, y, True)
    assert y.tolist() == [0, 14] * 32


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffles_that_a_lane_misses(seed, checked):
    with emulator.using(seed=seed):
        kernel("planted_faults.cu", "shuffle_all")(32, ints(32), False)
        text = found("shuffle_all", 32, ints(32), True)
    assert text.startswith("warp divergence: ")
    assert "and 30 more (the last is (31, 0, 0)) waits at __shfl_xor_sync with mask 0xffff" in text
    assert "thread (9, 0, 0) has exited" in text


def test_masks_that_name_lanes_the_block_lacks():
    kernel("planted_faults.cu", "vote_by_mask")(20, ints(20), np.uint32(0xFFFFF))
    assert "warp divergence" in found("vote_by_mask", 20, ints(20), np.uint32(0xFFFFFFFF))


def test_a_lane_that_its_own_mask_does_not_name():
    text = found("vote_by_mask", 32, ints(32), np.uint32(0xFFFFFFFE))
    assert "thread (0, 0, 0): __any_sync: mask 0xfffffffe does not name its own lane 0" in text


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vote_with_two_masks", "with mask 0xffff"),
        ("meet_in_two_ways", " while thread ("),
        ("shuffle_from_stranger", "__shfl_sync reads lane 20, which its mask 0x0000ffff does not"),
    ],
)
def test_lanes_that_disagree(seed, name, says):
    with emulator.using(seed=seed):
        kernel("planted_faults.cu", name)(32, ints(32), False)
        text = found(name, 32, ints(32), True)
    assert text.startswith("warp divergence: ")
    assert says in text


# The rest -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_memory_that_nobody_wrote(seed):
    with emulator.using(seed=seed):
        kernel("planted_faults.cu", "read_unwritten")(32, ints(64), False, grid=(1,))
        text = found("read_unwritten", 32, ints(32), True)
    assert text.startswith("uninitialised shared memory: ")
    assert "thread (17, 0, 0): read at byte 68 of shared variable tile, which no thread" in text


def test_shared_memory_starts_poisoned():
    y = ints(1)
    with emulator.using(checked=False):
        kernel("builtins.cu", "poisoned")(1, y)
    assert y.item() == np.uint32(0xA5A5A5A5).astype(np.int32)


@pytest.mark.parametrize("name", ["wait_for_flag", "take_lock"])
def test_waits_without_end(name, checked):
    kernel("planted_faults.cu", name)(4, ints(1), False)
    assert found(name, 4, ints(1), True).startswith("endless wait: ")


def test_a_wait_on_volatile_memory():
    kernel("planted_faults.cu", "wait_by_volatile")(4, ints(1), False)
    assert "thread (0, 0, 0)" in found("wait_by_volatile", 4, ints(1), True)


@pytest.mark.parametrize(
    ("which", "says"),
    [
        (1, "assertion: kernel"),
        (2, "assumption: kernel"),
        (3, "division by zero: kernel"),
        (4, "__isGlobal(tile) does not hold"),
        (5, "trap: kernel"),
    ],
)
def test_conditions(which, says):
    kernel("planted_faults.cu", "state_conditions")(32, ints(1), 0, 0)
    text = found("state_conditions", 32, ints(1), 0, which)
    assert says in text
    assert "thread (2, 0, 0)" in text


def test_a_launch_works_after_a_fault():
    x = torch.zeros(32)
    for _ in range(3):
        found("write_shifted", 32, x, 1)
        kernel("planted_faults.cu", "write_shifted")(32, x, 0)
    assert x.sum() == 32


# Launches -----------------------------------------------------------------------------------------

SETTINGS = np.dtype(
    [("lr", np.float64), ("eps", np.float32), ("table", np.int32), ("rows", np.uint64)], align=True
)


def test_arguments_of_every_kind(checked):
    y, rows = torch.zeros(10, dtype=torch.float64), torch.tensor([1.0, 2.5])
    by_value = np.array((0.125, 0.5, -3, rows.data_ptr()), SETTINGS)
    args = [y, -7, np.int64(2**40), np.float32(1.5), 2.25, True, np.uint16(65535), by_value]
    kernel("builtins.cu", "take_everything")(1, *args)
    assert y.tolist() == [-7, 2**40, 1.5, 2.25, 1, 65535, 0.125, 0.5, -3, 2.5]


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, np.uint64(4096), "argument 0 must be a pointer of 8 bytes, got an integer of 8"),
        (0, None, "argument 0 must be an array or a number, got None"),
        (1, np.int64(1), "argument 1 must be an integer of 4 bytes, got an integer of 8"),
        (1, np.float32(1), "argument 1 must be an integer of 4 bytes, got a floating-point number"),
        (2, torch.zeros(1), "argument 2 must be an integer of 8 bytes, got a pointer of 8"),
        (3, 1.5, "argument 3 must be a floating-point number of 4 bytes, got .* of 8"),
        (7, np.array((1, 2), "i4,i4"), "argument 7 must be a struct of 24 bytes, got .* of 8"),
    ],
)
def test_arguments_that_do_not_fit(position, wrong, message):
    y = torch.zeros(10, dtype=torch.float64)
    args = [y, 1, np.int64(1), np.float32(1), 1.0, True, np.uint16(1), np.zeros((), SETTINGS)]
    args[position] = wrong
    with pytest.raises(TypeError, match=f"take_everything: {message}"):
        kernel("builtins.cu", "take_everything")(1, *args)
    with pytest.raises(TypeError, match="takes 8 arguments, got 7"):
        kernel("builtins.cu", "take_everything")(1, *args[:-1])


def test_grids_and_blocks_that_cannot_be():
    launch = kernel("planted_faults.cu", "write_shifted")
    x = torch.zeros(2048)
    for grid, block in [((0,), 32), ((1,), 0), ((1,), 1025), ((1, 70000), 32), ((1,), (1, 1, 65))]:
        with pytest.raises(ValueError, match="must lie between"):
            launch(block, x, 0, grid=grid)
    with pytest.raises(ValueError, match="a block of 2048 threads"):
        launch((512, 4), x, 0)
    with pytest.raises(ValueError, match="__launch_bounds__ allow 64"):
        kernel("builtins.cu", "reverse_in_dynamic_shared")(65, ints(65))


def test_dynamic_shared_memory():
    y = torch.arange(64, dtype=torch.int32)
    launch = kernel("builtins.cu", "reverse_in_dynamic_shared")
    launch(64, y, shared_mem=256)
    assert y.tolist() == list(range(64))[::-1]
    with pytest.raises(emulator.Fault, match="at byte 252 of the 252 bytes of dynamic shared"):
        launch(64, y, shared_mem=252)


def test_launches_must_name_the_stream_of_the_device():
    raw = function("planted_faults.cu", "write_shifted")
    x = torch.zeros(32)
    args = (interop.array_of(x), np.int32(0))
    other = torch.device("cpu", 1)
    strangers = [object(), interop.stream_of(other), interop.Stream(DEVICE), 0]
    with interop.on_device(DEVICE):
        with pytest.raises(RuntimeError, match="write_shifted is launched without a stream"):
            raw((1,), (32,), args)
        for stream in strangers:
            with pytest.raises(RuntimeError, match=r"not what stream_of\(cpu\) returned"):
                raw((1,), (32,), args, stream=stream)
        assert emulator.launches == []
        assert x.sum() == 0
        raw((1,), (32,), args, stream=interop.stream_of(DEVICE))
    assert x.sum() == 32


def test_launches_must_lie_within_on_device():
    raw = function("planted_faults.cu", "write_shifted")
    args, stream = (interop.array_of(torch.zeros(32)), np.int32(0)), interop.stream_of(DEVICE)
    other = torch.device("cpu", 1)

    def refused(message):
        with pytest.raises(RuntimeError, match=message):
            raw((1,), (32,), args, stream=stream)

    refused(r"write_shifted is launched outside on_device")
    with interop.on_device(DEVICE):
        with interop.on_device(other):
            refused(r"within on_device\(cpu:1\), and its stream is not what stream_of\(cpu:1\)")
        raw((1,), (32,), args, stream=stream)
        with pytest.raises(ZeroDivisionError), interop.on_device(other):
            raise ZeroDivisionError
        raw((1,), (32,), args, stream=stream)
        with emulator.capture():
            raw((1,), (32,), args, stream=stream)
    refused("outside on_device")
    with emulator.capture():
        refused("outside on_device")


def test_launches_are_listed():
    kernel("builtins.cu", "indices")((5, 3), ints(60), grid=(2, 2))
    assert emulator.launches == [("indices", (2, 2, 1), (5, 3, 1))]


def test_names_that_no_kernel_has():
    with pytest.raises(AttributeError, match="no kernel 'vote_twice'"):
        kernel("builtins.cu", "vote_twice")
    code = "namespace a {} __global__ void mangled(int* y) { y[0] = 1; }"
    with pytest.raises(AttributeError, match="no kernel 'mangled' with a C name"):
        interop.RawModule(code=code).get_function("mangled")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("#include <vector>", "vector: No such file"),
        ('extern "C" __global__ void f(int* y) { y[0] = __activemask(); }', "name the lanes"),
        ("__device__ int counter;", "counter is a __device__ variable"),
    ],
)
def test_sources_that_are_refused(code, message):
    with pytest.raises(RuntimeError, match=message):
        interop.RawModule(code=code).get_function("f")


# Capture, copies, the engine ----------------------------------------------------------------------


def test_capture_and_replay():
    launch = kernel("planted_faults.cu", "write_at_address")
    x, total = torch.zeros(8), torch.zeros(())
    device = torch.device("cpu")
    with emulator.capture() as graph:
        assert interop.is_capturing(device)
        x.zero_()
        count = descriptor(x.data_ptr(), 3)
        launch(32, count)
        count["n"] = 8  # what is passed by value is frozen
        doubled = x * 2
        total.add_(doubled.sum())
        order, _ = torch.sort(doubled, descending=True)
        tail = order.view(2, 4)[0]
        for forbidden in (
            lambda: interop.HostCopy(x),
            lambda: interop.to_device(np.zeros(1), device),
            total.item,
        ):
            with pytest.raises(RuntimeError, match="capture"):
                forbidden()
    assert not interop.is_capturing(device)
    assert x.tolist() == [0.0] * 8  # nothing has run yet
    assert total.item() == 0
    for replays in (1, 2):
        x.fill_(5)
        graph.replay()
        assert x.tolist() == [2.0] * 3 + [0.0] * 5
        assert total.item() == 12.0 * replays
        assert doubled.tolist() == [4.0] * 3 + [0.0] * 5
        assert tail.tolist() == [4.0, 4.0, 4.0, 0.0]


def test_host_copies_are_snapshots():
    x = torch.arange(3)
    copy = interop.HostCopy(x)
    copy.send()
    x.zero_()
    assert copy.ready()
    with emulator.using(copies_complete=False):
        assert not copy.ready()
        assert copy.values().tolist() == [0, 1, 2]


def test_arrays_share_memory():
    device = torch.device("cpu")
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool):
        tensor = torch.zeros(4, dtype=dtype, requires_grad=dtype.is_floating_point)
        assert interop.array_of(tensor).ctypes.data == tensor.data_ptr()
    values = np.arange(3)
    tensor = interop.to_device(values, device)
    values[0] = 9
    assert tensor.tolist() == [0, 1, 2]
    assert interop.stream_of(device).ptr == 0
    with interop.on_device(device):
        assert not interop.is_capturing(device)
    with emulator.using(capturing=True):
        assert interop.is_capturing(device)


def test_the_engine_is_loaded_beside_the_real_one(tmp_path):
    # In a process of its own: the name "emulated" belongs to the real engine here.
    (tmp_path / "__init__.py").write_text("from .part import which\n")
    (tmp_path / "part.py").write_text(
        "from . import _interop\n"
        "from ... import _types\n"
        "def which(): return _interop.__name__, _types.__name__\n"
    )
    (tmp_path / "_interop.py").write_text("raise ImportError('the real one')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import pathlib, emulator\n"
        "from cupy_sparse_adamw import functional\n"
        f"engine = emulator.load_engine(pathlib.Path({str(tmp_path)!r}))\n"
        "assert functional.load_engine('emulated') is engine\n"
        "print(engine.__name__, *engine.which())\n"
        "emulator.unload_engine()\n"
        "assert 'emulated' not in functional._MODULES\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "cupy_sparse_adamw.engines.emulated",
        "emulator.interop",
        "cupy_sparse_adamw._types",
    ]
