"""Text encoders are found wherever released ones lie, and load whole or not at all, with all that is wrong by name."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    LENGTH,
    MINILM,
    clip_text_config,
    make_clip,
    make_clip_tokenizer,
    make_sdxl_pair,
    make_t5,
    save_random,
)

from ldm.models.text_conditioner import TextConditioner
from ldm.models.text_encoder import TextEncoder, TextEncoderConfig

CAPTIONS = ["", "red heart", "blue 🍏"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("encoders")
    make_clip(root / "clip")
    make_clip(root / "whole", whole=True)
    make_t5(root / "t5")
    make_sdxl_pair(root / "pair")
    return {name: str(root / name) for name in ("clip", "whole", "t5", "pair")} | {"bert": MINILM}


def states(source: str | Path, number: int = 1, **settings: str) -> torch.Tensor:
    config = TextEncoderConfig(str(source), max_length=LENGTH, **settings)  # type: ignore[arg-type]
    return TextEncoder(config, number=number).encode(CAPTIONS).text


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_each_encoder_of_a_pipeline_folder_is_found_with_its_own_tokenizer(
    sources: dict[str, str], tmp_path: Path
) -> None:
    pair = Path(sources["pair"])
    first, second = states(pair, 1), states(pair, 2)
    assert (first.shape[-1], second.shape[-1]) == (32, 48)
    assert torch.equal(states(pair / "text_encoder"), first)
    assert torch.equal(states(pair / "text_encoder_2", 2), second)
    shutil.copytree(pair, tmp_path / "swapped")
    shutil.rmtree(tmp_path / "swapped" / "tokenizer_2")
    shutil.copytree(pair / "tokenizer", tmp_path / "swapped" / "tokenizer_2")
    assert not torch.equal(states(tmp_path / "swapped", 2), second)
    assert torch.equal(states(tmp_path / "swapped", 2, tokenizer=str(pair / "tokenizer_2")), second)
    assert torch.equal(states(tmp_path / "swapped", 2, tokenizer=str(pair)), second)
    shutil.rmtree(tmp_path / "swapped" / "tokenizer_2")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer: expected .* in one of .*swapped/tokenizer_2"):
        states(tmp_path / "swapped", 2)  # the first's would be another one


def save_half(folder: Path, dtype: torch.dtype, name: str) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("kind", ["clip", "t5", "bert"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_computed_with_in_the_configured_type(
    sources: dict[str, str], tmp_path: Path, kind: str, stored: torch.dtype
) -> None:
    # transformers' own conversion of the same file, taken before ours is loaded.
    from transformers import AutoModel, T5EncoderModel

    from ldm.models.pretrained import resolve_source

    folder = tmp_path / kind
    shutil.copytree(resolve_source(sources[kind]), folder)
    variant = "fp16" if stored == torch.float16 else "bf16"
    save_half(folder, stored, f"model.{variant}.safetensors")
    opened = {"t5": T5EncoderModel}.get(kind, AutoModel)
    reference = opened.from_pretrained(folder, variant=variant, dtype=torch.float32).eval()
    encoder = TextEncoder(TextEncoderConfig(str(folder), max_length=LENGTH))
    tokens = encoder.tokenizer(CAPTIONS, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = reference(tokens)[0]
    ours = encoder.encode(CAPTIONS).text
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert all(parameter.dtype == torch.float32 for parameter in encoder.model.parameters())
    half = TextEncoder(TextEncoderConfig(str(folder), max_length=LENGTH, dtype="bfloat16"))
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights_are_those_of_one_file(sources: dict[str, str], tmp_path: Path, variant: str | None) -> None:
    from transformers import CLIPTextModel

    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    shutil.copytree(sources["clip"], sharded)
    model = CLIPTextModel.from_pretrained(sharded)
    (sharded / "model.safetensors").unlink()
    if variant:
        model = model.half()
    model.save_pretrained(sharded, max_shard_size="50KB", variant=variant)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    shutil.copytree(sources["clip"], whole)
    if variant:
        save_half(whole, torch.float16, "model.fp16.safetensors")
    assert torch.equal(states(sharded), states(whole))
    next(sharded.glob("model*-00002-of-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-"):
        states(sharded)


def test_one_weights_file_of_a_folder_can_be_named(sources: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(sources["clip"], folder)
    shutil.copy(folder / "model.safetensors", folder / "kept.safetensors")
    edit_weights(folder, lambda tensors: tensors["final_layer_norm.bias"].add_(1))
    assert torch.equal(states(folder / "kept.safetensors"), states(sources["clip"]))
    torch.testing.assert_close(states(folder), states(sources["clip"]) + 1)


def test_pickles_are_refused_with_the_command_that_converts_them(sources: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "pickle"
    shutil.copytree(sources["clip"], folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    command = r"python tools/convert_checkpoint\.py " + re.escape(str(folder / "pytorch_model.bin"))
    for source in (folder, folder / "pytorch_model.bin"):
        with pytest.raises((ValueError, FileNotFoundError), match=command) as error:
            states(source)
        assert "pickle" in str(error.value)
    (tmp_path / "sd.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"sd\.ckpt is a pickle.*python tools/convert_checkpoint\.py .*sd\.ckpt "):
        states(tmp_path / "sd.ckpt")


def test_whole_models_and_older_files_give_the_states_of_their_encoders(
    sources: dict[str, str], tmp_path: Path
) -> None:
    from transformers import AutoModelForMaskedLM, T5ForConditionalGeneration

    from ldm.models.pretrained import resolve_source

    for kind in ("t5", "bert", "clip"):
        shutil.copytree(resolve_source(sources[kind]), tmp_path / kind)
    expected = {kind: states(tmp_path / kind) for kind in ("t5", "bert", "clip")}

    def check(kind: str) -> None:
        assert torch.equal(states(tmp_path / kind), expected[kind])

    # Either name of T5's embedding, or both, are in released files.
    edit_weights(tmp_path / "t5", lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"].clone()}))
    check("t5")
    edit_weights(tmp_path / "t5", lambda t: t.pop("shared.weight"))
    check("t5")
    T5ForConditionalGeneration.from_pretrained(sources["t5"]).save_pretrained(tmp_path / "t5")
    check("t5")
    AutoModelForMaskedLM.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / "bert")
    assert any(name.startswith("cls.") for name in load_file(tmp_path / "bert" / "model.safetensors"))
    check("bert")
    # The pooler is gone with the head: random numbers in its place would make each saved folder another one.
    encoder = TextEncoder(TextEncoderConfig(str(tmp_path / "bert")))
    assert not any(parameter.any() for parameter in encoder.model.pooler.parameters())

    def rename(old: dict[str, str]) -> Callable[[dict[str, torch.Tensor]], None]:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            for name in list(tensors):
                tensor = tensors.pop(name)
                for now, before in old.items():
                    name = name.replace(now, before)
                tensors[name] = tensor

        return change

    edit_weights(tmp_path / "bert", rename({"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}))
    check("bert")
    for kind, name in (("bert", "bert.embeddings.position_ids"), ("clip", "text_model.embeddings.position_ids")):
        edit_weights(tmp_path / kind, lambda t, name=name: t.update({name: torch.arange(LENGTH)[None]}))
        check(kind)


@pytest.mark.parametrize("kind", ["clip", "t5", "bert"])
def test_missing_unexpected_and_wrong_shapes_are_all_named_in_one_error(
    sources: dict[str, str], tmp_path: Path, kind: str
) -> None:
    from ldm.models.pretrained import resolve_source

    folder = tmp_path / kind
    shutil.copytree(resolve_source(sources[kind]), folder)
    last = {"clip": "final_layer_norm.bias", "t5": "encoder.final_layer_norm.weight"}
    first = {"clip": "embeddings.position_embedding.weight", "t5": "shared.weight"}
    bert = ("encoder.layer.1.output.LayerNorm.weight", "embeddings.word_embeddings.weight")
    gone, bent = (last[kind], first[kind]) if kind in last else bert
    odd = "encoder.layers.9.mlp.fc1.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[gone]
        tensors[bent] = tensors[bent][:, 1:].contiguous()
        tensors[odd] = torch.zeros(2)

    shape = tuple(load_file(folder / "model.safetensors")[bent].shape)
    edit_weights(folder, change)
    with pytest.raises(ValueError, match="weights are not those of the") as error:
        states(folder)
    message = str(error.value)
    assert str(folder) in message
    assert f"missing: {gone} " in message
    assert f"unexpected: {odd}" in message
    assert f"wrong shape: {bent} is {(shape[0], shape[1] - 1)} in the file, {shape} in the model" in message


def test_truncated_weights_wrong_models_and_missing_files_are_said_with_their_place(
    sources: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(sources["clip"], tmp_path / "short")
    content = (tmp_path / "short" / "model.safetensors").read_bytes()
    (tmp_path / "short" / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"text_encoder: .*short/model\.safetensors is damaged"):
        states(tmp_path / "short")
    (tmp_path / "short" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no safetensors weights in .*short.*expected"):
        states(tmp_path / "short")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    shutil.copy(Path(sources["clip"]) / "tokenizer.json", tmp_path / "gpt")
    shutil.copy(Path(sources["clip"]) / "tokenizer_config.json", tmp_path / "gpt")
    with pytest.raises(ValueError, match="model_type is 'gpt2', expected one of clip"):
        states(tmp_path / "gpt")
    (tmp_path / "gpt" / "tokenizer.json").unlink()
    (tmp_path / "gpt" / "tokenizer_config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer: expected tokenizer_config.json or tokenizer.json in one of"
    ):
        states(tmp_path / "gpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected config\.json, or text_encoder/config\.json"):
        states(tmp_path / "empty")
    # A pipeline of one encoder, and an autoencoder, asked for what they do not hold.
    (tmp_path / "empty" / "model_index.json").write_text("{}")
    shutil.copytree(sources["clip"], tmp_path / "empty" / "text_encoder")
    with pytest.raises(FileNotFoundError, match=r"text_encoder_2"):
        states(tmp_path / "empty", 2)
    (tmp_path / "gpt" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="model_type is None, expected one of clip"):
        states(tmp_path / "gpt", tokenizer=sources["clip"])


def test_a_second_encoder_without_projection_is_refused(sources: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"missing: text_projection\.weight .*\n.*cannot be the second of a pair"):
        states(Path(sources["pair"]) / "text_encoder", 2)
    with pytest.raises(ValueError, match=r"model_type is 't5', expected CLIP's for the second of a pair"):
        states(sources["t5"], 2)
    assert states(Path(sources["pair"]) / "text_encoder_2", 1).shape[-1] == 48  # by itself, without projection


def test_tokenizers_of_other_models_are_refused(sources: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 30522 tokens, but the CLIPTextModel has embeddings for 518"):
        states(sources["clip"], tokenizer=MINILM)
    pair = tmp_path / "pair"
    make_sdxl_pair(pair, end_token=None)
    states(pair, 2)
    # One merge less: every id above is another, that of the end too, where the pooled text is.
    make_clip_tokenizer(tmp_path / "other", ["r e", "b l", "a p"], pad_token="!")
    with pytest.raises(ValueError, match=r"ends captions with id 516, but the model's eos_token_id.* is 517"):
        states(pair, 2, tokenizer=str(tmp_path / "other"))


def make_wide_pair(folder: Path) -> None:
    """As make_sdxl_pair, with the 64 channels a head by which a single file's heads are counted."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(6)
    for end, cls, width, activation in (
        ("", CLIPTextModel, 64, "quick_gelu"),
        ("_2", CLIPTextModelWithProjection, 128, "gelu"),
    ):
        tokens = make_clip_tokenizer(folder / f"tokenizer{end}", ["r e", "b l"], pad_token="!" if end else "a")
        config = clip_text_config(tokens, width=width, end_token=2, hidden_act=activation, projection_dim=72)
        config.num_attention_heads = width // 64
        save_random(cls(config), folder / f"text_encoder{end}")


def openclip(tensors: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """A text model of transformers in open_clip's names: torch's MultiheadAttention, and `x @ text_projection`."""
    given = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    found = {
        "token_embedding.weight": given["embeddings.token_embedding.weight"],
        "positional_embedding": given["embeddings.position_embedding.weight"],
        "ln_final.weight": given["final_layer_norm.weight"],
        "ln_final.bias": given["final_layer_norm.bias"],
        "text_projection": given["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.zeros(()),
    }
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    parts["attn.out_proj"] = "self_attn.out_proj"
    for i in range(layers):
        block, ours = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            found |= {f"{block}.{a}.{kind}": given[f"{ours}.{b}.{kind}"] for a, b in parts.items()}
            fused = [given[f"{ours}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            found[f"{block}.attn.in_proj_{kind}"] = torch.cat(fused)
    return found


def test_a_single_checkpoint_gives_the_states_of_its_folders(tmp_path: Path) -> None:
    make_wide_pair(tmp_path)
    first = load_file(tmp_path / "text_encoder" / "model.safetensors")
    second = load_file(tmp_path / "text_encoder_2" / "model.safetensors")
    clip = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in first.items()}
    clip["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]  # in files of older transformers
    open_clip = openclip(second, 4)
    tokenizer, tokenizer_2 = str(tmp_path / "tokenizer"), str(tmp_path / "tokenizer_2")

    def checkpoint(name: str, **prefixed: dict[str, torch.Tensor]) -> str:
        stages = {"clip": "cond_stage_model.transformer.", "open_clip": "cond_stage_model.model."}
        stages |= {"first": "conditioner.embedders.0.transformer.", "second": "conditioner.embedders.1.model."}
        tensors = {stages[key] + n: t.clone() for key, values in prefixed.items() for n, t in values.items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return str(tmp_path / f"{name}.safetensors")

    sd1 = checkpoint("sd1", clip=clip)
    ours = TextEncoder(TextEncoderConfig(sd1, tokenizer))
    folder = TextEncoder(TextEncoderConfig(str(tmp_path)))
    assert torch.equal(ours.encode(CAPTIONS).text, folder.encode(CAPTIONS).text)
    assert ours.identity() == folder.identity(), "shards encoded with one are read with the other"

    # SD 2.x: as shipped, its file holds the last layer that the folder (here "penultimate") is without.
    sd2 = checkpoint("sd2", open_clip=open_clip)
    ours = TextEncoder(TextEncoderConfig(sd2, tokenizer_2))
    folder = TextEncoder(TextEncoderConfig(str(tmp_path / "text_encoder_2"), layer="penultimate"))
    assert torch.equal(ours.encode(CAPTIONS).text, folder.encode(CAPTIONS).text)
    assert ours.identity() == folder.identity()
    with pytest.raises(
        ValueError, match=r"text_encoder\.layer: .*sd2\.safetensors .* left out already; set layer: last"
    ):
        TextEncoder(TextEncoderConfig(sd2, tokenizer_2, layer="penultimate"))
    assert (
        TextEncoder(TextEncoderConfig(sd1, tokenizer, layer="penultimate")).identity()["layers"] == 3
    )  # CLIP's is all

    sdxl = checkpoint("sdxl", first=clip, second=open_clip)
    inner = "penultimate_without_norm"
    pair = [TextEncoderConfig(sdxl, tokenizer, layer=inner), TextEncoderConfig(sdxl, tokenizer_2, layer=inner)]
    ours_pair = TextConditioner.load(pair)
    folder_pair = TextConditioner.load([TextEncoderConfig(str(tmp_path), layer=inner)] * 2)
    found, expected = ours_pair.encode(CAPTIONS), folder_pair.encode(CAPTIONS)
    assert found.pooled is not None
    assert expected.pooled is not None
    assert torch.equal(found.text, expected.text)
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=1e-5, atol=1e-5)  # memory order of the projection
    assert ours_pair.identity() == folder_pair.identity()
    ours_pair.save(tmp_path / "saved")
    for name in ("text_encoder", "text_encoder_2"):
        saved = load_file(tmp_path / "saved" / name / "model.safetensors")
        for key, tensor in (first if name == "text_encoder" else second).items():
            same = key if name == "text_encoder_2" else f"text_model.{key.removeprefix('text_model.')}"
            assert torch.equal(saved.pop(same), tensor), key
        assert not saved

    with pytest.raises(
        ValueError, match=r"text_encoder_2\.source: .*sdxl.* holds no tokenizer: set text_encoder_2\.tok"
    ):
        TextEncoder(TextEncoderConfig(sdxl), number=2)
    with pytest.raises(ValueError, match=r"expected a text encoder number 2"):
        TextEncoder(TextEncoderConfig(sd1, tokenizer_2), number=2)
