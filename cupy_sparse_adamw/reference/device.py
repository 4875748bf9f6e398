"""What the host asks of a device beside arithmetic."""

from __future__ import annotations

import torch

from .._types import Arrived, HostCopy


def copy_to_host(tensor: torch.Tensor) -> HostCopy:
    """Copy a small tensor to the host. Waits for its device."""
    return Arrived(tensor)


def is_capturing(device: torch.device) -> bool:
    """Whether torch's current stream is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def pairs_moments(device: torch.device) -> bool:
    """Whether steps are quicker with rows of exp_avg and exp_avg_sq side by side: no."""
    return False
