"""One text encoder or SDXL's pair: what is joined, what stands for no caption, what is saved, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LENGTH, MINILM, make_clip, make_sdxl_pair

from ldm.models.conditioning import Conditioning
from ldm.models.text_conditioner import TextConditioner
from ldm.models.text_encoder import TextEncoder, TextEncoderConfig

CAPTIONS = ["", "red heart", "blue 🍏 " * 9]
INNER: Any = "penultimate_without_norm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text parts of an SDXL pipeline, and clip/ beside them."""
    root = tmp_path_factory.mktemp("pair")
    make_sdxl_pair(root)
    make_clip(root / "clip")
    return root


def pair(folder: Path, empty_caption: Any = "encoded", **settings: Any) -> TextConditioner:
    config = TextEncoderConfig(str(folder), layer=INNER, **settings)
    return TextConditioner.load([config, config], empty_caption=empty_caption)


@torch.no_grad()
def published(folder: Path, number: int, captions: list[str]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Hidden states of each layer, of the last after the final norm, and where each caption ends; from transformers."""
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

    end = "" if number == 1 else "_2"
    cls = CLIPTextModel if number == 1 else CLIPTextModelWithProjection
    model = cls.from_pretrained(folder / f"text_encoder{end}").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / f"tokenizer{end}")
    ids = [
        [*row[: LENGTH - 1], tokenizer.eos_token_id] if len(row) > LENGTH else row
        for row in tokenizer(captions).input_ids
    ]
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (LENGTH - len(row)) for row in ids])
    output = model(padded, output_hidden_states=True)
    return list(output.hidden_states), output.last_hidden_state, torch.tensor([len(row) - 1 for row in ids])


def test_a_pairs_text_is_two_layers_inputs_and_its_pooled_text_the_projected_end_of_the_second(folder: Path) -> None:
    from transformers import CLIPTextModelWithProjection

    found = pair(folder).encode(CAPTIONS)
    (*_, first, _), _, _ = published(folder, 1, CAPTIONS)
    (*_, second, _), normed, ends = published(folder, 2, CAPTIONS)
    assert found.text.shape == (3, LENGTH, 32 + 48)
    torch.testing.assert_close(found.text, torch.cat([first, second], dim=2), rtol=1e-5, atol=1e-5)
    projection = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").text_projection.weight
    expected = normed[torch.arange(3), ends] @ projection.detach().T
    assert found.pooled is not None
    assert ends.tolist()[0] == 1
    torch.testing.assert_close(found.pooled, expected, rtol=1e-5, atol=1e-5)
    assert found.sizes is None


def test_sizes_are_those_of_both_encoders(folder: Path) -> None:
    conditioner = pair(folder, max_length=12)
    assert (conditioner.hidden_size, conditioner.pooled_size, conditioner.max_length) == (80, 40, 12)
    assert conditioner.encode(CAPTIONS).text.shape == (3, 12, 80)
    assert conditioner.truncated == 1, "a caption that both encoders cut is one caption"
    one = TextConditioner.load([TextEncoderConfig(str(folder / "clip")), None])
    assert (one.hidden_size, one.pooled_size, one.max_length) == (32, 0, LENGTH)
    assert one.encode(CAPTIONS).pooled is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_caption_is_zeros_or_the_encoded_empty_caption(folder: Path, dtype: str) -> None:
    encoded, zeros = pair(folder, dtype=dtype), pair(folder, "zeros", dtype=dtype)
    expected = encoded.encode([""])
    assert expected.pooled is not None
    for conditioner, scale in ((encoded, 1), (zeros, 0)):
        empty = conditioner.empty()
        assert empty.pooled is not None
        assert (empty.text.shape, empty.pooled.shape) == ((1, LENGTH, 80), (1, 40))
        assert torch.equal(empty.text, expected.text * scale)
        assert torch.equal(empty.pooled, expected.pooled * scale)
        assert empty.text.dtype == empty.pooled.dtype == getattr(torch, dtype)
    assert torch.equal(zeros.encode([""]).text, expected.text), "an empty caption among the data is a caption"
    assert zeros.identity() == encoded.identity(), "shards hold captions only"


def test_dropped_captions_lose_text_and_pooled_text_together(folder: Path) -> None:
    conditioner = pair(folder, "zeros")
    given = conditioner.encode(CAPTIONS)
    given.sizes = torch.arange(18).reshape(3, 6)
    dropped = torch.tensor([False, True, False])
    found = given.where(dropped, conditioner.empty())
    assert given.pooled is not None
    assert found.pooled is not None
    for part, of in ((found.text, given.text), (found.pooled, given.pooled)):
        assert not part[1].any()
        assert torch.equal(part[[0, 2]], of[[0, 2]])
    assert torch.equal(found.sizes, given.sizes), "sizes are of the picture: no caption, the same picture"
    half = given.to(dtype=torch.bfloat16).where(dropped, conditioner.empty())
    assert half.pooled is not None
    assert half.text.dtype == half.pooled.dtype == torch.float32


@pytest.mark.parametrize("lacking", ["given", "empty"])
def test_pooled_text_on_one_side_only_is_an_error_not_a_loss(lacking: str) -> None:
    whole, without = Conditioning(torch.ones(1, 2, 3), torch.ones(1, 4)), Conditioning(torch.ones(1, 2, 3))
    given, empty = (without, whole) if lacking == "given" else (whole, without)
    with pytest.raises(ValueError, match=r"conditioning\.pooled is given on one side only"):
        given.where(torch.tensor([True]), empty)


def test_identity_tells_the_pair_from_its_encoders_alone(folder: Path) -> None:
    both = pair(folder).identity()
    json.dumps(both)
    assert list(both) == ["text_encoder", "text_encoder_2"]
    assert both["text_encoder_2"]["class"] == "CLIPTextModelWithProjection"
    assert both["text_encoder_2"]["pooled_at"] == "end"
    alone = TextConditioner.load([TextEncoderConfig(str(folder))]).identity()
    assert alone["text_encoder_2"] is None
    first = both["text_encoder"]
    assert {name for name in first if first[name] != alone["text_encoder"].get(name)} == {"layer"}


def test_identity_tells_where_pooled_text_is_taken_only_where_the_two_ways_differ(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    def pooled_at(end_token: int, added: str | None) -> tuple[Any, torch.Tensor]:
        path = tmp_path / f"{end_token}{added}"
        model = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer_2")
        if added is not None:  # as for textual inversion: an id above that of the end
            tokenizer.add_tokens([added])
            torch.manual_seed(0)
            model.resize_token_embeddings(len(tokenizer))
        model.config.eos_token_id = end_token
        model.save_pretrained(path / "text_encoder_2")
        tokenizer.save_pretrained(path / "tokenizer_2")
        encoder = TextEncoder(TextEncoderConfig(str(path), layer=INNER), number=2)
        pooled = encoder.encode(["red <cat>"]).pooled
        assert pooled is not None
        return encoder.identity()["pooled_at"], pooled

    (legacy, one), (own, other) = pooled_at(2, None), pooled_at(517, None)
    assert (legacy, own) == ("end", "end")
    assert torch.equal(one, other)
    (legacy, one), (own, other) = pooled_at(2, "<cat>"), pooled_at(517, "<cat>")
    assert (legacy, own) == ("highest id", "end")
    assert not torch.allclose(one, other)


def test_identity_of_one_encoder_is_that_of_shards_encoded_before_there_were_pairs() -> None:
    # Of the demo's shards, as their manifest holds it.
    found = TextConditioner.load([TextEncoderConfig(MINILM, max_length=16, attention_mask=True)]).identity()
    assert found == {
        "text_encoder": {
            "class": "BertModel",
            "weights": "d3a8d894df6ade752f21a356ae4d088a",
            "config": "1123ea505eee7b73900d2ce371b0bf17",
            "tokenizer": "c8f1a8ab628e49386680239601c75c58",
            "layers": 6,
            "max_length": 16,
            "attention_mask": True,
            "dtype": "float32",
        },
        "text_encoder_2": None,
    }


def test_a_folder_without_index_is_no_pipeline(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no model_index\.json here"):
        TextConditioner.from_pipeline(folder)


def config(layer: Any = INNER, **settings: Any) -> TextEncoderConfig:
    return TextEncoderConfig("nowhere", layer=layer, **settings)


@pytest.mark.parametrize(
    ("configs", "empty", "messages"),
    [
        ([], "encoded", ["found 0 text encoders, expected one, or SDXL's pair"]),
        ([config("last")] * 3, "encoded", ["found 3 text encoders"]),
        ([config()], "encoded", ["text_encoder.layer: found penultimate_without_norm, expected last or penultimate"]),
        ([config("last")], "zeros", ["empty_caption: found zeros, expected encoded for one encoder"]),
        (
            [config("last"), config("penultimate")],
            "zeros",
            ["text_encoder.layer: found last, expected penultimate_without_norm", "text_encoder_2.layer: found penult"],
        ),
        ([config(), config(attention_mask=True)], "zeros", ["text_encoder_2.attention_mask: found true"]),
        ([config(), config(dtype="float16")], "zeros", ["text_encoder_2.dtype: found float16, expected float32"]),
    ],
)
def test_what_diffusers_would_compute_otherwise_is_refused_before_weights_are_read(
    configs: list[TextEncoderConfig], empty: Any, messages: list[str]
) -> None:
    with pytest.raises(ValueError, match="text") as error:
        TextConditioner.load(configs, empty_caption=empty)
    for message in messages:
        assert message in str(error.value)


def test_encoders_of_two_lengths_and_swapped_ones_are_refused(folder: Path) -> None:
    first, second = folder / "text_encoder", folder / "text_encoder_2"
    lengths = [TextEncoderConfig(str(first), layer=INNER), TextEncoderConfig(str(second), layer=INNER, max_length=12)]
    with pytest.raises(ValueError, match=r"text_encoder_2\.max_length: captions have 12 tokens there and 16 in the"):
        TextConditioner.load(lengths)
    swapped = [TextEncoderConfig(str(path), layer=INNER) for path in (second, first)]
    with pytest.raises(ValueError, match=r"missing: text_projection\.weight .*\n.*only the first"):
        TextConditioner.load(swapped)
