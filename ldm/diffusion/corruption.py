"""Corruptions other than Gaussian noise: pixels masked one after another, and blur; their loss and their samplers.

Enters: clean pictures or latents (B, C, H, W), levels 0 (clean) to T (B,), and keyed noise where a corruption draws.
Leaves: corrupted ones, the loss of a network that predicts x0, or, from a corrupted start, a restored sample.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.objective import DISTANCES
from ldm.models.conditioning import Conditioning


class Corruption(Protocol):
    """D(x0, level): x0 itself at level 0, the same corruption for the same noise, more of it at a higher level."""

    levels: int
    """T: the highest level, at which sampling starts."""

    def __call__(self, x0: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Corrupted x0 (B, C, H, W) at levels (B,) int64 in [0, T]; noise (B, C, H, W) is unit normal and keyed."""


Restore = Callable[[Tensor, Tensor], Tensor]
"""(z (B, C, H, W), level (B,) int64) -> predicted x0: a network with its conditioning."""
StepNoise = Callable[[int], Tensor]
"""Step 0, 1, ... of a sampler -> unit normal noise as the corruption takes it; keyed by seed, sample and step."""


class PixelMasking:
    """Pixels replaced one after another, in an order that is drawn (naive diffusion, "one pixel at a time").

    At level n the first n * pixels_per_level pixels of the order are replaced in all channels, at level T all: T is
    height * width / pixels_per_level, rounded up. The order follows from the first channel of the noise, each one
    equally likely. What replaces a pixel is `fill`, or, where that is None, noise: which then has a channel more than
    x0, (B, C + 1, H, W), the order's being the first, because values must not depend on their place in the order. The
    same noise masks, at a higher level, a superset of the pixels with the same values.

    Raises:
        ValueError: pixels_per_level outside of 1 to height * width.
    """

    def __init__(self, height: int, width: int, pixels_per_level: int = 1, fill: float | None = 0.0) -> None:
        if not 1 <= pixels_per_level <= height * width:
            raise ValueError(f"pixels_per_level: found {pixels_per_level}, expected 1 to {height * width}")
        self.pixels_per_level, self.fill = pixels_per_level, fill
        self.levels = math.ceil(height * width / pixels_per_level)
        self._size = (height, width)

    def mask(self, level: Tensor, noise: Tensor) -> Tensor:
        """Which pixels are replaced, (B, 1, H, W) bool."""
        place = noise[:, 0].flatten(1).argsort(dim=1, stable=True)  # of each pixel in the order: some permutation
        return (place < level[:, None] * self.pixels_per_level).view(-1, 1, *self._size)

    def __call__(self, x0: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        check_levels(self, x0, level, self._size)
        if self.fill is not None:
            return torch.where(self.mask(level, noise), self.fill, x0)
        if noise.shape[1] != x0.shape[1] + 1:
            raise ValueError(
                f"noise: found {noise.shape[1]} channels to replace {x0.shape[1]} of a picture, expected "
                f"{x0.shape[1] + 1}, the first one for the order of the pixels"
            )
        return torch.where(self.mask(level, noise), noise[:, 1:].to(x0), x0)


class GrowingMask:
    """A mask that grows from a drawn centre: pixels within a radius fade to 0 (Bansal et al. 2022, section 4.2).

    D(x0, n) = x0 times the product over i <= n of 1 - exp(-r^2 / (2 s_i^2)), r the distance in pixels from the centre,
    s_i = first + (i - 1) * growth. Linear in x0. The centre is the largest element of the first channel of the noise.

    Raises:
        ValueError: no levels, a first width that is not positive, or a growth that is negative.
    """

    def __init__(self, height: int, width: int, levels: int, first: float = 1.0, growth: float = 0.1) -> None:
        if levels < 1 or not first > 0 or not growth >= 0:
            raise ValueError(
                f"mask: found {levels} levels, first width {first}, growth {growth}; expected 1 or more, a positive "
                "number, and 0 or more"
            )
        self.levels, self.first, self.growth = levels, first, growth
        self._size = (height, width)

    def __call__(self, x0: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        check_levels(self, x0, level, self._size)
        height, width = self._size
        centre = noise[:, 0].flatten(1).argmax(dim=1)
        rows = torch.arange(height, device=x0.device)[:, None] - (centre // width)[:, None, None]
        columns = torch.arange(width, device=x0.device) - (centre % width)[:, None, None]
        squared = (rows**2 + columns**2).double()  # (B, H, W)
        kept = torch.ones_like(squared)
        for i in range(1, self.levels + 1):
            within = (level >= i)[:, None, None]
            s = self.first + (i - 1) * self.growth
            kept = torch.where(within, -kept * torch.expm1(-squared / (2 * s**2)), kept)
        return x0 * kept[:, None].to(x0.dtype)


class Blur:
    """Gaussian blur of growing width, reflecting at the borders (Bansal et al. 2022, section 4.1).

    Heat that spreads on the picture (Rissanen et al. 2023, Eq. 4): each coefficient of the cosine transform decays by
    exp(-w^2 s^2 / 2) at the deviation s in pixels of its level, so that two blurs make one of s^2 = s_1^2 + s_2^2, the
    mean stays, and nothing of it depends on the size of a kernel. Deterministic: the noise is not used.

    Args:
        deviations: of levels 1, 2, ..., T, in pixels, ascending.

    Raises:
        ValueError: no levels, or deviations that do not ascend from above 0.
    """

    def __init__(self, height: int, width: int, deviations: Sequence[float]) -> None:
        if not deviations or not all(a < b for a, b in pairwise((0.0, *deviations))):
            raise ValueError(f"deviations: found {[*deviations]}, expected them to ascend from above 0")
        self.levels = len(deviations)
        self._size = (height, width)
        # (T + 1, size, size) of each direction, by device: a copy to an accelerator is waited for, once.
        tables = [torch.stack([gaussian_matrix(size, s) for s in (0.0, *deviations)]) for size in self._size]
        self._tables = {torch.device("cpu"): tables}

    def __call__(self, x0: Tensor, level: Tensor, noise: Tensor | None = None) -> Tensor:
        check_levels(self, x0, level, self._size)
        if x0.device not in self._tables:
            self._tables[x0.device] = [one.to(x0.device) for one in self._tables[torch.device("cpu")]]
        rows, columns = (one[level].to(x0.dtype) for one in self._tables[x0.device])
        return torch.einsum("bij,bcjk,blk->bcil", rows, x0, columns)


def gaussian_matrix(size: int, deviation: float) -> Tensor:
    """Blur of a line of `size` pixels, (size, size) float64, rows and columns summing to 1; the identity for 0."""
    if deviation == 0:
        return torch.eye(size, dtype=torch.float64)
    frequency = math.pi * torch.arange(size, dtype=torch.float64) / size
    # The orthonormal cosine transform (DCT-II), whose base reflects at the borders.
    base = torch.cos(frequency[:, None] * (torch.arange(size, dtype=torch.float64) + 0.5)) * math.sqrt(2 / size)
    base[0] /= math.sqrt(2)
    return base.T @ ((-(frequency**2) * deviation**2 / 2).exp()[:, None] * base)


def check_levels(corruption: Corruption, x0: Tensor, level: Tensor, size: tuple[int, int]) -> None:
    """Raises ValueError for a picture of another size, or levels outside of [0, T]."""
    if tuple(x0.shape[2:]) != size:
        raise ValueError(f"corruption: found a picture of {tuple(x0.shape[2:])}, expected {size}")
    # Elsewhere the check would wait for the device.
    if level.device.type == "cpu" and not bool(((level >= 0) & (level <= corruption.levels)).all()):
        raise ValueError(f"level: found {level.min()} to {level.max()}, expected 0 to {corruption.levels}")


def drawn_levels(u: Tensor, corruption: Corruption) -> Tensor:
    """Levels (B,) int64 in [1, T] of uniform draws u (B,) in [0, 1): a batch's u serves as it does for timesteps."""
    return (u.double() * corruption.levels).long() + 1


def corruption_loss(
    network: Callable[[Tensor, Tensor, Conditioning], Tensor],
    corruption: Corruption,
    x0: Tensor,
    noise: Tensor,
    level: Tensor,
    conditioning: Conditioning,
    distance: str = "squared",
    huber_c: float = 0.1,
) -> Tensor:
    """Mean distance between x0 and the network's prediction of it from D(x0, level), (B,) (Bansal et al. 2022, Eq. 1).

    x0 is (B, C, H, W), noise what the corruption takes, level (B,) as `drawn_levels` gives it: what the network is told
    as its timestep. It is called once; what follows is float32, or float64 for float64 input.

    Raises:
        ValueError: an unknown distance (names of objective.DISTANCES), a prediction of another shape, a level out of
            range.
    """
    if distance not in DISTANCES:
        raise ValueError(f"distance: found {distance!r}, expected one of {[*DISTANCES]}")
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    prediction = network(corruption(x0, level, noise), level, conditioning)
    if prediction.shape != x0.shape:
        raise ValueError(f"the network's output has shape {tuple(prediction.shape)}, expected {tuple(x0.shape)}")
    return DISTANCES[distance](prediction.to(x0.dtype) - x0, huber_c).flatten(1).mean(dim=1)


def descending_levels(levels: int, step: int) -> list[int]:
    """T, T - K, T - 2K, ..., 0 for T levels in steps of K; the last step is shorter where K does not divide T.

    Raises:
        ValueError: a step outside of 1 to T.
    """
    if not 1 <= step <= levels:
        raise ValueError(f"step: found {step}, expected 1 to the {levels} levels of the corruption")
    return [*range(levels, 0, -step), 0]


def step_between(levels: int, steps: int) -> int:
    """Step K from level to level with which T levels take `steps` evaluations, or fewer where K does not divide T.

    Raises:
        ValueError: no steps, or more than there are levels.
    """
    if not 1 <= steps <= levels:
        raise ValueError(f"steps: found {steps}, expected 1 to the {levels} levels of the corruption")
    return math.ceil(levels / steps)


@torch.no_grad()
def denoise_renoise(restore: Restore, corruption: Corruption, z: Tensor, *, noise: StepNoise, step: int = 1) -> Tensor:
    """Predicts x0, corrupts it anew at a lower level, and so on to level 0 (Bansal et al. 2022, Alg. 1).

    z is at level T. `step` K trades quality for T / K evaluations. The corruption's noise is fresh in each step, from
    `noise`: what a prediction got wrong is hidden elsewhere next time. Returns the last prediction.

    Raises:
        ValueError: a step outside of 1 to T.
    """
    for i, (level, lower) in enumerate(pairwise(descending_levels(corruption.levels, step))):
        predicted = restore(z, torch.full((len(z),), level, device=z.device))
        z = corruption(predicted, torch.full((len(z),), lower, device=z.device), noise(i))
    return z


@torch.no_grad()
def cold_diffusion(restore: Restore, corruption: Corruption, z: Tensor, *, noise: Tensor, step: int = 1) -> Tensor:
    """z_{s-K} = z_s - D(x0_hat, s) + D(x0_hat, s - K) to level 0: the improved sampler (Bansal et al. 2022, Alg. 2).

    What the prediction gets wrong enters only as the difference of two corruptions of it, which is of the order of K
    where D is smooth in s. `noise` is that of the corruption which made z, the same in all steps. z is at level T.

    Raises:
        ValueError: a step outside of 1 to T.
    """
    for level, lower in pairwise(descending_levels(corruption.levels, step)):
        s, s_next = (torch.full((len(z),), one, device=z.device) for one in (level, lower))
        predicted = restore(z, s)
        z = z - corruption(predicted, s, noise) + corruption(predicted, s_next, noise)
    return z
