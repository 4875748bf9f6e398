"""benchmarks/gpu_check.py where there is no GPU: what it says, and how it runs its parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_check
import gpu_harness
import gpu_sanitizer
from gpu_harness import ROOT, CheckFailed, NotRun

JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites name="pytest tests"><testsuite name="pytest" errors="1" failures="1" tests="6">
<testcase classname="tests.test_gpu" name="test_a[1]" time="0.1"/>
<testcase classname="tests.test_gpu" name="test_a[2]" time="0.1"><failure message="m">t</failure>
</testcase>
<testcase classname="tests.test_gpu" name="test_a[2]" time="0.1"><error message="m">t</error>
</testcase>
<testcase classname="" name="tests.test_b" time="0.0"><error message="collection failure">t</error>
</testcase>
<testcase classname="tests.test_gpu" name="test_c" time="0.0"><skipped message="one GPU">t</skipped>
</testcase>
<testcase classname="tests.test_gpu" name="test_d" time="0.0"><skipped message="one GPU">t</skipped>
</testcase>
</testsuite></testsuites>
"""


@pytest.mark.parametrize(
    ("script", "name"), [("gpu_check.py", "gpu-check"), ("gpu_bench.py", "bench-gpu")]
)
def test_without_a_gpu_it_says_so_and_writes_nothing(script, name, tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, "--output", tmp_path / "result.json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"{name}: torch ")
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path):
    code = (
        "import runpy, sys; sys.modules['pytest'] = None; "
        f"runpy.run_path({str(ROOT / 'benchmarks' / 'gpu_check.py')!r}, run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 2
    assert "pytest" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def passes():
    return {"speed": 3}


def fails():
    raise CheckFailed("7 is not 8", {"found": 7})


def breaks():
    raise ZeroDivisionError("in the middle")


def lacks():
    raise NotRun("no such program")


def test_a_failing_part_stops_no_other(tmp_path, capsys):
    output = tmp_path / "report.json"
    parts = {"a": fails, "b": breaks, "c": lacks, "d": passes}
    report = gpu_harness.run_parts(parts, output)
    assert json.loads(output.read_text()) == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert set(report) == {"date", "result", "parts"}
    assert report["result"] == "failed"
    assert list(report["parts"]) == list(parts)
    for outcome in report["parts"].values():
        assert set(outcome) == {"result", "seconds", "figures", "error"}
    a, b, c, d = report["parts"].values()
    assert (a["result"], a["error"], a["figures"]) == ("failed", "7 is not 8", {"found": 7})
    assert b["result"] == "failed"
    assert "ZeroDivisionError: in the middle" in b["error"]
    assert (c["result"], c["error"]) == ("not run", "no such program")
    assert (d["result"], d["error"], d["figures"]) == ("passed", "", {"speed": 3})
    printed = capsys.readouterr().out
    assert "7 is not 8" in printed
    assert '"speed": 3' in printed


def test_a_run_that_is_cut_short_leaves_what_it_found(tmp_path):
    output = tmp_path / "report.json"

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu_harness.run_parts({"a": passes, "b": interrupted}, output)
    report = json.loads(output.read_text())
    assert report["result"] == "incomplete"
    assert list(report["parts"]) == ["a"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    output = tmp_path / "report.json"
    output.write_text("old")
    with pytest.raises(TypeError):
        gpu_harness.write_json(output, {"figure": object()})
    assert output.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("part", "status", "result"),
    [(passes, 0, "passed"), (lacks, 0, "passed"), (fails, 1, "failed")],
)
def test_exit_status(monkeypatch, tmp_path, part, status, result):
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "PARTS", {"part": part, "other": fails})
    output = tmp_path / "report.json"
    assert gpu_check.main(["--output", str(output), "--only", "part"]) == status
    report = json.loads(output.read_text())
    assert report["result"] == result
    assert list(report["parts"]) == ["part"]


def test_a_part_answers_through_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "IN_A_PROCESS", (passes, fails, breaks))
    answer = tmp_path / "answer.json"

    def ask(name):
        assert gpu_check.main(["--part", name, "--output", str(answer)]) == 0
        return gpu_harness.read_answer(answer)

    assert ask("passes") == {"speed": 3}
    with pytest.raises(CheckFailed, match="7 is not 8") as failed:
        ask("fails")
    assert failed.value.figures == {"found": 7}
    with pytest.raises(CheckFailed, match="ZeroDivisionError: in the middle"):
        ask("breaks")


def test_a_part_without_an_answer_has_failed(monkeypatch):
    """Here the process finds no GPU, says so and ends."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    part = gpu_harness.in_a_process(gpu_check.__file__, "environment", 60)
    with pytest.raises(CheckFailed, match=r"ended with status 2: gpu-check: torch"):
        part()


def test_commands_see_the_package_and_end_in_time():
    code = "import sys, cupy_sparse_adamw; print('out'); sys.exit(3)"
    assert gpu_harness.run_command([sys.executable, "-c", code], 60) == (3, "out\n")
    slow = "import subprocess, sys; print('began', flush=True); subprocess.run(['sleep', '60'])"
    begin = time.perf_counter()
    status, output = gpu_harness.run_command([sys.executable, "-c", slow], 2)
    assert (status, output) == (None, "began\n")
    assert time.perf_counter() - begin < 30


def test_junit_is_read():
    figures = gpu_check.read_junit(JUNIT)
    assert figures == {
        "passed": 1,
        "failed": ["tests.test_gpu::test_a[2]", "tests.test_b"],
        "skipped": {"one GPU": 2},
    }


def answered(status, output, junit=None):
    """A stand-in for ``run_command`` that writes what pytest, or the part, would."""

    def run(command, seconds, **variables):
        for argument in command:
            if junit and argument.startswith("--junitxml="):
                Path(argument.removeprefix("--junitxml=")).write_text(junit)
        if "--part" in command and status in (0, gpu_sanitizer.FOUND):
            answer = {"figures": {"rows": 5}}
            gpu_harness.write_json(Path(command[command.index("--output") + 1]), answer)
        return status, output

    return run


@pytest.mark.parametrize(
    ("status", "junit", "complaint"),
    [
        (None, None, "no end after"),
        (4, None, "pytest ended with status 4: usage"),
        (1, JUNIT, r"2 failed: tests.test_gpu::test_a\[2\], tests.test_b"),
        (5, "<testsuites/>", "no test ran"),
    ],
)
def test_a_test_run_that_shows_nothing_fails(monkeypatch, status, junit, complaint):
    monkeypatch.setattr(gpu_check, "run_command", answered(status, "usage", junit))
    with pytest.raises(CheckFailed, match=complaint):
        gpu_check.gpu_tests()


def test_a_sanitizer_that_is_not_there_is_not_run(monkeypatch):
    monkeypatch.setattr(gpu_sanitizer.shutil, "which", lambda *args, **kwargs: None)
    assert gpu_harness.run_part(gpu_check.PARTS["racecheck"]).result == "not run"


SUMMARY = "========= ERROR SUMMARY: 0 errors"
TORCHS = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::sortKeyValueInplace<int, long>(int *, long *)+0x140
=========     by thread (31,0,0) in block (1,0,0)
========= ERROR SUMMARY: 1 error"""
OURS = TORCHS.replace("========= ERROR", "=========     at update+0x2a0\n========= ERROR")
NO_KERNEL = """========= Uninitialized access at 0x7f3c00 on access by cudaMemcpy source.
========= ERROR SUMMARY: 1 error"""
WRITE = "========= Invalid __global__ write of size 4 bytes"


@pytest.mark.parametrize(
    ("tool", "status", "output", "complaint"),
    [
        ("memcheck", 0, SUMMARY, None),
        ("memcheck", 0, "", "ended with status 0"),  # the tool itself did not work
        ("memcheck", 1, "Device not supported", "did not run, status 1: Device not supported"),
        ("memcheck", None, "", "no end after"),
        ("memcheck", gpu_sanitizer.FOUND, WRITE, "Invalid __global__ write"),
        ("memcheck", gpu_sanitizer.FOUND, TORCHS, "sortKeyValueInplace"),
        ("synccheck", 0, SUMMARY, None),
        ("synccheck", gpu_sanitizer.FOUND, TORCHS, "sortKeyValueInplace"),
        ("racecheck", gpu_sanitizer.FOUND, TORCHS, None),
        ("racecheck", gpu_sanitizer.FOUND, OURS, "at update+0x2a0"),
        ("racecheck", gpu_sanitizer.FOUND, NO_KERNEL, "ERROR SUMMARY: 1 error"),
        ("initcheck", gpu_sanitizer.FOUND, TORCHS, None),
        ("initcheck", gpu_sanitizer.FOUND, NO_KERNEL, None),
        ("initcheck", gpu_sanitizer.FOUND, OURS, "at update+0x2a0"),
        ("initcheck", gpu_sanitizer.FOUND, "", "ended with status"),
    ],
)
def test_what_a_sanitizer_says(monkeypatch, tool, status, output, complaint):
    monkeypatch.setattr(gpu_sanitizer.shutil, "which", lambda *args, **kwargs: "/sanitizer")
    monkeypatch.setattr(gpu_sanitizer, "run_command", answered(status, output))
    outcome = gpu_harness.run_part(gpu_check.PARTS[tool])
    assert outcome.figures["said"] == output.splitlines() * output.startswith("=====")
    if complaint is None:
        assert outcome.result == "passed", outcome.error
        assert outcome.figures["summary"] == [output.splitlines()[-1].strip("= ")]
        assert outcome.figures["rows"] == 5
    else:
        assert outcome.result == "failed"
        assert complaint in outcome.error
    if output == OURS:
        torchs = "void at::native::sortKeyValueInplace<int, long>(int *, long *)"
        assert outcome.figures["kernels"] == {torchs: 1, "update": 1}


@pytest.mark.parametrize(
    ("line", "kernel", "is_ours"),
    [
        ("=========     at update+0x140", "update", True),
        ("=========     at 0x00000140 in make_keys_32", "make_keys_32", True),
        ("=========     at 0x140 in sparse_adamw.cu:41:finish", "sparse_adamw.cu:41:finish", True),
        (
            "========= Error: Race reported between Write access at coalesce+0x50 in group.cu:7",
            "coalesce",
            True,
        ),
        (
            "=========     and Read access at 0x90 in find_or_claim [4 hazards]",
            "find_or_claim",
            True,
        ),
        ("=========         Device Frame: settle+0xb0", "settle", True),
        ("=========     at void at::native::update<float>(int)+0x20", None, False),
        ("=========     at finishing+0x20", "finishing", False),
        ("=========     by thread (31,0,0) in block (1,0,0)", None, False),
        ("=========     Host Frame: insert [0x1754] in libtorch_cuda.so", None, False),
        ("========= Program hit cudaErrorInvalidValue due to find in update", None, False),
    ],
)
def test_kernels_that_a_sanitizer_names(line, kernel, is_ours):
    found = gpu_sanitizer.kernel_of(line)
    assert gpu_sanitizer.is_ours(found) is is_ours
    if kernel:
        assert found == kernel


def test_every_kernel_of_ours_is_known():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "cuda_src").iterdir()]
    written_twice = 2  # update and finish, once for rows that may be behind
    count = sum(x.count('extern "C" __global__') for x in texts)
    assert len(gpu_sanitizer.our_kernels()) == count - written_twice
    assert {"update", "finish", "coalesce_finish", "make_keys_64"} <= gpu_sanitizer.our_kernels()


def test_what_explains_the_most_comes_first():
    names = list(gpu_check.PARTS)
    assert names[:2] == ["environment", "compilation"]
    assert names[-5:] == ["gpu_tests", "memcheck", "racecheck", "synccheck", "initcheck"]
