"""Inpainting with a network that knows nothing of it: a part of the latents is known, the rest is drawn to fit.

Enters: denoise(x, sigma), known latents, which of them are free; or a sampler and how often each step is repeated.
Leaves: a denoise that knows the known part, x at the first level; or the samples of the repeated steps.
"""

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.sampler_contract import Noise, Progress, Sampler, levels_of

RENOISE = 2**32 - 1
"""Draws of one run of a step are numbered from 0 to below this; this one leads back to the step's start."""


def known_region(denoise: Denoise, known: Tensor, free: Tensor) -> Denoise:
    """D(x, sigma) where `free` is 1, and where it is 0 the known latents themselves, which is E[x0 | x, known] there.

    With it every sampler walks as replacement methods do (Song et al. 2021b, appendix I.2; Lugmayr et al. 2022, Eq. 8):
    for D = known a solver's step leads from known + sigma noise to known + sigma_next noise, a stochastic step of the
    posterior's variance (ddpm's small one) draws q(x_next | x, known), Langevin steps keep N(known, sigma^2), and the
    last step ends in the known latents exactly.

    Args:
        known: clean latents, (B or 1, C, h, w).
        free: 1 where latents are drawn, 0 where they are known, (B or 1, 1, h, w).
    """

    def denoise_rest(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(free > 0, denoise(x, sigma), known.to(x))

    return denoise_rest


def known_start(x: Tensor, known: Tensor, free: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """x at the first level `sigma`, with known + sigma noise in its known part: where `known_region` has to start."""
    return torch.where(free > 0, x, known.to(x) + sigma * noise.to(x))


@torch.no_grad()
def resampled(
    sampler: Sampler,
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    repeats: int,
    noise: Noise,
    progress: Progress | None = None,
) -> Tensor:
    """Each step `repeats` times, with noise back to its start between them (RePaint: Lugmayr et al. 2022, Alg. 1).

    A step of replacement draws the free part without regard to what the known part will be a level further down;
    the repeated step sees it, so that both come to fit. The step to 0 is taken once. A sampler with a memory of earlier
    steps has none here, as each step is a run of its own.

    Raises:
        ValueError: repeats below 1, or as levels_of.
    """
    if repeats < 1:
        raise ValueError(f"repeats: found {repeats}, expected 1 or more")
    levels = levels_of(sigmas)
    runs = [repeats if sigma_next > 0 else 1 for sigma_next in levels[1:]]
    done = 0
    for sigma, sigma_next, count in zip(levels[:-1], levels[1:], runs, strict=True):
        step = torch.tensor([sigma, sigma_next], dtype=torch.float64)
        for again in range(count):
            first = done << 32
            if again:
                x = x + (sigma**2 - sigma_next**2) ** 0.5 * noise(first + RENOISE).to(x)
            x = sampler(denoise, x, step, noise=_numbered_from(noise, first))
            done += 1
            if progress is not None:
                progress(done, sum(runs))
    return x


def _numbered_from(noise: Noise, first: int) -> Noise:
    return lambda draw: noise(first + draw)
