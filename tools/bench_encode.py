"""Measures encoding raw shards against the autoencoder alone: diffusers' AutoencoderKL on tensors in memory.

In: nothing, or an autoencoder. Out: a line for each peer, and the same as JSON (`--json FILE`): pictures per second
from raw shards to encoded shards with their manifest, as tools/encode_latents.py does it, decoding, hashing, writing
and the start of the workers counted; against the same pictures in the same batches through the network and no more.
"""

import argparse
import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_record import Record, add_options, begin, compared, interleaved, line, write_records
from encode_latents import encode_folder
from PIL import Image
from synthetic_run import make_text_encoder
from torch import Tensor

from ldm.config import RunConfig, parse_config
from ldm.data.manifest import Manifest
from ldm.data.members import MOMENTS
from ldm.data.pictures import normalize
from ldm.data.shards import write_shards
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.text_conditioner import TextConditioner

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
SD_CHANNELS = [128, 256, 512, 512]
STORED_LIMIT = 2e-3
"""Largest difference of a stored moment relative to the largest: float16 has 11 bits."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools/bench_encode.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--autoencoder", default="package:ldm/pretrained/emoji-f4", help="the demo's; or a folder")
    parser.add_argument("--channels", type=int, help="a random one of SD's shape instead, 128 its size")
    parser.add_argument("--resolution", type=int, default=64, help="side of the pictures (64)")
    parser.add_argument("--samples", type=int, default=1024, help="pictures (1024)")
    parser.add_argument("--batch", type=int, default=32, help="pictures that are encoded at once (32)")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode (1, encoding.workers' default)")
    parser.add_argument("--format", choices=["png", "jpg"], default="png", help="of the raw pictures")
    add_options(parser, rounds=5)
    options = parser.parse_args(arguments)
    device, found = begin(options)
    with tempfile.TemporaryDirectory(prefix="bench-encode-") as scratch:
        records = compare(Path(scratch), options, device)
    print("\n".join(map(line, records)))
    if options.json is not None:
        write_records(options.json, records, found)
    return 0


def compare(scratch: Path, options: argparse.Namespace, device: torch.device) -> list[Record]:
    """Records against diffusers' autoencoder, and against ours alone.

    Raises:
        ValueError: what is stored is not what diffusers' autoencoder gives for the pictures.
    """
    from diffusers import AutoencoderKL as Theirs

    autoencoder = (
        AutoencoderKL.from_pretrained(options.autoencoder) if options.channels is None else sd_shaped(options.channels)
    )
    autoencoder.save_pretrained(scratch / "vae")
    make_text_encoder(scratch / "text", 384, 16)
    raw = make_pictures(scratch / "raw", options.samples, options.resolution, options.format)
    config = run_config(scratch, options)
    autoencoder = AutoencoderKL.from_pretrained(str(scratch / "vae")).eval().to(device)
    text_encoder = TextConditioner.load([config.text_encoder], device)
    theirs: Any = Theirs.from_pretrained(scratch / "vae").eval().to(device)
    batches = list(normalize(raw).to(device).split(options.batch))
    out = scratch / "encoded"

    def from_shards() -> None:
        shutil.rmtree(out, ignore_errors=True)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # the bar
            encode_folder(scratch / "raw", out, config, device, autoencoder, text_encoder)

    from_shards()
    difference = check_stored(out, lambda images: theirs.encode(images).latent_dist.parameters, batches)
    ways: dict[str, Callable[[], None]] = {
        "shards": from_shards,
        "theirs": lambda: bare(lambda images: theirs.encode(images).latent_dist.parameters, batches),
        "ours": lambda: bare(autoencoder.encode, batches),
    }
    taken = interleaved(ways, options.rounds, device)
    rates = {name: [options.samples / one for one in each] for name, each in taken.items()}
    kind = "the demo's autoencoder" if options.channels is None else f"autoencoder of SD's shape, {options.channels}"
    name = f"encoding, {kind}, {options.resolution}x{options.resolution} {options.format}, batch {options.batch}"
    extra = {"samples": options.samples, "workers": options.workers}
    return [
        compared(name, rates["shards"], rates[way], whose, "pictures/s", difference, **extra)
        for way, whose in (("theirs", "diffusers' bare VAE"), ("ours", "our bare VAE"))
    ]


def run_config(scratch: Path, options: argparse.Namespace) -> RunConfig:
    """The demo's config with these folders and sizes."""
    return parse_config(
        [
            f"--config={CONFIG}",
            f"--autoencoder={scratch / 'vae'}",
            f"--text_encoder.source={scratch / 'text'}",
            f"--encoding.shards={scratch / 'raw'}",
            "--encoding.text_states=false",
            f"--encoding.batch_size={options.batch}",
            f"--encoding.workers={options.workers}",
            f"--data.shards={scratch / 'encoded'}",
            f"--data.resolution={options.resolution}",
            "--unet.sample_size=null",
            "--previews.every=0",
        ],
        prog="tools/bench_encode.py",
        description="",
    )


def sd_shaped(channels: int) -> AutoencoderKL:
    """A random autoencoder of Stable Diffusion's shape with so many channels in the first level."""
    levels = [channels * one // SD_CHANNELS[0] for one in SD_CHANNELS]
    config = AutoencoderConfig(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=levels,
        layers_per_block=2,
        sample_size=512,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(config)


def make_pictures(folder: Path, count: int, side: int, extension: str) -> np.ndarray:
    """Raw shards of smooth random pictures; returns the pixels that a reader finds, (N, side, side, 3) uint8."""
    rng, pixels = np.random.default_rng(7), np.empty((count, side, side, 3), dtype=np.uint8)

    def each() -> Iterator[dict[str, Any]]:
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            picture = coarse.resize((side, side), Image.Resampling.BICUBIC)
            picture.save(buffer, "PNG" if extension == "png" else "JPEG")
            pixels[number] = np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))
            yield {"__key__": f"{number:09d}", extension: buffer.getvalue(), "txt": f"picture {number}"}

    write_shards(each(), folder, prefix="shard", samples_per_shard=max(1, count // 4))
    return pixels


@torch.inference_mode()
def bare(encode: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> None:
    """The network alone; the moments come to the host, where nobody looks at them."""
    for images in batches:
        encode(images).cpu()


@torch.inference_mode()
def check_stored(out: Path, encode: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> float:
    """Largest difference of what the shards hold from `encode`'s moments, relative to the largest of these.

    Raises:
        ValueError: a sample is missing, or the difference is more than storing in float16 explains.
    """
    from ldm.data.shards import ShardReader

    manifest = Manifest.load(out)
    reader = ShardReader(manifest)
    stored = [
        np.load(io.BytesIO(bytes(reader.members(shard, sample)[MOMENTS])))
        for shard, samples in enumerate(manifest.counts)
        for sample in range(samples)
    ]
    expected = torch.cat([encode(images).cpu() for images in batches])
    if len(stored) != len(expected):
        raise ValueError(f"encoded shards hold {len(stored)} samples of {len(expected)}")
    found = torch.from_numpy(np.stack(stored)).float()
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= STORED_LIMIT:
        raise ValueError(
            f"stored moments differ from those of diffusers' autoencoder by {difference:.2g} relative, allowed is "
            f"{STORED_LIMIT:g}: rates would compare different things"
        )
    return difference


if __name__ == "__main__":
    sys.exit(main())
