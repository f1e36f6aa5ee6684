"""A run: its parts built and checked against each other, resumed from a checkpoint, saved as one.

Enters: a RunConfig and the processes that run. Leaves: a Run, which `ldm/train.py` steps; checkpoints in its folder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from ldm.models.text_conditioner import TextConditioner
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline, save_pipeline
from ldm.pipeline_folder import FROZEN
from ldm.training.bad_numbers import LOG, BadSteps
from ldm.training.checkpoint import TrainingState, intact, load_training_state, newest_complete, point_latest
from ldm.training.checkpoint_writer import CheckpointWriter
from ldm.training.distributed import Agreement, BatchSplit
from ldm.training.ema import EMA
from ldm.training.metrics import LossWindow, MetricsWriter, forget_after
from ldm.training.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors
from ldm.training.run_data import RunData, Share
from ldm.training.wrapping import settle_buckets, wrap_network


@dataclass
class Run:
    """The parts of a run in training; `network` is what the engine wraps around `pipeline.unet`."""

    config: RunConfig
    accelerator: Accelerator
    split: BatchSplit
    data: RunData
    pipeline: Pipeline
    network: nn.Module
    optimizer: Any
    """AcceleratedOptimizer around AdamW: it unscales gradients and skips steps in fp16."""
    ema: EMA
    window: LossWindow
    ledger: Ledger
    bad_steps: BadSteps
    metrics: MetricsWriter
    writer: CheckpointWriter
    """Writes checkpoints in the background; used on the main process."""
    agreement: Agreement

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def share(self) -> Share:
        """What this process takes of the data."""
        autoencoder, text_encoder = self.pipeline.autoencoder, self.pipeline.text_encoder
        side = self.config.data.resolution // autoencoder.downsample_factor
        return Share(
            rank=self.accelerator.process_index,
            split=self.split,
            seed=self.config.seed,
            latent_shape=(autoencoder.config.latent_channels, side, side),
            text_shape=(text_encoder.max_length, text_encoder.hidden_size),
        )


def build_run(config: RunConfig, accelerator: Accelerator, split: BatchSplit, say: Callable[[str], None]) -> Run:
    """Loads and builds all parts; raises ValueError naming the settings that do not fit each other."""
    device, run_dir = accelerator.device, Path(config.run_dir)
    autoencoder = AutoencoderKL.from_pretrained(resolve_source(config.autoencoder)).requires_grad_(False).eval()
    text_encoder = TextConditioner.load([config.text_encoder], device)
    data = RunData.open(config.data, validating=config.validation.every > 0)
    for line in data.lines():
        say(line)
    check_parts(config, autoencoder, text_encoder, data.all_manifests())
    # The initial weights are a function of the seed alone: the same on each process, and no global generator moves.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet = UNet(config.unet)
    network = wrap_network(unet, accelerator, config.wrapping)
    side = config.data.resolution // autoencoder.downsample_factor
    settle_buckets(network, config.unet, side, text_encoder.max_length, split.micro_batch, accelerator)
    schedule = Schedule(config.noise).to(device)
    pipeline = Pipeline(unet, autoencoder.to(device), text_encoder, schedule, config.objective.parameterization)
    ledger = Ledger(run_dir / "quarantine.jsonl", config.data.quarantine_limit)
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        ledger.append(data.damaged())
    say(f"UNet with {sum(p.numel() for p in unet.parameters()):,} parameters")
    return Run(
        config=config,
        accelerator=accelerator,
        split=split,
        data=data,
        pipeline=pipeline,
        network=network,
        optimizer=accelerator.prepare_optimizer(
            make_optimizer(unet.named_parameters(), config.optimizer, scaled=accelerator.scaler is not None)
        ),
        ema=EMA(unet, config.ema),
        window=LossWindow(device),
        ledger=ledger,
        bad_steps=BadSteps(run_dir / LOG, config.training.bad_steps_allowed),
        writer=CheckpointWriter(
            run_dir / "checkpoints",
            keep=config.training.keep_checkpoints,
            failures_allowed=config.training.checkpoint_failures_allowed,
            report=say,
        ),
        agreement=Agreement(accelerator, config.distributed.timeout_minutes),
        metrics=MetricsWriter(accelerator, run_dir, config.metrics, to_dict(config)),
    )


def check_parts(
    config: RunConfig, autoencoder: AutoencoderKL, text_encoder: TextConditioner, manifests: Sequence[Manifest]
) -> None:
    """Raises ValueError with every setting that does not fit autoencoder, text encoder or shards."""
    problems = []
    unet, channels = config.unet, autoencoder.config.latent_channels
    factor = autoencoder.downsample_factor
    for name in ("in_channels", "out_channels"):
        if getattr(unet, name) != channels:
            problems.append(f"unet.{name} is {getattr(unet, name)}, but the autoencoder's latents have {channels}")
    if unet.pooled_channels:
        problems.append(
            "unet.addition_embed_type is text_time: such a network takes sizes, which each batch has, and pooled text, "
            "which no text encoder here gives yet"
        )
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
    buckets, steepest = config.data.buckets, 2 ** (len(unet.block_out_channels) - 1)
    if buckets is not None and buckets.step % (factor * steepest):
        problems.append(
            f"data.buckets.step is {buckets.step}, but autoencoder and UNet together halve a side to 1 /"
            f" {factor * steepest}: it has to be a multiple of that"
        )
    for manifest in manifests:
        if manifest.encoder is not None:
            stored_text = manifest.encoder.get("text_encoder") is not None
            expected = encoder_identity(
                autoencoder,
                text_encoder,
                config.data.resolution,
                config.encoding,
                text_states=stored_text,
                buckets=buckets,
            )
            problems += [f"{manifest.folder}: {one}" for one in identity_problems(manifest.encoder, expected)]
    if problems:
        raise ValueError("the parts of this run do not fit each other:\n  " + "\n  ".join(problems))


def resume(run: Run, say: Callable[[str], None]) -> int:
    """Puts back the newest complete checkpoint of the run's folder, if there is one; returns the steps done.

    Lines of metrics and logs that tell of later steps are dropped: they will be written again.

    Raises:
        ValueError: config or shards differ from the checkpoint's in something that would make it another run.
    """
    found: list[str | None] = [None]
    if run.accelerator.is_main_process:
        newest = newest_complete(run.run_dir / "checkpoints", say)
        if newest is not None:
            point_latest(newest.parent, newest)  # a kill may have come between its name and this, or before it altered
        found = [str(newest) if newest else None]
    name = broadcast_object_list(found)[0]
    step = 0
    if name is not None:
        step = restore(run, Path(name), say)
        run.writer.last = Path(name)
        say(f"resuming after step {step} from {name}")
    run.metrics.start(step)
    if run.accelerator.is_main_process:
        forget_after(run.bad_steps.path, step)
    return step


def restore(run: Run, checkpoint: Path, say: Callable[[str], None]) -> int:
    """Puts back the state of a checkpoint; returns the steps done.

    Raises:
        CheckpointError: it is incomplete or altered.
        ValueError: config or shards differ from the checkpoint's in something that would make it another run.
    """
    state, average = load_training_state(checkpoint)
    saved = yaml.safe_load((checkpoint / "training_state" / "config.yaml").read_text())
    changed = differences(saved, to_dict(run.config))
    if state.scalars["shards"] != run.data.digest():
        changed.append("data.shards: other samples, sources or weights than those that the run began with")
    if changed:
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings:\n  " + "\n  ".join(changed) + "\nPut them back to "
            "resume, or give another --run_dir to start a run of its own."
        )
    for section, name in (("training", "steps"), ("optimizer", "lr")):
        before, now = saved[section][name], to_dict(run.config)[section][name]
        if before != now:
            say(f"{section}.{name} was {before} and is now {now}: the learning rate follows it from here on")
    run.pipeline.unet.load_state_dict(state.weights)
    load_optimizer_tensors(run.optimizer.optimizer, state.optimizer)
    run.ema.load_state_dict(average, state.ema_updates)
    window = torch.tensor(state.scalars["loss_window"], dtype=torch.float64)
    run.window.restore(window, run.accelerator.is_main_process)
    run.ledger.restore(state.scalars["ledger"])
    run.bad_steps.restore(state.scalars["bad_steps"])
    if run.accelerator.scaler is not None and state.scalars["scaler"]:
        run.accelerator.scaler.load_state_dict(state.scalars["scaler"])
    return state.step


def save(run: Run, done: int) -> None:
    """Hands the state after step `done` to the main process's writer, which goes on in the background. Collective.

    Raises:
        FloatingPointError: weights are not finite: no good checkpoint gives way to a bad one.
        OSError, CheckpointError: more writes in a row have failed than training.checkpoint_failures_allowed.
    """
    run.agreement.wait(lambda: previous_written(run))
    window = run.window.total()
    run.ledger.share(run.accelerator)
    state = run.pipeline.unet.state_dict()
    if not torch.stack(torch._foreach_norm(list(state.values()))).isfinite().all():
        raise FloatingPointError(
            f"after step {done} weights are not finite; checkpoints are from before. Lower optimizer.lr, or set "
            "wrapping.mixed_precision to bf16 or no"
        )
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler
        run.writer.save(
            TrainingState(
                step=done,
                weights=state,
                optimizer=optimizer_tensors(run.optimizer.optimizer),
                ema_updates=run.ema.updates,
                scalars={
                    "loss_window": window.tolist(),
                    "ledger": run.ledger.state(),
                    "bad_steps": run.bad_steps.state(),
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "shards": run.data.digest(),
                },
            ),
            run.ema.state_dict(),
            partial(write_pipeline, run),
            config_yaml=to_yaml(run.config),
        )


def previous_written(run: Run) -> bool:
    """Whether no checkpoint is being written; raises when too many in a row could not be."""
    if not run.writer.poll():
        return False
    if run.writer.failures > run.config.training.checkpoint_failures_allowed:
        run.writer.wait()
    return True


def finish_writing(run: Run) -> None:
    """Waits until the last checkpoint is complete. Collective.

    Raises:
        OSError, CheckpointError: it could not be written.
    """

    def written() -> bool:
        if run.writer.poll():
            run.writer.wait()
            return True
        return False

    run.agreement.wait(written)


def write_pipeline(run: Run, folder: Path, averaged: Mapping[str, Tensor], earlier: Path | None) -> None:
    """The pipeline's files: averaged weights; frozen parts are links where an earlier checkpoint has them intact."""
    if earlier is not None and not intact(earlier, FROZEN):
        earlier = None
    save_pipeline(folder, run.pipeline, unet_state=averaged, frozen_from=earlier)
