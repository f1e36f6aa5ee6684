"""What sample.py leaves in a picture's file: pixels and texts; and the program, called in this process."""

from pathlib import Path

import numpy as np
from PIL import Image

from ldm.sample import main


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def texts(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        return {name: str(text) for name, text in image.text.items()}  # type: ignore[attr-defined]


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0
