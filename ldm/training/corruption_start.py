"""What sampling of a corruption starts from, estimated from the data before the first step.

Enters: latents of the run's first positions. Leaves: the CorruptionConfig with mean and covariance of their channels'
means; a function of config and shards alone, whatever the number of processes.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ldm.diffusion.corruption_config import CorruptionConfig


def with_start(config: CorruptionConfig, latents: Iterable[Tensor]) -> CorruptionConfig:
    """The config with start_mean and start_covariance of the first `start_samples` latents, batches of (B, C, h, w).

    The mean over the pixels of each channel of a sample is one observation; the covariance is the unbiased one.

    Raises:
        ValueError: fewer than two latents.
    """
    means: list[Tensor] = []
    seen = 0
    for batch in latents:
        means.append(batch.double().mean(dim=(2, 3)).cpu())
        seen += len(batch)
        if seen >= config.start_samples:
            break
    observed = torch.cat(means)[: config.start_samples] if means else torch.empty(0, 0)
    if len(observed) < 2:
        raise ValueError(
            f"corruption.start_mean: found {len(observed)} latents to estimate it from, expected 2 or more"
        )
    covariance = torch.atleast_2d(observed.T.cov())
    covariance = (covariance + covariance.T) / 2  # exactly symmetric, whatever the order of the sums
    return replace(config, start_mean=observed.mean(dim=0).tolist(), start_covariance=covariance.tolist())
