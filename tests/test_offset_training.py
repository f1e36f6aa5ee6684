"""Offset noise in real runs: the logged losses are those of the closed form, and a resumed run's are the same."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from tiny_models import MINILM
from tiny_shards import positions_of
from torch import Tensor
from training_runs import assert_same_state, metrics, train

from ldm.data.batch import Batch
from ldm.data.data_config import DataConfig
from ldm.data.loader import make_loader, make_validation_loader
from ldm.data.manifest import Manifest
from ldm.models.text_conditioner import TextConditioner
from ldm.models.text_encoder import TextEncoderConfig
from tools.replay import replay

STRENGTH, LATENT, CHECKPOINT = 0.4, (4, 16, 16), 5
OPTIONS = (
    f"--objective.offset_noise={STRENGTH}", "--training.steps=8", f"--training.checkpoint_every={CHECKPOINT}",
    f"--validation.every={CHECKPOINT}", "--validation.samples=12",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, encoded_shards) -> Path:
    folder = tmp_path_factory.mktemp("offset") / "run"
    train(folder, encoded_shards, f"--data.validation={encoded_shards}", *OPTIONS)
    return folder


def philox(seed: int, purpose: int, position: int, shape: tuple[int, ...]) -> Tensor:
    key, counter = np.array([seed, purpose], dtype=np.uint64), np.array([0, position, 0, 0], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=counter)
    return torch.from_numpy(np.random.Generator(bits).standard_normal(shape, dtype=np.float32))


@torch.no_grad()
def closed_form(checkpoint: Path, weights: Path, batch: Batch, seed: int) -> float:
    """Mean loss of a batch: diffusers' network and schedule, NumPy's draws, x_t and the target written out."""
    config = DDIMScheduler.from_pretrained(checkpoint / "scheduler")
    network = UNet2DConditionModel.from_config(json.loads((checkpoint / "unet/config.json").read_text())).eval()
    network.load_state_dict(load_file(weights))
    encoder = TextConditioner.load([TextEncoderConfig(MINILM, max_length=16, attention_mask=True)])
    text = torch.where(batch.dropped.view(-1, 1, 1), encoder.empty().text, batch.text_states.float())
    scale = json.loads((checkpoint / "vae/config.json").read_text())["scaling_factor"]
    positions = batch.positions.tolist()
    noise, posterior = (torch.stack([philox(seed, one, p, LATENT) for p in positions]) for one in (9, 7))
    offset = torch.stack([philox(seed, 13, p, LATENT[:1]) for p in positions])
    total = noise + STRENGTH * offset.view(-1, LATENT[0], 1, 1)
    mean, log_variance = batch.moments.float().chunk(2, dim=1)
    x0 = scale * (mean + (log_variance / 2).exp() * posterior)
    t = (batch.u * 1000).long()
    kept = config.alphas_cumprod[t].view(-1, 1, 1, 1)
    predicted = network(kept.sqrt() * x0 + (1 - kept).sqrt() * total, t, text).sample
    return float((predicted - total).square().mean())


def test_the_logged_loss_is_that_of_noise_and_offset_in_closed_form(run, encoded_shards):
    config = DataConfig(shards=str(encoded_shards), resolution=64, workers=0)
    positions = positions_of(micro_batch=16, start_step=CHECKPOINT, stop_step=CHECKPOINT + 1)
    batch = next(iter(make_loader(config, Manifest.load(encoded_shards), 0, positions, latent_shape=LATENT)))
    assert batch.offset is None, "this loader was not asked for it"
    checkpoint = run / f"checkpoints/step-{CHECKPOINT:08d}"
    expected = closed_form(checkpoint, checkpoint / "training_state/unet.safetensors", batch, seed=0)
    assert metrics(run)[CHECKPOINT]["loss"] == pytest.approx(expected, rel=2e-5)


def test_the_validation_loss_has_offsets_of_the_validation_seed(run, encoded_shards):
    config = DataConfig(shards=str(encoded_shards), resolution=64, workers=0)
    loader = make_validation_loader(
        config, Manifest.load(encoded_shards), 0, latent_shape=LATENT, rank=0, world=1, micro_batch=12, samples=12
    )
    (batch,) = loader
    key = np.array([0, 12], dtype=np.uint64)
    own_seed = int(np.random.Philox(key=key, counter=np.zeros(4, dtype=np.uint64)).random_raw())
    checkpoint = run / f"checkpoints/step-{CHECKPOINT:08d}"
    expected = closed_form(checkpoint, checkpoint / "unet/diffusion_pytorch_model.safetensors", batch, own_seed)
    assert metrics(run)[CHECKPOINT - 1]["validation_loss"] == pytest.approx(expected, rel=2e-5)


def test_replay_computes_the_same_loss_again(run):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    *samples, whole = replay(run, CHECKPOINT + 2, None, None)
    assert len(samples) == 16
    assert whole["loss"] == whole["logged_loss"] == metrics(run)[CHECKPOINT + 1]["loss"]


def test_a_resumed_run_is_the_undisturbed_one_byte_by_byte_and_another_strength_is_refused(
    run, encoded_shards, tmp_path
):
    again = tmp_path / "run"
    shutil.copytree(run, again, symlinks=True)
    shutil.rmtree(again / "checkpoints/step-00000008")
    (again / "checkpoints/latest").unlink()
    train(again, encoded_shards, f"--data.validation={encoded_shards}", "--data.workers=1", *OPTIONS)
    assert [line["loss"] for line in metrics(again)] == [line["loss"] for line in metrics(run)]
    assert_same_state(again / "checkpoints/latest", run / "checkpoints/latest")
    with pytest.raises(ValueError, match=r"objective\.offset_noise: 0\.4 -> 0\.1"):
        train(again, encoded_shards, *OPTIONS, "--objective.offset_noise=0.1")
