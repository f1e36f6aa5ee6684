"""Pictures: from a file's bytes to RGB pixels of the height and width that are trained on.

In: the bytes of a PNG, JPEG or WebP; a height and width; where to crop.
Out: RGB on white, upright, resized and cropped, as uint8 pixels or as float32 in [-1, 1].
"""

import io
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageOps
from torch import Tensor

from ldm.data.shapes import PICTURE_EXTENSIONS

FORMATS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
"""What is read: Pillow's name of the format, and the extension of such a member."""
RAW_EXTENSIONS = PICTURE_EXTENSIONS


class Picture(NamedTuple):
    """The part of a picture that is trained on, ready for the network but for its range."""

    pixels: np.ndarray
    """(height, width, 3) uint8"""
    size: tuple[int, int]
    """Height and width of the original, upright."""
    crop: tuple[int, int]
    """Top and left of the part in the resized picture."""

    def mirrored(self) -> "Picture":
        """The same part of the mirrored picture, left of which lies what was right of it."""
        height, width = self.pixels.shape[:2]
        spare = int(resized_widths(*self.size, (height, width))) - width
        return Picture(self.pixels[:, ::-1], self.size, (self.crop[0], spare - self.crop[1]))


def open_picture(data: bytes) -> tuple[Image.Image, str]:
    """Decoded picture, upright and on white, in mode RGB, and the extension that its format has.

    EXIF orientation is applied, transparency composed on white, 16 bits reduced to 8, and any other mode converted.

    Raises:
        ValueError: the bytes do not decode to the last pixel as PNG, JPEG or WebP.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        extension = FORMATS[str(picture.format)]
        picture.load()
        return _rgb_on_white(ImageOps.exif_transpose(picture)), extension
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files, SyntaxError among them
        detail = "not a PNG, JPEG or WebP" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ValueError(f"the picture does not decode: {detail}") from error


def _rgb_on_white(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    if picture.mode in ("LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def resize(picture: Image.Image, shape: int | tuple[int, int]) -> Image.Image:
    """The picture at the smallest size that covers height x width, antialiased (Lanczos); a smaller one is enlarged.

    Args:
        shape: height and width, or one number for both: that of the shorter side.
    """
    width, height = picture.size
    least_height, least_width = (shape, shape) if isinstance(shape, int) else shape
    size = (
        int(resized_widths(height, width, (least_height, least_width))),
        int(resized_widths(width, height, (least_width, least_height))),
    )
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def resized_widths(heights: ArrayLike, widths: ArrayLike, shape: tuple[int, int]) -> np.ndarray:
    """Widths that pictures of those heights and widths have at the smallest size that covers `shape`, before the crop.

    With heights and widths in each other's place, in `shape` too, it is the heights.
    """
    heights, widths = np.asarray(heights, np.float64), np.asarray(widths, np.float64)
    scales = np.maximum(shape[0] / heights, shape[1] / widths)
    return np.maximum(shape[1], np.rint(widths * scales))


def mirror_center_crops(sizes_and_crops: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Height, width, top and left (n, 4) of center crops, for the mirrored pictures: the left becomes theirs.

    As the left is half the spare width, rounded up, that of the mirrored picture is the same or one less, by whether
    the spare width is odd. Sizes tell that of a picture that was cropped as it was; one that was stored smaller before
    has the size of its original, whose spare width may be another, and where that does not lead to the crop that is
    given, the left stays: a pixel too much at most.
    """
    heights, widths, tops, lefts = sizes_and_crops.T
    with np.errstate(all="ignore"):  # sizes of nothing, which are as good as none
        spare = resized_widths(heights, widths, shape) - shape[1]
    return np.stack([heights, widths, tops, lefts - (spare == 2 * lefts - 1)], axis=1)


def decode_picture(
    members: Mapping[str, bytes], shape: int | tuple[int, int], place: tuple[float, float] = (0.5, 0.5)
) -> Picture:
    """A raw sample's picture, resized to cover `shape` and cropped to it.

    Args:
        members: of the sample, by extension.
        shape: height and width, or the side of a square.
        place: where to crop, vertically and horizontally: 0 at the top or left, 0.5 in the middle, below 1.

    Raises:
        ValueError: no picture among the members, or one that does not decode.
    """
    extension = next((one for one in RAW_EXTENSIONS if one in members), None)
    if extension is None:
        raise ValueError(f"no picture: the members are {sorted(members)}, expected one of {', '.join(RAW_EXTENSIONS)}")
    original, _ = open_picture(members[extension])
    height, width = (shape, shape) if isinstance(shape, int) else shape
    picture, crop = cover(original, (height, width), place)
    return Picture(np.asarray(picture), (original.height, original.width), crop)


def cover(
    picture: Image.Image, shape: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)
) -> tuple[Image.Image, tuple[int, int]]:
    """The picture resized to cover height x width and cropped to it, and the top and left of that part.

    Args:
        place: as `decode_picture` takes it.
    """
    height, width = shape
    picture = resize(picture, shape)
    top, left = int(place[0] * (picture.height - height + 1)), int(place[1] * (picture.width - width + 1))
    return picture.crop((left, top, left + width, top + height)), (top, left)


def normalize(pixels: np.ndarray | Tensor) -> Tensor:
    """Pixels (B, H, W, 3) uint8 as the network takes them: (B, 3, H, W) float32 in [-1, 1]."""
    tensor = torch.as_tensor(pixels)  # (B, H, W, 3)
    return tensor.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1
