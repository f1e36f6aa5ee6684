"""Whitens an autoencoder's latents and folds that into its 1x1 convolutions, so that every tool loads it as it is.

In: an AutoencoderKL and pictures of what it was trained on.
Out: the same autoencoder, in place, whose latents have mean 0 and standard deviation 1 in each channel.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.models.autoencoder import AutoencoderKL, posterior_mean


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each latent channel, both (C,), over samples of the posterior."""

    mean: Tensor
    std: Tensor


@torch.no_grad()
def latent_statistics(autoencoder: AutoencoderKL, batches: Iterable[Tensor]) -> LatentStatistics:
    """Statistics over pictures (B, 3, H, W) in [-1, 1]; the variance is that of means plus the mean of variances."""
    channels = autoencoder.config.latent_channels
    sums = torch.zeros(3, channels, dtype=torch.float64)  # of means, of squared means, of variances
    count = 0
    for images in batches:
        moments = autoencoder.encode(images).double().cpu()
        mean, variance = posterior_mean(moments).double(), moments[:, channels:].clamp(-30, 20).exp()
        sums += torch.stack([part.sum(dim=(0, 2, 3)) for part in (mean, mean.square(), variance)])
        count += mean.numel() // channels
    if not count:
        raise ValueError("latent_statistics: found no pictures, expected at least one batch")
    mean, square, variance = sums / count
    return LatentStatistics(mean, (square - mean.square() + variance).sqrt())


@torch.no_grad()
def fold_whitening(autoencoder: AutoencoderKL, statistics: LatentStatistics) -> None:
    """Makes latents (z - mean) / std in place: `quant_conv` applies it, `post_quant_conv` undoes it before decoding.

    Reconstructions stay the same up to rounding: both convolutions are 1x1, and each channel's log-variance moves by
    -2 log(std). Raises ValueError where the autoencoder lacks either convolution.
    """
    before, after = autoencoder.quant_conv, autoencoder.post_quant_conv
    if before is None or after is None or before.bias is None or after.bias is None:
        raise ValueError(
            "fold_whitening: found an autoencoder without quant_conv or post_quant_conv, expected both: set "
            "use_quant_conv and use_post_quant_conv"
        )
    channels = autoencoder.config.latent_channels
    mean, std = statistics.mean.to(before.weight), statistics.std.to(before.weight)
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]
