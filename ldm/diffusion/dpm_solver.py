"""DPM-Solver and DPM-Solver++: exponential integrators in lambda = -log sigma, singlestep, multistep and stochastic.

Enters and leaves: as sampler_contract.py says. In variance-exploding coordinates alpha is 1, e^-h is sigma_next /
sigma, and the papers' linear term of a step is a mean of D and x. DPM-Solver (Lu et al. 2022a) holds the noise eps =
(x - D) / sigma for a polynomial in lambda, DPM-Solver++ (2022b) D.
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.process import TERMINAL_SIGMA
from ldm.diffusion.sampler_contract import Noise, Progress, evaluate, given, steps

LONGEST, BEND = 9.0, 1.75
"""Of dpmpp_3m, for the least error over mixtures of Gaussians of deviations 0.01 to 1.5, from 5 to 50 steps."""
GAUSS = ((0.5 - math.sqrt(0.15), 5 / 18), (0.5, 8 / 18), (0.5 + math.sqrt(0.15), 5 / 18))
"""Nodes and weights of Gauss-Legendre quadrature on [0, 1], exact to degree 5."""


@torch.no_grad()
def dpm_solver_2(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None, progress: Progress | None = None
) -> Tensor:
    """DPM-Solver-2 (Lu et al. 2022a, Alg. 1): order 2, two evaluations a step, the second halfway in lambda.

    One evaluation in a step to sigma 0, where lambda is infinite, and in the step from the terminal level of a zero-SNR
    schedule, where it was: both are then exact in the limit, if D is constant there.
    """
    for _, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        if sigma_next == 0 or sigma >= TERMINAL_SIGMA:
            x = torch.lerp(denoised, x, sigma_next / sigma)
            continue
        middle = math.sqrt(sigma * sigma_next)
        u = torch.lerp(denoised, x, middle / sigma)
        x = x.add(u - evaluate(denoise, u, middle), alpha=(sigma_next - sigma) / middle)
    return x


@torch.no_grad()
def dpm_solver_3(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None, progress: Progress | None = None
) -> Tensor:
    """DPM-Solver-3 (Lu et al. 2022a, Alg. 2, r1 = 1/3, r2 = 2/3): order 3, three evaluations a step.

    One in a step to sigma 0 and from a terminal level, as dpm_solver_2.
    """
    r_1, r_2 = 1 / 3, 2 / 3
    for _, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        if sigma_next == 0 or sigma >= TERMINAL_SIGMA:
            x = torch.lerp(denoised, x, sigma_next / sigma)
            continue
        h = math.log(sigma / sigma_next)
        s_1, s_2 = sigma * math.exp(-r_1 * h), sigma * math.exp(-r_2 * h)
        eps = (x - denoised) / sigma
        u_1 = x.add(eps, alpha=s_1 - sigma)
        d_1 = (u_1 - evaluate(denoise, u_1, s_1)) / s_1 - eps
        u_2 = x.add(eps, alpha=s_2 - sigma)
        u_2.add_(d_1, alpha=-s_2 * r_2 / r_1 * (math.expm1(r_2 * h) / (r_2 * h) - 1))
        d_2 = (u_2 - evaluate(denoise, u_2, s_2)) / s_2 - eps
        x = x.add(eps, alpha=sigma_next - sigma)
        x.add_(d_2, alpha=-sigma_next / r_2 * (math.expm1(h) / h - 1))
    return x


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None, progress: Progress | None = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, Alg. 2): order 2 with one evaluation a step; any spacing of the levels.

    The first step is of order 1, as there is no earlier evaluation, and so is a step to sigma 0, where lambda is
    infinite, and the one after the terminal level of a zero-SNR schedule, where it was.
    """
    previous: tuple[float, Tensor] | None = None
    for _, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        target = denoised
        if previous is not None and sigma_next > 0:
            sigma_before, denoised_before = previous
            r = math.log(sigma_before / sigma) / math.log(sigma / sigma_next)
            target = torch.lerp(denoised_before, denoised, 1 + 1 / (2 * r))  # D + (D - D_before) / (2 r)
        x = torch.lerp(target, x, sigma_next / sigma)
        previous = (sigma, denoised) if sigma < TERMINAL_SIGMA else None
    return x


@torch.no_grad()
def dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None, progress: Progress | None = None
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, section 5): the reverse SDE with dpmpp_2m's D; one evaluation a step.

    Orders of the first and last steps as dpmpp_2m; without the difference of D it is ddpm with beta_tilde. No noise in
    a step to 0.
    """
    draw = given(noise, "dpmpp_2m_sde")
    previous: tuple[float, Tensor] | None = None
    for i, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        target = denoised
        if previous is not None and sigma_next > 0:
            sigma_before, denoised_before = previous
            r = math.log(sigma_before / sigma) / math.log(sigma / sigma_next)
            target = torch.lerp(denoised_before, denoised, 1 + 1 / (2 * r))
        x = torch.lerp(target, x, (sigma_next / sigma) ** 2)  # e^-2h
        if sigma_next > 0:
            x.add_(draw(i).to(x), alpha=sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2))
        previous = (sigma, denoised) if sigma < TERMINAL_SIGMA else None
    return x


@torch.no_grad()
def dpmpp_3m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None, progress: Progress | None = None
) -> Tensor:
    """DPM-Solver++(3M): order 3 with one evaluation a step (Lu et al. 2022b, section 4, k = 3), D a parabola.

    The first step is of order 1 and the second of order 2, for want of earlier evaluations; a step to 0 is of order 1,
    and one that divides sigma by more than LONGEST of order 2. Two things differ from the usual code, which is of order
    2 only, as it takes half of D'', and farther from the exact solution in most runs:
    - D is a parabola in log(s + BEND sigma), s from sigma on, not in lambda = -log s: D approaches its limit as a power
      of s, so that a parabola in lambda goes too far in long steps.
    - The first step, whose error of order h^2 would be the run's, is corrected once D is known at its end (UniC-1, Zhao
      et al. 2023), for which no evaluation is needed.
    """
    history: list[tuple[float, Tensor]] = []
    for _, sigma, sigma_next in steps(sigmas, progress):
        denoised = evaluate(denoise, x, sigma)
        if len(history) == 1:
            h = math.log(history[0][0] / sigma)
            x = x.add(denoised - history[0][1], alpha=1 + math.expm1(-h) / h)
        ratio = sigma_next / sigma
        x = torch.lerp(denoised, x, ratio)
        if history and sigma_next > 0:
            earlier = history if ratio >= 1 / LONGEST else history[-1:]
            if len(history) == 1 and ratio >= 1 / LONGEST:
                r = math.log(history[0][0] / sigma) / -math.log(ratio)
                shares = [(ratio - 1) / (2 * r)]  # as dpmpp_2m
            else:
                shares = _shares(sigma, ratio, [level for level, _ in earlier])
            x.add_(denoised, alpha=-sum(shares))
            for share, (_, denoised_before) in zip(shares, earlier, strict=True):
                x.add_(denoised_before, alpha=share)
        history = [*history[-1:], (sigma, denoised)] if sigma < TERMINAL_SIGMA else []
    return x


def _shares(sigma: float, ratio: float, earlier: list[float]) -> list[float]:
    """Shares of D at earlier levels in a step from sigma to ratio sigma, which D at sigma gives up for them.

    Integrals over the step of e^(u-h), u = 0 to h, times Lagrange's polynomials in z = log(e^-u + BEND).
    """
    h = -math.log(ratio)
    places = [math.log(level / sigma + BEND) for level in (sigma, *earlier)]
    shares = [0.0] * len(earlier)
    for node, weight in GAUSS:
        z = math.log(math.exp(-node * h) + BEND)
        for i, place in enumerate(places[1:]):
            basis = math.prod((z - other) / (place - other) for other in places if other != place)
            shares[i] += weight * h * math.exp((node - 1) * h) * basis
    return shares
