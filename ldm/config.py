"""The configuration of a run: the parts' own dataclasses in one RunConfig, read from YAML and command line here.

Enters: `--config FILE`, dotted overrides. Leaves: a checked RunConfig, or an error that names the setting. Defaults are
overridden by the file, the file by the command line; unknown settings are errors in both.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from ldm.data.encoding import EncodingConfig
from ldm.data.loader import DataConfig
from ldm.diffusion.objective import ObjectiveConfig, check_parameterization
from ldm.diffusion.schedule import ScheduleConfig
from ldm.models.text_encoder import TextEncoderConfig
from ldm.models.unet import UNetConfig
from ldm.training.distributed import DistributedConfig
from ldm.training.ema import EMAConfig
from ldm.training.metrics import MetricsConfig
from ldm.training.optimizer import OptimizerConfig
from ldm.training.previews import PreviewConfig
from ldm.training.validation import ValidationConfig
from ldm.training.wrapping import WrappingConfig


@dataclass
class TrainingConfig:
    """Length of the run, its global batch, and its checkpoints."""

    steps: int = 100_000
    """Optimizer steps of the whole run, those before a resume included."""
    global_batch: int = 256
    """Samples of one optimizer step over all processes and accumulation: the batch that the results depend on."""
    max_micro_batch: int | None = None
    """Most samples that one process passes through the network at once; unset: its whole share of the global batch.
    Accumulation follows from it and from the number of processes."""
    checkpoint_every: int = 1000
    """Optimizer steps between two checkpoints; the last step always writes one; 0 writes no others."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept; 0 keeps all."""
    checkpoint_failures_allowed: int = 2
    """Checkpoints in a row that may fail to be written before the run stops; each failure is said."""
    bad_steps_allowed: int = 20
    """Steps in a row whose loss or gradient is not finite before the run stops; each is skipped by all processes and
    listed in bad_steps.jsonl."""

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("global_batch", 1),
            ("checkpoint_every", 0),
            ("keep_checkpoints", 0),
            ("checkpoint_failures_allowed", 0),
            ("bad_steps_allowed", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"training.{name}: found {getattr(self, name)}, expected {least} or more")
        if self.max_micro_batch is not None and self.max_micro_batch < 1:
            raise ValueError(f"training.max_micro_batch: found {self.max_micro_batch}, expected 1 or more")


@dataclass
class RunConfig:
    """One run: encode, train, sample and evaluate all read this."""

    run_dir: str
    """Folder of the run: config, metrics, quarantine ledger, samples and checkpoints. The same folder again resumes."""
    autoencoder: str
    """The pretrained VAE: folder in diffusers layout, `package:NAME/folder` inside a Python package, or hub name."""
    data: DataConfig
    """Shards and how samples come out of them."""
    text_encoder: TextEncoderConfig
    """The frozen text encoder."""
    unet: UNetConfig
    """The network."""
    seed: int = 0
    """Seed of everything random in the run; with the position of a sample it addresses each draw."""
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    """How `tools/encode_latents.py` turns raw shards into those of `data.shards`."""
    noise: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The noise schedule."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What the network puts out and whose error is minimized."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and the learning rate."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """The average of the weights."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length, global batch, checkpoints."""
    wrapping: WrappingConfig = field(default_factory=WrappingConfig)
    """Precision, memory format, checkpointing, compile."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Processes and engine that are expected."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """Where numbers go."""
    previews: PreviewConfig = field(default_factory=PreviewConfig)
    """Sample grids during training."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Loss on held-out shards with fixed draws."""


def make_parser(prog: str, description: str) -> ArgumentParser:
    """Parser whose options are the fields of RunConfig, with their docstrings as help."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=True)
    parser.add_argument("--config", action="config", help="YAML file of the run; later options override it.")
    parser.add_class_arguments(RunConfig, as_group=True)
    return parser


def parse_config(argv: Sequence[str] | None = None, *, prog: str, description: str) -> RunConfig:
    """RunConfig of `--config FILE` and dotted overrides; exits with status 2, naming the setting that is wrong."""
    parser = make_parser(prog, description)
    return build(parser, parser.parse_args(argv))


def build(parser: ArgumentParser, parsed: Namespace) -> RunConfig:
    """RunConfig out of what the parser read; a value that a part refuses ends as the parser's other errors do."""
    try:
        ready = parser.instantiate(parsed)
        values = {f.name: ready[f.name] for f in dataclasses.fields(RunConfig)}
        config = RunConfig(**values)
        check_fields(config)
        return config
    except ValueError as error:
        parser.error(str(error))


def load_config(path: Path) -> RunConfig:
    """RunConfig of a saved `config.yaml`; raises ValueError naming file and setting."""
    try:
        parser = make_parser("config", "")
        parser.exit_on_error = False
        return build(parser, parser.parse_args([f"--config={path}"]))
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error


def check_fields(config: RunConfig) -> None:
    """Checks that need fields of several parts, before anything is built; raises ValueError."""
    check_parameterization(config.objective.parameterization, config.noise.rescale_betas_zero_snr)
    warmup, steps = config.optimizer.warmup_steps, config.training.steps
    if warmup > steps:
        raise ValueError(
            f"optimizer.warmup_steps is {warmup}, but training.steps only {steps}: its peak would never be reached"
        )


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain lists, dicts and scalars."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `--config` reads back to the same RunConfig."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


# Fields that may differ between a checkpoint and the run that goes on from it: they say how and how long, not what.
FREE_WHEN_RESUMING = (
    "run_dir",
    "training.steps",
    "training.max_micro_batch",
    "optimizer.lr",  # said at the resume
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.checkpoint_failures_allowed",
    "training.bad_steps_allowed",
    "data.shards",  # the manifest's digest in the checkpoint tells whether it is the same data
    "data.cache",
    "data.stream",  # such a run is not exact, and says so
    "data.verify",
    "data.workers",
    "data.prefetch",
    "data.validation",
    "data.quarantine_limit",
    "encoding",
    "wrapping",
    "distributed",
    "metrics",
    "previews",
    "validation",
)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ and are not free when resuming, as `name: old -> new`."""
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        name = prefix + key
        if name in FREE_WHEN_RESUMING:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, name + ".")
        elif a != b:
            found.append(f"{name}: {a} -> {b}")
    return found
