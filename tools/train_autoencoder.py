"""Trains the first stage, a KL autoencoder: `accelerate launch tools/train_autoencoder.py --config configs/X.yaml`.

In: raw shards. Out: a folder in diffusers' layout (config.json, fp16 safetensors, README.md) that a run names as its
`autoencoder`, with latents of mean 0 and standard deviation 1; metrics and reconstructions in the run's folder.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from jsonargparse import ArgumentParser, set_parsing_settings
from torch import Tensor, nn
from tqdm import tqdm

from ldm.data.batch import Batch
from ldm.data.dataset import DataConfig
from ldm.data.loader import make_loader, make_validation_loader
from ldm.data.manifest import Manifest
from ldm.data.positions import Positions
from ldm.data.quarantine import Ledger
from ldm.grid import save_png
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL, posterior_mean
from ldm.models.whitening import fold_whitening, latent_statistics
from ldm.training.autoencoder_card import CardConfig, Measured, reconstruction_grid, rounded, write_folder
from ldm.training.autoencoder_loss import AutoencoderLoss, AutoencoderLossConfig, psnr
from ldm.training.distributed import BatchSplit, first_lines, roll_call, split_global_batch, start_accelerator
from ldm.training.ema import EMA, EMAConfig
from ldm.training.launched import DistributedConfig, EngineError, engine_name
from ldm.training.metrics import Clock, MetricsConfig, MetricsWriter, peak_memory_gib
from ldm.training.optimizer import OptimizerConfig, learning_rate, make_optimizer, set_learning_rate

STATISTICS_PICTURES = 4096
"""Training pictures over which the latents' mean and standard deviation are taken."""
GRID_PICTURES = 32
FIXED_BATCH = 32
INITIAL_LOGVAR = -6.0
"""Log-variance of the posterior at the first step: at 0 its noise is as large as the signal, and the decoder learns to
ignore the latents for hundreds of steps."""


@dataclass
class TrainingConfig:
    """Length of the run and its global batch."""

    steps: int = 2000
    """Optimizer steps."""
    global_batch: int = 16
    """Pictures of one optimizer step over all processes and accumulation."""
    max_micro_batch: int | None = None
    """Most pictures that one process passes through at once; unset: its whole share of the global batch."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Autocast of forward and backward; weights, average and optimizer state stay float32."""
    validate_every: int = 500
    """Optimizer steps between two held-out PSNRs; the last step always has one."""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}: found {getattr(self, name)}, expected 1 or more")


@dataclass
class AutoencoderRun:
    """One training of an autoencoder."""

    run_dir: str
    """Folder of the run: config.yaml, metrics.jsonl, quarantine.jsonl, reconstructions.png."""
    out: str
    """Folder of the finished autoencoder; must not exist, appears when complete."""
    data: DataConfig
    """Raw shards; `data.validation` are the held-out ones that PSNR is measured on."""
    autoencoder: AutoencoderConfig
    """The network."""
    seed: int = 0
    """Seed of everything random in the run."""
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    """Weights of the loss's parts."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and the learning rate."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """The average of the weights, which is what the folder holds."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length and global batch."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Processes and engine that are expected."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """Where numbers go."""
    card: CardConfig = field(default_factory=CardConfig)
    """Text of the README.md beside the weights."""


@dataclass
class Trained:
    """The parts of a run; `network` is what the engine wraps around `autoencoder`."""

    config: AutoencoderRun
    accelerator: Accelerator
    split: BatchSplit
    manifest: Manifest
    held_out: Manifest
    autoencoder: AutoencoderKL
    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    loss: AutoencoderLoss
    ledger: Ledger
    metrics: MetricsWriter
    say: Callable[[str], None]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.config.data.resolution // self.autoencoder.downsample_factor
        return self.config.autoencoder.latent_channels, side, side


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the tool."""
    config = parse_config(argv)
    accelerator = start_accelerator(config.distributed, config.training.mixed_precision)
    train(config, accelerator)
    accelerator.end_training()


def parse_config(argv: Sequence[str] | None) -> AutoencoderRun:
    """AutoencoderRun out of `--config FILE` and dotted overrides; unknown settings end the program with status 2."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="tools/train_autoencoder.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", action="config", help="YAML file of the run; later options override it.")
    parser.add_class_arguments(AutoencoderRun, as_group=True)
    parsed = parser.parse_args(argv)
    try:
        parsed = parser.instantiate(parsed)
        config = AutoencoderRun(**{part.name: parsed[part.name] for part in dataclasses.fields(AutoencoderRun)})
        if not config.data.validation:
            raise ValueError("data.validation: not set, expected the held-out shards that PSNR is measured on")
        if Path(config.out).exists():
            raise ValueError(f"out: {config.out} exists: remove it, or choose another folder")
    except ValueError as error:
        parser.error(str(error))
    return config


def train(config: AutoencoderRun, accelerator: Accelerator) -> None:
    """Trains, whitens the latents, and writes the finished folder."""
    run = build(config, accelerator)
    run_dir, total = Path(config.run_dir), config.training.steps
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, width=120))
    run.metrics.start(0)
    batches, clock = iter(training_batches(run)), Clock()
    sums: dict[str, Tensor] = {}
    began = time.perf_counter()
    with tqdm(total=total, unit="step", disable=not accelerator.is_main_process, mininterval=1.0) as bar:
        for step in range(total):
            grad_norm = train_step(run, step, batches, clock, sums)
            bar.update()
            if step == 0 or (step + 1) % config.metrics.log_every == 0 or step + 1 == total:
                record = log_step(run, step, grad_norm, clock, sums)
                bar.set_postfix(loss=f"{record['loss']:.4f}", lr=f"{record['lr']:.1e}")
            if (step + 1) % config.training.validate_every == 0 and step + 1 < total:
                with clock.paused(), run.ema.applied():
                    decibels = held_out_psnr(run)
                run.metrics.write(step + 1, {"held_out_psnr": decibels})
                run.say(f"step {step + 1}: held-out PSNR {decibels:.2f} dB")
    finish(run, (time.perf_counter() - began) / 60)
    run.metrics.close()


def build(config: AutoencoderRun, accelerator: Accelerator) -> Trained:
    """Builds all parts; the initial weights are a function of the seed alone, the same on each process."""
    split = split_global_batch(config.training.global_batch, accelerator.num_processes, config.training.max_micro_batch)
    say: Callable[[str], None] = lambda line: tqdm.write(line, file=sys.stderr) if accelerator.is_main_process else None  # noqa: E731
    peers, engine = roll_call(accelerator), engine_name(config.distributed, accelerator.num_processes)
    if engine not in ("single", "ddp"):
        raise EngineError(f"engine {engine}: an autoencoder is trained by one process, or by several with ddp")
    for line in first_lines(accelerator, split, peers, engine):
        say(line)
    assert config.data.validation is not None  # parse_config asks for it
    if not isinstance(config.data.shards, str):
        raise ValueError("data.shards: an autoencoder is trained on one folder of raw shards")
    manifest, held_out = Manifest.load(config.data.shards), Manifest.load(config.data.validation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        autoencoder = initialized(AutoencoderKL(config.autoencoder))
    autoencoder.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    say(
        f"autoencoder of {sum(p.numel() for p in autoencoder.parameters()):,} parameters; "
        f"{sum(manifest.counts):,} pictures, {sum(held_out.counts):,} held out"
    )
    return Trained(
        config=config,
        accelerator=accelerator,
        split=split,
        manifest=manifest,
        held_out=held_out,
        autoencoder=autoencoder,
        network=accelerator.prepare_model(autoencoder),
        optimizer=make_optimizer(autoencoder.named_parameters(), config.optimizer),
        ema=EMA(autoencoder, config.ema),
        loss=AutoencoderLoss(config.loss).to(accelerator.device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        ledger=Ledger(Path(config.run_dir) / "quarantine.jsonl", config.data.quarantine_limit),
        metrics=MetricsWriter(accelerator, Path(config.run_dir), config.metrics, dataclasses.asdict(config)),
        say=say,
    )


@torch.no_grad()
def initialized(autoencoder: AutoencoderKL) -> AutoencoderKL:
    """Residual branches start at zero and the posterior narrow: half the steps to a given loss, seen on emoji."""
    for name, module in autoencoder.named_modules():
        if name.endswith(".conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    if autoencoder.quant_conv is not None and autoencoder.quant_conv.bias is not None:
        channels = autoencoder.config.latent_channels
        autoencoder.quant_conv.bias[channels:] = INITIAL_LOGVAR
        autoencoder.quant_conv.weight[channels:] *= 0.1
    return autoencoder


def training_batches(run: Trained) -> Iterable[Batch]:
    return make_loader(
        run.config.data,
        run.manifest,
        run.config.seed,
        Positions(
            rank=run.accelerator.process_index,
            world=run.split.processes,
            micro_batch=run.split.micro_batch,
            accumulation=run.split.accumulation,
            start_step=0,
            stop_step=run.config.training.steps,
        ),
        latent_shape=run.latent_shape,
    )


def train_step(run: Trained, step: int, batches: Iterator[Batch], clock: Clock, sums: dict[str, Tensor]) -> Tensor:
    """One optimizer step over one global batch; adds the loss's parts to `sums` and returns the gradient norm."""
    config, accumulation = run.config, run.split.accumulation
    set_learning_rate(run.optimizer, learning_rate(step, config.training.steps, config.optimizer))
    for micro in range(accumulation):
        with clock.waiting():
            batch = next(batches)
        run.ledger.collect(batch.quarantined, len(batch.positions))
        images = pictures_of(batch, run.accelerator.device)
        noise = batch.posterior_noise.to(run.accelerator.device, non_blocking=True)
        with nullcontext() if micro == accumulation - 1 else run.accelerator.no_sync(run.network):
            with run.accelerator.autocast():
                reconstructions, moments = run.network(images, noise)
                parts = run.loss(images, reconstructions, moments)
            run.accelerator.backward(parts["loss"] / accumulation)
        for name, value in parts.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach() / accumulation
        clock.images += len(batch.positions) * run.split.processes
    norm = run.accelerator.clip_grad_norm_(run.network.parameters(), config.optimizer.max_grad_norm or float("inf"))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.ema.update()
    sums["steps"] = sums.get("steps", torch.zeros((), device=norm.device)) + 1
    return norm


def log_step(run: Trained, step: int, grad_norm: Tensor, clock: Clock, sums: dict[str, Tensor]) -> dict[str, float]:
    """Writes the means since the last logged step and empties `sums`; FloatingPointError where they are not finite."""
    names = sorted(set(sums) - {"steps"})
    means = torch.stack([sums[name] / sums["steps"] for name in names])
    means = all_processes(run, means) / run.split.processes
    sums.clear()
    run.ledger.share(run.accelerator)
    record = dict(zip(names, means.tolist(), strict=True)) | {
        "lr": learning_rate(step, run.config.training.steps, run.config.optimizer),
        "grad_norm": float(grad_norm),
        "quarantined": run.ledger.replaced,
        "memory_gib": peak_memory_gib(run.accelerator.device),
        **clock.read(),
    }
    run.metrics.write(step + 1, record)
    if not np.isfinite([record["loss"], record["grad_norm"]]).all():
        raise FloatingPointError(
            f"step {step + 1}: loss {record['loss']}, gradient norm {record['grad_norm']}: lower optimizer.lr, or set "
            "training.mixed_precision to no"
        )
    return record


def all_processes(run: Trained, values: Tensor) -> Tensor:
    """Sum over all processes."""
    if run.split.processes > 1:
        dist.all_reduce(values)
    return values


def fixed_pictures(
    run: Trained, shards: Manifest, count: int | None, rank: int = 0, world: int = 1
) -> Iterator[Tensor]:
    """The first `count` pictures (None: all) in file order, centre-cropped, not mirrored; one rank's share."""
    loader = make_validation_loader(
        dataclasses.replace(run.config.data, workers=0),
        shards,
        run.config.seed,
        latent_shape=run.latent_shape,
        rank=rank,
        world=world,
        micro_batch=FIXED_BATCH,
        samples=count,
    )
    for batch in loader:
        run.ledger.collect(batch.quarantined, len(batch.positions))
        yield pictures_of(batch, run.accelerator.device)


@torch.no_grad()
def held_out_psnr(run: Trained) -> float:
    """Mean PSNR in decibels over the held-out pictures, in float32 from the posterior's mean. Collective."""
    total = torch.zeros(2, dtype=torch.float64, device=run.accelerator.device)  # decibels, pictures
    for images in fixed_pictures(run, run.held_out, None, run.accelerator.process_index, run.split.processes):
        decibels = psnr(images, reconstruct(run.autoencoder, images)).double()
        total += torch.stack([decibels.sum(), torch.full_like(decibels, 1.0).sum()])
    decibels_sum, pictures = all_processes(run, total).tolist()
    return decibels_sum / pictures


def reconstruct(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Pictures decoded from the posterior's mean."""
    return autoencoder.decode(posterior_mean(autoencoder.encode(images)))


def finish(run: Trained, minutes: float) -> None:
    """Takes the averaged weights, whitens their latents, rounds them to fp16, and writes the folder `out`."""
    config, autoencoder, is_main = run.config, run.autoencoder, run.accelerator.is_main_process
    autoencoder.load_state_dict(run.ema.state_dict())
    before = held_out_psnr(run)
    # Each process computes the same statistics of the same pictures: nothing to exchange.
    count = min(STATISTICS_PICTURES, sum(run.manifest.counts))
    fold_whitening(autoencoder, latent_statistics(autoencoder, fixed_pictures(run, run.manifest, count)))
    for parameter in autoencoder.parameters():
        parameter.data = parameter.data.half().float()
    latents = latent_statistics(autoencoder, fixed_pictures(run, run.held_out, None))
    measured = Measured(
        held_out_psnr=held_out_psnr(run),
        held_out_psnr_before=before,
        held_out_latents=latents,
        held_out_pictures=sum(run.held_out.counts),
        training_pictures=sum(run.manifest.counts),
        steps=config.training.steps,
        global_batch=config.training.global_batch,
        minutes=minutes,
        device=device_text(run),
        command="accelerate launch tools/train_autoencoder.py " + " ".join(sys.argv[1:]),
    )
    run.ledger.share(run.accelerator)
    run.metrics.write(
        config.training.steps,
        {"held_out_psnr": measured.held_out_psnr, "held_out_latent_std": latents.std.tolist()},
    )
    if is_main:
        write_folder(autoencoder, Path(config.out), config.card, measured)
        images = torch.cat(list(fixed_pictures(run, run.held_out, None)))
        images = images[torch.linspace(0, len(images) - 1, min(GRID_PICTURES, len(images))).long()]
        with torch.no_grad():
            grid = reconstruction_grid(images, reconstruct(autoencoder, images))
        save_png(grid, Path(config.run_dir) / "reconstructions.png")
    run.say(f"{config.out}: held-out PSNR {measured.held_out_psnr:.2f} dB, latents' std {rounded(latents.std)}")
    run.accelerator.wait_for_everyone()


def pictures_of(batch: Batch, device: torch.device) -> Tensor:
    """Pictures (B, 3, R, R) of a batch of raw shards, on `device`; ValueError where the shards are encoded."""
    if batch.images is None:
        raise ValueError("data.shards: found encoded shards, expected raw pictures: an autoencoder is trained on those")
    return batch.images.to(device, memory_format=torch.channels_last, non_blocking=True)


def device_text(run: Trained) -> str:
    """The hardware in words, for the card."""
    if run.accelerator.device.type == "cuda":
        return f"{run.split.processes} x {torch.cuda.get_device_name()}"
    return f"{run.split.processes * torch.get_num_threads()} CPU threads"


if __name__ == "__main__":
    main()
