"""Pipelines: diffusers opens what is saved and gives the same picture, which is a function of its seed and index."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import MINILM, make_clip, make_pipeline

from ldm import pipeline as pipeline_module
from ldm.diffusion.schedule import ScheduleConfig
from ldm.models.autoencoder import posterior_mean, scale_latents
from ldm.pipeline import (
    Pipeline,
    decode_latents,
    encode_prompts,
    generate,
    initial_noise,
    load_pipeline,
    sample_latents,
    save_pipeline,
    step_noise,
    to_uint8,
)
from ldm.pipeline_folder import FILES

PROMPTS = ["red heart", "", "Flag of France", "a caption that is longer than the sixteen tokens of the encoder"]
NEGATIVE = "blurry, ugly"


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("encoder") / "clip"
    make_clip(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pipeline(clip: str) -> Pipeline:
    return make_pipeline(clip)


@pytest.fixture(scope="module")
def saved(pipeline: Pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    save_pipeline(folder, pipeline)
    return folder


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def diffusers_pictures(folder: Path, noise: torch.Tensor, negative: str, *, steps: int = 5, guidance: float = 3.0):
    """(N, H, W, 3) uint8 that diffusers' own pipeline gives for PROMPTS, its scheduler and settings as saved."""
    import diffusers

    reference = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(reference).__name__ == "StableDiffusionPipeline"
    assert type(reference.scheduler).__name__ == "DDIMScheduler"
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    changed = [name for name in settings if name[0] != "_" and reference.scheduler.config[name] != settings[name]]
    assert not changed, f"diffusers corrects {changed} of the scheduler, with a warning"
    reference.set_progress_bar_config(disable=True)
    images = reference(
        PROMPTS,
        negative_prompt=[negative] * len(PROMPTS),
        latents=noise.clone(),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8)


ZERO_SNR = ScheduleConfig(rescale_betas_zero_snr=True)


@pytest.mark.parametrize(
    ("encoder", "parameterization", "noise"),
    [
        ("clip", "epsilon", ScheduleConfig()),
        ("clip", "v", ScheduleConfig()),
        ("clip", "x0", ScheduleConfig(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)),
        ("clip", "v", ZERO_SNR),
        ("minilm", "v", ScheduleConfig()),
    ],
)
def test_diffusers_opens_what_is_saved_and_gives_our_picture(clip, tmp_path, encoder, parameterization, noise) -> None:
    source = clip if encoder == "clip" else MINILM
    pipeline = make_pipeline(source, parameterization=parameterization, noise=noise, attention_mask=encoder == "minilm")
    save_pipeline(tmp_path / "p", pipeline)
    settings = {"seed": 3, "indices": [5, 2, 9, 0], "sampler": "ddim", "steps": 5, "guidance": 3.0}
    ours = generate(pipeline, PROMPTS, negative=NEGATIVE, **settings)
    assert ours.shape == (4, 16, 16, 3)
    assert ours.std() > 10, "a flat picture would match anything"
    latents = initial_noise(pipeline, 3, [5, 2, 9, 0])
    assert difference(ours, diffusers_pictures(tmp_path / "p", latents, NEGATIVE)) <= 2
    # Without a negative prompt, diffusers guides away from "": the encoder's empty caption here, too.
    plain = generate(pipeline, PROMPTS, **settings)
    assert difference(plain, diffusers_pictures(tmp_path / "p", latents, "")) <= 2
    assert difference(plain, ours) > 2, "the negative prompt does nothing"
    # And it comes back as it was.
    assert difference(generate(load_pipeline(tmp_path / "p"), PROMPTS, **settings), plain) <= 1


def test_a_pipeline_made_and_saved_by_diffusers_gives_diffusers_picture(clip, tmp_path) -> None:
    import diffusers
    from transformers import AutoTokenizer, CLIPTextModel

    torch.manual_seed(4)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=8, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    # The scheduler file of Stable Diffusion 1.5, with the sampler that the parity is claimed for.
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing", steps_offset=1,
        clip_sample=False,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=scheduler, text_encoder=CLIPTextModel.from_pretrained(clip),
        tokenizer=AutoTokenizer.from_pretrained(clip), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "theirs")  # fmt: skip
    ours = load_pipeline(tmp_path / "theirs")
    latents = initial_noise(ours, 0, range(4))
    pictures = generate(ours, PROMPTS, seed=0, sampler="ddim", steps=10, guidance=7.5, negative=NEGATIVE, batch_size=3)
    reference = diffusers_pictures(tmp_path / "theirs", latents, NEGATIVE, steps=10, guidance=7.5)
    assert difference(pictures, reference) <= 2


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m", "euler"])
def test_the_picture_of_a_seed_and_index_does_not_depend_on_batch_size_or_company(pipeline, sampler) -> None:
    def draw(rows: list[int], batch_size: int, seed: int = 7) -> np.ndarray:
        return generate(
            pipeline, [PROMPTS[row] for row in rows], indices=[10 + row for row in rows], seed=seed, sampler=sampler,
            steps=4, guidance=3.0, batch_size=batch_size,
        )  # fmt: skip

    together = draw([0, 1, 2, 3], 4)
    assert difference(draw([0, 1, 2, 3], 1), together) <= 1
    assert difference(draw([0, 1, 2, 3], 3), together) <= 1
    assert difference(draw([3, 1], 2), together[[3, 1]]) <= 1
    assert difference(draw([0, 1, 2, 3], 4, seed=8), together) > 20


def test_initial_noise_is_philox_at_seed_purpose_and_index(pipeline) -> None:
    noise = initial_noise(pipeline, 11, [4, 2**40])
    for row, index in enumerate([4, 2**40]):
        philox = np.random.Philox(
            key=np.array([11, 10], dtype=np.uint64), counter=np.array([0, index, 0, 0], dtype=np.uint64)
        )
        expected = np.random.Generator(philox).standard_normal((4, 8, 8), dtype=np.float32)
        assert np.array_equal(noise[row].numpy(), expected)


def test_noise_of_stochastic_steps_differs_by_step_and_picture_and_from_the_initial_noise(pipeline) -> None:
    draw = step_noise(pipeline, 11, [0, 1])
    rows = torch.cat([draw(0), draw(1), initial_noise(pipeline, 11, [0, 1])]).flatten(1)  # (6, D)
    assert torch.equal(draw(1), rows[2:4].reshape(2, 4, 8, 8))
    correlation = torch.corrcoef(rows) - torch.eye(6)
    assert correlation.abs().max() < 0.3  # 256 draws: 5 standard deviations


def test_prompts_show_and_guidance_of_one_ignores_the_negative(pipeline) -> None:
    def draw(prompt: str, guidance: float, negative: str = "") -> np.ndarray:
        return generate(pipeline, [prompt], seed=0, sampler="ddim", steps=4, guidance=guidance, negative=negative)

    assert difference(draw("red heart", 3.0), draw("green apple", 3.0)) > 5
    assert difference(draw("red heart", 1.0), draw("red heart", 1.0, NEGATIVE)) == 0
    # Scale 0 is the unconditional network: any prompt, and a negative prompt in its place.
    assert difference(draw("red heart", 0.0), draw("green apple", 0.0)) == 0
    assert difference(draw("red heart", 0.0, NEGATIVE), draw(NEGATIVE, 1.0)) <= 1


def test_unconditional_states_are_those_that_dropped_captions_are_trained_with(pipeline) -> None:
    conditioning, unconditional = encode_prompts(pipeline, PROMPTS)
    assert torch.equal(unconditional.text, pipeline.text_encoder.empty().text.expand(4, -1, -1))
    assert torch.equal(conditioning.text[1], unconditional.text[0])  # PROMPTS[1] is ""


def test_latents_are_unscaled_exactly_once_before_decoding(pipeline) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        z = posterior_mean(pipeline.autoencoder.encode(images))
        expected = to_uint8(pipeline.autoencoder.decode(z))
    assert difference(decode_latents(pipeline, scale_latents(z, pipeline.autoencoder.config)), expected) <= 1
    assert difference(decode_latents(pipeline, z), expected) > 1  # the factor of this autoencoder matters


def test_pixels_are_rounded_and_clamped_as_closed_form_says() -> None:
    values = torch.tensor([-7.0, -1.0, -1 + 2 / 255, 0.0, 1 - 1.1 / 255, 1.0, 3.0])
    pictures = to_uint8(values.reshape(1, 1, 1, -1).expand(1, 3, 1, -1))
    assert pictures.shape == (1, 1, 7, 3)
    assert pictures[0, 0, :, 0].tolist() == [0, 0, 1, 128, 254, 255, 255]


def test_generating_moves_no_global_generator_and_leaves_the_encoder_usable_in_training(clip) -> None:
    pipeline = make_pipeline(clip)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    generate(pipeline, ["red"], seed=0, sampler="ddpm", steps=2, guidance=2.0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    layer = torch.nn.Linear(pipeline.text_encoder.hidden_size, 1)
    layer(pipeline.text_encoder.empty().text).sum().backward()  # cached while sampling: no inference tensor may stay


def test_lower_precision_is_used_and_stays_close(pipeline, saved) -> None:
    low = load_pipeline(saved, dtype=torch.bfloat16, channels_last=True)
    seen: list[torch.dtype] = []
    low.unet.conv_out.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    settings = {"seed": 1, "sampler": "ddim", "steps": 4, "guidance": 2.0}
    a, b = generate(low, PROMPTS, **settings), generate(pipeline, PROMPTS, **settings)
    assert set(seen) == {torch.bfloat16}
    assert low.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert 0 < np.abs(a.astype(int) - b).mean() < 3
    assert difference(generate(load_pipeline(saved, channels_last=True), PROMPTS, **settings), b) <= 1


def test_progress_counts_the_steps_of_all_batches(pipeline) -> None:
    calls: list[tuple[int, int]] = []
    generate(
        pipeline, PROMPTS, seed=0, sampler="ddim", steps=3, guidance=1.0, batch_size=3,
        progress=lambda done, of: calls.append((done, of)),
    )  # fmt: skip
    assert calls == [(i, 6) for i in range(1, 7)]


def test_averaged_weights_are_saved_in_place_of_the_networks_own(pipeline, tmp_path) -> None:
    own = pipeline.unet.state_dict()
    average = {name: tensor * 0.5 for name, tensor in own.items()}
    save_pipeline(tmp_path / "p", pipeline, unet_state=average)
    stored = load_file(tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == average.keys()
    assert all(torch.equal(stored[name], average[name]) for name in stored)
    assert all(torch.equal(pipeline.unet.state_dict()[name], tensor) for name, tensor in own.items())


def files_of(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def test_frozen_parts_are_linked_from_an_earlier_folder_and_the_rest_is_written(pipeline, saved, tmp_path) -> None:
    save_pipeline(tmp_path / "next", pipeline, frozen_from=saved)
    earlier, later = files_of(saved), files_of(tmp_path / "next")
    assert earlier.keys() == later.keys()
    for name, path in later.items():
        linked = path.stat().st_ino == earlier[name].stat().st_ino
        assert linked == name.startswith(("vae/", "text_encoder/", "tokenizer/")), name
        assert path.read_bytes() == earlier[name].read_bytes(), name


def test_frozen_parts_are_copied_across_file_systems(pipeline, saved) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == saved.stat().st_dev:
        pytest.skip("this machine has one file system only")
    folder = other / f"ldm-test-{os.getpid()}"
    try:
        save_pipeline(folder, pipeline, frozen_from=saved)
        earlier, later = files_of(saved), files_of(folder)
        assert earlier.keys() == later.keys()
        assert all(later[name].read_bytes() == earlier[name].read_bytes() for name in later)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_every_missing_file_is_named_in_one_error(saved, tmp_path) -> None:
    shutil.copytree(saved, tmp_path / "p")
    own = [names[0] for names in FILES]
    assert len(own) == 10
    for name in own:
        (tmp_path / "p" / name).rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError) as error:
            load_pipeline(tmp_path / "p")
        assert [line.strip() for line in str(error.value).splitlines()[1:]] == [name]
        (tmp_path / "away").rename(tmp_path / "p" / name)
    lost = ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"]
    for name in lost:
        (tmp_path / "p" / name).unlink()
    for attempt in (
        lambda: load_pipeline(tmp_path / "p"),
        lambda: save_pipeline(tmp_path / "q", make_pipeline(str(saved)), frozen_from=tmp_path / "p"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            attempt()
        assert [line.strip() for line in str(error.value).splitlines()[1:]] == lost
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_pipeline(tmp_path / "nothing")


def edit_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text())
    for name, value in changes.items():
        if value is ...:
            del values[name]
        else:
            values[name] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, r"_class_name is 'FluxPipeline', expected 'Stable"),
        ("scheduler/scheduler_config.json", {"beta_start": ..., "beta_end": ...}, r"lacks beta_start, beta_end"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, r"found trained_betas"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, r"prediction_type is 'flow', expected one of"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, r"scheduler_config\.json.*'sigmoid'"),
        ("unet/config.json", {"sample_size": None}, r"sample_size: not set"),
        ("unet/config.json", {"cross_attention_dim": 48}, r"(?s)unet.*attn2\.to_k"),
    ],
)
def test_what_a_folder_says_that_is_not_supported_is_named(saved, tmp_path, file, changes, message) -> None:
    shutil.copytree(saved, tmp_path / "p")
    edit_json(tmp_path / "p" / file, **changes)
    with pytest.raises(ValueError, match=message):
        generate(load_pipeline(tmp_path / "p"), ["a"], seed=0, sampler="ddim", steps=1, guidance=1.0)


def test_older_scheduler_files_without_a_prediction_type_are_epsilon(saved, tmp_path) -> None:
    shutil.copytree(saved, tmp_path / "p")
    assert load_pipeline(tmp_path / "p").parameterization == "v"
    edit_json(tmp_path / "p" / "scheduler" / "scheduler_config.json", prediction_type=...)
    assert load_pipeline(tmp_path / "p").parameterization == "epsilon"


def test_parts_that_do_not_fit_each_other_are_named(pipeline, saved, tmp_path) -> None:
    shutil.copytree(saved, tmp_path / "p")
    shutil.rmtree(tmp_path / "p" / "text_encoder")
    shutil.rmtree(tmp_path / "p" / "tokenizer")
    make_pipeline(MINILM).text_encoder.save(tmp_path / "p")
    with pytest.raises(ValueError, match=r"cross_attention_dim is 32, but the states of text_encoder/ are 384 wide"):
        load_pipeline(tmp_path / "p")
    shutil.rmtree(tmp_path / "p" / "unet")
    shutil.copytree(saved / "vae", tmp_path / "p" / "unet")
    with pytest.raises(ValueError, match=r"unet.*_class_name is 'AutoencoderKL', expected 'UNet2DConditionModel'"):
        load_pipeline(tmp_path / "p")


def test_weights_that_are_cut_short_are_an_error_that_names_the_file(saved, tmp_path) -> None:
    shutil.copytree(saved, tmp_path / "p")
    for part in ("unet", "vae"):
        path = tmp_path / "p" / part / "diffusion_pytorch_model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(ValueError, match=f"{part}/diffusion_pytorch_model.safetensors"):
            load_pipeline(tmp_path / "p")
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "magic"}, r"sampler: found 'magic', expected one of ddpm, ddim, dpmpp_2m"),
        ({"spacing": "odd"}, r"spacing: found 'odd'"),
        ({"steps": 0}, r"steps: found 0, expected 1 or more"),
        ({"steps": 1001}, r"steps: found 1001, expected at most the schedule's 1000"),
        ({"prompts": []}, r"found 0 prompts and 0 indices"),
        ({"indices": [1, 2]}, r"found 1 prompts and 2 indices"),
        ({"batch_size": 0}, r"batch_size: found 0"),
        ({"guidance": float("nan")}, r"guidance: found scale nan"),
        ({"guidance_rescale": 1.5}, r"rescale 1\.5, expected 0 to 1"),
        ({"seed": -1}, r"seed is -1"),
    ],
)
def test_settings_out_of_range_are_named(pipeline, changes, message) -> None:
    settings = {"prompts": ["a"], "seed": 0, "sampler": "ddim", "steps": 2, "guidance": 2.0} | changes
    with pytest.raises(ValueError, match=message):
        generate(pipeline, settings.pop("prompts"), **settings)


def test_the_stages_can_be_called_one_by_one(pipeline) -> None:
    whole = generate(pipeline, PROMPTS[:2], seed=5, sampler="dpmpp_2m", steps=4, guidance=15.0, guidance_rescale=1.0)
    latents = sample_latents(
        pipeline, *encode_prompts(pipeline, PROMPTS[:2]), initial_noise(pipeline, 5, [0, 1]), sampler="dpmpp_2m",
        steps=4, guidance=15.0, guidance_rescale=1.0,
    )  # fmt: skip
    assert latents.dtype == torch.float32
    assert np.array_equal(pipeline_module.decode_latents(pipeline, latents), whole)
    plain = generate(pipeline, PROMPTS[:2], seed=5, sampler="dpmpp_2m", steps=4, guidance=15.0)
    assert difference(plain, whole) > 1, "guidance_rescale does nothing"
