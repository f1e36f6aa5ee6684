"""Height and width of a sample's picture or moments, read from their headers while a shard is indexed.

In: a member's bytes, or the first megabytes of a longer one.
Out: (height, width), or (0, 0) where the header does not tell; nothing is decoded but a PNG that may be turned by EXIF.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image

MOMENTS = "moments.npy"
PICTURE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
"""Members that are pictures; the first that a sample has is its picture."""
UNKNOWN = (0, 0)
SHAPED = (MOMENTS, *PICTURE_EXTENSIONS)
"""Members that have a shape; the first of these that a sample has gives the sample's."""
ORIENTATION = 0x0112
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
# Keywords of a PNG's chunks that Pillow takes an orientation from. They may follow the pixels, so that asking Pillow
# decodes the picture: 20 times the cost of its header, and for hardly any picture of use.
PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


def member_shape(extension: str, data: bytes) -> tuple[int, int]:
    """Height and width of a member whose extension is in `SHAPED`: of a picture upright, of moments their last axes."""
    return _moments_shape(data) if extension == MOMENTS else _picture_shape(data)


def _picture_shape(data: bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            width, height = picture.size
            if picture.format == "PNG" and not any(keyword in data for keyword in PNG_EXIF):
                return height, width
            return (width, height) if picture.getexif().get(ORIENTATION) in TRANSPOSED else (height, width)
    except Exception:  # Pillow raises a dozen types on damaged files; reading the sample says what is wrong with it
        return UNKNOWN


def _moments_shape(data: bytes) -> tuple[int, int]:
    length = int.from_bytes(data[8:10], "little") + 10  # of a header of version 1, which all moments have
    return _npy_shape(data[:length])


@lru_cache(maxsize=64)
def _npy_shape(head: bytes) -> tuple[int, int]:
    """Last two axes by an npy header; cached, since the samples of a shard share a few and parsing takes 30 us."""
    try:
        stream = io.BytesIO(head)
        if np.lib.format.read_magic(stream) != (1, 0):
            return UNKNOWN
        height, width = np.lib.format.read_array_header_1_0(stream)[0][-2:]
    except Exception:  # as for pictures
        return UNKNOWN
    return height, width
