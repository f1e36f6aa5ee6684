"""The probability-flow ODE with steps chosen by their estimated error: Dormand-Prince of order 5.

Enters and leaves: as sampler_contract.py says, with a tolerance in place of a number of steps; `integrate` serves any
ODE of one scalar. Steps are controlled on the host, which waits for the device once a step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.process import TERMINAL_SIGMA
from ldm.diffusion.sampler_contract import Noise, Progress, evaluate, levels_of

# RK5(4)7M of Dormand & Prince 1980, Table 2: nodes, stages (the last are the weights of order 5), and these weights
# minus those of order 4
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


class ToleranceError(RuntimeError):
    """A sample did not reach the end to the tolerance asked for."""


def dormand_prince(
    slope: Callable[[float, Tensor], Tensor], x: Tensor, k_1: Tensor, t: float, h: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step from t to t + h: x there, its slope there, the estimate of its error; six evaluations.

    `k_1` is the slope at (t, x): the second result of the step before.
    """
    k = [k_1]
    for node, stage in zip(NODES, STAGES, strict=True):
        ahead = x.clone()
        for k_j, a in zip(k, stage, strict=True):
            ahead.add_(k_j, alpha=h * a)
        k.append(slope(t + node * h, ahead))
    error = torch.zeros_like(x)
    for k_j, e in zip(k, ERROR, strict=True):
        error.add_(k_j, alpha=h * e)
    return ahead, k[-1], error


def integrate(
    slope: Callable[[float, Tensor], Tensor],
    x: Tensor,
    t: float,
    end: float,
    *,
    first_step: float,
    tolerance: float,
    max_steps: int,
    taken: Callable[[float], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """x (B, ...) and its slope at `end`, of dx/dt = slope(t, x) from x at t, to a tolerance for each sample.

    A step is taken if its estimated error, relative to tolerance (1 + |x|), has a root mean square of at most 1 over
    each sample of the batch, all of which take the same steps; otherwise it is tried again, shorter (Hairer, Norsett
    & Wanner 1993, section II.4). `taken` is told t after each step taken.

    Raises:
        ToleranceError: max_steps, taken or not, did not reach the end, or the error is not a number.
    """
    direction, h, k = (1 if end >= t else -1), first_step, slope(t, x)
    for _ in range(max_steps):
        if t == end:
            return x, k
        last = abs(h) >= abs(end - t)
        h = end - t if last else direction * abs(h)
        ahead, k_ahead, estimate = dormand_prince(slope, x, k, t, h)
        scale = tolerance * (1 + torch.maximum(x.abs(), ahead.abs()))
        error = (estimate / scale).reshape(len(x), -1).square().mean(1).max().sqrt().item()
        if error <= 1:
            x, k, t = ahead, k_ahead, end if last else t + h
            if taken is not None:
                taken(t)
        h *= min(5.0, max(0.2, 0.9 * max(error, 1e-10) ** -0.2)) if error == error else 0.2
    if t == end:
        return x, k
    raise ToleranceError(
        f"ODE: {max_steps} steps reached {t:.6g} on the way to {end:.6g}, with steps of {abs(h):.3g}; the "
        f"tolerance {tolerance} may be below the network's rounding error: raise it, or give the network more precision"
    )


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
    ends matter: take a spacing whose last level above 0 is low (karras, log_snr, linspace). A sample's result differs
    between batches, which share their steps, by what the tolerance allows. `progress` counts the levels passed;
    `evaluations` is told at the end how many the network had: 6 for each step tried, and 1.

    Raises:
        ValueError: a tolerance that is not above 0.
        ToleranceError: as integrate.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance: found {tolerance}, expected more than 0")
    levels, dtype = levels_of(sigmas), x.dtype
    x = x.double()  # Whatever its dtype: errors are estimated as differences, in which float32 would leave rounding.
    asked = passed = 0

    def slope(sigma: float, x: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return (x - evaluate(denoise, x, sigma)) / sigma

    def reached(sigma: float) -> None:
        nonlocal passed
        while passed < len(levels) - 1 and levels[passed + 1] >= sigma:
            passed += 1
            if progress is not None:
                progress(passed, len(levels) - 1)

    sigma, end = levels[0], [level for level in levels if level > 0][-1]
    if sigma >= TERMINAL_SIGMA and end < sigma:
        # Euler's step from there is exact (see ode_solvers.heun), any other meaningless.
        x = torch.lerp(x - sigma * slope(sigma, x), x, levels[1] / sigma)
        sigma = levels[1]
        reached(sigma)
    below = next((level for level in levels if level < sigma), end)
    x, k = integrate(
        slope, x, sigma, end, first_step=below - sigma, tolerance=tolerance, max_steps=max_steps,
        taken=reached,
    )  # fmt: skip
    if levels[-1] == 0:
        x = x - end * k
        reached(0)
    if evaluations is not None:
        evaluations(asked)
    return x.to(dtype)
