"""A network like SDXL's through the training program: two text encoders, pooled text and sizes, dropped captions zero.

The reference is diffusers with transformers: a step's loss out of the same pictures, captions and draws.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_sources
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from forked_runs import ForkServer
from safetensors.torch import load_file
from tiny_models import LENGTH, make_sdxl_pair
from training_runs import assert_same_state, metrics, train

from ldm.config import RunConfig, load_config
from ldm.data.batch import Batch
from ldm.data.loader import make_loader
from ldm.data.manifest import Manifest
from ldm.data.positions import Positions
from ldm.models.text_conditioner import TextConditioner
from ldm.train import conditioning_of
from tools import encode_latents
from tools.replay import replay

STEPS, BATCH, SIDE = 6, 8, 16
UNET = {
    "sample_size": SIDE // 2,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 32 + 48,
    "use_linear_projection": True,
    "norm_num_groups": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 40,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Raw and encoded shards, the parts, a config; the folder's `config.yaml` trains on raw shards."""
    folder = tmp_path_factory.mktemp("sdxl")
    tiny_sources.make_pictures(folder / "raw")
    tiny_sources.make_vae(folder / "vae")
    make_sdxl_pair(folder / "text")
    encoder = {"source": str(folder / "text"), "layer": "penultimate_without_norm"}
    settings = {
        "run_dir": "run",
        "autoencoder": str(folder / "vae"),
        "data": {"shards": str(folder / "raw"), "resolution": SIDE, "workers": 0, "caption_dropout": 0.3},
        "text_encoder": encoder,
        "text_encoder_2": encoder,
        "empty_caption": "zeros",
        "unet": UNET,
        "encoding": {"shards": str(folder / "raw"), "text_states": True, "workers": 0},
        "optimizer": {"lr": 1e-2, "warmup_steps": 0, "schedule": "constant"},
        "ema": {"decay": 0.0},
        "training": {"steps": STEPS, "global_batch": BATCH, "checkpoint_every": 4, "keep_checkpoints": 0},
        "wrapping": {"mixed_precision": "no", "attention": "sdpa"},
        "metrics": {"log_every": 1, "tensorboard": False},
        "previews": {"every": 0},
        "validation": {"every": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    anew()
    assert encode_latents.main([f"--config={folder / 'config.yaml'}", f"--data.shards={folder / 'encoded'}"]) == 0
    return folder


@pytest.fixture(scope="module")
def undisturbed(place) -> Path:
    train(place / "undisturbed", "", config=place / "config.yaml")
    return place / "undisturbed"


def anew() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def batches(config: RunConfig, shards: Path, steps: int) -> list[Batch]:
    """The global batches of the first steps."""
    positions = Positions(rank=0, world=1, micro_batch=BATCH, accumulation=1, start_step=0, stop_step=steps)
    latent_shape = (4, SIDE // 2, SIDE // 2)
    return list(make_loader(config.data, Manifest.load(shards), config.seed, positions, latent_shape=latent_shape))


def test_a_steps_loss_is_that_of_diffusers_on_the_same_pictures_captions_and_draws(place, undisturbed):
    # Order and values of the sizes, the joined states, pooled text, zeros where dropped, the scaling factor once.
    config, checkpoint = load_config(place / "config.yaml"), undisturbed / "checkpoints/step-00000004"
    pipeline = DiffusionPipeline.from_pretrained(checkpoint)
    assert type(pipeline) is StableDiffusionXLPipeline
    pipeline.unet.load_state_dict(load_file(checkpoint / "training_state/unet.safetensors"))
    made = tiny_sources.make_pictures(place / "again")
    batch = batches(config, place / "raw", 5)[4]
    assert 0 < int(batch.dropped.sum()) < BATCH
    rows = [made[int(key.split("/")[1])] for key in batch.keys]
    assert [caption for _, caption in rows] == batch.captions

    with torch.no_grad():
        states, empty, pooled, empty_pooled = pipeline.encode_prompt(batch.captions)
        assert not empty.any()  # what the config says, and the checkpoint after it
        assert not empty_pooled.any()
        dropped = batch.dropped
        states = torch.where(dropped[:, None, None], empty, states)
        pooled = torch.where(dropped[:, None], empty_pooled, pooled)
        time_ids = torch.cat([sizes_of(pipeline, pixels.shape[:2]) for pixels, _ in rows])
        assert torch.equal(time_ids, batch.sizes)
        assert len(batch.sizes.unique(dim=0)) > 4
        moments = pipeline.vae.encode(batch.images).latent_dist
        latents = (moments.mean + moments.std * batch.posterior_noise) * pipeline.vae.config.scaling_factor
        t = (batch.u * 1000).long()
        noisy = pipeline.scheduler.add_noise(latents, batch.noise, t)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        predicted = pipeline.unet(noisy, t, states, added_cond_kwargs=added).sample
    expected = (predicted - batch.noise).square().mean().item()
    assert metrics(undisturbed)[4]["loss"] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(1.0, abs=0.01)  # the network does say something by then


def sizes_of(pipeline, shape: tuple[int, int]) -> torch.Tensor:
    """diffusers' time_ids of a picture resized to the shorter side and cropped at its center."""
    height, width = shape
    scale = SIDE / min(shape)
    crop = ((round(height * scale) - SIDE + 1) // 2, (round(width * scale) - SIDE + 1) // 2)
    ids = pipeline._get_add_time_ids((height, width), crop, (SIDE, SIDE), torch.float32, 40)
    return ids.float()


def test_encoded_shards_with_stored_text_give_the_losses_of_raw_ones(place, undisturbed, tmp_path):
    config = load_config(place / "config.yaml")
    (first,) = batches(config, place / "encoded", 1)
    assert first.images is None
    assert first.text_states.shape == (BATCH, LENGTH, 80)
    assert first.text_pooled.shape == (BATCH, 40)
    lines = train(
        tmp_path / "run", place / "encoded", f"--data.shards={place / 'encoded'}", config=place / "config.yaml"
    )
    for ours, theirs in zip(lines, metrics(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)  # moments and text are stored in float16
        assert ours["captions_dropped"] == theirs["captions_dropped"]


@pytest.mark.parametrize("empty_caption", ["zeros", "encoded"])
@pytest.mark.parametrize("kind", ["raw", "encoded"])
def test_dropped_captions_lose_states_and_pooled_text(place, kind, empty_caption):
    config = load_config(place / "config.yaml")
    text_encoder = TextConditioner.load([config.text_encoder, config.text_encoder_2], "cpu", empty_caption)
    (batch,) = batches(config, place / kind, 1)
    batch.dropped = torch.arange(BATCH) % 3 == 0
    found = conditioning_of(SimpleNamespace(pipeline=SimpleNamespace(text_encoder=text_encoder)), batch)
    written = text_encoder.encode(
        ["" if drop else text for drop, text in zip(batch.dropped, batch.captions, strict=True)]
    )
    if empty_caption == "zeros":
        written.text[batch.dropped] = 0
        written.pooled[batch.dropped] = 0
    torch.testing.assert_close(found.text, written.text, rtol=1e-3, atol=5e-3)
    torch.testing.assert_close(found.pooled, written.pooled, rtol=1e-3, atol=5e-3)
    assert found.sizes is batch.sizes


def test_two_processes_give_the_losses_of_one(place, undisturbed, tmp_path):
    with ForkServer() as server:
        words = [f"--config={place / 'config.yaml'}", "--run_dir=run", "--training.max_micro_batch=2"]
        server.start(tmp_path, words, 2).finish()
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["captions_dropped"] == theirs["captions_dropped"]


def test_previews_and_validation_leave_the_run_as_it_was(place, undisturbed, tmp_path):
    run = tmp_path / "run"
    prompts = ("--previews.prompts=[red, ape]", "--previews.every=3", "--previews.steps=2")
    held_out = (f"--data.validation={place / 'raw'}", "--validation.every=3", "--validation.samples=16")
    lines = train(run, "", *prompts, *held_out, config=place / "config.yaml")
    assert len(list((run / "samples").iterdir())) == 2
    assert len([line for line in lines if "validation_loss" in line]) == 2
    assert_same_state(run / "checkpoints/latest", undisturbed / "checkpoints/latest")


def test_resuming_gives_the_undisturbed_checkpoint_byte_by_byte_in_whatever_folder(place, undisturbed, tmp_path):
    run = tmp_path / "elsewhere"
    shutil.copytree(undisturbed, run, symlinks=True)
    shutil.rmtree(run / "checkpoints/step-00000006")
    train(run, "", config=place / "config.yaml")
    ours, theirs = (folder / "checkpoints/step-00000006" for folder in (run, undisturbed))
    names = sorted(str(path.relative_to(theirs)) for path in theirs.rglob("*") if path.is_file())
    assert {"text_encoder_2/model.safetensors", "README.md", "tokenizer_2/tokenizer_config.json"} <= set(names)
    differing = [name for name in names if (ours / name).read_bytes() != (theirs / name).read_bytes()]
    assert differing == ["hashes.json", "training_state/config.yaml"]  # this run_dir is not that


def test_frozen_parts_of_both_encoders_are_linked_from_an_earlier_checkpoint(place, tmp_path):
    run = tmp_path / "run"
    train(run, "", "--training.checkpoint_every=2", config=place / "config.yaml")
    name = "text_encoder_2/model.safetensors"
    first, last = (run / f"checkpoints/step-0000000{step}" / name for step in (2, 6))
    assert first.stat().st_ino == last.stat().st_ino


def test_going_on_from_a_network_that_knows_zeros_with_an_encoded_empty_caption_is_said(
    place, undisturbed, tmp_path, capfd
):
    words = (f"--init_from={undisturbed}", "--training.steps=1")
    for empty_caption, said in (("zeros", False), ("encoded", True)):
        run = tmp_path / empty_caption
        train(run, "", *words, f"--empty_caption={empty_caption}", config=place / "config.yaml")
        warning = "warning: empty_caption: the source was trained with zeros"
        assert (warning in capfd.readouterr().err) is said
        assert (warning in (run / "checkpoints/latest/README.md").read_text()) is said


def test_a_step_is_computed_again_by_replay(undisturbed):
    anew()
    assert list(replay(undisturbed, 6, None, None))[-1]["loss"] == metrics(undisturbed)[5]["loss"]


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (
            ["--text_encoder_2=null", "--empty_caption=encoded", "--text_encoder.layer=last", "--unet.in_channels=9"],
            [
                "unet.in_channels is 9: an inpainting network",
                "unet.addition_embed_type is text_time",
                "set text_encoder_2",
                "unet.cross_attention_dim is 80, but the text encoder's states are 32 wide",
            ],
        ),
        (
            ["--unet.projection_class_embeddings_input_dim=90", "--unet.cross_attention_dim=32"],
            [
                "which leaves 42 for pooled text, but that of text_encoder_2 is 40 wide: expected 88",
                "both text encoders' joined states are 80 wide",
            ],
        ),
        (
            [
                "--unet.addition_embed_type=null",
                "--unet.addition_time_embed_dim=null",
                "--unet.projection_class_embeddings_input_dim=null",
            ],
            ["text_encoder_2 is set, but the UNet has no place for its pooled text"],
        ),
    ],
)
def test_a_pair_that_does_not_fit_the_network_is_told_with_all_settings_at_once(place, tmp_path, options, messages):
    with pytest.raises(ValueError, match="do not fit each other") as error:
        train(tmp_path / "run", "", *options, config=place / "config.yaml")
    for message in messages:
        assert message in str(error.value)
