"""A text-to-image pipeline: its parts, its folder on disk, and the walk from a prompt to a picture.

Enters: a folder in the layout of diffusers, or parts in memory; prompts with a seed and an index for each.
Leaves: such a folder, or pictures (N, H, W, 3) uint8. Walk: encode_prompts -> initial_noise -> sample_latents ->
decode_latents; each can be called by itself, and `generate` calls them batch by batch.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.data.draws import Purpose, normal
from ldm.diffusion.denoiser import denoiser
from ldm.diffusion.guidance import guided
from ldm.diffusion.objective_config import TargetName
from ldm.diffusion.sampler_contract import Noise, Progress, start
from ldm.diffusion.samplers import OF_NOISE_ALONE, SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.spacing import sigmas
from ldm.models.autoencoder import AutoencoderKL, unscale_latents
from ldm.models.conditioning import Conditioning
from ldm.models.pretrained import build_from_weights, save_component
from ldm.models.text_conditioner import TextConditioner
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.models.whitening import without_shift
from ldm.pipeline_fit import check_draws_from_text, fit_problems, inpaints
from ldm.pipeline_folder import (
    CARD,
    FROZEN,
    SCHEDULER,
    check_files,
    link_folder,
    read_scheduler,
    write_index,
    write_scheduler,
)

logger = logging.getLogger(__name__)

ConfigCheck = Callable[[UNetConfig, AutoencoderKL], object]


@dataclass
class Pipeline:
    """The parts that make pictures out of prompts, all on one device."""

    unet: UNet
    """The network, in eval mode when it samples."""
    autoencoder: AutoencoderKL
    """Between latents and pictures; it decodes in its own dtype, float32 as loaded here."""
    text_encoder: TextConditioner
    """From captions to states, and to pooled text of a pair of encoders."""
    schedule: Schedule
    """The noise levels of training."""
    parameterization: TargetName
    """What the network puts out: epsilon, v or x0."""
    dtype: torch.dtype = torch.float32
    """Precision in which the network computes: float32, or the lower one of its autocast."""

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one picture's latents; raises ValueError when the network's config does not tell its size."""
        return latent_shape_of(self.unet.config, self.autoencoder)


def latent_shape_of(
    unet: UNetConfig, autoencoder: AutoencoderKL, height: int | None = None, width: int | None = None
) -> tuple[int, int, int]:
    """(C, h, w) of a picture of that many pixels; None: of the size that the network was trained on.

    Raises:
        ValueError: no multiple of the autoencoder's factor, or None where the network's config tells no size.
    """
    factor, trained = autoencoder.downsample_factor, unet.sample_size
    for name, side in (("height", height), ("width", width)):
        if side is not None and (side < 1 or side % factor):
            raise ValueError(f"{name}: found {side} pixels, expected a multiple of the autoencoder's factor {factor}")
        if side is None and trained is None:
            raise ValueError("unet sample_size: not set, expected the height and width of the latents to sample")
    h, w = (trained if side is None else side // factor for side in (height, width))
    assert h is not None
    assert w is not None
    return autoencoder.config.latent_channels, h, w


def load_pipeline(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = False,
    check: ConfigCheck | None = None,
) -> Pipeline:
    """Loads a pipeline folder: one that this program wrote, or one of diffusers' for Stable Diffusion 1.x, 2.x or XL.

    Parts that drawing out of prompts does not need (safety checker, feature extractor) are left where they are.

    Args:
        dtype: precision of the network's computation; weights are float32 and autocast where it is lower.
        channels_last: keep the network's activations as (B, H, W, C) in memory.
        check: called before the weights of network and text encoders are read; what it raises ends the loading.

    Raises:
        FileNotFoundError: names every file that the folder lacks.
        ValueError: another kind of pipeline, or parts that do not fit each other; names file and field.
    """
    folder = Path(folder)
    check_files(folder)
    schedule, parameterization = read_scheduler(folder / SCHEDULER)
    unet_config, weights = UNet.open(folder / "unet")
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False)
    if check is not None:
        check(unet_config, autoencoder)
    text_encoder = TextConditioner.from_pipeline(folder, device)
    # Before the network's weights are read: they are most of a pipeline.
    if problems := fit_problems(unet_config, autoencoder.config, text_encoder):
        raise ValueError(f"{folder}: parts that do not fit each other:\n  " + "\n  ".join(problems))
    if autoencoder.config.shift_factor:
        logger.warning(
            "%s/vae/config.json: shift_factor %s is applied here; diffusers' pipelines of Stable Diffusion ignore it "
            "(saved by this program, it is inside the autoencoder's convolutions)",
            folder,
            autoencoder.config.shift_factor,
        )
    # The network's weights keep requires_grad: of others autocast makes its lowered copies anew at each step.
    unet = build_from_weights(lambda: UNet(unet_config), weights, torch.float32).eval().to(device)
    if channels_last:
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Pipeline(unet, autoencoder.to(device), text_encoder, schedule, parameterization, dtype)


def save_pipeline(
    folder: Path,
    pipeline: Pipeline,
    *,
    unet_state: Mapping[str, Tensor] | None = None,
    frozen_from: Path | None = None,
    card: str | None = None,
) -> None:
    """Writes a pipeline folder that `load_pipeline` and diffusers' DiffusionPipeline.from_pretrained open.

    The autoencoder's shift_factor, which diffusers' pipelines of Stable Diffusion ignore, goes into its convolutions.

    Args:
        unet_state: weights for unet/ instead of the network's own: averaged ones, by the same names.
        frozen_from: an earlier folder of the same run, from which vae/ and the folders of text encoders and tokenizers
            are hard-linked (or copied, where the file system cannot link the two) instead of written again.
        card: text of README.md, the model card; no such file when None.

    Raises:
        FileNotFoundError: `frozen_from` lacks files; names them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unet = pipeline.unet
    state = unet.state_dict() if unet_state is None else unet_state
    save_component(state, unet.config.to_dict(), folder / "unet", class_name="UNet2DConditionModel")
    if frozen_from is None:
        without_shift(pipeline.autoencoder).save_pretrained(folder / "vae")
        pipeline.text_encoder.save(folder)
    else:
        check_files(frozen_from)
        for name in FROZEN:
            link_folder(frozen_from / name, folder / name)
    write_scheduler(folder, pipeline.schedule, pipeline.parameterization)
    write_index(folder, pipeline.text_encoder, inpainting=inpaints(unet.config, pipeline.autoencoder.config))
    if card is not None:
        (folder / CARD).write_text(card, encoding="utf-8")


def encode_prompts(pipeline: Pipeline, prompts: Sequence[str], negative: str = "") -> tuple[Conditioning, Conditioning]:
    """Conditioning of B prompts, and B times that of what guidance leads away from: by default the empty caption.

    An empty `negative` is what dropped captions were in training: the encoders' states of "", or zeros where the
    conditioner has these for empty captions (SDXL), as diffusers' pipelines give for negative_prompt=None. Their
    negative_prompt="" is the encoders' states there, which SDXL was not trained with.
    """
    conditioning = pipeline.text_encoder.encode(prompts).to(dtype=torch.float32)
    without = pipeline.text_encoder.encode([negative]) if negative else pipeline.text_encoder.empty()  # one row
    return conditioning, without.to(dtype=torch.float32).expand(len(prompts))


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Unit noise (B, *shape) float32 on the CPU, a function of seed and each picture's index alone."""
    return addressed_noise(seed, Purpose.SAMPLE_NOISE, indices, shape)


def addressed_noise(
    seed: int, purpose: Purpose, indices: Sequence[int], shape: tuple[int, ...], *address: int
) -> Tensor:
    """Unit noise (B, *shape) float32: row b is drawn at (seed, purpose, indices[b], *address)."""
    return torch.from_numpy(np.stack([normal(seed, purpose, index, *address, shape=shape) for index in indices]))


def step_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Noise:
    """Noise of the steps of a stochastic sampler: step -> (B, *shape), a function of seed, index and step alone."""
    return lambda step: addressed_noise(seed, Purpose.SAMPLER_NOISE, indices, shape, step).to(device)


def sizes_of(noise: Tensor, factor: int) -> Tensor:
    """Sizes (B, 6) for noise (B, C, h, w): a whole picture of its own size, as diffusers tells SDXL's network."""
    height, width = noise.shape[-2] * factor, noise.shape[-1] * factor
    return torch.tensor([[height, width, 0, 0, height, width]]).expand(len(noise), -1)


@torch.no_grad()
def sample_latents(
    pipeline: Pipeline,
    conditioning: Conditioning,
    unconditional: Conditioning,
    noise: Tensor,
    *,
    sampler: str,
    steps: int,
    guidance: float,
    guidance_rescale: float = 0.0,
    spacing: str = "trailing",
    fresh_noise: Noise | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Latents (B, C, h, w) as the network knows them (scaled), float32, from unit noise of that shape.

    A network that takes sizes is told those of the whole picture, where the conditioning has none.

    Args:
        noise: unit variance, also where sampling starts from a level with signal left.
        fresh_noise: what a stochastic sampler adds at each step.

    Raises:
        ValueError: an unknown sampler or spacing, steps or guidance out of range.
    """
    if sampler not in OF_NOISE_ALONE:
        raise ValueError(f"sampler: found {sampler!r}, expected one of {', '.join(OF_NOISE_ALONE)}")
    levels = sigmas(pipeline.schedule, steps, spacing)
    if pipeline.unet.config.pooled_channels:
        sizes = sizes_of(noise, pipeline.autoencoder.downsample_factor).to(pipeline.device)
        conditioning, unconditional = (
            part if part.sizes is not None else replace(part, sizes=sizes) for part in (conditioning, unconditional)
        )
    denoise = guided(
        denoiser(pipeline.unet, pipeline.schedule, pipeline.parameterization),
        conditioning,
        unconditional,
        guidance,
        guidance_rescale,
    )
    x = start(noise.to(pipeline.device), levels)
    # Around all steps: autocast forgets its lowered copies of the weights when it ends. Float64 it leaves alone.
    with torch.autocast(pipeline.device.type, pipeline.dtype, enabled=pipeline.dtype != torch.float32):
        latents = SAMPLERS[sampler](denoise, x, levels, noise=fresh_noise, progress=progress)
    return latents.float()


@torch.no_grad()
def decode_latents(pipeline: Pipeline, latents: Tensor) -> np.ndarray:
    """Pictures (B, H, W, 3) uint8 of scaled latents (B, C, h, w); decoded in the autoencoder's own precision."""
    images = pipeline.autoencoder.decode(unscale_latents(latents, pipeline.autoencoder.config))  # (B, 3, H, W)
    return to_uint8(images)


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1], clamped, to (B, H, W, 3) uint8, rounded to the nearest."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    pictures: np.ndarray = scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pictures


def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    sampler: str,
    steps: int,
    guidance: float,
    indices: Sequence[int] | None = None,
    negative: str = "",
    guidance_rescale: float = 0.0,
    spacing: str = "trailing",
    height: int | None = None,
    width: int | None = None,
    noise: Tensor | None = None,
    keep: Callable[[Tensor], object] | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> np.ndarray:
    """One picture for each prompt: (N, H, W, 3) uint8.

    The picture of a prompt is a function of seed, its index and the other settings; batch size and the other prompts
    change it by rounding only. Nothing is drawn from, or left in, a global generator.

    Args:
        seed: 0 .. 2^64 - 1.
        indices: address of each picture's noise under the seed; 0, 1, 2, ... when None.
        guidance: scale; 1 is the conditional network alone, which costs half.
        negative: what to lead away from, instead of the empty caption.
        height, width: of the pictures in pixels; None: what the network was trained on, or what `noise` says.
        noise: unit noise (N, C, h, w) to start from, instead of that of seed and indices.
        keep: called with the latents (B, C, h, w) of each batch, on the CPU, before they are decoded.
        progress: called after each step of each batch with the steps done and the steps of all batches.

    Raises:
        ValueError: no prompts, another number of indices, a batch size below 1, noise of another shape, a network for
            inpainting, or as `sample_latents`.
    """
    indices = range(len(prompts)) if indices is None else indices
    if not prompts or len(indices) != len(prompts):
        raise ValueError(f"generate: found {len(prompts)} prompts and {len(indices)} indices, expected one for each")
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, expected 1 or more")
    shape = checked_shape(pipeline.unet.config, pipeline.autoencoder, len(prompts), height, width, noise)
    starts = range(0, len(prompts), batch_size)
    pictures = []
    for batch, first in enumerate(starts):
        part = slice(first, first + batch_size)

        def report(done: int, of: int, batch: int = batch) -> None:
            if progress is not None:
                progress(batch * of + done, len(starts) * of)

        conditioning, unconditional = encode_prompts(pipeline, prompts[part], negative)
        latents = sample_latents(
            pipeline,
            conditioning,
            unconditional,
            initial_noise(seed, indices[part], shape) if noise is None else noise[part],
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            guidance_rescale=guidance_rescale,
            spacing=spacing,
            fresh_noise=step_noise(seed, indices[part], shape, pipeline.device),
            progress=report,
        )
        if keep is not None:
            keep(latents.cpu())
        pictures.append(decode_latents(pipeline, latents))
    return np.concatenate(pictures)


def checked_shape(
    unet: UNetConfig,
    autoencoder: AutoencoderKL,
    count: int,
    height: int | None,
    width: int | None,
    noise: Tensor | None,
) -> tuple[int, int, int]:
    """(C, h, w) of the latents that `generate` samples for `count` pictures; raises ValueError where it would."""
    check_draws_from_text(unet, autoencoder.config)
    if noise is None:
        return latent_shape_of(unet, autoencoder, height, width)
    factor = autoencoder.downsample_factor
    height, width = height or noise.shape[-2] * factor, width or noise.shape[-1] * factor
    expected = (count, *latent_shape_of(unet, autoencoder, height, width))
    if tuple(noise.shape) != expected:
        raise ValueError(
            f"noise: found shape {tuple(noise.shape)}, expected {expected}: {count} pictures of {height}x{width} "
            f"pixels with the autoencoder's {expected[1]} latent channels and factor {factor}"
        )
    return expected[1:]
