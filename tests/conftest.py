"""What every test shares: the gpu marker, a fixed seed, and a closing list of what was skipped."""

from __future__ import annotations

import contextlib
import functools
import signal
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator

import emulator
import pytest
import torch

from cupy_sparse_adamw import functional
from cupy_sparse_adamw.row_bound import RowBound

ENGINES = [
    "reference",
    "cpu",
    pytest.param("emulated", marks=pytest.mark.emulated),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on every engine, its tensors on the engine's device.

    "emulated" is the CUDA engine on CPU tensors: its kernels run on the CPU (tests/emulator).
    """
    device = "cuda" if request.param == "cuda" else "cpu"
    with contextlib.ExitStack() as stack:
        if request.param == "emulated":
            emulator.load_engine()
            stack.enter_context(emulator.active())
        stack.enter_context(functional.use_engine(request.param))
        stack.enter_context(torch.device(device))
        yield request.param


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CUDA engine on CPU tensors, and as on a GPU reading the number of rows waits."""
    monkeypatch.setattr(RowBound, "reading_waits", lambda bound: True)
    emulator.load_engine()
    with emulator.active(), functional.use_engine("emulated"):
        yield


@functools.cache
def why_no_gpu() -> str | None:
    """The reason why tests marked gpu cannot run here, or None where they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings(record=True) as said:  # of a driver that is too old, say
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if not found:
        return "; ".join(
            [f"torch {torch.__version__} finds no CUDA device", *(str(w.message) for w in said)]
        )
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        return f"CuPy cannot be imported ({error}); install cupy-cuda12x or cupy-cuda13x"
    except Exception as error:  # whatever it is, it is the reason
        return f"CuPy does not work here: {error}"
    try:
        functional.load_engine("cuda")
    except RuntimeError as error:
        return str(error)
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked gpu where there is no GPU, and emulated ones where none can be played."""
    if item.get_closest_marker("gpu") and (reason := why_no_gpu()):
        pytest.skip(reason)
    if item.get_closest_marker("emulated") and (reason := emulator.available()):
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where a shell has the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the skipped tests by reason: a skip is something that nobody has tested."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        by_reason[str(reason).removeprefix("Skipped: ")].append(report.nodeid)
    terminalreporter.section("untested here (skipped)")
    if not by_reason:
        terminalreporter.write_line("nothing was skipped")
    for reason, names in by_reason.items():
        terminalreporter.write_line(f"{len(names)} × {reason}")
        for name, cases in Counter(name.partition("[")[0] for name in names).items():
            terminalreporter.write_line(f"    {name}" + (f" ({cases} cases)" if cases > 1 else ""))
