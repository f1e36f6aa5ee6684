"""tools/convert_checkpoint.py: both directions without losing a byte; diffusers runs the folder as it runs the file."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FAMILIES, SCALING, UNETS, checkpoint, clip, make_unet, make_vae, vae_config
from tiny_models import make_clip_tokenizer
from torch import Tensor

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNet
from tools.convert_checkpoint import main

PREDICTION = {"sd2": ["--prediction_type", "v_prediction"]}
PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLPipeline",
}
UNET, VAE = "model.diffusion_model.", "first_stage_model."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_clip_tokenizer(folder, ["a p", "ap p", "r e"], pad_token="!")
    return str(folder)


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def words(family: str, tokenizer: str) -> list[str]:
    second = ["--tokenizer_2", tokenizer] if family == "sdxl" else []
    return ["--tokenizer", tokenizer, *second, *PREDICTION.get(family, [])]


def convert(*argv: object) -> None:
    assert main([str(word) for word in argv]) == 0


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The error of a conversion that fails, after which nothing is written, under any name."""
    folder = Path(str(argv[1])).parent
    before = sorted(folder.iterdir())
    assert main([str(word) for word in argv]) == 1
    assert sorted(folder.iterdir()) == before
    return capsys.readouterr().err


def identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert tensor.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8)), name


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}:{name}": t for file in files for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("sd1", torch.float32), ("sd2", torch.float16), ("inpainting", torch.bfloat16), ("sdxl", torch.float16)],
)
def test_compvis_to_diffusers_to_compvis_gives_the_same_bytes_of_every_tensor(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], family: str, dtype: torch.dtype
) -> None:
    tensors = checkpoint(family, averages=True)
    tensors = {name: t.to(dtype) if t.dtype == torch.float32 else t for name, t in tensors.items()}
    file = save(tensors, tmp_path / "a.safetensors")
    convert(file, tmp_path / "folder", *words(family, tokenizer))
    said = capsys.readouterr().out
    assert "kept in compvis_extra.safetensors: alphas_cumprod, betas" in said
    extra = load_file(tmp_path / "folder" / "compvis_extra.safetensors")
    places = {"alphas_cumprod", "betas", "logvar", "model_ema.decay", "model_ema.diffusion_modelout2bias"}
    if family == "sd2":
        places |= {f"cond_stage_model.model.{n}" for n in ("text_projection", "transformer.resblocks.2.ln_1.bias")}
    elif family == "sdxl":
        places |= {"conditioner.embedders.1.model.logit_scale"}
    else:
        places |= {"cond_stage_model.transformer.text_model.embeddings.position_ids"}
    assert places <= extra.keys()
    convert(tmp_path / "folder", tmp_path / "b.safetensors")
    identical(load_file(file), load_file(tmp_path / "b.safetensors"))
    # The family tells it all, but what SD 2.x predicts.
    assert [p.name for p in tmp_path.glob("b.*.json")] == (["b.scheduler.json"] if family == "sd2" else [])


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_to_compvis_to_diffusers_gives_the_same_bytes_of_every_tensor(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    save(checkpoint(family), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "first", *words(family, tokenizer))
    (tmp_path / "first" / "compvis_extra.safetensors").unlink()  # a folder that never was a single file
    convert(tmp_path / "first", tmp_path / "b.safetensors")
    said = "not converted: tokenizer" if family == "sd2" else "not converted: scheduler, tokenizer"
    assert said in capsys.readouterr().out
    convert(tmp_path / "b.safetensors", tmp_path / "second", *words(family, tokenizer))
    identical(folder_tensors(tmp_path / "first"), folder_tensors(tmp_path / "second"))
    for path in sorted((tmp_path / "first").rglob("*.json")):
        assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes()


def test_settings_that_a_single_file_cannot_tell_lie_beside_it_and_come_back(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL as DiffusersAutoencoderKL
    from diffusers import UNet2DConditionModel

    folder = tmp_path / "own"
    UNet2DConditionModel.from_config({**UNETS["sd1"], "attention_head_dim": 4}).save_pretrained(folder / "unet")
    vae = DiffusersAutoencoderKL.from_config(vae_config("sd1", scaling_factor=0.7, shift_factor=0.1))
    vae.save_pretrained(folder / "vae")
    convert(folder, tmp_path / "own.safetensors")
    assert sorted(p.name for p in tmp_path.glob("own.*.json")) == ["own.unet.json", "own.vae.json"]
    assert UNet.open(tmp_path / "own.safetensors")[0] == UNet.open(folder)[0]
    assert AutoencoderKL.open(tmp_path / "own.safetensors")[0] == AutoencoderKL.open(folder)[0]
    convert(tmp_path / "own.safetensors", tmp_path / "back")
    identical(folder_tensors(folder), folder_tensors(tmp_path / "back"))
    assert AutoencoderKL.open(tmp_path / "back")[0].scaling_factor == 0.7


def test_a_family_is_known_though_shapes_leave_its_heads_open(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    folder = tmp_path / "own"
    config = {**UNETS["sdxl"], "block_out_channels": [32, 96], "attention_head_dim": 1}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    make_vae("sdxl").save_pretrained(folder / "vae")
    convert(folder, tmp_path / "own.safetensors")
    assert [p.name for p in tmp_path.glob("own.*.json")] == ["own.unet.json"]
    convert(tmp_path / "own.safetensors", tmp_path / "back")
    identical(folder_tensors(folder), folder_tensors(tmp_path / "back"))
    assert UNet.open(tmp_path / "back")[0] == UNet.open(folder)[0]
    assert AutoencoderKL.open(tmp_path / "own.safetensors")[0].scaling_factor == SCALING["sdxl"]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_opens_the_folder_and_gives_the_picture_that_it_gives_from_the_file(
    tmp_path: Path, tokenizer: str, family: str
) -> None:
    tensors = checkpoint(family)
    file = save(tensors, tmp_path / "a.safetensors")
    convert(file, tmp_path / "folder", *words(family, tokenizer))
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["_class_name"] == PIPELINES[family]
    ours = DiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert type(ours).__name__ == PIPELINES[family]
    if family == "sd2":  # diffusers knows the last layer by its number in the full-size model
        renamed = {k.replace("resblocks.2.", "resblocks.23."): v for k, v in tensors.items()}
        file = save(renamed, tmp_path / "renamed.safetensors")
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    theirs = kind.from_single_file(
        file,
        config=str(tmp_path / "folder"),
        local_files_only=True,
        **({} if family == "sdxl" else {"safety_checker": None}),
    )
    pictures = []
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
        size = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}
        pictures.append(pipeline("a red apple", generator=torch.Generator().manual_seed(0), **size).images[0])
    assert pictures[0].std() > 0
    assert (pictures[0] == pictures[1]).all()
    assert ours.scheduler.config.prediction_type == ("v_prediction" if family == "sd2" else "epsilon")
    assert abs(float(ours.scheduler.alphas_cumprod[-1]) - 0.0046600985) < 1e-7


def test_an_inpainting_checkpoint_becomes_an_inpainting_pipeline(tmp_path: Path, tokenizer: str) -> None:
    file = save(checkpoint("inpainting"), tmp_path / "a.safetensors")
    convert(file, tmp_path / "folder", *words("inpainting", tokenizer))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert type(pipeline).__name__ == PIPELINES["inpainting"]
    assert pipeline.unet.config.in_channels == 9


def test_ema_takes_the_averages_for_the_unet_and_loses_neither(tmp_path: Path, tokenizer: str) -> None:
    tensors = checkpoint("sd1", averages=True)
    file = save(tensors, tmp_path / "a.safetensors")
    convert(file, tmp_path / "folder", *words("sd1", tokenizer), "--ema")
    average = UNet.from_pretrained(tmp_path / "folder")
    raw = make_unet("sd1").state_dict()
    assert all(torch.equal(tensor, raw[name] + 1) for name, tensor in average.state_dict().items())
    convert(tmp_path / "folder", tmp_path / "b.safetensors")
    identical(load_file(file), load_file(tmp_path / "b.safetensors"))


def test_averages_that_are_not_there_are_missed(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(checkpoint("sd1"), tmp_path / "a.safetensors")
    error = refused(capsys, file, tmp_path / "folder", *words("sd1", tokenizer), "--ema")
    assert re.search(r"there is no model_ema\.diffusion_model\w+ in the file; leave out --ema", error)


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_one_component_goes_to_a_file_by_itself_and_back(tmp_path: Path, component: str) -> None:
    model = make_unet("sd2") if component == "unet" else make_vae("sd2")
    model.save_pretrained(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "one.safetensors")
    assert not [name for name in load_file(tmp_path / "one.safetensors") if name.startswith((UNET, VAE))]
    opened = (UNet if component == "unet" else AutoencoderKL).from_pretrained(tmp_path / "one.safetensors")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in opened.state_dict().items())
    convert(tmp_path / "one.safetensors", tmp_path / "back")
    identical(folder_tensors(tmp_path / "folder"), folder_tensors(tmp_path / "back"))
    assert type(model).from_pretrained(tmp_path / "back").config.sample_size == model.config.sample_size


def test_sd2_asks_what_its_unet_predicts_and_writes_the_size_that_goes_with_it(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(checkpoint("sd2"), tmp_path / "a.safetensors")
    error = refused(capsys, file, tmp_path / "x", "--tokenizer", tokenizer)
    assert "--prediction_type v_prediction (models of 768 pixels)" in error
    assert "no file tells" in error
    for prediction, size in (("v_prediction", 96), ("epsilon", 64)):
        convert(file, tmp_path / prediction, "--tokenizer", tokenizer, "--prediction_type", prediction)
        config = json.loads((tmp_path / prediction / "unet" / "config.json").read_text())
        assert (config["sample_size"], config["upcast_attention"]) == (size, prediction == "v_prediction")


def test_the_marks_of_v_prediction_and_zero_terminal_snr_are_heeded(tmp_path: Path, tokenizer: str) -> None:
    tensors = {**checkpoint("sdxl"), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    file = save(tensors, tmp_path / "a.safetensors")
    convert(file, tmp_path / "folder", *words("sdxl", tokenizer))
    scheduler = json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
    convert(tmp_path / "folder", tmp_path / "b.safetensors")
    identical(load_file(file), load_file(tmp_path / "b.safetensors"))


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_tokenizer_comes_from_wherever_models_come_and_must_pad_as_openclip_was_trained(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    folder = "tokenizer_2" if family == "sdxl" else "tokenizer"
    file = save(checkpoint(family), tmp_path / "a.safetensors")
    make_clip_tokenizer(tmp_path / "end", ["a p"])
    given = [f"--{folder}", str(tmp_path / "end"), *PREDICTION.get(family, [])]
    first = ["--tokenizer", tokenizer] if family == "sdxl" else []
    error = refused(capsys, file, tmp_path / "x", *first, *given)
    assert re.search(rf"--{folder} .*end: it pads captions with id 514 \('<\|endoftext\|>'\).*trained with id 0", error)
    assert "OpenCLIP's (padded with !)" in refused(capsys, file, tmp_path / "x", *first, *PREDICTION.get(family, []))
    # A pipeline's folder: its own tokenizer for each.
    shutil.copytree(tokenizer, tmp_path / "pipeline" / "tokenizer_2")
    shutil.copytree(tokenizer if family == "sd2" else tmp_path / "end", tmp_path / "pipeline" / "tokenizer")
    pipeline = str(tmp_path / "pipeline")
    convert(file, tmp_path / "x", *words(family, pipeline))
    written = (tmp_path / "x" / folder / "tokenizer.json").read_bytes()
    assert written == (Path(tokenizer) / "tokenizer.json").read_bytes()
    assert "nowhere" in refused(capsys, file, tmp_path / "y", *words(family, str(tmp_path / "nowhere")))


def test_it_is_said_where_settings_come_from_which_are_assumed_and_which_weights_are_taken(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(checkpoint("sd1", averages=True), tmp_path / "a.safetensors")
    convert(file, tmp_path / "raw", *words("sd1", tokenizer))
    said = capsys.readouterr().out
    assert "no shape tells attention_head_dim 8, norm_num_groups 32, taken as published. The raw weights" in said
    assert "settings of an autoencoder from its shapes; no shape tells norm_num_groups 32, taken as published\n" in said
    values = {"_class_name": "AutoencoderKL", **vae_config("sd1", scaling_factor=0.5)}
    (tmp_path / "a.vae.json").write_text(json.dumps(values))
    convert(file, tmp_path / "averages", *words("sd1", tokenizer), "--ema")
    said = capsys.readouterr().out
    assert f"settings of an autoencoder from {tmp_path}/a.vae.json\n" in said
    assert "The raw weights" not in said
    (tmp_path / "a.vae.json").write_text(json.dumps({**values, "latent_channels": "x"}))
    assert refused(capsys, file, tmp_path / "x", *words("sd1", tokenizer)).startswith(f"error: {tmp_path}/a.vae.json: ")


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = checkpoint("sd1")
    file = save(tensors, tmp_path / "a.safetensors")
    assert "give --tokenizer FOLDER" in refused(capsys, file, tmp_path / "x").replace("\n", " ")
    assert "is there already" in refused(capsys, file, file)
    assert "no such file or folder" in refused(capsys, tmp_path / "no.safetensors", tmp_path / "x")
    assert "both single files" in refused(capsys, file, tmp_path / "b.safetensors")
    assert main([str(file), str(tmp_path / "no" / "x")]) == 1
    assert f"{tmp_path}/no: there is no such folder to write to" in capsys.readouterr().err
    (tmp_path / "b.vae.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    assert "b.vae.json would be read as the config of" in refused(
        capsys, tmp_path / "empty", tmp_path / "b.safetensors"
    )
    depth = {**tensors, UNET + "input_blocks.0.0.weight": torch.zeros(32, 5, 3, 3)}
    error = refused(capsys, save(depth, tmp_path / "f.safetensors"), tmp_path / "x", *words("sd1", tokenizer))
    assert "a UNet of 5 input channels: expected 4, or 9 for inpainting" in error
    lacking = dict(tensors)
    del lacking[UNET + "out.2.bias"], lacking[VAE + "encoder.conv_in.bias"]
    error = refused(capsys, save(lacking, tmp_path / "c.safetensors"), tmp_path / "x", *words("sd1", tokenizer))
    assert "does not hold the unet that it seems to:\n  missing: conv_out.bias (4,)" in error
    flat = {**tensors, VAE + "encoder.mid.attn_1.q.weight": torch.zeros(64, 64)}
    error = refused(capsys, save(flat, tmp_path / "d.safetensors"), tmp_path / "x", *words("sd1", tokenizer))
    assert "encoder.mid.attn_1.q.weight has shape (64, 64), expected (C, C, 1, 1)" in error
    error = refused(capsys, save(clip(64), tmp_path / "e.safetensors"), tmp_path / "x")
    assert "holds a text encoder (by itself), expected a UNet, an autoencoder or both" in error
    (tmp_path / "a" / "text_encoder").mkdir(parents=True)
    assert "no UNet and no autoencoder here" in refused(capsys, tmp_path / "a", tmp_path / "x.safetensors")


def test_a_text_encoder_that_has_no_place_in_a_single_file_is_refused(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(checkpoint("sd1"), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "folder", *words("sd1", tokenizer))
    config = tmp_path / "folder" / "text_encoder" / "config.json"
    values = json.loads(config.read_text())
    for change, message in (
        ({"model_type": "bert"}, "text_encoder/ is a bert with hidden_act 'quick_gelu'"),
        ({"num_attention_heads": 2}, "num_attention_heads is 2, but a single file has no config"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1"),
    ):
        config.write_text(json.dumps({**values, **change}))
        assert message in refused(capsys, tmp_path / "folder", tmp_path / "x.safetensors")
