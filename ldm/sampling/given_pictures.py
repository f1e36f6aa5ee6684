"""A picture, or a measurement of one, that drawing starts from beside prompts.

Enters: pixels, a mask, an operator, settings. Leaves: a GivenPicture whose parts fit each other, of the size that is
drawn, or an error that names what does not fit. given_options.py reads it from a command line.
"""

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from ldm.data.pictures import cover
from ldm.diffusion.linear_operators import AveragePooling, GaussianBlur, LinearOperator, Masking

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Operator:
    """What a picture was measured by, as the command line says it."""

    name: str
    value: float = 0.0
    """Factor of super_resolution, deviation in pixels of blur."""

    def measured_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the measurement of a picture; raises ValueError where the factor does not divide it."""
        if self.name != "super_resolution":
            return height, width
        factor = int(self.value)
        if height % factor or width % factor:
            raise ValueError(
                f"operator: super_resolution:{factor} does not divide pictures of {height}x{width} pixels; give "
                f"--height and --width that are multiples of {factor}, or another factor"
            )
        return height // factor, width // factor


@dataclass(frozen=True)
class GivenPicture:
    """A picture, or its measurement, from which every picture of a call is drawn."""

    pixels: np.ndarray
    """(H, W, 3) uint8: of the size that is drawn, or of the operator's measurement of that."""
    strength: float = 1.0
    """Share of the steps that are taken, in (0, 1]: the last ones."""
    mask: np.ndarray | None = None
    """(H, W) bool, True where the picture is drawn anew, or was not measured."""
    operator: Operator | None = None
    repeats: int = 1
    """Times that each step is taken with a mask."""

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength: found {self.strength}, expected more than 0, at most 1")
        if self.mask is not None and self.mask.shape != self.pixels.shape[:2]:
            raise ValueError(
                f"mask: found {' x '.join(map(str, self.mask.shape))} pixels (height x width), expected the picture's "
                f"{self.pixels.shape[0]} x {self.pixels.shape[1]}"
            )
        if self.mask is not None and not self.mask.any():
            raise ValueError("mask: found no white pixel, expected white where the picture is to be drawn anew")
        masks = self.operator is None or self.operator.name == "mask"
        if self.mask is not None and not masks:
            raise ValueError(f"mask: operator {self.operator and self.operator.name} takes none")
        if self.operator is not None and self.operator.name == "mask" and self.mask is None:
            raise ValueError("operator: mask needs --mask FILE, white where the picture was not measured")
        if self.repeats < 1 or (self.repeats > 1 and (self.mask is None or self.operator is not None)):
            raise ValueError(f"repeats: found {self.repeats}, expected 1, or 2 and more with a mask and no operator")

    @property
    def inpaints(self) -> bool:
        """Whether it is a picture with a mask, which inpainting networks take."""
        return self.mask is not None and self.operator is None

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError unless it is what is given of a picture of height x width."""
        expected, found, means = (height, width), self.pixels.shape[:2], "the size that is drawn"
        if self.operator is not None:
            expected = self.operator.measured_size(height, width)
            means = f"what operator {self.operator.name} measures of a picture of {height} x {width}"
        if found != expected:
            raise ValueError(
                f"init_image: found {found[0]} x {found[1]} pixels (height x width), expected {expected[0]} x "
                f"{expected[1]}, {means}; --height and --width say the size to draw"
            )

    def fitted(self, height: int, width: int) -> "GivenPicture":
        """This picture at the size that is drawn: covered and cropped in the middle as training pictures are.

        A measurement is left as it is, because another size would be another measurement.

        Raises:
            ValueError: a measurement of another size than the operator makes of height x width, or a mask of which
                nothing is left.
        """
        if self.operator is not None or self.pixels.shape[:2] == (height, width):
            self.check_size(height, width)
            return self
        logger.warning(
            "init_image: %d x %d pixels (height x width) are resized and cropped to %d x %d; --height and --width say "
            "another size",
            *self.pixels.shape[:2], height, width,
        )  # fmt: skip
        pixels = np.array(cover(Image.fromarray(self.pixels), (height, width))[0])
        if self.mask is None:
            return replace(self, pixels=pixels)
        mask = is_white(cover(Image.fromarray(self.mask.astype(np.uint8) * 255), (height, width))[0])
        if not mask.any():
            raise ValueError(
                f"mask: resized and cropped to {height} x {width} with its picture, nothing of it is white, expected "
                "white where the picture is to be drawn anew"
            )
        return replace(self, pixels=pixels, mask=mask)

    def linear_operator(self) -> LinearOperator:
        """The operator, of pictures of the size that is drawn."""
        assert self.operator is not None
        if self.operator.name == "super_resolution":
            return AveragePooling(int(self.operator.value))
        if self.operator.name == "blur":
            height, width = self.pixels.shape[:2]
            return GaussianBlur(height, width, self.operator.value)
        return Masking(torch.from_numpy(~self.mask) if self.mask is not None else torch.ones(1, dtype=torch.bool))


def is_white(mask: Image.Image) -> np.ndarray:
    """(H, W) bool of a picture in mode L; half, 128, counts as white, as it does in diffusers."""
    white: np.ndarray = np.asarray(mask) >= 128
    return white
