"""The probability-flow ODE with steps chosen by their estimated error: Dormand-Prince of order 5.

Enters and leaves: as sampler_contract.py says, with a tolerance in place of a number of steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.process import TERMINAL_SIGMA
from ldm.diffusion.sampler_contract import Noise, Progress, evaluate, levels_of
from ldm.diffusion.separate_steps import integrate_each


@torch.no_grad()
def ode_adaptive(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    progress: Progress | None = None,
    tolerance: float = 1e-4,
    max_steps: int = 500,
    evaluations: Callable[[int], object] | None = None,
) -> Tensor:
    """Probability-flow ODE to a tolerance (Song et al. 2021b, section 4.3; Karras et al. 2022, Eq. 3 in sigma).

    From sigmas[0] to the last level above 0, and from there, if the levels end in 0, to D. So of `sigmas` only the
    ends matter: take a spacing whose last level above 0 is low (karras, log_snr, linspace). Each sample takes steps of
    its own, so that `denoise` is asked at levels that differ between samples. `progress` counts the levels that all
    samples have passed; `evaluations` is told at the end how many the network had: 6 for each step that the slowest
    sample tried, and 1.

    Raises:
        ValueError: a tolerance that is not above 0.
        ToleranceError: as integrate_each.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance: found {tolerance}, expected more than 0")
    levels, dtype = levels_of(sigmas), x.dtype
    x = x.double()  # Whatever its dtype: errors are estimated as differences, in which float32 would leave rounding.
    asked = passed = 0

    def slope(sigmas: Tensor, x: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return (x - denoise(x, sigmas)) / sigmas.to(x.device).view(-1, *[1] * (x.ndim - 1))

    def reached(sigma: float) -> None:
        nonlocal passed
        while passed < len(levels) - 1 and levels[passed + 1] >= sigma:
            passed += 1
            if progress is not None:
                progress(passed, len(levels) - 1)

    sigma, end = levels[0], [level for level in levels if level > 0][-1]
    if sigma >= TERMINAL_SIGMA and end < sigma:
        # Euler's step from there is exact (see ode_solvers.heun), any other meaningless.
        asked += 1
        x = torch.lerp(evaluate(denoise, x, sigma), x, levels[1] / sigma)
        sigma = levels[1]
        reached(sigma)
    below = next((level for level in levels if level < sigma), end)
    x, k, _ = integrate_each(
        slope, x, sigma, end, first_step=below - sigma, tolerance=tolerance, max_steps=max_steps, reached=reached
    )
    if levels[-1] == 0:
        x = x - end * k
        reached(0)
    if evaluations is not None:
        evaluations(asked)
    return x.to(dtype)
