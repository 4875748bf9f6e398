"""``python -m cupy_sparse_adamw``: what it says where all is well, and where something is not."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from cupy_sparse_adamw import __main__ as doctor
from cupy_sparse_adamw import _doctor, functional
from cupy_sparse_adamw._doctor import Size

ROOT = Path(__file__).resolve().parents[1]
SMALL = Size(rows=2000, ids=400, dim=8)
pytest.importorskip("numba")  # the engine that works everywhere is the one that gets broken here
cpu = functional.load_engine("cpu")


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed: for tests of the words alone."""
    monkeypatch.setattr(_doctor, "measure", lambda engine, size: _doctor.Speed(8, 5e6, 2e9, 4e9))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, as far as the driver and torch say, without CuPy."""
    monkeypatch.setattr(doctor, "cuda_driver", lambda: ("a driver", 1))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(doctor, "CUPY", ("no-such-cupy", "nor-such-a-cupy"))


def cuda_cannot_load(monkeypatch: pytest.MonkeyPatch, cause: str) -> None:
    load = functional.load_engine

    def load_engine(name: str):
        if name != "cuda":
            return load(name)
        raise RuntimeError("the cuda engine cannot load") from ImportError(cause)

    monkeypatch.setattr(functional, "load_engine", load_engine)


def test_a_new_user_without_a_gpu():
    done = run("-m", "cupy_sparse_adamw", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    starts = [line[:11].strip() for line in lines]
    assert starts[2:9] == ["Python", "torch", "Numba", "CuPy", "CUDA", "NVRTC", "CPU"]
    assert lines[3].endswith(torch.__version__)
    assert lines[4].endswith(metadata.version("numba"))
    assert lines[starts.index("reference")] == "reference  works: results are right"
    assert lines[starts.index("cpu")].startswith("cpu        works: kernels compiled, or loaded")
    assert lines[starts.index("cuda")].startswith("cuda       not here: ")
    for engine, gradients in (("reference", "8,192"), ("cpu", "65,536")):
        (row,) = [line.split() for line in lines if line.startswith(engine) and "%" in line]
        assert row[1] == gradients
        assert all(float(x.strip("%").replace(",", "")) > 0 for x in row[2:])
    assert lines[-1] == "OK: every engine that should work here does: reference, cpu."


def test_numba_is_missing():
    code = (
        "import sys\n"
        "sys.modules['numba'] = None\n"  # so that importing it raises
        "from cupy_sparse_adamw import __main__ as doctor\n"
        "doctor._doctor.measure = lambda *_: doctor._doctor.Speed(1, 1.0, 1.0, 1.0)\n"
        f"sys.exit(doctor.main(doctor._doctor.{SMALL}))\n"
    )
    done = run("-c", code, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert "cpu FAILS: this package needs Numba: pip install numba (ModuleNotFoundError: " in text
    assert "reference works: results are right" in text
    assert done.stdout.endswith("FAILED: cpu should work here; see the answers above.\n")


def test_healthy_engines(engine):
    assert _doctor.check(engine) == []


def test_speed_is_of_the_formula(monkeypatch):
    """With every step and copy taking 2 s, rates follow from sizes alone."""
    monkeypatch.setattr(_doctor, "seconds", lambda work: (work(), 2.0)[1])
    monkeypatch.setattr(_doctor.time, "perf_counter", iter(range(0, 100, 3)).__next__)
    monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.arange(400) % 100)
    speed = _doctor.measure("cpu", SMALL)
    moved = 24 * 100 * 8 + 4 * 400 * 8 + 8 * 400  # U = 100, N = 400, D = 8
    assert speed == (400, 100 / 2.0, moved / 2.0, 2 * 1000 * 8 * 4 / 2.0)


def wrong_decay(updates, segments, right=cpu.prepare_sparse_adamw):
    for update in updates:
        update.hyper = update.hyper._replace(weight_decay=0.05)
    return right(updates, segments)


def eps_in_float16(updates, segments, right=cpu.prepare_sparse_adamw):
    for update in updates:
        update.hyper = update.hyper._replace(eps=float(torch.tensor(1e-8).half()))
    return right(updates, segments)


def touches_another_row(updates, segments, right=cpu.prepare_sparse_adamw):
    apply = right(updates, segments)

    def and_row_49():
        apply()
        for update in updates:
            update.exp_avg.values()[-1][1] += 1  # of 50

    return and_row_49


def gives_nan(updates, segments, right=cpu.prepare_sparse_adamw):
    apply = right(updates, segments)

    def and_nan():
        apply()
        for update in updates:
            update.exp_avg_sq.values()[0][0, 0] = torch.nan

    return and_nan


def reads_as_it_lies(lagging, rows):
    return cpu.gather(lagging.param, rows)


def stops_replays_too_early(lagging, rows, right=cpu.gather_current):
    if lagging.untouched == "replay":
        missed = dataclasses.replace(lagging.missed, window=5)
        lagging = dataclasses.replace(lagging, missed=missed)
    return right(lagging, rows)


def forgets_what_was_missed(updates, segments, right=cpu.prepare_sparse_adamw):
    for update in updates:
        if update.missed is not None:
            update.last_step.fill(update.missed.t)
    return right(updates, segments)


def leaves_moments(lagging, rows, right=cpu.catch_up_):
    moments = [(slot, cpu.gather(slot, rows)) for slot in (lagging.exp_avg, lagging.exp_avg_sq)]
    right(lagging, rows)
    for slot, values in moments:
        cpu.scatter_(slot, rows, values)


def does_not_note_it(lagging, rows, right=cpu.catch_up_):
    last_step = cpu.gather(lagging.last_step, rows)
    right(lagging, rows)
    cpu.scatter_(lagging.last_step, rows, last_step)


def frees_twice(index, ids, right=cpu.delete_):
    rows = right(index, ids)
    return torch.where(ids == ids[-2], rows[ids == ids[-2]].max(), rows)


def takes_nothing_out(index, ids, right=cpu.delete_):
    entries = index.entries.clone()
    rows = right(index, ids)
    index.entries.copy_(entries)
    return rows


def keeps_no_free_rows(index, ids, right=cpu.delete_):
    rows = right(index, ids)
    index.counters[1] = 0
    return rows


def inserts_twice(index, ids, *args, right=cpu.find_or_insert_):
    right(index, ids, *args)
    index.entries.fill_(-1)
    return right(index, ids, *args)


def notes_other_ids(index, ids, ids_by_row, *args, right=cpu.find_or_insert_):
    rows = right(index, ids, ids_by_row, *args)
    ids_by_row.values()[0] += 1
    return rows


def draws_nothing(index, ids, ids_by_row, embedding, *args, right=cpu.find_or_insert_):
    rows = right(index, ids, ids_by_row, embedding, *args)
    embedding.values()[-1].zero_(), embedding.values()[0].zero_()
    return rows


def finds_too_much(entries, ids, right=cpu.find):
    return right(entries, ids).where(ids != 3, 0)


def depends_on_neighbours(slot, rows, ids, seed, distribution, right=cpu.init_rows_):
    right(slot, rows, ids, seed + rows.numel(), distribution)


@pytest.mark.parametrize(
    ("operation", "broken", "complaint"),
    [
        ("prepare_sparse_adamw", wrong_decay, "weights of a float32 table are off by "),
        (
            "prepare_sparse_adamw",
            wrong_decay,
            "weights of a bfloat16 table are more than one unit in the last place off",
        ),
        (
            "prepare_sparse_adamw",
            touches_another_row,
            "exp_avg of a bfloat16 table change where there is no gradient",
        ),
        ("prepare_sparse_adamw", eps_in_float16, "weights of a float32 table are off by nan"),
        ("prepare_sparse_adamw", gives_nan, "exp_avg_sq of a float32 table are off by nan"),
        (
            "gather_current",
            reads_as_it_lies,
            "weights read in a float32 table with untouched='decay' are off by",
        ),
        (
            "gather_current",
            stops_replays_too_early,
            "weights read in a float64 table with untouched='dense' are off by",
        ),
        (
            "prepare_sparse_adamw",
            forgets_what_was_missed,
            "weights in a float32 table with untouched='dense' are off by",
        ),
        (
            "catch_up_",
            leaves_moments,
            "exp_avg_sq in a float32 table with untouched='dense' are off by",
        ),
        (
            "catch_up_",
            does_not_note_it,
            "steps of last updates in a float32 table with untouched='decay' are wrong",
        ),
        ("delete_", frees_twice, "deleting ids does not free each of their rows once"),
        (
            "delete_",
            takes_nothing_out,
            "the hash table finds what was deleted, or loses what was not",
        ),
        ("delete_", keeps_no_free_rows, "new ids do not get the rows of deleted ones"),
        (
            "find_or_insert_",
            inserts_twice,
            "the hash table does not give each id a row of its own",
        ),
        ("find_or_insert_", notes_other_ids, "the hash table notes other ids"),
        ("find_or_insert_", draws_nothing, "rows of new ids do not hold their initial values"),
        ("find", finds_too_much, "the hash table does not find what it holds"),
        ("init_rows_", depends_on_neighbours, "initial rows differ from the reference's"),
        ("init_rows_", depends_on_neighbours, "an initial row depends on the ids beside it"),
    ],
)
def test_a_broken_engine_is_found(monkeypatch, operation, broken, complaint):
    monkeypatch.setattr(cpu, operation, broken)
    assert complaint in "; ".join(_doctor.check("cpu"))


@pytest.mark.usefixtures("quick")
def test_a_broken_engine_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "prepare_sparse_adamw", wrong_decay)
    assert doctor.main(SMALL) == 1
    out = capsys.readouterr().out
    answer = " ".join(out[out.index("\ncpu  ") : out.index("\ncuda ")].split())
    assert answer.startswith("cpu FAILS: wrong results: weights of a float32 table are off by ")
    assert "; weights in a float32 table with untouched='dense' are off by " in answer
    assert "\nreference  works: " in out
    assert out.endswith("FAILED: cpu should work here; see the answers above.\n")


def test_a_broken_reference_is_found(monkeypatch):
    reference = functional.load_engine("reference")
    right = reference.prepare_sparse_adamw
    monkeypatch.setattr(reference, "prepare_sparse_adamw", lambda u, s: wrong_decay(u, s, right))
    assert any("weights of a float64" in problem for problem in _doctor.check("reference"))


@pytest.mark.usefixtures("quick")
def test_an_engine_that_raises(monkeypatch, capsys):
    def find(entries, ids):
        raise OSError("no room\nfor more")

    monkeypatch.setattr(cpu, "find", find)
    assert doctor.main(SMALL) == 1
    out, err = capsys.readouterr()
    assert "\ncpu        FAILS: OSError: no room\n" in out
    assert "in find" in err  # the traceback
    assert "for more" in err


@pytest.mark.usefixtures("quick", "gpu")
def test_no_cupy_where_there_is_a_gpu(monkeypatch, capsys):
    cuda_cannot_load(monkeypatch, "No module named 'cupy'")
    assert doctor.main(SMALL) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "cuda FAILS: there is a GPU, but CuPy is not installed: pip install cupy-cuda12x " in out
    assert "(ImportError: No module named 'cupy')" in out
    assert out.endswith("FAILED: cuda should work here; see the answers above.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "pip install cupy-cuda13x " in doctor.examine("cuda", 1, SMALL).text
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in doctor.examine("cuda", 1, SMALL).text


@pytest.mark.usefixtures("gpu")
def test_other_reasons_where_there_is_a_gpu(monkeypatch):
    cuda_cannot_load(monkeypatch, "libnvrtc.so.12: not found")
    monkeypatch.setattr(doctor, "CUPY", ("torch", "no-such-cupy"))
    expected = "there is a GPU, but: ImportError: libnvrtc.so.12: not found"
    assert doctor.examine("cuda", 1, SMALL) == ("cuda", True, expected, None, "")
    monkeypatch.setattr(doctor, "CUPY", ("torch", "numba"))
    assert "two CuPys break each other" in doctor.examine("cuda", 1, SMALL).text


def test_no_gpu_is_a_reason(monkeypatch):
    cuda_cannot_load(monkeypatch, "No module named 'cupy'")
    answer = doctor.examine("cuda", 0, SMALL)
    assert not answer.expected
    assert answer.text == "no NVIDIA GPU that this process may use"


def test_the_driver(monkeypatch):
    class Driver:
        def __init__(self, path: str):
            self.answers = {"cuDriverGetVersion": 12090, "cuDeviceGetCount": 2}

        def cuInit(self, flags: int) -> int:
            return 0

        def __getattr__(self, name: str):
            def put(reference):
                reference._obj.value = self.answers[name]

            return put

    monkeypatch.setattr(doctor.ctypes, "CDLL", Driver)
    assert doctor.cuda_driver() == ("the driver runs up to 12.9; GPUs: 2", 2)
    monkeypatch.setattr(Driver, "cuInit", lambda self, flags: 100)  # CUDA_ERROR_NO_DEVICE
    assert doctor.cuda_driver() == ("the driver runs up to 12.9; GPUs: 0", 0)

    def no_driver(path: str):
        raise OSError(f"{path}: cannot open")

    monkeypatch.setattr(doctor.ctypes, "CDLL", no_driver)
    assert doctor.cuda_driver() == ("no NVIDIA driver", 0)


def test_versions(monkeypatch):
    monkeypatch.setattr(doctor, "CUPY", ("torch", "no-such-cupy"))
    monkeypatch.setattr(doctor, "NVRTC", ("no-such-nvrtc",))
    monkeypatch.setattr(doctor.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    versions = dict(doctor.versions("the driver runs up to 12.9; GPUs: 1"))
    assert versions["CuPy"] == f"{metadata.version('torch')} (torch)"
    assert versions["NVRTC"] == "not installed"
    assert versions["CUDA"] == ("torch is built for 12.8; the driver runs up to 12.9; GPUs: 1")
    assert doctor.installed("no-such-package") == ""
