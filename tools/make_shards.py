"""Packs pictures and captions into WebDataset shards with their manifest.

In: a folder of pictures with a .txt caption beside each, or a CSV, JSONL or Parquet table of image paths and captions.
Out: shards of KEY.png|jpg|webp, KEY.txt, KEY.json, their manifest, and rejected.jsonl, a line for each one left out.
"""

import argparse
import csv
import heapq
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from ldm.data.pictures import RAW_EXTENSIONS, open_picture, resize
from ldm.data.shard_index import leaves_folder
from ldm.data.shards import write_shards

TABLES = (".csv", ".jsonl", ".parquet")
REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class Entry:
    """A picture and its captions before either is looked at."""

    key: str
    image: str
    """Path as the source gives it; relative ones start at the source's folder."""
    captions: list[str] | None
    """None where they are in the .txt beside the picture."""


class Rejection(ValueError):
    """Why an entry is left out."""


def folder_entries(folder: Path) -> Iterator[Entry]:
    """All files of a folder and its subfolders that are no captions, in the order of their paths."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and path.suffix.lower() not in (".txt", ".json"):
            # The key ends at the first dot of the base name, so that other dots have to go.
            key = relative.parent / path.stem.replace(".", "_")
            yield Entry(key.as_posix(), relative.as_posix(), None)


def table_entries(table: Path, image_column: str, caption_column: str) -> Iterator[Entry]:
    """The rows of a table; the key is the row's number.

    Raises:
        ValueError: a column is missing in the first row, or the table does not parse.
    """
    for number, row in enumerate(_rows(table)):
        for column in (image_column, caption_column):
            if number == 0 and column not in row:
                raise ValueError(f"{table}: no column {column!r}; there are {', '.join(map(str, row))}")
        caption, image = row.get(caption_column), row.get(image_column)
        captions = [str(one) for one in caption] if isinstance(caption, list) else [str(caption or "")]
        yield Entry(f"{number:09d}", str(image or ""), captions)


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    if table.suffix == ".parquet":
        from pyarrow import parquet

        for batch in parquet.ParquetFile(table).iter_batches():
            yield from batch.to_pylist()
        return
    with open(table, encoding="utf-8", newline="") as file:
        if table.suffix == ".csv":
            try:
                yield from csv.DictReader(file)
            except csv.Error as error:
                raise ValueError(f"{table}: {error}") from error
            return
        for number, line in enumerate(file):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{table}, line {number + 1}, is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{table}, line {number + 1}, is not an object")
            yield row


def make_sample(entry: Entry, folder: Path, resolution: int | None) -> dict[str, Any]:
    """The sample of an entry: its picture is decoded to the end, its bytes are kept where the size stays.

    Raises:
        Rejection: the picture or the caption cannot be used.
    """
    path = folder / entry.image
    if entry.captions is None and path.suffix.lower().removeprefix(".") not in RAW_EXTENSIONS:
        raise Rejection(f"not a {', '.join(RAW_EXTENSIONS)}")
    captions = [caption.strip() for caption in _captions(entry, path) if caption.strip()]
    if not captions:
        raise Rejection("the caption is empty")
    try:
        data = path.read_bytes()
        picture, extension = open_picture(data)
    except OSError as error:
        raise Rejection(f"the picture cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise Rejection(str(error)) from error
    # Names of img2dataset: width and height are those of the stored picture.
    about: dict[str, Any] = {"original_width": picture.width, "original_height": picture.height}
    if resolution is not None and min(picture.size) > resolution:
        picture = resize(picture, resolution)
        stored = io.BytesIO()
        picture.save(stored, {"jpg": "JPEG"}.get(extension, extension), quality=95)
        data = stored.getvalue()
    about |= {"width": picture.width, "height": picture.height}
    if not leaves_folder(entry.image):
        about["source"] = entry.image
    if len(captions) > 1:
        about["captions"] = captions
    return {"__key__": entry.key, extension: data, "txt": captions[0], "json": about}


def _captions(entry: Entry, path: Path) -> list[str]:
    if entry.captions is not None:
        return entry.captions
    try:
        return [path.with_suffix(".txt").read_text("utf-8")]
    except FileNotFoundError:
        raise Rejection(f"no caption: {path.with_suffix('.txt').name} is missing") from None
    except UnicodeDecodeError as error:
        raise Rejection(f"the caption is not UTF-8: {error}") from error


class Packer:
    """Makes samples of entries and writes the line of each that is left out."""

    def __init__(self, folder: Path, resolution: int | None) -> None:
        self.folder = folder
        self.resolution = resolution
        self.rejected: list[str] = []
        self._keys: set[str] = set()

    def samples(self, entries: Iterable[Entry]) -> Iterator[dict[str, Any]]:
        for entry in entries:
            try:
                if entry.key in self._keys:
                    raise Rejection(f"the key {entry.key!r} is taken by a picture of the same name")
                sample = make_sample(entry, self.folder, self.resolution)
            except Rejection as rejection:
                self.rejected.append(json.dumps({"image": entry.image, "key": entry.key, "reason": str(rejection)}))
                continue
            self._keys.add(entry.key)
            yield sample


def held_out(entries: Iterable[Entry], count: int, seed: int) -> set[str]:
    """Keys of `count` entries, those with the least hash of their image's path: independent of order and of others."""
    keyed = (
        (xxhash.xxh3_64_intdigest(entry.image.encode("utf-8", "surrogateescape"), seed), entry.key) for entry in entries
    )
    return {key for _, key in heapq.nsmallest(count, keyed)}


def make_shards(options: argparse.Namespace) -> dict[str, int]:
    """Packs what the command line asks for; returns the number of samples by output folder, and of rejected ones.

    Raises:
        OSError, ValueError: source or destination cannot be used.
    """
    source: Path = options.source
    table = source.suffix.lower() in TABLES and source.is_file()
    if not table and not source.is_dir():
        raise ValueError(f"{source} is neither a folder nor a file that ends in {', '.join(TABLES)}")

    def entries() -> Iterator[Entry]:
        return table_entries(source, options.image_column, options.caption_column) if table else folder_entries(source)

    reserved = held_out(entries(), options.validation, options.validation_seed) if options.validation else set()
    total = sum(1 for _ in entries())
    if options.validation and options.validation >= total:
        raise ValueError(
            f"--validation {options.validation}: the source has {total} entries, some must be left to train on"
        )
    folders = {options.out: False}
    if options.validation:
        folders[options.validation_out or options.out.with_name(options.out.name + "-validation")] = True
    counts: dict[str, int] = {}
    rejected = 0
    for folder, reserve in folders.items():
        packer = Packer(source.parent if table else source, options.resolution)
        chosen = (entry for entry in entries() if (entry.key in reserved) == reserve)
        size = len(reserved) if reserve else total - len(reserved)
        try:
            manifest = write_shards(
                packer.samples(tqdm(chosen, folder.name, size, unit="picture")),
                folder,
                prefix=options.prefix,
                samples_per_shard=options.samples_per_shard,
            )
        finally:
            if packer.rejected:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / REJECTED).write_text("\n".join(packer.rejected) + "\n", "utf-8")
        counts[str(folder)] = sum(manifest.counts)
        rejected += len(packer.rejected)
    counts["rejected"] = rejected
    return counts


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="A table's image paths are relative to its folder. A list of captions in JSONL or Parquet goes into "
        "KEY.json, of which training draws one each time. Files kept as they are keep their transparency and EXIF "
        "orientation, which training resolves.",
    )
    parser.add_argument(
        "source", type=Path, help="folder of png, jpg, jpeg or webp pictures with a .txt each, or a table"
    )
    parser.add_argument("out", type=Path, help="folder for the shards and their manifest; must not hold shards yet")
    parser.add_argument("--prefix", default="shard", help="shards are PREFIX-000000.tar, ... (default: %(default)s)")
    parser.add_argument(
        "--samples_per_shard", type=_positive, default=1000, metavar="N", help="samples in a tar (default: %(default)s)"
    )
    parser.add_argument(
        "--resolution",
        type=_positive,
        metavar="R",
        help="shrink pictures whose shorter side is longer than R to R, encoded anew (JPEG and WebP at quality 95); "
        "without it the files' bytes are kept",
    )
    parser.add_argument("--image_column", default="image", metavar="NAME", help="of a table (default: %(default)s)")
    parser.add_argument("--caption_column", default="caption", metavar="NAME", help="of a table (default: %(default)s)")
    parser.add_argument(
        "--validation", type=_positive, metavar="N", help="samples held out, chosen by a hash of the image's path"
    )
    parser.add_argument(
        "--validation_out", type=Path, metavar="DIR", help="folder for those (default: OUT with -validation appended)"
    )
    parser.add_argument(
        "--validation_seed", type=int, default=0, metavar="S", help="another choice of them (default: %(default)s)"
    )
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        counts = make_shards(options)
    except (OSError, ValueError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    rejected = counts.pop("rejected")
    for folder, count in counts.items():
        print(f"{folder}: {count:,} samples")
    if rejected:
        print(f"{rejected:,} left out; the reasons are in {REJECTED} beside the shards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
