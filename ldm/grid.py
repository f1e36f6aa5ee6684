"""Labelled grids of pictures: what sampling, training and evaluation show to a person.

Enters: uint8 RGB pictures of any one size and a label for each. Leaves: one Pillow image with every label, wrapped,
under its picture; or a PNG file with its settings as text chunks.
"""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

CELL_WIDTH = 144
"""Pixels that a label needs to be read; narrower pictures are enlarged by a whole factor to at least this."""
FONT_SIZE = 15
MARGIN = 8
MAX_LINES = 6
PIXEL_ART = 48
"""Pictures narrower than this keep their pixels visible when enlarged; wider ones look better with Lanczos."""
INK, PAPER = (32, 32, 32), (255, 255, 255)


def labelled_grid(
    pictures: np.ndarray | Sequence[np.ndarray], labels: Sequence[str], *, columns: int | None = None
) -> Image.Image:
    """Sets pictures in rows, each with its label below; about as many columns as rows by default.

    Args:
        pictures: (N, H, W, 3) uint8, N at least 1; all of one size.
        labels: N texts; white space is collapsed, lines wrap at the picture's width, six lines at most.
        columns: pictures in a row.

    Raises:
        ValueError: no picture, another number of labels, or pictures that are not alike (H, W, 3) uint8.
    """
    pictures = [np.asarray(picture) for picture in pictures]
    if not pictures or len(pictures) != len(labels):
        raise ValueError(
            f"labelled_grid: found {len(pictures)} pictures and {len(labels)} labels, expected one for each, 1 at least"
        )
    shapes = {(*picture.shape, str(picture.dtype)) for picture in pictures}
    if len(shapes) > 1 or not _is_picture(pictures[0]):
        raise ValueError(f"labelled_grid: found pictures {sorted(shapes)}, expected one shape (H, W, 3), uint8")
    columns = min(len(pictures), columns or math.ceil(math.sqrt(len(pictures))))
    font = ImageFont.load_default(FONT_SIZE)
    enlarged = [enlarge(Image.fromarray(picture)) for picture in pictures]
    width, height = enlarged[0].size
    wrapped = [wrap(without_accents(label), font, width) for label in labels]
    line_height = math.ceil(sum(font.getmetrics())) if isinstance(font, ImageFont.FreeTypeFont) else FONT_SIZE
    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    # A row is as high as its longest label, so that short captions leave no empty bands.
    label_heights = [line_height * max(len(wrapped[i]) for i in row) for row in rows]
    sheet = Image.new(
        "RGB",
        (
            MARGIN + columns * (width + MARGIN),
            MARGIN + sum(height + 2 * MARGIN + label for label in label_heights),
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, label_height in zip(rows, label_heights, strict=True):
        for column, i in enumerate(row):
            left = MARGIN + column * (width + MARGIN)
            sheet.paste(enlarged[i], (left, top))
            for line, text in enumerate(wrapped[i]):
                draw.text((left, top + height + MARGIN // 2 + line * line_height), text, fill=INK, font=font)
        top += height + 2 * MARGIN + label_height
    return sheet


def enlarge(picture: Image.Image) -> Image.Image:
    """The picture, or, when it is narrower than a label needs, the picture enlarged by a whole factor."""
    factor = math.ceil(CELL_WIDTH / picture.width)
    if factor <= 1:
        return picture
    method = Image.Resampling.NEAREST if picture.width < PIXEL_ART else Image.Resampling.LANCZOS
    return picture.resize((picture.width * factor, picture.height * factor), method)


def without_accents(text: str) -> str:
    """The text with accented letters as plain ones: Pillow's own font has no others, and draws boxes for them."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of `text` at most `width` pixels wide; wider words are cut, lines past MAX_LINES become "…"."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1:
            cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    if line:
        lines.append(line)
    if len(lines) > MAX_LINES:
        lines = lines[:MAX_LINES]
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    return lines


def save_png(picture: np.ndarray | Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Writes a picture as PNG with `texts` as its text chunks: tEXt, or iTXt where Latin-1 does not reach.

    Raises:
        ValueError: an array that is not (H, W, 3) uint8, or a path that does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"save_png: found {path}, expected a name that ends in .png")
    if isinstance(picture, np.ndarray):
        if not _is_picture(picture):
            raise ValueError(f"save_png: found {picture.shape} {picture.dtype}, expected (H, W, 3) uint8")
        picture = Image.fromarray(picture)
    chunks = PngInfo()
    for name, text in (texts or {}).items():
        chunks.add_text(name, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, pnginfo=chunks)


def _is_picture(array: np.ndarray) -> bool:
    return array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
