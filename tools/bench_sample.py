"""Times drawing pictures against diffusers' pipeline: DPM-Solver++(2M) with guidance, the same weights and noise.

In: a pipeline's folder, which both open (`--checkpoint`), or nothing but `--sd15`: Stable Diffusion 1.5's network at
512 pixels with random weights and text states, without decoding. Out: a line for each peer and batch size, and the same
as JSON (`--json FILE`): seconds of a whole call, and evaluations of the network a second, each conditional and
unconditional. Pictures, or latents, are compared before anything is timed.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_record import Record, add_options, begin, compared, interleaved, line, write_records

from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.compiled import compile_blocks, compile_frozen
from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.pipeline.pipeline import Pipeline, load_pipeline
from ldm.sampling.compiling import compile_pipeline
from ldm.sampling.generation import generate, initial_noise, sample_latents

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPTS = ("red heart", "green apple", "flag of France", "a black cat", "orange circle", "a dog", "a tree", "a car")
PEERS = {"eager": "diffusers' pipeline", "compiled": "diffusers' pipeline, channels_last, compiled"}
SAMPLER, SEED = "dpmpp_2m", 3
LIMIT = {"float32": 2 / 255, "bfloat16": 0.5}
"""Largest difference of values in [0, 1], or of latents relative to the largest. In bfloat16 both round differently in
each step: what is compared then is that it is the same picture at all."""
SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
Way = Callable[[int], np.ndarray]
"""Number of pictures -> what was drawn, as float."""


@dataclass(frozen=True)
class Settings:
    """What both do."""

    steps: int
    guidance: float
    device: torch.device
    dtype: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 where pictures differ."""
    parser = argparse.ArgumentParser(prog="tools/bench_sample.py", description=(__doc__ or "").splitlines()[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, help="folder of a pipeline")
    model.add_argument("--sd15", action="store_true", help="Stable Diffusion 1.5's network, random weights")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="pictures of a call (1 8)")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler (20)")
    parser.add_argument("--guidance", type=float, default=7.5, help="scale (7.5)")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=list(DTYPES), help="of the network")
    parser.add_argument("--peers", nargs="+", default=["eager"], choices=list(PEERS), help="diffusers as it is driven")
    parser.add_argument("--compile", action="store_true", help="ours compiled, as sample.py --compile does it")
    add_options(parser, rounds=5)
    options = parser.parse_args(arguments)
    device, found = begin(options)
    wrong, records = 0, list[Record]()
    for dtype in options.dtypes:
        settings = Settings(options.steps, options.guidance, device, dtype)
        ours, peers = (networks if options.sd15 else pipelines)(options, settings)
        for batch in options.batches:
            found_here = measured(ours, peers, batch, options, settings)
            wrong += sum(
                not record.difference <= LIMIT[dtype] for record in found_here if record.difference is not None
            )
            records += found_here
    if options.json is not None:
        write_records(options.json, records, found)
    return 1 if wrong else 0


def measured(
    ours: Way, peers: dict[str, Way], batch: int, options: argparse.Namespace, settings: Settings
) -> list[Record]:
    """Two records for each peer, seconds and evaluations a second, after its results were compared with ours."""
    expected = ours(batch)
    differences = {}
    for name, peer in peers.items():
        other = peer(batch)
        differences[name] = float(np.abs(expected - other).max()) / max(1.0, float(np.abs(other).max()))
        if not differences[name] <= LIMIT[settings.dtype]:
            told = f"{PEERS[name]}, {settings.dtype}, batch {batch}: {differences[name]:.3g}, expected at most"
            print(f"another picture: {told} {LIMIT[settings.dtype]:.3g}", file=sys.stderr)
    ways: dict[str, Callable[[], Any]] = {"ours": partial(ours, batch)}
    ways |= {name: partial(peer, batch) for name, peer in peers.items()}
    seconds = interleaved(ways, options.rounds, settings.device)
    what = "Stable Diffusion 1.5, 512 px, latents" if options.sd15 else "pictures"
    label = f"sample {what}, {settings.dtype}, batch {batch}" + (", compiled" if options.compile else "")
    rates = {way: [settings.steps * batch / second for second in found] for way, found in seconds.items()}
    extra = {"steps": settings.steps, "guidance": settings.guidance, "batch": batch, "dtype": settings.dtype}
    records = []
    for name in peers:
        for suffix, unit, figures in (("", "s", seconds), (", evaluations", "evaluations/s", rates)):
            theirs, apart = figures[name], differences[name]
            records.append(compared(label + suffix, figures["ours"], theirs, PEERS[name], unit, apart, **extra))
            print(line(records[-1]), flush=True)
    return records


def pipelines(options: argparse.Namespace, settings: Settings) -> tuple[Way, dict[str, Way]]:
    """Our pipeline and diffusers', of one folder: prompts to pictures in [0, 1]."""
    diffusers = quiet_diffusers()
    pipeline = load_pipeline(options.checkpoint, settings.device, DTYPES[settings.dtype], channels_last=True)
    shape = pipeline.latent_shape
    if options.compile:
        compile_pipeline(pipeline, shape, options.batches[0], settings.guidance)

    def ours(batch: int) -> np.ndarray:
        pictures = generate(
            pipeline, prompts(batch), seed=SEED, sampler=SAMPLER, steps=settings.steps, guidance=settings.guidance,
            batch_size=batch,
        )  # fmt: skip
        return pictures / 255

    def peer(how: str) -> Way:
        theirs = diffusers.DiffusionPipeline.from_pretrained(options.checkpoint, dtype=DTYPES[settings.dtype])
        driven(theirs.to(settings.device), how)
        return lambda batch: (
            theirs(
                prompts(batch),
                latents=initial_noise(SEED, range(batch), shape).to(settings.device, DTYPES[settings.dtype]),
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                output_type="np",
            ).images
        )

    return ours, {name: peer(name) for name in options.peers}


def networks(options: argparse.Namespace, settings: Settings) -> tuple[Way, dict[str, Way]]:
    """Our network and diffusers' in its pipeline, with the same random weights: text states to latents."""
    diffusers = quiet_diffusers()
    dtype = DTYPES[settings.dtype]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reference = diffusers.UNet2DConditionModel(**SD15)
    unet = UNet(UNetConfig(**SD15))
    unet.load_state_dict(reference.state_dict())
    unet = unet.eval().to(settings.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.compile:
        (compile_frozen if settings.device.type == "cpu" else compile_blocks)(unet)
    # Autoencoder and text encoder take no part: what they would give is given.
    levels: dict[str, Any] = {"block_out_channels": [32] * 4, "down_block_types": ["DownEncoderBlock2D"] * 4}
    autoencoder = AutoencoderKL(AutoencoderConfig(**levels, up_block_types=["UpDecoderBlock2D"] * 4))
    schedule, replays = Schedule(ScheduleConfig()).to(settings.device), settings.device.type == "cuda"
    text_encoder: Any = None
    pipeline = Pipeline(unet, autoencoder, text_encoder, schedule, "epsilon", dtype, replays=replays)
    states = torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(1)).to(settings.device)
    shape = (4, 64, 64)

    def ours(batch: int) -> np.ndarray:
        text, without = (Conditioning(state.expand(batch, -1, -1)) for state in states)
        noise = initial_noise(SEED, range(batch), shape)
        latents = sample_latents(
            pipeline, text, without, noise, sampler=SAMPLER, steps=settings.steps, guidance=settings.guidance
        )
        return latents.cpu().numpy()

    def peer(how: str) -> Way:
        copy = diffusers.UNet2DConditionModel(**SD15)
        copy.load_state_dict(reference.state_dict())
        vae = diffusers.AutoencoderKL(**autoencoder.config.to_dict())
        theirs = diffusers.StableDiffusionPipeline(
            vae=vae, text_encoder=None, tokenizer=None, unet=copy.to(dtype), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
            scheduler=diffusers.DDIMScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1,
                timestep_spacing="trailing",
            ),
        )  # fmt: skip
        driven(theirs.to(settings.device), how)
        text, without = states.to(dtype)
        return lambda batch: (
            theirs(
                prompt_embeds=text.expand(batch, -1, -1),
                negative_prompt_embeds=without.expand(batch, -1, -1),
                latents=initial_noise(SEED, range(batch), shape).to(settings.device, dtype),
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                output_type="latent",
            )
            .images.float()
            .cpu()
            .numpy()
        )

    return ours, {name: peer(name) for name in options.peers}


def driven(theirs: Any, how: str) -> None:
    """Gives diffusers' pipeline DPM-Solver++(2M), and compiles its network where it is to be."""
    diffusers = quiet_diffusers()
    theirs.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    if how == "compiled":
        theirs.unet.to(memory_format=torch.channels_last)
        theirs.unet.compile(fullgraph=True)


def prompts(batch: int) -> list[str]:
    """As many prompts."""
    return [PROMPTS[i % len(PROMPTS)] for i in range(batch)]


def quiet_diffusers() -> Any:
    """The library, imported where it is needed and without warnings of its own between the lines."""
    for name in ("diffusers", "transformers", "xformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return importlib.import_module("diffusers")


if __name__ == "__main__":
    sys.exit(main())
