"""Guidance: functions that make one denoiser out of another, or of two.

Enters: a Denoiser (denoiser.py) and the conditioning of a batch. Leaves: denoise(x, sigma), which is all that a sampler
knows of the model.
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, Denoiser, Predict, Prediction, Predictor
from ldm.models.conditioning import Conditioning


def unguided(denoiser: Denoiser, conditioning: Conditioning) -> Denoise:
    """The denoiser with this conditioning of B samples."""
    return lambda x, sigma: denoiser(x, sigma, conditioning)


def guided(
    denoiser: Denoiser,
    conditioning: Conditioning,
    unconditional: Conditioning | None,
    scale: float,
    rescale: float = 0.0,
) -> Denoise:
    """Classifier-free guidance D_u + scale (D_c - D_u) (Ho & Salimans 2022, Eq. 6), both halves in one batch of 2 B.

    Scale 1 is the conditional denoiser alone, in a batch of B; 0 is the unconditional one. For `unconditional` take the
    empty caption, or a negative prompt. `rescale` in [0, 1] moves the result's standard deviation, sample by sample,
    towards that of D_c (Lin et al. 2023, Eq. 15 and 16): that of x0, which is what guidance overexposes; at a terminal
    timestep of zero SNR it equals their rescaling of v.

    Raises:
        ValueError: rescale outside of [0, 1], a scale that is not finite, or one other than 1 with nothing to lead away
            from (None: a model that knows one conditioning only), or with another number of samples in it.
    """
    check_scale(scale)
    check_rescale(rescale)
    if scale == 1:
        return unguided(denoiser, conditioning)
    both = Conditioning.cat([check_unconditional(unconditional, conditioning, scale), conditioning])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return _led(denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both), scale, rescale)

    return denoise


def guided_prediction(
    predictor: Predictor,
    conditioning: Conditioning,
    unconditional: Conditioning | None,
    scale: float,
    rescale: float = 0.0,
) -> Predict:
    """`guided`, and with it the variance half: raw_u + scale (raw_c - raw_u), which `rescale` leaves as it is.

    What guidance samples from is p_u^(1 - scale) p_c^scale, whose precision is linear in theirs, and so to first order
    is its log-variance, which raw is linear in: as diffusers' StableDiffusionPipeline guides all that the network puts
    out. Raises as `guided`.
    """
    check_scale(scale)
    check_rescale(rescale)
    if scale == 1:
        return lambda x, sigma: predictor(x, sigma, conditioning)
    both = Conditioning.cat([check_unconditional(unconditional, conditioning, scale), conditioning])

    def predict(x: Tensor, sigma: Tensor) -> Prediction:
        x0, raw = predictor(torch.cat([x, x]), torch.cat([sigma, sigma]), both)
        return Prediction(_led(x0, scale, rescale), None if raw is None else _led(raw, scale, 0.0))

    return predict


def _led(both: Tensor, scale: float, rescale: float) -> Tensor:
    """Guidance of the unconditional and the conditional half of a batch, in this order: (2 B, ...) -> (B, ...)."""
    without, with_text = both.chunk(2)
    result = torch.lerp(without, with_text, scale)
    if rescale:
        dims = tuple(range(1, both.ndim))
        ratio = with_text.std(dims, keepdim=True) / result.std(dims, keepdim=True)
        result = result * (rescale * ratio + (1 - rescale))
    return result


def perpendicular(
    denoiser: Denoiser,
    conditioning: Conditioning,
    unconditional: Conditioning | None,
    negative: Conditioning,
    scale: float,
    weight: float = 1.0,
) -> Denoise:
    """Perp-Neg D_u + scale (d_c - weight d_n'), d_n' what of d_n is perpendicular to d_c (Armandpour et al. 2023).

    d_c = D_c - D_u and d_n = D_n - D_u, perpendicular sample by sample: what the negative prompt shares with the prompt
    is left, which guided(..., unconditional=negative) takes away. Three thirds in one batch of 3 B.

    Raises:
        ValueError: scale or weight that is not finite, conditionings of different numbers of samples, no unconditional.
    """
    check_scale(scale)
    if not math.isfinite(weight):
        raise ValueError(f"guidance: found weight {weight}, expected a finite number")
    empty = check_unconditional(unconditional, conditioning, scale)
    if len(negative) != len(conditioning):
        raise ValueError(f"guidance: found {len(negative)} negative samples, expected {len(conditioning)}")
    all_three = Conditioning.cat([empty, conditioning, negative])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        without, with_text, with_negative = denoiser(
            x.repeat(3, *[1] * (x.ndim - 1)), sigma.repeat(3), all_three
        ).chunk(3)
        towards, away = with_text - without, with_negative - without
        dims = tuple(range(1, x.ndim))
        length = towards.square().sum(dims, keepdim=True)
        # Where the prompt asks for nothing, all of the negative is perpendicular to it.
        along = (away * towards).sum(dims, keepdim=True) / torch.where(length > 0, length, 1)
        return without + scale * (towards - weight * (away - along * towards))

    return denoise


def autoguided(strong: Denoise, weak: Denoise, scale: float) -> Denoise:
    """Autoguidance D_w + scale (D_s - D_w): away from a weaker network (Karras et al. 2024).

    `weak` is a smaller or less trained network with the same conditioning, or none: unguided(...) of either. Scale 1
    is `strong` alone, and `weak` is not evaluated.

    Raises:
        ValueError: a scale that is not finite.
    """
    check_scale(scale)
    if scale == 1:
        return strong

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.lerp(weak(x, sigma), strong(x, sigma), scale)

    return denoise


def in_interval(inside: Denoise, outside: Denoise, low: float, high: float) -> Denoise:
    """`inside` where low < sigma <= high, `outside` elsewhere: guidance in an interval (Kynkaanniemi et al. 2024).

    Usually of guided(...) and unguided(...), which halves the cost of the levels outside. Where the levels of a batch
    lie on both sides of a bound, as ode_adaptive's may, both are asked for all of it.

    Raises:
        ValueError: an empty interval.
    """
    if not low < high:
        raise ValueError(f"guidance interval: found low {low}, high {high}, expected low < high")

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        lies_inside = [low < level <= high for level in sigma.tolist()]
        if len(set(lies_inside)) == 1:
            return (inside if lies_inside[0] else outside)(x, sigma)
        which = torch.tensor(lies_inside, device=x.device).view(-1, *[1] * (x.ndim - 1))
        return torch.where(which, inside(x, sigma), outside(x, sigma))

    return denoise


def check_rescale(rescale: float) -> None:
    """Raises ValueError unless the share of rescaling is in [0, 1]."""
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance: found rescale {rescale}, expected 0 to 1")


def check_scale(scale: float) -> None:
    """Raises ValueError unless the guidance scale is finite."""
    if not math.isfinite(scale):
        raise ValueError(f"guidance: found scale {scale}, expected a finite number")


def check_unconditional(unconditional: Conditioning | None, conditioning: Conditioning, scale: float) -> Conditioning:
    """What guidance leads away from; raises ValueError if there is none, or not one for each sample."""
    if unconditional is None:
        raise ValueError(
            f"guidance: found scale {scale} with a model that has one conditioning only, to which guidance has no "
            "alternative; use scale 1, or a model trained with dropped captions"
        )
    if len(unconditional) != len(conditioning):
        raise ValueError(f"guidance: found {len(unconditional)} unconditional samples, expected {len(conditioning)}")
    return unconditional
