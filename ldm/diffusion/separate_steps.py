"""An ODE solved for many samples at once, each with steps of its own: Dormand-Prince of order 5.

Enters: a slope for samples at times that differ, and where they start. Leaves: each sample at the end, and how often
it was evaluated: what it would be alone, whatever else is in the batch. (adaptive.py: one step for all of a batch.)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.adaptive import ERROR, NODES, STAGES, ToleranceError


def integrate_each(
    slope: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: float,
    end: float,
    *,
    first_step: float,
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor]:
    """x (B, n) at `end`, of dx/dt = slope(t, x) from x at t, to a tolerance for each sample; and its steps, (B,) int64.

    A sample's step is taken if its estimated error, relative to tolerance (1 + |x|), has a root mean square of at most
    1; otherwise it is tried again, shorter (Hairer, Norsett & Wanner 1993, section II.4). Steps count either way. The
    slope is asked for all samples until the last arrives; the host waits for the device once a step.

    Args:
        slope: times (B,) float64 on the CPU, x (B, n) -> (B, n).

    Raises:
        ToleranceError: a sample did not reach the end in max_steps, or its error is not a number.
    """
    times = torch.full((len(x),), t, dtype=torch.float64)
    step = torch.full_like(times, abs(first_step))
    tried = torch.zeros(len(x), dtype=torch.int64)
    direction = 1 if end >= t else -1
    k_1 = slope(times, x)
    for _ in range(max_steps):
        ahead_of = times != end
        if not bool(ahead_of.any()):
            return x, tried
        left = (end - times).abs()
        last = step >= left
        h = torch.where(last, left, step) * direction  # 0 for those that have arrived
        k = [k_1]
        on_device = h.to(x.device)[:, None]
        for node, stage in zip(NODES, STAGES, strict=True):
            ahead = x + on_device * sum(a * k_j for k_j, a in zip(k, stage, strict=True))
            k.append(slope(times + node * h, ahead))
        estimate = on_device * sum(e * k_j for k_j, e in zip(k, ERROR, strict=True))
        scale = tolerance * (1 + torch.maximum(x.abs(), ahead.abs()))
        error = (estimate / scale).square().mean(1).sqrt().cpu()
        taken = (error <= 1) & ahead_of
        tried += ahead_of
        x = torch.where(taken.to(x.device)[:, None], ahead, x)
        k_1 = torch.where(taken.to(x.device)[:, None], k[-1], k_1)
        times = torch.where(taken, torch.where(last, torch.full_like(times, end), times + h), times)
        factor = (0.9 * error.clamp(min=1e-10) ** -0.2).clamp(0.2, 5.0).nan_to_num(0.2)
        step = torch.where(ahead_of, h.abs() * factor, step)
    if bool((times == end).all()):
        return x, tried
    behind = int((times - end).abs().argmax())
    raise ToleranceError(
        f"ODE: {max_steps} steps reached {float(times[behind]):.6g} on the way to {end:.6g}, with steps of "
        f"{float(step[behind]):.3g}; the tolerance {tolerance} may be below the network's rounding error: raise it, or "
        "give the network more precision"
    )
