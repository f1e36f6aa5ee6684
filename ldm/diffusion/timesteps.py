"""Which time a sample is trained at.

Enters: keyed uniform draws u of a batch, and with stratified sampling the samples' positions in the run. Leaves: times
of the schedule, int64 of a discrete one. A distribution is one function and one line in TIMESTEP_SAMPLING.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ldm.diffusion.objective_config import ObjectiveConfig
from ldm.diffusion.process import ForwardProcess


def uniform_timesteps(u: Tensor, schedule: ForwardProcess, config: ObjectiveConfig) -> Tensor:
    """t / T as it is drawn."""
    return schedule.at(u)


def logit_normal(u: Tensor, schedule: ForwardProcess, config: ObjectiveConfig) -> Tensor:
    """t / T whose logit is normal, by inversion of its distribution function (Esser et al. 2024, Eq. 19)."""
    position = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u))
    # Far in the tail sigmoid rounds to 1, which would be timestep T.
    return schedule.at(position.clamp(max=1 - 2**-53))


def log_normal(u: Tensor, schedule: ForwardProcess, config: ObjectiveConfig) -> Tensor:
    """Noise levels whose logarithm is normal (Karras et al. 2022, table 1), at the nearest time of the schedule."""
    return schedule.nearest((config.log_sigma_mean + config.log_sigma_std * torch.special.ndtri(u)).exp())


TIMESTEP_SAMPLING: dict[str, Callable[[Tensor, ForwardProcess, ObjectiveConfig], Tensor]] = {
    "uniform": uniform_timesteps,
    "logit_normal": logit_normal,
    "log_normal": log_normal,
}


def stratified(u: Tensor, positions: Tensor, global_batch: int) -> Tensor:
    """Draws (B,) in [0, 1) of which each global batch has exactly one in each of `global_batch` equal parts.

    A function of the draw and of the sample's position in the run alone, whose global batch k is the positions k B to
    (k + 1) B - 1: the same for any number of processes and any accumulation. Neighbours in a batch get parts far from
    each other, so that each process's share covers the range, and a place in the batch gets another part at each step.

    Args:
        u: (B,) float64 in [0, 1).
        positions: (B,) int64, positions in the run.

    Raises:
        ValueError: a global batch of no samples.
    """
    if global_batch < 1:
        raise ValueError(f"global_batch: found {global_batch}, expected 1 or more")
    step = torch.div(positions, global_batch, rounding_mode="floor")
    place = positions - step * global_batch
    stride = _stride(global_batch)
    part = (place * stride + step % global_batch * _stride(global_batch, 1 - 1 / math.sqrt(3))) % global_batch
    drawn, above = (part + u.double()) / global_batch, (part + 1).double() / global_batch
    # A draw next to 1 would round to the next part's first.
    return torch.minimum(drawn, torch.nextafter(above, torch.zeros_like(above)))


@cache
def _stride(count: int, share: float = (math.sqrt(5) - 1) / 2) -> int:
    """Integer near `share` of count that has no divisor in common with it: its multiples modulo count are all of it."""
    return min((n for n in range(1, count + 1) if math.gcd(n, count) == 1), key=lambda n: abs(n - share * count))


def timesteps(
    u: Tensor,
    schedule: ForwardProcess,
    config: ObjectiveConfig | None = None,
    positions: Tensor | None = None,
    global_batch: int | None = None,
) -> Tensor:
    """Times (B,) of uniform draws u (B,) in [0, 1), on u's device; uniform without a config.

    int64 in [0, T) for a discrete schedule, float64 for a continuous one.

    Args:
        positions: (B,) int64, positions in the run; needed with `config.stratified`.
        global_batch: samples of a step over all processes; needed with `config.stratified`.

    Raises:
        ValueError: stratified sampling without positions and global batch.
    """
    config = config or ObjectiveConfig()
    u = u.double()
    if config.stratified:
        if positions is None or global_batch is None:
            raise ValueError(
                "objective.stratified: found True, but timesteps() was given no positions and global_batch; expected "
                "both: a sample's part follows from its place in the global batch"
            )
        u = stratified(u, positions, global_batch)
    return TIMESTEP_SAMPLING[config.timestep_sampling](u, schedule, config)
