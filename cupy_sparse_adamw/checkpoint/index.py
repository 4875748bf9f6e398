"""The checkpoints in a folder, and which of them build on which.

An increment's index names its base, by name and by checksum: together they are a chain, whose last
link is full.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import files
from .files import CheckpointError, Reader

FORMAT = 1
STEP = re.compile(r"step-(\d{10,19})")


def checkpoints(root: Path) -> list[Path]:
    """Those in a folder, the highest step first."""
    if not root.is_dir():
        return []
    found = [(int(m[1]), path) for path in root.iterdir() if (m := STEP.fullmatch(path.name))]
    return [path for step, path in sorted(found, reverse=True) if path.name == f"step-{step:010d}"]


def read_chain(path: Path, read: dict[Path, Reader]) -> list[Reader]:
    """The checkpoint and those that it builds on, down to a full one.

    Args:
        path: its folder.
        read: those that were read already, by folder; more are added.

    Raises:
        CheckpointError: one of them is missing or damaged.
    """
    chain = [_read_index(path, read)]
    while (base := chain[-1].index["base"]) is not None:
        folder = path.parent / base["name"]
        what = f"{chain[-1].folder} holds the changes since {folder}"
        try:
            reader = _read_index(folder, read)
        except CheckpointError as error:
            raise CheckpointError(f"{what}, but {error}") from error
        if reader.checksum != base["sha256"]:
            raise CheckpointError(f"{what}, but that was replaced by another checkpoint")
        chain.append(reader)
    return chain


def _read_index(path: Path, read: dict[Path, Reader]) -> Reader:
    if path not in read:
        reader = Reader(path)
        if reader.index.get("format") != FORMAT:
            raise CheckpointError(
                f"{reader.path} has format {reader.index.get('format')!r}, this version reads "
                f"{FORMAT}"
            )
        try:
            _require_index(reader)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{reader.path} is no index of a checkpoint: {error}") from error
        read[path] = reader
    return read[path]


def _require_index(reader: Reader) -> None:
    """Raise one of several exceptions unless the index is what ``save`` makes."""

    def require(value: Any, *types: type) -> Any:
        if type(value) not in types:
            raise TypeError(f"{value!r:.80} is no {types[0].__name__}")
        return value

    def require_count(value: Any, low: int = 0) -> int:
        if require(value, int) < low:
            raise ValueError(f"{value} is below {low}")
        return int(value)

    def row_bytes(slot: dict[str, Any]) -> int:
        dtype = files.DTYPES[require(slot["dtype"], str)]
        return require_count(slot["dim"], 1) * int(dtype.itemsize)

    index = reader.index
    sizes = {path.name: size for path, size in reader.files()}
    require_count(index["step"])
    require(index["follow"], bool)
    require(index["state"], dict)
    base = require(index["base"], dict, type(None))
    if base is not None:
        require(base["sha256"], str)
        if not STEP.fullmatch(require(base["name"], str)):
            raise ValueError(f"its base is {base['name']!r}")
    for tensor in require(index["tensors"], list):
        require(tensor["dtype"], str)
        for length in require(tensor["shape"], list):
            require_count(length)
        sizes[tensor["file"]]
    for entry in require(index["tables"], dict).values():
        require(entry["kind"], str)
        for name in require(entry["owner"], list, type(None)) or ():
            require(name, str)
        require_count(entry["rows"])
        for key in ("whole", "in_model"):
            require(entry[key], bool)
        per_row = 8 + sum(row_bytes(slot) for slot in require(entry["slots"], dict).values())
        if not entry["whole"] and base is None:
            raise ValueError("there are changes, but no base")
        for name in require(entry["deleted"], list):
            sizes[name]
        seen = set()
        for chunk in require(entry["chunks"], list):
            if chunk["file"] in seen:
                raise ValueError(f"{chunk['file']} is listed twice: an id is saved twice")
            seen.add(chunk["file"])
            if require_count(chunk["rows"]) * per_row > sizes[chunk["file"]]:
                raise ValueError(f"{chunk['file']} is too short")


def _is_complete(chain: Iterable[Reader]) -> bool:
    """Whether all files are there, with their sizes."""
    for reader in chain:
        for path, size in reader.files():
            try:
                if path.stat().st_size != size:
                    return False
            except OSError:
                return False
    return True


def usable(root: Path, checkpoints: list[tuple[str, str, str]]) -> tuple[str, str, str] | None:
    """The latest of (root, name, checksum) that is still there to build on."""
    for checkpoint in sorted(set(checkpoints), reverse=True):
        try:
            chain = read_chain(root / checkpoint[1], {})
        except CheckpointError:
            continue
        if chain[0].checksum == checkpoint[2] and _is_complete(chain):
            return checkpoint
    return None


def remove_old(root: Path, keep: int, newest: Path) -> None:
    """Leave ``keep`` checkpoints, ``newest`` among them, and what they build on.

    Damaged ones neither count nor go.
    """
    read: dict[Path, Reader] = {}
    chains = {}
    for path in checkpoints(root):
        try:
            chain = read_chain(path, read)
        except CheckpointError:
            continue
        if _is_complete(chain):
            chains[path] = {reader.folder for reader in chain}
    kept = [newest, *(path for path in chains if path != newest)][:keep]
    needed = set().union(*(chains.get(path, {path}) for path in kept))
    # An increment goes before its base, or a kill between the two would leave it without one.
    for path in sorted(chains.keys() - needed, key=lambda x: (len(chains[x]), x), reverse=True):
        if path in needed:
            continue
        try:
            files.remove(path)
        except OSError as error:
            warnings.warn(f"an old checkpoint stays: {error}", stacklevel=3)
            needed |= chains[path]  # so must what it builds on; the next save tries again


def parts_of(chain: list[Reader], name: str) -> list[tuple[Reader, dict[str, Any]]]:
    """What a table is put together from, the newest first, the last of them whole."""
    parts = []
    for reader in chain:
        if name not in reader.index["tables"]:
            raise CheckpointError(f"{reader.path} lacks table {name!r}, which others build on")
        parts.append((reader, reader.index["tables"][name]))
        if parts[-1][1]["whole"]:
            return parts
    raise CheckpointError(f"{chain[-1].path} has no whole table {name!r}")
