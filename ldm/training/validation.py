"""Validation loss: held-out shards, fixed draws, averaged weights.

Enters: the network with its average and a loader of validation batches, the same batches each time. Leaves: one number,
comparable along the run and between runs, because noise and timesteps of each held-out sample never change.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ldm.data.batch import Batch
from ldm.models.unet import UNet


@dataclass
class ValidationConfig:
    """How often the loss on `data.validation` is computed, and on how many samples."""

    every: int = 1000
    """Optimizer steps between two validation losses; 0 computes none."""
    samples: int = 1024
    """Held-out samples, from the first on; fewer when the shards hold fewer."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"validation.every: found {self.every}, expected 0 (off) or more")
        if self.samples < 1:
            raise ValueError(f"validation.samples: found {self.samples}, expected 1 or more")


@torch.no_grad()
def validation_loss(
    unet: UNet, batches: Iterable[Batch], loss_of: Callable[[Batch], Tensor], device: torch.device
) -> float:
    """Mean loss over this and all other processes' batches, on the device; `loss_of` gives (B,). Collective."""
    total = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, samples
    training = unet.training
    unet.eval()
    try:
        for batch in batches:
            loss = loss_of(batch)
            total += torch.stack([loss.double().sum(), torch.full_like(loss, 1.0, dtype=torch.float64).sum()])
    finally:
        unet.train(training)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()
