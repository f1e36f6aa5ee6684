"""Writes the manifest of a folder of WebDataset shards, or compares the shards with the manifest that they have.

In: a folder of tars, as webdataset, img2dataset or tools/make_shards.py write them; they are only read.
Out: one index a shard and manifest.json beside them; with --verify, a line for each sample that differs.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from ldm.data.manifest import Manifest, build_manifest
from ldm.data.shards import DamagedSample, ShardReader


def verify(folder: Path) -> int:
    """Reads every sample and compares its checksums; prints what differs; returns the number of differing samples."""
    manifest = Manifest.load(folder)
    manifest.check_files()
    reader = ShardReader(manifest)
    differing = 0
    with tqdm(total=sum(manifest.counts), desc="verifying", unit="sample") as bar:
        for shard, count in enumerate(manifest.counts):
            for sample in range(count):
                try:
                    reader.members(shard, sample)
                except DamagedSample as damaged:
                    differing += 1
                    bar.write(str(damaged), file=sys.stdout)
                bar.update()
    print(f"{sum(manifest.counts):,} samples in {len(manifest.shards):,} shards read, {differing:,} differ")
    return differing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Exit code: 0; 1 where damage was found or samples differ; 2 for a folder that cannot be indexed.",
    )
    parser.add_argument("folder", type=Path, help="folder of .tar shards")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every sample and compare it with the manifest, which is left as it is; without this, the manifest "
        "is written, and shards that are older than their index are not read again",
    )
    options = parser.parse_args(arguments)
    try:
        if options.verify:
            return 1 if verify(options.folder) else 0
        manifest = build_manifest(options.folder)
    except (OSError, ValueError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    damaged = manifest.damaged()
    for record in damaged:
        print(f"{record.shard}: {record.reason}" + (f" (sample {record.key})" if record.key else ""))
    print(f"{sum(manifest.counts):,} samples in {len(manifest.shards):,} shards, {len(damaged):,} places damaged")
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
