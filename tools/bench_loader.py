"""Measures reading against stock webdataset on the same tars, and the first batch after a resume at 10^8 samples.

In: nothing, or a folder of encoded shards with their manifest.
Out: a table on standard output, and records of it as JSON with versions and machine (`--json FILE`).
"""

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_record import Record, about, compared, write_records

from ldm.data.data_config import DataConfig
from ldm.data.dataset import SampleDataset
from ldm.data.loader import make_loader
from ldm.data.manifest import Manifest
from ldm.data.positions import Positions
from ldm.data.samples import Draws
from ldm.data.shard_index import index_path
from ldm.data.shard_list import ShardEntry
from ldm.data.shards import write_shards

SHAPES = ((8, 16, 16), (8, 32, 32))  # moments of 128 x 128 and of 256 x 256 pictures at f = 8
FACTOR = 8
RESUME_SHARDS, RESUME_SAMPLES = 10_000, 10_000  # 10^8 samples
SEED = 7
NO_DRAWS = Draws(place=(0.5, 0.5), flip=False, caption=0.0, dropped=False, u=0.0)


class Content(NamedTuple):
    """What both readers deliver for a batch."""

    keys: list[str]
    captions: list[str]
    sizes: torch.Tensor  # (B, 4) float32, height, width, top, left
    moments: torch.Tensor  # (B, 2C, h, w) float16, as stored


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools/bench_loader.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=Path, help="folder of encoded shards to read; otherwise some are made")
    parser.add_argument("--count", type=int, default=8, help="shards that are made")
    parser.add_argument("--samples", type=int, default=2000, help="samples in each")
    parser.add_argument("--batch", type=int, default=256, help="samples of a batch")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, of which median and range are told")
    parser.add_argument("--seconds", type=float, default=1.0, help="least processor time of each way in each round")
    parser.add_argument("--resumes", type=int, default=10, help="random positions to resume at; 0 leaves this part out")
    parser.add_argument("--scratch", type=Path, help="where shards are made; otherwise the system's temporary folder")
    parser.add_argument("--json", type=Path, help="file for the records")
    parser.add_argument("--first-batch", nargs=2, metavar=("FOLDER", "POSITION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_batch:
        print(json.dumps(first_batch(Path(options.first_batch[0]), int(options.first_batch[1]))))
        return 0
    torch.set_num_threads(1)
    results: dict[str, Any] = {"about": machine(), "batch": options.batch, "rounds": options.rounds}
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="bench-loader-") as scratch:
        if options.shards is not None:
            folders = [options.shards]
        else:
            folders = [make_shards(Path(scratch) / str(s[1]), s, options.count, options.samples) for s in SHAPES]
        results["reading"] = [compare(folder, options.batch, options.rounds, options.seconds) for folder in folders]
        if options.resumes:
            results["resume"] = resumes(Path(scratch) / "resume", options.resumes)
    print(table(results))
    if options.json is not None:
        write_records(options.json, records(results), results["about"])
    return 0


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    return about("cpu") | {name: version(name) for name in ("webdataset", "xxhash")}


def make_shards(folder: Path, shape: tuple[int, int, int], count: int, samples: int) -> Path:
    """Encoded shards as tools/encode_latents.py makes them out of img2dataset's: moments, caption, note."""
    rng = np.random.default_rng(SEED)
    pixels = FACTOR * shape[1]

    def each() -> Iterator[dict[str, Any]]:
        for number in range(count * samples):
            height, width = rng.integers(pixels, 2000, 2).tolist()
            yield {
                "__key__": f"{number:09d}",
                "moments.npy": rng.standard_normal(shape, dtype=np.float32).astype(np.float16),
                "txt": f"A photograph of object {number} on a wooden table, soft light, caf\u00e9 in the background",
                "json": {
                    "url": f"https://images.example.org/{number % 97}/{number}.jpg?w={width}",
                    "key": f"{number:09d}",
                    "status": "success",
                    "error_message": None,
                    "width": pixels,
                    "height": pixels,
                    "original_width": width,
                    "original_height": height,
                    "exif": '{"Image Orientation": "Horizontal (normal)"}',
                    "sha256": f"{number:064x}",
                    "size": [height, width],
                    "crop": [0, number % 50],
                },
            }

    identity = {"weights": "none", "dtype": "float16"}
    write_shards(each(), folder, prefix="shard", samples_per_shard=samples, encoder=identity)
    return folder


def stock(tars: list[str], batch: int) -> Iterator[Content]:
    """The stock pipeline, as webdataset's documentation builds it: decode, to_tuple, batched; in file order."""
    import webdataset

    def collate(samples: list[tuple]) -> Content:
        keys, moments, captions, notes = zip(*samples, strict=True)
        return Content(
            list(keys),
            list(captions),
            torch.tensor([(*note["size"], *note["crop"]) for note in notes], dtype=torch.float32),
            torch.from_numpy(np.stack(moments)),
        )

    data = webdataset.WebDataset(tars, shardshuffle=False).decode().to_tuple("__key__", "moments.npy", "txt", "json")
    return iter(data.batched(batch, collation_fn=collate))


def undecoded(tars: list[str]) -> Iterator[None]:
    """Stock webdataset without any decoding: the members' bytes alone, sample by sample."""
    import webdataset

    for _ in webdataset.WebDataset(tars, shardshuffle=False):
        yield None


def ours(dataset: SampleDataset, batch: int) -> Iterator[Content]:
    """The same by our reader, checksums compared: stages 2, 3 and 5 of ldm/data/loader.py."""
    for first in range(0, len(dataset), batch):
        positions = range(first, min(first + batch, len(dataset)))
        contents, quarantined = dataset.read(positions, [NO_DRAWS] * len(positions))
        assert not quarantined
        assert contents.moments is not None
        yield Content(contents.keys, contents.captions, contents.sizes[:, :4], contents.moments)


def full(dataset: SampleDataset, batch: int) -> Iterator[None]:
    """Training batches, with timesteps, dropout and both noises."""
    for first in range(0, len(dataset), batch):
        dataset.__getitems__(range(first, min(first + batch, len(dataset))))
        yield None


def compare(folder: Path, batch: int, rounds: int, least: float) -> dict[str, Any]:
    """Samples per second of each way over all shards, in rounds that take turns; ratios of each round."""
    manifest = Manifest.load(folder)
    tars = [str(manifest.path(shard)) for shard in range(len(manifest.shards))]
    first = next(stock(tars, 1)).moments[0]
    latent = (len(first) // 2, *first.shape[1:])
    config = DataConfig(shards=str(folder), resolution=FACTOR * latent[1], caption_dropout=0.1, workers=0)
    in_order = SampleDataset(config, manifest, SEED, latent_shape=latent, shuffle=False)
    shuffled = SampleDataset(config, manifest, SEED, latent_shape=latent)
    check_equal(tars, in_order, shuffled, batch)  # and all files are in the page cache now
    gc.freeze()  # as in a loader's worker; for all ways alike
    ways: dict[str, Callable[[], Iterator[Any]]] = {
        "stock": lambda: stock(tars, batch),
        "file order": lambda: ours(in_order, batch),
        "shuffled": lambda: ours(shuffled, batch),
        "undecoded": lambda: undecoded(tars),
        "full": lambda: full(shuffled, batch),
    }
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in sorted(ways, key=lambda way: random.Random(f"{number} {way}").random()):
            seconds[way].append(timed(ways[way], least))
    total = len(in_order)
    found: dict[str, Any] = {"moments": list(first.shape), "shards": len(tars), "samples": total, "rates": {}}
    for kind, label in enumerate(("wall", "cpu")):
        rates = {way: [total / one[kind] for one in each] for way, each in seconds.items()}
        found[label] = {way: spread(each) for way, each in rates.items()}
        found["rates"][label] = rates
        for way in ("file order", "shuffled"):
            for base in ("stock", "undecoded"):
                ratios = [a / b for a, b in zip(rates[way], rates[base], strict=True)]
                found[label][f"{way} / {base}"] = spread(ratios)
    return found


def check_equal(tars: list[str], in_order: SampleDataset, shuffled: SampleDataset, batch: int) -> None:
    """Raises ValueError where the readers differ in a sample or in a single value."""
    theirs = {}
    for number, (other, own) in enumerate(zip(stock(tars, batch), ours(in_order, batch), strict=True)):
        keys = [key.split("/", 1)[1] for key in own.keys]
        same = keys == other.keys and own.captions == other.captions
        if not (same and torch.equal(own.sizes, other.sizes) and torch.equal(own.moments, other.moments)):
            raise ValueError(f"batch {number}: webdataset and ldm read different samples")
        for row, key in enumerate(own.keys):
            theirs[key] = (own.captions[row], own.sizes[row].tolist(), hash(own.moments[row].numpy().tobytes()))
    for own in ours(shuffled, batch):
        for row, key in enumerate(own.keys):
            found = (own.captions[row], own.sizes[row].tolist(), hash(own.moments[row].numpy().tobytes()))
            if theirs.pop(key, None) != found:
                raise ValueError(f"{key}: read differently, or twice, in the shuffled order")
    if theirs:
        raise ValueError(f"{len(theirs)} samples are missing in the shuffled order")


def timed(way: Callable[[], Iterator[Any]], least: float) -> tuple[float, float]:
    """Seconds of the clock and of the processor for one pass, out of as many as take `least` seconds, one at least."""
    gc.collect()
    wall, cpu, passes = time.perf_counter(), time.process_time(), 0
    while passes == 0 or time.process_time() - cpu < least:
        for _ in way():
            pass
        passes += 1
    return (time.perf_counter() - wall) / passes, (time.process_time() - cpu) / passes


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def resumes(folder: Path, count: int) -> dict[str, Any]:
    """First batches at random positions of a manifest of 10^8 samples, each in a fresh process.

    10,000 shards of 10,000 samples: tars and indexes are hard links to those of two shards, under names of their own.
    Manifest, indexes and tars are read as any others would be; that the bytes behind most names are the same ones only
    means that they are in the page cache.
    """
    make_shards(folder, SHAPES[0], 2, RESUME_SAMPLES)
    real = Manifest.load(folder)
    entries = []
    for number in range(RESUME_SHARDS):
        entry = real.shards[number % 2]
        name = f"s-{number:06d}.tar"
        os.link(real.path(number % 2), folder / name)
        os.link(index_path(real.path(number % 2)), index_path(folder / name))
        entries.append(ShardEntry(name, entry.bytes, entry.samples, entry.index_xxh3, (), entry.tar_xxh3))
    Manifest(folder, entries, real.encoder).save()
    rng = random.Random(SEED)
    found = []
    for _ in range(count):
        position = rng.randrange(3 * RESUME_SHARDS * RESUME_SAMPLES)
        command = [sys.executable, __file__, "--first-batch", str(folder), str(position)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        found.append(json.loads(done.stdout))
    return {
        "samples": RESUME_SHARDS * RESUME_SAMPLES,
        "positions": count,
        **{name: spread([one[name] for one in found]) for name in found[0] if name != "position"},
    }


def first_batch(folder: Path, position: int) -> dict[str, float]:
    """Seconds from loading the manifest to the first batch of 256, and the process's largest memory."""
    torch.set_num_threads(1)
    imports = peak_mb()
    started, cpu = time.perf_counter(), time.process_time()
    manifest = Manifest.load(folder)
    manifest.digest()
    config = DataConfig(shards=str(folder), resolution=FACTOR * SHAPES[0][1], workers=0)
    channels, height, width = SHAPES[0]
    step = position // 256
    loader = make_loader(
        config,
        manifest,
        SEED,
        Positions(rank=0, world=1, micro_batch=256, accumulation=1, start_step=step, stop_step=step + 2),
        latent_shape=(channels // 2, height, width),
    )
    batch = next(iter(loader))
    assert batch.positions[0] == step * 256
    assert not batch.quarantined
    return {
        "position": position,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "imports_mb": imports,
        "above_imports_mb": peak_mb() - imports,
        "peak_mb": peak_mb(),
    }


def peak_mb() -> float:
    """Largest resident memory of this program so far, in 10^6 bytes; `ru_maxrss` would count what started it too."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def records(results: dict[str, Any]) -> list[Record]:
    """Rates by the clock as records, with those by the processor's time, and the resumes with each."""
    made = []
    for one in results["reading"]:
        wall, cpu = one["rates"]["wall"], one["rates"]["cpu"]
        extra = {name: one[name] for name in ("moments", "shards", "samples")} | {"batch": results["batch"]}
        for way in ("file order", "shuffled"):
            for base, whose in (("stock", "webdataset, decoded"), ("undecoded", "webdataset, bytes alone")):
                more = extra | {"cpu_ratio": one["cpu"][f"{way} / {base}"], "resume": results.get("resume")}
                more |= {"cpu_ours": spread(cpu[way]), "cpu_peer": spread(cpu[base]), "full": one["wall"]["full"]}
                name = f"reading, moments {tuple(one['moments'])}, {way}"
                made.append(compared(name, wall[way], wall[base], whose, "samples/s", 0.0, **more))
    return made


def table(results: dict[str, Any]) -> str:
    about = results["about"]
    lines = [
        f"{about['processor']}, {about['cores']} cores, load {about['load']:.1f}; Python {about['python']}, torch "
        f"{about['torch']}, NumPy {about['numpy']}, webdataset {about['webdataset']}; one process and thread, batches "
        f"of {results['batch']}, files in the page cache, median (range) of {results['rounds']} rounds",
    ]
    for one in results["reading"]:
        lines += [
            "",
            f"moments {one['moments']} float16, {one['samples']:,} samples in {one['shards']} shards",
            "",
            "| samples per second | wall clock | processor time |",
            "|---|---|---|",
        ]
        names = {
            "stock": "webdataset, decoded",
            "undecoded": "webdataset, bytes alone",
            "file order": "ldm, decoded, checksums, file order",
            "shuffled": "ldm, decoded, checksums, shuffled",
            "full": "ldm, training batches with all draws",
        }
        for way, name in names.items():
            lines.append(f"| {name} | {_rate(one['wall'][way])} | {_rate(one['cpu'][way])} |")
        for way in ("file order", "shuffled"):
            for base, name in (("stock", "decoded"), ("undecoded", "bytes alone")):
                ratio = f"{way} / {base}"
                lines.append(
                    f"| {way} : webdataset, {name} | **{_ratio(one['wall'][ratio])}** | {_ratio(one['cpu'][ratio])} |"
                )
    if "resume" in results:
        one = results["resume"]
        lines += [
            "",
            f"first batch of 256 after a resume at {one['positions']} random positions of {one['samples']:,} samples: "
            f"{_plain(one['seconds'], 3)} s (processor {_plain(one['cpu_seconds'], 3)} s), memory "
            f"{_plain(one['peak_mb'], 0)} MB, of which imports {_plain(one['imports_mb'], 0)} MB",
        ]
    return "\n".join(lines)


def _rate(one: dict[str, float]) -> str:
    return f"{one['median']:,.0f} ({one['lowest']:,.0f} - {one['highest']:,.0f})"


def _ratio(one: dict[str, float]) -> str:
    return f"{one['median']:.1f}x ({one['lowest']:.1f} - {one['highest']:.1f})"


def _plain(one: dict[str, float], digits: int) -> str:
    return f"{one['median']:.{digits}f} ({one['lowest']:.{digits}f} - {one['highest']:.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
