"""How fast the CUDA engine is on this GPU, beside everyone else: ``make bench-gpu``.

It needs torch built for CUDA, CuPy, NumPy and pytest, and neither a network nor an install; a rival
that cannot be imported is left out, with the reason. It ends within 8 minutes: what has not begun
by then is not run. Each part runs in a process of its own. The result is printed, with each goal
beside what was reached, and written as JSON after every part.

Times are of the GPU, between two events around a step that the host had put in the queue in
time, medians of 20 rounds in which all rivals take turns, on the same gradients. The L2 cache holds
nothing of use: gradient sets rotate, and a buffer of four times its size is read before each step.
Our own steps run while any operation of torch's that waits for the GPU raises.

"of the floor" is what an ideal step takes, as a share of the step's time: the bytes 24 U D + 4 N D
+ 8 N (U touched rows, N gradients of width D, fp32) over the bandwidth of a copy of 1 GiB, read
plus written, measured in the same process.

Exit status: 0 if every part ran, whether goals were reached or not, 1 if one failed, 2 where no GPU
can be used, which a sentence explains.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests"), str(Path(__file__).parent)]

try:
    import gpu_harness
    import torch
    from conftest import why_no_gpu
    from gpu_harness import (
        ROOT,
        Figures,
        NotRun,
        Work,
        answer_part,
        captured,
        copy_bandwidth,
        environment,
        gpu_times,
        host_seconds,
        in_a_process,
        kernel_times,
        peak_bytes,
        run_parts,
        warm_up,
    )
    from gpu_rivals import OWN, PACKAGES, TORCHS, WHOLE_TABLES, Case, Rival, ours

    from cupy_sparse_adamw import HashTable, NormalInitializer, SparseAdamW, _doctor
except ImportError as missing:
    if __name__ != "__main__":
        raise
    print(
        f"bench-gpu: {missing}; it needs torch built for CUDA, CuPy, NumPy and pytest, and this "
        f"folder on PYTHONPATH",
        file=sys.stderr,
    )
    sys.exit(2)

#: Seconds after which a part is stopped, and after which none begins any more.
LIMIT = 120.0
BUDGET = 450.0

OURS = "SparseAdamW"


@dataclasses.dataclass
class Sizes:
    """How large the cases are. The tests make them small."""

    copy_bytes: int = 1 << 30
    rounds: int = 20
    sets: int = 4  # of gradients, in turn
    # The case that others publish: FBGEMM 1.005 ms for backward and Adam, dynamicemb 0.847 ms
    # without removing duplicates, on an H100.
    tables: int = 10
    ids: int = 104_857  # of each table
    unique: int = 35_028
    table_rows: int = 500_000
    dim: int = 128
    # Other cases: one table.
    rows: int = 1 << 22
    distinct: int = 1 << 20
    many_tables: int = 1000
    many_ids: int = 1024
    many_rows: int = 10_000
    many_dim: int = 64
    batch: int = 1 << 18
    touched: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000, 10_000_000)
    narrow: tuple[int, ...] = (8, 16, 32, 64)
    known_ids: int = 1 << 20
    lookups: int = 1 << 16


SIZES = Sizes()

# ---------------------------------------------------------------------- what parts are made of


def randint(high: int, size: int) -> torch.Tensor:
    return torch.randint(high, (size,), device=gpu_harness.DEVICE)


def distinct_rows(num_rows: int, size: int) -> torch.Tensor:
    """Rows [size] int64, all different, in random order."""
    return torch.randperm(num_rows, device=gpu_harness.DEVICE)[:size]


def with_duplicates(num_rows: int, size: int, unique: int) -> torch.Tensor:
    """Rows [size] int64, so many of them different, in random order."""
    pool = distinct_rows(num_rows, unique)
    rows = torch.cat([pool, pool[randint(unique, size - unique)]])
    return rows[torch.randperm(size, device=rows.device)]


def zipf_rows(num_rows: int, size: int, exponent: float) -> torch.Tensor:
    """Rows [size] int64 whose frequencies follow Zipf's law, hot rows lying apart."""
    ranks = torch.arange(1, num_rows + 1, dtype=torch.float64, device=gpu_harness.DEVICE)
    shares = (ranks**-exponent).cumsum(0)
    draws = torch.rand(size, dtype=torch.float64, device=ranks.device) * shares[-1]
    place = torch.searchsorted(shares, draws).clamp_(max=num_rows - 1)
    return torch.randperm(num_rows, device=ranks.device)[place]


def one_table(num_rows: int, dim: int, draw: Callable[[], torch.Tensor], **options: Any) -> Case:
    """A case of one table, its sets drawn one after another."""
    return Case([num_rows], dim, [[draw()] for _ in range(SIZES.sets)], **options)


def goal(what: str, reached: float, limit: float, unit: str = "", at_most: bool = True) -> Figures:
    """What is to be reached, and what was."""
    return {
        "what": what,
        "goal": f"{'≤' if at_most else '≥'} {limit:g}{unit and ' ' + unit}",
        "reached": float(f"{reached:.4g}"),
        "is_met": bool(reached <= limit if at_most else reached >= limit),
    }


def bandwidth() -> float:
    return copy_bandwidth(SIZES.copy_bytes)


def rivals_of(
    case: Case, makers: Mapping[str, Callable[[Case], Rival]]
) -> tuple[dict[str, Rival], dict[str, str]]:
    """Those that can be made here and take a step, and why the others cannot."""
    made, reasons = {}, {}
    for name, maker in makers.items():
        try:
            rival = maker(case)
            work = rival.work(0)
            work.prepare()
            work.run()
            torch.cuda.synchronize()
        except Exception as error:  # another package's, or memory that is short: said, not fatal
            reasons[name] = f"{type(error).__name__}: {error}"[:500]
            torch.cuda.empty_cache()
        else:
            made[name] = rival
    return made, reasons


def compare(case: Case, makers: Mapping[str, Callable[[Case], Rival]]) -> Figures:
    """Times of a step: ours and those of rivals in turns, in microseconds, and the floor."""
    rivals, reasons = rivals_of(case, makers)
    works = {OURS: ours(case).rotating(SIZES.sets)}
    works |= {name: rival.rotating(SIZES.sets) for name, rival in rivals.items()}
    figures: Figures = describe(case)
    figures["us"], figures["quartiles_us"] = {}, {}
    for name, seconds in gpu_times(works, SIZES.rounds).items():
        figures["us"][name] = microseconds(statistics.median(seconds))
        quartiles = statistics.quantiles(seconds, n=4)
        figures["quartiles_us"][name] = [microseconds(quartiles[k]) for k in (0, 2)]
    own = figures["us"][OURS]
    figures["ratio"] = {name: round(us / own, 2) for name, us in figures["us"].items()}
    if reasons:
        figures["not_run"] = reasons
    return figures


def describe(case: Case) -> Figures:
    return {
        "tables": len(case.weights),
        "D": case.dim,
        "gradient_rows": case.size,
        "touched_rows": case.touched,
        "floor_bytes": case.floor_bytes(),
    }


def microseconds(seconds: float) -> float:
    return round(1e6 * seconds, 2)


def add_floor(figures: Figures, bytes_per_second: float) -> Figures:
    """Put the floor beside the times of ``compare``."""
    floor = 1e6 * figures["floor_bytes"] / bytes_per_second
    figures["floor_us"] = round(floor, 2)
    figures["of_the_floor"] = {
        name: round(floor / us, 3) for name, us in figures["us"].items() if us
    }
    return figures


def anatomy(case: Case) -> Figures:
    """Our step taken apart: eager and as a graph, by kernel, on the host, and its memory."""
    rival = ours(case)
    work, tables = rival.rotating(SIZES.sets), len(case.weights)
    extra = peak_bytes(work)
    host = host_seconds(work)
    figures: Figures = {
        "host_us": microseconds(host),
        "host_us_per_table": round(1e6 * host / tables, 3),
        "extra_bytes": extra,
        "extra_bytes_per_gradient_row": round(extra / case.size, 2),
    }
    try:
        kernels = kernel_times(work)
    except Exception as error:  # the profiler needs rights that not every container has
        figures["kernels"] = f"{type(error).__name__}: {error}"[:500]
    else:
        figures["kernels"] = {
            name: {"times": times, "us": microseconds(seconds)}
            for name, (times, seconds) in sorted(kernels.items(), key=lambda x: -x[1][1])
        }
        figures["kernels_us"] = microseconds(sum(seconds for _, seconds in kernels.values()))
    first = rival.work(0)
    first.prepare()
    warm_up(first.run)
    graph = captured(first.run)
    works = {"eager": first, "graph": Work(graph.replay)}
    for name, seconds in gpu_times(works, SIZES.rounds).items():
        figures[f"{name}_us"] = microseconds(statistics.median(seconds))
    return figures


def memory_goal(figures: Figures, dim: int) -> Figures:
    reached = figures["extra_bytes_per_gradient_row"]
    return goal("extra memory in a step, bytes a gradient row", reached, 48 + 8 * dim / 128)


# ---------------------------------------------------------------------- parts


def correctness() -> Figures:
    """Wrong results are not worth timing."""
    problems = _doctor.check(ENGINE)
    gpu_harness.require(not problems, "; ".join(problems))
    return {"engine": ENGINE}


#: The engine for tables of the device.
ENGINE = "cuda"


def ten_tables() -> Figures:
    """The published case, against everyone."""
    size = SIZES
    rows = [
        [with_duplicates(size.table_rows, size.ids, size.unique) for _ in range(size.tables)]
        for _ in range(size.sets)
    ]
    case = Case([size.table_rows] * size.tables, size.dim, rows)
    per_second = bandwidth()
    everyone = {**TORCHS, **WHOLE_TABLES, **PACKAGES, **OWN}
    figures = add_floor(compare(case, everyone), per_second)
    figures["copy_GB_per_s"] = round(per_second / 1e9, 1)
    figures["step"] = anatomy(case)
    milliseconds = figures["us"][OURS] / 1e3
    figures["goals"] = [
        goal("10 tables, duplicates and update (H100)", milliseconds, 0.75, "ms"),
        goal("the same in a CUDA graph (H100)", figures["step"]["graph_us"] / 1e3, 0.75, "ms"),
        memory_goal(figures["step"], size.dim),
    ]
    return figures


def unique_rows() -> Figures:
    """Every row once: as it comes, and known to be coalesced, which needs no sort."""
    per_second = bandwidth()
    figures: Figures = {"copy_GB_per_s": round(per_second / 1e9, 1), "goals": []}
    for dim in (64, 128):
        for kind in ("coalesced", "any order"):
            is_coalesced = kind == "coalesced"

            def draw() -> torch.Tensor:
                rows = distinct_rows(SIZES.rows, SIZES.distinct)
                return rows.sort().values if is_coalesced else rows  # noqa: B023

            case = one_table(SIZES.rows, dim, draw, is_coalesced=is_coalesced)
            found = add_floor(compare(case, {}), per_second)
            found["step"] = anatomy(case)
            figures[f"D = {dim}, {kind}"] = found
            share = found["of_the_floor"][OURS]
            figures["goals"].append(
                goal(
                    f"unique rows, D = {dim}, {kind}: of copy bandwidth", share, 0.9, at_most=False
                )
            )
    return figures


def many_tables() -> Figures:
    """1,000 tables against one with as many rows, ids and bytes."""
    size = SIZES
    count, ids, num_rows = size.many_tables, size.many_ids, size.many_rows
    per_second = bandwidth()
    rows = [[randint(num_rows, ids) for _ in range(count)] for _ in range(size.sets)]
    many = Case([num_rows] * count, size.many_dim, rows)
    first = torch.arange(count, device=rows[0][0].device) * num_rows
    joined = [
        [(torch.stack(of_tables) + first[:, None]).view(-1)] for of_tables in rows
    ]  # the same rows of one table
    one = Case([num_rows * count], size.many_dim, joined)
    figures: Figures = {"copy_GB_per_s": round(per_second / 1e9, 1)}
    works = {"many": ours(many).rotating(size.sets), "one": ours(one).rotating(size.sets)}
    seconds = {name: statistics.median(x) for name, x in gpu_times(works, size.rounds).items()}
    for name, case in (("many", many), ("one", one)):
        found = describe(case) | {"us": {OURS: microseconds(seconds[name])}}
        figures[name] = add_floor(found, per_second) | {"step": anatomy(case)}
    figures["goals"] = [
        goal(
            f"{count:,} tables × {ids:,} ids: GPU time over one table's",
            seconds["many"] / seconds["one"],
            1.2,
        ),
    ]
    return figures


def hot_ids() -> Figures:
    """A tenth and a half of the batch are one id."""
    num_rows, batch = SIZES.rows, SIZES.batch
    per_second = bandwidth()
    figures: Figures = {"goals": []}
    for share in (0.0, 0.1, 0.5):

        def draw() -> torch.Tensor:
            rows = randint(num_rows, batch)
            rows[torch.rand(batch, device=rows.device) < share] = 7  # noqa: B023
            return rows

        case = one_table(num_rows, 64, draw)
        figures[f"{share:.0%} one id"] = add_floor(compare(case, TORCHS), per_second)
    times = [figures[key]["us"][OURS] for key in figures if key != "goals"]
    figures["goals"].append(
        goal("a tenth of the batch is one id: time over that without", times[1] / times[0], 1.3)
    )
    return figures


def zipf_sweep() -> Figures:
    """More and more duplicates, as they come in practice."""
    per_second = bandwidth()
    return {
        f"alpha = {exponent}": add_floor(
            compare(
                one_table(
                    SIZES.rows,
                    64,
                    lambda: zipf_rows(SIZES.rows, SIZES.batch, exponent),  # noqa: B023
                ),
                TORCHS,
            ),
            per_second,
        )
        for exponent in (0.0, 0.5, 1.0, 1.2, 1.5)
    }


def touched_sweep() -> Figures:
    """From a batch that the launches take longer than, to one that only bandwidth counts in."""
    per_second = bandwidth()
    figures: Figures = {}
    for touched in SIZES.touched:
        num_rows = 2 * touched if touched > SIZES.rows // 2 else SIZES.rows
        rows = [[distinct_rows(num_rows, touched)] for _ in range(SIZES.sets)]
        makers = TORCHS if touched <= SIZES.rows // 4 else {}  # memory
        figures[f"{touched:,} rows"] = add_floor(
            compare(Case([num_rows], 64, rows), makers), per_second
        )
    return figures


def dtype_sweep() -> Figures:
    """16-bit tables have 32-bit moments."""
    per_second = bandwidth()
    figures: Figures = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        case = one_table(SIZES.rows, 128, lambda: randint(SIZES.rows, SIZES.batch), dtype=dtype)
        figures[str(dtype).removeprefix("torch.")] = add_floor(compare(case, {}), per_second)
    return figures


def narrow_sweep() -> Figures:
    """Rows of few bytes: 4 threads share one of D = 16."""
    per_second = bandwidth()
    return {
        f"D = {dim}": add_floor(
            compare(one_table(SIZES.rows, dim, lambda: randint(SIZES.rows, SIZES.batch)), TORCHS),
            per_second,
        )
        for dim in SIZES.narrow
    }


def hash_table() -> Figures:
    """Lookup, backward and step against nn.Embedding's with SparseAdam; a lookup alone."""
    known, size, dim, device = SIZES.known_ids, SIZES.lookups, 64, gpu_harness.DEVICE
    table = HashTable([dim], device=device, initializer=NormalInitializer(std=0.01), name="table")
    table.reserve(known + 16 * size)  # a lookup of what may be new ids waits for no count
    for ids in torch.arange(known, device=device).split(1 << 18):
        table(ids * 7919)
    embedding = torch.nn.Embedding(known, dim, sparse=True, device=device)
    batches = [randint(known, size) for _ in range(SIZES.sets)]
    grad = torch.randn(size, dim, device=device)

    def trains(
        module: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: Sequence[torch.Tensor]
    ) -> Work:
        turn = iter(range(1 << 62))

        def step() -> None:
            module(ids[next(turn) % len(ids)]).backward(grad)
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(3):
            step()
        return Work(step)

    ids = [batch * 7919 for batch in batches]
    works = {
        OURS: trains(table, SparseAdamW({"table": table}), ids),
        "nn.Embedding + SparseAdam": trains(
            embedding, torch.optim.SparseAdam(embedding.parameters()), batches
        ),
    }
    figures: Figures = {
        "training_us": {
            name: microseconds(statistics.median(x))
            for name, x in gpu_times(works, SIZES.rounds).items()
        },
        "training_host_us": {name: microseconds(host_seconds(x)) for name, x in works.items()},
    }
    table.eval()
    turn = iter(range(1 << 62))
    weight = embedding.weight.detach()
    lookups = {
        "HashTable": Work(lambda: table(ids[next(turn) % len(ids)]), may_wait=False),
        "index_select": Work(lambda: weight.index_select(0, batches[next(turn) % len(ids)])),
    }
    with torch.no_grad():
        found = gpu_times(lookups, SIZES.rounds)
    figures["lookup_us"] = {name: microseconds(statistics.median(x)) for name, x in found.items()}
    training, lookup = figures["training_us"], figures["lookup_us"]
    figures["goals"] = [
        goal(
            "HashTable, forward + backward + step: nn.Embedding + SparseAdam over it",
            training["nn.Embedding + SparseAdam"] / training[OURS],
            5,
            at_most=False,
        ),
        goal(
            "HashTable lookup over index_select", lookup["HashTable"] / lookup["index_select"], 1.5
        ),
    ]
    return figures


# ---------------------------------------------------------------------- running the parts

#: The goals first, in case time runs out.
IN_A_PROCESS = (
    environment,
    correctness,
    ten_tables,
    unique_rows,
    many_tables,
    hash_table,
    hot_ids,
    touched_sweep,
    zipf_sweep,
    dtype_sweep,
    narrow_sweep,
)


def seeded(part: Callable[[], Figures]) -> Callable[[], Figures]:
    """The part on the same random numbers in every run."""

    def work() -> Figures:
        torch.manual_seed(0)
        return part()

    return work


def within(budget: float) -> Callable[[str], Callable[[], Figures]]:
    """Makes parts that run in a process each as long as some of so many seconds is left."""
    end = time.monotonic() + budget

    def limited(name: str) -> Callable[[], Figures]:
        def part() -> Figures:
            left = end - time.monotonic()
            if left < 10:
                raise NotRun(f"the {budget:.0f} s of a whole run are over")
            return in_a_process(__file__, name, min(LIMIT, left))()

        return part

    return limited


def goals_of(report: Figures) -> Iterable[Figures]:
    """Those of all parts."""
    for part in report["parts"].values():
        yield from part["figures"].get("goals", [])


def print_goals(report: Figures) -> None:
    """Each goal and what was reached."""
    goals = list(goals_of(report))
    width = max([len(x["what"]) for x in goals], default=0)
    print(f"\n{'what':<{width}}  {'goal':>10}  {'reached':>9}")
    for x in goals:
        met = "" if x["is_met"] else "  missed"
        print(f"{x['what']:<{width}}  {x['goal']:>10}  {x['reached']:>9g}{met}")


def print_steps(report: Figures) -> None:
    """Ours beside rivals: a line a case and rival."""
    print(f"\n{'step':<64} {'µs':>10} {'ratio':>7} {'of the floor':>13}")
    for part, outcome in report["parts"].items():
        for case, figures in outcome["figures"].items():
            if part == "ten_tables" and case == "us":
                case, figures = "", outcome["figures"]
            if not isinstance(figures, dict) or "of_the_floor" not in figures:
                continue
            for name, us in figures["us"].items():
                ratio = figures.get("ratio", {}).get(name, 1.0)
                label = f"{part} {case}: {name}".replace(" :", ":")
                print(
                    f"{label:<64} {us:>10.1f} {ratio:>7.2f} {figures['of_the_floor'][name]:>13.0%}"
                )


def results_path() -> Path:
    """Where results go: named after the card and the day."""
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name(0)).strip("-").lower()
    day = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M")
    return ROOT / "benchmarks" / "results" / f"gpu-{card}-{day}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    names = [part.__name__ for part in IN_A_PROCESS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--output", type=Path, help="the results (benchmarks/results/gpu-CARD-DAY.json)"
    )
    parser.add_argument(
        "--only", metavar="PART", nargs="+", choices=names, default=names,
        help=f"run these parts: {', '.join(names)}",
    )  # fmt: skip
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    reason = why_no_gpu()
    if reason:
        print(f"bench-gpu: {reason}", file=sys.stderr)
        return 2
    output = options.output or results_path()
    if options.part:
        answer_part(seeded({x.__name__: x for x in IN_A_PROCESS}[options.part]), output)
        return 0
    output.parent.mkdir(parents=True, exist_ok=True)
    limited = within(BUDGET)
    report = run_parts({name: limited(name) for name in options.only}, output)
    print_steps(report)
    print_goals(report)
    print(f"\n{report['result'].upper()}; the figures are in {output}")
    return 1 if report["result"] == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())
