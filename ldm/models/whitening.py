"""Folds scales and shifts of latents into an autoencoder's 1x1 convolutions, so that every tool loads it as it is.

In: an AutoencoderKL, and for whitening pictures of what it was trained on. Out: the same autoencoder, in place, whose
latents have mean 0 and standard deviation 1 in each channel; or one that needs no shift_factor.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

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


@torch.no_grad()
def without_shift(autoencoder: AutoencoderKL) -> AutoencoderKL:
    """The autoencoder with its shift_factor inside its 1x1 convolutions, for tools that do not apply the config's.

    `quant_conv` subtracts the shift from each mean, `post_quant_conv` adds it again before decoding; where there is
    none it becomes an identity with that bias. Latents and pictures stay the same up to rounding: identities copy their
    input exactly, and the shift is added in the order in which it was. All other weights are shared, not copied.
    Returns the autoencoder itself where it has no shift.
    """
    shift, channels = autoencoder.config.shift_factor, autoencoder.config.latent_channels
    if not shift:
        return autoencoder
    config = replace(autoencoder.config, shift_factor=None, use_quant_conv=True, use_post_quant_conv=True)
    state = autoencoder.state_dict()
    like = autoencoder.encoder.conv_in.weight
    for name, size in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        if f"{name}.weight" not in state:
            state[f"{name}.weight"] = torch.eye(size).to(like)[:, :, None, None]
            state[f"{name}.bias"] = torch.zeros(size).to(like)
    # In float64, so that each sum is rounded once, to the dtype of the weights.
    mean, logvar = state["quant_conv.bias"].double().chunk(2)
    state["quant_conv.bias"] = torch.cat([mean - shift, logvar]).to(like)
    gain = state["post_quant_conv.weight"].double().sum(dim=(1, 2, 3))
    state["post_quant_conv.bias"] = (state["post_quant_conv.bias"].double() + shift * gain).to(like)
    with torch.device("meta"):
        folded = AutoencoderKL(config)
    folded.load_state_dict(state, assign=True)
    return folded.requires_grad_(False).eval()
