"""Sizes in an index against the pictures as they decode, upright, and the arrays as they load."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from tars import write_tar

from ldm.data import members, pictures, shapes
from ldm.data.indexing import index_shard
from ldm.data.pictures import open_picture
from ldm.data.shapes import member_shape


def picture(form: str, size: tuple[int, int], orientation: int | None = None, **options: object) -> bytes:
    image = Image.effect_noise(size, 40).convert("RGB")
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    stored = io.BytesIO()
    image.save(stored, form, **options)
    return stored.getvalue()


def upright(data: bytes) -> tuple[int, int]:
    image, _ = open_picture(data)
    return image.height, image.width


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8])
def test_the_size_is_that_of_the_decoded_upright_picture(form: str, orientation: int | None) -> None:
    data = picture(form, (31, 17), orientation)
    assert member_shape(form.lower(), data) == upright(data)
    assert member_shape(form.lower(), data) == ((31, 17) if orientation in (5, 6, 7, 8) else (17, 31))


def test_an_orientation_after_the_pixels_of_a_png_or_in_its_xmp_counts() -> None:
    data = picture("PNG", (31, 17), 6)
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    end = data.index(b"IEND") - 4
    late = data[:start] + data[start + len(chunk) : end] + chunk + data[end:]
    assert late.index(b"eXIf") > late.index(b"IDAT")
    assert upright(late) == member_shape("png", late) == (31, 17)
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    turned = picture("PNG", (31, 17), pnginfo=notes)
    assert member_shape("png", turned) == upright(turned) == (31, 17)


def test_large_notes_before_the_size_of_a_jpeg_are_passed_over() -> None:
    data = picture("JPEG", (40, 30), icc_profile=random.Random(0).randbytes(300_000))
    assert member_shape("jpg", data) == upright(data) == (30, 40)


def test_headers_suffice_and_damage_is_unknown() -> None:
    rng = random.Random(1)
    for form in ("PNG", "JPEG"):
        data = picture(form, (300, 200))
        assert member_shape(form.lower(), data[: len(data) // 2]) == (200, 300)
        for _ in range(100):
            shape = member_shape(form.lower(), data[: rng.randrange(60)])
            assert shape in [(0, 0), (200, 300)]
    for junk in (b"", b"not a picture", rng.randbytes(1000), b"\x93NUMPY\x01\x00"):
        assert member_shape("png", junk) == member_shape("moments.npy", junk) == (0, 0)
    stored = io.BytesIO()
    Image.new("RGB", (5, 5)).save(stored, "GIF")
    assert member_shape("png", stored.getvalue()) == (0, 0)  # open_picture refuses it as well


@pytest.mark.parametrize("shape", [(8, 12, 20), (8, 1, 3), (2, 4, 6, 5)])
def test_moments_have_their_last_two_axes(shape: tuple[int, ...]) -> None:
    stored = io.BytesIO()
    np.save(stored, np.zeros(shape, np.float16))
    assert member_shape("moments.npy", stored.getvalue()) == shape[-2:]
    assert member_shape("moments.npy", stored.getvalue()[:200]) == shape[-2:]
    vector = io.BytesIO()
    np.save(vector, np.zeros(3, np.float16))
    assert member_shape("moments.npy", vector.getvalue()) == (0, 0)


def test_an_index_holds_the_size_of_the_picture_that_is_decoded_in_file_order_of_the_samples(tmp_path: Path) -> None:
    moments = io.BytesIO()
    np.save(moments, np.zeros((8, 6, 7), np.float32))
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("0.txt", b"caption"),
            ("0.jpg", picture("JPEG", (10, 20))),
            ("1.webp", picture("WEBP", (12, 13))),
            ("1.jpg", picture("JPEG", (14, 15))),
            ("1.png", picture("PNG", (16, 17))),  # the first of RAW_EXTENSIONS, and last in the file
            ("2.txt", b"no picture"),
            ("3.jpg", b"damaged"),
            ("4.jpg", picture("JPEG", (30, 20))),
            ("4.moments.npy", moments.getvalue()),
            ("5.jpg", picture("JPEG", (8, 9), 8)),
        ],
    )
    index = index_shard(path)
    assert index.shapes.dtype == np.int32
    assert index.shapes.tolist() == [[20, 10], [17, 16], [0, 0], [0, 0], [6, 7], [8, 9]]
    stored = path.read_bytes()
    sample = {
        index.extensions[index.extension_ids[row]]: stored[index.offsets[row] : index.offsets[row] + index.sizes[row]]
        for row in range(index.starts[1], index.starts[2])
    }
    extension = next(one for one in pictures.RAW_EXTENSIONS if one in sample)
    assert tuple(index.shapes[1]) == upright(sample[extension])


def test_the_members_that_have_a_size_are_those_that_are_read() -> None:
    assert shapes.PICTURE_EXTENSIONS == pictures.RAW_EXTENSIONS
    assert shapes.MOMENTS == members.MOMENTS
