"""The settings of a corruption other than Gaussian noise, and the corruption that they mean.

Enters: the `corruption` part of a run's config, or that of a checkpoint. Leaves: a Corruption for latents of a size, or
an error that names field, value and what is allowed.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ldm.diffusion.corruption import Blur, Corruption, GrowingMask, PixelMasking
from ldm.diffusion.objective_config import ObjectiveConfig

CorruptionName = Literal["masking", "growing_mask", "blur"]


@dataclass
class CorruptionConfig:
    """What takes the place of noise: D(x0, level) for levels 0 (clean) to T, undone by a network that predicts x0."""

    kind: CorruptionName = "masking"
    """`masking` replaces pixels of the latents one after another, in an order that is drawn for each sample; in
    `growing_mask` what is around a drawn pixel fades to 0, further and further; `blur` is Gaussian."""
    pixels_per_level: int = 1
    """Of masking: pixels that a level replaces more than the one below it; T is their number divided by it."""
    fill: float | None = 0.0
    """Of masking: what replaces a pixel, in all channels of the scaled latents; unset, unit normal noise does."""
    levels: int = 50
    """Of growing_mask and blur: T."""
    mask_first: float = 1.0
    """Of growing_mask: deviation in latent pixels of what the first level fades."""
    mask_growth: float = 0.1
    """Of growing_mask: how much wider each next level is than the one before it, in latent pixels."""
    blur_first: float = 0.25
    """Of blur: deviation in latent pixels at level 1; those between are in geometric progression."""
    blur_last: float = 16.0
    """Of blur: deviation in latent pixels at level T, where sampling starts. From the width of the latents on nothing
    but the mean of each channel is left, which is what the start knows (see start_mean)."""
    start_mean: list[float] | None = None
    """Of growing_mask and blur: mean over the data of each channel's mean, of which the start of sampling is drawn
    (Bansal et al. 2022, section 5.2). Unset, it is estimated, and stored in the checkpoint."""
    start_covariance: list[list[float]] | None = None
    """Covariance over the data of the channels' means; told together with start_mean."""
    start_samples: int = 1024
    """Samples that start_mean and start_covariance are estimated from: those of the run's first positions."""
    start_noise: float = 0.002
    """Of growing_mask and blur: deviation of the noise that is added to the start, without which all of its pixels are
    the same (Bansal et al. 2022, section 5.2)."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(CorruptionName):
            raise ValueError(f"corruption.kind: found {self.kind!r}, expected one of {[*get_args(CorruptionName)]}")
        for name, least in (("pixels_per_level", 1), ("levels", 1), ("start_samples", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"corruption.{name}: found {getattr(self, name)}, expected {least} or more")
        if self.fill is not None and not math.isfinite(self.fill):
            raise ValueError(f"corruption.fill: found {self.fill}, expected a finite number, or unset for noise")
        if not 0 < self.mask_first < math.inf:
            raise ValueError(f"corruption.mask_first: found {self.mask_first}, expected a positive number")
        for name in ("mask_growth", "start_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"corruption.{name}: found {getattr(self, name)}, expected 0 or more")
        rising = self.blur_first < self.blur_last if self.levels > 1 else True
        if not (self.blur_first > 0 and rising and self.blur_last < math.inf):
            raise ValueError(
                f"corruption.blur_first, corruption.blur_last: found {self.blur_first}, {self.blur_last}, expected "
                "0 < blur_first < blur_last"
            )
        self._check_start()

    def _check_start(self) -> None:
        mean, covariance = self.start_mean, self.start_covariance
        if (mean is None) != (covariance is None):
            raise ValueError(
                f"corruption.start_mean, corruption.start_covariance: found {mean}, {covariance}, expected both or none"
            )
        if mean is not None and covariance is not None:
            size = len(mean)
            numbers = [*mean, *(value for row in covariance for value in row)]
            if not size or [len(row) for row in covariance] != [size] * size or not all(map(math.isfinite, numbers)):
                raise ValueError(
                    f"corruption.start_covariance: found {covariance}, expected {size} rows of {size} finite numbers, "
                    f"as start_mean has {size}"
                )
            matrix = torch.tensor(covariance, dtype=torch.float64)
            if (
                not torch.equal(matrix, matrix.T)
                or float(torch.linalg.eigvalsh(matrix)[0]) < -1e-6 * matrix.abs().max()
            ):
                raise ValueError(
                    f"corruption.start_covariance: found {covariance}, expected a covariance: symmetric, with "
                    "no negative variance"
                )

    @property
    def starts_from_means(self) -> bool:
        """Whether sampling starts from channel means that are drawn, because level T leaves something of the data."""
        return self.kind != "masking"

    @property
    def lacks_start(self) -> bool:
        """Whether sampling needs start_mean, and it is not known."""
        return self.starts_from_means and self.start_mean is None

    @property
    def more_noise(self) -> int:
        """Channels that the corruption's noise has more than the latents: one for masking that fills with noise."""
        return 1 if self.kind == "masking" and self.fill is None else 0


def build_corruption(config: CorruptionConfig, height: int, width: int) -> Corruption:
    """The corruption of latents (B, C, height, width).

    Raises:
        ValueError: more pixels a level than the latents have; names the setting.
    """
    if config.kind == "masking":
        if config.pixels_per_level > height * width:
            raise ValueError(
                f"corruption.pixels_per_level: found {config.pixels_per_level}, expected at most the {height * width} "
                f"pixels of {height}x{width} latents"
            )
        return PixelMasking(height, width, config.pixels_per_level, config.fill)
    if config.kind == "growing_mask":
        return GrowingMask(height, width, config.levels, config.mask_first, config.mask_growth)
    return Blur(height, width, blur_deviations(config))


def blur_deviations(config: CorruptionConfig) -> list[float]:
    """Deviations in latent pixels of levels 1 to T, in geometric progression; a single level has the last one."""
    if config.levels == 1:
        return [config.blur_last]
    ratio = config.blur_last / config.blur_first
    return [
        *(config.blur_first * ratio ** (i / (config.levels - 1)) for i in range(config.levels - 1)),
        config.blur_last,
    ]


def check_corruption(objective: ObjectiveConfig) -> None:
    """Raises ValueError for an objective that a corruption has no use for; names field, value and what is allowed.

    Its network predicts x0 from every level with the same weight, the levels being equally likely.
    """
    required: dict[str, object] = {
        "parameterization": "x0",
        "loss": "x0",
        "weight": "uniform",
        "timestep_sampling": "uniform",
        "learned_variance": False,
        "offset_noise": 0.0,
    }
    for name, expected in required.items():
        if getattr(objective, name) != expected:
            raise ValueError(
                f"objective.{name}: found {getattr(objective, name)!r} with a corruption, expected {expected!r}: its "
                "network predicts x0, at levels that are equally likely and have the same weight"
            )
