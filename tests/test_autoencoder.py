"""The autoencoder against diffusers' AutoencoderKL on the same weights, and its posterior against closed forms."""

import inspect
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldm.models.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    kl_divergence,
    posterior_mean,
    sample_posterior,
    scale_latents,
    unscale_latents,
)

SD: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": 512,
}
SMALL: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [16, 32],
    "norm_num_groups": 4,
}
LIMIT = 1e-5
PARITY_CONFIGS = int(os.environ.get("LDM_PARITY_CONFIGS", "12"))
PARITY_SEED = int(os.environ.get("LDM_PARITY_SEED", "0"))


def small_pair(**change: Any) -> tuple[AutoencoderKL, DiffusersAutoencoderKL]:
    torch.manual_seed(0)
    theirs = DiffusersAutoencoderKL.from_config({**SMALL, **change})
    ours = AutoencoderKL(AutoencoderConfig.from_dict({**SMALL, **change}))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def deviation(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    assert found.isfinite().all()
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


def test_the_sd_autoencoder_has_the_published_parameter_and_key_counts_and_encoding_cost() -> None:
    with torch.device("meta"):
        autoencoder = AutoencoderKL(AutoencoderConfig.from_dict(SD))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert len(autoencoder.state_dict()) == 248
    assert count(autoencoder) == 83_653_863
    assert count(autoencoder.encoder) == 34_163_592
    assert count(autoencoder.decoder) == 49_490_179
    assert autoencoder.downsample_factor == 8
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        autoencoder.encode(torch.empty(1, 3, 512, 512, device="meta"))
    assert round(counter.get_total_flops() / 1e9, 1) == 1_116.7


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
        {"mid_block_add_attention": False},
    ],
    ids=["sd", "16 channels without quant convolutions", "without attention"],
)
def test_state_dict_names_and_shapes_are_those_of_diffusers(change: dict[str, Any]) -> None:
    with torch.device("meta"):
        ours = AutoencoderKL(AutoencoderConfig.from_dict({**SD, **change})).state_dict()
        theirs = DiffusersAutoencoderKL.from_config({**SD, **change}).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_defaults_and_fixed_settings_are_the_defaults_of_diffusers() -> None:
    signature = inspect.signature(DiffusersAutoencoderKL.__init__).parameters
    theirs = {name: p.default for name, p in signature.items() if name != "self"}
    ours = AutoencoderConfig().to_dict()
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()} == ours


def test_moments_pictures_and_all_gradients_equal_diffusers_within_1e5_on_random_configs() -> None:
    """12 configs (LDM_PARITY_CONFIGS): 4 and 16 channels, with and without either 1x1 convolution and the attention."""
    rng = random.Random(PARITY_SEED)
    combinations = set()
    worst = {"moments": 0.0, "pictures": 0.0, "gradients": 0.0}
    for trial in range(PARITY_CONFIGS):
        levels, groups = rng.choice([1, 2, 3]), rng.choice([2, 4])
        config = {
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": [groups * 4 * rng.randint(1, 3) for _ in range(levels)],
            "layers_per_block": rng.choice([1, 2]),
            "norm_num_groups": groups,
            "latent_channels": (4, 16)[trial % 2],
            "use_quant_conv": trial % 4 < 2,
            "use_post_quant_conv": trial % 3 > 0,
            "mid_block_add_attention": trial % 4 != 3,
        }
        ours, theirs = small_pair(**config)
        generator = torch.Generator().manual_seed(trial)
        factor = ours.downsample_factor
        height, width = factor * rng.randint(2, 5), factor * rng.randint(2, 5)
        images = torch.rand(2, 3, height, width, generator=generator) * 2 - 1
        z = torch.randn(2, ours.config.latent_channels, height // factor, width // factor, generator=generator)
        moments, expected_moments = ours.encode(images), theirs.encode(images).latent_dist.parameters
        pictures, expected_pictures = ours.decode(z), theirs.decode(z).sample
        (moments.sin().sum() + pictures.sin().sum()).backward()
        (expected_moments.sin().sum() + expected_pictures.sin().sum()).backward()
        worst["moments"] = max(worst["moments"], deviation(moments, expected_moments))
        worst["pictures"] = max(worst["pictures"], deviation(pictures, expected_pictures))
        gradients = {name: p.grad for name, p in theirs.named_parameters()}
        for name, parameter in ours.named_parameters():
            if name.endswith("to_k.bias"):  # adds the same to all scores of a query: its gradient is zero
                assert float(gradients.pop(name).abs().max()) < 1e-4
                continue
            worst["gradients"] = max(worst["gradients"], deviation(parameter.grad, gradients.pop(name)))
        assert not gradients
        combinations.add(tuple(config[name] for name in ("latent_channels", "use_quant_conv", "use_post_quant_conv")))
    print(f"\n{PARITY_CONFIGS} configs, seed {PARITY_SEED}, {len(combinations)} kinds of latents: {worst}")
    assert len(combinations) == 8 or PARITY_CONFIGS < 12
    assert max(worst.values()) <= LIMIT, worst


def test_diffusers_opens_what_save_pretrained_writes(tmp_path: Path) -> None:
    ours, _ = small_pair(scaling_factor=0.5, shift_factor=0.25, force_upcast=False)
    ours.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    theirs, report = DiffusersAutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    config = {name: list(v) if isinstance(v, tuple) else v for name, v in theirs.config.items() if name[0] != "_"}
    assert config == ours.config.to_dict()
    z = torch.randn(1, 4, 6, 6)
    assert deviation(ours.decode(z), theirs.decode(z).sample) < LIMIT


def test_from_pretrained_opens_what_diffusers_writes(tmp_path: Path) -> None:
    ours, theirs = small_pair(latent_channels=16, use_quant_conv=False, shift_factor=0.06)
    theirs.save_pretrained(tmp_path)
    opened = AutoencoderKL.from_pretrained(tmp_path)
    assert opened.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), ours.parameters(), strict=True))


def test_files_with_the_attention_names_of_2022_open_to_the_same_weights(tmp_path: Path) -> None:
    ours, _ = small_pair()
    ours.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = {}
    for name, tensor in load_file(path).items():
        for new_part, old_part in old.items():
            name = name.replace(new_part, old_part)
        tensors[name] = tensor
    assert sum("proj_attn" in name for name in tensors) == 4  # weight and bias, in encoder and decoder
    save_file(tensors, path, metadata={"format": "pt"})
    # diffusers reads them too: that these are the old names is its word, not only ours.
    theirs = DiffusersAutoencoderKL.from_pretrained(tmp_path)
    opened = AutoencoderKL.from_pretrained(tmp_path)
    z = torch.randn(1, 4, 6, 6)
    assert deviation(opened.decode(z), theirs.decode(z).sample) < LIMIT
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), ours.parameters(), strict=True))


def random_moments(scale: float) -> Tensor:
    return torch.randn(3, 8, 4, 5, generator=torch.Generator().manual_seed(1)) * scale


@pytest.mark.parametrize("scale", [1.0, 60.0], ids=["usual", "beyond the clamp"])
def test_posterior_equals_that_of_diffusers_and_the_closed_form(scale: float) -> None:
    moments, noise = random_moments(scale), torch.randn(3, 4, 4, 5)
    theirs = DiagonalGaussianDistribution(moments)
    torch.testing.assert_close(posterior_mean(moments), theirs.mode())
    torch.testing.assert_close(sample_posterior(moments, noise), theirs.mean + theirs.std * noise)
    torch.testing.assert_close(kl_divergence(moments), theirs.kl())
    posterior = torch.distributions.Normal(theirs.mean.double(), theirs.std.double())
    closed = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(kl_divergence(moments).double(), closed, rtol=1e-5, atol=1e-3)
    assert kl_divergence(torch.zeros(2, 8, 4, 4)).tolist() == [0.0, 0.0]


def test_a_posterior_is_sampled_not_replaced_by_its_mode_and_with_its_own_deviation() -> None:
    moments = torch.cat([torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), -1.4)], dim=1)
    noise = torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    sample = sample_posterior(moments, noise)
    assert float(sample.mean()) == pytest.approx(3.0, abs=0.01)
    assert float(sample.std()) == pytest.approx(2.718281828**-0.7, rel=0.02)  # exp(logvar / 2)


def test_half_precision_moments_give_float32_latents_of_full_precision() -> None:
    moments, noise = random_moments(1.0), torch.randn(3, 4, 4, 5)
    found = sample_posterior(moments.half(), noise)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, sample_posterior(moments.half().float(), noise), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("factor", "shift", "z", "expected"),
    [(0.18215, None, 2.0, 0.3643), (0.13025, None, -4.0, -0.521), (1.5305, 0.0609, 1.0609, 1.5305)],
    ids=["sd", "sdxl", "sd3"],
)
def test_latents_are_shifted_then_scaled_and_back(
    factor: float, shift: float | None, z: float, expected: float
) -> None:
    config = AutoencoderConfig(scaling_factor=factor, shift_factor=shift)
    scaled = scale_latents(torch.tensor([z]), config)
    assert float(scaled) == pytest.approx(expected, rel=1e-6)
    assert float(unscale_latents(scaled, config)) == pytest.approx(z, rel=1e-6)


def test_pictures_that_do_not_divide_are_refused_with_their_size() -> None:
    ours, _ = small_pair()
    with pytest.raises(ValueError, match="found pictures of 10x15 pixels, expected multiples of 2"):
        ours.encode(torch.zeros(1, 3, 10, 15))


def test_float16_weights_are_refused_when_the_config_says_that_activations_overflow() -> None:
    ours, _ = small_pair()
    with pytest.raises(ValueError, match="float16 weights, but its config has force_upcast"):
        ours.half().encode(torch.zeros(1, 3, 8, 8))
    assert ours.bfloat16().encode(torch.zeros(1, 3, 8, 8)).dtype == torch.bfloat16
    allowed, _ = small_pair(force_upcast=False)
    assert allowed.half().encode(torch.zeros(1, 3, 8, 8)).dtype == torch.float16


def test_activations_beyond_float16_survive_float16_autocast() -> None:
    ours, _ = small_pair()
    with torch.no_grad():
        ours.decoder.conv_in.weight.mul_(1e6)
    z = torch.randn(1, 4, 6, 6)
    expected = ours.decode(z)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(ours.decode(z), expected)
    ours.config.force_upcast = False
    with torch.autocast("cpu", dtype=torch.float16):
        assert not ours.decode(z).isfinite().all()  # what the setting is for
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours.decode(z).dtype == torch.bfloat16


def test_forward_is_encode_sample_decode_in_one_call() -> None:
    ours, _ = small_pair()
    images, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
    pictures, moments = ours(images, noise)
    assert torch.equal(moments, ours.encode(images))
    assert torch.equal(pictures, ours.decode(sample_posterior(moments, noise)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents_mean": [0.0]}, r"latents_mean: found \[0.0\], supported is None"),
        ({"act_fn": "gelu"}, "act_fn: found 'gelu'"),
        ({"block_out_channels": [16, 30]}, r"block_out_channels: found \[16, 30\], expected multiples of .* 4"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "expected UpDecoderBlock2D for each of the 2 levels"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "expected DownEncoderBlock2D"),
        ({"scaling_factor": 0.0}, "scaling_factor: found 0.0"),
        ({"latent_channels": 0}, "latent_channels: found 0"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_with_field_and_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig.from_dict({**SMALL, **change})
