"""Puts small faults into the CUDA engine, one at a time: does an emulated test catch each?

    python tests/mutate.py                  # all (about an hour on two cores), as a table
    python tests/mutate.py --only ticket    # those whose name contains "ticket"

A mutation (mutations.txt) replaces one piece of text, which must occur exactly once, in a copy of
the source tree; the tests marked `emulated` run there until one fails. A mutant that none catches
survives, unless it is listed as equivalent; then it must.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("mutations.txt")
#: Tests that know the kernels best, so that most mutants die early; the others follow.
FIRST = [
    "test_emulated_update.py",
    "test_emulated_untouched.py",
    "test_emulated_tables.py",
    "test_emulated_host.py",
    "test_update.py",
]
FIRST_FOR = {
    "cuda_src/hash_table.cu": ["test_index.py", "test_emulated_tables.py"],
    "cuda_src/random.cuh": ["test_initializers.py", "test_emulated_tables.py"],
    "cuda_src/rows.cu": ["test_index.py", "test_emulated_update.py"],
    "cuda_src/untouched.cu": ["test_emulated_untouched.py"],
    "cuda_src/untouched.cuh": ["test_emulated_untouched.py"],
}
#: These test the emulator, with kernels of their own.
LEFT_OUT = re.compile(r"tests/emulator/")
#: In the compiled source of a mutant, by which its entries in the emulator's cache are found.
MARK = f"// a mutant of tests/mutate.py {os.getpid()}\n"


RUNNING: set[subprocess.Popen[bytes]] = set()


class Mutation(NamedTuple):
    """One fault."""

    file: str  # from the repository's root
    name: str
    old: str
    new: str
    equivalent: str = ""  # why no test can tell it from the original


class Result(NamedTuple):
    mutation: Mutation
    test: str  # "" if none failed
    how: str


def mutations() -> Iterator[Mutation]:
    """Those of mutations.txt: parted by empty lines, each a name, then lines marked

    - the old text, + the new one, = why they are equivalent.
    """
    file = ""
    for part in LIST.read_text(encoding="utf-8").strip().split("\n\n"):
        name, *lines = part.splitlines()
        if name.startswith("file: "):
            file = name.removeprefix("file: ")
            continue
        old, new, why = ("\n".join(line[2:] for line in lines if line[0] == mark) for mark in "-+=")
        yield Mutation(file, name, old, new, why)


def misplaced(chosen: list[Mutation]) -> list[str]:
    """Names of those whose old text is not in its file exactly once."""
    text = {m.file: (ROOT / m.file).read_text(encoding="utf-8") for m in chosen}
    return [f"{m.file}: {m.name}" for m in chosen if text[m.file].count(m.old) != 1]


# ---------------------------------------------------------------------- running them


def copy_to(folder: Path) -> None:
    """The source tree. The kernels are found within the package, wherever that is installed."""
    ignored = shutil.ignore_patterns("__pycache__", ".*", "build", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=ignored, symlinks=True)
    link = folder / "cupy_sparse_adamw/cuda_src"
    if not link.exists():
        link.symlink_to(folder / "cuda_src", target_is_directory=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # the leader of a session of its own
        process.wait()


def pytest(folder: Path, arguments: list[str], limit: float) -> tuple[int | None, str]:
    """The exit code, None after the limit, and what was printed."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "emulated"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTEST_ADDOPTS": ""}
    with (folder / "output").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        RUNNING.add(process)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill(process)
            RUNNING.remove(process)
        output.seek(0)
        return code, output.read()


def test_files(folder: Path) -> list[str]:
    """Those with emulated tests, except the emulator's own, the first of them first."""
    code, output = pytest(folder, ["--collect-only", "-q"], 300)
    if code:
        sys.exit(f"the tests cannot be collected:\n{output[-4000:]}")
    found = dict.fromkeys(re.findall(r"^(tests/.*?\.py)::", output, re.MULTILINE))
    files = [file for file in found if not LEFT_OUT.match(file)]
    return sorted(files, key=lambda file: (*[file != f"tests/{name}" for name in FIRST], file))


def first_failure(folder: Path, code: int | None, output: str) -> tuple[str, str]:
    """The test that failed, if one did, and how."""
    if code == 0:
        return "", ""
    started = re.findall(r"^(tests/\S+::.*?)(?: PASSED| *$)", output, re.MULTILINE)
    last = started[-1] if started else "?"
    if code is None:
        return last, "hangs"
    if code < 0:
        return last, f"dies of {signal.Signals(-code).name}"
    report = folder / "report.xml"
    for case in ET.parse(report).iter("testcase") if report.exists() else ():
        for problem in [*case.iter("failure"), *case.iter("error")]:
            test = f"{case.get('classname', '').rpartition('.')[2]}.py::{case.get('name')}"
            return test, kind_of(problem.get("message", "") + "\n" + (problem.text or ""))
    return last, "pytest fails: " + " ".join(output.split()[-30:])


def kind_of(message: str) -> str:
    first = message.partition("\n")[0]
    if "Fault: " in first:
        return first.partition("Fault: ")[2].partition(":")[0]
    if first.startswith(("AssertionError", "assert")):
        return "wrong value"
    if "does not compile" in message:
        return "does not compile"
    if first.startswith("Failed: DID NOT RAISE"):
        return "an error is not raised"
    if re.match(r"TypeError: \w+: argument", first):
        return "argument error"
    return first.partition(":")[0].rpartition(".")[2] or "?"


def run(mutation: Mutation | None, folder: Path, files: list[str], limit: float) -> Result:
    """The tests on the mutant (or on the original), whose file is as before afterwards."""
    if mutation is None:
        code, output = pytest(folder, ["-v", "-x", "--junitxml=report.xml", *files], 4 * limit)
        return Result(Mutation("", "", "", ""), *first_failure(folder, code, output))
    first = [f"tests/{name}" for name in FIRST_FOR.get(mutation.file, [])]
    files = sorted(files, key=lambda file: first.index(file) if file in first else len(first))
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    mark = "" if path.suffix == ".py" else f"\n{MARK}"
    path.write_text(text.replace(mutation.old, mutation.new) + mark, encoding="utf-8")
    try:
        (folder / "report.xml").unlink(missing_ok=True)
        code, output = pytest(folder, ["-v", "-x", "--junitxml=report.xml", *files], limit)
        return Result(mutation, *first_failure(folder, code, output))
    finally:
        path.write_text(text, encoding="utf-8")


def clean_cache() -> None:
    """Mutants' kernels are of no use again."""
    cache = Path(tempfile.gettempdir()) / f"cupy-sparse-adamw-emulator-{os.getuid()}"
    for source in cache.glob("*/kernels.cu"):
        if MARK in source.read_text(encoding="utf-8"):
            shutil.rmtree(source.parent, ignore_errors=True)


def run_all(chosen: list[Mutation], jobs: int, limit: float) -> Iterator[Result]:
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        folders: queue.Queue[Path] = queue.Queue()
        for number in range(jobs):
            folder = Path(temporary) / str(number)
            copy_to(folder)
            folders.put(folder)
        files = test_files(folder)
        began = time.monotonic()
        original = run(None, folder, files, limit)
        if original.test:
            sys.exit(f"without a mutation {original.test} fails: {original.how}")
        seconds = time.monotonic() - began
        print(f"the original passes, {seconds:.0f} s: {', '.join(files)}", file=sys.stderr)
        limit = max(limit, 3 * seconds)

        def task(mutation: Mutation) -> Result:
            folder = folders.get()
            try:
                return run(mutation, folder, files, limit)
            finally:
                folders.put(folder)

        with ThreadPoolExecutor(jobs) as pool:
            results = pool.map(task, chosen)
            try:
                yield from results
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in tuple(RUNNING):
                    kill(process)
                raise


# ---------------------------------------------------------------------- the table


def code(words: list[str]) -> str:
    text = " ".join(words).replace("|", "\\|")
    return f"`{text}`" if text else "nothing"


def difference(old: str, new: str) -> str:
    """Old and new code; of long ones, without the words that both begin and end with."""
    a, b = old.split(), new.split()
    while len(" ".join(a)) > 70 and b[:1] == a[:1]:
        a, b = a[1:], b[1:]
    while len(" ".join(a)) > 70 and b[-1:] == a[-1:]:
        a, b = a[:-1], b[:-1]
    return f"{code(a)} → {code(b)}"


def row(number: int, result: Result) -> str:
    mutation, test, how = result
    if mutation.equivalent:
        test, how = (f"**{test}**", how) if test else ("equivalent", mutation.equivalent)
    test = test.replace(".py::", "::").replace("|", "\\|") or "**none**"
    file = mutation.file.rpartition("/")[2]
    change = difference(mutation.old, mutation.new)
    return f"| {number} | {file} | {mutation.name}: {change} | {test} | {how} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", default=[], help="part of a name")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument(
        "--limit",
        type=float,
        default=300,
        help="seconds a mutant may take, or three times the original's",
    )
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by way of every finally
    chosen = [m for m in mutations() if not given.only or any(x in m.name for x in given.only)]
    if not chosen:
        sys.exit(f"no mutation is called {' or '.join(given.only)}")
    if bad := misplaced(chosen):
        sys.exit("the old text does not occur exactly once:\n" + "\n".join(bad))
    print("| | file | mutation | caught by | how |\n|-:|---|---|---|---|")
    wrong = []
    try:
        for number, result in enumerate(run_all(chosen, given.jobs, given.limit), 1):
            print(row(number, result), flush=True)
            if bool(result.test) == bool(result.mutation.equivalent):
                wrong.append(result.mutation.name)
    finally:
        clean_cache()
    equivalent = sum(bool(m.equivalent) for m in chosen)
    print(
        f"\n{len(chosen)} mutations: {len(chosen) - equivalent - len(wrong)} caught, "
        f"{equivalent} equivalent, {len(wrong)} survived or not equivalent."
    )
    if wrong:
        sys.exit("not as expected: " + ", ".join(wrong))


if __name__ == "__main__":
    main()
