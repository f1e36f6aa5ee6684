"""The model card: what the hub's own reader finds in it, and what must not be in it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load

from ldm.pipeline.model_card import CardConfig, model_card, without_path, without_paths

CONFIG = {
    "run_dir": "/home/someone/runs/tiny",
    "autoencoder": "package:tiny_vae/model",
    "seed": 3,
    "init_from": "~/models/sd15",
    "data": {
        "shards": ["/mnt/private/emoji/train", "s3://bucket/emoji", "https://me:secret@host/a.tar?token=secret"],
        "sources": [{"path": "C:\\Users\\someone\\emoji", "weight": 0.5}],
        "stream": "pipe:cat /mnt/private/emoji/{000..010}.tar",
        "cache": None,
    },
    "previews": {"prompts": ["red/green heart", "a / b", "```", "緑のリンゴ"]},
}


def card(config: CardConfig | None = None, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "config_yaml": yaml.safe_dump(CONFIG, allow_unicode=True), "steps": 12_000, "samples_seen": 3_072_000,
        "data_lines": ["436 samples in /mnt/private/emoji/train"], "initialized_from": None, **changes,
    }  # fmt: skip
    return model_card(config or CardConfig(), **arguments)


def load(text: str, tmp_path: Path) -> ModelCard:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    return ModelCard.load(tmp_path / "README.md")


def test_the_hub_s_reader_finds_license_library_and_task(tmp_path) -> None:
    loaded = load(card(CardConfig(title="Hearts: a test", license="cc-by-4.0", data="Twemoji.")), tmp_path)
    assert (loaded.data.license, loaded.data.library_name) == ("cc-by-4.0", "diffusers")
    assert loaded.data.pipeline_tag == "text-to-image"
    assert "text-to-image" in loaded.data.tags
    assert metadata_load(tmp_path / "README.md") == loaded.data.to_dict()
    assert loaded.text.lstrip().startswith("# Hearts: a test\n")
    assert "Twemoji." in loaded.text
    assert "`cc-by-4.0`" in section(loaded.text, "License")


def test_without_a_license_the_card_says_that_none_is_stated(tmp_path) -> None:
    loaded = load(card(), tmp_path)
    assert loaded.data.license is None
    assert "license" not in metadata_load(tmp_path / "README.md")
    assert section(loaded.text, "License").strip() == "Not stated."


@pytest.mark.parametrize("license_name", ["no", "1.0", "a: b", "'quoted' #1"])
def test_a_license_that_yaml_would_read_otherwise_stays_that_text(tmp_path, license_name) -> None:
    assert load(card(CardConfig(license=license_name)), tmp_path).data.license == license_name


def section(text: str, name: str) -> str:
    return text.split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_steps_samples_data_and_beginning_are_told(tmp_path) -> None:
    text = load(card(initialized_from="/mnt/private/models/sd15 (xxh3 abc)"), tmp_path).text
    training = section(text, "Training")
    assert "12,000" in training
    assert "3,072,000" in training
    assert "Began with: the weights of `sd15 (xxh3 abc)`" in training
    assert section(text, "Data").strip() == "- 436 samples in train"
    assert "random weights" in section(card(), "Training")
    assert section(card(data_lines=[]), "Data").strip() == "Not stated."


def test_the_commands_of_the_card_are_those_of_diffusers_and_of_the_sampling_program() -> None:
    use = section(card(), "Use")
    code = use.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "DiffusionPipeline.from_pretrained(" in code
    words = use.split("python ldm/sample.py ")[1].splitlines()[0]
    from ldm.sample import make_parser

    assert make_parser().parse_args(words.replace('"a red heart"', "a-red-heart").split()).prompt == ["a-red-heart"]


def test_the_config_is_one_yaml_block_without_places_of_this_machine() -> None:
    text = card()
    config = section(text, "Config").strip()
    fence = config.split("yaml\n")[0]
    assert fence == "````"  # longer than the one in a prompt
    values = yaml.safe_load(config.removeprefix(f"{fence}yaml\n").removesuffix(fence))
    assert values == {
        "run_dir": "tiny",
        "autoencoder": "package:tiny_vae/model",
        "seed": 3,
        "init_from": "sd15",
        "data": {
            "shards": ["train", "s3://bucket/emoji", "https://host/a.tar"],
            "sources": [{"path": "emoji", "weight": 0.5}],
            "stream": "pipe:cat {000..010}.tar",
            "cache": None,
        },
        "previews": CONFIG["previews"],
    }
    for word in ("someone", "private", "secret", "/mnt", "/home"):
        assert word not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/", "/"),
        ("and/or", "and/or"),
        ("runs/x", "runs/x"),
        ("/a/b/", "b"),
        ("file:///a/b", "b"),
        ("~/x", "x"),
        ("from /a/b, then '/c/d'", "from b, then 'd'"),
        ("D:\\data\\x", "x"),
        ("https://host/a?b=c d", "https://host/a d"),
        ("why? because", "why? because"),
        ("436 samples in ../../alice/secret/m, 3 damaged", "436 samples in m, 3 damaged"),
        ("from runs/../../alice/m", "from m"),
        ("wait../or not", "wait../or not"),
    ],
)
def test_absolute_paths_lose_all_but_their_last_component(text, expected) -> None:
    assert without_paths(text) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/al ice/models/x", "x"),
        ("/home/al, ice's/models/my x/", "my x"),
        ("~/al ice/x", "x"),
        ("file:///home/al ice/x", "x"),
        ("D:\\al ice\\x", "x"),
        ("../../alice/secret/m", "m"),
        ("models/../../al ice/m", "m"),
        ("..\\al ice\\m", "m"),
        ("runs/x", "runs/x"),
        ("owner/model", "owner/model"),
        ("package:tiny_vae/model", "package:tiny_vae/model"),
        ("https://me:key@host/a?b=c", "https://host/a"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_a_value_that_is_one_path_is_cut_as_one(value, expected) -> None:
    assert without_path(value) == expected
    text = card(config_yaml=yaml.safe_dump({"init_from": value, "previews": {"prompts": ["/imagine red / blue"]}}))
    shown = yaml.safe_load(section(text, "Config").strip().strip("`").removeprefix("yaml"))
    assert shown["init_from"] == expected
    assert shown["previews"]["prompts"] == ["imagine red / blue"]  # text, not one path


def test_the_same_run_gives_the_same_bytes() -> None:
    assert card() == card()


@pytest.mark.parametrize(("field", "value"), [("license", ""), ("license", "a\nb"), ("title", " ")])
def test_fields_that_would_break_the_card_are_refused(field, value) -> None:
    with pytest.raises(ValueError, match=rf"card\.{field}: found .* expected one line"):
        CardConfig(**{field: value})
