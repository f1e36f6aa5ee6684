"""Samplers that walk with the score: annealed Langevin dynamics, and ancestral sampling corrected by Langevin steps.

Enters and leaves: as sampler_contract.py says, with several draws and evaluations a step. The score is (D - x) /
sigma^2.
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.process import TERMINAL_SIGMA
from ldm.diffusion.sampler_contract import Noise, Progress, evaluate, given, steps


@torch.no_grad()
def predictor_corrector(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    progress: Progress | None = None,
    corrector_steps: int = 1,
    snr: float = 0.16,
) -> Tensor:
    """Ancestral predictor, then Langevin steps at the new level (Song et al. 2021b, Alg. 2 with Eq. 47, and Alg. 4).

    The corrector's step is 2 (snr |noise| / |score|)^2. The norms are those of each sample, not the batch's mean, on
    which a sample is not to depend; so samples have to be of many numbers, over which norms vary little. For Gaussian
    data its stationary variance is 1 + snr^2 times the true one. 1 + corrector_steps evaluations a step, 1 in a step to
    0, which has no noise. Draws: number i (1 + corrector_steps) is the predictor's in step i, the next ones are the
    corrector's.

    Raises:
        ValueError: no noise, corrector_steps below 0, snr outside of (0, 1).
    """
    if corrector_steps < 0 or not 0 < snr < 1:
        raise ValueError(
            f"predictor_corrector: found corrector_steps {corrector_steps}, snr {snr}, expected 0 or more, 0 < snr < 1"
        )
    draw = given(noise, "predictor_corrector")
    for i, sigma, sigma_next in steps(sigmas, progress):
        first = i * (1 + corrector_steps)
        ratio = (sigma_next / sigma) ** 2
        x = torch.lerp(evaluate(denoise, x, sigma), x, ratio)
        if sigma_next == 0:
            continue
        x.add_(draw(first).to(x), alpha=sigma_next * math.sqrt(1 - ratio))
        for j in range(1, corrector_steps + 1):
            z = draw(first + j).to(x)
            score = (evaluate(denoise, x, sigma_next) - x) / sigma_next**2
            dims = tuple(range(1, x.ndim))
            norms = [torch.linalg.vector_norm(v, dim=dims, keepdim=True) for v in (z, score)]
            epsilon = 2 * (snr * norms[0] / norms[1]) ** 2
            x = x + epsilon * score + (2 * epsilon).sqrt() * z
    return x


@torch.no_grad()
def annealed_langevin(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    progress: Progress | None = None,
    langevin_steps: int = 100,
    step_size: float = 0.2,
) -> Tensor:
    """Annealed Langevin dynamics (Song & Ermon 2019, Alg. 1), denoised at the end (Jolicoeur-Martineau et al. 2021).

    langevin_steps T at each level, of alpha = step_size sigma^2: the paper's epsilon / sigma_L^2, 2e-5 / 0.01^2. From
    one level to the next x is taken as it is, with too much noise, which the steps at the new level have to remove:
    levels should be near each other (a ratio of 0.6 in the paper), or T large. x enters as a sample of the first level,
    so the steps begin at the second. T evaluations for each level above 0 but the first; one for a step to 0, which is
    D, and for a step from a terminal level, which is Euler's. Draws: number i T + t is step t at the i-th level after
    the first.

    Raises:
        ValueError: no noise, langevin_steps below 1, step_size outside of (0, 4), where the dynamics diverges.
    """
    if langevin_steps < 1 or not 0 < step_size < 4:
        raise ValueError(
            f"annealed_langevin: found langevin_steps {langevin_steps}, step_size {step_size}, "
            "expected 1 or more, 0 < step_size < 4"
        )
    draw = given(noise, "annealed_langevin")
    for i, sigma, sigma_next in steps(sigmas, progress):
        if sigma_next == 0 or sigma >= TERMINAL_SIGMA:
            x = torch.lerp(evaluate(denoise, x, sigma), x, sigma_next / sigma)
        if sigma_next == 0:
            continue
        for t in range(langevin_steps):
            # x + alpha / 2 score + sqrt(alpha) z
            x = torch.lerp(x, evaluate(denoise, x, sigma_next), step_size / 2)
            x.add_(draw(i * langevin_steps + t).to(x), alpha=math.sqrt(step_size) * sigma_next)
    return x
