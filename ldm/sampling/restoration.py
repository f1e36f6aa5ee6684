"""Pictures out of a network that undoes a corruption: from a fully corrupted start down to level 0.

Enters: a Pipeline with a corruption, conditioning and keyed unit noise. Leaves: latents (B, C, h, w). generation.py
walks here where the pipeline has a corruption; the samplers themselves are in diffusion/corruption.py.
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.corruption import Corruption, Restore, cold_diffusion, denoise_renoise, step_between
from ldm.diffusion.corruption_config import CorruptionConfig, build_corruption
from ldm.diffusion.guidance import guided
from ldm.diffusion.sampler_choice import chosen_sampler
from ldm.diffusion.sampler_contract import Noise, Progress, given
from ldm.models.conditioning import Conditioning
from ldm.pipeline.pipeline import Pipeline
from ldm.sampling.ready_network import ready


@torch.no_grad()
def restored_latents(
    pipeline: Pipeline,
    conditioning: Conditioning,
    unconditional: Conditioning,
    noise: Tensor,
    *,
    sampler: str,
    steps: int,
    guidance: float,
    guidance_rescale: float = 0.0,
    fresh_noise: Noise | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Latents (B, C, h, w) as the network knows them (scaled), float32, from level T down to 0.

    Classifier-free guidance is of x0, which is what the network predicts. Arithmetic outside of it is float64.

    Args:
        noise: (B, C + CorruptionConfig.more_noise, h, w), unit normal: the start, and the corruption's noise.
        steps: evaluations of the network, at most: levels go down by T / steps, rounded up.
        fresh_noise: step -> the noise of denoise_renoise's next corruption, of the same shape.

    Raises:
        ValueError: a sampler of noise, a step of less than a level, latents of another size than in training, a start
            of which the checkpoint does not tell the distribution.
    """
    config = pipeline.corruption
    if config is None:
        raise ValueError("corruption: found a model of Gaussian noise, expected one of a corruption")
    chosen_sampler(sampler, config)
    channels, height, width = pipeline.latent_shape
    if tuple(noise.shape[2:]) != (height, width):
        factor = pipeline.autoencoder.downsample_factor
        raise ValueError(
            f"height, width: found {noise.shape[2] * factor}x{noise.shape[3] * factor} pixels, expected "
            f"{height * factor}x{width * factor}: a corruption's levels are those of the size that it was trained at"
        )
    corruption = build_corruption(config, height, width)
    step = step_between(corruption.levels, steps)
    of_levels = math.ceil(corruption.levels / step)
    noise = noise.to(pipeline.device).double()

    done = 0
    z = start_of(config, corruption, noise, channels)
    with ready(pipeline, conditioning, unconditional, guidance) as (unet, conditioning, unconditional):

        def network(z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
            predicted: Tensor = unet(z.float(), level, conditioning)
            return predicted.double()

        guide = guided(network, conditioning, unconditional, guidance, guidance_rescale)

        def restore(z: Tensor, level: Tensor) -> Tensor:
            nonlocal done
            predicted = guide(z, level)
            done += 1
            if progress is not None:
                progress(done, of_levels)
            return predicted

        latents = walk(restore, corruption, z, sampler=sampler, noise=noise, fresh_noise=fresh_noise, step=step)
    return latents.float()


def refuse_settings_of_noise(spacing: str, variance: str | None, *, init_image: bool) -> None:
    """Raises ValueError for settings of sampling that mean nothing to a corruption."""
    for name, found, usual in (("spacing", spacing, "trailing"), ("variance", variance, None)):
        if found != usual:
            raise ValueError(f"{name}: found {found!r} with a corruption, expected none: it has levels, and no noise")
    if init_image:
        raise ValueError("init_image: found with a corruption, expected none: its levels are not those of noise")


def walk(
    restore: Restore,
    corruption: Corruption,
    z: Tensor,
    *,
    sampler: str,
    noise: Tensor,
    fresh_noise: Noise | None,
    step: int,
) -> Tensor:
    """From z at level T to level 0 by the sampler of that name; each takes the noise of its own kind."""
    if sampler == "cold_diffusion":
        return cold_diffusion(restore, corruption, z, noise=noise, step=step)
    return denoise_renoise(restore, corruption, z, noise=given(fresh_noise, sampler), step=step)


def start_of(config: CorruptionConfig, corruption: Corruption, noise: Tensor, channels: int) -> Tensor:
    """z (B, C, h, w) at level T out of unit noise (B, C + more_noise, h, w), in its dtype.

    Of masking nothing is left but what replaces pixels. Of the others it is D(x, T) of a picture x of one colour, whose
    channels are drawn from the Gaussian with the data's mean and covariance, and a little noise (Bansal et al. 2022,
    section 5.2): the noise's own means over the pixels are that draw, and what is left of it the little noise, which
    is independent of them.

    Raises:
        ValueError: start_mean is not known, or is of other channels.
    """
    level = torch.full((len(noise),), corruption.levels, device=noise.device)
    if not config.starts_from_means:
        return corruption(noise.new_zeros(len(noise), channels, *noise.shape[2:]), level, noise)
    if config.start_mean is None or config.start_covariance is None:
        raise ValueError(
            "corruption.start_mean: not known, expected the mean of each channel over the data, of which sampling "
            "starts: training estimates it before its first step, and writes it into each checkpoint"
        )
    if len(config.start_mean) != channels:
        raise ValueError(
            f"corruption.start_mean: found {len(config.start_mean)} numbers, expected {channels}, a channel each"
        )
    mean, covariance = (noise.new_tensor(values) for values in (config.start_mean, config.start_covariance))
    own = noise.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    unit = own[:, :, 0, 0] * math.sqrt(noise.shape[2] * noise.shape[3])
    colour = mean + unit @ square_root(covariance)
    return corruption(colour[:, :, None, None].expand_as(noise), level, noise) + config.start_noise * (noise - own)


def square_root(covariance: Tensor) -> Tensor:
    """The symmetric root of a covariance (C, C), which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
