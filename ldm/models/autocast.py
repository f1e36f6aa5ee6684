"""Autocast as the models ask about it: the dtype in which it computes, and how to leave it.

Enters: a device. Leaves: a dtype, or a context.
"""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Dtype of the autocast that is on for a device; None when it is off, and for the meta device, which has none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switches autocast off within; costs nothing where it is off already."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
