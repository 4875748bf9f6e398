"""What holds for every engine: one signature for each operation, zero copies, a clear choice."""

from __future__ import annotations

import copy
import inspect
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
import types
import weakref

import numpy as np
import pytest
import torch
from oracle import bits

from cupy_sparse_adamw import HashTable, NormalInitializer, functional
from cupy_sparse_adamw._slots import Slot

OPERATIONS = [
    "catch_up_",
    "coalesce",
    "copy_to_host",
    "delete_",
    "find",
    "find_or_insert_",
    "gather",
    "gather_current",
    "init_rows_",
    "insert_",
    "is_capturing",
    "pairs_moments",
    "prepare_extend_rules",
    "prepare_sparse_adamw",
    "rehash_",
    "scatter_",
    "segment",
]
#: Those that work on the host whatever the device, so that only host engines have them.
ON_THE_HOST = {"prepare_extend_rules"}


def test_one_name_and_signature_everywhere(engine):
    module = functional.load_engine(engine)
    on_the_host = engine in ("reference", "cpu")
    assert module.__all__ == [o for o in OPERATIONS if on_the_host or o not in ON_THE_HOST]
    for operation in module.__all__:
        names = [
            list(inspect.signature(getattr(place, operation)).parameters)
            for place in (functional, module)
        ]
        assert names[0] == names[1]


def test_tensors_reach_numpy_without_copies():
    from cupy_sparse_adamw.engines.cpu._interop import array_of

    for dtype in (torch.int64, torch.float32, torch.float64, torch.float16):
        tensor = torch.arange(12).to(dtype).view(3, 4)
        array = array_of(tensor)
        assert array.ctypes.data == tensor.data_ptr()
        array[1, 2] = 77
        assert tensor[1, 2] == 77
        back = torch.from_dlpack(array)
        assert back.data_ptr() == tensor.data_ptr()


def test_kernels_write_where_torch_reads():
    """A slot's blocks are the tensors themselves: the addresses that kernels get are theirs."""
    weight = torch.zeros(6, 2)
    slot = Slot.over("embedding", weight)
    assert slot.addresses().tolist() == [weight.data_ptr()]
    for rows in (6, 7, 40):
        slot.reserve(rows)  # grows
        for each in (slot, copy.deepcopy(slot)):
            assert each.addresses_at() == each.addresses().ctypes.data
            assert each.addresses().tolist() == [block.data_ptr() for block in each.values()]
    with functional.use_engine("cpu"):
        functional.scatter_(slot, torch.tensor([4]), torch.tensor([[1.0, 2.0]]))
    assert weight[4].tolist() == [1.0, 2.0]


def test_the_block_of_a_row():
    """Beside a division, for every block size, up to where rounding might show."""
    from cupy_sparse_adamw.engines.cpu._compile import block_of, reciprocal_of

    draw = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 7, 10, 1000, 1024, 4095, 2**20 + 7, 2**31 - 1, 2**31):
        edges = [k * size + d for k in (0, 1, 2, 2**33 // size - 1) for d in (-1, 0, 1)]
        rows = [*edges, 2**33 - 1, *torch.randint(2**33, (200,), generator=draw).tolist()]
        for row in (row for row in rows if row >= 0):
            assert block_of(row, reciprocal_of(size)) == row // size


def test_an_unknown_engine():
    with (
        pytest.raises(ValueError, match=r"must be one of reference, cpu, cuda.* got 'gpu'"),
        functional.use_engine("gpu"),
    ):
        pass


WITHOUT_CUPY = """
import sys
sys.modules["cupy"] = None
import torch
from cupy_sparse_adamw import HashTable
try:
    HashTable([4], device="cuda")
except RuntimeError as error:
    print(error)
"""


def test_without_cupy_a_cuda_table_says_what_to_install():
    command = [sys.executable, "-c", WITHOUT_CUPY]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text.startswith("the cuda engine cannot load: CuPy cannot be imported")
    assert "pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12" in text
    assert "keep tables on the CPU" in text


def test_a_chosen_engine_holds_for_the_block_only(monkeypatch):
    calls = []
    reference = functional.load_engine("reference")
    original = reference.find
    monkeypatch.setattr(reference, "find", lambda *args: calls.append(1) or original(*args))
    table = HashTable([2]).eval()
    table(torch.tensor([1]))
    assert not calls
    with functional.use_engine("reference"):
        table(torch.tensor([1]))
    assert calls == [1]
    table(torch.tensor([1]))
    assert calls == [1]


WITHOUT_NUMBA = """
import sys, warnings
sys.modules["numba"] = None
import torch
from cupy_sparse_adamw import HashTable, SparseAdamW, functional
try:
    functional.load_engine("cpu")
except RuntimeError as error:
    print("asked by name:", error)
table = HashTable([2])
optimizer = SparseAdamW({"table": table}, lr=1.0, weight_decay=0.0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        table(torch.tensor([5, 7])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
print("warned:", [str(w.message) for w in caught])
print(table.embeddings().flatten().tolist())
"""


def test_without_numba_the_automatic_choice_is_the_reference_and_says_so():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True, check=True
    )
    asked, warned, values = result.stdout.splitlines()
    assert "the cpu engine cannot load" in asked
    assert warned.count("Falling back to the reference implementation") == 1
    assert "pip install numba" in warned
    assert np.allclose(eval(values), [-2.0] * 4, atol=1e-5)


UNWRITABLE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from cupy_sparse_adamw import HashTable
    HashTable([2])(torch.tensor([3]))
print([str(w.message) for w in caught if "compiled kernels" in str(w.message)])
"""


def test_without_a_writable_cache_it_compiles_and_warns_once(tmp_path):
    """A file stands where each cache directory would be made, which stops even root."""
    package = pathlib.Path(functional.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, tmp_path / package.name, ignore=ignore)
    (tmp_path / package.name / "engines" / "cpu" / "__pycache__").write_text("")
    blocker = tmp_path / "file"
    blocker.write_text("")
    below = str(blocker / "below")
    places = ("NUMBA_CACHE_DIR", "HOME", "XDG_CACHE_HOME", "IPYTHONDIR")
    result = subprocess.run(
        [sys.executable, "-c", UNWRITABLE],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), **dict.fromkeys(places, below)},
    )
    assert result.stdout.count("compiled kernels cannot be kept on disk") == 1
    assert "set NUMBA_CACHE_DIR to a directory you can write" in result.stdout


@pytest.mark.parametrize(
    ("dtype", "by_bits"),
    [(torch.float16, False), (torch.float16, True), (torch.bfloat16, False)],
    ids=["fp16", "fp16 without F16C", "bf16"],
)
def test_16_bit_conversions_are_torchs(dtype, by_bits):
    """Every 16-bit number; every float32 at, next to and halfway between them; all exponents."""
    numba = pytest.importorskip("numba")
    from cupy_sparse_adamw.engines.cpu import _compile

    scope = _compile.VALUES

    @numba.njit
    def convert(narrow, num_narrow, tag, wide, back):
        for i in range(num_narrow):
            wide[i] = _compile.load(narrow, i, tag, scope)
        for i in range(wide.size):
            _compile.store(back, i, wide[i], tag, scope)

    @numba.njit
    def convert_by_bits(narrow, wide, back):
        for i in range(narrow.size):
            wide[i] = _compile._half_to_float(narrow[i])
        for i in range(wide.size):
            back[i] = _compile._float_to_half(wide[i])

    tag = type(_compile.TAGS[dtype])
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    exact = every.float()
    finite = exact[exact.isfinite()].sort().values
    halfway = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    points = torch.cat([exact, halfway])
    ends = [torch.nextafter(points, torch.full_like(points, e)) for e in (-torch.inf, torch.inf)]
    random = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).int().view(torch.float32)
    wide = torch.cat([points, *ends, random])
    expected = wide.to(dtype)

    narrow = every.view(torch.int16).numpy().view(tag)
    loaded, stored = wide.numpy().copy(), np.empty(wide.numel(), tag)
    if by_bits:
        convert_by_bits(narrow, loaded, stored)
    else:
        convert(narrow.ctypes.data, narrow.size, tag(0), loaded, stored.ctypes.data)
    stored = torch.from_numpy(stored.view(np.int16)).view(dtype)
    for ours, theirs in ((torch.from_numpy(loaded)[: 2**16], exact), (stored, expected)):
        assert torch.equal(ours.isnan(), theirs.isnan())
        number = ~theirs.isnan()
        assert torch.equal(bits(ours[number]), bits(theirs[number]))


def test_parallel_for_ends_only_when_all_parts_have(monkeypatch):
    """Parts write to memory that the caller frees: neither Ctrl-C nor an error may leave early."""
    from cupy_sparse_adamw.engines.cpu import _threads

    interrupts = []

    class Interrupted(queue.SimpleQueue):
        def get(self):
            if interrupts:
                raise interrupts.pop()
            return super().get()

    def part(number, begin, end, ended, helping, failing):
        if threading.current_thread() is threading.main_thread():
            assert helping.wait(60)
            if failing == "caller":
                raise ValueError("the caller's part fails")
        else:
            helping.set()
            time.sleep(0.3)
            if failing == "helper":
                raise ValueError("the helper's part fails")
        ended.append(number)
        return 10 + number

    def run(failing=None):
        ended = []
        try:
            return ended, _threads.parallel_for(part, 2, 2, ended, threading.Event(), failing)
        except BaseException as error:
            return ended, error

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert run()[1] == [10, 11]
    monkeypatch.setattr(_threads.queue, "SimpleQueue", Interrupted)
    ended, error = run("caller")
    assert "the caller's part fails" in str(error)
    assert len(ended) == 1  # the helper's
    ended, error = run("helper")
    assert "the helper's part fails" in str(error)
    assert len(ended) == 1  # the caller's
    interrupts += [KeyboardInterrupt, KeyboardInterrupt]
    ended, error = run()
    assert isinstance(error, KeyboardInterrupt)
    assert sorted(ended) == [0, 1]
    assert not interrupts


def test_parts_are_run_by_whatever_threads_there_are(monkeypatch):
    from cupy_sparse_adamw.engines.cpu import _threads

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(_threads, "_threads", [])
    monkeypatch.setattr(_threads, "_jobs", queue.SimpleQueue())
    expected = [(part, 10 * part // 7, 10 * (part + 1) // 7) for part in range(7)]
    assert _threads.run_parts(lambda *args: args, _threads.cuts(10, 7)) == expected
    assert _threads._threads == []
    _threads.start_threads(2)
    assert len(_threads._threads) == 1
    assert _threads.run_parts(lambda *args: args, _threads.cuts(10, 7)) == expected
    _threads.start_threads(7)
    assert len(_threads._threads) == 2
    assert _threads.parallel_for(lambda *args: args, 10, 7) == expected


def test_ctrl_c_while_helpers_are_called_leaves_none_at_work(monkeypatch):
    from cupy_sparse_adamw.engines.cpu import _threads

    running = threading.Event()

    class Jobs(queue.SimpleQueue):
        def put(self, job):
            super().put(job)
            assert running.wait(60)
            raise KeyboardInterrupt

    calls = []

    def part(number, begin, end):
        calls.append(number)
        running.set()
        time.sleep(0.1)
        return 0

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(_threads, "_threads", [])
    monkeypatch.setattr(_threads, "_jobs", Jobs())
    with pytest.raises(KeyboardInterrupt):
        _threads.parallel_for(part, 8, 8)
    made = list(calls)
    assert made
    time.sleep(0.3)
    assert calls == made, "a helper goes on with memory that its caller has given up"
    assert len(made) < 8


@pytest.mark.parametrize(
    ("size", "grain", "threads", "parts"),
    [
        (0, 100, 4, 1),
        (199, 100, 4, 1),
        (200, 100, 4, 2),
        (1_599, 100, 4, 15),
        (10_000, 100, 4, 16),
        (10_000, 100, 1, 1),
        (7, 0, 2, 7),
    ],
)
def test_num_parts(monkeypatch, size, grain, threads, parts):
    from cupy_sparse_adamw.engines.cpu import _threads

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert _threads.num_parts(size, grain) == parts


@pytest.mark.parametrize(
    ("size", "long_runs", "parts", "expected"),
    [
        (10, [], 2, [0, 5, 10]),
        (10, [(0, 10)], 2, [0, 0, 10]),
        (12, [(0, 8)], 2, [0, 10, 12]),
        (12, [(4, 12)], 2, [0, 2, 12]),
        (12, [(2, 10)], 2, [0, 2, 12]),  # a cut right before a run stays there
        (20, [(2, 8), (8, 14)], 4, [0, 2, 16, 18, 20]),
        (20, [(3, 8), (12, 17)], 5, [0, 2, 9, 11, 18, 20]),
        (12, [(0, 8)], 1, [0, 12]),
    ],
)
def test_long_runs_count_as_no_work(size, long_runs, parts, expected):
    from cupy_sparse_adamw.engines.cpu import adamw

    runs = np.array([(*run, 0) for run in long_runs], dtype=np.int64).reshape(-1, 3)
    segments = types.SimpleNamespace(words=np.empty(size), long_runs=runs)
    assert adamw._cuts(segments, parts) == expected


def test_a_helper_that_comes_late_finds_nothing_to_do():
    from cupy_sparse_adamw.engines.cpu import _threads

    calls = []

    def part(number, begin, end, memory):
        calls.append((number, begin, end))
        return number

    memory = torch.empty(1)
    job = _threads._Job(part, [0, 3, 7], (memory,))
    held = weakref.ref(memory)
    assert job.run(0) == [0, 1]
    job.help()
    assert calls == [(0, 0, 3), (1, 3, 7)]
    del memory
    assert held() is None, "a job in the queue keeps what its kernel worked on"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_can_look_up():
    """The parent's threads are gone. torch's own (OpenMP) hang there, so they are kept out."""
    script = """
import os, torch
from cupy_sparse_adamw import HashTable, functional
table = HashTable([2])
ids = torch.arange(50_000)
table(ids)
find = lambda: functional.find(table._store._index.entries, ids)[::5000].tolist()
expected = find()
child = os.fork()
if child == 0:
    os._exit(0 if find() == expected == list(range(0, 50_000, 5000)) else 1)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert result.stdout == "child 0\n"


class Lookups(torch.utils.data.Dataset):
    """Embeddings of 1,000 ids a sample, looked up in the worker."""

    def __init__(self, table):
        self.table = table

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return self.table(torch.arange(1000 * i, 1000 * i + 1000)).detach().numpy()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_dataloader_workers_can_look_up():
    table = HashTable([2], initializer=NormalInitializer())
    expected = table(torch.arange(50_000)).detach()
    table.eval()
    loader = torch.utils.data.DataLoader(
        Lookups(table), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    values = torch.cat(list(loader))
    assert torch.equal(values, expected[:8000])


def test_two_tables_train_in_two_threads():
    """Parallel kernels entered by two threads at once, each with its own table."""
    from cupy_sparse_adamw import SparseAdamW

    results = {}

    def train(number):
        table = HashTable([8])
        optimizer = SparseAdamW({"table": table})
        generator = torch.Generator().manual_seed(7)
        for _ in range(3):
            ids = torch.randint(0, 30_000, (40_000,), generator=generator)
            table(ids).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results[number] = table.embeddings()

    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    train(2)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


@pytest.mark.parametrize("summed", [False, True], ids=["a gradient", "a sum"])
def test_a_row_is_updated_by_vector_code(summed):
    """Scalar code takes two to four times as long, and nothing else shows it."""
    numba = pytest.importorskip("numba")
    from cupy_sparse_adamw.engines.cpu import _compile, update

    if not _compile._compiles_for("avx2"):
        pytest.skip("what LLVM makes of these loops was looked at for AVX2 and wider alone")
    f32, f64 = np.float32(0), np.float64(0)
    tags = f32, f32, f64 if summed else f32

    @numba.njit(error_model="numpy")
    def update_turn(place, grad, first, factors, tags):
        update._update_turn(place, grad, first, factors, None, tags)

    @numba.njit(error_model="numpy")
    def update_row(place, grad, dim, scalars, corrections, ahead, tags):
        update._update_row(place, grad, dim, scalars, corrections, None, ahead, tags)

    room = np.zeros((4, 16))
    place, grad = tuple(int(row.ctypes.data) for row in room[:3]), int(room[3].ctypes.data)
    update_turn(place, grad, 0, (f32,) * 6, tags)
    update_row(place, grad, 9, np.zeros(12), (0.0,) * 3, update._Ahead(*place, grad), tags)
    (turn,), (row,) = update_turn.inspect_llvm().values(), update_row.inspect_llvm().values()
    assert re.search(r"fdiv [a-z ]*<\d+ x float>", turn)
    assert not re.search(r"fdiv [a-z ]*float ", turn)
    assert "llvm.masked.store" not in row  # it would reach beyond a row


def test_fp16_where_no_instruction_converts_it():
    """The same bits, compiled for a CPU that has none (nor FMA)."""
    pytest.importorskip("numba")
    code = """
import torch
from cupy_sparse_adamw import SparseAdamW
draw = torch.Generator().manual_seed(0)
table = torch.nn.Embedding(50, 27, sparse=True, dtype=torch.float16)
with torch.no_grad():
    table.weight.copy_(torch.randn(50, 27, generator=draw))
optimizer = SparseAdamW({"table": table})
for _ in range(3):
    grads = torch.randn(200, 27, generator=draw).half()
    table(torch.randint(50, (200,), generator=draw)).backward(grads)
    optimizer.step()
    optimizer.zero_grad()
print(table.weight.view(torch.int16).tolist())
"""
    outputs = []
    for variables in ({}, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}):
        environment = {**os.environ, **variables}
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(result.stdout)
    assert outputs[0] == outputs[1] != ""
