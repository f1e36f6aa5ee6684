"""Members of a sample, against NumPy's own npy reader."""

import io
import json
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ldm.data.members import (
    decode_array,
    decode_caption,
    decode_floats,
    decode_floats_into,
    plain_captions,
    plain_sizes_and_crops,
    size_and_crop,
)


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version=version, allow_pickle=False)
    return out.getvalue()


@pytest.mark.parametrize("version", [None, (1, 0), (2, 0)])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", "u1", "<i8"])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3, 4)])
def test_arrays_are_those_that_numpy_reads(shape: tuple, dtype: str, version: tuple[int, int] | None) -> None:
    array = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    for order in (array, np.asfortranarray(array)):
        data = npy(order, version)
        read = decode_array(data, "x.npy")
        expected = np.load(io.BytesIO(data), allow_pickle=False)
        np.testing.assert_array_equal(read, expected)
        assert read.dtype == expected.dtype
        assert read.shape == expected.shape


def test_every_truncation_and_extension_of_an_array_is_an_error() -> None:
    data = npy(np.ones((2, 3), np.float16))
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"member \.x\.npy"):
            decode_array(data[:length], "x.npy")
    with pytest.raises(ValueError, match="needs others"):
        decode_array(data + b"\0", "x.npy")


def test_floats_are_finite_and_of_the_shape_asked_for() -> None:
    array = np.linspace(-6e4, 6e4, 6, dtype=np.float16).reshape(2, 3)
    np.testing.assert_array_equal(decode_floats({"a.npy": npy(array)}, "a.npy", (2, 3)), array)
    for bad in (np.nan, np.inf, -np.inf):
        for dtype in (np.float16, np.float32):
            values = array.astype(dtype)
            values[1, 1] = bad
            with pytest.raises(ValueError, match="NaN or infinity"):
                decode_floats({"a.npy": npy(values)}, "a.npy", (2, 3))
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(3, 2\)"):
        decode_floats({"a.npy": npy(array)}, "a.npy", (3, 2))
    with pytest.raises(ValueError, match="no member"):
        decode_floats({}, "a.npy", (3, 2))


def test_the_caption_is_the_text_or_one_of_several() -> None:
    several = {"txt": b" first\n", "json": b'{"captions": ["a", "b", "c"]}'}
    assert decode_caption({"txt": "caf\u00e9 \n".encode()}) == "caf\u00e9"
    assert [decode_caption(several, choice) for choice in (0.0, 0.34, 0.999)] == ["a", "b", "c"]
    # Stored text states are those of .txt.
    assert decode_caption(several | {"text.npy": b""}, 0.999) == "first"
    assert decode_caption({"txt": b"x", "json": b'{"captions": []}'}) == "x"
    # Several captions that training cannot read are no reason to take another.
    with pytest.raises(ValueError, match="not JSON"):
        decode_caption({"txt": b"x", "json": b'{"captions": ["a"'})


def outcome(decode: Callable[[], object]) -> object:
    try:
        return decode()
    except ValueError as error:
        return str(error)


# What encoding, img2dataset and others write, and what nobody should.
NOTES: list[dict] = [
    {},
    {"url": "https://example.org/a%20b.jpg", "status": "success", "error_message": None, "width": 512, "exif": "{}"},
    {"caption": 'she said \\"hi\\"', "score": -1.5e3},
    {"caption": "caf\u00e9 \u65e5\u672c", "captions": ["a", "b"]},
    {"nested": {"size": [1, 2], "crop": [3, 4]}},
    {"size": [9, 9], "text": '{"size": [1, 2], "crop": [3, 4]}'},
    {"ratio": 0.25, "big": 12345678901234567890, "ok": True, "list": []},
]
ENDS: list[dict] = [
    {"size": [480, 640], "crop": [0, 85]},
    {"size": [0, 999999999], "crop": [7, 0]},
    {"size": [480.5, 640], "crop": [0, -3]},
    {"size": [1234567890, 640], "crop": [0, 0]},
    {"crop": [0, 1], "size": [2, 3]},
    {"size": [480, 640]},
    {"size": [480], "crop": [0, 1]},
    {"size": "480x640", "crop": [0, 1]},
]


def about_by_the_standard_library(data: bytes) -> object:
    try:
        about = json.loads(data)
        (height, width), (top, left) = about.get("size", (64, 48)), about.get("crop", (0, 0))
        return float(height), float(width), float(top), float(left)
    except (ValueError, TypeError, AttributeError):
        return None


def test_size_and_crop_are_those_of_the_standard_librarys_json_for_6000_stored_and_mutilated_ones() -> None:
    print("seed 1, 6,000 members")
    rng = random.Random(1)
    whole = [
        json.dumps(note | end, ensure_ascii=escaped, indent=indent).encode()
        for note in NOTES
        for end in ENDS
        for escaped in (False, True)
        for indent in (None, 1)
    ]
    plain = [json.dumps(note | ENDS[0]).encode() for note in NOTES[:4]]
    quick, unread = 0, 0
    for _ in range(6000):
        data = bytearray(rng.choice(rng.choice((whole, plain))))
        for _ in range(rng.choice((0, 1, 2))):
            at = rng.randrange(len(data))
            changed = rng.choice(b'"\\[]{},: 0123-.e\n\x00\xe9us')
            data[at : at + rng.randrange(2)] = bytes([changed][: rng.randrange(2)])
        stored = bytes(data)
        expected = about_by_the_standard_library(stored)
        found = outcome(lambda stored=stored: size_and_crop({"json": stored}, (64, 48)))
        several = plain_sizes_and_crops([{"json": whole[0]}, {"json": memoryview(stored)}, {"json": whole[0]}])
        if several is not None:
            quick += 1
            # One by one it is the same, so that a sample's sizes do not depend on its batch; and it is what JSON says.
            assert several.tolist() == [[480, 640, 0, 85], list(found), [480, 640, 0, 85]], stored
            assert expected in (None, found), stored
            unread += expected is None
        else:
            assert (None if isinstance(found, str) else found) == expected, stored
    assert quick > 1500  # the quick way is taken, and not only refused
    assert 0 < unread < quick / 4  # damage before the end of the member, which is not read
    assert plain_sizes_and_crops([{"txt": b""}]) is None
    # Two ends in one member and none in the next are two in all.
    short = b'{"size": [0, 0], "crop": [0, 0]}'
    assert plain_sizes_and_crops([{"json": short + b"\n" + short}, {"json": b"{}"}]) is None


def test_captions_at_once_are_those_of_one_at_a_time_or_none() -> None:
    print("seed 2, 2,000 batches of 1 to 4")
    rng = random.Random(2)
    members: list[dict] = [
        {"txt": b"a cat"},
        {"txt": memoryview(" caf\u00e9 \u65e5\u672c\u3000".encode()), "json": b'{"size": [1, 2]}'},
        {"txt": b"a cat\0 and a dog"},
        {"txt": b"\0"},
        {"txt": b" \n"},
        {"txt": b""},
        {"txt": b"caf\xe9"},
        {"txt": b"cut \xe6\x97"},
        {"json": b"{}"},
        {"txt": b"first", "json": b'{"captions": ["one", "two"]}'},
        {"txt": b"first", "json": b'{"captions": ["one", "two"]}', "text.npy": b""},
        {"txt": b"first", "json": b'{"captions"'},
    ]
    quick = 0
    for _ in range(2000):
        some = rng.choices(members, weights=[9, 9, *[1] * 10], k=rng.randrange(1, 5))
        expected = [outcome(lambda one=one: decode_caption(one, 0.6)) for one in some]
        found = plain_captions(some)
        assert found in (None, expected)
        quick += found is not None
    assert quick > 300


def bad_arrays() -> list[bytes]:
    good = np.linspace(-3, 3, 12, dtype=np.float16).reshape(2, 3, 2)
    arrays = [good.astype(np.float32), np.asfortranarray(good), good.astype(">f2"), good.reshape(3, 2, 2), good[:1]]
    arrays += [good.astype(np.float64), good.astype(np.int16)]
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        for dtype in (np.float16, np.float32):
            arrays.append(good.astype(dtype))
            arrays[-1][1, 2, 0] = value
    largest = np.full_like(good, np.finfo(np.float16).max)
    data = [npy(one) for one in [*arrays, largest, -largest, np.zeros_like(good)]]
    return [*data, npy(good)[:-1], npy(good) + b"\0", npy(good)[:7], b"", npy(good, (2, 0)), b"\0" * len(npy(good))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_floats_of_3000_batches_are_those_of_one_at_a_time_or_refused(dtype: torch.dtype) -> None:
    print("seed 3, 3,000 batches of 1 to 6")
    rng = random.Random(3)
    numbers = np.random.default_rng(3)
    bad = bad_arrays()
    taken, refused = 0, 0
    for _ in range(3000):
        members: list[dict | None] = []
        for _ in range(rng.randrange(1, 7)):
            data = rng.choice(bad) if rng.random() < 0.2 else npy(numbers.standard_normal((2, 3, 2)).astype(np.float16))
            members.append(None if rng.random() < 0.05 else {"a.npy": memoryview(data), "b.npy": b"x"})
        out = torch.full((len(members), 2, 3, 2), 7.0, dtype=dtype)
        for row, good in enumerate(decode_floats_into(out, members, ["a.npy"] * len(members))):
            if good:
                expected = decode_floats(members[row] or {}, "a.npy", (2, 3, 2))
                assert expected.itemsize <= dtype.itemsize
                np.testing.assert_array_equal(out[row].numpy(), expected)
                taken += 1
            else:
                refused += 1
    assert taken > 3000  # most batches go the quick way
    assert refused > 500
    assert decode_floats_into(torch.empty(0, 2, 3, 2), [], []) == []


def test_a_batch_of_equal_headers_is_refused_only_where_a_value_is_not_finite() -> None:
    for dtype in (np.float16, np.float32):
        arrays = np.random.default_rng(4).standard_normal((9, 4, 5)).astype(dtype)
        arrays[2, 3, 4], arrays[5, 0, 0], arrays[7, 1, 1] = np.nan, -np.inf, np.finfo(dtype).max
        members = [{"a.npy": npy(array)} for array in arrays]
        alike = decode_floats_into(torch.empty(9, 4, 5), members, ["a.npy"] * 9)
        assert alike == [row not in (2, 5) for row in range(9)]
