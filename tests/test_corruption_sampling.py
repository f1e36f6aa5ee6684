"""Pictures from networks that undo a corruption: what a perfect one draws, what the network is told, checkpoints."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_clip, make_pipeline
from torch import Tensor, nn

from ldm.data.draws import Purpose, generator
from ldm.diffusion.corruption_config import CorruptionConfig, build_corruption
from ldm.evaluate import main as score
from ldm.models.conditioning import Conditioning
from ldm.pipeline.model_card import CardConfig, model_card
from ldm.pipeline.pipeline import Pipeline, load_pipeline, save_pipeline
from ldm.sample import main
from ldm.sampling.generation import encode_prompts, generate, initial_noise, sample_latents
from ldm.sampling.restoration import start_of

MEAN = [0.3, -1.0, 0.5, 2.0]
COVARIANCE = [[0.5, 0.2, 0.0, 0.0], [0.2, 0.4, 0.0, 0.1], [0.0, 0.0, 0.3, 0.0], [0.0, 0.1, 0.0, 0.6]]
KNOWN = {"start_mean": MEAN, "start_covariance": COVARIANCE}
CONFIGS = {
    "fill": CorruptionConfig("masking", pixels_per_level=5, fill=0.25),
    "noise": CorruptionConfig("masking", pixels_per_level=5, fill=None),
    "growing": CorruptionConfig("growing_mask", levels=13, mask_growth=0.7, **KNOWN),
    "blur": CorruptionConfig("blur", levels=13, blur_last=8.0, **KNOWN),
}
SAMPLERS = ("denoise_renoise", "cold_diffusion")
PROMPTS = ["red", "ape", "pea"]


class Told(nn.Module):
    """Stands for the network: notes what it is given, and puts out what `predict` makes of its conditioning."""

    def __init__(self, like: nn.Module, predict) -> None:
        super().__init__()
        self.config, self.predict = like.config, predict
        self.weight = nn.Parameter(torch.zeros(1))
        self.given: list[tuple[Tensor, Tensor]] = []

    def forward(self, z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        self.given.append((z, level))
        predicted: Tensor = self.predict(conditioning)
        return predicted

    def with_keys_values(self, conditioning: Conditioning) -> Conditioning:
        return conditioning


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory) -> Pipeline:
    folder = tmp_path_factory.mktemp("encoder") / "clip"
    make_clip(folder)
    return make_pipeline(str(folder), parameterization="x0")


def pipeline_of(diffusion: Pipeline, kind: str, **changes) -> Pipeline:
    return replace(diffusion, corruption=replace(CONFIGS[kind], **changes))


def noise_of(seed: int, purpose: Purpose, *address: int, channels: int) -> np.ndarray:
    return generator(seed, purpose, *address).standard_normal((channels, 8, 8), dtype=np.float32).astype(float)


def constants(conditioning: Conditioning) -> Tensor:
    """A picture of one colour for each conditioning: the mean of its first four features."""
    return conditioning.text[:, :, :4].mean(1)[:, :, None, None].expand(-1, -1, 8, 8)


def drawn(pipeline: Pipeline, sampler: str, steps: int, guidance: float = 1.0, **settings) -> Tensor:
    """Latents that `generate` decodes."""
    kept: list[Tensor] = []
    generate(pipeline, PROMPTS, seed=7, sampler=sampler, steps=steps, guidance=guidance, keep=kept.append, **settings)
    return torch.cat(kept)


def colours(seed: int = 7) -> Tensor:
    """Channel means that the start of each picture is drawn with, (3, 4, 1, 1), by NumPy."""
    values, vectors = np.linalg.eigh(np.array(COVARIANCE))
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    noises = [noise_of(seed, Purpose.SAMPLE_NOISE, index, channels=4) for index in range(3)]
    return torch.tensor(np.array([MEAN + root @ (noise.sum((1, 2)) / 8) for noise in noises]))[:, :, None, None]


@pytest.mark.parametrize("steps", [1, 4, 13])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", [*CONFIGS])
def test_a_network_that_knows_x0_draws_it(diffusion, kind, sampler, steps) -> None:
    """cold_diffusion adds differences to its start, which so has to be the corruption of this x0."""
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    changes = {}
    if sampler == "cold_diffusion" and kind == "blur":
        changes = {"blur_last": 80.0, "start_noise": 0.0}  # which leaves the means alone
        x0 = x0 - x0.mean((2, 3), keepdim=True) + colours()
    elif sampler == "cold_diffusion" and kind == "growing":
        changes = {"start_noise": 0.0}
        x0 = colours().expand(3, 4, 8, 8)
    pipeline = pipeline_of(diffusion, kind, **changes)
    pipeline.unet = Told(pipeline.unet, lambda conditioning: x0.float())
    torch.testing.assert_close(drawn(pipeline, sampler, steps), x0.float(), rtol=0, atol=2e-6)
    assert len(pipeline.unet.given) == {1: 1, 4: 4, 13: 13}[steps]  # 13 levels


def test_the_network_is_told_the_level_of_what_it_is_given_and_masks_are_drawn_anew_in_each_step(diffusion) -> None:
    pipeline = pipeline_of(diffusion, "noise")
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    pipeline.unet = Told(pipeline.unet, lambda conditioning: x0)
    drawn(pipeline, "denoise_renoise", 5)  # 13 levels, 3 at a time
    assert [level.tolist() for _, level in pipeline.unet.given] == [[n] * 3 for n in (13, 10, 7, 4, 1)]
    for step, (z, level) in enumerate(pipeline.unet.given):
        for index in range(3):
            address = (Purpose.SAMPLE_NOISE, index) if step == 0 else (Purpose.SAMPLER_NOISE, index, step - 1)
            noise = noise_of(7, *address, channels=5)
            replaced = np.argsort(noise[0].ravel(), kind="stable").reshape(8, 8) < 5 * int(level[index])
            expected = np.where(replaced, noise[1:], x0[index].numpy())
            np.testing.assert_allclose(z[index].numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["fill", "growing"])
def test_cold_diffusion_keeps_the_order_that_its_start_was_made_with(diffusion, kind) -> None:
    pipeline = pipeline_of(diffusion, kind, **({"start_noise": 0.0} if kind == "growing" else {}))
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if kind == "growing":
        x0 = colours().expand(3, 4, 8, 8)
    pipeline.unet = Told(pipeline.unet, lambda conditioning: x0.float())
    drawn(pipeline, "cold_diffusion", 13)
    noise, corruption = initial_noise(7, range(3), (4, 8, 8)), build_corruption(CONFIGS[kind], 8, 8)
    assert [int(level[0]) for _, level in pipeline.unet.given] == [*range(13, 0, -1)]
    for z, level in pipeline.unet.given:
        torch.testing.assert_close(z, corruption(x0, level, noise).float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["fill", "noise"])
def test_guidance_is_that_of_x0_with_both_halves_in_one_call(diffusion, kind, sampler) -> None:
    pipeline = pipeline_of(diffusion, kind)
    pipeline.unet = Told(pipeline.unet, constants)
    with_text, without = (constants(one) for one in encode_prompts(diffusion, PROMPTS))
    assert float((with_text - without).abs().max()) > 0.02
    for guidance in (0.0, 1.0, 3.5):
        pipeline.unet.given.clear()
        found = drawn(pipeline, sampler, 4, guidance)
        expected = without + guidance * (with_text - without)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert [len(z) for z, _ in pipeline.unet.given] == [3 if guidance == 1 else 6] * 4
    away = constants(encode_prompts(diffusion, PROMPTS, "apple")[1])
    found = drawn(pipeline, sampler, 4, 2.0, negative="apple")
    torch.testing.assert_close(found, away + 2 * (with_text - away), rtol=0, atol=1e-5)


def test_a_prompts_keys_and_values_are_computed_once_for_all_levels(diffusion) -> None:
    """And they change nothing: the network that is told the text alone at each level draws the same."""
    pipeline = pipeline_of(diffusion, "fill")
    unet, told = pipeline.unet, list[str]()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: told.append(name))
        for name, module in unet.named_modules()
        if name.endswith("attn2.to_k")
    ]
    pipeline.unet = Told(unet, lambda conditioning: conditioning)
    pipeline.unet.forward = lambda z, level, one: unet(z, level, one)
    expected = drawn(pipeline, "cold_diffusion", 5, 3.0)
    assert len(told) == 5 * len(hooks)
    told.clear()
    pipeline.unet = unet
    found = drawn(pipeline, "cold_diffusion", 5, 3.0)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    assert len(told) == 2 * len(hooks)
    told.clear()
    drawn(pipeline, "cold_diffusion", 5, 1.0)
    assert len(told) == len(hooks), "guidance 1 does not look at the empty caption"
    for hook in hooks:
        hook.remove()


def test_the_start_of_blur_has_the_mean_and_the_covariance_of_the_data_and_little_noise() -> None:
    config, seed, count = replace(CONFIGS["blur"], start_noise=0.1), 11, 4000
    noise = initial_noise(seed, range(count), (4, 8, 8)).double()
    z = start_of(config, build_corruption(config, 8, 8), noise, 4)
    torch.testing.assert_close(z[:3].mean((2, 3), keepdim=True), colours(seed), rtol=0, atol=1e-6)
    means = z.mean((2, 3)).numpy()
    covariance = np.array(COVARIANCE)
    error = np.sqrt(np.diag(covariance) / count)
    assert (np.abs(means.mean(0) - MEAN) < 4.5 * error).all(), f"seed {seed}, {count} draws"
    # Of a Gaussian: the variance of an element of the sample covariance is (c_ij^2 + c_ii c_jj) / n.
    spread = np.sqrt((covariance**2 + np.outer(np.diag(covariance), np.diag(covariance))) / count)
    assert (np.abs(np.cov(means.T) - covariance) < 4.5 * spread).all(), f"seed {seed}, {count} draws"
    rest = (z - z.mean((2, 3), keepdim=True)).numpy()
    # 63 of 64 degrees of freedom are left; the spread of a variance estimated from n normal draws is sqrt(2 / n).
    expected, draws = 0.01 * 63 / 64, count * 4 * 63
    assert abs(rest.var() - expected) < 4.5 * expected * np.sqrt(2 / draws), f"seed {seed}, {count} draws"
    together = (means[:, :, None, None] - means.mean(0)[:, None, None]) * rest
    assert abs(together.mean()) < 4.5 * together.std() / np.sqrt(together.size), f"seed {seed}, {count} draws"


def test_a_singular_covariance_is_drawn_from_as_it_is() -> None:
    config = replace(CONFIGS["blur"], start_covariance=[[1.0] * 4] * 4, start_noise=0.0)
    z = start_of(config, build_corruption(config, 8, 8), initial_noise(1, range(50), (4, 8, 8)).double(), 4)
    off = z - torch.tensor(MEAN)[:, None, None]
    torch.testing.assert_close(off, off[:, :1].expand_as(off), rtol=0, atol=1e-6)
    assert float(off.std()) > 0.7


@pytest.mark.parametrize("kind", [*CONFIGS])
def test_a_checkpoint_reads_back_the_same_and_draws_the_same(diffusion, kind, tmp_path) -> None:
    pipeline = pipeline_of(diffusion, kind)
    save_pipeline(tmp_path / "p", pipeline)
    again = load_pipeline(tmp_path / "p")
    assert again.corruption == pipeline.corruption
    settings = {"seed": 4, "sampler": "denoise_renoise", "steps": 3, "guidance": 2.0}
    ours, theirs = (generate(one, PROMPTS, **settings) for one in (pipeline, again))
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours[0], ours[1])


def test_diffusers_refuses_the_folder_and_names_what_it_lacks(diffusion, tmp_path) -> None:
    diffusers = pytest.importorskip("diffusers")
    save_pipeline(tmp_path / "p", pipeline_of(diffusion, "blur"))
    for kind in (diffusers.DiffusionPipeline, diffusers.StableDiffusionPipeline):
        with pytest.raises(ValueError, match="`diffusers` has no class `LatentCorruptionScheduler`"):
            kind.from_pretrained(tmp_path / "p")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "smear"}, r"scheduler_config.json: corruption.kind: found 'smear'"),
        ({"levels": None}, r"scheduler_config.json: .*lacks levels, and has as unknown ones none"),
        ({"colour": 3}, r"scheduler_config.json: .*lacks none, and has as unknown ones colour"),
        ({"start_noise": "much"}, r"scheduler_config.json: a value of another type"),
    ],
)
def test_a_scheduler_file_that_is_not_whole_is_refused_by_field(diffusion, change, message, tmp_path) -> None:
    save_pipeline(tmp_path / "p", pipeline_of(diffusion, "blur"))
    path = tmp_path / "p/scheduler/scheduler_config.json"
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None or name == "fill"}))
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path / "p")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("blur", {"sampler": "ddim"}, "sampler: found 'ddim', expected one of denoise_renoise, cold_diffusion, for a"),
        (None, {"sampler": "cold_diffusion"}, "sampler: found 'cold_diffusion', expected one of ddpm"),
        ("blur", {"steps": 14}, "steps: found 14, expected 1 to the 13 levels"),
        ("blur", {"steps": 0}, "steps: found 0"),
        ("blur", {"spacing": "karras"}, "spacing: found 'karras' with a corruption, expected none"),
        ("blur", {"height": 32, "width": 16}, "height, width: found 32x16 pixels, expected 16x16"),
        (
            "noise",
            {"noise": torch.zeros(3, 4, 8, 8)},
            "noise: found with masking that fills with noise, .*expected none",
        ),
        ("blur", {"guidance": float("nan")}, "guidance: found scale nan"),
    ],
)
def test_requests_that_the_model_does_not_know_are_errors(diffusion, kind, settings, message) -> None:
    pipeline = diffusion if kind is None else pipeline_of(diffusion, kind)
    with pytest.raises(ValueError, match=message):
        generate(
            pipeline, PROMPTS, **({"seed": 1, "sampler": "cold_diffusion", "steps": 3, "guidance": 1.0} | settings)
        )


def test_a_start_that_nobody_knows_is_an_error(diffusion) -> None:
    pipeline = pipeline_of(diffusion, "blur", start_mean=None, start_covariance=None)
    with pytest.raises(ValueError, match="start_mean: not known, expected the mean of each channel"):
        drawn(pipeline, "cold_diffusion", 3)
    pipeline = pipeline_of(diffusion, "blur", start_mean=[0.0], start_covariance=[[1.0]])
    with pytest.raises(ValueError, match="start_mean: found 1 numbers, expected 4"):
        drawn(pipeline, "cold_diffusion", 3)


def test_given_noise_is_the_start_of_the_picture_that_it_addresses(diffusion) -> None:
    pipeline = pipeline_of(diffusion, "growing")
    noise = initial_noise(7, range(3), (4, 8, 8))
    ours, theirs = (drawn(pipeline, "cold_diffusion", 4, noise=one) for one in (noise, None))
    assert torch.equal(ours, theirs)


def test_a_part_of_the_batch_draws_what_all_of_it_does_and_progress_counts_the_steps(diffusion) -> None:
    pipeline, said = pipeline_of(diffusion, "noise"), []
    whole = generate(pipeline, PROMPTS, seed=7, sampler="denoise_renoise", steps=5, guidance=2.0)
    parts = generate(
        pipeline, PROMPTS, seed=7, sampler="denoise_renoise", steps=5, guidance=2.0, batch_size=2,
        progress=lambda done, of: said.append((done, of)),
    )  # fmt: skip
    assert np.abs(whole.astype(int) - parts).max() <= 1
    assert said == [(n, 10) for n in range(1, 11)]


def test_the_program_takes_the_kinds_own_sampler_and_refuses_those_of_noise(diffusion, tmp_path, capsys) -> None:
    save_pipeline(tmp_path / "p", pipeline_of(diffusion, "blur"))
    words = ["--checkpoint", str(tmp_path / "p"), "--prompt", "red", "--device=cpu", "--steps=4"]
    assert main([*words, f"--out={tmp_path / 'a.png'}"]) == 0
    with Image.open(tmp_path / "a.png") as image:
        found, pixels = image.text["sampler"], np.asarray(image.convert("RGB")).astype(int)  # type: ignore[attr-defined]
    assert found == "cold_diffusion"
    expected = generate(
        pipeline_of(diffusion, "blur"), ["red"], seed=0, sampler="cold_diffusion", steps=4, guidance=5.0
    )
    assert np.abs(pixels - expected[0]).max() <= 1
    with pytest.raises(SystemExit):
        main([*words, "--sampler=ddim", f"--out={tmp_path / 'b.png'}"])
    assert "sampler: found 'ddim', expected one of denoise_renoise, cold_diffusion" in capsys.readouterr().err
    assert not Path(tmp_path / "b.png").exists()


def test_what_needs_levels_of_noise_is_refused_by_the_programs(diffusion, tmp_path, capsys) -> None:
    save_pipeline(tmp_path / "p", pipeline_of(diffusion, "fill"))
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    words = ["--checkpoint", str(tmp_path / "p"), "--device=cpu", f"--out={tmp_path / 'a.png'}"]
    picture = ["--prompt=red", "--steps=4", f"--init_image={tmp_path / 'red.png'}"]
    for program, more, message in (
        (main, picture, "init_image: found with a corruption, expected none"),
        (
            main,
            [*picture, f"--invert={tmp_path / 'n.safetensors'}"],
            "invert: found a checkpoint of the corruption mask",
        ),
        (score, ["--scores", "elbo", f"--shards={tmp_path}"], "scores elbo: found a checkpoint of the corruption mask"),
    ):
        with pytest.raises(SystemExit):
            program([*words, *more])
        assert message in capsys.readouterr().err


def test_bfloat16_draws_nearly_the_same(diffusion) -> None:
    conditioning, unconditional = encode_prompts(diffusion, PROMPTS)
    noise, latents = initial_noise(7, range(3), (4, 8, 8)), []
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = replace(pipeline_of(diffusion, "fill"), dtype=dtype)
        fresh = lambda step: initial_noise(step, range(3), (4, 8, 8))  # noqa: E731
        settings = {"sampler": "denoise_renoise", "steps": 2, "guidance": 1.0, "fresh_noise": fresh}
        latents.append(sample_latents(pipeline, conditioning, unconditional, noise, **settings))
    assert latents[1].dtype == torch.float32
    assert not torch.equal(*latents)
    assert float((latents[0] - latents[1]).abs().mean()) < 0.1 * float(latents[0].abs().mean())


@pytest.mark.parametrize("corruption", ["blur", None])
def test_the_card_says_who_draws_with_it(corruption) -> None:
    config = {"seed": 0, "corruption": {"kind": corruption} if corruption else None}
    card = model_card(
        CardConfig(), config_yaml=json.dumps(config), steps=1, samples_seen=2, data_lines=[], initialized_from=None
    )
    assert ("from diffusers import" in card) is ("library_name: diffusers" in card) is (corruption is None)
    assert ("Diffusers has no scheduler for it and refuses the folder" in card) is (corruption is not None)
    assert ("not Gaussian noise (blur: `scheduler/` has its" in card) is (corruption is not None)
    assert "python ldm/sample.py --checkpoint" in card
