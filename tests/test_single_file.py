"""Single files: what they are is recognized, what shapes tell is inferred, and what they do not tell is asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from published_configs import UNETS as PUBLISHED_UNETS
from published_configs import VAES as PUBLISHED_VAES
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    FAMILIES,
    SCALING,
    UNETS,
    WIDTHS,
    checkpoint,
    clip,
    make_unet,
    make_vae,
    openclip,
    unet_in_compvis,
    vae_config,
    vae_in_compvis,
)
from torch import Tensor

from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.inferred_config import unet_values, vae_values
from ldm.models.single_file import text_encoder_weights
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole checkpoint of each family in CompVis' names."""
    root = tmp_path_factory.mktemp("single")
    for family in FAMILIES:
        save(checkpoint(family, averages=family == "sd1"), root / f"{family}.safetensors")
    return {family: root / f"{family}.safetensors" for family in FAMILIES}


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def same_weights(ours: torch.nn.Module, theirs: Any) -> None:
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_unet_and_autoencoder_of_a_whole_checkpoint_open_with_the_config_of_their_family(
    files: dict[str, Path], family: str
) -> None:
    unet, vae = UNet.from_pretrained(files[family]), AutoencoderKL.from_pretrained(files[family])
    assert unet.config == UNetConfig.from_dict(UNETS[family])
    assert vae.config == AutoencoderConfig.from_dict(vae_config(family))
    assert vae.config.scaling_factor == SCALING[family]
    same_weights(unet, make_unet(family))  # not the averages, as diffusers takes them by default
    same_weights(vae, make_vae(family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("names", ["compvis", "diffusers"])
def test_a_unet_by_itself_opens_from_either_names(tmp_path: Path, family: str, names: str) -> None:
    model = make_unet(family)
    tensors = unet_in_compvis(model, UNETS[family]) if names == "compvis" else model.state_dict()
    opened = UNet.from_pretrained(save(tensors, tmp_path / "unet.safetensors"))
    assert opened.config == UNetConfig.from_dict(UNETS[family])
    same_weights(opened, model)


@pytest.mark.parametrize("name", list(PUBLISHED_UNETS))
def test_full_size_shapes_tell_the_published_config(name: str) -> None:
    published = UNetConfig.from_dict(PUBLISHED_UNETS[name])
    with torch.device("meta"):
        state = UNet2DConditionModel.from_config(PUBLISHED_UNETS[name]).state_dict()
    told = UNetConfig.from_dict(unet_values({k: tuple(v.shape) for k, v in state.items()}))
    told.sample_size, told.upcast_attention = published.sample_size, published.upcast_attention
    assert told == published


@pytest.mark.parametrize("name", list(PUBLISHED_VAES))
def test_full_size_shapes_tell_the_published_autoencoder_but_for_its_factors(name: str) -> None:
    published = AutoencoderConfig.from_dict(PUBLISHED_VAES[name])
    with torch.device("meta"):
        state = DiffusersAutoencoderKL.from_config(PUBLISHED_VAES[name]).state_dict()
    told = AutoencoderConfig.from_dict(vae_values({k: tuple(v.shape) for k, v in state.items()}))
    for untold in ("scaling_factor", "shift_factor", "sample_size"):
        setattr(told, untold, getattr(published, untold))
    assert told == published


@pytest.mark.parametrize("names", ["compvis", "diffusers"])
@pytest.mark.parametrize("channels", [4, 16])
def test_an_autoencoder_by_itself_asks_for_its_scaling_factor_and_takes_it_from_a_config_beside_it(
    tmp_path: Path, names: str, channels: int
) -> None:
    change: dict[str, Any] = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
    config = vae_config("sd1", **(change if channels == 16 else {}), scaling_factor=0.4, shift_factor=0.1)
    theirs = DiffusersAutoencoderKL.from_config(config)
    tensors = vae_in_compvis(theirs, config) if names == "compvis" else theirs.state_dict()
    # What a training program leaves in such files is no part of the model.
    tensors = {**tensors, "loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(())}
    file = save(tensors, tmp_path / "ae.v2.safetensors")
    with pytest.raises(ValueError, match="does not tell scaling_factor") as error:
        AutoencoderKL.from_pretrained(file)
    assert "0.18215 in SD 1.x and 2.x" in str(error.value)
    assert "0.13025 in SDXL" in str(error.value)
    assert str(tmp_path / "ae.v2.vae.json") in str(error.value)
    # The error's own draft is what has to be written.
    draft = next(line for line in str(error.value).splitlines() if line.startswith("{"))
    values = {**json.loads(draft), "scaling_factor": 0.4, "shift_factor": 0.1}
    released = save(tensors, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    for name, by_name in (("ae.v2.vae.json", file), ("ae.v2.json", file), ("config.json", released)):
        (tmp_path / name).write_text(json.dumps(values))
        opened = AutoencoderKL.from_pretrained(by_name)
        assert (opened.config.scaling_factor, opened.config.shift_factor) == (0.4, 0.1)
        same_weights(opened, theirs)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["sd1.safetensors", "model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_config_json_in_the_folder_of_a_whole_checkpoint_is_not_its_own(tmp_path: Path, name: str) -> None:
    file = save(checkpoint("sd1"), tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **vae_config("sdxl")}))
    assert AutoencoderKL.open(file)[0].scaling_factor == 0.18215
    values = {"_class_name": "UNet2DConditionModel", **UNETS["sd1"], "attention_head_dim": 4}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert UNet.open(file)[0].attention_head_dim == 8


@pytest.mark.parametrize("name", ["mine.safetensors", "model_2.safetensors"])
def test_config_json_is_not_that_of_a_file_with_a_name_of_its_own(tmp_path: Path, name: str) -> None:
    file = save(make_vae("sd1").state_dict(), tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **vae_config("sdxl")}))
    with pytest.raises(ValueError, match="does not tell scaling_factor"):
        AutoencoderKL.open(file)


def test_notes_of_another_program_beside_a_file_are_passed_by_and_settings_without_a_class_are_not(
    tmp_path: Path,
) -> None:
    file = save(checkpoint("sd1"), tmp_path / "sd1.safetensors")
    for notes in ({"description": "x", "sd version": "SD1", "preferred weight": 0.7}, {}, ["x"]):
        (tmp_path / "sd1.json").write_text(json.dumps(notes))
        assert UNet.open(file)[0] == UNetConfig.from_dict(UNETS["sd1"])
        assert AutoencoderKL.open(file)[0].scaling_factor == 0.18215
    (tmp_path / "sd1.json").write_text(json.dumps({**UNETS["sd1"], "attention_head_dim": 4}))
    assert UNet.open(file)[0].attention_head_dim == 4
    (tmp_path / "sd1.json").write_text(json.dumps({**UNETS["sd1"], "attention_head_dim": 4, "class_embed_type": "x"}))
    with pytest.raises(ValueError, match=r"sd1\.json: .*\n  class_embed_type") as error:
        UNet.open(file)
    assert str(tmp_path) in str(error.value)


def test_what_is_assumed_and_that_averages_are_not_taken_is_said_once(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    UNet.from_pretrained(files["sd1"])
    (line,) = [record.message for record in caplog.records]
    assert str(files["sd1"]) in line
    assert "no shape tells attention_head_dim 8, norm_num_groups 32, taken as published" in line
    assert "raw weights are taken, not the averaged ones (model_ema.*)" in line
    caplog.clear()
    AutoencoderKL.open(files["sd2"])
    UNet.open(files["sd2"])
    vae, unet = [record.message for record in caplog.records]
    assert vae.endswith("no shape tells norm_num_groups 32, taken as published")
    assert unet.endswith("no shape tells attention_head_dim [1, 2], norm_num_groups 32, taken as published")
    caplog.clear()
    make_unet("sd1").save_pretrained(tmp_path)
    UNet.open(tmp_path)
    assert not caplog.records


def test_a_scale_factor_in_the_file_goes_before_that_of_its_family(tmp_path: Path) -> None:
    tensors = {**checkpoint("sd1"), "scale_factor": torch.tensor(0.25)}
    assert AutoencoderKL.from_pretrained(save(tensors, tmp_path / "x.safetensors")).config.scaling_factor == 0.25


def test_latents_that_are_whitened_otherwise_are_refused(tmp_path: Path) -> None:
    tensors = {**checkpoint("sdxl"), "edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}
    with pytest.raises(ValueError, match="whitened by edm_mean and edm_std, which is not supported"):
        AutoencoderKL.from_pretrained(save(tensors, tmp_path / "x.safetensors"))


def test_a_config_beside_a_file_goes_before_what_shapes_tell_and_one_of_another_model_is_passed_by(
    tmp_path: Path,
) -> None:
    file = save(checkpoint("sd1"), tmp_path / "own.safetensors")
    values = {"_class_name": "UNet2DConditionModel", **UNETS["sd1"], "attention_head_dim": 4, "sample_size": 24}
    (tmp_path / "own.json").write_text(json.dumps(values))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    assert UNet.open(file)[0] == UNetConfig.from_dict(values)
    assert AutoencoderKL.open(file)[0] == AutoencoderConfig.from_dict(vae_config("sd1"))
    (tmp_path / "own.unet.json").write_text(json.dumps({**values, "attention_head_dim": 2}))
    assert UNet.open(file)[0].attention_head_dim == 2
    (tmp_path / "own.unet.json").write_text("{")
    with pytest.raises(ValueError, match=r"own\.unet\.json is not JSON"):
        UNet.open(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": [32, 96], "attention_head_dim": 1}, "attention_head_dim, the number of heads"),
        ({"projection_class_embeddings_input_dim": 2560}, "addition_time_embed_dim: .* 2560 features"),
    ],
)
def test_heads_and_added_conditioning_that_shapes_do_not_tell_are_asked_for(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = {**UNETS["sdxl"], **change}
    model = UNet2DConditionModel.from_config(config)
    file = save(unet_in_compvis(model, config), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        UNet.open(file)
    assert (
        f"Write the model's config.json (the settings of diffusers' UNet2DConditionModel) to {tmp_path}/x.unet.json"
        in (str(error.value))
    )
    (tmp_path / "x.unet.json").write_text(json.dumps(config))
    same_weights(UNet.from_pretrained(file), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders_of_a_checkpoint_compute_what_diffusers_makes_of_them(
    files: dict[str, Path], tmp_path: Path, family: str
) -> None:
    import transformers

    ids = torch.tensor([[500, 7, 9, 599, 3, 3]])
    for number, width in enumerate(WIDTHS[family], start=1):
        values, read = text_encoder_weights(files[family], number)
        model_class = getattr(transformers, values["architectures"][0])
        assert values["hidden_act"] == ("gelu" if family == "sd2" or number == 2 else "quick_gelu")
        assert (values["hidden_size"], values["num_attention_heads"]) == (width, width // 64)
        # 3 in the file: SD 2.x is used without its last, SDXL's second takes its last but one from a whole model.
        assert values["num_hidden_layers"] == (3 if number == 2 else 2)
        ours = model_class(transformers.CLIPTextConfig(**values)).eval()
        prefix = "" if hasattr(ours, "text_model") else "text_model."
        ours.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in read().items()})
        folder = tmp_path / f"text{number}"
        (folder / "text").mkdir(parents=True)
        transformers.CLIPTextConfig(**values).save_pretrained(folder / "text")
        stored = load_file(files[family])
        if family == "sd2":  # diffusers knows the last layer of SD 2.x by its number, 23
            stored = {k.replace("resblocks.2.", "resblocks.23."): v for k, v in stored.items()}
        theirs = create_diffusers_clip_model_from_ldm(
            model_class, stored, subfolder="text", config=str(folder), local_files_only=True
        ).eval()
        with torch.no_grad():
            assert torch.equal(ours(ids)[0], theirs(ids)[0])


def test_a_file_that_was_made_of_a_folder_has_lost_the_last_layer_already(tmp_path: Path) -> None:
    prefix = "cond_stage_model.model."
    tensors = {prefix + name: tensor for name, tensor in openclip(64).items() if name != "text_projection"}
    assert text_encoder_weights(save(tensors, tmp_path / "x.safetensors"), 1)[0]["num_hidden_layers"] == 3


@pytest.mark.parametrize(("layers", "left"), [(24, 23), (23, 23)])
def test_the_last_of_24_layers_is_left_out_though_the_projection_is_not_there(
    tmp_path: Path, layers: int, left: int
) -> None:
    prefix = "cond_stage_model.model."
    tensors = openclip(64, layers=layers, vocabulary=30)
    del tensors["text_projection"]
    file = save({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    values, read = text_encoder_weights(file, 1)
    assert values["num_hidden_layers"] == left
    assert sum(name.endswith("mlp.fc1.weight") for name in read()) == left


def test_a_text_encoder_that_is_not_there_or_not_whole_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a text encoder number 2 of a whole checkpoint"):
        text_encoder_weights(files["sd1"], 2)
    with pytest.raises(ValueError, match=r"holds a text encoder \(by itself\).* opened from its folder"):
        text_encoder_weights(save(clip(64), tmp_path / "clip.safetensors"), 1)
    tensors = checkpoint("sd2")
    lacking = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"
    del tensors[lacking]
    with pytest.raises(ValueError, match=f"1 tensors are missing:\n  {lacking}"):
        text_encoder_weights(save(tensors, tmp_path / "x.safetensors"), 1)
