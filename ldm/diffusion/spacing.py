"""The noise levels that a sampler visits.

Enters: a schedule, a number of steps, the name of a spacing; or levels of one's own. Leaves: `sigmas(schedule, steps,
spacing)`, the descending levels sigma_hat = sigma / alpha of one run; one function and one line in SPACINGS each.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.continuous import NETWORK_TIME, ContinuousSchedule
from ldm.diffusion.process import STRAIGHT, ForwardProcess
from ldm.diffusion.schedule import Schedule

KARRAS_RHO = 7.0


def trailing(schedule: ForwardProcess, steps: int) -> Tensor:
    """round(T, T - T/S, ..., T/S) - 1: starts at the last timestep (Lin et al. 2023, Table 2).

    In continuous time 1, 1 - 1/S, ..., 1/S of the way from the least noisy time to the last.
    """
    if not isinstance(schedule, Schedule):
        return schedule.sigma_hat(schedule.at(torch.arange(steps, 0, -1, dtype=torch.float64) / steps))
    t = torch.arange(steps, 0, -1, dtype=torch.float64) * schedule.num_timesteps / steps
    return schedule.sigma_hat(t.round().long() - 1)


def leading(schedule: ForwardProcess, steps: int) -> Tensor:
    """(S - 1) floor(T/S), ..., floor(T/S), 0: ends at the first timestep (Lin et al. 2023, Table 2).

    Starts below the last timestep, although sampling starts from pure noise: for comparison with older models.
    """
    timesteps = discrete(schedule, "leading")
    t = torch.arange(steps - 1, -1, -1) * (timesteps.num_timesteps // steps)
    return timesteps.sigma_hat(t)


def leading_1(schedule: ForwardProcess, steps: int) -> Tensor:
    """Each timestep of leading plus 1 (diffusers' steps_offset=1): what Stable Diffusion's schedulers ship with."""
    timesteps = discrete(schedule, "leading_1")
    return from_timesteps(timesteps, torch.arange(steps - 1, -1, -1) * (timesteps.num_timesteps // steps) + 1)


def leading_1_multistep(schedule: ForwardProcess, steps: int) -> Tensor:
    """S floor(T/(S+1)) + 1, ..., floor(T/(S+1)) + 1: leading_1 as diffusers' multistep schedulers have it."""
    timesteps = discrete(schedule, "leading_1_multistep")
    return from_timesteps(timesteps, torch.arange(steps, 0, -1) * (timesteps.num_timesteps // (steps + 1)) + 1)


def linspace(schedule: ForwardProcess, steps: int) -> Tensor:
    """Both ends and evenly rounded timesteps between them (Lin et al. 2023, Table 2); one step is the last timestep."""
    if not isinstance(schedule, Schedule):
        return schedule.sigma_hat(schedule.at(torch.linspace(1, 0, steps, dtype=torch.float64)))
    t = torch.linspace(schedule.num_timesteps - 1, 0, steps, dtype=torch.float64)
    return schedule.sigma_hat(t.round().long())


def linspace_multistep(schedule: ForwardProcess, steps: int) -> Tensor:
    """linspace with a step more, without its last: as diffusers' multistep schedulers have it.

    On the straight path of flow matching, where theirs run to t = 0 from 0.999: 0.999 (1 - i/S), i = 0, ..., S - 1.
    """
    if isinstance(schedule, ContinuousSchedule) and schedule.path is STRAIGHT:
        t = torch.linspace(1 - 1 / NETWORK_TIME, 0, steps + 1, dtype=torch.float64)[:-1]
        if float(t[-1]) < schedule.t_min * (1 - 1e-6):
            raise ValueError(f"steps: found {steps}, expected at most {NETWORK_TIME:.0f} for linspace_multistep")
        return schedule.sigma_hat(t)
    return linspace(discrete(schedule, "linspace_multistep"), steps + 1)[:-1]


def karras(schedule: ForwardProcess, steps: int, *, rho: float = KARRAS_RHO) -> Tensor:
    """sigma^(1/rho) falls linearly between the schedule's ends (Karras et al. 2022, Eq. 5); timesteps are fractional.

    Raises:
        ValueError: rho that is not above 0; a level of pure noise, because the ramp from an infinite level would spend
            its steps on it.
    """
    if not rho > 0:
        raise ValueError(f"spacing: karras found rho {rho}, expected more than 0")
    low, high = finite_ends(schedule, "karras")
    ends = high ** (1 / rho), low ** (1 / rho)
    return (torch.linspace(*ends, steps, dtype=torch.float64) ** rho).clamp(low, high)


def log_snr(schedule: ForwardProcess, steps: int) -> Tensor:
    """log sigma, and with it log-SNR = -2 log sigma, falls linearly between the ends (Lu et al. 2022a).

    Also called exponential; karras with rho going to infinity.

    Raises:
        ValueError: a level of pure noise.
    """
    low, high = finite_ends(schedule, "log_snr")
    levels = torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64).exp()
    levels[-1], levels[0] = low, high  # exactly, which exp(log) is not
    return levels


Spacing = Callable[..., Tensor]
"""(schedule, steps, settings by keyword) -> (steps,) descending levels above 0."""
SPACINGS: dict[str, Spacing] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "karras": karras,
    "log_snr": log_snr,
    "leading_1": leading_1,
    "leading_1_multistep": leading_1_multistep,
    "linspace_multistep": linspace_multistep,
}


def sigmas(schedule: ForwardProcess, steps: int, spacing: str = "trailing", **settings: float) -> Tensor:
    """Noise levels of a sampling run of `steps` steps: (steps + 1,) float64 on the CPU, descending, the last one 0.

    The network is evaluated at all but the last. All spacings but the leading ones start at the schedule's highest
    level. `settings` are the spacing's own: rho of karras.

    Raises:
        ValueError: no steps, more steps than timesteps, an unknown spacing or setting, karras or log_snr with zero
            terminal SNR, a spacing of whole timesteps in continuous time.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing: found {spacing!r}, expected one of {[*SPACINGS]}")
    if steps < 1:
        raise ValueError(f"steps: found {steps}, expected 1 or more")
    if settings:
        known = [*inspect.signature(SPACINGS[spacing]).parameters][2:]
        if unknown := settings.keys() - known:
            raise ValueError(f"spacing: found settings {sorted(unknown)} for {spacing}, expected {known or 'none'}")
    levels = SPACINGS[spacing](schedule.to("cpu"), steps, **settings)
    if any(above <= below for above, below in pairwise(levels.tolist())):
        raise too_many(schedule, steps)
    return torch.cat([levels, levels.new_zeros(1)])


def given_levels(schedule: ForwardProcess, levels: Sequence[float] | Tensor) -> Tensor:
    """Levels of one's own as `sigmas` gives them: (steps + 1,) float64 on the CPU; a last 0 is added if missing.

    Raises:
        ValueError: no level above 0, levels that do not descend, or levels outside of the schedule's.
    """
    found = torch.as_tensor(levels, dtype=torch.float64, device="cpu").flatten().tolist()
    above = found[:-1] if found and found[-1] == 0 else found
    if not above or not all(a > b for a, b in pairwise([*above, 0.0])):
        raise ValueError(f"sigmas: found {found}, expected levels that descend, to 0 or above")
    low, high = schedule.sigma_min, schedule.sigma_max
    if not low * (1 - 1e-6) <= above[-1] <= above[0] <= high * (1 + 1e-6):
        raise ValueError(
            f"sigmas: found {above[0]:.6g} to {above[-1]:.6g}, expected levels from {low:.6g} to {high:.6g}"
        )
    return torch.tensor([*above, 0.0], dtype=torch.float64)


def from_timesteps(schedule: Schedule, t: Tensor) -> Tensor:
    """Levels of whole timesteps, which more steps than there are would carry past the last one (ValueError)."""
    if int(t.max()) >= schedule.num_timesteps:
        raise too_many(schedule, len(t))
    return schedule.sigma_hat(t)


def discrete(schedule: ForwardProcess, spacing: str) -> Schedule:
    """The schedule as one of whole timesteps; raises ValueError for continuous time."""
    if not isinstance(schedule, Schedule):
        raise ValueError(f"spacing: {spacing} needs a schedule of timesteps, found continuous time; use trailing")
    return schedule


def finite_ends(schedule: ForwardProcess, spacing: str) -> tuple[float, float]:
    """Lowest and highest level; raises ValueError where the highest is pure noise."""
    if schedule.zero_terminal_snr:
        raise ValueError(f"spacing: {spacing} needs a finite highest noise level; use trailing with zero terminal SNR")
    return schedule.sigma_min, schedule.sigma_max


def too_many(schedule: ForwardProcess, steps: int) -> ValueError:
    """The error for levels that coincide or lie past the last timestep."""
    if not isinstance(schedule, Schedule):
        return ValueError(f"steps: found {steps}, expected fewer, so that float64 holds their levels apart")
    return ValueError(f"steps: found {steps}, expected at most the schedule's {schedule.num_timesteps} timesteps")
