"""Training state on disk: full and incremental checkpoints that appear whole or not at all.

See docs/checkpoints.md for the format and what is promised.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .._checks import require_int
from .._signals import uninterrupted
from .._types import MOMENT_DTYPE
from ..embedding_table import EmbeddingTable
from ..hash_table import HashTable
from ..missed_steps import MissedSteps
from ..optim import SparseOptimizer
from ..optimizer_state import build_state, export_state
from ..row_store import LAST_STEP, OPTIMIZER_SLOTS
from ..tables import Table, as_table, filter_out_sparse_param, rows_apart
from . import files
from .dense import Dense, read_dense
from .files import CheckpointError, Reader, Writer, naming
from .index import FORMAT, STEP, checkpoints, parts_of, read_chain, remove_old, usable
from .modules import require_tied, state_of, with_weights
from .plain_state import Reference, pack, unpack
from .tables import IDS, HashTableRows, TableRows, WeightRows, held

__all__ = ["CheckpointError", "latest", "load", "save"]

#: Bytes of a file with rows of a table, or with several dense tensors. What a save or a load takes
#: beyond what there is to be saved or loaded is a few times as much, however large the tables are.
CHUNK_BYTES = 64 << 20


def save(
    root: str | os.PathLike[str],
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    step: int = 0,
    keep: int | None = None,
    incremental: bool = False,
    extra: Any = None,
) -> Path:
    """Write a checkpoint into ``root``: all of it appears there at the end, or nothing.

    Args:
        root: a folder of one training run, made if there is none. One process at a time saves here.
        model: whose ``state_dict`` is saved, HashTables and sparse Embeddings in chunks.
        optimizer: a SparseOptimizer or another torch.optim.Optimizer, or a list or dict of several.
            Moments of tables are saved with their rows, micro-batches that wait for an update too.
        step: the checkpoint's number, at least 0: it becomes ``root/step-0000000042``.
        keep: how many checkpoints stay, this one among them, beside those that increments among
            them build on; None: all.
        incremental: write only rows that changed since the last checkpoint in ``root`` that this
            process saved or loaded; all rows if there is none, or where that is not known. Dense
            tensors are written whole.
        extra: what else shall come back from ``load``: schedulers' ``state_dict``, states of random
            generators, ... : tensors, numbers, strings, bools, None in lists, tuples and dicts.

    Returns:
        The checkpoint's folder.

    Raises:
        TypeError, ValueError: an argument does not fit, or holds what would need pickle.
        FileExistsError: ``root`` has a checkpoint of this step.
        OSError: a file cannot be written; the text names it, and nothing of this checkpoint stays.
        RuntimeError: someone else is saving into ``root``.
        NotImplementedError: a table is RecIS's.
        ImportError: safetensors is not installed.
    """
    files.safetensors()
    root, step = Path(root), require_int("step", step, 0)
    if keep is not None:
        keep = require_int("keep", keep, 1)
    target = root / f"step-{step:010d}"
    if STEP.fullmatch(target.name) is None:
        raise ValueError(f"step must be below 10**19, got {step}")
    optimizers = _optimizers(optimizer)
    tables = _tables(model, optimizers)
    with held(tables):
        for table in tables.values():
            if table.owner is None:  # nobody saves what its rows have missed
                table.bring_up_to_date()
        dense = Dense()
        state = {
            "model": None
            if model is None
            else pack(state_of(model, tables), "model", dense.shared),
            "tables": pack(
                {name: state_of(table, tables) for name, table in _lone(model, tables).items()},
                "tables",
                dense.keep,
            ),
            "optimizers": pack(
                {name: _optimizer_state(each) for name, each in optimizers.items()},
                "optimizer",
                dense.keep,
            ),
            "extra": pack(extra, "extra", dense.keep),
        }
        with torch.no_grad(), files.sole_writer(root):
            if os.path.lexists(target):
                raise FileExistsError(
                    f"{target} exists; save at another step, or remove it and all later ones if "
                    f"training went back to an earlier checkpoint"
                )
            here = str(root.resolve())
            known = [saved.checkpoint for table in tables.values() if (saved := table.saved_rows())]
            base = usable(root, [x for x in known if x[0] == here]) if incremental else None
            with files.appearing(target) as folder:
                writer = Writer(folder)
                entries = {
                    name: _write_table(writer, number, table, base)
                    for number, (name, table) in enumerate(tables.items())
                }
                if all(entry["whole"] for entry in entries.values()):
                    base = None
                follow = incremental or any(x[0] == here for x in known)
                index = {
                    "format": FORMAT,
                    "step": step,
                    "base": None if base is None else {"name": base[1], "sha256": base[2]},
                    "follow": follow,
                    "tables": entries,
                    "tensors": dense.write(writer, CHUNK_BYTES),
                    "state": state,
                }
                checksum = writer.index(index)
            if follow:
                for table in tables.values():
                    _follow(table, (here, target.name, checksum))
            if keep is not None:
                remove_old(root, keep, target)
    return target


def latest(root: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the highest step in ``root``; None if there is none, or no ``root``."""
    found = checkpoints(Path(root))
    return found[0] if found else None


def load(
    path: str | os.PathLike[str], model: torch.nn.Module | None = None, optimizer: Any = None
) -> dict[str, Any]:
    """Restore what ``save`` wrote, into the same model and optimizers or ones like them.

    A HashTable may have another block size, device, dtype of the same kind, or a slice, of which it
    takes the ids. Everything is read and checked before anything changes: if this raises, model and
    optimizers are what they were.

    Args:
        path: the folder of one checkpoint, as ``save`` and ``latest`` return it.
        model: as in ``save``.
        optimizer: as in ``save``, or None: a model can be loaded alone. The moments that its tables
            have then stay with their ids.

    Returns:
        ``{"step": ..., "extra": ...}`` as given to ``save``; tensors in it are on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged; the text names it.
        TypeError, ValueError, RuntimeError: the checkpoint does not fit, as ``load_state_dict``
            raises them.
        ImportError: safetensors is not installed.
    """
    files.safetensors()
    optimizers = _optimizers(optimizer)
    chain = read_chain(Path(path), {})
    newest = chain[0]
    index = newest.index
    with torch.no_grad():
        saved = _read_state(newest)
        if (saved["model"] is None) != (model is None):
            raise ValueError(
                f"{newest.folder} was saved {'with' if model is None else 'without'} a model, so "
                f"it loads {'with' if model is None else 'without'} one"
            )
        if optimizers:
            _require_same("optimizer", saved["optimizers"], optimizers)
        tables = _tables(model, optimizers)
        with held(tables):
            _require_fits(chain, tables, with_moments=bool(optimizers))
            for name, table in tables.items():
                _build_table(chain, name, table, saved, with_moments=bool(optimizers))
            with uninterrupted():
                _install(saved, model, optimizers, tables)
            if index["follow"]:
                checkpoint = (
                    str(newest.folder.resolve().parent),
                    newest.folder.name,
                    newest.checksum,
                )
                for name, table in _tables(model, optimizers).items():  # with the state of now
                    entry = index["tables"][name]
                    if entry["rows"] == table.num_rows() and entry["slots"] == table.layout():
                        _follow(table, checkpoint)
    return {"step": index["step"], "extra": saved["extra"]}


# ---------------------------------------------------------------------- what is saved


def _optimizers(optimizer: Any) -> dict[str, torch.optim.Optimizer]:
    """By name, which is the number in a list."""
    if optimizer is None:
        return {}
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer = [optimizer]
    if isinstance(optimizer, Mapping):
        named = dict(optimizer)
    elif isinstance(optimizer, (list, tuple)):
        named = {str(number): each for number, each in enumerate(optimizer)}
    else:
        named = {"": optimizer}
    for name, each in named.items():
        if not isinstance(name, str) or not isinstance(each, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, or a list or a dict (with strings as "
                f"keys) of some, got {type(each).__name__}"
                + (f" as {name!r}" if isinstance(optimizer, Mapping) else "")
            )
    return named


def _tables(
    model: torch.nn.Module | None, optimizers: Mapping[str, torch.optim.Optimizer]
) -> dict[str, TableRows]:
    """The tables of the model, under their names there, and those of optimizers alone."""
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    owned: dict[int, tuple[tuple[str, str], Table, dict[str, Any]]] = {}
    for of, optimizer in optimizers.items():
        if isinstance(optimizer, SparseOptimizer):
            for _, name, table in optimizer._named_tables():
                owned[id(table.key)] = (of, name), table, optimizer.state.get(table.key, {})
    result: dict[str, TableRows] = {}
    for name, value in ({} if model is None else filter_out_sparse_param(model)).items():
        weight = getattr(value, "weight", None)
        if isinstance(weight, torch.Tensor) and not _can_be_table(weight):
            continue  # a dense tensor like others
        table = as_table(name, value)
        owner, table, state = owned.pop(id(table.key), (None, table, {}))
        result[name] = _rows_of(name, table, owner, state, in_model=True)
    for owner, table, state in owned.values():
        if owner[1] in result:
            raise ValueError(
                f"two tables are named {owner[1]!r}: one in the model, and one that an optimizer "
                f"alone has; give one of them another name"
            )
        result[owner[1]] = _rows_of(owner[1], table, owner, state, in_model=False)
    return result


def _can_be_table(weight: torch.Tensor) -> bool:
    return weight.is_leaf and weight.is_contiguous() and weight.dtype in MOMENT_DTYPE


def _rows_of(
    name: str,
    table: Table,
    owner: tuple[str, str] | None,
    state: dict[str, Any],
    in_model: bool,
) -> TableRows:
    for kind, cls in ((HashTable, HashTableRows), (EmbeddingTable, WeightRows)):
        if isinstance(table, kind):
            return cls(name, table, None if owner is None else [*owner], state, in_model)
    raise NotImplementedError(
        f"table {name!r}: checkpoints do not hold {type(table).__name__} yet; save RecIS's tables "
        f"with RecIS, and optimizer.state_dict() beside them (docs/from-recis.md)"
    )


def _lone(
    model: torch.nn.Module | None, tables: Mapping[str, TableRows]
) -> dict[str, torch.nn.Module]:
    """The HashTables that are not in the model."""
    return {
        name: rows.table
        for name, rows in tables.items()
        if not rows.in_model and isinstance(rows.table, torch.nn.Module)
    }


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if isinstance(optimizer, SparseOptimizer):
        return export_state(optimizer, moments=False)
    return optimizer.state_dict()


def _write_table(
    writer: Writer, number: int, table: TableRows, base: tuple[str, str, str] | None
) -> dict[str, Any]:
    """Write a table's rows, those that changed since ``base`` if that is known."""
    saved = None if base is None else table.saved_rows()
    if saved is not None and saved.checkpoint != base:
        saved = None
    deleted, chunks = [], []
    if saved is not None and saved.deleted:
        ids = torch.cat(saved.deleted).unique()
        for i, part in enumerate(ids.split(max(CHUNK_BYTES // 8, 1))):
            deleted.append(f"deleted-{number}-{i}.safetensors")
            writer.tensors(deleted[-1], {IDS: part})
    for i, chunk in enumerate(table.chunks(saved, CHUNK_BYTES)):
        name = f"table-{number}-{i}.safetensors"
        writer.tensors(name, chunk)
        chunks.append({"file": name, "rows": chunk[IDS].numel()})
    return {
        "kind": table.kind,
        "rows": table.num_rows(),
        "slots": table.layout(),
        "owner": table.owner,
        "in_model": table.in_model,
        "whole": saved is None,
        "deleted": deleted,
        "chunks": chunks,
    }


def _follow(table: TableRows, checkpoint: tuple[str, str, str]) -> None:
    """Note changes from this checkpoint on; without memory for it, the next one has all rows."""
    try:
        table.note_saved(checkpoint)
    except (MemoryError, RuntimeError):
        table.table.saved_rows = None


# ---------------------------------------------------------------------- loading


def _require_same(what: str, saved: Iterable[str], here: Iterable[str]) -> None:
    saved, here = set(saved), set(here)
    if saved - here:
        raise ValueError(f"the checkpoint has {what}s that are not here: {sorted(saved - here)}")
    if here - saved:
        raise ValueError(f"the checkpoint lacks {what}s that are here: {sorted(here - saved)}")


def _read_state(reader: Reader) -> dict[str, Any]:
    """Everything but tables: "model", "tables" that are not in it, "optimizers" and "extra"."""
    packed, tensors = reader.index["state"], read_dense(reader)
    try:
        state = {
            part: unpack(packed[part], tensors.__getitem__, reference)
            for part, reference in (
                ("model", Reference),
                ("tables", Reference),
                ("optimizers", _no_reference),
                ("extra", _no_reference),
            )
        }
        modules = [*state["tables"].values()]
        modules += [] if state["model"] is None else [state["model"]]
        dicts = [x["values"] for x in modules]
        dicts += [x for module in modules for x in module["metadata"].values()]
        for optimizer in state["optimizers"].values():
            dicts += [optimizer["state"], *optimizer["param_groups"]]
        if not all(isinstance(x, dict) for x in dicts):
            raise ValueError("a state is no dict")
        for key, value in [item for module in modules for item in module["values"].items()]:
            if not isinstance(key, str):
                raise ValueError(f"a state has a key {key!r}")
            if isinstance(value, Reference) and value.name not in reader.index["tables"]:
                raise ValueError(f"{key} is the weight of table {value.name!r}, which is not there")
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{reader.path} holds a state that is none: {error}") from error
    return state


def _no_reference(name: str) -> Any:
    raise ValueError(f"a weight of table {name!r} is not in a model")


def _require_fits(chain: list[Reader], tables: Mapping[str, TableRows], with_moments: bool) -> None:
    """Raise unless there are the same tables, and all that is saved of each fits it."""
    entries = chain[0].index["tables"]
    if not with_moments:  # the model alone
        entries = {name: entry for name, entry in entries.items() if entry["in_model"]}
    _require_same("table", entries, tables)
    for name, table in tables.items():
        owner = entries[name]["owner"]
        if with_moments and owner != table.owner:
            raise ValueError(
                f"table {name!r} is that of (optimizer, name) {table.owner}, in the checkpoint it "
                f"is that of {owner}"
            )
        for reader, entry in parts_of(chain, name):
            if entry["kind"] != table.kind:
                raise ValueError(
                    f"table {name!r} is {table.kind}, but in {reader.folder} it is {entry['kind']}"
                )
            table.require_fits(entry["slots"], entry["rows"], with_moments)


def _log_of(saved: dict[str, Any], owner: list[str] | None) -> MissedSteps | None:
    """What a table's rows have missed, by the saved state of its optimizer, if they may have."""
    if owner is None:
        return None
    state = saved["optimizers"][owner[0]]
    which = state["state"].get(owner[1], {}).get("missed")
    if which is None:
        return None
    log = state["missed_steps"][which] = MissedSteps.replayed(state["missed_steps"][which])
    return log  # and whoever needs it next finds it replayed


def _build_table(
    chain: list[Reader],
    name: str,
    table: TableRows,
    saved: dict[str, Any],
    with_moments: bool,
) -> None:
    """Build a table beside the one that there is."""
    parts = parts_of(chain, name)
    newest = parts[0][1]
    in_files = sum(chunk["rows"] for _, entry in parts for chunk in entry["chunks"])
    if newest["rows"] > in_files:
        raise CheckpointError(f"{chain[0].path} names more rows of table {name!r} than it has")
    for reader, entry in parts:  # before memory is taken for what an index claims to have
        for chunk in entry["chunks"]:
            reader.require_there(chunk["file"])
    with naming(chain[0], files.INDEX):
        log = _log_of(saved, newest["owner"])
        if (log is not None) != (LAST_STEP in newest["slots"]):
            raise ValueError(f"table {name!r} has either steps of rows or a log of steps, not both")
    keys = [key for key, slot in OPTIMIZER_SLOTS.items() if slot in newest["slots"]]
    table.start(newest["rows"], keys if with_moments or log is not None else [], log)
    for reader, entry in reversed(parts):
        slots = entry["slots"]
        for file in entry["deleted"]:
            with naming(reader, file):
                table.delete(_rows_in(reader.tensors(file), {})[IDS])
        for chunk in entry["chunks"]:
            with naming(reader, chunk["file"]):
                tensors = _rows_in(reader.tensors(chunk["file"]), slots, chunk["rows"])
                table.put(tensors.pop(IDS), tensors)
            del tensors
        if entry["whole"]:
            with naming(reader, files.INDEX):
                table.require_whole()
    with naming(chain[0], files.INDEX):
        table.finish(keep_moments=not with_moments)


def _rows_in(
    tensors: dict[str, torch.Tensor],
    slots: Mapping[str, Mapping[str, Any]],
    count: int | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a file, if they are ids [n] and [n, D] of each slot; n is ``count``."""
    ids = tensors[IDS]
    shape = ids.shape if count is None else (count,)
    if ids.dtype is not torch.int64 or ids.dim() != 1 or ids.shape != shape:
        raise ValueError(f"ids are {ids.dtype} {list(ids.shape)}")
    if tensors.keys() != {IDS, *slots}:
        raise ValueError(f"it holds {sorted(tensors)}, not {sorted({IDS, *slots})}")
    shaped = {
        name: files.restored(tensors[name], slot["dtype"], [ids.numel(), slot["dim"]])
        for name, slot in slots.items()
    }
    return {IDS: ids, **shaped}


def _install(
    saved: dict[str, Any],
    model: torch.nn.Module | None,
    optimizers: Mapping[str, torch.optim.Optimizer],
    tables: Mapping[str, TableRows],
) -> None:
    """Put everything in place, or nothing if something raises."""
    modules = [] if model is None else [(model, saved["model"])]
    lone = _lone(model, tables)
    if optimizers:
        _require_same("table", saved["tables"], lone)
        modules += [(lone[name], saved["tables"][name]) for name in lone]
    finish: list[Callable[[], None]] = [rows.install for rows in tables.values()]
    undo: list[Callable[[], Any]] = []
    with rows_apart():
        try:
            for rows in tables.values():
                rows.exchange()
                undo.append(rows.exchange)
            for module, state in modules:
                here = state_of(module, tables)
                require_tied(state, here)
                before = with_weights(here, tables, copied=True)
                undo.append(functools.partial(module.load_state_dict, before))
                module.load_state_dict(with_weights(state, tables))
            for name, optimizer in optimizers.items():
                state = saved["optimizers"][name]
                _like_devices(state, optimizer)
                if isinstance(optimizer, SparseOptimizer):
                    own = {x.owner[1]: x for x in tables.values() if x.owner and x.owner[0] == name}
                    finish.append(_build_optimizer(optimizer, state, own))
            for name, optimizer in optimizers.items():
                if not isinstance(optimizer, SparseOptimizer):
                    undo.append(functools.partial(_restore, optimizer, dict(vars(optimizer))))
                    optimizer.load_state_dict(saved["optimizers"][name])
        except BaseException:
            for action in reversed(undo):
                action()
            raise
    for action in finish:
        action()


def _restore(optimizer: torch.optim.Optimizer, attributes: dict[str, Any]) -> None:
    """Undo torch's ``load_state_dict``, which replaces these and leaves them as they are."""
    optimizer.state, optimizer.param_groups = attributes["state"], attributes["param_groups"]


def _build_optimizer(
    optimizer: SparseOptimizer, state: dict[str, Any], tables: Mapping[str, TableRows]
) -> Callable[[], None]:
    for name in state["state"]:
        if name in tables and tables[name].moments is None:
            raise ValueError(f"the checkpoint has no moments of table {name!r}")
    return build_state(optimizer, state, {name: rows.moments for name, rows in tables.items()})


def _like_devices(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Settings that are tensors come onto the devices of those at hand."""
    for group, here in zip(state["param_groups"], optimizer.param_groups, strict=False):
        for key, value in group.items():
            if isinstance(value, torch.Tensor) and isinstance(here.get(key), torch.Tensor):
                group[key] = value.to(here[key].device)
