"""What goes wrong with checkpoints: the text names the file, and what there was is still there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_runs import Training
from test_state import differences

from cupy_sparse_adamw import HashTable, checkpoint
from cupy_sparse_adamw.checkpoint import CheckpointError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 1024)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a full checkpoint and an increment on it, to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "CHUNK_BYTES", 1024)
        root = tmp_path_factory.mktemp("saved") / "run"
        run = Training().play(0, 5)
        run.save(root, 5, incremental=True)
        run.model.plain.delete(run.model.plain.ids()[:3])
        run.play(5, 7).save(root, 7, incremental=True)
    return root


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} - {".lock"}


class Victim:
    """A training under way that shall not notice what it failed to load."""

    def __init__(self) -> None:
        self.run = Training(seed=2, accumulate=2).play(30, 33)
        self.before = self.run.state()

    def cannot_load(self, path: Path, text: str = "") -> str:
        with pytest.raises(CheckpointError, match=text) as caught:
            checkpoint.load(path, self.run.model, self.run.optimizers)
        assert differences(self.run.state(), self.before) == []
        return str(caught.value)


# ---------------------------------------------------------------------- damaged files


def test_every_file_is_checked(tmp_path, saved):
    """Cut, emptied, longer, one bit flipped, missing: for each file of both."""
    root, victim, choice = tmp_path / "run", Victim(), random.Random(0)
    shutil.copytree(saved, root)
    newest = checkpoint.latest(root)
    files = sorted(root.glob("*/*"))
    assert {path.name.split("-")[0] for path in files} == {
        "index.json",
        "dense",
        "table",
        "deleted",
    }
    base_state = root / "step-0000000005" / "dense-0.safetensors"
    for path in files:
        whole = path.read_bytes()
        flipped = []
        for _ in range(4):
            data = bytearray(whole)
            data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
            flipped.append(bytes(data))
        for data in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0", *flipped, None):
            if data is None:
                path.unlink()
            else:
                path.write_bytes(data)
            if path.name.startswith("dense") and path.parent == base_state.parent:
                Training().load(newest)  # an increment has all dense tensors itself
                with pytest.raises(CheckpointError, match=str(path)):
                    Training().load(path.parent)
            else:
                victim.cannot_load(newest, f"{path.parent.name}/{path.name} is (damaged|missing)")
        path.write_bytes(whole)
    victim.run.load(newest)
    assert differences(victim.run.state(), Training().load(newest).state()) == []


def rewrite(path: Path, change) -> None:
    """Change an index and give it the checksum it would have."""
    whole = json.loads(path.read_bytes())
    index = change(whole["index"]) or whole["index"]

    def dump(value):
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    checksum = hashlib.sha256(dump(index)).hexdigest()
    path.write_bytes(dump({"index": index, "sha256": checksum}))


def crafted():
    def missing_file(index):
        index["tables"]["plain"]["chunks"][0]["file"] = "table-9-9.safetensors"

    def file_of_another_table(index):
        file = index["tables"]["embedding"]["chunks"][0]["file"]
        index["tables"]["plain"]["chunks"][0]["file"] = file

    def outside(index):
        entry = index["files"].pop("dense-0.safetensors")
        index["files"]["../../x.safetensors"] = entry

    def newer(index):
        index["format"] = 2

    def twice(index):
        chunks = index["tables"]["plain"]["chunks"]
        chunks[1] = chunks[0]

    def too_many_rows(index):
        index["tables"]["plain"]["rows"] = 10**15

    def fewer_rows(index):
        index["tables"]["plain"]["rows"] -= 1

    def huge_chunk(index):
        index["tables"]["plain"]["chunks"][0]["rows"] = 10**15

    def no_state(index):
        index["state"]["model"] = {"pickle": "gASV"}

    def endless(index):
        index["base"] = {"name": "step-0000000005", "sha256": "0" * 64}

    def no_tensor(index):
        index["tensors"].pop()

    def other_dtype(index):
        index["tensors"][0]["dtype"] = "float33"

    def other_shape(index):
        index["tensors"][0]["shape"] = [7]

    return [
        (missing_file, r"index.json is no index of a checkpoint: 'table-9-9.safetensors'"),
        (file_of_another_table, "table-2-0.safetensors is not what was saved: ids are"),
        (outside, "index.json is damaged: it is not an index .*x.safetensors"),
        (newer, "index.json has format 2, this version reads 1"),
        (twice, "an id is saved twice"),
        (too_many_rows, "index.json names more rows of table 'plain' than it has"),
        (fewer_rows, r"'plain' comes to \d+ rows, \d+ were saved"),
        (huge_chunk, "safetensors is too short"),
        (no_state, "index.json holds a state that is none: .*pickle"),
        (endless, "was replaced by another"),
        (no_tensor, "holds a state that is none: list index out of range"),
        (other_dtype, "dense-0.safetensors is not what was saved: torch has no dtype 'float33'"),
        (other_shape, "dense-0.safetensors is not what was saved"),
    ]


@pytest.mark.parametrize(("change", "text"), crafted(), ids=[x[0].__name__ for x in crafted()])
def test_an_index_with_a_checksum_of_its_own(tmp_path, saved, change, text):
    root = tmp_path / "run"
    shutil.copytree(saved, root)
    path = root / "step-0000000005"
    rewrite(path / "index.json", change)
    Victim().cannot_load(path, text)


def test_random_changes_of_an_index(tmp_path, saved):
    """With a right checksum: an error and nothing changed, or a load; never anything else."""
    path = tmp_path / "step-0000000005"
    shutil.copytree(saved / path.name, path)
    intact, choice, victim = (path / "index.json").read_bytes(), random.Random(1), Victim()

    def places(value, found):
        children = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in children:
            found.append((value, key))
            if isinstance(child, (dict, list)):
                places(child, found)
        return found

    def change(index):
        holder, key = choice.choice(places(index, []))
        new = choice.choice([None, -1, 2**70, 0.5, "x", [], {}, [[]], {"tensor": 0}, "delete"])
        if new == "delete":
            del holder[key]
        else:
            holder[key] = new

    loaded = 0
    for _ in range(300):
        (path / "index.json").write_bytes(intact)
        rewrite(path / "index.json", change)
        try:
            checkpoint.load(path, victim.run.model, victim.run.optimizers)
        except Exception:
            assert differences(victim.run.state(), victim.before) == []
        else:
            loaded += 1
            victim = Victim()
    assert loaded < 100


def test_a_file_that_is_no_safetensors(tmp_path, saved):
    root = tmp_path / "run"
    shutil.copytree(saved, root)
    path = root / "step-0000000005"
    data = b"cos\nsystem\n(S'touch pwned'\ntR."

    def change(index):
        index["files"]["dense-0.safetensors"] = {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    (path / "dense-0.safetensors").write_bytes(data)
    rewrite(path / "index.json", change)
    Victim().cannot_load(path, "dense-0.safetensors is no safetensors file")
    assert not Path("pwned").exists()


# ---------------------------------------------------------------------- saves that fail


NO_PERMISSION = """
import os, sys
from cupy_sparse_adamw import checkpoint
os.chdir(sys.argv[1])
checkpoint.save("ours", extra=1)
os.chmod(".", 0o555)
if os.getuid() == 0:  # root may write everywhere
    os.seteuid(65534)
for folder in ("theirs", "ours"):
    try:
        checkpoint.save(folder, step=1)
    except PermissionError as error:
        print(error.filename)
os.seteuid(os.getuid())
os.chmod(".", 0o755)
print(checkpoint.load(checkpoint.latest("ours"))["extra"])
"""


def run_python(code: str, *args: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_no_permission(tmp_path):
    lines = run_python(NO_PERMISSION, tmp_path).splitlines()
    theirs, *ours, extra = lines
    assert theirs == "theirs"
    if os.getuid() == 0:  # else a folder of one's own may be written to
        assert ours == ["ours/.lock"]
    assert extra == "1"


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file"):
        checkpoint.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------------- killed, and at once

KILLED = """
import os, shutil, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from checkpoint_runs import Training
from test_state import differences
from cupy_sparse_adamw import checkpoint
checkpoint.CHUNK_BYTES = 1024
root = Path(sys.argv[1])

run = Training().play(0, 3)
run.save(root, 2, incremental=True)
run.play(3, 4)
run.save(root, 3, incremental=True)
old = run.state()
run.play(4, 6)
new = run.state()

def die_at(point):
    calls = iter(range(10**6))
    def dying(real):
        def call(*args, **options):
            if next(calls) == point:
                if real is os_write:
                    real(args[0], args[1][:len(args[1]) // 2])
                os._exit(9)
            return real(*args, **options)
        return call
    os_write = os.write
    for name in ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))

pristine = root.with_name("pristine")
shutil.copytree(root, pristine)
seen, leftovers = {"old": 0, "new": 0}, 0
for incremental in (True, False):
    for point in range(10**6):
        shutil.rmtree(root)
        shutil.copytree(pristine, root)
        child = os.fork()
        if child == 0:
            die_at(point)
            run.save(root, 6, keep=1, incremental=incremental)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9), status
        last = checkpoint.latest(root)
        name = {"step-0000000003": "old", "step-0000000006": "new"}[last.name]
        got = Training(seed=2, block_size=5).load(last)
        assert differences(got.state(), {"old": old, "new": new}[name]) == [], (point, name)
        seen[name] += 1
        leftovers += any(path.name.startswith((".saving", ".removing")) for path in root.iterdir())
        if status == 0:
            break
        got.save(root, 7)  # sweeps
        there = {path.name for path in root.iterdir()} - {".lock"}
        assert all(name.startswith("step-") for name in there), there
print(seen["old"], seen["new"], leftovers)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child at each system call")
def test_killed_at_every_system_call_of_a_save(tmp_path):
    """Before the rename the last checkpoint is the old one, whole, after it the new one."""
    old, new, leftovers = map(int, run_python(KILLED, tmp_path / "run").split())
    assert old > 60
    assert new > 10
    assert leftovers > 30


def test_leftovers(tmp_path):
    """What a killed save left is removed; what others made, and links, are not."""
    for name in (".saving-step-0000000004", ".removing-step-0000000001", ".saving-mine", ".tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".saving-step-0000000005").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".saving-step-0000000006").write_text("a file")
    checkpoint.save(tmp_path, step=4)
    assert names(tmp_path) == {
        *(".saving-mine", ".tmp", "elsewhere", ".saving-step-0000000005"),
        *(".saving-step-0000000006", "step-0000000004"),
    }


def test_two_at_once(tmp_path, monkeypatch):
    """The second is refused, and takes the first one's folder for no leftover."""
    pytest.importorskip("fcntl", reason="locks as POSIX has them")
    refused, write = [], os.write

    def meanwhile(file, data):
        if not refused:
            refused.append(True)
            with pytest.raises(RuntimeError, match=r"someone else is saving into .*\.lock"):
                checkpoint.save(tmp_path, step=2)
            assert "lock" in run_python(
                "import sys; from cupy_sparse_adamw import checkpoint\n"
                "try: checkpoint.save(sys.argv[1], step=3)\n"
                "except RuntimeError as error: print(error)",
                tmp_path,
            )
        return write(file, data)

    monkeypatch.setattr("os.write", meanwhile)
    path = checkpoint.save(tmp_path, step=1, extra="mine")
    assert refused
    assert checkpoint.load(path)["extra"] == "mine"
    assert names(tmp_path) == {"step-0000000001"}
    checkpoint.save(tmp_path, step=2)


def test_a_child_that_holds_the_lock_file_open_locks_nobody_out(tmp_path, monkeypatch):
    """As a DataLoader's worker does that was forked while another thread saved."""
    kept, real = [], os.open

    def keep(path, *args, **options):
        file = real(path, *args, **options)
        if str(path).endswith(".lock"):
            kept.append(os.dup(file))
        return file

    monkeypatch.setattr("os.open", keep)
    for step in range(2):
        checkpoint.save(tmp_path, step=step)
    for file in kept:
        os.close(file)
    assert len(kept) == 2


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(file, data):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr("os.write", interrupt)
        checkpoint.save(tmp_path, step=1, extra=torch.ones(3))
    assert names(tmp_path) == set()


def test_an_old_one_that_cannot_be_removed(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, step=1)

    def rename(one, other):
        if "removing" in str(other):
            raise OSError(errno.EACCES, "Permission denied", str(one))
        return real(one, other)

    real = os.rename
    monkeypatch.setattr("os.rename", rename)
    with pytest.warns(UserWarning, match="an old checkpoint stays: .*step-0000000001"):
        path = checkpoint.save(tmp_path, step=2, keep=1)
    assert checkpoint.latest(tmp_path) == path


def test_one_that_cannot_be_removed_keeps_its_base_and_nothing_else(tmp_path, monkeypatch):
    table = torch.nn.ModuleDict({"table": HashTable([2])})
    table["table"](torch.arange(3))
    for step in range(1, 6):  # a full one and its increment, another full one, two more
        checkpoint.save(tmp_path, model=table, step=step, incremental=step <= 2)
    assert (tmp_path / "step-0000000002").exists()
    real = os.rename

    def rename(one, other):
        if "removing" in str(other) and "0000000002" in str(one):
            raise OSError(errno.EACCES, "Permission denied", str(one))
        return real(one, other)

    monkeypatch.setattr("os.rename", rename)
    with pytest.warns(UserWarning, match="an old checkpoint stays: .*step-0000000002") as warned:
        checkpoint.save(tmp_path, model=table, step=6, keep=1)
    assert len(warned) == 1
    assert names(tmp_path) == {f"step-000000000{n}" for n in (1, 2, 6)}
    checkpoint.load(tmp_path / "step-0000000002", model=table)


def test_damaged_ones_neither_count_nor_go(tmp_path):
    for step in range(1, 5):
        checkpoint.save(tmp_path, step=step, extra=torch.ones(3))
    (tmp_path / "step-0000000003" / "dense-0.safetensors").unlink()
    checkpoint.save(tmp_path, step=5, keep=2)
    assert names(tmp_path) == {f"step-000000000{n}" for n in (3, 4, 5)}


def test_a_hook_that_raises_in_the_middle_of_a_load(tmp_path):
    """After the tables: the dense part is there already, and goes back."""
    path = Training().play(0, 4).save(tmp_path, 4)
    victim = Training(seed=2).play(30, 33)

    def refuse(optimizer, state):
        raise KeyError("not mine")

    victim.dense.register_load_state_dict_pre_hook(refuse)
    before = victim.state()
    with pytest.raises(KeyError, match="not mine"):
        checkpoint.load(path, victim.model, victim.optimizers)
    assert differences(victim.state(), before) == []
    same = Training(seed=2).play(30, 33)
    assert differences(victim.play(33, 36).state(), same.play(33, 36).state()) == []
