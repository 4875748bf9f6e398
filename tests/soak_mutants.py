"""Loads damaged and forged checkpoints: ``python soak_mutants.py FOLDER BEGIN END``.

Mutant n is a function of n alone. Most are *damaged*: bytes change, checksums stay. The others are
*forged*: an index, a safetensors header or values change, and every checksum is made right again.
Each is loaded into a training under way. It must be refused with an error that ``load`` documents,
and nothing in memory may have changed; or it loads, and then a damaged one must give what the
undamaged checkpoint gives, a forged one what a few lines here read in its files.

The loads run in forks with limited memory, with an audit hook that reports whatever executes code
or opens a file elsewhere. Prints one line of JSON. Run by test_soak_checkpoints.py.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import mmap
import os
import random
import shutil
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from checkpoint_runs import Training, by_id
from test_state import bits, differences

from cupy_sparse_adamw import checkpoint, functional
from cupy_sparse_adamw.checkpoint import CheckpointError
from cupy_sparse_adamw.tables import rows_apart

FULL, NEWEST, INDEX = "step-0000000005", "step-0000000007", "index.json"
WORKERS = 2
#: Address space beyond what a fork begins with: room for loads, not for what a forgery claims.
ROOM = 512 << 20
#: What may not happen in a load (audit events of Python).
EXECUTING = {
    *("exec", "compile", "pickle.find_class", "marshal.loads", "import", "ctypes.dlopen"),
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect"),
}
Files = dict[str, bytes]


# ---------------------------------------------------------------------- mutants


def damaged(choice: random.Random, files: Files) -> tuple[str, dict[str, bytes | None]]:
    """A name, and what files become (None: they go)."""
    names = sorted(files)
    name = choice.choice(names)
    data = bytearray(files[name])
    at, end = sorted(choice.choices(range(len(data) + 1), k=2))
    kind = choice.choice(["flip", "cut", "insert", "remove", "overwrite", "swap", "delete", "sums"])
    if kind == "flip":
        for _ in range(choice.choice([1, 1, 1, 2, 8])):
            data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    elif kind == "cut":
        del data[choice.choice([at, 0, len(data) - 1]) :]
    elif kind == "insert":
        data[at:at] = choice.choice([data[at:end], choice.randbytes(choice.randint(1, 99))])
    elif kind == "remove":
        del data[at:end]
    elif kind == "overwrite":
        data[at:end] = choice.choice([bytes(end - at), choice.randbytes(end - at)])
    elif kind == "swap":
        other = choice.choice(names)
        return kind, {name: files[other], other: files[name]}
    elif kind == "delete":
        return kind, dict.fromkeys(choice.sample(names, choice.choice([1, 1, 2, 5])))
    else:
        name = choice.choice([FULL, NEWEST]) + "/" + INDEX
        index = json.loads(files[name])
        one, other = choice.sample(sorted(index["index"]["files"]), 2)
        entries = index["index"]["files"]
        entries[one]["sha256"], entries[other]["sha256"] = (
            entries[other]["sha256"],
            entries[one]["sha256"],
        )
        data = bytearray(dump(index))
    return kind, {name: bytes(data)}


VALUES = [
    *(None, True, False, -1, 0, 1, 2, 3, 2**31, 2**63, 10**15, 2**70, -(2**70), 0.5, 1e300),
    *("", "x", "float64", "int64", "uint8", "complex64", "bool", "quint8", "float33", "load"),
    *("../../x", "/etc/passwd", "table-0-0.safetensors", "dense-0.safetensors", FULL, "\ud800"),
    *([], {}, [[]], [0], [10**15], [10**15, 0], {"x": 1}, {"tensor": 0}, {"tensor": 10**15}),
    *({"reference": "plain"}, {"reference": "x"}, {"tuple": []}, {"dict": []}, {"dict": [[1, 2]]}),
    *({"float": "nan"}, {"float": "1"}, {"pickle": "gASVCgAAAAAAAACMBnN5c3RlbZQu"}),
]


def forged(choice: random.Random, files: Files) -> tuple[str, dict[str, bytes | None]]:
    """The same, with right checksums."""
    indices = {name: json.loads(files[f"{name}/{INDEX}"])["index"] for name in (FULL, NEWEST)}
    changed: dict[str, bytes | None] = {}
    folder = choice.choice([FULL, NEWEST])
    tensors = sorted(name for name in files if name.startswith(folder) and INDEX not in name)
    name = choice.choice(tensors)
    kind = choice.choice(["index", "index", "index", "index", "claim", "header", "values", "swap"])
    if kind == "index":
        for _ in range(choice.choice([1, 1, 2, 4])):
            change_somewhere(choice, indices[folder])
    elif kind == "claim":  # more than there is, in all places that tell
        number = choice.choice([10**6, 10**9, 10**15, 2**62])
        for entry in indices[folder]["tables"].values():
            entry["rows"] = number if choice.random() < 0.7 else entry["rows"]
            for chunk in entry["chunks"]:
                chunk["rows"] = number
                indices[folder]["files"][chunk["file"]]["bytes"] = number * 1000
    elif kind == "header":
        (length,) = struct.unpack("<Q", files[name][:8])
        header = json.loads(files[name][8 : 8 + length])
        for _ in range(choice.choice([1, 1, 2])):
            change_somewhere(choice, header)
        text = json.dumps(header).encode()
        length = choice.choice([len(text)] * 9 + [choice.randrange(2**64)])
        changed[name] = struct.pack("<Q", length) + text + files[name][8 + length :]
    elif kind == "values":
        data = bytearray(files[name])
        (length,) = struct.unpack("<Q", data[:8])
        for _ in range(choice.choice([1, 2, 20])):
            data[choice.randrange(8 + length, len(data))] ^= 1 << choice.randrange(8)
        changed[name] = bytes(data)
    else:
        other = choice.choice(tensors)
        changed |= {name: files[other], other: files[name]}
    for name, data in changed.items():
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        indices[folder]["files"][name.split("/")[1]] = entry
    checksum = original = json.loads(files[f"{FULL}/{INDEX}"])["sha256"]
    for name in (FULL, NEWEST):
        base = indices[name].get("base")
        if isinstance(base, dict) and base.get("sha256") == original:
            base["sha256"] = checksum  # that of the full one, as it is now
        checksum = hashlib.sha256(dump(indices[name])).hexdigest()
        changed[f"{name}/{INDEX}"] = dump({"index": indices[name], "sha256": checksum})
    return kind, changed


def change_somewhere(choice: random.Random, root: Any) -> None:
    """One change at a random depth of nested lists and dicts."""
    if not root:  # the change before this one took the last entry
        return
    holder, key = step_down(choice, root)
    value = holder[key]
    kind = choice.choice(["set", "set", "set", "near", "delete", "copy", "rename", "repeat"])
    if kind == "near" and type(value) is int:
        holder[key] = value + choice.choice([-1, 1])
    elif kind == "delete":
        del holder[key]
    elif kind == "copy":
        other, at = step_down(choice, root)
        holder[key] = copy.deepcopy(other[at])
    elif kind == "rename" and isinstance(holder, dict):
        holder[choice.choice(["x", *map(str, holder)])] = holder.pop(key)
    elif kind == "repeat" and isinstance(value, list):
        value += value[:1]
    else:
        holder[key] = copy.deepcopy(choice.choice(VALUES))


def step_down(choice: random.Random, root: Any) -> tuple[Any, Any]:
    """A list or dict, and one of its indices or keys."""
    holder = root
    while True:
        key = (
            choice.choice(list(holder))
            if isinstance(holder, dict)
            else choice.randrange(len(holder))
        )
        child = holder[key]
        if not isinstance(child, (dict, list)) or not child or choice.random() < 0.15:
            return holder, key
        holder = child


def dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def mutant(n: int, files: Files) -> tuple[bool, str, str, dict[str, bytes | None]]:
    """Whether it is forged, what was done, which checkpoint to load, and the files that differ."""
    choice = random.Random(n)
    is_forged = choice.random() < 0.4
    kind, changed = (forged if is_forged else damaged)(choice, files)
    path = NEWEST if choice.random() < 0.7 else FULL
    return is_forged, kind, path, changed


# ---------------------------------------------------------------------- what files say


def said(path: Path) -> dict[str, Any]:
    """Rows of HashTables and the model's dense tensors, by a plain reading of the files."""
    index = json.loads((path / INDEX).read_bytes())["index"]
    result: dict[str, Any] = {}
    for name, entry in index["tables"].items():
        parts, at, of = [(path, entry)], path, index
        while not parts[-1][1]["whole"]:
            at = at.parent / of["base"]["name"]
            of = json.loads((at / INDEX).read_bytes())["index"]
            parts.append((at, of["tables"][name]))
        rows: dict[int, bytes] = {}
        for folder, part in reversed(parts):
            for file in part["deleted"]:
                for i in safetensors.torch.load_file(folder / file)["ids"].tolist():
                    rows.pop(i, None)
            for chunk in part["chunks"]:
                tensors = safetensors.torch.load_file(folder / chunk["file"])
                for i, row in zip(tensors["ids"].tolist(), tensors["embedding"], strict=True):
                    rows[i] = as_bytes(row)
        result[name] = rows
    model = dict(index["state"]["model"]["dict"])["values"]["OrderedDict"]
    for key, packed in model:
        if isinstance(packed, dict) and "tensor" in packed:
            file = index["tensors"][packed["tensor"]]["file"]
            tensor = safetensors.torch.load_file(path / file)[str(packed["tensor"])]
            result[key] = (list(tensor.shape), as_bytes(tensor))
    return result


def held(run: Training) -> dict[str, Any]:
    """The same of a training."""
    model = run.model
    with rows_apart():
        state = model.state_dict()
    result: dict[str, Any] = {}
    for name, table in (("plain", model.plain), ("of another name", model.hooked)):
        ids, rows = table.ids_map()
        weights = functional.gather(table.get_slot("embedding"), rows)  # behind or not
        result[name] = {i: as_bytes(x) for i, x in zip(ids.tolist(), weights, strict=True)}
    rows = enumerate(model.embedding.weight.detach())
    result["embedding"] = {i: as_bytes(row) for i, row in rows}
    for key in ("head.weight", "head.bias", "tied.weight", "tied.bias", "zero_dim", "none_there"):
        result[key] = (list(state[key].shape), as_bytes(state[key]))
    return result


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bits(tensor.contiguous().reshape(-1)).numpy().tobytes()


# ---------------------------------------------------------------------- the loads


class Guard:
    """An audit hook that collects what a load may not do."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.active, self.seen = str(folder), False, []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in EXECUTING:
            self.seen.append(f"{event} {args!r:.200}")
        elif event == "open" and not str(args[0]).startswith(self.folder + os.sep):
            self.seen.append(f"open {args!r:.200}")

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.active = True
        try:
            yield
        finally:
            self.active = False


class Victim:
    """A training under way."""

    def __init__(self) -> None:
        self.run = Training(seed=2, accumulate=2).play(30, 33)

    def now(self, extra: Any = None) -> dict[str, Any]:
        """All that a load could change. Rows that are behind stay so."""
        model, tables = copy.deepcopy((self.run.model, self.run.tables))
        return {
            "model": by_id(model.state_dict()),
            "tables": by_id(tables.state_dict()),
            "dense": self.run.dense.state_dict(),
            "loaded": extra,
        }

    def load(self, path: Path) -> Any:
        return checkpoint.load(path, self.run.model, self.run.optimizers)


class Worker:
    """Loads mutants in a folder of its own."""

    def __init__(self, saved: Path, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(saved, folder)
        self.files = {f"{p.parent.name}/{p.name}": p.read_bytes() for p in folder.glob("*/*")}
        self.outcomes: Counter[str] = Counter()
        self.findings: list[str] = []
        self.before = copy.deepcopy(Victim().now())
        self.whole = {}
        for name in (FULL, NEWEST):
            victim = Victim()
            self.whole[name] = copy.deepcopy(victim.now(victim.load(folder / name)))
            forgery = said(folder / name)
            assert {key: forgery[key] for key in held(victim.run)} == held(victim.run)
        self.victim = Victim()
        self.guard = Guard(folder)

    def try_one(self, n: int) -> None:
        is_forged, kind, name, changed = mutant(n, self.files)
        for file, data in changed.items():
            if data is None:
                (self.folder / file).unlink()
            else:
                (self.folder / file).write_bytes(data)
        what = f"{'forged' if is_forged else 'damaged'} ({kind})"
        self.guard.seen.clear()
        try:
            with self.guard():
                loaded = self.victim.load(self.folder / name)
        except Exception as error:
            self._refused(n, what, is_forged, error)
        else:
            self._loaded(n, what, is_forged, name, loaded)
        if self.guard.seen:
            self._find(n, what, f"a load does {self.guard.seen}")
        for file in changed:
            (self.folder / file).write_bytes(self.files[file])

    def _refused(self, n: int, what: str, is_forged: bool, error: Exception) -> None:
        kinds = (
            (CheckpointError, TypeError, ValueError, RuntimeError)
            if is_forged
            else (CheckpointError,)
        )
        documented = isinstance(error, kinds) and not isinstance(
            error, (RecursionError, NotImplementedError)
        )
        if not documented or "alloc" in str(error):
            text = "".join(traceback.format_exception(error)[-4:])
            self._find(n, what, f"{type(error).__name__}: {text}")
        if wrong := differences(self.victim.now(), self.before):
            self._find(n, what, f"refused ({error}), but changed: {wrong[:5]}")
            self.victim = Victim()
        self.outcomes[f"{what.split()[0]}, refused with {type(error).__name__}"] += 1

    def _loaded(self, n: int, what: str, is_forged: bool, name: str, loaded: Any) -> None:
        now = self.victim.now(loaded)
        wrong = differences(now, self.whole[name])
        if wrong and not is_forged:
            self._find(n, what, f"loaded silently, but differs: {wrong[:5]}")
        if wrong and is_forged:
            read, here = said(self.folder / name), held(self.victim.run)
            off = [key for key in here if read.get(key) != here[key]]
            if off:
                self._find(n, what, f"loaded other values than the files have: {off}")
            with contextlib.suppress(Exception):  # whatever a setting became: no crash
                self.victim.run.micro_batch(40)
        alike = "what the checkpoint says" if wrong else "what the undamaged one gives"
        self.outcomes[f"{what.split()[0]}, loaded: {alike}"] += 1
        self.victim = Victim()

    def _find(self, n: int, what: str, text: str) -> None:
        self.findings.append(f"mutant {n}, {what}: {text}")


def limit_memory() -> None:
    """Where there is a way to."""
    with contextlib.suppress(ImportError, OSError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(folder: Path, begin: int, end: int) -> None:
    torch.set_num_threads(1)  # before the forks
    checkpoint.CHUNK_BYTES = 1024
    saved = folder / "saved"
    run = Training().play(0, 5)
    run.save(saved, 5, incremental=True)
    run.model.plain.delete(run.model.plain.ids()[:3])
    run.play(5, 7).save(saved, 7, incremental=True)
    (saved / ".lock").unlink()
    Training().model.plain(torch.arange(5000))  # Numba compiles what a growing index needs
    run.state()
    began, children = time.perf_counter(), {}
    for k in range(WORKERS):
        now = mmap.mmap(-1, 8)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                worker = Worker(saved, folder / str(k))
                limit_memory()
                for n in range(begin + k, end, WORKERS):
                    now[:] = struct.pack("<q", n)
                    worker.try_one(n)
                told = {"outcomes": worker.outcomes, "findings": worker.findings}
                (folder / f"{k}.json").write_text(json.dumps(told))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children[child] = k, now
    outcomes: Counter[str] = Counter()
    findings: list[str] = []
    for child, (k, now) in children.items():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            n = struct.unpack("<q", now[:])[0]
            findings.append(f"mutant {n}: the process ended with {status}")
            continue
        told = json.loads((folder / f"{k}.json").read_text())
        outcomes.update(told["outcomes"])
        findings += told["findings"]
    print(
        json.dumps(
            {
                "mutants": outcomes.total(),
                "outcomes": dict(outcomes.most_common()),
                "findings": findings,
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
