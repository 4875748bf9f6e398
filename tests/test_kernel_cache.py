"""Compiled kernels on disk, where several processes put theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
fcntl = pytest.importorskip("fcntl", reason="this system has no locks for files")

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import sys, time
from numba.core.caching import IndexDataCacheFile
from cupy_sparse_adamw.engines.cpu._compile import jit

@jit
def half(x):
    return x / 2 + 1

def slowly(load):
    def slow(self):
        index = load(self)
        time.sleep(1.0)
        return index
    return slow

if "slowly" in sys.argv:
    IndexDataCacheFile._load_index = slowly(IndexDataCacheFile._load_index)
numbers = {"int": 5, "float": 2.5}
print("ready", flush=True)
sys.stdin.readline()
print(*[half(numbers[name]) for name in sys.argv[1:] if name in numbers])
print(sum(half.stats.cache_hits.values()))
"""


@pytest.fixture
def start(tmp_path):
    """Starts the script with arguments; it waits for a line, then prints results and hits."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    processes = []

    def run(*args):
        process = subprocess.Popen(
            [sys.executable, str(script), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def test_kernels_that_two_processes_compile_at_a_time_are_both_found(start):
    """Numba alone may give both one number, and find the one's code for the other's types."""
    both = [start("int", "slowly"), start("float", "slowly")]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0] for process in both] == ["3.5\n0\n", "2.25\n0\n"]
    found, _ = start("int", "float").communicate("\n", timeout=60)
    assert found == "ready\n3.5 2.25\n2\n"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    from cupy_sparse_adamw.engines.cpu import _cache

    monkeypatch.setattr(_cache, "_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_cache, "LOCK_S", 0.05)
    return _cache


def test_a_kernel_is_not_kept_while_another_process_keeps_one(cache):
    with cache._turn() as first, cache._turn() as second:  # opens the file, as that one does
        assert (first, second) == (True, False)
    with cache._turn() as third:
        assert third


def test_a_child_that_was_forked_meanwhile_does_not_hold_the_lock(cache, monkeypatch):
    kept, flock = [], fcntl.flock

    def fork_then_flock(file, operation):
        kept.append(os.dup(file))  # what a child has of it
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", fork_then_flock)
    for _ in range(2):
        with cache._turn() as is_ours:
            assert is_ours
    for file in kept:
        os.close(file)
