"""``python -m cupy_sparse_adamw``: what is installed, does each engine work here, how fast is it.

Exit status 0 if every engine that should work on this machine does, else 1. ``reference`` and
``cpu`` should work everywhere, since Numba is a hard dependency; ``cuda`` should where the driver
shows a GPU. Versions are read from package metadata, so a broken package cannot break the report.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import sys
import textwrap
import traceback
from importlib import metadata
from typing import NamedTuple

import torch

from . import __version__, _doctor, functional

ENGINES = ("reference", "cpu", "cuda")
CUPY = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
NVRTC = ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")

#: 768 MB of weights and moments: far more than caches hold, and 1.5 GB for the process at most.
SIZE = _doctor.Size(rows=1_000_000, ids=65_536, dim=64)


class Answer(NamedTuple):
    """What an engine answers on this machine: a speed if it works, else why it does not."""

    engine: str
    expected: bool  # it should work here
    text: str
    speed: _doctor.Speed | None = None
    trace: str = ""


def main(size: _doctor.Size = SIZE) -> int:
    """Print the report; return the exit status.

    Args:
        size: what the speed is measured on.
    """
    print(f"cupy_sparse_adamw {__version__} on {platform.system()} {platform.machine()}\n")
    driver, gpus = cuda_driver()
    for name, version in versions(driver):
        print(f"{name:<11}{version}")

    print("\nengine     answer")
    answers = []
    for engine in ENGINES:
        print(f"{engine:<11}", end="", flush=True)  # compiling takes a while
        answers.append(examine(engine, gpus, size))
        print_answer(answers[-1])
    print_speeds(answers, size)

    for answer in answers:
        if answer.trace:
            print(f"\n{answer.engine}: {answer.trace}", file=sys.stderr)
    failed = [answer.engine for answer in answers if answer.expected and not answer.speed]
    if failed:
        print(f"FAILED: {' and '.join(failed)} should work here; see the answers above.")
        return 1
    working = [answer.engine for answer in answers if answer.speed]
    print(f"OK: every engine that should work here does: {', '.join(working)}.")
    return 0


def print_answer(answer: Answer) -> None:
    """The rest of an engine's line, and more lines if it is long."""
    state = "works: " if answer.speed else "FAILS: " if answer.expected else "not here: "
    print(textwrap.fill(state + answer.text, 85, subsequent_indent=" " * 11), flush=True)


def print_speeds(answers: list[Answer], size: _doctor.Size) -> None:
    """A table of the speeds of engines that work, and what its columns mean."""
    columns = ("gradients", "rows/s", "GB/s", "copy GB/s", "of copy")
    print(f"\n{'one step':<11}" + "".join(f"{column:>12}" for column in columns))
    for engine, _, _, speed, _ in answers:
        if speed:
            print(
                f"{engine:<11}{speed.ids:>12,}{speed.rows:>12,.0f}{speed.step_bytes / 1e9:>12.2f}"
                f"{speed.copy_bytes / 1e9:>12.2f}{speed.step_bytes / speed.copy_bytes:>12.1%}"
            )
    print(
        f"Gradients of {size.dim} float32 numbers each, for rows drawn from {size.rows:,}. rows/s: "
        f"distinct\nrows updated; GB/s: what an update must read and write; copy GB/s: what a "
        f"plain copy\nof memory reads and writes on this machine, measured in the same run.\n"
    )


def versions(driver: str) -> list[tuple[str, str]]:
    """(name, version) of what the engines stand on."""
    built = f"torch is built for {torch.version.cuda}"
    return [
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("Numba", installed("numba") or "not installed"),
        ("CuPy", installed(*CUPY) or "not installed"),
        ("CUDA", f"{built if torch.version.cuda else 'torch is built without it'}; {driver}"),
        ("NVRTC", installed(*NVRTC) or ctypes.util.find_library("nvrtc") or "not installed"),
        ("CPU", f"{os.cpu_count()} cores; torch uses {torch.get_num_threads()} threads"),
    ]


def installed(*names: str) -> str:
    """The versions of those distributions that are installed; empty if none is."""
    found = []
    for name in names:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found.append(version if len(names) == 1 else f"{version} ({name})")
    return ", ".join(found)


def cuda_driver() -> tuple[str, int]:
    """The NVIDIA driver in words, and how many GPUs it shows to this process."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return "no NVIDIA driver", 0
    version, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    if library.cuInit(0) == 0:
        library.cuDeviceGetCount(ctypes.byref(count))
    newest = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return f"the driver runs up to {newest}; GPUs: {count.value}", count.value


def examine(engine: str, gpus: int, size: _doctor.Size) -> Answer:
    """Load an engine, compile its kernels, check its results, measure its speed."""
    expected = engine != "cuda" or gpus > 0
    try:
        functional.load_engine(engine)
        if engine == "cuda":
            torch.cuda.init()  # raises why torch cannot use the GPU
    except Exception as error:
        cause = first_line(error.__cause__ or error)
        return Answer(engine, expected, why_not(engine, gpus, cause))
    try:
        problems: list[str] = []
        first = _doctor.seconds(lambda: problems.extend(_doctor.check(engine)))
        if problems:
            return Answer(engine, expected, "wrong results: " + "; ".join(problems))
        again = _doctor.seconds(lambda: _doctor.check(engine))
        if engine == "reference":
            size = size._replace(ids=size.ids // 8)  # all of them take it a second
        elif engine == "cuda":
            size = size._replace(ids=size.ids * 8)  # fewer leave a GPU waiting for its launches
        speed = _doctor.measure(engine, size)
    except Exception as error:  # whatever it is, the engine does not work
        return Answer(engine, expected, first_line(error), trace=traceback.format_exc())
    ready = f"kernels compiled, or loaded from disk, in {max(first - again, 0.0):.1f} s; "
    text = f"{'' if engine == 'reference' else ready}results are right"
    return Answer(engine, expected, text, speed)


def first_line(error: BaseException) -> str:
    """An exception as the end of a traceback shows it, cut to one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def why_not(engine: str, gpus: int, cause: str) -> str:
    """Why an engine cannot load, and what to install if that is all."""
    if engine == "cpu":
        return f"this package needs Numba: pip install numba ({cause})"
    if engine != "cuda":
        return cause
    if not gpus:
        return "no NVIDIA GPU that this process may use"
    if torch.version.cuda is None:
        return (
            f"there is a GPU, but torch {torch.__version__} is built without CUDA: install one "
            f"that is built with it (pytorch.org), or hide the GPU (CUDA_VISIBLE_DEVICES='')"
        )
    cupys = installed(*CUPY)
    if not cupys:
        wanted = "cupy-cuda12x nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12"
        if torch.version.cuda.startswith("13."):
            wanted = "cupy-cuda13x nvidia-cuda-nvrtc nvidia-cuda-runtime"
        return f"there is a GPU, but CuPy is not installed: pip install {wanted} ({cause})"
    if "," in cupys:
        return f"there is a GPU, but two CuPys break each other: uninstall one ({cause})"
    return f"there is a GPU, but: {cause}"


if __name__ == "__main__":
    sys.exit(main())
