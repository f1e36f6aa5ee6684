"""The network as a denoiser, whatever it was trained to put out, and guidance as functions around a denoiser.

Enters: a network and its schedule. Leaves: D(x, sigma, conditioning) in variance-exploding coordinates x = x0 + sigma
noise, and from it denoise(x, sigma), which is all that a sampler knows of the model.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.diffusion.objective import TARGETS, Network, check_parameterization, convert
from ldm.diffusion.schedule import Schedule
from ldm.models.conditioning import Conditioning

Denoiser = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x (B, C, H, W), sigma (B,), conditioning) -> expected clean latents (B, C, H, W)."""
Denoise = Callable[[Tensor, Tensor], Tensor]
"""The same with its conditioning and guidance inside."""


def denoiser(network: Network, schedule: Schedule, parameterization: str) -> Denoiser:
    """Expected clean latents D(x, sigma) = E[x0 | x = x0 + sigma noise] out of a network of any parameterization.

    The network sees x / sqrt(1 + sigma^2), in the dtype of its parameters, and the timestep of sigma, float32 at least
    (bf16 would round 999 to 1000) and fractional between training timesteps; the result has x's dtype and device. sigma
    is best given on the CPU, as samplers do: its check and its timestep then never wait for an accelerator.
    At TERMINAL_SIGMA, the terminal timestep of a zero-SNR schedule, the network sees the start noise alone.

    Raises:
        ValueError: unknown parameterization; epsilon with zero terminal SNR; when called, sigma outside the schedule.
    """
    if parameterization not in TARGETS:
        raise ValueError(f"parameterization: found {parameterization!r}, expected one of {[*TARGETS]}")
    check_parameterization(parameterization, schedule.zero_terminal_snr)
    schedule = schedule.to("cpu")
    first = next(network.parameters(), None) if isinstance(network, nn.Module) else None

    def denoise(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        sigma = sigma.to("cpu", torch.float64)
        dtype = x.dtype if first is None else first.dtype
        t = schedule.timestep(sigma).to(x.device, torch.promote_types(dtype, torch.float32))
        alpha = (1 + sigma**2).rsqrt()
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = (c.to(x.device, x.dtype).view(shape) for c in (alpha, alpha * sigma))  # variance-preserving
        x_t = alpha * x
        prediction = network(x_t.to(dtype), t, conditioning).to(x.dtype)
        return convert(prediction, x_t, alpha, sigma, source=parameterization, target="x0")

    return denoise


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
