"""What a run is told where it differs from its source's training: the files of diffusers, and the marks of one file."""

import json
from pathlib import Path

import pytest
import tiny_checkpoints
import tiny_sources
import torch
from diffusers import DDIMScheduler
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from ldm.diffusion.continuous import ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.models.autoencoder import AutoencoderConfig
from ldm.pipeline.scheduler import TrainedWith, write_scheduler
from ldm.training.initial_weights import objective_changes

FILE = "diffusion_pytorch_model.safetensors"
XL = {"_class_name": "StableDiffusionXLPipeline"}


def changes(
    source: Path | str, predicted: str = "epsilon", caption: str | None = None, vae: dict | None = None, **noise
) -> list[str]:
    """The sentences for a run with one text encoder, unless `caption` tells what its two have for no caption."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    autoencoder = AutoencoderConfig(**blocks, block_out_channels=[32], **(vae or {}))
    own = TrainedWith(Schedule(ScheduleConfig(**noise)), predicted)
    found = objective_changes(str(source), own, caption, autoencoder)
    assert all(one.startswith("warning: ") for one in found)
    return [one.removeprefix("warning: ") for one in found]


def pipeline(folder: Path, index: dict | None = None, vae: dict | None = None, **scheduler) -> Path:
    folder.mkdir(parents=True)
    (folder / "unet").mkdir()
    (folder / "model_index.json").write_text(json.dumps(index or {"_class_name": "StableDiffusionPipeline"}))
    released = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    DDIMScheduler(**(released | scheduler)).save_pretrained(folder / "scheduler")
    if vae is not None:
        (folder / "vae").mkdir()
        (folder / "vae/config.json").write_text(json.dumps(vae))
    return folder


def test_another_prediction_and_another_schedule_than_the_folders_are_said(tmp_path):
    folder = pipeline(tmp_path / "p", prediction_type="v_prediction")
    (folder / "unet" / FILE).touch()
    for source in (folder, folder / "unet", folder / "unet" / FILE):
        assert changes(source, "v") == []
        assert changes(source, beta_end=0.02) == [
            "objective: the source predicts v, this run trains it to predict epsilon",
            "noise.beta_end: 0.012 became 0.02",
        ]
    pipeline(tmp_path / "other", beta_schedule="linear", trained_betas=[0.1, 0.2])
    (sentence,) = changes(tmp_path / "other")
    assert "could not be compared" in sentence
    assert "trained_betas" in sentence


def test_what_is_not_told_is_not_guessed(tmp_path):
    tiny_sources.make_unet(tmp_path / "unet")
    for source in (tmp_path / "unet", tmp_path / "unet" / FILE, "owner/name", "./nowhere"):
        assert changes(source, beta_end=0.02) == []


@pytest.mark.parametrize(
    ("index", "trained"),
    [
        (XL, "zeros"),  # what diffusers takes where the file does not say
        (XL | {"force_zeros_for_empty_prompt": True}, "zeros"),
        (XL | {"force_zeros_for_empty_prompt": False}, "encoded"),
        ({"_class_name": "StableDiffusionXLInpaintPipeline"}, "zeros"),
        ({"_class_name": "StableDiffusionPipeline"}, None),
    ],
)
def test_another_empty_caption_than_that_of_sdxls_training_is_said(tmp_path, index, trained):
    folder = pipeline(tmp_path / "p", index)
    for given in ("zeros", "encoded", None):
        found = changes(folder, caption=given)
        if None in (trained, given) or given == trained:
            assert found == []
        else:
            (sentence,) = found
            assert sentence.startswith(f"empty_caption: the source was trained with {trained} ")
            assert f"this run has {given}; to go on as it was trained, set empty_caption to {trained}" in sentence


def test_latents_of_another_scale_or_shift_are_said(tmp_path):
    folder = pipeline(tmp_path / "p", vae={"scaling_factor": 0.13025, "shift_factor": 0.1})
    assert changes(folder, vae={"scaling_factor": 0.13025, "shift_factor": 0.1}) == []
    scale, shift = changes(folder)
    assert scale.startswith("autoencoder: the source was trained on latents of scaling_factor 0.13025, those of this")
    assert "have 0.18215; take the source's own autoencoder" in scale
    assert "of shift_factor 0.1, those of this run have 0;" in shift
    # A file of diffusers' first releases names no factor: it is that of Stable Diffusion.
    assert changes(pipeline(tmp_path / "old", vae={})) == []
    # In a checkpoint of this program the shift is inside the convolutions.
    own = pipeline(tmp_path / "own", vae={"scaling_factor": 0.18215, "shift_factor": None})
    assert len(changes(own, vae={"shift_factor": 0.1})) == 1
    (own / "hashes.json").write_text("{}")
    assert changes(own, vae={"shift_factor": 0.1}) == []
    assert len(changes(own, vae={"shift_factor": 0.1, "scaling_factor": 0.5})) == 1


def test_of_a_pipeline_on_the_hub_the_small_files_are_asked_for_and_no_weights(tmp_path, monkeypatch):
    files = ["model_index.json", "scheduler/scheduler_config.json", "vae/config.json", f"vae/{FILE}", f"unet/{FILE}"]
    asked = []

    def snapshot_download(repository: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.extend(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(tmp_path / "p")

    pipeline(tmp_path / "p", XL, vae={"scaling_factor": 0.13025})
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert [one.split(":")[0] for one in changes("owner/sdxl", caption="encoded")] == ["empty_caption", "autoencoder"]
    assert set(asked) == set(files[:3])


def test_files_that_cannot_be_read_are_told(tmp_path):
    folder = pipeline(tmp_path / "p", vae={})
    for name, setting in (("model_index.json", "empty_caption"), ("vae/config.json", "autoencoder")):
        (folder / name).write_text("{")
        assert any(one.startswith(f"{setting}: ") and name in one for one in changes(folder, caption="zeros"))


def single(folder: Path, family: str, *marks: str) -> Path:
    """A whole checkpoint of a family, in a folder of the name that some programs keep networks in."""
    tensors = tiny_checkpoints.checkpoint(family) | {mark: torch.zeros(0) for mark in marks}
    path = folder / "unet" / f"{family}{''.join(marks)}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def test_the_marks_of_a_single_file_are_compared_with_objective_and_noise(tmp_path):
    sdxl = {"caption": "zeros", "vae": {"scaling_factor": 0.13025}}
    marked, plain = single(tmp_path, "sdxl", "v_pred", "ztsnr"), single(tmp_path, "sdxl")
    assert changes(marked, "v", rescale_betas_zero_snr=True, **sdxl) == []
    assert changes(marked, **sdxl) == [
        "objective: the source predicts v (its file carries the mark v_pred), this run trains it to predict epsilon",
        "noise.rescale_betas_zero_snr: True became False",
    ]
    assert changes(plain, **sdxl) == []
    assert changes(plain, "v", beta_end=0.02, rescale_betas_zero_snr=True, **sdxl) == [
        "objective: the source predicts epsilon (its file carries no mark v_pred), this run trains it to predict v",
        "noise.beta_end: 0.012 became 0.02",
        "noise.rescale_betas_zero_snr: False became True",
    ]


def test_empty_caption_and_latents_of_a_single_file_are_those_of_its_family(tmp_path):
    caption, scale = changes(single(tmp_path, "sdxl"), caption="encoded")
    assert caption.startswith("empty_caption: the source was trained with zeros")
    assert "scaling_factor 0.13025, those of this run have 0.18215" in scale
    assert changes(single(tmp_path, "sd1")) == []


@pytest.mark.parametrize("predicted", ["epsilon", "v"])
def test_a_single_file_of_sd2_does_not_tell_what_it_predicts(tmp_path, predicted):
    (sentence,) = changes(single(tmp_path, "sd2"), predicted)
    assert "single file like those of SD 2.x, which does not tell what its network predicts" in sentence
    assert f"this run trains it to predict {predicted}" in sentence


def test_a_scheduler_beside_a_single_file_tells_what_it_predicts_and_its_noise(tmp_path):
    file = single(tmp_path, "sd2")
    written = (
        pipeline(tmp_path / "p", prediction_type="v_prediction", beta_end=0.02) / "scheduler/scheduler_config.json"
    )
    written.rename(Path(file).with_suffix(".scheduler.json"))
    assert changes(file, "v") == ["noise.beta_end: 0.02 became 0.012"]
    assert changes(file, "epsilon")[0] == "objective: the source predicts v, this run trains it to predict epsilon"


def test_another_kind_of_noise_than_the_folders_is_said(tmp_path):
    flow = TrainedWith(ContinuousSchedule(ContinuousScheduleConfig(kind="flow")), "flow")
    edm = TrainedWith(ContinuousSchedule(ContinuousScheduleConfig(kind="edm", sigma_max=50.0)), "edm", 0.5)
    other = TrainedWith(ContinuousSchedule(ContinuousScheduleConfig(kind="edm")), "edm", 0.5)
    timesteps = TrainedWith(Schedule(ScheduleConfig()), "epsilon")
    folder, vae = pipeline(tmp_path / "p"), AutoencoderConfig()

    def said(of: TrainedWith, run: TrainedWith) -> list[str]:
        write_scheduler(folder, of)
        return objective_changes(str(folder), run, None, vae)

    for one in (flow, edm, timesteps):
        assert said(one, one) == []
    assert said(timesteps, flow) == [
        "warning: objective: the source predicts epsilon, this run trains it to predict flow",
        "warning: noise: timesteps became continuous flow",
    ]
    assert said(flow, edm)[1] == "warning: noise: continuous flow became continuous edm"
    assert said(edm, other) == ["warning: continuous_noise.sigma_max: 50.0 became 80.0"]
    assert said(other, other._replace(sigma_data=1.0)) == ["warning: objective.sigma_data: 0.5 became 1.0"]
    # A whole checkpoint in one file is of timesteps, a network by itself of what nobody knows.
    assert "noise: timesteps became continuous flow" in str(
        objective_changes(str(single(tmp_path, "sd1")), flow, None, vae)
    )
