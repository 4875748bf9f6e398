"""What the host asks of a GPU beside launches."""

from __future__ import annotations

import torch

from ..._types import HostCopy
from . import _interop


def copy_to_host(tensor: torch.Tensor) -> HostCopy:
    """Begin to copy a small tensor to the host, behind what the stream has to do."""
    copy = _interop.HostCopy(tensor)
    copy.send()
    return copy


def is_capturing(device: torch.device) -> bool:
    """Whether torch's current stream is being captured into a CUDA graph."""
    return _interop.is_capturing(device)


def pairs_moments(device: torch.device) -> bool:
    """Whether steps are quicker with rows of exp_avg and exp_avg_sq side by side: not known."""
    return False  # nor do kernels take them
