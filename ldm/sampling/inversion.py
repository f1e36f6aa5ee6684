"""From a picture back to the noise that leads to it.

Enters: a Pipeline, a given picture, prompts. Leaves: unit noise (N, C, h, w), which the same prompts and settings lead
to the picture again, and other prompts to one that is like it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.ancestral import ddim_inversion
from ldm.diffusion.denoiser import denoiser
from ldm.diffusion.guidance import guided
from ldm.diffusion.sampler_contract import Progress
from ldm.diffusion.samplers import OF_NOISE_ALONE, STOCHASTIC
from ldm.diffusion.spacing import sigmas
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.unet_config import UNetConfig
from ldm.pipeline.fit import inpaints
from ldm.pipeline.pipeline import Pipeline, check_of_noise
from ldm.sampling.editing import prepare
from ldm.sampling.generation import batches_of, encode_prompts, with_sizes
from ldm.sampling.given_pictures import GivenPicture
from ldm.sampling.ready_network import ready

REFINEMENTS = 3
"""Evaluations of each step of inversion beyond the first."""


def check_inverts(sampler: str | None, unet: UNetConfig, autoencoder: AutoencoderConfig) -> None:
    """Raises ValueError where no noise leads back to a picture: with this sampler, or of a network for inpainting."""
    if sampler in STOCHASTIC:
        deterministic = ", ".join(name for name in OF_NOISE_ALONE if name not in STOCHASTIC)
        raise ValueError(
            f"invert: found sampler {sampler}, which adds noise in each step, so that no start noise leads to the "
            f"picture again; expected a deterministic one: {deterministic} (ddim returns best)"
        )
    if inpaints(unet, autoencoder):
        raise ValueError(
            f"invert: found an inpainting network (in_channels {unet.in_channels}), which takes a mask and a masked "
            f"picture beside the noise, expected a checkpoint with in_channels {autoencoder.latent_channels}"
        )


@torch.no_grad()
def invert(
    pipeline: Pipeline,
    prompts: Sequence[str],
    given: GivenPicture,
    shape: tuple[int, int, int],
    *,
    steps: int,
    spacing: str,
    guidance: float,
    guidance_rescale: float = 0.0,
    negative: str = "",
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Tensor:
    """Noise (N, C, h, w) float32 on the CPU that `generate` takes, a row for each prompt, by DDIM backwards.

    Guidance beyond 1 leads away from where the picture is; the way back then follows less well.

    Args:
        shape: (C, h, w) of the latents.

    Raises:
        ValueError: steps, spacing or guidance out of range, or a picture of another size.
    """
    check_of_noise(pipeline, "invert")
    levels = sigmas(pipeline.schedule, steps, spacing)
    edit, found = prepare(pipeline, given, shape), []
    assert edit.latents is not None
    for part, report in batches_of(len(prompts), batch_size, progress):
        both = encode_prompts(pipeline, prompts[part], negative)
        x = edit.latents.expand(len(both[0]), -1, -1, -1)
        conditioning, unconditional = (with_sizes(pipeline, part, x) for part in both)
        with ready(pipeline, conditioning, unconditional, guidance) as (unet, conditioning, unconditional):
            clean = denoiser(unet, pipeline.schedule, pipeline.parameterization, pipeline.sigma_data)
            denoise = guided(clean, conditioning, unconditional, guidance, guidance_rescale)
            x = ddim_inversion(denoise, x.double(), levels, refinements=REFINEMENTS, progress=report)
        found.append((x / (1 + levels[0] ** 2).sqrt()).float().cpu())
    return torch.cat(found)
