"""Writes the manifest of WebDataset shards in a folder or at a URL, or compares shards with the manifest they have.

In: tars, as webdataset, img2dataset or tools/make_shards.py write them; they are only read, each once.
Out: one index a shard and manifest.json, beside them or in --out; with --verify, a line for each sample that differs.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ldm.data.cache import ShardCache
from ldm.data.indexing import Comparison, compare_stream
from ldm.data.manifest import Manifest, build_manifest
from ldm.data.remote_index import compare_url, in_threads
from ldm.data.storage import DEFAULT_RETRIES, is_url


def verify(manifest: Manifest) -> int:
    """Reads every shard and compares it with its index; prints what differs; returns the number of differences."""
    manifest.check_files()
    samples = shards = 0
    with tqdm(total=sum(manifest.counts), desc="verifying", unit="sample") as bar:
        for shard, comparison in enumerate(_comparisons(manifest)):
            entry = manifest.shards[shard]
            for sample, reason in comparison.samples:
                bar.write(f"{entry.name}/{manifest.index(shard).key(sample)}: {reason}", file=sys.stdout)
            if comparison.xxh3 != entry.tar_xxh3 and not comparison.samples:
                bar.write(
                    f"{entry.name}: all samples are as indexed, but not the bytes around them: found "
                    f"{comparison.tar_bytes:,} bytes with xxh3 {comparison.xxh3}, expected {entry.bytes:,} with "
                    f"{entry.tar_xxh3}",
                    file=sys.stdout,
                )
            samples += len(comparison.samples)
            shards += comparison.xxh3 != entry.tar_xxh3
            bar.update(entry.samples)
    print(
        f"{sum(manifest.counts):,} samples in {len(manifest.shards):,} shards read, {samples:,} differ"
        + (f", in {shards:,} changed shards" if shards else "")
    )
    return max(samples, shards)


def _comparisons(manifest: Manifest) -> Iterator[Comparison]:
    """Each shard against its index, in order."""
    if manifest.remote:
        # The indexes are read in this thread: a manifest keeps the last ones, and is not made for several threads.
        calls = ((manifest.url(shard), manifest.index(shard)) for shard in range(len(manifest.shards)))
        yield from in_threads(lambda call: compare_url(*call, DEFAULT_RETRIES), calls)
        return
    for shard in range(len(manifest.shards)):
        with open(manifest.path(shard), "rb", buffering=1 << 20) as file:
            yield compare_stream(file, manifest.index(shard))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Exit code: 0; 1 where damage was found or samples differ; 2 for shards that cannot be indexed.",
    )
    parser.add_argument(
        "shards",
        help="folder of .tar shards; or a URL: of a folder that can be listed (s3://bucket/folder), or with braces "
        "(https://host/folder/{00000..00099}.tar)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="local folder for the manifest, where one cannot write beside the shards; data.shards then names this one",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every sample and compare it with the manifest, which is left as it is; without this, the manifest "
        "is written, and shards that have an index newer than they are (at a URL: of their size) are not read again",
    )
    options = parser.parse_args(arguments)
    try:
        if options.verify:
            with tempfile.TemporaryDirectory() as folder:
                where = options.shards if options.out is None else options.out
                cache = ShardCache(folder, 1.0) if is_url(where) else None  # of indexes: shards are streamed
                return 1 if verify(Manifest.load(where, cache)) else 0
        manifest = build_manifest(options.shards, out=options.out)
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
