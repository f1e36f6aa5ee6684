"""A run: its parts, loaded, built and checked against each other.

Enters: a RunConfig and the processes that run. Leaves: a Run, which run_state.py begins or resumes, and which
`ldm/train.py` steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm.config import RunConfig, forward_process, to_dict
from ldm.data.quarantine import Ledger
from ldm.diffusion.corruption import Corruption
from ldm.diffusion.corruption_config import build_corruption
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.parity_gate import Trial
from ldm.models.text_conditioner import TextConditioner
from ldm.models.text_encoder import TextEncoderConfig
from ldm.models.text_loading import FOLDERS
from ldm.models.unet import UNet
from ldm.pipeline.pipeline import Pipeline
from ldm.training.arrival import Arrival, completed
from ldm.training.bad_numbers import LOG, BadSteps
from ldm.training.breakdown import NO_PARTS, StepParts
from ldm.training.checkpoint_writer import CheckpointWriter
from ldm.training.distributed import Agreement, BatchSplit
from ldm.training.ema import EMA
from ldm.training.engine import Engine
from ldm.training.fit import check_parts, loading
from ldm.training.launched import engine_name
from ldm.training.metrics import LossWindow, MetricsWriter
from ldm.training.own_checkpoints import checked_source
from ldm.training.run_data import RunData, Share
from ldm.training.stragglers import OwnTime
from ldm.training.wrapping import settle_buckets, wrap_network


@dataclass
class Run:
    """The parts of a run in training; `engine.network` is what the engine wraps around `pipeline.unet`."""

    config: RunConfig
    accelerator: Accelerator
    split: BatchSplit
    data: RunData
    pipeline: Pipeline
    engine: Engine
    ema: EMA
    window: LossWindow
    ledger: Ledger
    bad_steps: BadSteps
    metrics: MetricsWriter
    writer: CheckpointWriter
    """Writes checkpoints in the background; used on the main process."""
    agreement: Agreement
    own_time: OwnTime
    arrival: Arrival
    parts: StepParts = NO_PARTS
    """Where a step's time goes, for a benchmark that puts its own here."""
    corruption: Corruption | None = None
    """What the network learns to undo in place of noise; None for noise."""
    initialized_from: str | None = None
    """Source and hash of the weights that the run began with; None where they were random."""

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    def position(self, t: Tensor) -> Tensor:
        """Positions (B,) in [0, 1] of the range of noise, or of the corruption's levels, of what batch_loss drew."""
        if self.corruption is None:
            return self.pipeline.schedule.position(t)
        return (t.double() - 0.5) / self.corruption.levels  # levels 1 to T, each the middle of its share

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
            pooled_size=text_encoder.pooled_size,
            offset=self.config.objective.offset_noise > 0,
            more_noise=0 if self.config.corruption is None else self.config.corruption.more_noise,
        )


def checked_text_configs(config: RunConfig) -> Iterator[TextEncoderConfig | None]:
    """The settings of both text encoders, with sources that may be loaded from; raises as `checked_source`."""
    names = ("text_encoder", "text_encoder_2")
    for name, one, folders in zip(names, (config.text_encoder, config.text_encoder_2), FOLDERS, strict=True):
        if one is None:
            yield None
            continue
        with loading(f"{name}.source"):
            source = checked_source(one.source, *folders)
        with loading(f"{name}.tokenizer"):
            tokenizer = one.tokenizer and checked_source(one.tokenizer, folders[1])
        yield replace(one, source=source, tokenizer=tokenizer)


def build_run(config: RunConfig, accelerator: Accelerator, split: BatchSplit, say: Callable[[str], None]) -> Run:
    """Loads and builds all parts; raises ValueError naming the settings that do not fit each other.

    Of this program's checkpoints the files of what is loaded are verified first (CheckpointError).
    """
    device, run_dir = accelerator.device, Path(config.run_dir)
    with loading("autoencoder"):
        autoencoder = AutoencoderKL.from_pretrained(checked_source(config.autoencoder, "vae"))
    autoencoder.requires_grad_(False).eval()
    text_encoder = TextConditioner.load(list(checked_text_configs(config)), device, config.empty_caption)
    data = RunData.open(config.data, validating=config.validation.every > 0)
    for line in data.lines():
        say(line)
    check_parts(config, autoencoder, text_encoder, data.all_manifests())
    # The initial weights are a function of the seed alone: the same on each process, and no global generator moves.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet = UNet(config.unet)
    parameters = sum(p.numel() for p in unet.parameters())
    distributed = config.distributed
    name = engine_name(distributed, accelerator.num_processes)
    side = config.data.resolution // autoencoder.downsample_factor
    trial = Trial(split.micro_batch, side, text_encoder.max_length)
    engine = wrap_network(unet, accelerator, config.wrapping, name, distributed, config.optimizer, split, trial)
    settle_buckets(engine.network, config.unet, side, text_encoder.max_length, split.micro_batch, accelerator)
    pipeline = Pipeline(
        unet,
        autoencoder.to(device),
        text_encoder,
        forward_process(config).to(device),
        config.objective.parameterization,
        sigma_data=config.objective.sigma_data,
        corruption=config.corruption,
    )
    ledger = Ledger(run_dir / "quarantine.jsonl", config.data.quarantine_limit)
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        ledger.append(data.damaged())
    say(f"UNet with {parameters:,} parameters")
    return Run(
        config=config,
        accelerator=accelerator,
        split=split,
        data=data,
        pipeline=pipeline,
        engine=engine,
        ema=EMA(unet, config.ema, engine.parts),
        window=LossWindow(device),
        ledger=ledger,
        bad_steps=BadSteps(run_dir / LOG, config.training.bad_steps_allowed),
        corruption=None if config.corruption is None else build_corruption(config.corruption, side, side),
        writer=CheckpointWriter(
            run_dir / "checkpoints",
            keep=config.training.keep_checkpoints,
            failures_allowed=config.training.checkpoint_failures_allowed,
            report=say,
        ),
        agreement=Agreement(accelerator, config.distributed.timeout_minutes),
        own_time=OwnTime(device, engine.alone_in_forward),
        arrival=Arrival(device, partial(completed, text_encoder=text_encoder, autoencoder=autoencoder)),
        metrics=MetricsWriter(accelerator, run_dir, config.metrics, to_dict(config)),
    )
