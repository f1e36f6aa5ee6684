"""What every sampler is: its signature, the walk over its steps, its evaluations and its noise.

Enters: the levels of a run (spacing.sigmas), unit noise, a denoiser. Leaves: x at the first level (`start`), each
step's levels as floats (`steps`), the expected x0 (`evaluate`). The samplers themselves are listed in samplers.py.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise

Noise = Callable[[int], Tensor]
"""Number of a draw (0, 1, ...) -> unit normal noise of x's shape; the caller's, who addresses it by seed and sample.

A sampler with one draw a step numbers it as the step; one with more says in its docstring how it numbers them.
"""
Progress = Callable[[int, int], object]
"""Called after each step with the number of steps done and of all steps."""


class Sampler(Protocol):
    """x (B, ...) at level sigmas[0] -> x at level sigmas[-1]; sigmas is (steps + 1,), descending.

    Arithmetic is in x's dtype, float32 or float64, which `denoise` and `noise` keep, with coefficients out of float64;
    the tensors that they return are not changed.

    A deterministic sampler draws no noise; a stochastic one raises ValueError without `noise`. A sampler's own settings
    are further keywords with defaults.
    """

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        *,
        noise: Noise | None = None,
        progress: Progress | None = None,
    ) -> Tensor: ...


def start(noise: Tensor, sigmas: Tensor) -> Tensor:
    """x at the first level out of unit noise: noise sqrt(1 + sigma_max^2), x's deviation for unit data."""
    return noise * math.sqrt(1 + float(sigmas[0]) ** 2)


def levels_of(sigmas: Tensor) -> list[float]:
    """The levels of a run as floats, so that coefficients are computed on the host and never wait for a device.

    Raises:
        ValueError: no steps, or levels that are not finite, not descending, or negative.
    """
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas: found shape {tuple(sigmas.shape)}, expected (steps + 1,) with 1 step or more")
    levels = sigmas.tolist()
    if not (math.isfinite(levels[0]) and levels[-1] >= 0 and all(a > b for a, b in pairwise(levels))):
        raise ValueError(f"sigmas: found {levels}, expected finite levels that descend to 0 or above")
    return levels


def steps(sigmas: Tensor, progress: Progress | None = None) -> Iterator[tuple[int, float, float]]:
    """(step index, sigma, next sigma) of each step; `progress` is told after it. Raises as levels_of."""
    levels = levels_of(sigmas)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        yield i, sigma, sigma_next
        if progress is not None:
            progress(i + 1, len(levels) - 1)


def evaluate(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    """denoise(x, sigma) with all of the batch at one level, given on the CPU."""
    return denoise(x, torch.full((x.shape[0],), sigma, dtype=torch.float64))


def given(noise: Noise | None, sampler: str) -> Noise:
    """The caller's noise; raises ValueError where there is none, as no sampler draws from a global generator."""
    if noise is None:
        raise ValueError(f"{sampler} adds noise: give noise=, a function of the step index that returns noise like x")
    return noise
