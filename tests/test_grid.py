"""Labelled grids: pictures where they belong, labels inside their cell, settings readable from the PNG."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from ldm import grid
from ldm.grid import labelled_grid, save_png, wrap


def coloured(count: int, size: int) -> np.ndarray:
    """(count, size, size, 3) uint8, each of one colour that only it has."""
    pictures = np.zeros((count, size, size, 3), np.uint8)
    pictures[..., 0] = np.linspace(60, 250, count, dtype=np.uint8)[:, None, None]
    return pictures


def cell(sheet: Image.Image, row_top: int, column: int, width: int, height: int) -> np.ndarray:
    left = grid.MARGIN + column * (width + grid.MARGIN)
    return np.asarray(sheet)[row_top : row_top + height, left : left + width]


def test_pictures_stand_in_reading_order_at_full_size() -> None:
    pictures = coloured(5, 160)
    sheet = labelled_grid(pictures, list("abcde"), columns=3)
    second_row = sheet.height - (sheet.height - grid.MARGIN) // 2
    for i, picture in enumerate(pictures):
        top = grid.MARGIN if i < 3 else second_row
        assert np.array_equal(cell(sheet, top, i % 3, 160, 160), picture), f"picture {i} is not in its cell"


def test_small_pictures_are_enlarged_by_whole_factors_and_tiny_ones_keep_their_pixels() -> None:
    rng = np.random.default_rng(0)
    tiny = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    sheet = labelled_grid([tiny], ["noise"])
    assert np.array_equal(cell(sheet, grid.MARGIN, 0, 144, 144), tiny.repeat(9, 0).repeat(9, 1))
    small = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(small).resize((192, 192), Image.Resampling.LANCZOS))
    assert np.array_equal(cell(labelled_grid([small], ["noise"]), grid.MARGIN, 0, 192, 192), expected)


def test_a_label_is_drawn_below_its_picture_as_pillow_draws_it() -> None:
    picture = coloured(1, 144)
    sheet = np.asarray(labelled_grid(picture, ["red heart"]))
    font = ImageFont.load_default(grid.FONT_SIZE)
    expected = Image.new("RGB", (sheet.shape[1], sheet.shape[0]), grid.PAPER)
    expected.paste(Image.fromarray(picture[0]), (grid.MARGIN, grid.MARGIN))
    ImageDraw.Draw(expected).text(
        (grid.MARGIN, grid.MARGIN + 144 + grid.MARGIN // 2), "red heart", fill=grid.INK, font=font
    )
    assert np.array_equal(sheet, np.asarray(expected))


def test_no_label_reaches_into_another_cell_for_500_random_labels() -> None:
    seed, count = 7, 500
    rng = np.random.default_rng(seed)
    font = ImageFont.load_default(grid.FONT_SIZE)
    for trial in range(count):
        words = [
            "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyzWM"), rng.integers(1, 30)))
            for _ in range(rng.integers(0, 25))
        ]
        lines = wrap(" ".join(words), font, grid.CELL_WIDTH)
        where = f"seed {seed}, trial {trial} of {count}: {words}"
        assert len(lines) <= grid.MAX_LINES, where
        assert all(font.getlength(line) <= grid.CELL_WIDTH for line in lines), where
        text = "".join(lines).replace(" ", "")
        if text.endswith("…"):
            assert "".join(words).startswith(text[:-1]), where
        else:
            assert text == "".join(words), f"{where}: letters were lost"


def test_a_row_is_as_high_as_its_own_longest_label() -> None:
    pictures = coloured(2, 144)
    short = labelled_grid(pictures, ["a", "b"], columns=1).height
    long = labelled_grid(pictures, ["a", "many words that need a second line"], columns=1).height
    longer = labelled_grid(pictures, ["many words that need a second line"] * 2, columns=1).height
    assert long - short == longer - long > 0


@pytest.mark.parametrize(
    ("pictures", "labels", "message"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), [], "1 at least"),
        (np.zeros((2, 4, 4, 3), np.uint8), ["a"], "2 pictures and 1 labels"),
        (np.zeros((1, 4, 4, 3), np.float32), ["a"], "float32"),
        (np.zeros((1, 3, 4, 4), np.uint8), ["a"], r"expected one shape \(H, W, 3\)"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)], ["a", "b"], "one shape"),
    ],
)
def test_what_is_no_set_of_pictures_is_refused(pictures: np.ndarray, labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labelled_grid(pictures, labels)


def test_a_png_carries_its_texts_in_latin_and_other_scripts(tmp_path) -> None:
    picture = coloured(1, 8)[0]
    texts = {"prompt": "ein grüner Apfel", "negative": "緑のリンゴ", "seed": "7"}
    save_png(picture, tmp_path / "new" / "a.png", texts)
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert {name: str(image.text[name]) for name in texts} == texts
        assert np.array_equal(np.asarray(image), picture)
    with pytest.raises(ValueError, match="ends in"):
        save_png(picture, tmp_path / "a.jpg")


def test_accented_labels_are_legible_in_the_font_that_pillow_brings() -> None:
    picture = coloured(1, 144)
    plain = np.asarray(labelled_grid(picture, ["grune pinata in Cote d'Ivoire"]))
    assert np.array_equal(np.asarray(labelled_grid(picture, ["grüne piñata in Côte d'Ivoire"])), plain)
