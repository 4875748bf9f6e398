"""What the host asks of a device beside arithmetic; here they are one."""

from __future__ import annotations

import torch

from ..._types import Arrived, HostCopy


def copy_to_host(tensor: torch.Tensor) -> HostCopy:
    """Copy a small tensor, as it is now."""
    return Arrived(tensor)


def is_capturing(device: torch.device) -> bool:
    """Whether what is done on the device now is recorded rather than done: never on the CPU."""
    return False


def pairs_moments(device: torch.device) -> bool:
    """Whether steps are quicker with rows of exp_avg and exp_avg_sq side by side: they are."""
    return True
