"""Linear operators that a picture was measured by (smaller, blurred, pixels missing), and their pseudo-inverses.

Enters: pictures (B, C, H, W). Leaves: measurements y = H x, H^T y, H^+ y; or a picture moved the shortest way to
satisfy its measurement.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_SINGULAR = 0.05
"""Blur ends here: waves that keep less of themselves are counted as lost, because undoing it would multiply the
rounding of an 8-bit measurement, 0.3 levels, by more than 20."""


class LinearOperator(Protocol):
    """H, which acts on each channel alone; H H^+ H = H, and H^+ H leaves as it is what H tells of a picture."""

    def __call__(self, x: Tensor) -> Tensor:
        """The measurement H x of pictures (B, C, H, W)."""

    def adjoint(self, y: Tensor) -> Tensor:
        """H^T y, the picture with <H x, y> = <x, H^T y> for all x."""

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """H^+ y, the smallest picture whose measurement is nearest to y (Moore-Penrose)."""


class AveragePooling:
    """Means over squares of `factor` x `factor` pixels: what super-resolution undoes.

    Raises:
        ValueError: a factor below 2; when called, a size that it does not divide.
    """

    def __init__(self, factor: int) -> None:
        if factor < 2:
            raise ValueError(f"super_resolution: found factor {factor}, expected 2 or more")
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(
                f"super_resolution: found a picture of {x.shape[-2]}x{x.shape[-1]} pixels, expected multiples of the "
                f"factor {self.factor}"
            )
        return F.avg_pool2d(x, self.factor)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.pseudo_inverse(y) / self.factor**2

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, dim=-2).repeat_interleave(self.factor, dim=-1)


class GaussianBlur:
    """Gaussian blur, reflecting at the borders, by its eigenvectors: the cosine transform's waves (DCT-II).

    A wave of w radians a pixel keeps exp(-w^2 s^2 / 2) of itself at the deviation s, as in corruption.Blur; one that
    keeps less than LEAST_SINGULAR, rows and columns together, keeps nothing. Symmetric: H^T is H.

    Args:
        deviation: s in pixels.

    Raises:
        ValueError: a deviation that is not above 0, or not finite; when called, pictures of another size.
    """

    def __init__(self, height: int, width: int, deviation: float) -> None:
        if not (deviation > 0 and math.isfinite(deviation)):
            raise ValueError(f"blur: found sigma {deviation}, expected a number of pixels above 0")
        self._rows, self._columns = cosine_waves(height), cosine_waves(width)
        kept = [(-((frequencies(size) * deviation) ** 2) / 2).exp() for size in (height, width)]
        singular = torch.outer(*kept)
        self._singular = torch.where(singular < LEAST_SINGULAR, 0, singular)  # (H, W)

    def __call__(self, x: Tensor) -> Tensor:
        return self._scaled(x, self._singular)

    def adjoint(self, y: Tensor) -> Tensor:
        return self(y)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return self._scaled(y, torch.where(self._singular > 0, 1 / self._singular, 0))

    def _scaled(self, x: Tensor, factors: Tensor) -> Tensor:
        if x.shape[-2:] != factors.shape:
            raise ValueError(f"blur: found pictures of {tuple(x.shape[-2:])} pixels, expected {tuple(factors.shape)}")
        rows, columns, factors = (part.to(x) for part in (self._rows, self._columns, factors))
        return rows.T @ (factors * (rows @ x @ columns.T)) @ columns


class Masking:
    """Pixels that are measured as they are, and zeros in place of the others: its own transpose and pseudo-inverse.

    Args:
        measured: (..., H, W) bool, which broadcasts to the pictures.
    """

    def __init__(self, measured: Tensor) -> None:
        self.measured = measured

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(self.measured.to(x.device), x, 0)

    def adjoint(self, y: Tensor) -> Tensor:
        return self(y)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return self(y)


def frequencies(size: int) -> Tensor:
    """Radians a pixel of the waves of a line of `size` pixels, (size,) float64."""
    return math.pi * torch.arange(size, dtype=torch.float64) / size


def cosine_waves(size: int) -> Tensor:
    """The orthonormal cosine transform DCT-II of a line, (size, size) float64: a wave that reflects a row."""
    places = torch.arange(size, dtype=torch.float64) + 0.5
    waves = torch.cos(frequencies(size)[:, None] * places) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves


def satisfying(x: Tensor, operator: LinearOperator, y: Tensor, low: float, high: float, rounds: int = 50) -> Tensor:
    """Pictures x moved to H x = y within [low, high]: x + H^+ (y - H x), the nearest that satisfies it, and clamped.

    Clamping undoes a little of it, so both are done in turn, up to `rounds` times: projections on convex sets, which
    come as near to both as can be, and end in both where a picture within the range has the measurement y.
    """
    for _ in range(rounds):
        missing = y - operator(x)
        x = (x + operator.pseudo_inverse(missing)).clamp(low, high)
    return x
