"""Guidance: functions that make one denoiser out of another, or of two.

Enters: a Denoiser (denoiser.py) and the conditioning of a batch. Leaves: denoise(x, sigma), which is all that a sampler
knows of the model.
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.models.conditioning import Conditioning


def unguided(denoiser: Denoiser, conditioning: Conditioning) -> Denoise:
    """The denoiser with this conditioning of B samples."""
    return lambda x, sigma: denoiser(x, sigma, conditioning)


def guided(
    denoiser: Denoiser, conditioning: Conditioning, unconditional: Conditioning, scale: float, rescale: float = 0.0
) -> Denoise:
    """Classifier-free guidance D_u + scale (D_c - D_u) (Ho & Salimans 2022, Eq. 6), both halves in one batch of 2 B.

    Scale 1 is the conditional denoiser alone, in a batch of B; 0 is the unconditional one. `rescale` in [0, 1] moves
    the result's standard deviation, sample by sample, towards that of D_c (Lin et al. 2023, Eq. 15 and 16): that of x0,
    which is what guidance overexposes; at a terminal timestep of zero SNR it equals their rescaling of v.

    Raises:
        ValueError: rescale outside of [0, 1], or a scale that is not finite.
    """
    if not math.isfinite(scale):
        raise ValueError(f"guidance: found scale {scale}, expected a finite number")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance: found rescale {rescale}, expected 0 to 1")
    if scale == 1:
        return unguided(denoiser, conditioning)
    both = Conditioning.cat([unconditional, conditioning])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        without, with_text = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        result = without + scale * (with_text - without)
        if rescale:
            dims = tuple(range(1, x.ndim))
            ratio = with_text.std(dims, keepdim=True) / result.std(dims, keepdim=True)
            result = result * (rescale * ratio + (1 - rescale))
        return result

    return denoise


def in_interval(inside: Denoise, outside: Denoise, low: float, high: float) -> Denoise:
    """`inside` where low < sigma <= high, `outside` elsewhere: guidance in an interval (Kynkaanniemi et al. 2024).

    Usually of guided(...) and unguided(...), which halves the cost of the levels outside. A batch is at one level, as
    it is in every sampler.

    Raises:
        ValueError: an empty interval; when called, levels on both sides of a bound.
    """
    if not low < high:
        raise ValueError(f"guidance interval: found low {low}, high {high}, expected low < high")

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        lies_inside = {low < level <= high for level in sigma.tolist()}
        if len(lies_inside) > 1:
            raise ValueError(f"guidance interval: found sigmas {sigma.tolist()} on both sides, expected one level")
        return (inside if lies_inside == {True} else outside)(x, sigma)

    return denoise
