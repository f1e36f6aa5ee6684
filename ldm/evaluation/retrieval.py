"""Retrieval: does the sample of a training caption lie nearest to that caption's picture?

Enters: a Pipeline and the raw shards that it was trained on. Leaves: `retrieval.json` (scores, settings, the rank of
each caption) and `retrieval.png` (each sample beside its nearest and its true picture).
Walk: read_pictures -> choose_captions -> generate -> retrieval -> write_report.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.manifest import Manifest
from ldm.data.members import decode_caption, decode_json
from ldm.data.order import permute
from ldm.data.pictures import decode_picture
from ldm.data.shards import DamagedSample, ShardReader
from ldm.grid import labelled_grid, save_png

SIDE = 32
"""Height and width at which pictures are compared."""
TOP = 5
CHUNK = 1024
"""Pictures handled at a time."""
COLUMNS = 12
"""Pictures in a row of the report's grid: four captions of three."""


@dataclass(frozen=True)
class Retrieval:
    """Outcome for N samples among M pictures."""

    ranks: list[int]
    """For each sample 1 + the number of pictures of other captions that are nearer than its caption's nearest one."""
    nearest: list[int]
    """For each sample the picture that is nearest."""
    true: list[int]
    """For each sample the nearest picture of its own caption."""

    @property
    def top_1(self) -> float:
        """Share of the samples whose nearest picture has their caption."""
        return sum(rank == 1 for rank in self.ranks) / len(self.ranks)

    @property
    def top_5(self) -> float:
        """Share of the samples with fewer than five pictures of other captions before their own."""
        return sum(rank <= TOP for rank in self.ranks) / len(self.ranks)


def retrieval(
    samples: np.ndarray,
    captions: Sequence[str],
    pictures: np.ndarray,
    picture_captions: Sequence[str | Collection[str]],
) -> Retrieval:
    """Ranks the pictures by their distance to each sample: mean squared difference of blurred 32x32 RGB.

    A caption that several pictures share is matched by each of them. A picture of another caption at exactly the same
    distance is not nearer: one picture under two names is no fault of the sample's.

    Args:
        samples: (N, H, W, 3) uint8, one of each caption.
        captions: N captions, each of which some picture has.
        pictures: (M, H', W', 3) uint8, all training pictures; 12 KB of memory each.
        picture_captions: of each picture its caption, or all of its captions.

    Raises:
        ValueError: counts that differ, no samples, or a caption that no picture has.
    """
    if not captions or len(samples) != len(captions) or len(pictures) != len(picture_captions):
        raise ValueError(
            f"retrieval: found {len(samples)} samples, {len(captions)} captions, {len(pictures)} pictures, "
            f"{len(picture_captions)} captions of pictures, expected a caption for each and a sample at least"
        )
    owned = [{names} if isinstance(names, str) else set(names) for names in picture_captions]
    of_samples, of_pictures = features(samples), features(pictures)  # (N, D), (M, D)
    ranks, nearest, true = [], [], []
    for sample, caption in zip(of_samples, captions, strict=True):
        right = torch.tensor([caption in names for names in owned])
        if not right.any():
            raise ValueError(f"retrieval: no picture has the caption {caption!r}")
        # The difference itself, in float64: |a|^2 + |b|^2 - 2ab, or float32, would round equal distances apart.
        parts = of_pictures.split(CHUNK)
        distance = torch.cat([(part - sample).double().square().mean(dim=1) for part in parts])  # (M,)
        own = distance.where(right, torch.inf)
        ranks.append(1 + int((distance[~right] < own.min()).sum()))
        nearest.append(int(distance.argmin()))
        true.append(int(own.argmin()))
    return Retrieval(ranks, nearest, true)


def features(pictures: np.ndarray) -> Tensor:
    """What is compared: (N, H, W, 3) uint8 to (N, 3 * 32 * 32) float32 in [0, 255], averaged to 32x32, then blurred.

    The blur is [1 2 1] / 4 along rows and columns, edges repeated: a shift of one pixel costs little.
    """
    chunks = []
    for start in range(0, len(pictures), CHUNK):
        x = torch.from_numpy(pictures[start : start + CHUNK]).permute(0, 3, 1, 2).float()
        x = torch.nn.functional.interpolate(x, (SIDE, SIDE), mode="area")
        x = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
        x = (x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4
        x = (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4
        chunks.append(x.flatten(1))
    return torch.cat(chunks)


def read_pictures(shards: Path, resolution: int) -> tuple[np.ndarray, list[list[str]], list[str]]:
    """All pictures of raw shards (M, resolution, resolution, 3) uint8, each one's captions, and what was passed over.

    Raises:
        FileNotFoundError, ManifestError: no usable manifest in the folder.
        ValueError: shards of latents, or not one usable sample.
    """
    manifest = Manifest.load(shards)
    if manifest.encoder is not None:
        raise ValueError(f"shards: {shards} holds latents, expected the raw shards that they were encoded from")
    reader = ShardReader(manifest)
    pictures, captions, passed_over = [], [], []
    places = [(shard, sample) for shard, count in enumerate(manifest.counts) for sample in range(count)]
    for shard, sample in tqdm(places, desc="reading pictures", unit="picture", dynamic_ncols=True):
        try:
            members = reader.members(shard, sample)
            found = captions_of(members)
            pixels = decode_picture(members, resolution).pixels
        except (DamagedSample, ValueError) as error:
            name = f"{manifest.shards[shard].name}/{manifest.index(shard).key(sample)}"
            passed_over.append(str(error) if isinstance(error, DamagedSample) else f"{name}: {error}")
            continue
        pictures.append(pixels)
        captions.append(found)
    reader.close()
    if not pictures:
        raise ValueError(f"shards: {shards} has not one picture with a caption; the first: {passed_over[:3]}")
    return np.stack(pictures), captions, passed_over


def captions_of(members: dict[str, bytes]) -> list[str]:
    """Every caption that training may draw for a raw sample; raises ValueError as `decode_caption`."""
    listed = decode_json(members).get("captions")
    count = len(listed) if isinstance(listed, list) and listed else 1
    return list(dict.fromkeys(decode_caption(members, (i + 0.5) / count) for i in range(count)))


def choose_captions(captions: Sequence[Sequence[str]], count: int, seed: int) -> list[str]:
    """`count` different captions (all, if fewer), each the first of a picture: a function of their set and the seed."""
    different = sorted({names[0] for names in captions})
    return [different[permute(i, len(different), seed)] for i in range(min(count, len(different)))]


def write_report(
    out: Path,
    outcome: Retrieval,
    samples: np.ndarray,
    captions: Sequence[str],
    pictures: np.ndarray,
    picture_captions: Sequence[Sequence[str]],
    settings: dict[str, Any],
) -> None:
    """Writes `retrieval.json` and `retrieval.png` into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"caption": caption, "rank": rank, "nearest": picture_captions[nearest][0]}
        for caption, rank, nearest in zip(captions, outcome.ranks, outcome.nearest, strict=True)
    ]
    report = {"top_1": outcome.top_1, "top_5": outcome.top_5, "settings": settings, "captions": rows}
    (out / "retrieval.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shown, labels = [], []
    for i, row in enumerate(rows):
        shown += [samples[i], pictures[outcome.nearest[i]], pictures[outcome.true[i]]]
        labels += [f"{row['caption']} (rank {row['rank']})", f"nearest: {row['nearest']}", "true"]
    texts = {
        "checkpoint": str(settings["checkpoint"]),
        "top_1": f"{outcome.top_1:.4f}",
        "top_5": f"{outcome.top_5:.4f}",
    }
    save_png(labelled_grid(shown, labels, columns=COLUMNS), out / "retrieval.png", texts)
