"""benchmarks/gpu_bench.py where there is no GPU: all of it, small, on the emulator.

torch.cuda is played (``PlayedGpu``): events read the host's clock, graphs are the emulator's.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import emulator
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_bench
import gpu_harness
import gpu_rivals
from gpu_harness import CheckFailed, NotRun, Work

SMALL = gpu_bench.Sizes(
    copy_bytes=1 << 12,
    rounds=4,
    sets=2,
    tables=2,
    ids=90,
    unique=30,
    table_rows=60,
    dim=8,
    rows=400,
    distinct=100,
    many_tables=5,
    many_ids=20,
    many_rows=30,
    many_dim=8,
    batch=150,
    touched=(10, 300),
    narrow=(8, 16),
    known_ids=200,
    lookups=50,
)


class PlayedGpu:
    """What the harness asks of torch.cuda and of torch's profiler, on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sync_mode = "default"
        self.modes: set[str] = set()  # in which steps began
        self.slept: list[int] = []
        played = {
            "Event": self.event,
            "CUDAGraph": types.SimpleNamespace,
            "graph": self.graph,
            "Stream": lambda: types.SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": lambda: types.SimpleNamespace(wait_stream=lambda other: None),
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda: None,
            "memory_allocated": lambda: 1000,
            "max_memory_allocated": lambda: 1000 + 64 * 180,
            "set_sync_debug_mode": self.set_mode,
            "get_device_properties": lambda number: types.SimpleNamespace(
                name="Played GPU", major=9, minor=0, total_memory=1 << 30,
                multi_processor_count=1, L2_cache_size=256,
            ),
            "get_device_name": lambda number: "Played GPU (1)",
            "device_count": lambda: 1,
            "_sleep": self.slept.append,
        }  # fmt: skip
        for name, value in played.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.profiler, "profile", self.profile)
        cupy = types.SimpleNamespace(__version__="0", cuda=types.SimpleNamespace())
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setattr(gpu_harness, "DEVICE", "cpu")

    def set_mode(self, mode: str) -> None:
        self.sync_mode = mode
        self.modes.add(mode)

    def event(self, enable_timing: bool) -> types.SimpleNamespace:
        event = types.SimpleNamespace(at=None, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", time.perf_counter())
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    @contextlib.contextmanager
    def graph(self, graph: types.SimpleNamespace) -> Iterator[None]:
        with emulator.capture() as captured:
            yield
        graph.replay = captured.replay

    @contextlib.contextmanager
    def profile(self, activities: object) -> Iterator[types.SimpleNamespace]:
        emulator.launches.clear()
        profiler = types.SimpleNamespace()
        yield profiler
        kinds = (torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU)
        events = [
            types.SimpleNamespace(
                name=launch.kernel,
                device_type=kind,
                time_range=types.SimpleNamespace(elapsed_us=lambda: 3.0),
            )
            for launch in emulator.launches
            for kind in kinds
        ]
        profiler.events = lambda: events


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, emulated: None) -> PlayedGpu:
    monkeypatch.setattr(gpu_bench, "SIZES", SMALL)
    monkeypatch.setattr(gpu_bench, "ENGINE", "emulated")
    return PlayedGpu(monkeypatch)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts run in this process rather than in one of their own; some GPU is found."""
    parts = {part.__name__: part for part in gpu_bench.IN_A_PROCESS}
    monkeypatch.setattr(
        gpu_bench, "in_a_process", lambda script, name, limit: gpu_bench.seeded(parts[name])
    )
    monkeypatch.setattr(gpu_bench, "why_no_gpu", lambda: None)


@pytest.mark.emulated
def test_it_runs_from_end_to_end(gpu, here, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_bench._doctor, "check", lambda engine: [])  # tests/test_doctor.py
    monkeypatch.setattr(gpu_bench, "results_path", lambda: tmp_path / "results" / "gpu.json")
    with emulator.using(checked=False):
        status = gpu_bench.main([])
    report = json.loads((tmp_path / "results" / "gpu.json").read_text())
    wrong = {k: x["error"] for k, x in report["parts"].items() if x["result"] != "passed"}
    assert not wrong
    assert status == 0
    assert report["result"] == "passed"
    parts = {name: outcome["figures"] for name, outcome in report["parts"].items()}
    assert list(parts) == [part.__name__ for part in gpu_bench.IN_A_PROCESS]
    assert parts["environment"]["card"] == "Played GPU"
    assert {"driver", "torch", "commit"} <= parts["environment"].keys()

    ten = parts["ten_tables"]
    assert (ten["tables"], ten["gradient_rows"], ten["touched_rows"]) == (2, 180, 60)
    assert ten["floor_bytes"] == 24 * 60 * 8 + 4 * 180 * 8 + 8 * 180
    rivals = {**gpu_rivals.TORCHS, **gpu_rivals.WHOLE_TABLES, **gpu_rivals.OWN}
    assert {gpu_bench.OURS, *rivals} <= ten["us"].keys()
    missing = gpu_rivals.PACKAGES.keys() - ten["us"].keys()
    assert ten["not_run"].keys() == missing
    assert all(": " in reason for reason in ten["not_run"].values())  # class: text
    for name, us in ten["us"].items():
        low, high = ten["quartiles_us"][name]
        assert 0 < low <= us <= high
        assert ten["ratio"][name] == pytest.approx(us / ten["us"][gpu_bench.OURS], abs=0.01)
        assert ten["of_the_floor"][name] == pytest.approx(ten["floor_us"] / us, abs=1e-3)
    step = ten["step"]
    kernels = {name: x["times"] for name, x in step["kernels"].items()}
    assert kernels == {"make_keys_32": 1, "advance_float": 1, "update": 1, "finish": 1}
    assert step["kernels_us"] == 12
    assert step["extra_bytes_per_gradient_row"] == 64
    assert min(step["graph_us"], step["eager_us"], step["host_us"]) > 0

    assert set(parts["touched_sweep"]) == {"10 rows", "300 rows"}
    assert parts["touched_sweep"]["300 rows"]["touched_rows"] == 300
    assert (
        parts["dtype_sweep"]["float16"]["floor_bytes"]
        < (parts["dtype_sweep"]["float32"]["floor_bytes"])
    )
    assert [x["D"] for x in parts["narrow_sweep"].values()] == [8, 16]
    touched = [x["touched_rows"] for x in parts["zipf_sweep"].values()]
    assert touched[0] > touched[-1]
    many = parts["many_tables"]
    assert (many["many"]["tables"], many["one"]["tables"]) == (5, 1)
    assert many["many"]["gradient_rows"] == many["one"]["gradient_rows"] == 100
    assert many["many"]["touched_rows"] == many["one"]["touched_rows"]

    assert "error" in gpu.modes
    assert gpu.sync_mode == "default"
    printed = capsys.readouterr().out
    goals = list(gpu_bench.goals_of(report))
    assert len(goals) == 3 + 4 + 1 + 2 + 1
    for goal in goals:
        assert f"{goal['what']} " in printed
    assert f"ten_tables: {gpu_bench.OURS}" in printed
    assert f"touched_sweep 10 rows: {gpu_bench.OURS}" in printed


@pytest.mark.emulated
def test_a_wrong_step_is_not_timed(gpu, monkeypatch):
    case = gpu_bench.one_table(50, 4, lambda: torch.randint(0, 50, (40,)))
    gpu_rivals.ours(case)
    monkeypatch.setattr(gpu_rivals, "LR", 2e-3)  # of the formula and of the optimizer alike
    gpu_rivals.ours(case)
    right = gpu_rivals.SparseAdamW
    monkeypatch.setattr(
        gpu_rivals, "SparseAdamW", lambda tables, lr, *rest: right(tables, lr * 1.01, *rest)
    )
    with pytest.raises(CheckFailed, match=r"a step of torch.float32 tables is off by"):
        gpu_rivals.ours(case)


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rivals_take_the_same_step(gpu, dtype):
    """From zero moments every AdamW does; SparseAdam has neither decay nor ε where we have it."""
    rows = [[torch.tensor([3, 0, 3, 7])], [torch.tensor([1, 1, 1, 2])]]

    def after_a_step(maker):
        torch.manual_seed(0)
        case = gpu_rivals.Case([9], 4, rows, dtype)
        before = case.weights[0].detach().clone()
        work = maker(case).work(0)
        if maker is not gpu_rivals.ours:  # which has taken its first step
            work.prepare()
            work.run()
        return (case.weights[0].detach() - before)[[0, 3, 7]].double()

    expected = after_a_step(gpu_rivals.ours)
    assert expected.abs().min() > 5e-4
    limit = 1e-6 if dtype == torch.float32 else 1e-4
    for maker in (gpu_rivals.reference, gpu_rivals.chunked_adamw):
        assert (after_a_step(maker) - expected).abs().max() <= limit
    if dtype == torch.float32:
        for maker in (gpu_rivals.foreach_adamw, gpu_rivals.fused_adamw):
            assert (after_a_step(maker) - expected).abs().max() <= limit
        decay = gpu_rivals.LR * gpu_rivals.DECAY * 0.01
        assert (after_a_step(gpu_rivals.sparse_adam) - expected).abs().max() <= decay + limit


def test_rivals_that_cannot_run_say_why(gpu):
    case = gpu_rivals.Case([9], 4, [[torch.tensor([3])]])

    def absent(case):
        raise ModuleNotFoundError("No module named 'fbgemm_gpu'")

    def works(case):
        return gpu_rivals.Rival(lambda: None)

    made, reasons = gpu_bench.rivals_of(case, {"a": absent, "b": works})
    assert list(made) == ["b"]
    assert reasons == {"a": "ModuleNotFoundError: No module named 'fbgemm_gpu'"}


def test_works_take_turns_and_ours_may_not_wait(gpu):
    order = []

    def work(name, may_wait):
        return Work(
            lambda: order.append((name, gpu.sync_mode)), lambda: order.append("prepare"), may_wait
        )

    seconds = gpu_harness.gpu_times({"a": work("a", False), "b": work("b", True)}, rounds=3)
    assert order == ["prepare", ("a", "error"), "prepare", ("b", "default")] * 8
    assert [len(x) for x in seconds.values()] == [3, 3]
    assert len(gpu.slept) == 16
    assert min(gpu.slept) == 10_000_000


def test_a_work_that_raises_leaves_no_mode_behind(gpu):
    def fails():
        raise RuntimeError("called a synchronizing operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        gpu_harness.gpu_times({"a": Work(fails, may_wait=False)})
    assert gpu.sync_mode == "default"


def test_nothing_begins_after_the_budget(monkeypatch):
    monkeypatch.setattr(gpu_bench.time, "monotonic", iter([0.0, 441.0]).__next__)
    part = gpu_bench.within(450)("ten_tables")
    with pytest.raises(NotRun, match="450 s of a whole run are over"):
        part()


def test_a_part_gets_what_is_left_of_the_budget(monkeypatch):
    limits = []
    monkeypatch.setattr(
        gpu_bench, "in_a_process", lambda script, name, limit: lambda: limits.append(limit)
    )
    monkeypatch.setattr(gpu_bench.time, "monotonic", iter([0.0, 1.0, 400.0]).__next__)
    limited = gpu_bench.within(450)
    limited("ten_tables")()
    limited("hot_ids")()
    assert limits == [gpu_bench.LIMIT, 50]


@pytest.mark.parametrize(
    ("reached", "limit", "at_most", "is_met"),
    [(0.7, 0.75, True, True), (0.76, 0.75, True, False), (0.89, 0.9, False, False)],
)
def test_goals(reached, limit, at_most, is_met):
    goal = gpu_bench.goal("what", reached, limit, "ms", at_most)
    assert goal["is_met"] is is_met
    assert goal["goal"] == f"{'≤' if at_most else '≥'} {limit} ms"
    assert goal["reached"] == reached


def test_rows_are_what_the_cases_ask_for(gpu):
    rows = gpu_bench.with_duplicates(1000, 500, 120)
    assert (rows.numel(), rows.unique().numel()) == (500, 120)
    assert gpu_bench.distinct_rows(1000, 300).unique().numel() == 300
    hot = gpu_bench.zipf_rows(1000, 20_000, 1.5).bincount(minlength=1000).sort(descending=True)
    shares = hot.values / 20_000  # of rank k: k ** -1.5 over the sum of all
    whole = sum(k**-1.5 for k in range(1, 1001))
    assert shares[0].item() == pytest.approx(1 / whole, rel=0.1)
    assert shares[3].item() == pytest.approx(4**-1.5 / whole, rel=0.2)
