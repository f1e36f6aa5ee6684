"""The configuration of a run: the parts' own dataclasses in one RunConfig, read from YAML and command line here.

Enters: `--config FILE`, dotted overrides. Leaves: a checked RunConfig, or an error that names the setting. Defaults are
overridden by the file, the file by the command line; unknown settings are errors in both.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from ldm.data.encoding import EncodingConfig
from ldm.data.loader import DataConfig
from ldm.diffusion.continuous import ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.corruption import step_between
from ldm.diffusion.corruption_config import CorruptionConfig, build_corruption, check_corruption
from ldm.diffusion.objective_config import ObjectiveConfig, check_objective
from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.sampler_choice import chosen_sampler
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.models.text_conditioner import check_text_configs
from ldm.models.text_encoder import TextEncoderConfig
from ldm.models.unet_config import UNetConfig
from ldm.pipeline.model_card import CardConfig
from ldm.pipeline.scheduler import TrainedWith, scheduler_values
from ldm.training.ema import EMAConfig
from ldm.training.launched import DistributedConfig
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
    """The pretrained VAE: a folder in diffusers layout, its own or a whole pipeline's; `package:NAME/folder` inside a
    Python package; a single .safetensors file, in diffusers' or CompVis' names; or a hub name."""
    data: DataConfig
    """Shards and how samples come out of them."""
    text_encoder: TextEncoderConfig
    """The frozen text encoder."""
    unet: UNetConfig
    """The network."""
    text_encoder_2: TextEncoderConfig | None = None
    """Second frozen text encoder of networks like SDXL's: its states are joined to the first's, and its pooled,
    projected output is the pooled text. Both then take layer penultimate_without_norm."""
    empty_caption: Literal["encoded", "zeros"] = "encoded"
    """What stands for no caption, where captions are dropped and in guidance: the encoders' own output for the empty
    caption, or zeros, with which SDXL was trained."""
    init_from: str | None = None
    """Trained network to begin with instead of random weights: as `autoencoder`, but of a UNet. Read where the run
    starts anew, not when it resumes. A run's folder means its latest checkpoint, here as in `autoencoder`."""
    seed: int = 0
    """Seed of everything random in the run; with the position of a sample it addresses each draw."""
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    """How `tools/encode_latents.py` turns raw shards into those of `data.shards`."""
    noise: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The noise schedule of timesteps."""
    continuous_noise: ContinuousScheduleConfig | None = None
    """A noise schedule of continuous time in place of `noise`: kind flow goes with parameterization flow (or x0), edm
    with edm; vp and cosine have no place in a checkpoint."""
    corruption: CorruptionConfig | None = None
    """A corruption other than Gaussian noise in place of `noise`: masks or blur, undone by a network that predicts x0
    (objective.parameterization and loss x0). Nobody but this program draws with such a checkpoint."""
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
    card: CardConfig = field(default_factory=CardConfig)
    """What the README.md of each checkpoint says besides what the run knows."""

    def __post_init__(self) -> None:
        # An empty path would be the folder that the program is started in.
        for name, value in (("autoencoder", self.autoencoder), ("init_from", self.init_from)):
            if value is not None and not value.strip():
                unset = ", or null" if name == "init_from" else ""
                raise ValueError(f"{name}: empty, expected a folder, a file, package:NAME/folder or a hub name{unset}")


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
    check_corrupting(config)
    check_storable(config)
    check_objective(config.objective, forward_process(config))
    encoders = (config.text_encoder, config.text_encoder_2)
    check_text_configs([one for one in encoders if one is not None], config.empty_caption)
    warmup, steps = config.optimizer.warmup_steps, config.training.steps
    if warmup > steps:
        raise ValueError(
            f"optimizer.warmup_steps is {warmup}, but training.steps only {steps}: its peak would never be reached"
        )


def check_corrupting(config: RunConfig) -> None:
    """Raises ValueError for settings that do not go with the run's corruption, or with its having none."""
    corruption, previews, size = config.corruption, config.previews, config.unet.sample_size
    try:
        chosen_sampler(previews.sampler, corruption)
    except ValueError as error:
        raise ValueError(f"previews.{error}") from None
    if corruption is None:
        return
    check_corruption(config.objective)
    if config.noise != ScheduleConfig() or config.continuous_noise is not None:
        raise ValueError("noise, continuous_noise: found with corruption, which takes their place; leave them out")
    if config.data.buckets is not None:
        raise ValueError("data.buckets: found with corruption, expected none: its levels are those of one size")
    if size is None:
        raise ValueError("unet.sample_size: not set, expected the size of the latents: a corruption's levels are of it")
    if corruption.start_mean is not None and len(corruption.start_mean) != config.unet.out_channels:
        raise ValueError(
            f"corruption.start_mean: found {len(corruption.start_mean)} numbers, expected {config.unet.out_channels}, "
            "one for each channel of the latents"
        )
    levels = build_corruption(corruption, size, size).levels
    if previews.every and previews.prompts:
        try:
            step_between(levels, previews.steps)
        except ValueError as error:
            raise ValueError(f"previews.{error}") from None


def check_storable(config: RunConfig) -> None:
    """Raises ValueError for what objective and schedule can do, but a checkpoint has no place for."""
    if config.continuous_noise is not None and config.noise != ScheduleConfig():
        raise ValueError(
            "noise, continuous_noise: found both, expected one: continuous_noise takes the place of noise; leave noise "
            "out, or set continuous_noise to null"
        )
    objective = config.objective
    process, learned = forward_process(config), objective.learned_variance
    trained = TrainedWith(process, objective.parameterization, objective.sigma_data, learned, config.corruption)
    scheduler_values(trained)


def forward_process(config: RunConfig) -> ForwardProcess:
    """The noise levels of the run: of continuous time where `continuous_noise` is set, of timesteps elsewhere."""
    return Schedule(config.noise) if config.continuous_noise is None else ContinuousSchedule(config.continuous_noise)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain lists, dicts and scalars."""
    return _plain(dataclasses.asdict(config))


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


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
    "card",  # words about the run; what it began with (init_from) is a part of it, and not free
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
