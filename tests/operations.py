"""Operations on tables and optimizers, and all that is known of them: to make each fail.

``CASES`` has an operation on a state for each name. ``Case.run`` makes it fail at many places; each
time all must be as before or as after it, and running it again must do what it does undisturbed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from cupy_sparse_adamw import AdmitHook, FilterHook, HashTable, NormalInitializer, SparseAdamW

SOAK = bool(os.environ.get("SOAK"))


def tensors_of(value: Any, path: str = "") -> dict[str, Any]:
    """All that is in nested state, by path; tensors by their bits."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().reshape(-1).contiguous()
        return {path: (value.dtype, value.shape, flat.view(torch.uint8).numpy().tobytes())}
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {path: value}
    found = {f"{path} is": type(value).__name__}
    for key, x in items:
        found |= tensors_of(x, f"{path}/{key}")
    return found


def by_id(state: dict[str, Any]) -> dict[str, Any]:
    """Rows in the order of their ids."""
    order = state["ids"].argsort()
    is_by_row = {k for k, x in state.items() if getattr(x, "shape", ())[:1] == order.shape}
    return {key: x[order] if key in is_by_row else x for key, x in state.items()}


class World:
    """Tables by name, embeddings by name, and one optimizer of all."""

    def __init__(
        self,
        tables: dict[str, HashTable],
        embeddings: dict[str, Any] | None = None,
        steps: int = 1,
        **settings: Any,
    ) -> None:
        self.tables, self.embeddings = tables, embeddings or {}
        self.optimizer = SparseAdamW({**tables, **self.embeddings}, lr=0.1, **settings)
        self.optimizer.set_grad_accum_steps(steps)
        self.saved: dict[str, Any] = {}

    def snapshot(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, table in self.tables.items():
            ids, rows = table.ids_map()
            assert torch.equal(table._store.find(ids), rows)
            assert len(set(ids.tolist())) == ids.numel() == len(table)
            found |= tensors_of(by_id(dict(table.state_dict())), name)
            found |= tensors_of(table._grads.by_id(name), f"{name} gradients")
            found[f"{name} dtype"] = str(table.dtype)
        for name, embedding in self.embeddings.items():
            grad = embedding.weight.grad
            found |= tensors_of(dict(embedding.state_dict()), name)
            found[f"{name} gradients"] = None if grad is None else str(grad)
        state = self.optimizer.state_dict()
        for name in self.tables.keys() & state["state"].keys():
            state["state"][name] = by_id(state["state"][name])
        return found | tensors_of(state, "optimizer")

    def go_on(self) -> World:
        """Train some more, which brings new ids: into free rows, if any."""
        self.optimizer.set_grad_accum_steps(1)
        trained(self, ids_from(15, 30), ids_from(25, 33))
        return trained(self, ids_from(28, 40))


def new_table(dim: int = 3, dtype: torch.dtype = torch.float32, **settings: Any) -> HashTable:
    generator = torch.Generator(device="cpu").manual_seed(1)
    initializer = NormalInitializer(generator=generator)
    device = torch.get_default_device()
    return HashTable([dim], 4, dtype, device, initializer=initializer, **settings)


def ids_from(begin: int, end: int) -> torch.Tensor:
    return torch.arange(begin, end, dtype=torch.int64) * 7919


def train(world: World, *batches: torch.Tensor) -> None:
    """Leave the gradients of each batch, one backward each, on every table."""
    for ids in batches:
        for table in world.tables.values():
            out = table(ids)
            (out * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).sum().backward()
        for embedding in world.embeddings.values():
            out = embedding(ids.remainder(embedding.weight.shape[0]))
            (out * torch.linspace(-1, 2, out.shape[-1], dtype=out.dtype)).sum().backward()


def trained(world: World, *batches: torch.Tensor) -> World:
    train(world, *batches)
    world.optimizer.step()
    world.optimizer.zero_grad()
    return world


class Counting(contextlib.AbstractContextManager[Any]):
    """Counts the places at which something may fail."""

    count: int


Failing = Callable[[int, type[BaseException]], Counting]


class Case:
    """An operation: ``make`` a state, ``act`` on it.

    Floats must agree within ``tolerance``: looking at rows that are behind brings them up to date,
    and in two goes they are rounded otherwise than in one. ``survives``: it may go on where
    something failed, and do all of it.
    """

    def __init__(
        self,
        make: Callable[[], World],
        act: Callable[[World], Any],
        tolerance: float = 0.0,
        survives: bool = False,
    ) -> None:
        self.make, self.act = make, act
        self.tolerance, self.survives = tolerance, survives

    def run(self, failing: Failing, errors: Sequence[type[BaseException]], at_most: int) -> int:
        """Fail at every place, or at so many of them, with one of the errors in turn.

        Args:
            failing: ``failing(n, error)`` is a context in which the n-th place fails; it has
                counted them as ``count``.
            errors: each of them at every place with SOAK=1.
            at_most: how many places.

        Returns:
            How often it failed.
        """
        before = self.make().snapshot()
        once, twice = self.undisturbed(1), self.undisturbed(2)
        counted, world = failing(0, errors[0]), self.make()
        with counted:
            self.act(world)
        places: Sequence[int] = range(1, counted.count + 1)
        if len(places) > at_most:
            places = sorted({1 + i * counted.count // at_most for i in range(at_most)})
        failures = 0
        for at in places:
            for error in errors if SOAK else [errors[at % len(errors)]]:
                world, is_done = self.make(), False
                with contextlib.suppress(error), failing(at, error):
                    self.act(world)
                    is_done = True
                assert self.survives or not is_done, f"place {at}: no {error.__name__}"
                found = world.snapshot()
                is_before = not is_done and not self.differing(found, before)
                if not is_before and (keys := self.differing(found, once[1])):
                    print(f"place {at}: unlike before:", self.differing(found, before)[:12])
                    print(f"place {at}: unlike after:", keys[:12])
                    pytest.fail(f"place {at}: the state is neither as before nor as after")
                output = tensors_of(self.act(world))
                result = output, world.snapshot(), world.go_on().snapshot()
                for one, other in zip(result, once if is_before else twice, strict=True):
                    assert not self.differing(one, other), at
                failures += 1
        return failures

    def differing(self, one: dict[str, Any], other: dict[str, Any]) -> list[str]:
        """Where two snapshots differ."""
        missing = object()
        return sorted(
            key
            for key in one.keys() | other.keys()
            if not are_close(one.get(key, missing), other.get(key, missing), self.tolerance)
        )

    def undisturbed(self, times: int) -> tuple[dict[str, Any], ...]:
        """What acting so often returns, leaves, and is trained on to."""
        world = self.make()
        for _ in range(times):
            output = tensors_of(self.act(world))
        return output, world.snapshot(), world.go_on().snapshot()


def are_close(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two of what ``tensors_of`` finds are equal, floats within a tolerance."""
    if one == other:
        return True
    if not (tolerance and isinstance(one, tuple) and isinstance(other, tuple)):
        return False
    if one[:2] != other[:2] or not one[0].is_floating_point:
        return False
    a, b = (torch.frombuffer(bytearray(x[2]), dtype=x[0]) for x in (one, other))
    return bool((a - b).abs().max() <= tolerance * a.abs().max())


# ---------------------------------------------------------------------- the operations


def some() -> World:
    """Rows that were trained, others that went, and gradients that wait."""
    world = trained(World({"t": new_table()}), ids_from(0, 30))
    world.tables["t"].delete(ids_from(3, 7))
    train(world, ids_from(10, 14))
    return world


def crowded(**hooks: Any) -> Callable[[], World]:
    """A table with hooks and few places left."""

    def make() -> World:
        world = trained(World({"t": new_table(**hooks)}), ids_from(0, 20), ids_from(0, 20))
        trained(world, ids_from(5, 20))
        return world

    return make


def many() -> World:
    """Tables that no engine updates in one launch, and embeddings, with accumulated gradients."""
    torch.manual_seed(3)
    tables = {
        "wide": new_table(8),
        "narrow": new_table(3),
        "exact": new_table(3, torch.float64),
        "half": new_table(4, torch.bfloat16),
        "by id": new_table(3, grad_reduce_by="id"),
    }
    embeddings = {
        "weight": torch.nn.Embedding(12, 5, sparse=True),
        "other": torch.nn.Embedding(12, 5, sparse=True, dtype=torch.float64),
    }
    world = World(tables, embeddings, steps=2)
    train(world, ids_from(0, 15).repeat(2))
    world.optimizer.step()
    train(world, ids_from(5, 25))
    return world


def later() -> World:
    """``many``, after an update."""
    world = many()
    world.optimizer.step()
    world.optimizer.zero_grad()
    world.optimizer.set_grad_accum_steps(1)
    train(world, ids_from(9, 20), ids_from(3, 11))
    return world


def behind(untouched: str) -> Callable[[], World]:
    """Rows that missed a few steps, and gradients that wait for the next."""

    def make() -> World:
        torch.manual_seed(3)
        tables = {"t": new_table(), "by row": new_table(5)}
        embeddings = {"weight": torch.nn.Embedding(12, 5, sparse=True)}
        by = "row" if untouched == "decay" else "table"
        world = World(tables, embeddings, untouched=untouched, bias_correction=by)
        for number in range(4):
            trained(world, ids_from(number, 8 + 2 * number))
        train(world, ids_from(5, 20))
        return world

    return make


def look(begin: int, end: int, training: bool = True) -> Callable[[World], Any]:
    def act(world: World) -> Any:
        table = world.tables["t"]
        table.train(training)
        with torch.no_grad():
            out = table(ids_from(begin, end))
        table.train()
        return out

    return act


def look_to_train(world: World) -> Any:
    return world.tables["t"](ids_from(20, 120)).detach()


def backward(world: World) -> None:
    out = world.tables["t"](ids_from(10, 14))
    out.backward(torch.ones(1, 3).expand(4, 3))


def insert(world: World) -> None:
    ids = ids_from(24, 100)
    world.tables["t"].insert(ids, torch.arange(3.0 * ids.numel()).view(-1, 3))


def insert_few(world: World) -> None:
    ids = ids_from(14, 26)
    world.tables["t"].insert(ids, torch.arange(3.0 * ids.numel()).view(-1, 3))


def delete(world: World) -> None:
    world.tables["t"].delete(ids_from(8, 20))


def other_weights(world: World) -> World:
    source = new_table()
    source.insert(ids_from(20, 100), torch.arange(240.0).view(-1, 3))
    world.saved = source.state_dict()
    return world


def other_moments() -> World:
    """One to load what another has, with accumulated gradients."""
    torch.manual_seed(3)
    worlds = []
    for batch in (ids_from(0, 15), ids_from(4, 20)):
        embeddings = {"weight": torch.nn.Embedding(12, 5, sparse=True)}
        world = World({"t": new_table(), "exact": new_table(3, torch.float64)}, embeddings, steps=2)
        for _ in range(3):
            train(world, batch)
            world.optimizer.step()
        worlds.append(world)
    for table in worlds[0].tables.values():
        table.insert(ids_from(0, 20), torch.ones(20, 3, dtype=table.dtype))
    worlds[0].saved = worlds[1].optimizer.state_dict()
    return worlds[0]


def load_table(world: World) -> None:
    world.tables["t"].load_state_dict(world.saved)


def load_optimizer(world: World) -> None:
    world.optimizer.load_state_dict(world.saved)


def step(world: World) -> None:
    world.optimizer.step()


def convert(world: World) -> None:
    world.tables["t"].double()


LRU = {"filter_hook": FilterHook("LRU", {"max_rows": 24})}
LFU = {"filter_hook": FilterHook("LFU", {"max_rows": 24})}
STEPS = {"filter_hook": FilterHook("GlobalStepFilter", {"filter_step": 2})}
SEEN_TWICE = {"admit_hook": AdmitHook("Frequency", {"min_frequency": 2, "width": 64})}

CASES = {
    "lookup, growing": Case(some, look(20, 120)),
    "lookup, growing, with gradients": Case(some, look_to_train),
    "lookup, of known ids": Case(some, look(0, 3)),
    "lookup, in eval mode": Case(some, look(20, 40, training=False)),
    "lookup, LRU evicts": Case(crowded(**LRU), look(12, 30)),
    "lookup, LFU evicts": Case(crowded(**LFU), look(12, 30)),
    "lookup, step filter": Case(crowded(**STEPS), look(12, 90)),
    "lookup, admission": Case(crowded(**SEEN_TWICE), look(10, 40)),
    "lookup, admission and LRU": Case(crowded(**SEEN_TWICE, **LRU), look(16, 30)),
    "lookup of known ids, admission and LRU": Case(crowded(**SEEN_TWICE, **LRU), look(16, 20)),
    "backward": Case(some, backward),
    "first step": Case(many, step),
    "later step": Case(later, step),
    "step, rows behind by decay": Case(behind("decay"), step, 1e-5),
    "step, rows behind": Case(behind("dense"), step, 1e-5),
    "lookup, rows behind": Case(behind("dense"), look(0, 30), 1e-5),
    "lookup in eval mode, rows behind": Case(behind("dense"), look(0, 30, training=False), 1e-5),
    "insert": Case(some, insert),
    "insert, LRU evicts": Case(crowded(**LRU), insert_few),
    "insert, step filter": Case(crowded(**STEPS), insert),
    "delete": Case(some, delete),
    "reserve": Case(some, lambda world: world.tables["t"].reserve(500)),
    "clear": Case(some, lambda world: world.tables["t"].clear()),
    "state_dict": Case(later, lambda world: [x.state_dict() for x in world.tables.values()]),
    "the optimizer's state_dict": Case(later, lambda world: world.optimizer.state_dict()),
    "load_state_dict": Case(lambda: other_weights(some()), load_table),
    "the optimizer's load_state_dict": Case(other_moments, load_optimizer),
    "conversion": Case(some, convert),
}
