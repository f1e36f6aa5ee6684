"""Pictures: white behind transparency, orientation, depth, sizes and crops, against pixels known in advance."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ldm.data.pictures import decode_picture, mirror_center_crops, normalize, open_picture, resize


def stored(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(
    ("form", "options", "extension"),
    [("PNG", {}, "png"), ("WEBP", {"lossless": True}, "webp"), ("JPEG", {"quality": 100, "subsampling": 0}, "jpg")],
)
def test_the_three_formats_decode_to_their_pixels(form: str, options: dict, extension: str) -> None:
    pixels = np.asarray(Image.fromarray(noise(3, 4)).resize((40, 30), Image.Resampling.BICUBIC))
    picture, found = open_picture(stored(Image.fromarray(pixels), form, **options))
    assert found == extension
    np.testing.assert_allclose(np.asarray(picture, dtype=int), pixels, atol=4 if form == "JPEG" else 0)


def test_transparency_is_composed_on_white() -> None:
    pixels = noise(4, 5, 4)
    picture, _ = open_picture(stored(Image.fromarray(pixels)))
    alpha = pixels[..., 3:] / 255
    np.testing.assert_allclose(np.asarray(picture), pixels[..., :3] * alpha + 255 * (1 - alpha), atol=1)
    grey, _ = open_picture(stored(Image.fromarray(pixels[..., :2], "LA")))
    alpha = pixels[..., 1:2] / 255
    expected = np.repeat(pixels[..., :1] * alpha + 255 * (1 - alpha), 3, axis=2)
    np.testing.assert_allclose(np.asarray(grey), expected, atol=1)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    picture, _ = open_picture(stored(palette, transparency=1))
    assert np.asarray(picture).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_grey_sixteen_bit_and_cmyk_pictures_become_rgb() -> None:
    grey = np.array([[0, 128, 255]], dtype=np.uint8)
    assert np.asarray(open_picture(stored(Image.fromarray(grey)))[0])[0, :, 2].tolist() == [0, 128, 255]
    deep = np.array([[0, 0x80FF, 0xFFFF]], dtype=np.uint16)
    assert np.asarray(open_picture(stored(Image.fromarray(deep)))[0])[0, :, 1].tolist() == [0, 128, 255]
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = np.asarray(open_picture(stored(cmyk, "JPEG", quality=100))[0])[8, 8]
    assert red[0] > 200
    assert red[1:].max() < 60


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.zeros((8, 16, 3), dtype=np.uint8)
    upright[:4, :8] = 255  # the top left quarter is white
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(Image.fromarray(np.ascontiguousarray(turn(upright))), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_picture(data)[0]), upright)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_every_truncation_of_a_picture_is_an_error(form: str) -> None:
    data = stored(Image.fromarray(noise(20, 20)), form)
    # The last bytes may be only the mark of the end (PNG: 12, JPEG: 2).
    for length in [*range(0, len(data) - 12, 23), len(data) // 2]:
        with pytest.raises(ValueError, match="does not decode"):
            open_picture(data[:length])


def test_other_formats_are_refused_by_name() -> None:
    for form in ("GIF", "BMP", "TIFF", "EPS"):
        with pytest.raises(ValueError, match="not a PNG, JPEG or WebP"):
            open_picture(stored(Image.fromarray(noise(4, 4)), form))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 200), (300, 64), (65, 64), (1000, 333), (16, 40)])
def test_the_shorter_side_becomes_the_resolution_and_the_shape_stays(height: int, width: int) -> None:
    resized = resize(Image.new("RGB", (width, height)), 64)
    assert min(resized.size) == 64
    assert abs(resized.width / resized.height / (width / height) - 1) < 0.03


def test_resizing_is_antialiased() -> None:
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(resize(Image.fromarray(stripes), 32))[4:-4, 4:-4]
    assert abs(small.astype(int) - 127).max() <= 4  # nearest or plain bilinear sampling gives 0 or 255


@pytest.mark.parametrize(("shape", "crop"), [((8, 8), (0, 0)), ((8, 20), (0, 6)), ((21, 8), (7, 0))])
def test_the_center_crop_is_centered_and_reported(shape: tuple[int, int], crop: tuple[int, int]) -> None:
    pixels = noise(*shape)
    picture = decode_picture({"png": stored(Image.fromarray(pixels))}, 8)
    top, left = crop
    np.testing.assert_array_equal(picture.pixels, pixels[top : top + 8, left : left + 8])
    assert (picture.size, picture.crop) == (shape, crop)


@pytest.mark.parametrize(
    ("stored_shape", "shape", "crop"),
    [((8, 20), (8, 12), (0, 4)), ((21, 8), (16, 8), (3, 0)), ((16, 24), (16, 24), (0, 0)), ((9, 24), (8, 24), (1, 0))],
)
def test_a_picture_is_cropped_to_a_height_and_a_width(
    stored_shape: tuple[int, int], shape: tuple[int, int], crop: tuple[int, int]
) -> None:
    pixels = noise(*stored_shape)
    picture = decode_picture({"png": stored(Image.fromarray(pixels))}, shape)
    (top, left), (height, width) = crop, shape
    np.testing.assert_array_equal(picture.pixels, pixels[top : top + height, left : left + width])
    assert (picture.size, picture.crop) == (stored_shape, crop)


def test_resizing_covers_the_shape_with_no_pixel_to_spare_over_500_random_shapes() -> None:
    seed = 41
    print(f"seed {seed}, 500 pictures and shapes")
    for (height, width), shape in np.random.default_rng(seed).integers(8, 200, (500, 2, 2)).tolist():
        resized = resize(Image.new("L", (width, height)), tuple(shape))
        spare = (resized.height - shape[0], resized.width - shape[1])
        assert min(spare) == 0
        assert max(spare) >= 0
        scale = max(shape[0] / height, shape[1] / width)
        assert abs(resized.height - height * scale) <= 0.5
        assert abs(resized.width - width * scale) <= 0.5
        members = {"png": stored(Image.new("L", (width, height)))}
        assert decode_picture(members, tuple(shape), (0.99, 0.0)).pixels.shape == (*shape, 3)


def test_a_wide_part_shows_what_a_picture_shows_there() -> None:
    # A gradient from left to right: the middle 3/4 of the width remain, and the brightness tells which.
    wide = np.repeat(np.linspace(0, 255, 256).round().astype(np.uint8)[None, :, None], 128, axis=0).repeat(3, axis=2)
    picture = decode_picture({"png": stored(Image.fromarray(wide))}, (64, 96))
    assert picture.crop == (0, 16)
    np.testing.assert_allclose(picture.pixels[32, :, 0], (np.arange(96) + 16.5) * 2, atol=1.5)


def test_a_number_is_the_side_of_a_square() -> None:
    data = {"png": stored(Image.fromarray(noise(37, 61)))}
    for place in ((0.5, 0.5), (0.1, 0.9)):
        one, other = decode_picture(data, 16, place), decode_picture(data, (16, 16), place)
        np.testing.assert_array_equal(one.pixels, other.pixels)
        assert one[1:] == other[1:]


def test_all_places_of_a_crop_are_inside_of_the_picture() -> None:
    data = {"webp": stored(Image.fromarray(noise(8, 11)), "WEBP", lossless=True)}
    lefts = [decode_picture(data, 8, (0.0, place)).crop[1] for place in (0.0, 0.24, 0.26, 0.5, 0.76, 1 - 2**-53)]
    assert lefts == [0, 0, 1, 2, 3, 3]
    tall = {"png": stored(Image.fromarray(noise(11, 8)))}
    assert [decode_picture(tall, 8, (place, 0.0)).crop for place in (0.0, 0.26, 0.76)] == [(0, 0), (1, 0), (3, 0)]
    assert all(decode_picture(data, 8, (0.999, place)).pixels.shape == (8, 8, 3) for place in (0, 0.999))


def test_a_mirrored_crop_lies_where_its_pixels_are_in_the_mirrored_picture_over_300_crops() -> None:
    rng = np.random.default_rng(7)
    print("seed 7, 300 crops")
    moved = 0
    for height, width, *shape in rng.integers(8, 48, (300, 4)).tolist():
        original, (least_height, least_width) = Image.fromarray(noise(height, width)), shape
        place = tuple(rng.random(2).tolist())
        picture = decode_picture({"png": stored(original)}, (least_height, least_width), place)
        mirrored = picture.mirrored()
        (top, left), whole = mirrored.crop, np.asarray(ImageOps.mirror(resize(original, (least_height, least_width))))
        np.testing.assert_array_equal(mirrored.pixels, whole[top : top + least_height, left : left + least_width])
        assert (mirrored.size, mirrored.crop[0]) == (picture.size, picture.crop[0])
        moved += mirrored.crop != picture.crop
    assert moved > 50


def test_center_crops_of_mirrored_pictures_follow_from_size_and_crop_alone_over_500_pictures() -> None:
    print("seed 8, 500 pictures")
    odd, stored_smaller = 0, 0
    for height, width, *shape in np.random.default_rng(8).integers(8, 200, (500, 4)).tolist():
        picture = resize(Image.new("RGB", (width, height)), (shape[0], shape[1]))
        top, left = (picture.height - shape[0] + 1) // 2, (picture.width - shape[1] + 1) // 2
        expected = picture.width - shape[1] - left
        given = np.array([[height, width, top, left], [7 * height - 3, 7 * width + 3, top, left], [0, 0, top, left]])
        found = mirror_center_crops(given.astype(np.float64), (shape[0], shape[1]))
        assert found[0].tolist() == [height, width, top, expected]
        assert abs(found[1:, 3] - expected).max() <= 1
        assert (found[:, :3] == given[:, :3]).all()
        odd += expected != left
        stored_smaller += found[1, 3] != expected
    assert odd > 50
    assert stored_smaller < 250


def test_a_sample_without_picture_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the members are \['txt'\]"):
        decode_picture({"txt": b""}, 8)


def test_pixels_are_normalized_to_minus_one_to_one_channels_first() -> None:
    pixels = noise(5, 7)
    pixels[0, 0], pixels[0, 1] = 0, 255
    images = normalize(np.stack([pixels, pixels[:, ::-1]]))
    assert images.shape == (2, 3, 5, 7)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert (images.min(), images.max()) == (-1, 1)
    np.testing.assert_allclose(images[0].permute(1, 2, 0), pixels.astype(np.float64) / 255 * 2 - 1, atol=1e-6)
    assert torch.equal(images[1], images[0].flip(2))
