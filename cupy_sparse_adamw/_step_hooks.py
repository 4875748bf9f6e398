"""torch's hooks and profiler around ``step``, where there are any."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether something wants to be called around a step, or told of it."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or torch._C._autograd._profiler_enabled()
    )


def hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` as torch.optim.Optimizer would have wrapped it, at no cost if nobody watches.

    Its wrapper is 30 calls of Python and two of the dispatcher even then: a fifth of a step of one
    id (docs/performance.md).
    """
    watched = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def either(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        # A subclass's own step, which calls this one, is wrapped by torch: hooks run there.
        is_outermost = type(self).step is either
        return (watched if is_outermost and _is_watched(self) else step)(self, *args, **kwargs)

    either.hooked = True  # type: ignore[attr-defined]  # torch asks for this before it wraps
    return either
