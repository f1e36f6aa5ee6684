"""An ODE solved for many samples at once, each with steps of its own: Dormand-Prince of order 5.

Enters: a slope for samples at times that differ, and where they start. Leaves: each sample at the end, its slope there
and how often it was evaluated: what they would be alone, whatever else is in the batch. Steps are controlled on the
host, which waits for the device once a step.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

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


class Arrived(NamedTuple):
    """Samples at the end of an ODE."""

    x: Tensor
    """(B, ...)"""
    slope: Tensor
    """(B, ...) of x at the end."""
    steps: Tensor
    """(B,) int64: steps that each sample tried, taken or not, of 6 evaluations each; 1 more begins the first."""


def integrate_each(
    slope: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: float,
    end: float,
    *,
    first_step: float,
    tolerance: float,
    max_steps: int,
    reached: Callable[[float], object] | None = None,
) -> Arrived:
    """x (B, ...) at `end`, of dx/dt = slope(t, x) from x at t, to a tolerance for each sample.

    A sample's step is taken if its estimated error, relative to tolerance (1 + |x|), has a root mean square of at most
    1; otherwise it is tried again, shorter (Hairer, Norsett & Wanner 1993, section II.4). The slope is asked for all
    samples until the last arrives.

    Args:
        slope: times (B,) float64 on the CPU, x (B, ...) -> (B, ...).
        reached: told after each step the time of the sample that is furthest from the end.

    Raises:
        ToleranceError: a sample did not reach the end in max_steps, or its error is not a number.
    """
    times = torch.full((len(x),), t, dtype=torch.float64)
    step = torch.full_like(times, abs(first_step))
    tried = torch.zeros(len(x), dtype=torch.int64)
    direction, shape = (1 if end >= t else -1), (-1, *[1] * (x.ndim - 1))
    k_1 = slope(times, x)
    for _ in range(max_steps):
        ahead_of = times != end
        if not bool(ahead_of.any()):
            return Arrived(x, k_1, tried)
        left = (end - times).abs()
        last = step >= left
        h = torch.where(last, left, step) * direction  # 0 for those that have arrived
        k = [k_1]
        on_device = h.to(x.device).view(shape)
        for node, stage in zip(NODES, STAGES, strict=True):
            ahead = x + on_device * sum(a * k_j for k_j, a in zip(k, stage, strict=True))
            k.append(slope(times + node * h, ahead))
        estimate = on_device * sum(e * k_j for k_j, e in zip(k, ERROR, strict=True))
        scale = tolerance * (1 + torch.maximum(x.abs(), ahead.abs()))
        error = (estimate / scale).flatten(1).square().mean(1).sqrt().cpu()
        taken = (error <= 1) & ahead_of
        tried += ahead_of
        on_device = taken.to(x.device).view(shape)
        x, k_1 = torch.where(on_device, ahead, x), torch.where(on_device, k[-1], k_1)
        times = torch.where(taken, torch.where(last, torch.full_like(times, end), times + h), times)
        factor = (0.9 * error.clamp(min=1e-10) ** -0.2).clamp(0.2, 5.0).nan_to_num(0.2)
        step = torch.where(ahead_of, h.abs() * factor, step)
        if reached is not None:
            reached(float(times[(times - end).abs().argmax()]))
    if bool((times == end).all()):
        return Arrived(x, k_1, tried)
    behind = int((times - end).abs().argmax())
    raise ToleranceError(
        f"ODE: {max_steps} steps reached {float(times[behind]):.6g} on the way to {end:.6g}, with steps of "
        f"{float(step[behind]):.3g}; the tolerance {tolerance} may be below the network's rounding error: raise it, or "
        "give the network more precision"
    )
