"""Samplers: from noise to latents along descending noise levels; one function and one line in SAMPLERS each.

Enters: denoise(x, sigma) -> expected x0, x at the first level (`start`), and the levels (`schedule.sigmas`). Leaves: x
at the last level, 0: the latents. Coordinates are variance-exploding, x = x0 + sigma noise; arithmetic is float64.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.schedule import TERMINAL_SIGMA

Noise = Callable[[int], Tensor]
"""Step index (0, 1, ...) -> unit normal noise of x's shape; the caller's, who addresses it by seed and sample."""
Progress = Callable[[int, int], object]
"""Called after each step with the number of steps done and of all steps."""


class Sampler(Protocol):
    """x (B, ...) at level sigmas[0] -> x at level sigmas[-1], in x's dtype; sigmas is (steps + 1,), descending.

    A deterministic sampler draws no noise; a stochastic one raises ValueError without `noise`. A sampler's own settings
    are further keywords with defaults.
    """

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        *,
        noise: Noise | None = None,
        progress: Progress | None = None,
    ) -> Tensor: ...


def start(noise: Tensor, sigmas: Tensor) -> Tensor:
    """x at the first level out of unit noise: noise sqrt(1 + sigma_max^2), x's deviation for unit data; float64."""
    return noise.double() * math.sqrt(1 + float(sigmas[0]) ** 2)


@torch.no_grad()
def ddpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    progress: Progress | None = None,
    variance: Literal["beta_tilde", "beta"] = "beta_tilde",
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, Alg. 2 and Eq. 7), with the posterior's variance or with beta_t.

    `beta_tilde` is exact for data that is one point, `beta` for unit normal data (section 3.2). No noise in the last
    step.
    """
    if variance not in ("beta_tilde", "beta"):
        raise ValueError(f"variance: found {variance!r}, expected 'beta_tilde' or 'beta'")
    draw, dtype, x = given(noise, "ddpm"), x.dtype, x.double()
    for i, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        x = denoised + (sigma_next / sigma) ** 2 * (x - denoised)
        if sigma_next > 0:
            # beta_t / alphas_cumprod_{t-1}, in variance-exploding coordinates
            beta = (sigma**2 - sigma_next**2) * (1 + sigma_next**2) / (1 + sigma**2)
            beta_tilde = (sigma**2 - sigma_next**2) * sigma_next**2 / sigma**2
            x = x + math.sqrt(beta if variance == "beta" else beta_tilde) * draw(i).to(x)
    return x.to(dtype)


@torch.no_grad()
def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    progress: Progress | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, Eq. 12 and 16): eta 0 is deterministic, 1 is ddpm with beta_tilde; order 1."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: found {eta}, expected 0 to 1")
    dtype, x = x.dtype, x.double()
    draw = given(noise, "ddim with eta > 0") if eta > 0 else None
    for i, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        ratio = sigma_next / sigma
        # kept^2 + fresh^2 = sigma_next^2, in a form whose rounding cannot make a root's argument negative
        kept = sigma_next * math.sqrt(1 - eta**2 + (eta * ratio) ** 2)
        fresh = eta * sigma_next * math.sqrt(1 - ratio**2)
        x = denoised + kept * (x - denoised) / sigma
        if draw is not None and sigma_next > 0:
            x = x + fresh * draw(i).to(x)
    return x.to(dtype)


@torch.no_grad()
def euler(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None, progress: Progress | None = None
) -> Tensor:
    """Euler's method on dx/dsigma = (x - D) / sigma (Karras et al. 2022, Eq. 1 with Eq. 3); the same steps as ddim."""
    dtype, x = x.dtype, x.double()
    for _, sigma, sigma_next in steps(sigmas, progress):
        derivative = (x - evaluate(denoise, x, sigma)) / sigma
        x = x + (sigma_next - sigma) * derivative
    return x.to(dtype)


@torch.no_grad()
def heun(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None, progress: Progress | None = None
) -> Tensor:
    """Heun's method (Karras et al. 2022, Alg. 1): order 2, two evaluations a step, one in the last.

    One also in the step from the terminal level of a zero-SNR schedule, where sigma is infinite and a mean of slopes
    over it means nothing, while Euler's step is exact in the limit: denoised + sigma_next noise.
    """
    dtype, x = x.dtype, x.double()
    for _, sigma, sigma_next in steps(sigmas, progress):
        slope = (x - evaluate(denoise, x, sigma)) / sigma
        ahead = x + (sigma_next - sigma) * slope
        if sigma_next > 0 and sigma < TERMINAL_SIGMA:
            slope = (slope + (ahead - evaluate(denoise, ahead, sigma_next)) / sigma_next) / 2
            ahead = x + (sigma_next - sigma) * slope
        x = ahead
    return x.to(dtype)


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None, progress: Progress | None = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, Alg. 2): order 2 with one evaluation a step; any spacing of the levels.

    lambda = -log sigma. The first step is of order 1, as there is no earlier evaluation, and so is a step to sigma 0,
    where lambda is infinite, and the one after the terminal level of a zero-SNR schedule, where it was.
    """
    dtype, x = x.dtype, x.double()
    previous: tuple[float, Tensor] | None = None
    for _, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        target = denoised
        if previous is not None and sigma_next > 0:
            sigma_before, denoised_before = previous
            r = math.log(sigma_before / sigma) / math.log(sigma / sigma_next)
            target = denoised + (denoised - denoised_before) / (2 * r)
        x = target + sigma_next / sigma * (x - target)
        previous = (sigma, denoised) if sigma < TERMINAL_SIGMA else None
    return x.to(dtype)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
    "heun": heun,
}


def steps(sigmas: Tensor, progress: Progress | None = None) -> Iterator[tuple[int, float, float]]:
    """(step index, sigma, next sigma) of each step; `progress` is told after it.

    Levels are floats, so that a step's coefficients are computed on the host in float64 and never wait for a device.

    Raises:
        ValueError: no steps, or levels that are not finite, not descending, or negative.
    """
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas: found shape {tuple(sigmas.shape)}, expected (steps + 1,) with 1 step or more")
    levels = sigmas.tolist()
    if not (math.isfinite(levels[0]) and levels[-1] >= 0 and all(a > b for a, b in pairwise(levels))):
        raise ValueError(f"sigmas: found {levels}, expected finite levels that descend to 0 or above")
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        yield i, sigma, sigma_next
        if progress is not None:
            progress(i + 1, len(levels) - 1)


def evaluate(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    """denoise(x, sigma) with all of the batch at one level, given on the CPU."""
    return denoise(x, torch.full((x.shape[0],), sigma, dtype=torch.float64))


def given(noise: Noise | None, sampler: str) -> Noise:
    """The caller's noise; raises ValueError where there is none, as no sampler draws from a global generator."""
    if noise is None:
        raise ValueError(f"{sampler} adds noise: give noise=, a function of the step index that returns noise like x")
    return noise
