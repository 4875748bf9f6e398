"""Dense tensors of a checkpoint: numbered, each kept once, several to a file."""

from __future__ import annotations

from typing import Any

import torch

from . import files
from .files import Reader, Writer, naming


def place_of(value: Any) -> tuple[Any, ...] | None:
    """What tensors over the same memory share; None of others."""
    if (
        not isinstance(value, torch.Tensor)
        or value.layout is not torch.strided
        or not value.numel()
        or value.device.type == "meta"
    ):
        return None
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


class Dense:
    """The dense tensors of a checkpoint, numbered."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._numbers: dict[tuple[Any, ...], int] = {}

    def keep(self, path: str, tensor: torch.Tensor) -> int:
        """The number of a tensor from now on; ``path`` names it if it cannot be stored."""
        files.require_storable(path, tensor)
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def shared(self, path: str, tensor: torch.Tensor) -> int:
        """``keep``, but once of tensors over the same memory, as tied weights are."""
        place = place_of(tensor)
        if place is None:
            return self.keep(path, tensor)
        if place not in self._numbers:
            self._numbers[place] = self.keep(path, tensor)
        return self._numbers[place]

    def write(self, writer: Writer, file_bytes: int) -> list[dict[str, Any]]:
        """Write all of them, a file for each ``file_bytes``, and list where they are."""
        entries: list[dict[str, Any]] = []
        file: dict[str, torch.Tensor] = {}
        number = size = 0
        for i, tensor in enumerate(self._tensors):
            if file and size + tensor.nbytes > file_bytes:
                writer.tensors(f"dense-{number}.safetensors", file)
                file, number, size = {}, number + 1, 0
            file[str(i)] = tensor
            size += tensor.nbytes
            entries.append(
                {
                    "file": f"dense-{number}.safetensors",
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape),
                }
            )
        if file:
            writer.tensors(f"dense-{number}.safetensors", file)
        return entries


def read_dense(reader: Reader) -> list[torch.Tensor]:
    """The dense tensors by number."""
    entries = reader.index["tensors"]
    found: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(entry["file"] for entry in entries):
        found |= reader.tensors(file)
    result = []
    for number, entry in enumerate(entries):
        with naming(reader, entry["file"]):
            result.append(files.restored(found[str(number)], entry["dtype"], entry["shape"]))
    return result
