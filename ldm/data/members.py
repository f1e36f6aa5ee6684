"""From a sample's members, as they lie in the shard, to its caption, moments and text states.

In: bytes by extension ("txt", "json", "moments.npy", "flipped.npy", "text.npy").
Out: checked values; a ValueError says why a sample cannot be used. (Pictures: pictures.py.)
"""

import io
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

MOMENTS, FLIPPED, TEXT = "moments.npy", "flipped.npy", "text.npy"


def decode_json(members: Mapping[str, bytes]) -> dict[str, Any]:
    """The member .json, an object; empty where the sample has none.

    Raises:
        ValueError: it is not an object in JSON.
    """
    if "json" not in members:
        return {}
    try:
        stored = json.loads(members["json"])
    except ValueError as error:
        raise ValueError(f"member .json is not JSON: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"member .json holds a {type(stored).__name__}, expected an object")
    return stored


def original_size(about: Mapping[str, Any], stored: tuple[int, int]) -> tuple[int, int]:
    """Height and width that a raw sample's picture had: img2dataset and tools/make_shards.py may store it smaller.

    Args:
        about: the sample's .json.
        stored: height and width of the picture in the shard.
    """
    height, width = about.get("original_height"), about.get("original_width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else stored


def decode_caption(members: Mapping[str, bytes], choice: float = 0.0) -> str:
    """The sample's caption: one of the list "captions" of .json where there is one, else .txt.

    Text states in the shard belong to .txt, so that a sample that has them takes no other caption.

    Args:
        choice: in [0, 1), which caption of several.

    Raises:
        ValueError: no caption, an empty one, or not UTF-8.
    """
    captions = None
    if TEXT not in members and b'"captions"' in members.get("json", b""):  # most have none, and parsing takes 5 us
        captions = decode_json(members).get("captions")
    if captions:
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError('"captions" in member .json is not a list of strings')
        caption = captions[int(choice * len(captions))]
    elif "txt" in members:
        try:
            caption = members["txt"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"the caption is not UTF-8: {error}") from error
    else:
        raise ValueError(f"no caption: the members are {sorted(members)}, expected txt")
    caption = caption.strip()
    if not caption:
        raise ValueError("the caption is empty")
    return caption


@lru_cache(maxsize=64)
def _npy_header(head: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    """Type, shape and Fortran order; cached, since the samples of a shard share one header and parsing takes 30 us."""
    stream = io.BytesIO(head)
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[np.lib.format.read_magic(stream)[0]](stream)
    return dtype, shape, fortran


def decode_array(data: bytes, name: str) -> np.ndarray:
    """Array of a .npy member, a view of its bytes.

    Raises:
        ValueError: not a npy file, cut short, or one that holds pickled objects.
    """
    length = int.from_bytes(data[8:10], "little") + 10 if data[6:7] == b"\x01" else None
    if data[:6] != b"\x93NUMPY" or (length is None and data[6:7] != b"\x02"):
        raise ValueError(f"member .{name} is not a npy file of version 1 or 2")
    if length is None:
        length = int.from_bytes(data[8:12], "little") + 12
    try:
        dtype, shape, fortran = _npy_header(data[:length])
    except Exception as error:
        raise ValueError(f"member .{name} has a npy header that does not parse: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"member .{name} holds pickled objects, which are never loaded")
    if len(data) - length != dtype.itemsize * math.prod(shape):
        raise ValueError(f"member .{name} has {len(data) - length} bytes of data, its shape {shape} needs others")
    array = np.frombuffer(data, dtype, offset=length)
    return array.reshape(shape, order="F" if fortran else "C")


def decode_floats(members: Mapping[str, bytes], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The member `name`, float16 or float32, of the given shape and finite.

    Raises:
        ValueError: missing, or not so.
    """
    if name not in members:
        raise ValueError(f"no member .{name}: the members are {sorted(members)}")
    array = decode_array(members[name], name)
    if array.dtype not in (np.float16, np.float32):
        raise ValueError(f"member .{name} is {array.dtype}, expected float16 or float32")
    if array.shape != shape:
        raise ValueError(f"member .{name} has shape {array.shape}, expected {shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"member .{name} holds NaN or infinity")
    return array
