"""The settings of a corruption: what they build, what is refused, and what does not go with one in a run."""

import math

import pytest
import torch
from conftest import DEBUG, ROOT

from ldm.config import RunConfig, differences, load_config, parse_config, to_dict, to_yaml
from ldm.diffusion.corruption import Blur, GrowingMask, PixelMasking, step_between
from ldm.diffusion.corruption_config import CorruptionConfig, blur_deviations, build_corruption
from ldm.diffusion.sampler_choice import chosen_sampler

X0 = ("--objective.parameterization=x0", "--objective.loss=x0")


def parse(*words: str) -> RunConfig:
    return parse_config([f"--config={DEBUG}", *words], prog="ldm/train.py", description="")


def test_each_kind_builds_its_corruption_with_its_settings() -> None:
    masking = build_corruption(CorruptionConfig("masking", pixels_per_level=5, fill=0.5), 6, 8)
    assert isinstance(masking, PixelMasking)
    assert (masking.levels, masking.fill) == (math.ceil(48 / 5), 0.5)
    mask = build_corruption(CorruptionConfig("growing_mask", levels=7, mask_first=2.0, mask_growth=0.5), 6, 8)
    assert isinstance(mask, GrowingMask)
    assert (mask.levels, mask.first, mask.growth) == (7, 2.0, 0.5)
    config = CorruptionConfig("blur", levels=3, blur_first=0.5, blur_last=8.0)
    blur = build_corruption(config, 6, 8)
    assert isinstance(blur, Blur)
    assert blur_deviations(config) == pytest.approx([0.5, 2.0, 8.0])
    # Of one pixel at its level's deviation: what a Blur of that deviation alone makes of it.
    point = torch.zeros(1, 1, 6, 8, dtype=torch.float64)
    point[0, 0, 2, 3] = 1
    for level, deviation in enumerate((0.5, 2.0, 8.0), 1):
        alone = Blur(6, 8, [deviation])(point, torch.tensor([1]))
        torch.testing.assert_close(blur(point, torch.tensor([level]), point), alone, rtol=0, atol=1e-12)
    assert blur_deviations(CorruptionConfig("blur", levels=1, blur_last=3.0)) == [3.0]


def test_only_masking_with_noise_takes_a_channel_more() -> None:
    assert CorruptionConfig("masking", fill=None).more_noise == 1
    assert [CorruptionConfig(kind).more_noise for kind in ("masking", "growing_mask", "blur")] == [0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "pixelate"}, r"corruption\.kind: found 'pixelate', expected one of \['masking', "),
        ({"pixels_per_level": 0}, "corruption.pixels_per_level: found 0, expected 1 or more"),
        ({"levels": 0}, "corruption.levels: found 0"),
        ({"start_samples": 1}, "corruption.start_samples: found 1, expected 2 or more"),
        ({"fill": math.nan}, "corruption.fill: found nan"),
        ({"mask_first": 0.0}, "corruption.mask_first: found 0.0"),
        ({"mask_growth": -0.1}, "corruption.mask_growth: found -0.1"),
        ({"start_noise": math.inf}, "corruption.start_noise: found inf"),
        ({"blur_first": 2.0, "blur_last": 1.0}, "found 2.0, 1.0, expected 0 < blur_first < blur_last"),
        ({"start_mean": [0.0]}, r"found \[0.0\], None, expected both or none"),
        ({"start_mean": [0.0, 1.0], "start_covariance": [[1.0]]}, "expected 2 rows of 2 finite numbers"),
        ({"start_mean": [0.0], "start_covariance": [[-1.0]]}, "expected a covariance"),
        ({"start_mean": [0.0] * 2, "start_covariance": [[1.0, 0.5], [0.4, 1.0]]}, "expected a covariance: symmetric"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        CorruptionConfig(**settings)


def test_more_pixels_a_level_than_the_latents_have_are_refused() -> None:
    with pytest.raises(ValueError, match="pixels_per_level: found 49, expected at most the 48 pixels of 6x8 latents"):
        build_corruption(CorruptionConfig(pixels_per_level=49), 6, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--objective.parameterization=v", "--objective.loss=x0"),
            "objective.parameterization: found 'v' with a corr",
        ),
        (
            ("--objective.parameterization=x0", "--objective.loss=epsilon"),
            "objective.loss: found 'epsilon' with a corr",
        ),
        (
            (*X0, "--objective.weight=min_snr"),
            "objective.weight: found 'min_snr' with a corruption, expected 'uniform'",
        ),
        ((*X0, "--objective.timestep_sampling=logit_normal"), "objective.timestep_sampling: found 'logit_normal'"),
        ((*X0, "--objective.offset_noise=0.1"), "objective.offset_noise: found 0.1 with a corruption, expected 0"),
        ((*X0, "--objective.learned_variance=true"), "objective.learned_variance: found True with a corruption"),
        ((*X0, "--noise.rescale_betas_zero_snr=true"), "noise, continuous_noise: found with corruption"),
        ((*X0, "--continuous_noise.kind=flow"), "noise, continuous_noise: found with corruption"),
        ((*X0, "--data.buckets.step=32"), "data.buckets: found with corruption"),
        ((*X0, "--unet.sample_size=null"), "unet.sample_size: not set"),
        ((*X0, "--previews.sampler=ddim"), "previews.sampler: found 'ddim', expected one of denoise_renoise, cold_dif"),
        (
            (*X0, "--corruption.pixels_per_level=300"),
            "corruption.pixels_per_level: found 300, expected at most the 256",
        ),
        ((*X0, "--corruption.start_mean=[0]", "--corruption.start_covariance=[[1]]"), "found 1 numbers, expected 4"),
        (
            (*X0, "--corruption.pixels_per_level=32", "--previews.prompts=[a]", "--previews.every=1"),
            "previews.steps: found 20, expected 1 to the 8 levels of the corruption",
        ),
    ],
)
def test_settings_of_a_run_that_do_not_go_with_a_corruption_end_it_at_its_start(words, message, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--corruption.kind=masking", *words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_sampler_of_corruptions_does_not_go_with_noise(capsys) -> None:
    with pytest.raises(SystemExit):
        parse("--previews.sampler=cold_diffusion")
    assert "previews.sampler: found 'cold_diffusion', expected one of ddpm, ddim" in capsys.readouterr().err


def test_each_model_has_its_own_samplers_and_a_default() -> None:
    kinds = [None, *(CorruptionConfig(kind) for kind in ("masking", "growing_mask", "blur"))]
    defaults = ["dpmpp_2m", "denoise_renoise", "cold_diffusion", "cold_diffusion"]
    assert [chosen_sampler(None, one) for one in kinds] == defaults
    assert chosen_sampler("ddim", None) == "ddim"
    assert [chosen_sampler("cold_diffusion", one) for one in kinds[1:]] == ["cold_diffusion"] * 3
    with pytest.raises(ValueError, match=r"found 'ddim', expected one of denoise_renoise, .* of the corruption blur"):
        chosen_sampler("ddim", CorruptionConfig("blur"))
    with pytest.raises(ValueError, match=r"found 'denoise_renoise', expected one of ddpm.* of Gaussian noise"):
        chosen_sampler("denoise_renoise", None)


def test_steps_are_evaluations_at_most_and_none_is_more_than_the_levels() -> None:
    for levels in (1, 7, 64):
        for steps in range(1, levels + 1):
            step = step_between(levels, steps)
            assert math.ceil(levels / step) <= steps
            assert step == 1 or math.ceil(levels / (step - 1)) > steps  # no shorter step would do
    for steps in (0, 8):
        with pytest.raises(ValueError, match=f"steps: found {steps}, expected 1 to the 7 levels"):
            step_between(7, steps)


@pytest.mark.parametrize("name", ["demo_masking", "demo_blur"])
def test_the_demo_of_each_kind_differs_from_the_demo_in_what_it_is_about(name, tmp_path) -> None:
    ours, demo = (load_config(ROOT / f"configs/{stem}.yaml") for stem in (name, "demo"))
    assert ours.corruption is not None
    assert name == f"demo_{ours.corruption.kind}"
    changed = {line.split(":")[0].split(".")[0] for line in differences(to_dict(demo), to_dict(ours))}
    assert changed == {"corruption", "objective"}
    (tmp_path / "resolved.yaml").write_text(to_yaml(ours))
    assert load_config(tmp_path / "resolved.yaml") == ours


def test_a_resumed_run_may_not_change_its_corruption() -> None:
    before, after = (to_dict(parse(*X0, "--corruption.kind=blur", f"--corruption.levels={n}")) for n in (20, 30))
    assert differences(before, after) == ["corruption.levels: 20 -> 30"]
