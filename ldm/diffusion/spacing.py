"""The noise levels that a sampler visits.

Enters: a Schedule, a number of steps, the name of a spacing. Leaves: `sigmas(schedule, steps, spacing)`, the descending
levels sigma_hat = sigma / alpha of one sampling run; one function and one line in SPACINGS for each spacing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule

KARRAS_RHO = 7.0


def trailing(schedule: Schedule, steps: int) -> Tensor:
    """round(T, T - T/S, ..., T/S) - 1: starts at the last timestep (Lin et al. 2023, Table 2)."""
    t = torch.arange(steps, 0, -1, dtype=torch.float64) * schedule.num_timesteps / steps
    return schedule.sigma_hat(t.round().long() - 1)


def leading(schedule: Schedule, steps: int) -> Tensor:
    """(S - 1) floor(T/S), ..., floor(T/S), 0: ends at the first timestep (Lin et al. 2023, Table 2).

    Starts below the last timestep, although sampling starts from pure noise: for comparison with older models, which
    often add 1 (diffusers' steps_offset).
    """
    t = torch.arange(steps - 1, -1, -1) * (schedule.num_timesteps // steps)
    return schedule.sigma_hat(t)


def linspace(schedule: Schedule, steps: int) -> Tensor:
    """Both ends and evenly rounded timesteps between them (Lin et al. 2023, Table 2); one step is the last timestep."""
    t = torch.linspace(schedule.num_timesteps - 1, 0, steps, dtype=torch.float64)
    return schedule.sigma_hat(t.round().long())


def karras(schedule: Schedule, steps: int) -> Tensor:
    """sigma^(1/7) falls linearly between the schedule's ends (Karras et al. 2022, Eq. 5); timesteps are fractional.

    Raises:
        ValueError: zero terminal SNR, because the ramp from an infinite level would spend its steps on pure noise.
    """
    if schedule.zero_terminal_snr:
        raise ValueError("spacing: karras needs a finite highest noise level; use trailing with zero terminal SNR")
    low, high = schedule.sigma_hat(torch.tensor([0, schedule.num_timesteps - 1])).tolist()
    ends = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
    return (torch.linspace(*ends, steps, dtype=torch.float64) ** KARRAS_RHO).clamp(low, high)


SPACINGS: dict[str, Callable[[Schedule, int], Tensor]] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "karras": karras,
}


def sigmas(schedule: Schedule, steps: int, spacing: str = "trailing") -> Tensor:
    """Noise levels of a sampling run of `steps` steps: (steps + 1,) float64 on the CPU, descending, the last one 0.

    The network is evaluated at all but the last. All spacings but leading start at the schedule's highest level.

    Raises:
        ValueError: no steps, more steps than timesteps, an unknown spacing, karras with zero terminal SNR.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing: found {spacing!r}, expected one of {[*SPACINGS]}")
    if steps < 1:
        raise ValueError(f"steps: found {steps}, expected 1 or more")
    levels = SPACINGS[spacing](schedule.to("cpu"), steps)
    if not bool((levels.diff() < 0).all()):
        raise ValueError(f"steps: found {steps}, expected at most the schedule's {schedule.num_timesteps} timesteps")
    return torch.cat([levels, levels.new_zeros(1)])
