"""Tiny tars without a manifest, the batches that the real stream loader makes of them, and what each row has to be."""

import io
import itertools
import json
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_shards import positions_of

from ldm.data.batch import Batch
from ldm.data.data_config import DataConfig
from ldm.data.draws import Purpose, generator
from ldm.data.streaming import StreamConfig, make_stream_loader

LATENT = (2, 4, 4)
SHARDS, SAMPLES = 6, 30


def npy(array: np.ndarray) -> bytes:
    stored = io.BytesIO()
    np.save(stored, array)
    return stored.getvalue()


def pixels_of(shard: int, number: int) -> np.ndarray:
    """8 high and 12 wide: at a resolution of 8 nothing is resized."""
    return np.random.default_rng([shard, number]).integers(0, 255, (8, 12, 3), dtype=np.uint8)


def raw_sample(shard: int, number: int) -> dict[str, bytes]:
    png = io.BytesIO()
    Image.fromarray(pixels_of(shard, number)).save(png, "PNG")
    captions = [f"{word} {shard} {number}" for word in ("one", "two", "three")]
    return {"png": png.getvalue(), "txt": captions[0].encode(), "json": json.dumps({"captions": captions}).encode()}


def encoded_sample(shard: int, number: int) -> dict[str, bytes]:
    rng = np.random.default_rng([shard, number])
    return {
        "moments.npy": npy(rng.standard_normal((4, 4, 4)).astype(np.float16)),
        "flipped.npy": npy(rng.standard_normal((4, 4, 4)).astype(np.float16)),
        "text.npy": npy(rng.standard_normal((3, 5)).astype(np.float32)),
        "txt": f"caption {shard} {number}".encode(),
        "json": json.dumps({"size": [100 + shard, 200 + number], "crop": [shard, number]}).encode(),
    }


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A tar as Python's own module writes it; returns its path."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_tars(
    folder: Path, make: Callable[[int, int], dict[str, bytes]], shards: int = SHARDS, samples: int = SAMPLES
) -> Path:
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        write_tar(folder / f"s-{shard}.tar", {f"k{number:02d}": make(shard, number) for number in range(samples)})
    return folder


def config(**changes: Any) -> DataConfig:
    return DataConfig(**{"shards": "unused", "resolution": 8, "workers": 0} | changes)


def stream(*urls: str | Path, **changes: Any) -> StreamConfig:
    return StreamConfig(**{"urls": list(map(str, urls)), "shuffle_buffer": 20} | changes)


def all_of(folder: Path | str) -> str:
    return f"{folder}/s-{{0..{SHARDS - 1}}}.tar"


def loader_of(
    source: StreamConfig,
    settings: DataConfig | None = None,
    seed: int = 3,
    *,
    context: str | None = None,
    text_shape: tuple[int, int] | None = None,
    pooled_size: int | None = None,
    **changes: int,
) -> torch.utils.data.DataLoader[Batch]:
    known = {"latent_shape": LATENT, "text_shape": text_shape, "pooled_size": pooled_size}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "data.stream: the samples are encoded")
        return make_stream_loader(settings or config(), source, seed, positions_of(**changes), context=context, **known)


def keys_of(batches: Any) -> list[str]:
    return list(itertools.chain(*(batch.keys for batch in batches)))


def values(batches: list[Batch]) -> list[dict[str, Any]]:
    """Batches as what can be compared."""
    return [
        {name: one.tolist() if isinstance(one, torch.Tensor) else one for name, one in vars(batch).items()}
        for batch in batches
    ]


def number_of(name: str) -> tuple[int, int]:
    """Shard and number out of "s-3.tar/k07"."""
    return int(name[2]), int(name[-2:])


def check_row(batch: Batch, row: int, position: int, seed: int, settings: DataConfig) -> None:
    """The row's draws are those of the generator at the position, its contents those of the sample it names."""
    assert batch.positions[row] == position
    shard, number = number_of(batch.keys[row])
    flip = generator(seed, Purpose.FLIP, position).random() < settings.flip
    assert batch.u[row] == generator(seed, Purpose.TIMESTEP, position).random()
    assert bool(batch.dropped[row]) == (generator(seed, Purpose.DROPOUT, position).random() < settings.caption_dropout)
    for tensor, purpose in ((batch.noise, Purpose.NOISE), (batch.posterior_noise, Purpose.POSTERIOR)):
        drawn = generator(seed, purpose, position).standard_normal(LATENT, dtype=np.float32)
        np.testing.assert_array_equal(tensor[row], drawn)
    if batch.moments is not None:
        sample = encoded_sample(shard, number)
        stored = np.load(io.BytesIO(sample["flipped.npy" if flip else "moments.npy"]))
        np.testing.assert_array_equal(batch.moments[row], stored)
        assert batch.text_states is not None
        np.testing.assert_array_equal(batch.text_states[row], np.load(io.BytesIO(sample["text.npy"])))
        assert batch.captions[row] == sample["txt"].decode()
        assert batch.sizes[row].tolist() == [100 + shard, 200 + number, shard, number, 8, 8]
        return
    captions = json.loads(raw_sample(shard, number)["json"])["captions"]
    assert batch.captions[row] == captions[int(generator(seed, Purpose.CAPTION, position).random() * 3)]
    left = 2
    if settings.crop == "random":
        left = int(generator(seed, Purpose.CROP, position).random(2)[1] * 5)
    part = pixels_of(shard, number)[:, left : left + 8]
    expected = torch.from_numpy((part[:, ::-1] if flip else part).copy()).permute(2, 0, 1).float() / 127.5 - 1
    assert batch.images is not None
    torch.testing.assert_close(batch.images[row], expected, rtol=0, atol=1e-6)
    assert batch.sizes[row].tolist() == [8, 12, 0, 4 - left if flip else left, 8, 8]
