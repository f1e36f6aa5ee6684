"""UNets and autoencoders from every source; wrong ones say what is there, what was expected and what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from published_configs import INPAINTING_2, UNETS, VAES
from safetensors.torch import load_file, save_file
from test_single_file import same_weights, save
from tiny_checkpoints import checkpoint, clip, make_unet, make_vae

from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig

MODELS: dict[str, type[UNet] | type[AutoencoderKL]] = {"unet": UNet, "vae": AutoencoderKL}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """unet/ and vae/ as diffusers saves them, and a model_index.json."""
    folder = tmp_path_factory.mktemp("pipeline")
    make_unet("sd1").save_pretrained(folder / "unet")
    make_vae("sd1").save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", list(UNETS))
def test_the_published_config_of_every_unet_is_accepted_as_it_is(name: str) -> None:
    config = UNetConfig.from_dict(UNETS[name])
    assert config.in_channels == (9 if "inpainting" in name else 4)
    assert config.per_level("attention_head_dim")[-1] == (8 if name in ("sd1.4", "sd1.5", "inpainting 1.5") else 20)


def test_the_inpainting_unet_of_sd2_has_the_parameters_of_sd2_and_those_of_five_more_channels() -> None:
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(INPAINTING_2))
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724 + 5 * 320 * 9
    assert len(unet.state_dict()) == 686


@pytest.mark.parametrize("name", list(VAES))
def test_the_published_config_of_every_autoencoder_is_accepted_with_its_factors(name: str) -> None:
    config = AutoencoderConfig.from_dict(VAES[name])
    factors = {"sdxl": (0.13025, None), "sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}
    assert (config.scaling_factor, config.shift_factor) == factors.get(name.split()[0], (0.18215, None))
    assert config.force_upcast


def test_an_autoencoder_of_16_channels_has_the_parameters_of_the_4_channel_one_but_for_its_latents() -> None:
    with torch.device("meta"):
        state = AutoencoderKL(AutoencoderConfig.from_dict(VAES["sd3 vae"])).state_dict()
    # 83,653,863 with 4 channels; 12 more in and out of 3x3 convolutions of 512, and no 1x1 convolutions.
    grown = 83_653_863 + 24 * (512 * 9 + 1) + 512 * 12 * 9 - (8 * 8 + 8) - (4 * 4 + 4)
    assert sum(tensor.numel() for tensor in state.values()) == grown
    assert len(state) == 248 - 4


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_a_component_is_found_by_itself_and_in_its_pipeline(pipeline: Path, component: str) -> None:
    theirs = make_unet("sd1") if component == "unet" else make_vae("sd1")
    for source in (pipeline, pipeline / component, pipeline / component / WEIGHTS):
        same_weights(MODELS[component].from_pretrained(source), theirs)


def test_a_pipeline_that_lacks_the_component_is_named_with_what_it_has(pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline, tmp_path / "p")
    shutil.rmtree(tmp_path / "p" / "vae")
    with pytest.raises(FileNotFoundError, match=r"has no vae/; it has unet"):
        AutoencoderKL.from_pretrained(tmp_path / "p")


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
def test_a_variant_by_itself_is_read_and_beside_the_full_file_it_is_not(
    pipeline: Path, tmp_path: Path, variant: str, sharded: bool, stem: str
) -> None:
    full = load_file(pipeline / "unet" / WEIGHTS)
    half = {name: tensor.to(torch.float16 if variant == "fp16" else torch.bfloat16) for name, tensor in full.items()}
    shutil.copy(pipeline / "unet" / "config.json", tmp_path)
    if sharded:
        names = list(half)
        parts = {f"{stem}.{variant}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for file, part in parts.items():
            save_file({name: half[name] for name in part}, tmp_path / file)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        other = f"{stem}.{variant}.safetensors.index.json"
        for name in (f"{stem}.safetensors.index.{variant}.json", other):
            (tmp_path / other).unlink(missing_ok=True)
            (tmp_path / name).write_text(json.dumps(index))
            opened = UNet.from_pretrained(tmp_path).state_dict()
            assert all(torch.equal(opened[key], tensor.float()) for key, tensor in half.items())
    else:
        save_file(half, tmp_path / f"{stem}.{variant}.safetensors")
        save_file({"x": torch.zeros(1)}, tmp_path / "another.safetensors")
    opened = UNet.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(opened[name], tensor.float()) for name, tensor in half.items())
    save_file(full, tmp_path / f"{stem}.safetensors")
    opened = UNet.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(opened[name], tensor) for name, tensor in full.items())


@pytest.mark.parametrize(("wanted", "given"), [("unet", "vae"), ("vae", "unet")])
def test_a_component_given_as_the_other_is_refused_in_every_form(
    pipeline: Path, tmp_path: Path, wanted: str, given: str
) -> None:
    model = MODELS[wanted]
    with pytest.raises(ValueError, match=r"_class_name is '.*', expected '.*': this is another model"):
        model.from_pretrained(pipeline / given)
    label = {"unet": "a UNet", "vae": "an autoencoder"}
    with pytest.raises(ValueError, match=f"holds {label[given]} in diffusers' names, expected {label[wanted]}"):
        model.from_pretrained(pipeline / given / WEIGHTS)
    whole = checkpoint("sd1")
    prefix = "model.diffusion_model." if given == "unet" else "first_stage_model."
    file = save({k: v for k, v in whole.items() if k.startswith(prefix)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"holds {label[given]} in CompVis' names, expected {label[wanted]}"):
        model.from_pretrained(file)
    # The config of the one with the weights of the other: the error says so before it lists all tensors.
    shutil.copytree(pipeline / wanted, tmp_path / "mixed")
    shutil.copy(pipeline / given / WEIGHTS, tmp_path / "mixed")
    with pytest.raises(ValueError, match=f"they are those of {label[given]} in diffusers' names, not of"):
        model.from_pretrained(tmp_path / "mixed")


@pytest.mark.parametrize("wanted", ["unet", "vae"])
def test_a_text_encoder_is_refused_in_every_form(tmp_path: Path, wanted: str) -> None:
    file = save(clip(64), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds a text encoder \(by itself\), expected"):
        MODELS[wanted].from_pretrained(file)
    values = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"not supported:\n  architectures: .* is not a known setting\n  model_type"):
        MODELS[wanted].from_pretrained(tmp_path)
    file = save({f"cond_stage_model.transformer.{k}": v for k, v in clip(64).items()}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"holds a text encoder \(cond_stage_model.transformer.\), expected"):
        MODELS[wanted].from_pretrained(file)


@pytest.mark.parametrize("wanted", ["unet", "vae"])
@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_truncated_file_is_refused_by_name_and_says_to_fetch_it_again(
    pipeline: Path, tmp_path: Path, wanted: str, form: str
) -> None:
    shutil.copytree(pipeline / wanted, tmp_path / "m")
    file = tmp_path / "m" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=rf"{file} is damaged or no safetensors file .*; fetch or copy it again"):
        MODELS[wanted].from_pretrained(tmp_path / "m" if form == "folder" else file)


def edit(folder: Path, **change: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    values |= change
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "DELETE"}))


@pytest.mark.parametrize(
    ("wanted", "field", "message"),
    [
        ("unet", "cross_attention_dim", "cross_attention_dim is 1280 by default, as the config does not name it, where "
         "the weights have 64"),
        ("unet", "layers_per_block", "layers_per_block is 2 by default, as the config does not .* have 1"),
        ("unet", "block_out_channels", r"expected 4 .*\(not in the file, so taken by default: block_out_channels\)"),
        ("vae", "block_out_channels", r"each of the 1 levels .* \(not in the file, so taken .*: block_out_channels\)"),
        ("vae", "down_block_types", r"down_block_types: found .* \(not in the file, so taken by default: down_block_"),
    ],
)  # fmt: skip
def test_a_field_that_a_config_lacks_is_named(
    pipeline: Path, tmp_path: Path, wanted: str, field: str, message: str
) -> None:
    shutil.copytree(pipeline / wanted, tmp_path / "m")
    edit(tmp_path / "m", **{field: "DELETE"})
    with pytest.raises(ValueError, match=message) as error:
        MODELS[wanted].from_pretrained(tmp_path / "m")
    assert str(tmp_path / "m") in str(error.value)


def test_a_field_that_differs_from_the_weights_is_named_with_both_values(pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline / "vae", tmp_path / "m")
    edit(tmp_path / "m", latent_channels=16)
    with pytest.raises(
        ValueError, match=r"latent_channels is 16 where the weights have 4:\n  .*wrong shape: "
    ) as error:
        AutoencoderKL.from_pretrained(tmp_path / "m")
    assert str(error.value).count("wrong shape: ") == 7


@pytest.mark.parametrize("wanted", ["unet", "vae"])
@pytest.mark.parametrize("content", ["{", "", "\x00"])
def test_a_config_that_is_not_json_is_refused_by_name(
    pipeline: Path, tmp_path: Path, wanted: str, content: str
) -> None:
    shutil.copytree(pipeline / wanted, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"m/config\.json is not JSON .*; fetch or copy it again"):
        MODELS[wanted].from_pretrained(tmp_path / "m")


def test_a_checkpoint_that_lacks_tensors_or_has_others_lists_them_all(tmp_path: Path) -> None:
    tensors = checkpoint("sd1")
    prefix = "model.diffusion_model."
    del tensors[prefix + "out.2.bias"], tensors[prefix + "middle_block.0.in_layers.0.bias"]
    tensors[prefix + "input_blocks.1.0.lora_up.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="3 differences") as error:
        UNet.from_pretrained(save(tensors, tmp_path / "a.safetensors"))
    for line in (
        "missing: conv_out.bias (4,)",
        "missing: mid_block.resnets.0.norm1.bias (64,)",
        "unexpected: input_blocks.1.0.lora_up.weight (2, 2)",
    ):
        assert line in str(error.value)
