"""Tars as others write them, for tests of what reads them: plain tarfile, no torch.

In: names and bytes of members.
Out: a tar.
"""

import io
import random
import tarfile
from pathlib import Path

Member = tuple[str, bytes]


def add(tar: tarfile.TarFile, name: str, data: bytes, **fields: object) -> None:
    """Adds a member with the given header fields."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path: Path, members: list[Member]) -> Path:
    """Writes a tar."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def three_members(count: int, seed: int = 0) -> list[Member]:
    """Members of `count` samples: json, png and txt of 1 to 1,499 random bytes."""
    rng = random.Random(seed)
    return [
        (f"{number:04d}.{extension}", rng.randbytes(rng.randrange(1, 1500)))
        for number in range(count)
        for extension in ("json", "png", "txt")
    ]
