"""tools/train_autoencoder.py: what it ships, its whitening and its losses, and a short run from shards to a folder."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL, posterior_mean, sample_posterior
from ldm.models.whitening import LatentStatistics, fold_whitening, latent_statistics
from ldm.training.autoencoder_loss import AutoencoderLoss, AutoencoderLossConfig, psnr
from tools.make_demo_data import STYLES, held_out, list_emoji, make_demo_data
from tools.train_autoencoder import initialized, parse_config

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "ldm/pretrained/emoji-f4"
CONFIG = ROOT / "configs/autoencoder_emoji.yaml"
LEVELS = 3


def tiny(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        AutoencoderConfig(
            block_out_channels=[8, 8, 16],
            down_block_types=["DownEncoderBlock2D"] * LEVELS,
            up_block_types=["UpDecoderBlock2D"] * LEVELS,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=1.0,
            mid_block_add_attention=False,
        )
    )


@pytest.fixture(scope="module")
def held_out_pictures() -> dict[str, torch.Tensor]:
    """The 95 emoji held out from training, drawn from the packages, (95, 3, 64, 64) in [-1, 1] for each style."""
    reserved = held_out(list_emoji(), 95)
    chosen = [one for one in list_emoji() if one.code_point in reserved]
    arrays = {style: np.stack([np.array(draw(one, 64)) for one in chosen]) for style, draw in STYLES.items()}
    return {style: torch.from_numpy(a).permute(0, 3, 1, 2).float() / 127.5 - 1 for style, a in arrays.items()}


@pytest.fixture(scope="module")
def shipped() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(SHIPPED).eval()


@torch.no_grad()
def test_the_shipped_autoencoder_reaches_28_db_on_held_out_emoji_and_its_latents_are_white(
    shipped: AutoencoderKL, held_out_pictures: dict[str, torch.Tensor]
) -> None:
    decibels, latents = [], []
    generator = torch.Generator().manual_seed(0)
    for images in held_out_pictures.values():
        for part in images.split(32):
            moments = shipped.encode(part)
            latents.append(sample_posterior(moments, torch.randn(moments[:, :4].shape, generator=generator)))
            decoded = ((shipped.decode(posterior_mean(moments)).clamp(-1, 1) + 1) * 127.5).round()
            error = (decoded - (part + 1) * 127.5).double().square().mean(dim=(1, 2, 3))
            decibels += (20 * math.log10(255) - 10 * error.clamp(min=1e-9).log10()).tolist()
    z = torch.cat(latents)  # (190, 4, 16, 16)
    std, mean = z.std(dim=(0, 2, 3)), z.mean(dim=(0, 2, 3))
    print(f"\nheld-out PSNR {np.mean(decibels):.2f} dB over {len(decibels)}; std {std.tolist()}, mean {mean.tolist()}")
    assert len(decibels) == 190
    assert z.shape[1:] == (4, 16, 16)
    assert np.mean(decibels) >= 28
    assert ((std - 1).abs() < 0.1).all()
    assert (mean.abs() < 0.15).all()
    card = (SHIPPED / "README.md").read_text()
    recorded = re.search(r"held-out PSNR \| ([\d.]+) dB", card)
    assert recorded is not None
    assert float(recorded[1]) == pytest.approx(np.mean(decibels), abs=0.05)


def test_the_shipped_folder_is_small_fp16_free_of_pickles_and_opens_in_diffusers_with_equal_latents_and_pictures(
    shipped: AutoencoderKL, held_out_pictures: dict[str, torch.Tensor]
) -> None:
    from diffusers import AutoencoderKL as Reference
    from safetensors import safe_open

    names = {path.name for path in SHIPPED.iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors", "README.md"}
    weights = SHIPPED / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    with safe_open(weights, "pt") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"F16"}  # noqa: SIM118
    assert json.loads((SHIPPED / "config.json").read_text())["scaling_factor"] == 1.0
    card = (SHIPPED / "README.md").read_text()
    for wanted in ("accelerate launch tools/train_autoencoder.py", "Twemoji", "OpenMoji", "CC-BY 4.0", "CC-BY-SA 4.0"):
        assert wanted in card
    assert "/work" not in card
    assert "/tmp" not in card
    reference = Reference.from_pretrained(SHIPPED).eval()
    images = held_out_pictures["openmoji"][:4]
    with torch.no_grad():
        mean = posterior_mean(shipped.encode(images))
        torch.testing.assert_close(mean, reference.encode(images).latent_dist.mode(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(shipped.decode(mean), reference.decode(mean).sample, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_whitening_makes_latents_white_and_leaves_reconstructions_of_means_and_samples_as_they_are() -> None:
    """4 random autoencoders, seeds 0 to 3, with latents of other means and widths: differences at most 1e-4."""
    for seed in range(4):
        autoencoder = tiny(seed)
        assert autoencoder.quant_conv is not None
        autoencoder.quant_conv.weight[:4] *= torch.tensor([0.1, 1.0, 5.0, 20.0])[:, None, None, None]
        autoencoder.quant_conv.bias[:4] += torch.tensor([3.0, 0.0, -2.0, 10.0])
        autoencoder.quant_conv.bias[4:] = torch.tensor([-6.0, -1.0, 0.0, 1.0])
        images = torch.rand(8, 3, 32, 32) * 2 - 1
        noise = torch.randn(8, 4, 8, 8)
        moments = autoencoder.encode(images)
        before = [autoencoder.decode(posterior_mean(moments)), autoencoder.decode(sample_posterior(moments, noise))]
        statistics = latent_statistics(autoencoder, images.split(3))
        samples = torch.stack([sample_posterior(moments, torch.randn_like(noise)) for _ in range(400)]).double()
        torch.testing.assert_close(statistics.std, samples.std(dim=(0, 1, 3, 4)), rtol=0.02, atol=1e-3)
        fold_whitening(autoencoder, statistics)
        moments = autoencoder.encode(images)
        after = [autoencoder.decode(posterior_mean(moments)), autoencoder.decode(sample_posterior(moments, noise))]
        for old, new in zip(before, after, strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=1e-4)
        white = latent_statistics(autoencoder, [images])
        torch.testing.assert_close(white.std, torch.ones(4, dtype=torch.float64), rtol=1e-4, atol=0)
        torch.testing.assert_close(white.mean, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-4)


def test_whitening_refuses_an_autoencoder_without_the_convolutions_that_carry_it() -> None:
    bare = AutoencoderKL(AutoencoderConfig(norm_num_groups=8, use_quant_conv=False))
    with pytest.raises(ValueError, match="use_quant_conv"):
        fold_whitening(bare, LatentStatistics(torch.zeros(4), torch.ones(4)))


def test_psnr_is_the_closed_form_of_8_bit_pictures() -> None:
    """Ten levels of 255 off: 20 log10(255 / 10); reconstructions are clamped and rounded first."""
    image = torch.full((2, 3, 8, 8), 100 / 127.5 - 1)
    off = torch.stack([image[0] + 10 / 127.5, image[1]])
    found = psnr(image, off)
    assert found[0].item() == pytest.approx(20 * math.log10(25.5), abs=1e-3)
    assert found[1].item() == 100
    white = torch.ones(1, 3, 8, 8)
    assert psnr(white, white * 1.7).item() == 100
    assert psnr(image[:1], image[:1] + 0.4 / 127.5).item() == 100


def test_the_loss_is_l1_plus_weighted_perceptual_plus_kl_per_colour_value_and_can_do_without_either() -> None:
    images, reconstructions = torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), 0.25)
    moments = torch.cat([torch.full((2, 4, 4, 4), 2.0), torch.zeros(2, 4, 4, 4)], dim=1)  # N(2, 1): KL = 2 nats each
    plain = AutoencoderLoss(AutoencoderLossConfig(perceptual=0, kl=0.5))(images, reconstructions, moments)
    assert plain["l1"].item() == pytest.approx(0.25)
    assert plain["kl"].item() == pytest.approx(2 * 64 / (3 * 16 * 16))
    assert plain["loss"].item() == pytest.approx(0.25 + 0.5 * 2 * 64 / (3 * 16 * 16))
    assert "perceptual" not in plain
    full = AutoencoderLoss(AutoencoderLossConfig(perceptual=0.1, kl=0.5))(images, reconstructions, moments)
    assert full["loss"].item() == pytest.approx(plain["loss"].item() + 0.1 * full["perceptual"].item(), rel=1e-5)
    assert full["perceptual"] > 0
    with pytest.raises(ValueError, match=r"loss\.kl: found -1"):
        AutoencoderLossConfig(kl=-1)


@torch.no_grad()
def test_training_starts_with_identity_residuals_and_a_narrow_posterior() -> None:
    autoencoder = initialized(tiny())
    x = torch.randn(2, 8, 16, 16)
    block = autoencoder.encoder.down_blocks[0].resnets[0]
    torch.testing.assert_close(block(x), x)
    logvar = autoencoder.encode(torch.rand(2, 3, 32, 32) * 2 - 1)[:, 4:]
    assert logvar.mean().item() == pytest.approx(-6, abs=0.5)


def test_unknown_settings_missing_held_out_shards_and_an_existing_folder_are_errors_that_name_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse_config([f"--config={CONFIG}", f"--out={tmp_path / 'new'}"])
    assert config.autoencoder.block_out_channels == [32, 64, 128]
    for words, told in (
        (["--loss.lpips=1"], "lpips"),
        ([f"--out={tmp_path}"], "exists"),
        (["--data.validation=null"], "data.validation"),
        (["--training.steps=0"], "training.steps"),
    ):
        with pytest.raises(SystemExit) as ended:
            parse_config([f"--config={CONFIG}", f"--out={tmp_path / 'new'}", *words])
        assert ended.value.code == 2
        assert told in capsys.readouterr().err


@pytest.fixture(scope="module")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """19 hearts to train on and 6 held out, 32x32."""
    folder = tmp_path_factory.mktemp("hearts") / "data"
    make_demo_data(folder, ["twemoji"], ["heart"], 32, 6, 10)
    return folder


def train_three_steps(data: Path, folder: Path, processes: int) -> list[dict]:
    """Runs the tool as users do, with accumulation where there is one process; the lines of metrics.jsonl.

    The average keeps all but 1e-7 of the initial weights, so that a folder tells whether it holds it.
    """
    words = [
        f"--config={CONFIG}",
        f"--run_dir={folder / 'run'}",
        f"--out={folder / 'out'}",
        f"--data.shards={data / 'train'}",
        f"--data.validation={data / 'validation'}",
        "--data.resolution=32",
        "--data.workers=0",
        "--autoencoder.block_out_channels=[8,8,16]",
        "--autoencoder.norm_num_groups=4",
        "--ema.decay=0.9999999",
        "--ema.warmup=false",
        "--training.steps=3",
        "--training.global_batch=6",
        "--training.max_micro_batch=3",
        "--training.mixed_precision=no",
        "--training.validate_every=2",
        "--optimizer.warmup_steps=1",
        "--metrics.log_every=1",
    ]
    command = [sys.executable, str(ROOT / "tools/train_autoencoder.py"), *words]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *command[1:]]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """Folder and metrics of a run of 3 steps of 6 pictures, in 2 micro-batches of 3."""
    folder = tmp_path_factory.mktemp("one")
    return folder, train_three_steps(small_shards, folder, processes=1)


def test_three_steps_write_metrics_reconstructions_and_a_folder_that_loads(
    one_process: tuple[Path, list[dict]],
) -> None:
    folder, lines = one_process
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    first = lines[0]
    assert first["loss"] == pytest.approx(first["l1"] + 0.05 * first["perceptual"] + 1e-4 * first["kl"], rel=1e-4)
    assert [line["step"] for line in lines if "held_out_psnr" in line] == [2, 3]
    assert (folder / "run/reconstructions.png").stat().st_size > 1000
    assert {path.name for path in folder.iterdir()} == {"run", "out"}
    assert {path.name for path in (folder / "out").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "README.md",
    }
    assert "6 pictures" in (folder / "out/README.md").read_text()
    autoencoder = AutoencoderKL.from_pretrained(folder / "out")
    assert autoencoder.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 8, 8, 8)


def test_the_folder_holds_the_average_of_the_weights_with_white_latents_on_the_training_pictures(
    one_process: tuple[Path, list[dict]],
) -> None:
    autoencoder = AutoencoderKL.from_pretrained(one_process[0] / "out")
    torch.manual_seed(0)
    initial = initialized(AutoencoderKL(autoencoder.config)).state_dict()
    for name, weight in autoencoder.state_dict().items():
        if "quant_conv" not in name:
            torch.testing.assert_close(weight, initial[name], rtol=1e-3, atol=1e-6)
    hearts = [one for one in list_emoji() if one.subcategory == "heart"]
    train = [one for one in hearts if one.code_point not in held_out(hearts, 6)]
    pictures = np.stack([np.array(STYLES["twemoji"](one, 32)) for one in train])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    white = latent_statistics(autoencoder, [images])
    torch.testing.assert_close(white.std, torch.ones(4, dtype=torch.float64), rtol=0.01, atol=0)  # fp16 weights
    torch.testing.assert_close(white.mean, torch.zeros(4, dtype=torch.float64), rtol=0, atol=0.01)


def test_two_processes_give_the_losses_and_gradient_norms_of_one_that_accumulates(
    small_shards: Path, one_process: tuple[Path, list[dict]], tmp_path: Path
) -> None:
    two = train_three_steps(small_shards, tmp_path, processes=2)
    for name in ("loss", "l1", "perceptual", "kl", "grad_norm", "held_out_psnr"):
        found, expected = ([line[name] for line in lines if name in line] for lines in (two, one_process[1]))
        assert len(found) >= 2
        assert found == pytest.approx(expected, rel=1e-4), name
