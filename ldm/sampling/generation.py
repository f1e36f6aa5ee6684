"""The walk from prompts to pictures.

Enters: a Pipeline, prompts with a seed and an index for each. Leaves: pictures (N, H, W, 3) uint8.
Walk: encode_prompts -> initial_noise -> sample_latents -> decode_latents; each can be called by itself, and `generate`
calls them batch by batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ldm.data.draws import Purpose, normal
from ldm.diffusion.ancestral import analytic_dpm, ddpm, ddpm_learned
from ldm.diffusion.denoiser import denoiser, predictor
from ldm.diffusion.guidance import guided, guided_prediction
from ldm.diffusion.sampler_choice import chosen_sampler
from ldm.diffusion.sampler_contract import Noise, Progress
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.spacing import sigmas
from ldm.diffusion.variance import VARIANCES, VarianceName
from ldm.models.autoencoder import AutoencoderKL, unscale_latents
from ldm.models.conditioning import Conditioning
from ldm.models.unet_config import UNetConfig
from ldm.pipeline.fit import check_draws
from ldm.pipeline.pipeline import Pipeline, latent_shape_of
from ldm.pipeline.variances import variances_at
from ldm.sampling.editing import NOTHING, Edit, prepare
from ldm.sampling.given_pictures import GivenPicture
from ldm.sampling.packed_weights import packed_convolutions
from ldm.sampling.ready_network import ready
from ldm.sampling.restoration import refuse_settings_of_noise, restored_latents


def encode_prompts(pipeline: Pipeline, prompts: Sequence[str], negative: str = "") -> tuple[Conditioning, Conditioning]:
    """Conditioning of B prompts, and B times that of what guidance leads away from: by default the empty caption.

    An empty `negative` is what dropped captions were in training: the encoders' states of "", or zeros where the
    conditioner has these for empty captions (SDXL), as diffusers' pipelines give for negative_prompt=None. Their
    negative_prompt="" is the encoders' states there, which SDXL was not trained with.
    """
    conditioning = pipeline.text_encoder.encode(prompts).to(dtype=torch.float32)
    without = pipeline.text_encoder.encode([negative]) if negative else pipeline.text_encoder.empty()  # one row
    return conditioning, without.to(dtype=torch.float32).expand(len(prompts))


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Unit noise (B, *shape) float32 on the CPU, a function of seed and each picture's index alone."""
    return addressed_noise(seed, Purpose.SAMPLE_NOISE, indices, shape)


def addressed_noise(
    seed: int, purpose: Purpose, indices: Sequence[int], shape: tuple[int, ...], *address: int
) -> Tensor:
    """Unit noise (B, *shape) float32: row b is drawn at (seed, purpose, indices[b], *address)."""
    return torch.from_numpy(np.stack([normal(seed, purpose, index, *address, shape=shape) for index in indices]))


def step_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Noise:
    """Noise of the steps of a stochastic sampler: step -> (B, *shape), a function of seed, index and step alone."""
    return lambda step: addressed_noise(seed, Purpose.SAMPLER_NOISE, indices, shape, step).to(device)


def sizes_of(noise: Tensor, factor: int) -> Tensor:
    """Sizes (B, 6) for noise (B, C, h, w): a whole picture of its own size, as diffusers tells SDXL's network."""
    height, width = noise.shape[-2] * factor, noise.shape[-1] * factor
    return torch.tensor([[height, width, 0, 0, height, width]]).expand(len(noise), -1)


def with_sizes(pipeline: Pipeline, conditioning: Conditioning, noise: Tensor) -> Conditioning:
    """The conditioning, with sizes for noise (B, C, h, w) where the network takes them and it has none."""
    if not pipeline.unet.config.pooled_channels or conditioning.sizes is not None:
        return conditioning
    return replace(conditioning, sizes=sizes_of(noise, pipeline.autoencoder.downsample_factor).to(pipeline.device))


@torch.no_grad()
def sample_latents(
    pipeline: Pipeline,
    conditioning: Conditioning,
    unconditional: Conditioning,
    noise: Tensor,
    *,
    sampler: str,
    steps: int,
    guidance: float,
    guidance_rescale: float = 0.0,
    spacing: str = "trailing",
    variance: str | None = None,
    fresh_noise: Noise | None = None,
    progress: Progress | None = None,
    edit: Edit = NOTHING,
) -> Tensor:
    """Latents (B, C, h, w) as the network knows them (scaled), float32, from unit noise of that shape.

    A network that takes sizes is told those of the whole picture, where the conditioning has none.

    Args:
        noise: unit variance, also where sampling starts from a level with signal left.
        variance: of the steps of the sampler ddpm, one of variance.VARIANCES; None: learned where the network learned
            one, otherwise small.
        fresh_noise: what a stochastic sampler adds at each step.
        edit: of a given picture, as editing.prepare makes it.

    Raises:
        ValueError: an unknown sampler or spacing, steps or guidance out of range, a variance that there is not.
    """
    chosen_sampler(sampler, pipeline.corruption)
    conditioning, unconditional = (with_sizes(pipeline, part, noise) for part in (conditioning, unconditional))
    if pipeline.corruption is not None:
        refuse_settings_of_noise(spacing, variance, init_image=edit is not NOTHING)
        return restored_latents(
            pipeline,
            conditioning,
            unconditional,
            noise,
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            guidance_rescale=guidance_rescale,
            fresh_noise=fresh_noise,
            progress=progress,
        )
    variance_name = checked_variance(sampler, pipeline.learned_variance, variance, edited=edit.guides)
    if sampler == "analytic_dpm" and edit.guides:
        raise ValueError(
            "sampler: found 'analytic_dpm' with a mask, a measurement or repeated steps, expected another one: its "
            "variances are those of the network's own prediction, and steps of a whole run"
        )
    levels = edit.levels(sigmas(pipeline.schedule, steps, spacing))
    x = edit.start(noise.to(pipeline.device), levels)
    with ready(pipeline, conditioning, unconditional, guidance) as (unet, conditioning, unconditional):
        network = edit.network(unet)
        denoise = guided(
            denoiser(network, pipeline.schedule, pipeline.parameterization, pipeline.sigma_data),
            conditioning,
            unconditional,
            guidance,
            guidance_rescale,
        )
        if variance_name == "learned":
            learned = predictor(network, pipeline.schedule, pipeline.parameterization, pipeline.sigma_data)
            predict = guided_prediction(learned, conditioning, unconditional, guidance, guidance_rescale)
            latents = ddpm_learned(predict, x, levels, noise=fresh_noise, progress=progress)
        else:
            sample = SAMPLERS[sampler] if variance_name is None else partial(ddpm, variance=variance_name)
            if sampler == "analytic_dpm":
                sample = partial(analytic_dpm, variances=variances_at(pipeline.variances, levels))
            latents = edit.sample(sample, edit.denoise(denoise), x, levels, fresh_noise, progress)
    return latents.float()


def checked_variance(sampler: str, learned: bool, variance: str | None, *, edited: bool = False) -> VarianceName | None:
    """The variance of ddpm's steps, for None the learned one of a network that has it; None for other samplers.

    Args:
        edited: the denoiser is steered by a mask or a measurement, or steps are repeated: the network's variance is
            that of its own prediction and step, so that the default is small.

    Raises:
        ValueError: an unknown variance, one for another sampler, or a learned one of a network without, or `edited`.
    """
    if variance is not None and variance not in VARIANCES:
        raise ValueError(f"variance: found {variance!r}, expected one of {', '.join(VARIANCES)}")
    if sampler != "ddpm":
        if variance is not None:
            raise ValueError(f"variance: found {variance!r} with sampler {sampler!r}, expected none, or sampler 'ddpm'")
        return None
    if variance == "learned" and not learned:
        raise ValueError(
            "variance: found 'learned', expected 'small' or 'large': the network puts out no more channels than the "
            "latents have, and so no variance (it is trained with objective.learned_variance)"
        )
    if variance == "learned" and edited:
        raise ValueError(
            "variance: found 'learned' with a mask, a measurement or repeated steps, expected 'small' or 'large': what "
            "the network learned is the variance of its own prediction"
        )
    return VARIANCES[variance or ("learned" if learned and not edited else "small")]


@torch.no_grad()
def decode_latents(pipeline: Pipeline, latents: Tensor, edit: Edit = NOTHING) -> np.ndarray:
    """Pictures (B, H, W, 3) uint8 of scaled latents (B, C, h, w); decoded in the autoencoder's own precision.

    What `edit` gives of them, pixels or a measurement, they have.
    """
    with packed_convolutions(pipeline.autoencoder.decoder):
        images = pipeline.autoencoder.decode(unscale_latents(latents, pipeline.autoencoder.config))  # (B, 3, H, W)
    return to_uint8(edit.finished(images))


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1], clamped, to (B, H, W, 3) uint8, rounded to the nearest."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    pictures: np.ndarray = scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pictures


def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    sampler: str,
    steps: int,
    guidance: float,
    indices: Sequence[int] | None = None,
    negative: str = "",
    guidance_rescale: float = 0.0,
    spacing: str = "trailing",
    variance: str | None = None,
    height: int | None = None,
    width: int | None = None,
    noise: Tensor | None = None,
    given: GivenPicture | None = None,
    keep: Callable[[Tensor], object] | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> np.ndarray:
    """One picture for each prompt: (N, H, W, 3) uint8.

    The picture of a prompt is a function of seed, its index and the other settings; batch size and the other prompts
    change it by rounding only. Nothing is drawn from, or left in, a global generator.

    Args:
        seed: 0 .. 2^64 - 1.
        indices: address of each picture's noise under the seed; 0, 1, 2, ... when None.
        guidance: scale; 1 is the conditional network alone, which costs half.
        negative: what to lead away from, instead of the empty caption.
        variance: as `sample_latents` takes it.
        height, width: of the pictures in pixels; None: what the network was trained on, or what `noise` says.
        noise: unit noise (N, C, h, w) to start from, instead of that of seed and indices.
        given: what all pictures start from, of their size (GivenPicture.fitted).
        keep: called with the latents (B, C, h, w) of each batch, on the CPU, before they are decoded.
        progress: called after each step of each batch with the steps done and the steps of all batches.

    Raises:
        ValueError: no prompts, another number of indices, a batch size below 1, noise of another shape, a network for
            inpainting, or as `sample_latents`.
    """
    indices = range(len(prompts)) if indices is None else indices
    if not prompts or len(indices) != len(prompts):
        raise ValueError(f"generate: found {len(prompts)} prompts and {len(indices)} indices, expected one for each")
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, expected 1 or more")
    masked = given is not None and given.inpaints
    shape = checked_shape(pipeline.unet.config, pipeline.autoencoder, len(prompts), height, width, noise, masked=masked)
    more_noise = 0 if pipeline.corruption is None else pipeline.corruption.more_noise
    if more_noise and noise is not None:
        raise ValueError(
            "noise: found with masking that fills with noise, which draws more than a file has; expected none"
        )
    noise_shape = (shape[0] + more_noise, *shape[1:])
    edit = NOTHING if given is None else prepare(pipeline, given, shape)
    pictures = []
    for part, report in batches_of(len(prompts), batch_size, progress):
        conditioning, unconditional = encode_prompts(pipeline, prompts[part], negative)
        latents = sample_latents(
            pipeline,
            conditioning,
            unconditional,
            initial_noise(seed, indices[part], noise_shape) if noise is None else noise[part],
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            guidance_rescale=guidance_rescale,
            spacing=spacing,
            variance=variance,
            fresh_noise=step_noise(seed, indices[part], noise_shape, pipeline.device),
            progress=report,
            edit=edit,
        )
        if keep is not None:
            keep(latents.cpu())
        pictures.append(decode_latents(pipeline, latents, edit))
    return np.concatenate(pictures)


def batches_of(count: int, batch_size: int, progress: Progress | None) -> Iterator[tuple[slice, Progress]]:
    """Which of `count` pictures are in each batch, and what its sampler tells: its steps, as those of all batches."""
    starts = range(0, count, batch_size)
    for batch, first in enumerate(starts):

        def report(done: int, of: int, batch: int = batch) -> None:
            if progress is not None:
                progress(batch * of + done, len(starts) * of)

        yield slice(first, first + batch_size), report


def checked_shape(
    unet: UNetConfig,
    autoencoder: AutoencoderKL,
    count: int,
    height: int | None,
    width: int | None,
    noise: Tensor | None,
    *,
    masked: bool = False,
) -> tuple[int, int, int]:
    """(C, h, w) of the latents that `generate` samples for `count` pictures; raises ValueError where it would.

    Args:
        masked: whether a picture and a mask are given, which inpainting networks need.
    """
    check_draws(unet, autoencoder.config, masked=masked)
    if noise is None:
        return latent_shape_of(unet, autoencoder, height, width)
    factor = autoencoder.downsample_factor
    height, width = height or noise.shape[-2] * factor, width or noise.shape[-1] * factor
    expected = (count, *latent_shape_of(unet, autoencoder, height, width))
    if tuple(noise.shape) != expected:
        raise ValueError(
            f"noise: found shape {tuple(noise.shape)}, expected {expected}: {count} pictures of {height}x{width} "
            f"pixels with the autoencoder's {expected[1]} latent channels and factor {factor}"
        )
    return expected[1:]
