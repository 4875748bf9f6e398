"""Folders that appear whole or not at all, of files whose every byte is checked when read.

A folder holds safetensors files and ``index.json``::

    {"index": {..., "files": {name: {"bytes": ..., "sha256": ...}}}, "sha256": ...}

The index's own checksum is that of its canonical dump (``_dump``), and the file is the canonical
dump of the whole: no byte of it can change unseen.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

INDEX = "index.json"
#: Folders that are being written or removed; what is found under this name is a leftover.
PARTIAL = re.compile(r"\.(saving|removing)-step-\d{10,19}")
_FILE = re.compile(r"[a-z]+(-\d+)*\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")

#: The dtypes that every version of safetensors has. Others are written as bytes.
_NATIVE = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)

#: What an index may call a dtype. ``getattr(torch, name)`` would import modules by some names.
DTYPES = {
    name: dtype
    for name, dtype in vars(torch).items()
    if isinstance(dtype, torch.dtype) and not name.startswith(("q", "bits"))
}


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or not one; the text names the file."""


def safetensors() -> Any:
    """Safetensors' part for torch, imported when it is needed first.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import safetensors.torch as module
    except ImportError as error:
        raise ImportError("checkpoints need safetensors: pip install safetensors") from error
    return module


# ---------------------------------------------------------------------- writing


class Writer:
    """Writes the files of one folder.

    Attributes:
        files: name -> bytes and sha256 of each file so far.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._safetensors = safetensors()
        self.files: dict[str, dict[str, Any]] = {}

    def tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a safetensors file, through to the disk."""
        plain: dict[str, torch.Tensor] = {}
        memory = set()
        for key, tensor in tensors.items():
            plain[key] = tensor = _stored(tensor)
            if (place := tensor.untyped_storage().data_ptr()) in memory:
                plain[key] = tensor.clone()  # safetensors writes no two views of one memory
            memory.add(place)
        data = self._safetensors.save(plain)
        _write(self._folder / name, data)
        self.files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def index(self, index: dict[str, Any]) -> str:
        """Write ``index.json``, the last file. Returns its checksum."""
        index = {**index, "files": self.files}
        checksum = hashlib.sha256(_dump(index)).hexdigest()
        _write(self._folder / INDEX, _dump({"index": index, "sha256": checksum}))
        return checksum


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, contiguous, of a dtype that safetensors has or as bytes [n] uint8."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return tensor if tensor.dtype in _NATIVE else tensor.reshape(-1).view(torch.uint8)


def require_storable(path: str, tensor: torch.Tensor) -> None:
    """Raise TypeError for a tensor that cannot be written."""
    if (
        type(tensor) not in (torch.Tensor, torch.nn.Parameter)
        or tensor.layout is not torch.strided
        or tensor.device.type == "meta"
        or tensor.is_quantized
        or tensor.is_nested
    ):
        raise TypeError(
            f"{path} is a {type(tensor).__name__} with layout {tensor.layout}, dtype "
            f"{tensor.dtype} on {tensor.device}; a checkpoint takes plain dense tensors"
        )


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _write(path: Path, data: bytes) -> None:
    with _named(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        finally:
            os.close(file)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Have every OSError name the file: write and fsync raise ones that do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _sync_folder(path: Path) -> None:
    with _named(path):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``target`` at the end of the block, and is on disk then.

    If the block raises, it is removed. Whoever is killed in it leaves it under another name.
    """
    folder = target.parent / f".saving-{target.name}"
    try:
        with _named(folder):
            folder.mkdir()
        yield folder
        _sync_folder(folder)
        with _named(target):
            os.rename(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _sync_folder(target.parent)


def remove(folder: Path) -> None:
    """Remove a folder: whoever is killed meanwhile leaves no half of it under its name."""
    going = folder.parent / f".removing-{folder.name}"
    os.rename(folder, going)
    shutil.rmtree(going)


@contextlib.contextmanager
def sole_writer(root: Path) -> Iterator[None]:
    """Be the only one who saves into ``root``, and remove what killed ones left there.

    Raises:
        OSError: ``root`` cannot be made or written to.
        RuntimeError: someone else is saving into it.
    """
    path = root / ".lock"
    with _named(path):
        root.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    unlock = None
    try:
        unlock = _lock(path, file)
        if unlock is not None:
            for entry in list(os.scandir(root)):
                if PARTIAL.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
        yield
    finally:
        if unlock is not None:
            unlock()  # closing does not do it while a forked child holds the file open
        os.close(file)


def _lock(path: Path, file: int) -> Callable[[], None] | None:
    """Lock an open file, and return what unlocks it; None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # no POSIX system
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(
            f"someone else is saving into {path.parent} at this moment (and has locked {path}); "
            f"give each process a folder of its own"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return None
    return lambda: fcntl.flock(file, fcntl.LOCK_UN)


# ---------------------------------------------------------------------- reading


class Reader:
    """Reads a folder. Every byte is checked before it is believed.

    Args:
        folder: what ``appearing`` made.

    Attributes:
        folder: the same.
        path: of the index.
        index: what ``Writer.index`` was given.
        checksum: of the index.

    Raises:
        CheckpointError: there is no such folder, or its index is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = self.path = folder / INDEX
        if not folder.is_dir():
            raise CheckpointError(f"there is no checkpoint {folder}")
        data = _read(path)
        try:
            whole = json.loads(data.decode())  # UTF-8, and no guess at the encoding
            index, self.checksum = whole["index"], whole["sha256"]
            # allow_nan=False, since json.loads takes NaN
            intact = data == _dump({"index": index, "sha256": self.checksum})
            intact = intact and hashlib.sha256(_dump(index)).hexdigest() == self.checksum
            sizes = {
                name: (_require_size(entry["bytes"]), _require(_SHA256, entry["sha256"]))
                for name, entry in index["files"].items()
            }
            for name in sizes:
                _require(_FILE, name)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: it is not an index ({error})") from error
        if not intact:
            raise CheckpointError(f"{path} is damaged: it does not have the checksum that it names")
        self.index: dict[str, Any] = index
        self._files: dict[str, tuple[int, str]] = sizes

    def files(self) -> Iterator[tuple[Path, int]]:
        """Path and bytes of each file that the index lists."""
        return ((self.folder / name, size) for name, (size, _) in self._files.items())

    def require_there(self, name: str) -> None:
        """Raise CheckpointError unless a listed file is there, as large as the index says."""
        path = self.folder / name
        with _reading(path), path.open("rb") as file:
            _require_bytes(path, file.fileno(), self._files[name][0])

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a file, on the CPU.

        Raises:
            CheckpointError: it is missing, or is not what was written.
        """
        path = self.folder / name
        if name not in self._files:
            raise CheckpointError(f"{self.path} lists no file {name!r}")
        size, checksum = self._files[name]
        data = _read(path, size)
        if hashlib.sha256(data).hexdigest() != checksum:
            raise CheckpointError(
                f"{path} is damaged: its sha256 is not the one in {INDEX}; take another checkpoint"
            )
        module = safetensors()
        try:
            with torch.device("cpu"):  # whatever the default device is
                tensors: dict[str, torch.Tensor] = module.load(data)
        except MemoryError:
            raise
        except Exception as error:  # safetensors' own, KeyError, ... : written by something else
            raise CheckpointError(f"{path} is no safetensors file: {error}") from error
        return tensors


def restored(tensor: torch.Tensor, dtype: str, shape: list[int]) -> torch.Tensor:
    """What ``_stored`` was given, of a dtype by name.

    Raises:
        ValueError: it does not fit.
    """
    if dtype not in DTYPES:
        raise ValueError(f"torch has no dtype {dtype!r}")
    wanted = DTYPES[dtype]
    as_bytes = wanted not in _NATIVE and tensor.dtype is torch.uint8 and tensor.dim() == 1
    if as_bytes and tensor.nbytes == math.prod(shape) * wanted.itemsize:
        tensor = tensor.view(wanted).reshape(shape)
    if tensor.dtype is not wanted or list(tensor.shape) != shape:
        raise ValueError(f"a tensor is {tensor.dtype} {list(tensor.shape)}, not {dtype} {shape}")
    return tensor


def _read(path: Path, size: int | None = None) -> bytes:
    """All of a file; a CheckpointError if there is none or it has another size."""
    with _reading(path), path.open("rb") as file:
        if size is not None:
            _require_bytes(path, file.fileno(), size)
        return file.read()


def _require_bytes(path: Path, file: int, size: int) -> None:
    found = os.fstat(file).st_size
    if found != size:
        raise CheckpointError(f"{path} is damaged: it has {found} bytes, not {size}")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Have every OSError become a CheckpointError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; latest(root) names a checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _require_size(size: Any) -> int:
    if type(size) is not int or size < 0:
        raise ValueError(f"a file of {size!r} bytes")
    return size


def _require(pattern: re.Pattern[str], text: Any) -> str:
    if type(text) is not str or not pattern.fullmatch(text):
        raise ValueError(f"{text!r:.80} where {pattern.pattern} must be")
    return text


@contextlib.contextmanager
def naming(reader: Reader, file: str) -> Iterator[None]:
    """What is raised within, of content that is not what was saved, becomes a CheckpointError."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{reader.folder / file} is not what was saved: {error}") from error
