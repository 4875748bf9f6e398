"""What the benchmarks share: ``--quick``, the environment in the results, how a case is run."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy
import pytest
import timing
import torch
from cases import CHECKED, SETS, Case, Workload
from rivals import RIVALS, Contender, GatherScatter, Ours, SparseAdam, enter

#: Of the memory that is free when a case begins, what its tables may take.
SHARE_OF_MEMORY = 0.8

#: The rivals of ``--quick``: what people use today, and the one that comes closest to us.
QUICK_RIVALS = (SparseAdam, GatherScatter)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="only the cases marked quick, with fewer rivals: what CI compares with the baseline",
    )
    parser.addoption(
        "--tiny",
        action="store_true",
        help="tables and batches 64 times as small, 3 rounds: to try the code; times mean nothing",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: also run with --quick")
    # Said when every benchmark failed: as an error it would hide why.
    config.addinivalue_line("filterwarnings", "default:Not saving anything")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--quick``, keep what is marked quick."""
    if config.getoption("--quick"):
        kept = [item for item in items if item.get_closest_marker("quick")]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Say what the figures hold for."""
    machine_info["selection"] = selection(config)
    machine_info["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    machine_info["threads"] = torch.get_num_threads()
    machine_info["last_level_cache"] = _last_level_cache()
    machine_info["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "unset")
    machine_info["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "numpy": numpy.__version__,
        "fbgemm": _fbgemm_version(),
    }


def selection(config: Any) -> str:
    """Which of the cases these are: "tiny", "quick" or "all"."""
    return next((name for name in ("tiny", "quick") if config.getoption(f"--{name}")), "all")


def _fbgemm_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("fbgemm-gpu-cpu")
    except metadata.PackageNotFoundError:
        return "not installed"


def cache_bytes() -> int:
    """Bytes of the last-level cache; 0 where the system does not say."""
    size = _last_level_cache()
    units = {"K": 1 << 10, "M": 1 << 20}
    return int(size[:-1]) * units[size[-1]] if size[-1] in units else 0


def _last_level_cache() -> str:
    """Size of the largest cache of the first core, as the system words it, or "unknown"."""
    sizes = sorted(
        (int(path.parent.joinpath("level").read_text()), path.read_text().strip())
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    )
    return sizes[-1][1] if sizes else "unknown"


def free_memory() -> float:
    """Bytes that may be taken; without bound where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return SHARE_OF_MEMORY * next(
        1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")
    )


@pytest.fixture(scope="session")
def copy(request: pytest.FixtureRequest) -> timing.Copy:
    return timing.Copy(0 if request.config.getoption("--tiny") else cache_bytes())


@pytest.fixture
def shrink(request: pytest.FixtureRequest) -> Callable[[Case], Case]:
    """A case as it is to be run: smaller with ``--tiny``."""

    def shrunk(case: Case) -> Case:
        if not request.config.getoption("--tiny"):
            return case
        rows = max(case.rows // 64, 64)
        return case._replace(rows=rows, count=max(case.count // 64, 1))

    return shrunk


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return 3 if request.config.getoption("--tiny") else timing.ROUNDS


@pytest.fixture
def run_case(
    request: pytest.FixtureRequest,
    benchmark: Any,
    copy: timing.Copy,
    shrink: Callable[[Case], Case],
    rounds: int,
) -> Callable[..., None]:
    """Time one step of a case beside all rivals that can, and note the figures."""

    def run(case: Case, sweep: tuple[str, float] | None = None, cold: bool = True) -> None:
        work = Workload(shrink(case))
        kinds = QUICK_RIVALS if request.config.getoption("--quick") else RIVALS
        built, missing = enter(work, (Ours, *kinds), free_memory())
        if not built or not isinstance(built[0], Ours):
            pytest.skip(f"{case.name}: {missing[Ours.name]}")
        ours, rivals = built[0], list[Contender](built[1:])
        work.release()
        if cold:
            race = timing.Race(ours, [copy, *rivals], rounds, warmup=SETS - CHECKED, met=CHECKED)
        else:  # too short for a floor, and on one thread; so short that many rounds are cheap
            race = timing.Race(ours, rivals, 10 * rounds, wait=0.0)
        seconds = race.run(benchmark)
        note(benchmark, request, case.name, timing.summary(race, seconds, work.floor), missing)
        if sweep is not None:
            benchmark.extra_info |= {"sweep": sweep[0], "x": sweep[1]}

    return run


def note(
    benchmark: Any,
    request: pytest.FixtureRequest,
    name: str,
    figures: dict[str, Any],
    missing: dict[str, str] | None = None,
) -> None:
    """Put a case's results where the report finds them."""
    benchmark.extra_info |= {
        "case": name,
        "quick": request.node.get_closest_marker("quick") is not None,
        "not_timed": missing or {},
        **figures,
    }
