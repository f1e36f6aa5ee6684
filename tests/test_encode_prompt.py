"""Text conditioning equals diffusers' `encode_prompt`: CLIP in SD 1.x and 2.x conventions, SDXL's pair, T5 and BERT."""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
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

from ldm.models.conditioning import Conditioning
from ldm.models.pretrained import resolve_source
from ldm.models.text_conditioner import TextConditioner
from ldm.models.text_encoder import TextEncoderConfig
from ldm.models.text_loading import describe

LONG = "a very long caption about " + ", ".join(f"apple number {i}" for i in range(40))
PROMPTS = ["", "red heart", "Flag of France: blue, white, red!", "ein grüner Apfel 🍏 緑のリンゴ", LONG]
NEGATIVE = [LONG, "", "blurry", "", "ugly, low quality"]
INNER: Any = "penultimate_without_norm"

CONFIGS = int(os.environ.get("LDM_TEXT_CONFIGS", "4"))
"""Random pairs of encoders that are compared."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("encoders")
    make_clip(root / "clip")
    make_clip(root / "whole", whole=True)
    make_t5(root / "t5")
    make_sdxl_pair(root / "pair")
    return {name: str(root / name) for name in ("clip", "whole", "t5", "pair")} | {"bert": MINILM}


def theirs(folder: Path, **others: Any) -> Any:
    """diffusers' pipeline of a folder that holds its text parts, with transformers' own classes by its index."""
    import transformers
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    index = json.loads((folder / "model_index.json").read_text())
    text: dict[str, Any] = {}
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        if name in index:
            _, class_name = index[name]
            text[name] = getattr(transformers, class_name).from_pretrained(folder / name)
    others |= {"vae": None, "unet": None, "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False)}
    others |= {"feature_extractor": None}
    if "text_encoder_2" in index:
        zeros = index["force_zeros_for_empty_prompt"]
        return StableDiffusionXLPipeline(**text, **others, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    return StableDiffusionPipeline(**text, **others, safety_checker=None, requires_safety_checker=False)


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: Sequence[str], negative: Sequence[str] | None
) -> tuple[Conditioning, Conditioning]:
    """What diffusers' encode_prompt gives for prompts and for negative ones, None for none given."""
    found = pipeline.encode_prompt(
        prompt=list(prompts),
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=None if negative is None else list(negative),
    )
    if len(found) == 2:
        return Conditioning(found[0]), Conditioning(found[1])
    return Conditioning(found[0], found[2]), Conditioning(found[1], found[3])


def assert_equal(ours: Conditioning, expected: Conditioning) -> None:
    torch.testing.assert_close(ours.text, expected.text, rtol=1e-5, atol=1e-5)
    assert (ours.pooled is None) == (expected.pooled is None)
    if ours.pooled is not None:
        torch.testing.assert_close(ours.pooled, expected.pooled, rtol=1e-5, atol=1e-5)


def assert_parity(ours: TextConditioner, folder: Path) -> None:
    """Prompts, negative prompts, and what stands for no negative prompt, all at once and one by one."""
    pipeline = theirs(folder)
    expected, expected_negative = encode_prompt(pipeline, PROMPTS, NEGATIVE)
    assert expected.text.shape == (len(PROMPTS), ours.max_length, ours.hidden_size)
    assert_equal(ours.encode(PROMPTS), expected)
    assert_equal(ours.encode(NEGATIVE), expected_negative)
    for i, prompt in enumerate(PROMPTS):
        assert_equal(ours.encode([prompt]), expected.select(slice(i, i + 1)))
    _, expected_empty = encode_prompt(pipeline, PROMPTS[:1], None)
    assert_equal(ours.empty(), expected_empty)
    if ours.pooled_size:
        assert expected.pooled is not None
        assert expected.pooled.shape == (len(PROMPTS), ours.pooled_size)


def write_index(folder: Path, conditioner: TextConditioner) -> None:
    """The text part of a pipeline's model_index.json."""
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline"}
    for encoder in conditioner.encoders:
        index[encoder.name] = ["transformers", type(encoder.model).__name__]
        tokenizer = type(encoder.tokenizer).__name__
        index[encoder.name.replace("text_encoder", "tokenizer")] = ["transformers", tokenizer]
    if len(conditioner.encoders) == 2:
        index["_class_name"] = "StableDiffusionXLPipeline"
        index["force_zeros_for_empty_prompt"] = conditioner.empty_caption == "zeros"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("kind", "layer", "mask"),
    [
        ("clip", "last", False),
        ("clip", "penultimate", False),
        ("clip", "last", True),
        ("whole", "last", False),
        ("whole", "penultimate", False),
        ("t5", "last", False),
        ("t5", "last", True),
        ("t5", "penultimate", True),
        ("bert", "last", False),
        ("bert", "last", True),
        ("bert", "penultimate", True),
    ],
)
def test_states_are_those_of_stable_diffusion_on_the_saved_folders(
    sources: dict[str, str], tmp_path: Path, kind: str, layer: Any, mask: bool
) -> None:
    config = TextEncoderConfig(sources[kind], max_length=LENGTH, layer=layer, attention_mask=mask)
    ours = TextConditioner.load([config, None])
    ours.save(tmp_path)
    write_index(tmp_path, ours)
    assert_parity(ours, tmp_path)
    again = TextConditioner.from_pipeline(tmp_path)
    assert torch.equal(again.encode(PROMPTS).text, ours.encode(PROMPTS).text)
    assert again.identity() == ours.identity()


@pytest.mark.parametrize(
    ("first", "empty"),
    [("pair", "encoded"), ("pair", "zeros"), ("whole", "zeros"), ("t5", "encoded"), ("bert", "zeros")],
)
def test_states_and_pooled_text_are_those_of_stable_diffusion_xl_on_the_saved_folders(
    sources: dict[str, str], tmp_path: Path, first: str, empty: Any
) -> None:
    configs = [TextEncoderConfig(sources[name], layer=INNER, max_length=LENGTH) for name in (first, "pair")]
    ours = TextConditioner.load(configs, empty_caption=empty)
    ours.save(tmp_path)
    write_index(tmp_path, ours)
    assert_parity(ours, tmp_path)
    again = TextConditioner.from_pipeline(tmp_path)
    assert_equal(again.encode(PROMPTS), ours.encode(PROMPTS))
    assert again.identity() == ours.identity()
    assert again.empty_caption == ours.empty_caption


def test_a_whole_clip_model_is_the_second_of_a_pair_with_its_own_projection(
    sources: dict[str, str], tmp_path: Path
) -> None:
    # CLIPModel.get_text_features is what its authors published as the text's embedding.
    from transformers import AutoTokenizer, CLIPModel

    configs = [TextEncoderConfig(sources[name], layer=INNER) for name in ("pair", "whole")]
    ours = TextConditioner.load(configs).encode(PROMPTS)
    tokens = AutoTokenizer.from_pretrained(sources["whole"])(
        PROMPTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        output = CLIPModel.from_pretrained(sources["whole"]).get_text_features(tokens.input_ids)
    expected = output if isinstance(output, torch.Tensor) else output.pooler_output
    assert ours.pooled is not None
    torch.testing.assert_close(ours.pooled, expected, rtol=1e-5, atol=1e-5)


def make_stable_diffusion(folder: Path, model: Any, tokenizer: Path) -> None:
    """text_encoder/, tokenizer/ and index as diffusers' own save_pretrained writes them."""
    import transformers
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer)
    theirs.model_max_length = LENGTH
    StableDiffusionPipeline(
        vae=None,
        text_encoder=model,
        tokenizer=theirs,
        unet=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", ["clip", "t5", "bert"])
def test_states_are_those_of_a_folder_that_diffusers_wrote(
    sources: dict[str, str], tmp_path: Path, kind: str, mask: bool
) -> None:
    import transformers

    classes = {"clip": "CLIPTextModel", "t5": "T5EncoderModel", "bert": "BertModel"}
    source = resolve_source(sources[kind])
    model = getattr(transformers, classes[kind]).from_pretrained(source)
    if mask:
        model.config.use_attention_mask = True
    make_stable_diffusion(tmp_path, model, source)
    ours = TextConditioner.from_pipeline(tmp_path)
    assert_parity(ours, tmp_path)
    named = TextConditioner.load([TextEncoderConfig(str(tmp_path), attention_mask=mask)])
    assert_equal(named.encode(PROMPTS), ours.encode(PROMPTS))
    other = TextConditioner.load([TextEncoderConfig(str(tmp_path), attention_mask=not mask)])
    assert not torch.allclose(other.encode(["red"]).text, ours.encode(["red"]).text, atol=1e-3)


def test_sd2_as_shipped_is_the_penultimate_layer_of_the_original(tmp_path: Path) -> None:
    # 23 layers with the final norm, out of 24; here 3 of 4. Its tokenizer pads with "!".
    import transformers

    tokens = make_clip_tokenizer(tmp_path / "tokenizer", ["r e", "re d</w>"], pad_token="!")
    torch.manual_seed(4)
    config = clip_text_config(tokens, width=32, end_token=2)
    original = transformers.CLIPTextModel(config)
    save_random(original, tmp_path / "original")
    config.num_hidden_layers = 3
    shipped = transformers.CLIPTextModel(config)
    wanted = shipped.state_dict()
    shipped.load_state_dict({name: tensor for name, tensor in original.state_dict().items() if name in wanted})
    make_stable_diffusion(tmp_path / "shipped", shipped, tmp_path / "tokenizer")
    ours = TextConditioner.from_pipeline(tmp_path / "shipped")
    assert_parity(ours, tmp_path / "shipped")
    whole = TextEncoderConfig(str(tmp_path / "original"), str(tmp_path / "tokenizer"), layer="penultimate")
    from_whole = TextConditioner.load([whole])
    assert_parity(from_whole, tmp_path / "shipped")
    assert from_whole.identity() == ours.identity()


def make_stable_diffusion_xl(folder: Path, parts: Path, **settings: Any) -> None:
    """The text half of an SDXL pipeline, written by diffusers' own save_pretrained from the parts' folders."""
    import transformers
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    StableDiffusionXLPipeline(
        vae=None,
        unet=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        text_encoder=transformers.CLIPTextModel.from_pretrained(parts / "text_encoder"),
        text_encoder_2=transformers.CLIPTextModelWithProjection.from_pretrained(parts / "text_encoder_2"),
        tokenizer=transformers.AutoTokenizer.from_pretrained(parts / "tokenizer"),
        tokenizer_2=transformers.AutoTokenizer.from_pretrained(parts / "tokenizer_2"),
        add_watermarker=False,
        **settings,
    ).save_pretrained(folder)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("end_token", [2, None])
def test_pair_is_that_of_a_folder_that_diffusers_wrote(tmp_path: Path, zeros: bool, end_token: int | None) -> None:
    make_sdxl_pair(tmp_path / "parts", end_token=end_token)
    folder = tmp_path / "theirs"
    make_stable_diffusion_xl(folder, tmp_path / "parts", force_zeros_for_empty_prompt=zeros)
    ours = TextConditioner.from_pipeline(folder)
    assert (ours.hidden_size, ours.pooled_size, ours.max_length) == (32 + 48, 40, LENGTH)
    assert_parity(ours, folder)
    _, negative = encode_prompt(theirs(folder), PROMPTS[:1], None)
    assert bool(negative.text.any()) is not zeros
    by_component = [TextEncoderConfig(str(folder / name), layer=INNER) for name in ("text_encoder", "text_encoder_2")]
    for configs in ([TextEncoderConfig(str(folder), layer=INNER)] * 2, by_component):
        assert_equal(TextConditioner.load(configs).encode(PROMPTS), ours.encode(PROMPTS))
    index = json.loads((folder / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert TextConditioner.from_pipeline(folder).empty_caption == "zeros"  # StableDiffusionXLPipeline's default


def test_tokenizers_in_the_files_of_released_models_give_the_same_ids(tmp_path: Path) -> None:
    # vocab.json and merges.txt, as every released Stable Diffusion has them; transformers writes tokenizer.json now.
    from transformers import CLIPTokenizer

    make_sdxl_pair(tmp_path / "theirs")
    make_stable_diffusion_xl(tmp_path / "released", tmp_path / "theirs")
    for name in ("tokenizer", "tokenizer_2"):
        folder = tmp_path / "released" / name
        written = json.loads((folder / "tokenizer.json").read_text())["model"]
        pad = CLIPTokenizer.from_pretrained(folder).pad_token
        for path in folder.iterdir():
            path.unlink()
        (folder / "vocab.json").write_text(json.dumps(written["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, written["merges"])) + "\n")
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(special | {"pad_token": pad} | settings))
        (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": pad}))
    ours = TextConditioner.from_pipeline(tmp_path / "released")
    assert_parity(ours, tmp_path / "released")
    (tmp_path / "theirs" / "model_index.json").write_text((tmp_path / "released" / "model_index.json").read_text())
    assert_equal(ours.encode(PROMPTS), TextConditioner.from_pipeline(tmp_path / "theirs").encode(PROMPTS))


def test_random_pairs_give_diffusers_states_for_random_prompts(tmp_path: Path) -> None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    print(f"seeds 0..{CONFIGS - 1}, {CONFIGS} pairs")
    for seed in range(CONFIGS):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        folder = tmp_path / str(seed)
        for number, cls in enumerate((CLIPTextModel, CLIPTextModelWithProjection), 1):
            end = "" if number == 1 else "_2"
            merges = rng.sample(["r e", "b l", "a p", "a d</w>", "l u", "e d</w>"], 2)
            pad = rng.choice(["!", "<|endoftext|>", "a"])
            tokens = make_clip_tokenizer(folder / "parts" / f"tokenizer{end}", merges, pad_token=pad)
            config = clip_text_config(
                tokens,
                width=4 * rng.randint(2, 10),
                end_token=rng.choice([2, None]),
                hidden_act=rng.choice(["gelu", "quick_gelu"]),
                projection_dim=rng.randint(3, 30),
            )
            config.num_hidden_layers = rng.randint(2, 5)
            save_random(cls(config), folder / "parts" / f"text_encoder{end}")
        make_stable_diffusion_xl(folder / "theirs", folder / "parts", force_zeros_for_empty_prompt=rng.random() < 0.5)
        prompts = ["".join(rng.choices("red blue,!aé🍏", k=rng.randint(0, 20))) for _ in range(6)]
        ours = TextConditioner.from_pipeline(folder / "theirs")
        expected, expected_negative = encode_prompt(theirs(folder / "theirs"), prompts, prompts[::-1])
        assert_equal(ours.encode(prompts), expected)
        assert_equal(ours.encode(prompts[::-1]), expected_negative)


# What the config.json of the released text encoders hold that shapes depend on.
RELEASED = {
    "SD 1.x": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
               "hidden_act": "quick_gelu", "projection_dim": 768},
    "SD 2.x": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23,
               "hidden_act": "gelu", "projection_dim": 512},
    "SDXL": {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32,
             "hidden_act": "gelu", "projection_dim": 1280},
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "number", "parameters"),
    [("SD 1.x", 1, 123_060_480), ("SD 2.x", 1, 340_387_840), ("SDXL", 2, 694_659_840)],
)
def test_full_size_encoders_have_the_published_number_of_parameters(
    tmp_path: Path, model: str, number: int, parameters: int
) -> None:
    import transformers

    values = {"model_type": "clip_text_model", "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(values | RELEASED[model]))
    name, config = describe(tmp_path, number)
    with torch.device("meta"):
        built = getattr(transformers, name)(config)
    assert sum(parameter.numel() for parameter in built.parameters()) == parameters
    if number == 2:
        assert built.text_projection.weight.shape == (1280, 1280)
