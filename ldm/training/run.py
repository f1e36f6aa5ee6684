"""A run: its parts built and checked against each other, resumed from a checkpoint, saved as one.

Enters: a RunConfig and the processes that run. Leaves: a Run, which `ldm/train.py` steps; checkpoints in its folder.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ldm.config import RunConfig, differences, to_dict, to_yaml
from ldm.data.encoding import encoder_identity, identity_problems
from ldm.data.manifest import Manifest
from ldm.data.quarantine import Ledger
from ldm.diffusion.schedule import Schedule
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.pretrained import resolve_source
from ldm.models.text_encoder import TextEncoder
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline, save_pipeline
from ldm.pipeline_folder import FROZEN
from ldm.training.checkpoint import TrainingState, intact, load_training_state, newest_complete, save_checkpoint
from ldm.training.distributed import BatchSplit
from ldm.training.ema import EMA
from ldm.training.metrics import LossWindow, MetricsWriter
from ldm.training.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors
from ldm.training.wrapping import wrap_network


@dataclass
class Run:
    """The parts of a run in training; `network` is what the engine wraps around `pipeline.unet`."""

    config: RunConfig
    accelerator: Accelerator
    split: BatchSplit
    manifest: Manifest
    pipeline: Pipeline
    network: nn.Module
    held_out: Manifest | None
    """Validation shards; None where no validation loss is computed."""
    optimizer: Any
    """AcceleratedOptimizer around AdamW: it unscales gradients and skips steps in fp16."""
    ema: EMA
    window: LossWindow
    ledger: Ledger
    metrics: MetricsWriter
    last_checkpoint: Path | None = None
    """Checkpoint that this run wrote or resumed from last: its frozen parts are linked into the next."""

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one sample's latents."""
        autoencoder = self.pipeline.autoencoder
        side = self.config.data.resolution // autoencoder.downsample_factor
        return autoencoder.config.latent_channels, side, side


def build_run(config: RunConfig, accelerator: Accelerator, split: BatchSplit, say: Callable[[str], None]) -> Run:
    """Loads and builds all parts; raises ValueError naming the settings that do not fit each other."""
    device, run_dir = accelerator.device, Path(config.run_dir)
    autoencoder = AutoencoderKL.from_pretrained(resolve_source(config.autoencoder)).requires_grad_(False).eval()
    text_encoder = TextEncoder(config.text_encoder, device)
    manifest = Manifest.load(config.data.shards)
    held_out = None
    if config.data.validation is not None and config.validation.every:
        held_out = Manifest.load(config.data.validation)
    else:
        say("no validation loss: data.validation is not set, or validation.every is 0")
    manifests = [manifest] if held_out is None else [manifest, held_out]
    check_parts(config, autoencoder, text_encoder, manifests)
    # The initial weights are a function of the seed alone: the same on each process, and no global generator moves.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet = UNet(config.unet)
    network = wrap_network(unet, accelerator, config.wrapping)
    schedule = Schedule(config.noise).to(device)
    pipeline = Pipeline(unet, autoencoder.to(device), text_encoder, schedule, config.objective.parameterization)
    ledger = Ledger(run_dir / "quarantine.jsonl", config.data.quarantine_limit)
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        for one in manifests:
            ledger.append(one.damaged())
    parameters = sum(p.numel() for p in unet.parameters())
    kind = "raw" if manifest.encoder is None else "encoded"
    say(
        f"UNet with {parameters:,} parameters; {sum(manifest.counts):,} {kind} samples in {len(manifest.counts)} "
        f"shards of {config.data.shards}"
    )
    return Run(
        config=config,
        accelerator=accelerator,
        split=split,
        manifest=manifest,
        held_out=held_out,
        pipeline=pipeline,
        network=network,
        optimizer=accelerator.prepare_optimizer(
            make_optimizer(unet.named_parameters(), config.optimizer, scaled=accelerator.scaler is not None)
        ),
        ema=EMA(unet, config.ema),
        window=LossWindow(device),
        ledger=ledger,
        metrics=MetricsWriter(accelerator, run_dir, config.metrics, to_dict(config)),
    )


def check_parts(
    config: RunConfig, autoencoder: AutoencoderKL, text_encoder: TextEncoder, manifests: Sequence[Manifest]
) -> None:
    """Raises ValueError with every setting that does not fit autoencoder, text encoder or shards."""
    problems = []
    unet, channels = config.unet, autoencoder.config.latent_channels
    factor = autoencoder.downsample_factor
    for name in ("in_channels", "out_channels"):
        if getattr(unet, name) != channels:
            problems.append(f"unet.{name} is {getattr(unet, name)}, but the autoencoder's latents have {channels}")
    if unet.cross_attention_dim != text_encoder.hidden_size:
        problems.append(
            f"unet.cross_attention_dim is {unet.cross_attention_dim}, "
            f"but the text encoder's states are {text_encoder.hidden_size} wide"
        )
    if config.data.resolution % factor:
        problems.append(f"data.resolution {config.data.resolution} is no multiple of the autoencoder's factor {factor}")
    elif unet.sample_size not in (None, config.data.resolution // factor):
        problems.append(
            f"unet.sample_size is {unet.sample_size}, but pictures of {config.data.resolution} have latents of "
            f"{config.data.resolution // factor}"
        )
    elif unet.sample_size is None and config.previews.every and config.previews.prompts:
        problems.append("unet.sample_size is not set: previews need the size of the latents")
    for manifest in manifests:
        if manifest.encoder is not None:
            stored_text = manifest.encoder.get("text_encoder") is not None
            expected = encoder_identity(
                autoencoder, text_encoder, config.data.resolution, config.encoding, text_states=stored_text
            )
            problems += [f"{manifest.folder}: {one}" for one in identity_problems(manifest.encoder, expected)]
    if problems:
        raise ValueError("the parts of this run do not fit each other:\n  " + "\n  ".join(problems))


def resume(run: Run, say: Callable[[str], None]) -> int:
    """Puts back the newest complete checkpoint of the run's folder, if there is one; returns the steps done.

    Raises:
        ValueError: config or shards differ from the checkpoint's in something that would make it another run.
    """
    found: list[str | None] = [None]
    if run.accelerator.is_main_process:
        newest = newest_complete(run.run_dir / "checkpoints", say)
        found = [str(newest) if newest else None]
    name = broadcast_object_list(found)[0]
    if name is None:
        return 0
    checkpoint = Path(name)
    state, average = load_training_state(checkpoint)
    saved = yaml.safe_load((checkpoint / "training_state" / "config.yaml").read_text())
    changed = differences(saved, to_dict(run.config))
    if state.scalars["shards"] != run.manifest.digest():
        changed.append(f"the manifest of {run.config.data.shards} is another than the one that the run began with")
    if changed:
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings:\n  " + "\n  ".join(changed) + "\nPut them back to "
            "resume, or give another --run_dir to start a run of its own."
        )
    run.pipeline.unet.load_state_dict(state.weights)
    load_optimizer_tensors(run.optimizer.optimizer, state.optimizer)
    run.ema.load_state_dict(average, state.ema_updates)
    window = torch.tensor(state.scalars["loss_window"], dtype=torch.float64)
    run.window.restore(window, run.accelerator.is_main_process)
    run.ledger.restore(state.scalars["ledger"])
    if run.accelerator.scaler is not None and state.scalars["scaler"]:
        run.accelerator.scaler.load_state_dict(state.scalars["scaler"])
    run.last_checkpoint = checkpoint
    say(f"resuming after step {state.step} from {checkpoint}")
    return state.step


def save(run: Run, done: int, grad_norm: Tensor) -> None:
    """Writes the checkpoint of step `done` on the main process while the others wait. Collective.

    Raises:
        FloatingPointError: loss or gradient are not finite: no good checkpoint gives way to a bad one.
    """
    window = run.window.total()
    scaler = run.accelerator.scaler
    check_finite(float(window.sum()), float(grad_norm), done, scaled=scaler is not None)
    run.ledger.share(run.accelerator)
    if run.accelerator.is_main_process:
        state = TrainingState(
            step=done,
            weights=run.pipeline.unet.state_dict(),
            optimizer=optimizer_tensors(run.optimizer.optimizer),
            ema_updates=run.ema.updates,
            scalars={
                "loss_window": window.tolist(),
                "ledger": run.ledger.state(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "shards": run.manifest.digest(),
            },
        )
        run.last_checkpoint = save_checkpoint(
            run.run_dir / "checkpoints",
            state,
            lambda folder: write_pipeline(run, folder),
            config_yaml=to_yaml(run.config),
            keep=run.config.training.keep_checkpoints,
        )
    run.accelerator.wait_for_everyone()


def write_pipeline(run: Run, folder: Path) -> None:
    """The pipeline's files: averaged weights; frozen parts are links where an earlier checkpoint has them intact."""
    earlier = run.last_checkpoint
    if earlier is not None and not intact(earlier, FROZEN):
        earlier = None
    save_pipeline(folder, run.pipeline, unet_state=run.ema.state_dict(), frozen_from=earlier)


def check_finite(loss: float, grad_norm: float, done: int, *, scaled: bool) -> None:
    """Raises FloatingPointError on a loss or gradient that is not finite: nothing after it would be worth its cost.

    With a loss scaler (`scaled`) an infinite gradient is its way of finding the scale, and its step is skipped.
    """
    if not math.isfinite(loss) or not (scaled or math.isfinite(grad_norm)):
        raise FloatingPointError(
            f"step {done}: loss {loss}, gradient norm {grad_norm}; checkpoints are from before. Lower optimizer.lr, or "
            "set wrapping.mixed_precision to bf16 or no"
        )
