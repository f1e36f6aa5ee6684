"""Folders of pipelines: what is written, linked and read, and what is said of folders that cannot be used."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_pipeline, make_sdxl_pair, tiny_autoencoder

from ldm.pipeline.folder import FILES, FILES_OF_PAIR
from ldm.pipeline.pipeline import Pipeline, load_pipeline, save_pipeline
from ldm.sampling.generation import generate


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("encoders") / "pair"
    make_sdxl_pair(folder)
    return str(folder)


@pytest.fixture(scope="module")
def saved(pipeline: Pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    save_pipeline(folder, pipeline, card="# A card\n")
    return folder


@pytest.fixture(scope="module")
def saved_pair(pair: str, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pair"
    save_pipeline(folder, make_pipeline(pair, pair=True))
    return folder


def test_averaged_weights_are_saved_in_place_of_the_networks_own(pipeline, tmp_path) -> None:
    own = pipeline.unet.state_dict()
    average = {name: tensor * 0.5 for name, tensor in own.items()}
    save_pipeline(tmp_path / "p", pipeline, unet_state=average)
    stored = load_file(tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == average.keys()
    assert all(torch.equal(stored[name], average[name]) for name in stored)
    assert all(torch.equal(pipeline.unet.state_dict()[name], tensor) for name, tensor in own.items())


def files_of(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("encoders", [1, 2])
def test_frozen_parts_are_linked_from_an_earlier_folder_and_the_rest_is_written(
    pipeline, pair, saved, saved_pair, tmp_path, encoders
) -> None:
    first = saved if encoders == 1 else saved_pair
    again = pipeline if encoders == 1 else make_pipeline(pair, pair=True)
    save_pipeline(tmp_path / "next", again, frozen_from=first, card="# A card\n" if encoders == 1 else None)
    earlier, later = files_of(first), files_of(tmp_path / "next")
    assert earlier.keys() == later.keys()
    assert ("text_encoder_2/model.safetensors" in later) == (encoders == 2)
    frozen = ("vae/", "text_encoder/", "tokenizer/", "text_encoder_2/", "tokenizer_2/")
    for name, path in later.items():
        linked = path.stat().st_ino == earlier[name].stat().st_ino
        assert linked == name.startswith(frozen), name
        assert path.read_bytes() == earlier[name].read_bytes(), name


def test_the_index_names_the_pipeline_that_opens_the_folder_in_diffusers(
    clip, pair, saved, saved_pair, tmp_path
) -> None:
    import diffusers

    def index(folder: Path) -> dict:
        return json.loads((folder / "model_index.json").read_text())

    assert index(saved)["_class_name"] == "StableDiffusionPipeline"
    assert index(saved_pair)["_class_name"] == "StableDiffusionXLPipeline"
    assert index(saved_pair)["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    assert index(saved_pair)["force_zeros_for_empty_prompt"] is False
    save_pipeline(tmp_path / "zeros", make_pipeline(pair, pair=True, empty_caption="zeros"))
    assert index(tmp_path / "zeros")["force_zeros_for_empty_prompt"] is True
    assert load_pipeline(tmp_path / "zeros").text_encoder.empty_caption == "zeros"
    assert load_pipeline(saved_pair).text_encoder.empty_caption == "encoded"
    for name, source, of_pair in (("one", clip, False), ("two", pair, True)):
        save_pipeline(tmp_path / name, make_pipeline(source, pair=of_pair, inpainting=True))
        opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path / name)
        kind = f"StableDiffusion{'XL' if of_pair else ''}InpaintPipeline"
        assert type(opened).__name__ == index(tmp_path / name)["_class_name"] == kind


def test_the_card_is_the_readme_of_the_folder_and_there_only_when_given(saved, saved_pair) -> None:
    assert (saved / "README.md").read_bytes() == b"# A card\n"
    assert not (saved_pair / "README.md").exists()


def test_an_inpainting_network_made_by_diffusers_loads_and_does_not_draw_out_of_text_alone(saved, tmp_path) -> None:
    import diffusers

    parts = diffusers.DiffusionPipeline.from_pretrained(saved).components
    config = {**parts["unet"].config, "in_channels": 9}
    parts["unet"] = diffusers.UNet2DConditionModel.from_config(config)
    inpaint = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    inpaint.save_pretrained(tmp_path / "p")
    loaded = load_pipeline(tmp_path / "p")
    expected = parts["unet"].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.unet.state_dict().items())
    with pytest.raises(ValueError, match=r"unet/config.json: in_channels is 9: an inpainting network, .* a mask"):
        generate(loaded, ["a"], seed=0, sampler="ddim", steps=1, guidance=1.0)


def test_frozen_parts_are_copied_across_file_systems(pipeline, saved) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == saved.stat().st_dev:
        pytest.skip("this machine has one file system only")
    folder = other / f"ldm-test-{os.getpid()}"
    try:
        save_pipeline(folder, pipeline, frozen_from=saved, card="# A card\n")
        earlier, later = files_of(saved), files_of(folder)
        assert earlier.keys() == later.keys()
        assert all(later[name].read_bytes() == earlier[name].read_bytes() for name in later)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_every_missing_file_is_named_in_one_error(saved, tmp_path) -> None:
    shutil.copytree(saved, tmp_path / "p")
    own = [names[0] for names in FILES]
    assert len(own) == 10
    for name in own:
        (tmp_path / "p" / name).rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError) as error:
            load_pipeline(tmp_path / "p")
        assert [line.strip() for line in str(error.value).splitlines()[1:]] == [name]
        (tmp_path / "away").rename(tmp_path / "p" / name)
    lost = ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"]
    for name in lost:
        (tmp_path / "p" / name).unlink()
    for attempt in (
        lambda: load_pipeline(tmp_path / "p"),
        lambda: save_pipeline(tmp_path / "q", make_pipeline(str(saved)), frozen_from=tmp_path / "p"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            attempt()
        assert [line.strip() for line in str(error.value).splitlines()[1:]] == lost
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_pipeline(tmp_path / "nothing")


def test_files_of_the_second_encoder_and_weights_that_are_pickles_are_named(saved_pair, tmp_path) -> None:
    shutil.copytree(saved_pair, tmp_path / "p")
    lost = [names[0] for names in FILES_OF_PAIR]
    assert len(lost) == 4
    for name in lost:
        (tmp_path / "p" / name).unlink()
    weights = tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError) as error:
        load_pipeline(tmp_path / "p")
    first, *others = [line.strip() for line in str(error.value).splitlines()]
    assert others == ["unet/diffusion_pytorch_model.safetensors", *lost]
    assert "(pickles are not read: unet/diffusion_pytorch_model.bin; `python tools/convert_checkpoint.py" in first
    assert f"{weights.with_suffix('.bin')} {weights}`" in first


def edit_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text())
    for name, value in changes.items():
        if value is ...:
            del values[name]
        else:
            values[name] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "FluxPipeline"},
            r"_class_name is 'FluxPipeline', expected one of 'Stable",
        ),
        ("scheduler/scheduler_config.json", {"beta_start": ..., "beta_end": ...}, r"lacks beta_start, beta_end"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, r"found trained_betas"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, r"prediction_type is 'flow', expected one of"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "cubic"}, r"scheduler_config\.json.*'cubic'"),
        ("model_index.json", {"_class_name": ...}, r"model_index\.json: _class_name is None, expected one of"),
        ("unet/config.json", {"cross_attention_dim": ...}, r"cross_attention_dim is 1280, but the states of text_enc"),
        ("unet/config.json", {"sample_size": None}, r"sample_size: not set"),
        (
            "unet/config.json",
            {"cross_attention_dim": 48},
            r"cross_attention_dim is 48, but the states of text_encoder/ are 32",
        ),
    ],
)
def test_what_a_folder_says_that_is_not_supported_is_named(saved, tmp_path, file, changes, message) -> None:
    shutil.copytree(saved, tmp_path / "p")
    edit_json(tmp_path / "p" / file, **changes)
    with pytest.raises(ValueError, match=message):
        generate(load_pipeline(tmp_path / "p"), ["a"], seed=0, sampler="ddim", steps=1, guidance=1.0)


def test_older_scheduler_files_without_a_prediction_type_are_epsilon(saved, tmp_path) -> None:
    shutil.copytree(saved, tmp_path / "p")
    assert load_pipeline(tmp_path / "p").parameterization == "v"
    edit_json(tmp_path / "p" / "scheduler" / "scheduler_config.json", prediction_type=...)
    assert load_pipeline(tmp_path / "p").parameterization == "epsilon"


def test_parts_that_do_not_fit_each_other_are_all_named_in_one_error(clip, pair, saved, saved_pair, tmp_path) -> None:
    # Parts of three pipelines: none of the network's four widths is that of its neighbours.
    shutil.copytree(saved_pair, tmp_path / "p")
    shutil.rmtree(tmp_path / "p" / "vae")
    tiny_autoencoder(latent_channels=16).save_pretrained(tmp_path / "p" / "vae")
    config = json.loads((tmp_path / "p" / "unet" / "config.json").read_text())
    config |= {"cross_attention_dim": 72, "projection_class_embeddings_input_dim": 6 * 8 + 24}
    (tmp_path / "p" / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="parts that do not fit each other") as error:
        load_pipeline(tmp_path / "p")
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "unet/config.json: in_channels is 4, but vae/config.json: latent_channels is 16 (expected 16, or 33 for "
        "inpainting)",
        "unet/config.json: out_channels is 4, but vae/config.json: latent_channels is 16 (expected 16, or 32 with "
        "learned variance)",
        "unet/config.json: cross_attention_dim is 72, but the states of text_encoder/ and text_encoder_2/ together are "
        "80 wide",
        "unet/config.json: projection_class_embeddings_input_dim is 72, so that beside 6 sizes of 8 "
        "(addition_time_embed_dim) 24 are left for pooled text, but text_encoder_2/config.json: projection_dim is 40",
    ]


def swap(folder: Path, part: str, other: Path) -> None:
    shutil.rmtree(folder / part)
    shutil.copytree(other / part, folder / part)


def test_a_network_of_xl_without_the_pair_and_the_reverse_are_named(saved, saved_pair, tmp_path) -> None:
    shutil.copytree(saved, tmp_path / "one")
    swap(tmp_path / "one", "unet", saved_pair)
    with pytest.raises(ValueError, match="do not fit each other") as error:
        load_pipeline(tmp_path / "one")
    assert "cross_attention_dim is 80, but the states of text_encoder/ are 32 wide" in str(error.value)
    assert "addition_embed_type is text_time, which takes pooled text, but model_index.json" in str(error.value)
    shutil.copytree(saved_pair, tmp_path / "two")
    swap(tmp_path / "two", "unet", saved)
    with pytest.raises(ValueError, match="do not fit each other") as error:
        load_pipeline(tmp_path / "two")
    assert "cross_attention_dim is 32, but the states of text_encoder/ and text_encoder_2/" in str(error.value)
    assert "addition_embed_type is None, but model_index.json names a pipeline with two" in str(error.value)


def test_another_model_in_a_part_s_folder_is_named(saved, tmp_path) -> None:
    for part, other, found, expected in (
        ("unet", "vae", "AutoencoderKL", "UNet2DConditionModel"),
        ("vae", "unet", "UNet2DConditionModel", "AutoencoderKL"),
    ):
        shutil.copytree(saved, tmp_path / part)
        shutil.rmtree(tmp_path / part / part)
        shutil.copytree(saved / other, tmp_path / part / part)
        with pytest.raises(ValueError, match=rf"{part}/config\.json.*_class_name is '{found}', expected '{expected}'"):
            load_pipeline(tmp_path / part)


def test_weights_that_are_cut_short_are_an_error_that_names_the_file(saved, tmp_path) -> None:
    shutil.copytree(saved, tmp_path / "p")
    for part in ("unet", "vae"):
        path = tmp_path / "p" / part / "diffusion_pytorch_model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(ValueError, match=f"{part}/diffusion_pytorch_model.safetensors"):
            load_pipeline(tmp_path / "p")
        path.write_bytes(content)
