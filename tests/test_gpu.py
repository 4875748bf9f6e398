"""What only a real GPU can show: streams, waits, graphs, late errors, moves between devices.

Needs pytest, torch, NumPy and CuPy alone. What the kernels compute is tested, on every engine and
in the emulator, by the other modules. Tables on the CPU run on the reference here, so that Numba
is not needed.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path

import pytest
import torch
from oracle import bits

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_check
from gpu_check import draw_rows, sparse

from cupy_sparse_adamw import HashTable, NormalInitializer, SparseAdamW, functional

pytestmark = [
    pytest.mark.gpu,
    # torch says so at the first use of set_sync_debug_mode.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]


@pytest.mark.parametrize(
    "part",
    [
        gpu_check.zero_copy,
        gpu_check.no_sync,
        gpu_check.steady_state,
        gpu_check.graph_replay,
        gpu_check.training_graph,
        gpu_check.side_stream,
        gpu_check.determinism,
        gpu_check.short_case,
    ],
    ids=lambda part: part.__name__,
)
def test_what_the_gpu_check_looks_at(part):
    assert part()


def engine_of(device: torch.device | str) -> contextlib.AbstractContextManager[None]:
    """The engine for tables on a device, the reference for those on the CPU."""
    is_cuda = torch.device(device).type == "cuda"
    return functional.use_engine("cuda" if is_cuda else "reference")


def contents(weight: torch.Tensor, optimizer: SparseAdamW) -> dict[str, torch.Tensor]:
    """Weights and moments of the only table, on the CPU."""
    (state,) = optimizer.state_dict()["state"].values()
    tensors = {"weights": weight.detach(), **{k: state[k] for k in ("exp_avg", "exp_avg_sq")}}
    return {name: tensor.cpu().clone() for name, tensor in tensors.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert gpu_check.differences(found, expected) == []


def embedding_step(
    weight: torch.Tensor, optimizer: SparseAdamW, seed: int, device: torch.device | str = "cuda"
) -> None:
    """A step with gradients of 300 rows, drawn from the seed."""
    draw = torch.Generator().manual_seed(seed)
    rows = draw_rows(300, weight.shape[0], draw).to(device)
    values = torch.randn(300, weight.shape[1], generator=draw).to(device)
    weight.grad = sparse(rows, values, weight.shape[0])
    with engine_of(device):
        optimizer.step()


def test_kernels_run_on_torchs_current_stream():
    """Behind a long wait on a side stream, gradients are written, then used; nobody waits there."""
    results = []
    side = torch.cuda.Stream()
    for is_late in (False, True):
        weight = torch.nn.Parameter(torch.ones(50, 16, device="cuda"))
        optimizer = SparseAdamW({"table": weight})
        rows = torch.arange(30, device="cuda").repeat(10)
        values = torch.zeros(300, 16, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Loading a kernel and taking memory may wait: it is done before.
            embedding_step(weight, optimizer, 0)
            weight.grad = sparse(rows, values, 50)
            if is_late:
                torch.cuda.synchronize()
                torch.cuda._sleep(1_000_000_000)  # half a second
            values.fill_(2.0)
            optimizer.step()
            done = side.record_event()
            if is_late:
                assert not done.query()
        torch.cuda.current_stream().wait_stream(side)
        results.append(contents(weight, optimizer))
    assert_same(*results)
    assert results[0]["exp_avg"][:30].abs().min() > 0


def test_lookups_run_on_torchs_current_stream():
    table = HashTable([4], 64, device="cuda", initializer=NormalInitializer())
    table.reserve(10_000)
    every = torch.arange(100, device="cuda")
    expected = table(every).detach().clone()
    ids = torch.zeros_like(every)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        table(ids).detach().clone()  # see above
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)
        ids.copy_(every)
        values = table(ids).detach().clone()
        assert not side.record_event().query()
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(values, expected)


@pytest.mark.parametrize("row", [50, -1, 2**40])
@pytest.mark.parametrize("asks", ["step", "state_dict"])
def test_a_row_out_of_range_is_reported_later(row, asks):
    """The step itself does not wait for it; it skips the row and updates the others."""
    expected = torch.nn.Parameter(torch.ones(50, 4, device="cuda"))
    weight = torch.nn.Parameter(expected.detach().clone())
    other = torch.nn.Parameter(expected.detach().clone())
    optimizers = [
        SparseAdamW({"expected": expected}),
        SparseAdamW({"films": weight, "other": other}),
    ]
    values = torch.ones(3, 4, device="cuda")
    expected.grad = sparse(torch.tensor([3, 7], device="cuda"), values[:2], 50)
    weight.grad = sparse(torch.tensor([3, row, 7], device="cuda"), values, 50)
    other.grad = sparse(torch.tensor([1], device="cuda"), values[:1], 50)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(bits(weight), bits(expected))
    torch.cuda.synchronize()
    before = other.detach().clone()
    with pytest.raises(IndexError, match=rf"table 'films': .* row {row}, .* 50 rows"):
        getattr(optimizers[1], asks)()
    assert torch.equal(bits(other), bits(before))
    weight.grad = expected.grad  # said once, and all is well again
    for optimizer in optimizers:
        optimizer.step()
        optimizer.state_dict()
    assert torch.equal(bits(weight), bits(expected))


def test_a_row_out_of_range_in_a_replay_is_reported_later():
    weight = torch.nn.Parameter(torch.ones(50, 4, device="cuda"))
    optimizer = SparseAdamW({"films": weight})
    rows = torch.tensor([3, 7], device="cuda")
    weight.grad = sparse(rows, torch.ones(2, 4, device="cuda"), 50)
    for _ in range(2):
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    rows[1] = 99
    graph.replay()
    with pytest.raises(IndexError, match=r"table 'films': .* row 99, .* 50 rows"):
        optimizer.state_dict()
    assert optimizer.state_dict()["state"]["films"]["step"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_lr_on_the_gpu_is_followed(dtype):
    lrs = [0.1, 0.01, 0.0, 0.5]
    results = []
    for is_tensor in (False, True):
        weight = torch.nn.Parameter(torch.ones(50, 8, device="cuda"))
        lr = torch.tensor(lrs[0], dtype=dtype, device="cuda") if is_tensor else lrs[0]
        optimizer = SparseAdamW({"table": weight}, lr=lr)
        for seed, value in enumerate(lrs):
            if is_tensor:
                lr.fill_(value)
            else:
                optimizer.param_groups[0]["lr"] = float(torch.tensor(value, dtype=dtype))
            embedding_step(weight, optimizer, seed)
        results.append(contents(weight, optimizer))
    assert_same(*results)


def trained_on(devices: list[str]) -> dict[str, torch.Tensor]:
    """A HashTable that trains two steps on each device in turn: its contents by id, on the CPU."""
    initializer = NormalInitializer(generator=torch.Generator().manual_seed(0))
    with engine_of(devices[0]):
        table = HashTable([16], 32, device=devices[0], initializer=initializer)
        model = torch.nn.ModuleDict({"table": table})
        optimizer = SparseAdamW({"table": table}, lr=0.05)
    draw = torch.Generator().manual_seed(1)
    for device in devices:
        with engine_of(device):
            model.to(device)
            for _ in range(2):
                ids = torch.randint(-100, 100, (400,), generator=draw).to(device)
                target = torch.randn(400, 16, generator=draw).to(device)
                (table(ids) - target).pow(2).mean().mul(100).backward()
                optimizer.step()
                optimizer.zero_grad()
            torch.cuda.synchronize()
    with engine_of(devices[-1]):
        order = table.ids().argsort()
        state = optimizer.state_dict()["state"]["table"]
        assert state["step"] == 2 * len(devices)
        found = {"ids": table.ids()[order], "embedding": table.embeddings()[order]}
        order = state["ids"].argsort()
        found |= {key: state[key][order] for key in ("exp_avg", "exp_avg_sq")}
    return {name: tensor.cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("devices", [["cpu", "cuda", "cpu"], ["cuda", "cpu", "cuda"]], ids=str)
def test_a_model_moves_between_devices_while_it_trains(devices):
    expected = trained_on(["cpu"] * len(devices))
    found = trained_on(devices)
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_optimizers_state_moves_between_devices():
    """Saved on the GPU, it loads on the CPU and back there again, bit for bit, and goes on."""
    weight = torch.nn.Parameter(torch.ones(50, 16, device="cuda"))
    optimizer = SparseAdamW({"table": weight})
    for seed in range(3):
        embedding_step(weight, optimizer, seed)
    saved = contents(weight, optimizer)
    state = copy.deepcopy(optimizer.state_dict())

    with engine_of("cpu"):
        on_cpu = torch.nn.Parameter(weight.detach().cpu())
        cpu_optimizer = SparseAdamW({"table": on_cpu})
        cpu_optimizer.load_state_dict(state)
        assert_same(contents(on_cpu, cpu_optimizer), saved)

    again = torch.nn.Parameter(on_cpu.detach().cuda())
    again_optimizer = SparseAdamW({"table": again})
    again_optimizer.load_state_dict(cpu_optimizer.state_dict())
    embedding_step(weight, optimizer, 3)
    embedding_step(again, again_optimizer, 3)
    assert again_optimizer.state_dict()["state"]["table"]["step"] == 4
    assert_same(contents(again, again_optimizer), contents(weight, optimizer))

    embedding_step(on_cpu, cpu_optimizer, 3, "cpu")
    with engine_of("cpu"):
        on_cpu_after = contents(on_cpu, cpu_optimizer)
    for name, x in contents(weight, optimizer).items():
        torch.testing.assert_close(x, on_cpu_after[name], rtol=1e-5, atol=1e-6, msg=name)


def test_tables_on_two_gpus_share_an_optimizer():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    initializer = NormalInitializer(generator=torch.Generator().manual_seed(0))
    tables = {
        f"cuda:{i}": HashTable([8], device=f"cuda:{i}", initializer=initializer) for i in range(2)
    }
    assert [table.device.index for table in tables.values()] == [0, 1]
    tables["cuda:1"]._store.seed = tables["cuda:0"]._store.seed  # the same new rows on both
    optimizer = SparseAdamW(tables)
    for seed in range(3):
        ids = torch.randint(0, 90, (500,), generator=torch.Generator().manual_seed(seed))
        for table in tables.values():
            table(ids).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    results = [
        {"embeddings": table.embeddings()[table.ids().argsort()].cpu(), "ids": table.ids().cpu()}
        for table in tables.values()
    ]
    results[0]["ids"], results[1]["ids"] = (r["ids"].sort().values for r in results)
    assert_same(*results)
