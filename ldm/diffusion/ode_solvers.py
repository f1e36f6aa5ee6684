"""Solvers of the probability-flow ODE in sigma with given steps: Euler, and Heun with EDM's churn.

Enters and leaves: as sampler_contract.py says. The ODE is dx/dsigma = (x - D(x, sigma)) / sigma (Karras et al. 2022,
Eq. 1 with Eq. 3), whose solutions are nearly straight at high and at low sigma.
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.process import TERMINAL_SIGMA
from ldm.diffusion.sampler_contract import Noise, Progress, evaluate, given, levels_of, steps


@torch.no_grad()
def euler(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None, progress: Progress | None = None
) -> Tensor:
    """Euler's method, order 1: x + (sigma_next - sigma) (x - D) / sigma, as a mean of D and x; the steps of ddim."""
    for _, sigma, sigma_next in steps(sigmas, progress):
        x = torch.lerp(evaluate(denoise, x, sigma), x, sigma_next / sigma)
    return x


@torch.no_grad()
def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    progress: Progress | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's method with churn (Karras et al. 2022, Alg. 1 and 2): order 2, two evaluations a step, one in the last.

    One also in the step from the terminal level of a zero-SNR schedule, where sigma is infinite and a mean of slopes
    over it means nothing, while Euler's step is exact in the limit: denoised + sigma_next noise.

    With s_churn > 0 a step from a level within [s_tmin, s_tmax] first adds noise, up to sigma (1 + gamma), gamma =
    min(s_churn / steps, sqrt(2) - 1), but never above sigmas[0], the highest level that the run may ask the network
    about: the first step is without churn.

    Raises:
        ValueError: s_churn or s_noise below 0; churn without `noise`.
    """
    if s_churn < 0 or s_noise < 0:
        raise ValueError(f"heun: found s_churn {s_churn}, s_noise {s_noise}, expected 0 or more")
    draw = given(noise, "heun with s_churn > 0") if s_churn > 0 else None
    levels = levels_of(sigmas)
    highest, gamma = levels[0], min(s_churn / (len(levels) - 1), math.sqrt(2) - 1)
    for i, sigma, sigma_next in steps(sigmas, progress):
        sigma_hat = min(sigma * (1 + gamma), highest) if s_tmin <= sigma <= s_tmax else sigma
        if draw is not None and sigma_hat > sigma:
            x = x.add(draw(i).to(x), alpha=s_noise * math.sqrt(sigma_hat**2 - sigma**2))
        denoised = evaluate(denoise, x, sigma_hat)
        x = torch.lerp(denoised, x, sigma_next / sigma_hat)
        if sigma_next > 0 and sigma_hat < TERMINAL_SIGMA:
            # The mean of both slopes, with this Euler step put in, differs from it by this multiple of D' - D.
            x = x.add(evaluate(denoise, x, sigma_next) - denoised, alpha=(sigma_hat - sigma_next) / (2 * sigma_next))
    return x
