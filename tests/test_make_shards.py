"""tools/make_shards.py: from folders and tables to shards that the loader and the stock reader read."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import webdataset
from PIL import Image
from pyarrow import parquet

from ldm.data.manifest import Manifest
from ldm.data.shards import ShardReader
from tools.make_shards import build_parser, main


def picture(number: int, size: tuple[int, int] = (12, 10), form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def read(folder: Path) -> dict[str, dict]:
    """All samples of a folder by key, as the stock reader gives them."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            found[sample["__key__"]] = {name: value for name, value in sample.items() if not name.startswith("__")}
    return found


def rejected(folder: Path) -> dict[str, str]:
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    return {line["image"]: line["reason"] for line in map(json.loads, lines)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten good pictures in three formats and two folders."""
    folder = tmp_path / "pictures"
    (folder / "sub.dir").mkdir(parents=True)
    for number in range(10):
        form, suffix = [("PNG", ".png"), ("JPEG", ".JPG"), ("WEBP", ".webp")][number % 3]
        path = folder / ("sub.dir" if number % 2 else "") / f"picture.{number}{suffix}"
        path.write_bytes(picture(number, form=form))
        path.with_suffix(".txt").write_text(f"  caption é {number}\n", "utf-8")
    return folder


def test_a_folder_becomes_shards_with_the_files_own_bytes(pictures: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "shards"
    assert main([str(pictures), str(out), "--samples_per_shard", "4", "--prefix", "mine"]) == 0
    assert "10 samples" in capsys.readouterr().out
    manifest = Manifest.load(out)
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [
        ("mine-000000.tar", 4),
        ("mine-000001.tar", 4),
        ("mine-000002.tar", 2),
    ]
    assert manifest.encoder is None
    assert manifest.damaged() == []
    samples = read(out)
    assert len(samples) == 10
    assert not (out / "rejected.jsonl").exists()
    for number in range(10):
        extension = ("png", "jpg", "webp")[number % 3]
        folder = "sub.dir/" if number % 2 else ""
        sample = samples[f"{folder}picture_{number}"]
        (path,) = pictures.rglob(f"picture.{number}.[!t]*")
        assert sample[extension] == path.read_bytes()
        assert sample["txt"].decode() == f"caption é {number}"
        assert json.loads(sample["json"]) == {
            "original_width": 12,
            "original_height": 10,
            "width": 12,
            "height": 10,
            "source": f"{folder}{path.name}",
        }


def test_what_cannot_be_used_is_one_line_each_and_counted(pictures: Path, tmp_path: Path, capsys) -> None:
    def put(name: str, data: bytes, caption: bytes | None = b"a caption") -> None:
        (pictures / name).write_bytes(data)
        if caption is not None:
            (pictures / name).with_suffix(".txt").write_bytes(caption)

    put("a-truncated.png", picture(1)[:100])
    put("b-no-caption.png", picture(1), None)
    put("c-latin1.png", picture(1), b"caf\xe9")
    put("d-empty.png", picture(1), b" \n")
    put("e-text.png", b"no picture")
    put("f-other.gif", b"GIF89a")
    put("picture_0.webp", picture(1, form="WEBP"))  # the key of picture.0.png
    out = tmp_path / "shards"
    assert main([str(pictures), str(out)]) == 0
    assert "7 left out; the reasons are in rejected.jsonl" in capsys.readouterr().out
    assert len(read(out)) == 10
    reasons = rejected(out)
    assert {
        name: re.search(pattern, reasons[name]) is not None
        for name, pattern in {
            "a-truncated.png": "does not decode",
            "b-no-caption.png": r"no caption: b-no-caption\.txt is missing",
            "c-latin1.png": "not UTF-8",
            "d-empty.png": "empty",
            "e-text.png": "not a PNG, JPEG or WebP",
            "f-other.gif": "not a png, jpg, jpeg, webp",
            "picture_0.webp": "taken by a picture of the same name",
        }.items()
    } == dict.fromkeys(reasons, True)


def write_table(folder: Path, kind: str, rows: list[dict]) -> Path:
    path = folder / f"table.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_becomes_shards_with_row_numbers_as_keys(pictures: Path, tmp_path: Path, kind: str) -> None:
    rows = [
        {"file": path.relative_to(pictures).as_posix(), "text": f"row, {n}"}
        for n, path in enumerate(sorted(pictures.rglob("*.[pJw]*")))
    ]
    rows[3]["text"] = ""
    rows[4]["file"] = "nowhere.png"
    table = write_table(pictures, kind, rows)
    out = tmp_path / "shards"
    arguments = [str(table), str(out), "--image_column", "file", "--caption_column", "text"]
    assert main(arguments) == 0
    samples = read(out)
    assert list(samples) == [f"{number:09d}" for number in (0, 1, 2, 5, 6, 7, 8, 9)]
    for number in (0, 1, 2, 5, 6, 7, 8, 9):
        sample = samples[f"{number:09d}"]
        assert sample["txt"].decode() == f"row, {number}"
        assert (pictures / rows[number]["file"]).read_bytes() in sample.values()
    assert rejected(out) == {
        rows[3]["file"]: "the caption is empty",
        "nowhere.png": "the picture cannot be read: No such file or directory",
    }


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_several_captions_go_into_the_json(pictures: Path, tmp_path: Path, kind: str) -> None:
    table = write_table(pictures, kind, [{"image": "picture.0.png", "caption": ["one", " ", "two "]}])
    assert main([str(table), str(tmp_path / "shards")]) == 0
    sample = read(tmp_path / "shards")["000000000"]
    assert sample["txt"] == b"one"
    assert json.loads(sample["json"])["captions"] == ["one", "two"]


def test_a_path_out_of_the_folder_gives_a_key_inside_and_no_trace_of_the_path(pictures: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(picture(1))
    rows = [{"image": "../outside.png", "caption": "a"}, {"image": str(outside), "caption": "b"}]
    assert main([str(write_table(pictures, "jsonl", rows)), str(tmp_path / "shards")]) == 0
    samples = read(tmp_path / "shards")
    assert list(samples) == ["000000000", "000000001"]
    assert all("source" not in json.loads(sample["json"]) for sample in samples.values())


def test_held_out_samples_are_as_many_as_asked_for_whatever_the_others_are(pictures: Path, tmp_path: Path) -> None:
    def split(name: str, *more: str) -> tuple[set[str], set[str]]:
        out = tmp_path / name
        assert main([str(pictures), str(out), "--validation", "3", *more]) == 0
        return set(read(out)), set(read(tmp_path / f"{name}-validation"))

    train, held = split("a")
    assert (len(train), len(held)) == (7, 3)
    assert not train & held
    assert Manifest.load(tmp_path / "a-validation").counts == [3]
    assert split("b") == (train, held)
    assert split("c", "--validation_seed", "1")[1] != held
    # Without a picture that was not held out, the same are.
    gone = pictures / next(json.loads(one["json"])["source"] for key, one in read(tmp_path / "a").items())
    gone.unlink()
    gone.with_suffix(".txt").unlink()
    assert split("d")[1] == held
    chosen = tmp_path / "elsewhere"
    assert main([str(pictures), str(tmp_path / "e"), "--validation", "3", "--validation_out", str(chosen)]) == 0
    assert set(read(chosen)) == held


def test_resolution_shrinks_larger_pictures_and_keeps_the_bytes_of_smaller_ones(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, size, form in (
        ("large.png", (90, 60), "PNG"),
        ("tall.jpg", (50, 100), "JPEG"),
        ("small.png", (15, 40), "PNG"),
    ):
        (folder / name).write_bytes(picture(0, size, form))
        (folder / name).with_suffix(".txt").write_text("a")
    assert main([str(folder), str(tmp_path / "shards"), "--resolution", "20"]) == 0
    samples = read(tmp_path / "shards")
    large, tall = Image.open(io.BytesIO(samples["large"]["png"])), Image.open(io.BytesIO(samples["tall"]["jpg"]))
    assert (large.size, large.format) == ((30, 20), "PNG")
    assert (tall.size, tall.format) == ((20, 40), "JPEG")
    expected = Image.open(folder / "large.png").resize((30, 20), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(large), np.asarray(expected))
    assert samples["small"]["png"] == (folder / "small.png").read_bytes()
    about = json.loads(samples["large"]["json"])
    assert (about["original_width"], about["original_height"], about["width"], about["height"]) == (90, 60, 30, 20)


def test_the_extension_is_that_of_the_content(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(0, form="JPEG"))
    (folder / "a.txt").write_text("a")
    assert main([str(folder), str(tmp_path / "shards")]) == 0
    assert set(read(tmp_path / "shards")["a"]) == {"jpg", "txt", "json"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda source, out: [str(source / "nowhere"), str(out)], "neither a folder nor a file"),
        (lambda source, out: [str(source), str(source / "used")], "already holds shards"),
        (lambda source, out: [str(source / "empty"), str(out)], "no samples"),
        (lambda source, out: [str(source), str(out), "--validation", "10"], "some must be left"),
        (lambda source, out: [str(source / "bad.jsonl"), str(out)], "line 2, is not JSON"),
        (lambda source, out: [str(source / "other.csv"), str(out)], "no column 'image'; there are a, b"),
    ],
)
def test_a_source_or_destination_that_cannot_be_used_is_one_clear_line(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change, message: str
) -> None:
    if "already" in message:
        (pictures / "used").mkdir()
        (pictures / "used" / "s.tar").write_bytes(b"")
    if "no samples" in message:
        (pictures / "empty").mkdir()
    (tmp_path / "x").mkdir()
    if "line 2" in message:
        (pictures / "bad.jsonl").write_text('{"image": "picture.0.png", "caption": "a"}\n{"image\n')
    if "column" in message:
        (pictures / "other.csv").write_text("a,b\n1,2\n")
    assert main(change(pictures, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list((tmp_path / "out").glob("*.tar"))


def test_the_console_help_describes_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser()
    assert all(action.help for action in parser._actions)
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--samples_per_shard", "--resolution", "--validation", "--caption_column"):
        assert option in shown


def test_the_reader_reads_what_was_packed(pictures: Path, tmp_path: Path) -> None:
    main([str(pictures), str(tmp_path / "shards"), "--samples_per_shard", "3"])
    manifest = Manifest.load(tmp_path / "shards")
    stock, reader = read(tmp_path / "shards"), ShardReader(manifest)
    ours = {
        manifest.index(shard).key(sample): reader.members(shard, sample)
        for shard, count in enumerate(manifest.counts)
        for sample in range(count)
    }
    assert ours == stock
