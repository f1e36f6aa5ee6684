"""A text-to-image pipeline: its parts, its folder on disk, and the walk from a prompt to a picture.

Enters: a folder in the layout of diffusers, or parts in memory; prompts with a seed and an index for each.
Leaves: such a folder, or pictures (N, H, W, 3) uint8. Walk: encode_prompts -> initial_noise -> sample_latents ->
decode_latents; each can be called by itself, and `generate` calls them batch by batch.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.data.draws import Purpose, normal
from ldm.diffusion.denoiser import denoiser
from ldm.diffusion.guidance import guided
from ldm.diffusion.objective import TargetName
from ldm.diffusion.samplers import SAMPLERS, Noise, Progress, start
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.spacing import sigmas
from ldm.models.autoencoder import AutoencoderKL, unscale_latents
from ldm.models.conditioning import Conditioning
from ldm.models.pretrained import save_component
from ldm.models.text_conditioner import TextConditioner
from ldm.models.unet import UNet
from ldm.pipeline_folder import (
    FROZEN,
    PIPELINE_CLASS,
    check_files,
    check_index,
    link_folder,
    read_scheduler,
    write_index,
    write_scheduler,
)

logger = logging.getLogger(__name__)


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
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("unet sample_size: not set, expected the height and width of the latents to sample")
        return self.autoencoder.config.latent_channels, size, size


def load_pipeline(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = False,
) -> Pipeline:
    """Loads a pipeline folder: one that this program wrote, or a StableDiffusionPipeline of diffusers.

    Args:
        dtype: precision of the network's computation; weights are float32 and autocast where it is lower.
        channels_last: keep the network's activations as (B, H, W, C) in memory.

    Raises:
        FileNotFoundError: names every file that the folder lacks.
        ValueError: another kind of pipeline, or parts that do not fit each other; names file and field.
    """
    folder = Path(folder)
    check_files(folder)
    check_index(folder)
    schedule, parameterization = read_scheduler(folder)
    # The network's weights keep requires_grad: of others autocast makes its lowered copies anew at each step.
    unet = UNet.from_pretrained(folder / "unet").eval().to(device)
    if channels_last:
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False).to(device)
    pipeline = Pipeline(
        unet, autoencoder, TextConditioner.from_pipeline(folder, device), schedule, parameterization, dtype
    )
    check_fit(pipeline, folder)
    return pipeline


def check_fit(pipeline: Pipeline, folder: Path) -> None:
    """Raises ValueError where network, autoencoder and text encoder of a folder do not fit each other."""
    unet, autoencoder = pipeline.unet.config, pipeline.autoencoder.config
    problems = []
    for name in ("in_channels", "out_channels"):
        if getattr(unet, name) != autoencoder.latent_channels:
            problems.append(
                f"unet/config.json: {name} is {getattr(unet, name)}, "
                f"but the latents of vae/ have {autoencoder.latent_channels} channels"
            )
    if unet.cross_attention_dim != pipeline.text_encoder.hidden_size:
        problems.append(
            f"unet/config.json: cross_attention_dim is {unet.cross_attention_dim}, "
            f"but the states of text_encoder/ are {pipeline.text_encoder.hidden_size} wide"
        )
    if problems:
        raise ValueError(f"{folder}: parts that do not fit each other:\n  " + "\n  ".join(problems))


def save_pipeline(
    folder: Path,
    pipeline: Pipeline,
    *,
    unet_state: Mapping[str, Tensor] | None = None,
    frozen_from: Path | None = None,
) -> None:
    """Writes a pipeline folder that `load_pipeline` and diffusers' DiffusionPipeline.from_pretrained open.

    Args:
        unet_state: weights for unet/ instead of the network's own: averaged ones, by the same names.
        frozen_from: an earlier folder of the same run, from which vae/, text_encoder/ and tokenizer/ are hard-linked
            (or copied, where the file system cannot link the two) instead of written again.

    Raises:
        FileNotFoundError: `frozen_from` lacks files; names them.
    """
    if pipeline.autoencoder.config.shift_factor:
        logger.warning("%s: diffusers' %s does not apply the autoencoder's shift_factor", folder, PIPELINE_CLASS)
    folder.mkdir(parents=True, exist_ok=True)
    unet = pipeline.unet
    state = unet.state_dict() if unet_state is None else unet_state
    save_component(state, unet.config.to_dict(), folder / "unet", class_name="UNet2DConditionModel")
    if frozen_from is None:
        pipeline.autoencoder.save_pretrained(folder / "vae")
        pipeline.text_encoder.save(folder)
    else:
        check_files(frozen_from)
        for name in FROZEN:
            link_folder(frozen_from / name, folder / name)
    write_scheduler(folder, pipeline.schedule, pipeline.parameterization)
    write_index(folder, pipeline.text_encoder)


def encode_prompts(pipeline: Pipeline, prompts: Sequence[str], negative: str = "") -> tuple[Conditioning, Conditioning]:
    """Conditioning of B prompts, and B times that of what guidance leads away from: by default the empty caption."""
    conditioning = pipeline.text_encoder.encode(prompts).to(dtype=torch.float32)
    without = pipeline.text_encoder.encode([negative]) if negative else pipeline.text_encoder.empty()  # one row
    return conditioning, without.to(dtype=torch.float32).expand(len(prompts))


def initial_noise(pipeline: Pipeline, seed: int, indices: Sequence[int]) -> Tensor:
    """Unit noise (B, C, h, w) float32 on the CPU, a function of seed and each picture's index alone."""
    return addressed_noise(seed, Purpose.SAMPLE_NOISE, indices, pipeline.latent_shape)


def addressed_noise(
    seed: int, purpose: Purpose, indices: Sequence[int], shape: tuple[int, ...], *address: int
) -> Tensor:
    """Unit noise (B, *shape) float32: row b is drawn at (seed, purpose, indices[b], *address)."""
    return torch.from_numpy(np.stack([normal(seed, purpose, index, *address, shape=shape) for index in indices]))


def step_noise(pipeline: Pipeline, seed: int, indices: Sequence[int]) -> Noise:
    """Noise of the steps of a stochastic sampler: step -> (B, C, h, w), a function of seed, index and step alone."""
    shape = pipeline.latent_shape
    return lambda step: addressed_noise(seed, Purpose.SAMPLER_NOISE, indices, shape, step).to(pipeline.device)


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

    Args:
        noise: unit variance, also where sampling starts from a level with signal left.
        fresh_noise: what a stochastic sampler adds at each step.

    Raises:
        ValueError: an unknown sampler or spacing, steps or guidance out of range.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: found {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    levels = sigmas(pipeline.schedule, steps, spacing)
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
        progress: called after each step of each batch with the steps done and the steps of all batches.

    Raises:
        ValueError: no prompts, another number of indices, a batch size below 1, or as `sample_latents`.
    """
    indices = range(len(prompts)) if indices is None else indices
    if not prompts or len(indices) != len(prompts):
        raise ValueError(f"generate: found {len(prompts)} prompts and {len(indices)} indices, expected one for each")
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, expected 1 or more")
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
            initial_noise(pipeline, seed, indices[part]),
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            guidance_rescale=guidance_rescale,
            spacing=spacing,
            fresh_noise=step_noise(pipeline, seed, indices[part]),
            progress=report,
        )
        pictures.append(decode_latents(pipeline, latents))
    return np.concatenate(pictures)
