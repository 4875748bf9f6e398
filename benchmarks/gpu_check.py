"""Everything about the CUDA engine that only a GPU can tell, in one command: ``make gpu-check``.

It needs torch built for CUDA, CuPy, NumPy and pytest, and neither a network nor an install. Each
part runs in a process of its own with a time limit, since a kernel that hangs or that breaks the
CUDA context would take the other parts along. The result is printed and written as JSON, after
every part, so that a run that is cut short leaves what it found.

Exit status: 0 if every part passed (or had nothing to run), 1 if one failed, 2 where no GPU can be
used, which a sentence explains.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests"), str(Path(__file__).parent)]

try:
    import numpy as np
    import torch
    from conftest import why_no_gpu
    from gpu_cases import Pair, Setup, contents_by_id, differences, draw_rows, hash_table
    from gpu_harness import (
        CheckFailed,
        Figures,
        answer_part,
        captured,
        copy_bandwidth,
        environment,
        gpu_seconds,
        host_us,
        in_a_process,
        no_waits,
        recorded_waits,
        require,
        run_command,
        run_parts,
        sparse,
        tail,
        warm_up,
    )
    from gpu_sanitizer import sanitizer
    from oracle import TOLERANCE, relative_error, within_one_ulp

    from cupy_sparse_adamw import (
        HashTable,
        NormalInitializer,
        SparseAdamW,
        _doctor,
        functional,
    )
    from cupy_sparse_adamw.row_bound import RowBound
except ImportError as missing:
    if __name__ != "__main__":
        raise
    print(
        f"gpu-check: {missing}; it needs torch built for CUDA, CuPy, NumPy and pytest, and this "
        f"folder on PYTHONPATH",
        file=sys.stderr,
    )
    sys.exit(2)

#: Seconds after which a part is stopped.
LIMIT = 120.0
COMPILATION_LIMIT = 420.0
TEST_LIMIT = 420.0


# ---------------------------------------------------------------------- parts: correctness


def compilation() -> Figures:
    """Compile every kernel, or load it from CuPy's cache; what the update kernels take."""
    from cupy_sparse_adamw.engines.cuda import _compile

    device = torch.empty(0, device="cuda").device
    begin, slowest, kernels = time.perf_counter(), 0.0, {}
    variants = list(_compile.all_variants())
    for variant in variants:
        started = time.perf_counter()
        _compile._module(device, variant).compile()
        slowest = max(slowest, time.perf_counter() - started)
        if variant.file == "sparse_adamw.cu":
            kernel = _compile._function(device, variant, "update")
            kernels[" ".join(value for _, value in variant.macros)] = {
                "registers": kernel.num_regs,
                "stack_bytes": kernel.local_size_bytes,
                "shared_bytes": kernel.shared_size_bytes,
            }
    return {
        "modules": len(variants),
        "seconds": round(time.perf_counter() - begin, 1),
        "slowest_seconds": round(slowest, 1),
        "update": kernels,
    }


def zero_copy() -> Figures:
    """A tensor and its CuPy array are one memory, on the way there and on the way back."""
    from cupy_sparse_adamw.engines.cuda._interop import address_of, array_of

    compared = 0
    for dtype in (*TOLERANCE, torch.int64, torch.int32):
        whole = torch.arange(24, device="cuda").to(dtype).view(6, 4)
        for tensor in (whole, whole[2:], whole.view(-1)[1:], whole[3], whole[:0]):
            array = array_of(tensor)
            require(
                array.data.ptr == tensor.data_ptr() and array.shape == tuple(tensor.shape),
                f"{dtype} {list(tensor.shape)}: torch has it at {tensor.data_ptr():#x}, CuPy at "
                f"{array.data.ptr:#x} with shape {array.shape}",
            )
            require(
                int(address_of(tensor)) == tensor.data_ptr(),
                f"{dtype} {list(tensor.shape)}: its address is not where torch has it",
            )
            compared += 1
            if tensor.numel() == 0:  # has no memory that could come back
                continue
            back = torch.from_dlpack(array).view(dtype)
            require(
                back.data_ptr() == tensor.data_ptr(),
                f"{dtype} {list(tensor.shape)}: back from CuPy it is at {back.data_ptr():#x}, it "
                f"was at {tensor.data_ptr():#x}",
            )
        back = torch.from_dlpack(array_of(whole)).view(dtype)
        back[1, 2] = 77
        require(whole[1, 2].item() == 77, f"{dtype}: what is written on one side does not show")
    parameter = torch.nn.Parameter(torch.zeros(3, 2, device="cuda"))
    require(
        array_of(parameter).data.ptr == parameter.data_ptr(), "a Parameter is elsewhere for CuPy"
    )
    return {"tensors": compared + 1}


def no_sync() -> Figures:
    """Lookups, backward, step and zero_grad of both kinds of tables while no wait is allowed."""
    with no_waits():
        try:
            torch.ones(1, device="cuda").item()
        except RuntimeError:
            pass
        else:
            raise CheckFailed("torch does not notice that .item() waits, so this shows nothing")
    steps, count = 10, 3000
    embedding = torch.nn.Embedding(500, 32, sparse=True, device="cuda")
    table = HashTable([32], 128, device="cuda", initializer=NormalInitializer())
    optimizer = SparseAdamW({"embedding": embedding, "table": table})
    ids = [draw_rows(count, 500, torch.Generator().manual_seed(i)).cuda() for i in range(4)]

    def step(ids: torch.Tensor) -> None:
        loss = embedding(ids).pow(2).sum() + table(ids).pow(2).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # Every lookup may be of new ids as far as the host knows: without room for them it would count.
    table.reserve((steps + 6) * count)
    for i in range(3):
        step(ids[i])
    with no_waits():
        for i in range(steps):
            step(ids[i % 4])
    state = optimizer.state_dict()["state"]
    require(state["table"]["step"] == steps + 3, "the steps were not counted")
    return {"steps": steps}


@contextlib.contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Within the block, counts how often the host waits to learn how many rows a table has."""
    waits = Counter({"RowBound.exactly": 0, "copies_not_ready": 0})
    exactly, copied = RowBound.exactly, RowBound.copied

    def counted_exactly(bound: RowBound) -> int:
        waits["RowBound.exactly"] += 1
        return exactly(bound)

    def counted_copied(bound: RowBound) -> int:
        waits["copies_not_ready"] += bound._copy is not None and not bound._copy.ready()
        return copied(bound)

    with (
        mock.patch.object(RowBound, "exactly", counted_exactly),
        mock.patch.object(RowBound, "copied", counted_copied),
    ):
        yield waits


def steady_state() -> Figures:
    """Training on known ids without ``reserve``: how often the host waits for the GPU.

    Allowed is to wait for a copy of the number of rows that is under way: where the GPU is behind,
    it holds the host to a few lookups ahead.
    """
    with recorded_waits() as texts:
        torch.ones(1, device="cuda").item()
    require(texts, "torch does not notice that .item() waits, so this shows nothing")
    steps, draw = 200, torch.Generator().manual_seed(4)
    batches = [draw_rows(1024, 2000, draw).cuda() for _ in range(4)]
    figures: Figures = {
        "not_seen_by_torchs_mode": "Event.synchronize, by which the host waits for a HostCopy"
    }
    for gpu in ("idle", "busy"):
        tables = {"a": hash_table(32), "b": hash_table(8)}
        optimizer = SparseAdamW(tables)

        def step(ids: torch.Tensor) -> None:
            sum(table(ids).pow(2).sum() for table in tables.values()).backward()  # noqa: B023
            optimizer.step()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023

        for ids in 3 * batches:
            step(ids)
        with counted_waits() as waits, recorded_waits() as texts:
            for i in range(steps):
                if gpu == "busy":
                    torch.cuda._sleep(2_000_000)  # 1 ms
                step(batches[i % 4])
        figures[gpu] = {
            "lookups": steps * len(tables),
            **waits,
            "torch_warnings": texts.total(),
            "texts": dict(texts),
        }
    for gpu in ("idle", "busy"):
        waits = figures[gpu]
        if waits["RowBound.exactly"] or waits["torch_warnings"]:
            raise CheckFailed(f"with the GPU {gpu}, the host waits: {waits}", figures)
    return figures


def compare_replays(lrs: Sequence[float | None]) -> None:
    """One replay for each entry, against as many eager steps; an lr is written before its step."""
    replayed, eager = (
        Setup(1e-2 if lrs[0] is None else torch.tensor(1e-2, device="cuda")) for _ in range(2)
    )
    warm_up(replayed.optimizer.step)
    graph = captured(replayed.optimizer.step)
    for _ in range(3):
        eager.optimizer.step()
    wrong = differences(replayed.contents(), eager.contents())
    require(not wrong, f"after the warm-up, before any replay, these differ: {wrong}")
    for setup, advance in ((replayed, graph.replay), (eager, eager.optimizer.step)):
        for value in lrs:
            if value is not None:
                setup.lr.fill_(value)
            advance()
    wrong = differences(replayed.contents(), eager.contents())
    require(not wrong, f"after {len(lrs)} replays these are not those of eager steps: {wrong}")
    for setup in (replayed, eager):
        setup.optimizer.step()
    wrong = differences(replayed.contents(), eager.contents())
    require(not wrong, f"an eager step after {len(lrs)} replays goes wrong: {wrong}")


def refusal(work: Callable[[], object]) -> str:
    """The RuntimeError that ``work`` raises under capture; the capture itself stays whole."""
    buffer = torch.zeros(1, device="cuda")
    text, graph = "", torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffer.add_(1)  # an empty graph is warned about
        try:
            work()
        except RuntimeError as error:
            text = str(error)
    graph.replay()
    require(buffer.item() == 1, "a capture in which something was refused does not replay")
    return text


def graph_replay() -> Figures:
    """K replays of a captured step are K eager steps, bit for bit; what cannot be is refused."""
    replays = 5
    compare_replays([None] * replays)
    compare_replays([0.5, 0.25, 1e-3, 0.0, 0.125])
    table = HashTable([8], device="cuda", initializer=NormalInitializer())
    ids = torch.arange(100, device="cuda")
    table(ids)
    text = refusal(lambda: table(ids))
    require("captured into a CUDA graph" in text, f"a lookup that may insert is captured: {text!r}")
    require(len(table) == 100, "a lookup that was refused has inserted rows")
    fresh = Setup()
    text = refusal(fresh.optimizer.step)
    require("captured into a CUDA graph" in text, f"a first step is captured: {text!r}")
    return {"replays": 2 * replays}


def training_graph() -> Figures:
    """Lookup, loss, backward and step in one graph; rows that came after its capture are refused.

    Replays on changing ids are eager steps, bit for bit. A captured step knows only of the rows of
    its capture: it must report others, which would have the keys of the next table's rows.
    """
    replays, known, draw = 5, Pair.KNOWN, torch.Generator().manual_seed(3)
    # Of the ids, the last 20 have no row.
    batches = [draw_rows(Pair.COUNT, known + 20, draw).cuda() for _ in range(replays)]
    replayed, eager = Pair(), Pair()
    replayed.ids.copy_(batches[0])
    warm_up(replayed.step)
    for table in replayed.tables.values():
        # As a lookup does when memory becomes scarce. A capture must not ask whether it has come.
        table._store._bound.send_copy()
    graph = captured(replayed.step)
    for i in range(-3, replays):
        ids = batches[max(i, 0)]
        eager.ids.copy_(ids)
        eager.step()
        if i >= 0:
            replayed.ids.copy_(ids)
            graph.replay()
    wrong = differences(replayed.contents(), eager.contents())
    require(not wrong, f"after {replays} replays these are not those of eager steps: {wrong}")
    for model in (replayed, eager):
        model.step()
    wrong = differences(replayed.contents(), eager.contents())
    require(not wrong, f"an eager step after {replays} replays goes wrong: {wrong}")

    before, table = replayed.contents(), replayed.tables["a"]
    nbytes, new = table.nbytes, torch.arange(1000, 1400, device="cuda")
    table(new)
    require(len(table) == known + len(new) and table.nbytes == nbytes, "the table has grown")
    replayed.ids.copy_(new[draw_rows(Pair.COUNT, len(new), draw).cuda()])
    graph.replay()
    text = ""
    try:
        replayed.optimizer.state_dict()
    except IndexError as error:
        text = str(error)
    require(
        "'a'" in text and "captured in a CUDA graph" in text,
        f"a replay on rows that came after its capture is not reported: {text!r}",
    )
    after = {name: x[: len(before[name])] for name, x in replayed.contents().items()}
    wrong = [name for name in differences(after, before) if not name.endswith(" step")]
    require(not wrong, f"a replay on rows that came after its capture changes {wrong}")
    return {"replays": replays, "report": text}


def side_stream() -> Figures:
    """Lookup and backward on a side stream, late there, and the step on the main one."""
    draw = torch.Generator().manual_seed(5)
    batches = [draw_rows(2000, 300, draw).cuda() for _ in range(4)]
    main, results = torch.cuda.current_stream(), []

    def late(grad: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(grad)  # what a step that does not wait would read
        torch.cuda._sleep(400_000_000)  # 0.2 s
        return result.copy_(grad)

    for stream in (main, torch.cuda.Stream()):
        tables = {"table": hash_table(16)}
        optimizer = SparseAdamW(tables, lr=0.05)
        for ids in batches:
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                values = tables["table"](ids)
                values.register_hook(late)
                values.pow(2).sum().backward()
                done = stream.record_event()
            torch.cuda._sleep(600_000_000)  # so that the step comes after the junk below
            optimizer.step()
            is_late = not done.query()
            optimizer.zero_grad()
            with torch.cuda.stream(stream):  # into memory that the step has still to read?
                junk = [torch.full_like(x, -7) for x in (values.detach(), ids) for _ in range(4)]
            del values, junk
        require(is_late, "the step has waited for backward on the host")
        results.append(contents_by_id(tables, optimizer))
    wrong = differences(results[1], results[0])
    require(not wrong, f"the step has not waited for backward on the GPU: {wrong} differ")
    return {"steps": len(batches)}


def determinism() -> Figures:
    """The same step gives the same bits; a row's result depends on its own gradients alone."""
    repeats = 10
    expected: dict[str, torch.Tensor] = {}
    for i in range(repeats):
        setup = Setup()
        for _ in range(3):
            setup.optimizer.step()
        expected = expected or setup.contents()
        wrong = differences(setup.contents(), expected)
        require(not wrong, f"run {i + 1} of the same three steps ends otherwise: {wrong}")

    draw = torch.Generator().manual_seed(2)
    sizes = (100, 5000)
    compared = 0
    for dim in (7, 64, 128):
        rows = draw_rows(sizes[1], sizes[0], draw).cuda()
        values = torch.randn(sizes[1], dim, generator=draw).cuda()
        weight = torch.randn(2 * sizes[0], dim, generator=draw).cuda()
        alone = step_once(weight, rows, values)
        for count in (1, 127, 128, 10_000):  # gradients of other rows, before and in between
            others = sizes[0] + torch.randint(sizes[0], (count,), generator=draw).cuda()
            place = torch.rand(count + sizes[1], generator=draw).cuda().argsort()
            is_own = place >= count
            mixed = torch.empty(count + sizes[1], dtype=torch.int64, device="cuda")
            mixed[is_own], mixed[~is_own] = rows, others  # each part stays in its order
            grads = torch.randn(count + sizes[1], dim, generator=draw).cuda()
            grads[is_own] = values
            together = step_once(weight, mixed, grads)
            wrong = differences(together, alone)
            require(not wrong, f"D = {dim}: {count} gradients of other rows change {wrong}")
            compared += 1
        ascending = torch.arange(0, sizes[0], 3).cuda()
        as_given, coalesced = (
            step_once(weight, ascending, values[: len(ascending)], is_coalesced)
            for is_coalesced in (False, True)
        )
        wrong = differences(coalesced, as_given)
        require(not wrong, f"D = {dim}: a gradient that is known to be coalesced changes {wrong}")
    return {"repeats": repeats, "batches": compared}


def step_once(
    weight: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, is_coalesced: bool = False
) -> dict[str, torch.Tensor]:
    """The first half of the rows after one step, and their moments."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = SparseAdamW({"table": parameter})
    parameter.grad = sparse(rows, values, weight.shape[0])._coalesced_(is_coalesced)
    optimizer.step()
    half, state = weight.shape[0] // 2, optimizer.state_dict()["state"]["table"]
    moments = {key: state[key][:half].clone() for key in ("exp_avg", "exp_avg_sq")}
    return {"weights": parameter.detach()[:half].clone(), **moments}


def accuracy() -> Figures:
    """The doctor's checks, and runs of many steps in SPEC's norm, beside the reference's on CUDA.

    16-bit tables are compared after one step, where they must be within one unit in the last place.
    """
    problems = _doctor.check("cuda")
    require(not problems, "; ".join(problems))
    figures: Figures = {}
    for dtype, (weight_limit, moment_limit) in TOLERANCE.items():
        for dim in (1, 33, 64, 128):
            steps = 1 if dtype.itemsize == 2 else 100
            exact = trained("reference", "cpu", dtype, torch.float64, dim, steps)
            errors = {}
            for engine in ("cuda", "reference"):
                found = trained(engine, "cuda", dtype, dtype, dim, steps)
                for name, x in found.items():
                    x64 = exact[name].numpy()
                    error = relative_error(x, x64)
                    errors[f"{engine} {name}"] = float(f"{error:.2e}")
                    where = f"{dtype} D = {dim}, {engine} on CUDA: {name}"
                    limit = weight_limit if name == "weights" else moment_limit
                    if limit is None:
                        fits = within_one_ulp(x, x64)
                        require(fits, f"{where} are more than one unit in the last place off")
                    else:
                        require(error <= limit, f"{where} are off by {error:.1e} of {limit:.0e}")
            figures[f"{dtype} D={dim} steps={steps}".removeprefix("torch.")] = errors
    return figures


def trained(
    engine: str, device: str, dtype: torch.dtype, run_dtype: torch.dtype, dim: int, steps: int
) -> dict[str, torch.Tensor]:
    """Weights and moments after steps with gradients of ``dtype``, run in ``run_dtype``."""
    draw = torch.Generator().manual_seed(dim)
    num_rows, count = 50, 600
    values = torch.randn(num_rows, dim, generator=draw).to(dtype)
    weight = torch.nn.Parameter(values.to(device, run_dtype))
    optimizer = SparseAdamW({"table": weight}, lr=1e-2, weight_decay=0.1)
    with functional.use_engine(engine):
        for _ in range(steps):
            rows = draw_rows(count, num_rows, draw)
            grad = torch.randn(count, dim, generator=draw).to(dtype).to(device, run_dtype)
            weight.grad = sparse(rows.to(device), grad, num_rows)
            optimizer.step()
        state = optimizer.state_dict()["state"]["table"]
    return {
        "weights": weight.detach().cpu(),
        **{key: state[key].cpu() for key in ("exp_avg", "exp_avg_sq")},
    }


def untouched() -> Figures:
    """What rows missed while no batch touched them, in SPEC's norm, beside a replay in float64."""
    figures: Figures = {}
    for mode in ("decay", "dense"):
        exact = brought_up_to_date("reference", "cpu", torch.float64, mode).numpy()
        for dtype, limit in ((torch.float32, 4e-6), (torch.float64, 1e-11)):
            error = relative_error(brought_up_to_date("cuda", "cuda", dtype, mode), exact)
            where = f"untouched={mode!r}, {dtype}"
            require(error <= limit, f"{where}: weights are off by {error:.1e} of {limit:.0e}")
            figures[where] = float(f"{error:.2e}")
    return figures


def brought_up_to_date(engine: str, device: str, dtype: torch.dtype, mode: str) -> torch.Tensor:
    """An embedding's weights after steps on few of its rows at a time, and ``flush``."""
    draw = torch.Generator().manual_seed(6)
    values = torch.randn(200, 36, generator=draw)
    embedding = torch.nn.Embedding.from_pretrained(
        values.to(device, dtype), freeze=False, sparse=True
    )
    optimizer = SparseAdamW({"table": embedding}, lr=1e-2, weight_decay=0.1, untouched=mode)
    with functional.use_engine(engine):
        for _ in range(60):
            embedding(draw_rows(20, 200, draw).to(device)).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.flush()
    return embedding.weight.detach().cpu()


def short_case() -> Figures:
    """A little of everything, for compute-sanitizer: growth, long runs, 16 bits, several tables."""
    draw = torch.Generator().manual_seed(0)
    embedding = torch.nn.Embedding(300, 64, sparse=True, device="cuda")
    half = torch.nn.Embedding(300, 16, sparse=True, device="cuda", dtype=torch.float16)
    odd = torch.nn.EmbeddingBag(300, 7, sparse=True, mode="sum", device="cuda")
    tables = {
        str(dtype): HashTable([dim], 32, dtype, "cuda", initializer=NormalInitializer())
        for dtype, dim in ((torch.float32, 33), (torch.float16, 8), (torch.bfloat16, 16))
    }
    optimizer = SparseAdamW({"embedding": embedding, "half": half, "odd": odd, **tables})
    for i in range(4):
        rows = draw_rows(700, 300, draw).cuda()
        ids = rows * (i + 1) - 50  # new ones in every step
        losses = [x.float().pow(2).sum() for x in (embedding(rows), half(rows))]
        losses.append(odd(rows.view(70, 10)).pow(2).sum())
        losses += [table(ids).float().pow(2).sum() for table in tables.values()]
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
    table = tables["torch.float16"]
    _, rows = table.ids_map()
    table.accept_grad(rows.repeat(3), torch.ones(3 * len(rows), 8, device="cuda"))
    table.grad()
    optimizer.step()
    table.insert(torch.tensor([1, -50, 1]), torch.ones(3, 8, dtype=torch.float16, device="cuda"))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    finite = all(bool(x.embeddings().isfinite().all()) for x in tables.values())
    require(finite and bool(embedding.weight.isfinite().all()), "values are not finite")
    torch.cuda.synchronize()
    return {"rows": sum(map(len, tables.values()))}


# ---------------------------------------------------------------------- parts: speed


def host_overhead() -> Figures:
    """Microseconds that the host spends before the GPU is done: by launch, lookup and step."""
    from cupy_sparse_adamw.engines.cuda import _compile
    from cupy_sparse_adamw.engines.cuda._interop import array_of

    device = torch.empty(0, device="cuda").device
    entries = torch.full((64, 2), -1, device=device)
    ids = torch.arange(4, device=device)
    rows = torch.empty_like(ids)
    variant = _compile.hash_table_variant(torch.float32)
    args = (entries, np.int64(64), ids, rows, np.int64(4))
    ones = torch.ones(4, device=device)
    figures = {
        "launch_us": host_us(lambda: _compile.launch(device, variant, "find", 1, 256, args), 100),
        "array_of_us": host_us(lambda: array_of(ids), 100),
        "torch_add_us": host_us(lambda: ones.add_(1), 100),  # what torch takes for a launch
    }
    known = torch.arange(1024, device=device)
    tables = [hash_table(16) for _ in range(26)]
    figures["training_lookup_us"] = host_us(lambda: tables[0](known), 20)
    figures["forward_of_26_tables_us"] = host_us(lambda: [table(known) for table in tables], 1)
    tables[0].eval()
    figures["eval_lookup_us"] = host_us(lambda: tables[0](known), 20)
    for count in (1, 10, 300):
        weights = {}
        for i in range(count):
            weight = weights[f"table {i}"] = torch.nn.Parameter(torch.zeros(100, 16, device=device))
            weight.grad = sparse(torch.tensor([i % 100]).cuda(), torch.ones(1, 16).cuda(), 100)
        optimizer = SparseAdamW(weights)
        figures[f"step_of_{count}_tables_us"] = host_us(optimizer.step, 1)
    return figures


def device_time() -> Figures:
    """Time of a step on the GPU and the share of copy bandwidth that it makes of its least bytes.

    A step of N gradient rows of width D that touches U rows reads each gradient (4 N D bytes) and
    its row number (8 N), and reads and writes weights and moments (24 U D).
    """
    num_rows, sets = 1 << 22, 4
    bandwidth = copy_bandwidth()
    figures: Figures = {"copy_GB_per_s": round(bandwidth / 1e9, 1)}
    for dim in (64, 128):
        weight = torch.nn.Parameter(torch.full((num_rows, dim), 0.01, device="cuda"))
        optimizer = SparseAdamW({"table": weight})
        for count in (65_536, 1_048_576):
            rows = [torch.randint(num_rows, (count,), device="cuda") for _ in range(sets)]
            values = [torch.randn(count, dim, device="cuda") for _ in range(sets)]
            grads = [sparse(*pair, num_rows) for pair in zip(rows, values, strict=True)]
            turn = iter(range(1 << 30))

            def step() -> None:
                weight.grad = grads[next(turn) % sets]  # noqa: B023
                optimizer.step()  # noqa: B023

            seconds = gpu_seconds(step)
            touched = rows[0].unique().numel()
            floor = 24 * touched * dim + 4 * count * dim + 8 * count
            figures[f"N={count} D={dim}"] = {
                "step_us": round(1e6 * seconds, 1),
                "touched": touched,
                "floor_bytes": floor,
                "of_copy_bandwidth": round(floor / seconds / bandwidth, 3),
            }
    figures["peak_memory_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    return figures


# ---------------------------------------------------------------------- parts: other programs


def gpu_tests() -> Figures:
    """The tests marked gpu."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", f"--junitxml={junit}", "tests"]
        # torch says so when it is imported, where the package is there, as in NVIDIA's containers.
        command += ["-W", "ignore:The pynvml package is deprecated:FutureWarning"]
        status, output = run_command(command, TEST_LIMIT)
        require(status is not None, f"no end after {TEST_LIMIT:.0f} s: {tail(output)}")
        require(junit.exists(), f"pytest ended with status {status}: {tail(output)}")
        figures = read_junit(junit.read_text(encoding="utf-8"))
    failed = figures["failed"]
    if failed:
        text = f"{len(failed)} failed: {', '.join(failed[:20])}\n{tail(output)}"
        raise CheckFailed(text, figures)
    if not figures["passed"]:
        raise CheckFailed(f"no test ran:\n{tail(output)}", figures)
    require(status == 0, f"pytest ended with status {status}: {tail(output)}")
    return figures


def read_junit(text: str) -> Figures:
    """What pytest's ``--junitxml`` says: how many passed, which failed, why others did not run."""
    passed, failed, skipped = 0, [], Counter()
    for case in ElementTree.fromstring(text).iter("testcase"):
        name = "::".join(filter(None, [case.get("classname"), case.get("name")]))
        reason = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif reason is not None:
            skipped[reason.get("message") or "no reason"] += 1
        else:
            passed += 1
    failed = list(dict.fromkeys(failed))  # a test that fails at its end too is listed twice
    return {"passed": passed, "failed": failed, "skipped": dict(skipped)}


# ---------------------------------------------------------------------- running the parts

#: Parts that use the GPU themselves: each runs in a process of its own.
IN_A_PROCESS = (
    environment,
    compilation,
    zero_copy,
    no_sync,
    steady_state,
    graph_replay,
    training_graph,
    side_stream,
    determinism,
    accuracy,
    untouched,
    host_overhead,
    device_time,
    short_case,
)


#: In this order: what is cheap and explains the most comes first. The tests leave compiled kernels
#: in CuPy's cache, without which the sanitizer would take long.
PARTS: dict[str, Callable[[], Figures]] = {
    **{
        part.__name__: in_a_process(
            __file__, part.__name__, COMPILATION_LIMIT if part == compilation else LIMIT
        )
        for part in IN_A_PROCESS
        if part != short_case
    },
    "gpu_tests": gpu_tests,
    "memcheck": lambda: sanitizer("memcheck", __file__),
    "racecheck": lambda: sanitizer("racecheck", __file__),
    "synccheck": lambda: sanitizer("synccheck", __file__),
    "initcheck": lambda: sanitizer("initcheck", __file__),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-check.json"), help="the report (%(default)s)"
    )
    parser.add_argument(
        "--only",
        metavar="PART",
        nargs="+",
        choices=list(PARTS),
        default=list(PARTS),
        help=f"run these parts: {', '.join(PARTS)}",
    )
    parser.add_argument(
        "--short-case", action="store_true", help="run only what compute-sanitizer watches, here"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    reason = why_no_gpu()
    if reason:
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 2
    if options.part:
        work = {part.__name__: part for part in IN_A_PROCESS}[options.part]
        answer_part(work, options.output)
        return 0
    if options.short_case:
        print(short_case())
        return 0
    report = run_parts({name: PARTS[name] for name in options.only}, options.output)
    print(f"\n{report['result'].upper()}; the figures are in {options.output}")
    return 1 if report["result"] == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())
