"""What was asked for: the settings of processes and engine, and the words and config file of the launcher.

Enters: the run's config, the launcher's command line, and what it left in the environment. Leaves: the engine and the
number of processes that both agree on, or an error that says where they differ.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import yaml

PLUGINS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


class EngineError(RuntimeError):
    """The processes or the engine that run are not those that were asked for."""


@dataclass
class DistributedConfig:
    """What the launcher is expected to have started; the run stops at once when it is something else."""

    engine: Literal["auto", "single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    """single (one process), ddp, fsdp2 (torch's fully_shard), zero1, zero2 or zero3 (DeepSpeed); auto is what the
    launcher's config file names, and without one ddp when there are several processes. Another than the launcher's is
    an error."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What stays in the host's memory: the optimizer's state (zero1, zero2, zero3), or weights and gradients as well
    (fsdp2, zero3)."""
    processes: int | None = None
    """Total number of processes that must be running; unset: what the launcher's own command line asks for."""
    timeout_minutes: float = 10.0
    """Minutes after which a collective that a lost process does not join ends the run with an error."""
    hang_minutes: float = 5.0
    """Minutes without an end of a step, a validation batch or a write after which each process writes the stacks of its
    threads to standard error, once a silence; 0 never."""

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"distributed.processes: found {self.processes}, expected 1 or more")
        if self.engine == "single" and self.processes not in (None, 1):
            raise ValueError(f"distributed.engine is single, but distributed.processes is {self.processes}")
        if self.timeout_minutes <= 0:
            raise ValueError(f"distributed.timeout_minutes: found {self.timeout_minutes}, expected a positive number")
        if self.hang_minutes < 0:
            raise ValueError(f"distributed.hang_minutes: found {self.hang_minutes}, expected 0 (off) or more")


def engine_name(config: DistributedConfig, processes: int, environment: Mapping[str, str] = os.environ) -> str:
    """The engine that config and launcher agree on: single, ddp, fsdp2, zero1, zero2 or zero3.

    Raises:
        EngineError: they name different engines, or the launcher's settings ask for what the config does not.
    """
    launched, where = launched_engine(environment)
    if launched is None:
        return config.engine if config.engine != "auto" else "ddp" if processes > 1 else "single"
    if config.engine not in ("auto", launched):
        raise EngineError(
            f"distributed.engine is {config.engine}, but the launcher's config file asks for {launched} ({where}): put "
            "one of them right; launch/accelerate has a file for each engine, and ddp.yaml serves all of them"
        )
    asked = {
        "FSDP_OFFLOAD_PARAMS": "parameters",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "optimizer",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "parameters",
    }
    for name, offload in asked.items():
        value = environment.get(name, "none").lower()
        if value not in ("none", "false", "") and config.offload not in (offload, "parameters"):
            raise EngineError(
                f"the launcher's config file offloads ({name}={value}), but distributed.offload is {config.offload}: "
                f"set it to {offload}; the run's config decides"
            )
    return launched


def launched_engine(environment: Mapping[str, str]) -> tuple[str | None, str]:
    """The sharding engine that the launcher's config file names, if any, and by which words.

    Raises:
        EngineError: it names one that there is not.
    """
    if environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        version = environment.get("FSDP_VERSION", "1")
        if version != "2":
            raise EngineError(f"the launcher's config file has fsdp_version {version}: only 2 is supported")
        return "fsdp2", "distributed_type FSDP, fsdp_version 2"
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if file and file != "none":
            raise EngineError(
                f"the launcher's config file names a deepspeed_config_file ({file}), which is not read: what DeepSpeed "
                "does follows from the run's config; use zero_stage (launch/accelerate/zero2.yaml)"
            )
        if stage not in ("1", "2", "3"):
            raise EngineError(f"the launcher's config file has zero_stage {stage}: expected 1, 2 or 3")
        return f"zero{stage}", f"distributed_type DEEPSPEED, zero_stage {stage}"
    return None, ""


@contextmanager
def without_plugins() -> Iterator[None]:
    """Accelerate starts processes and devices only: its FSDP2 is never chosen on CPU, and one way serves both."""
    hidden = {name: os.environ.pop(name) for name in PLUGINS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def processes_asked_of_launcher() -> int | None:
    """The --num_processes (or --nproc_per_node) of the launcher that is this program's parent; None when it has none.

    `accelerate launch --cpu --num_processes 2` runs one process and exits 0: only the launcher's own command line tells
    what its user meant.
    """
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    if not any("accelerate" in Path(word).name or "torchrun" in Path(word).name for word in words[:4]):
        return None
    return processes_in_command(words)


def processes_in_command(words: Sequence[str]) -> int | None:
    """Total number of processes that a launcher's command line asks for, its --config_file included."""
    options: dict[str, str] = {}
    for i, word in enumerate(words):
        if word.endswith(".py"):  # from here on the words are the program's own
            break
        if word.startswith("--"):
            name, _, value = word.partition("=")
            following = words[i + 1] if i + 1 < len(words) else ""
            options[name.lstrip("-").replace("-", "_")] = value or following
    if "num_processes" in options:
        return _integer(options["num_processes"])
    if "nproc_per_node" in options:
        per_node, nodes = _integer(options["nproc_per_node"]), _integer(options.get("nnodes", "1"))
        return per_node * nodes if per_node is not None and nodes is not None else None
    if "config_file" in options:
        try:
            content = yaml.safe_load(Path(options["config_file"]).read_text())
        except (OSError, yaml.YAMLError):
            return None  # the launcher itself has the better message for a file that it cannot read
        found = content.get("num_processes") if isinstance(content, dict) else None
        return int(found) if found is not None else None
    return None


def _integer(text: str) -> int | None:
    return int(text) if text.isdigit() else None
