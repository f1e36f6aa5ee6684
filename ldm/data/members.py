"""From a sample's members, as they lie in the shard, to its caption, moments, text states and pooled text.

In: bytes by extension ("txt", "json", "moments.npy", "flipped.npy", "text.npy", "pooled.npy"), as bytes or as views of
a map. Out: checked values; a ValueError says why a sample cannot be used. (Pictures: pictures.py.)
"""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.shapes import MOMENTS as MOMENTS

FLIPPED, TEXT, POOLED = "flipped.npy", "text.npy", "pooled.npy"
Members = Mapping[str, bytes | memoryview]
"""A sample's members by extension."""

_EXPONENT = {2: 0x7C00, 4: 0x7F800000}  # by size in bytes; all of it set: infinity or NaN

# How encoding ends a .json: with "size" and "crop". In JSON that ends so the last bracket is the outermost, which makes
# these the last entries of the whole; so whatever comes before need not be read, which takes 5 us.
_TAIL = re.compile(rb'[{ ]"size": \[N, N\], "crop": \[N, N\]\}$'.replace(b"N", rb"(0|[1-9][0-9]{0,8})"), re.MULTILINE)
_TAIL_BYTES = 72  # of the longest one


def decode_json(members: Members) -> dict[str, Any]:
    """The member .json, an object; empty where the sample has none.

    Raises:
        ValueError: it is not an object in JSON.
    """
    if "json" not in members:
        return {}
    try:
        stored = json.loads(bytes(members["json"]))
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


def size_and_crop(members: Members, resolution: tuple[int, int]) -> tuple[float, ...]:
    """Height, width, top and left in pixels out of an encoded sample's .json ("size": [h, w], "crop": [top, left]).

    Of what encoding writes only the end is read.

    Args:
        resolution: height and width of the pictures that were encoded: the size where .json has none.

    Raises:
        ValueError: not an object in JSON, or not two numbers each.
    """
    found = plain_sizes_and_crops([members])
    if found is not None:
        return tuple(found[0].tolist())
    about = decode_json(members)
    return two_pairs(about.get("size", resolution), about.get("crop", (0, 0)))


def plain_sizes_and_crops(members: Sequence[Members]) -> np.ndarray | None:
    """`size_and_crop` of n samples at once, (n, 4), where each .json ends as encoding writes it; otherwise None."""
    tails = b"\n".join([one.get("json", b"")[-_TAIL_BYTES:] for one in members])
    found = _TAIL.findall(tails)
    if len(found) < len(members) or tails.count(b"\n") >= len(members):
        return None
    return np.fromiter(map(float, chain.from_iterable(found)), np.float64, 4 * len(found)).reshape(-1, 4)


def plain_captions(members: Sequence[Members]) -> list[str] | None:
    """`decode_caption` of samples at once, where none has several captions or one that is an error; otherwise None."""
    try:
        texts = str(b"\0".join([one["txt"] for one in members]), "utf-8").split("\0")
    except (KeyError, UnicodeDecodeError):
        return None
    if len(texts) != len(members) or b'"captions"' in b"\0".join([one.get("json", b"") for one in members]):
        return None
    captions = [text.strip() for text in texts]
    return captions if all(captions) else None


def two_pairs(size: Any, crop: Any) -> tuple[float, ...]:
    """The four numbers of a sample's size and crop; raises ValueError where they are not two numbers each."""
    try:
        (height, width), (top, left) = size, crop
        return float(height), float(width), float(top), float(left)
    except (TypeError, ValueError):
        raise ValueError(f'member .json: "size" is {size}, "crop" is {crop}; expected two numbers each') from None


def decode_caption(members: Members, choice: float = 0.0) -> str:
    """The sample's caption: one of the list "captions" of .json where there is one, else .txt.

    Text states in the shard belong to .txt, so that a sample that has them takes no other caption.

    Args:
        choice: in [0, 1), which caption of several.

    Raises:
        ValueError: no caption, an empty one, or not UTF-8.
    """
    captions = None
    if TEXT not in members and b'"captions"' in bytes(members.get("json", b"")):  # most have none; parsing takes 5 us
        captions = decode_json(members).get("captions")
    if captions:
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError('"captions" in member .json is not a list of strings')
        caption = captions[int(choice * len(captions))]
    elif "txt" in members:
        try:
            caption = str(members["txt"], "utf-8")
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


def _header_length(data: bytes | memoryview, name: str) -> int:
    if data[:6] == b"\x93NUMPY" and data[6:7] == b"\x01":
        return int.from_bytes(data[8:10], "little") + 10
    if data[:6] == b"\x93NUMPY" and data[6:7] == b"\x02":
        return int.from_bytes(data[8:12], "little") + 12
    raise ValueError(f"member .{name} is not a npy file of version 1 or 2")


def decode_array(data: bytes | memoryview, name: str) -> np.ndarray:
    """Array of a .npy member, a view of its bytes.

    Raises:
        ValueError: not a npy file, cut short, or one that holds pickled objects.
    """
    length = _header_length(data, name)
    try:
        dtype, shape, fortran = _npy_header(bytes(data[:length]))
    except Exception as error:
        raise ValueError(f"member .{name} has a npy header that does not parse: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"member .{name} holds pickled objects, which are never loaded")
    if len(data) - length != dtype.itemsize * math.prod(shape):
        raise ValueError(f"member .{name} has {len(data) - length} bytes of data, its shape {shape} needs others")
    array = np.frombuffer(data, dtype, offset=length)
    return array.reshape(shape, order="F" if fortran else "C")


def decode_floats(members: Members, name: str, shape: tuple[int, ...]) -> np.ndarray:
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


def float_form(data: bytes | memoryview, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of a .npy member of float16 or float32; raises ValueError where it is none."""
    array = decode_array(data, name)
    if array.dtype not in (np.float16, np.float32):
        raise ValueError(f"member .{name} is {array.dtype}, expected float16 or float32")
    return array.shape, torch.from_numpy(np.empty(0, array.dtype.newbyteorder("="))).dtype


def decode_floats_into(out: Tensor, members: Sequence[Members | None], names: Sequence[str]) -> list[bool]:
    """`decode_floats` of many samples at once, for those that are stored alike; in the type of `out`.

    Args:
        out: (n, ...) float16 or float32, of the shape expected.
        members: of n samples; None for one that is left out.
        names: n names of the members wanted.

    Returns:
        for each sample whether its row is what `decode_floats` gives. Otherwise the row is undefined, and decoding the
        sample by itself tells what is wrong with it, or that it is only stored in another way than the others.
    """
    data: list[bytes | memoryview] = [
        b"" if one is None else one.get(name, b"") for one, name in zip(members, names, strict=True)
    ]
    try:
        first = next(one for one in data if len(one))
        head = bytes(first[: _header_length(first, "")])
        dtype, shape, fortran = _npy_header(head)
    except Exception:
        return [False] * len(data)
    size = dtype.itemsize
    if (
        shape != out.shape[1:]
        or fortran
        or dtype not in (np.float16, np.float32)
        or len(head) % size
        or size > out.itemsize
    ):
        return [False] * len(data)
    length = len(head) + size * math.prod(shape)
    fits = [len(one) == length for one in data]
    if not all(fits):
        data = [one if fit else bytes(length) for one, fit in zip(data, fits, strict=True)]
    rows = np.frombuffer(bytearray().join(data), dtype=np.uint8).reshape(len(data), length)
    values = rows[:, len(head) :].view(dtype)  # (n, elements)
    same, finite = rows[:, : len(head)].tobytes() == head * len(data), _all_finite(values)
    out.flatten(1).copy_(torch.from_numpy(values))  # 4x as fast as NumPy from float16 to float32
    if same and finite:
        return [True] * len(data)
    same_rows = (rows[:, : len(head)] == np.frombuffer(head, dtype=np.uint8)).all(1)
    return (same_rows & np.isfinite(values).all(1)).tolist()


def _all_finite(values: np.ndarray) -> bool:
    """By the largest bit patterns of positive and negative numbers: NumPy's `isfinite` takes 5x as long for float16."""
    size, exponent = values.dtype.itemsize, _EXPONENT[values.dtype.itemsize]
    sign = 1 << (8 * size - 1)
    positive, negative = values.view(f"i{size}").max(initial=0), values.view(f"u{size}").max(initial=0)
    return int(positive) < exponent and int(negative) < sign | exponent
