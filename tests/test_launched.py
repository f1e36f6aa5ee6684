"""Engine and processes that config and launcher agree on; what an engine cannot do; the launch files themselves."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_runs
import yaml
from conftest import ROOT

from ldm.training.distributed import BatchSplit, Peer, first_lines, split_global_batch
from ldm.training.launched import DistributedConfig, EngineError, engine_name
from ldm.training.wrapping import WrappingConfig, check_engine

FILES = ROOT / "launch" / "accelerate"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def zero(stage: str, **more: str) -> dict[str, str]:
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage, **more}


@pytest.mark.parametrize(
    ("engine", "processes", "environment", "expected"),
    [
        ("auto", 1, {}, "single"),
        ("auto", 2, {}, "ddp"),
        ("fsdp2", 2, {}, "fsdp2"),  # torchrun knows nothing of engines: the config alone decides
        ("zero3", 2, {"ACCELERATE_USE_FSDP": "false"}, "zero3"),
        ("auto", 2, FSDP, "fsdp2"),
        ("fsdp2", 2, FSDP, "fsdp2"),
        *(("auto", 2, zero(stage), f"zero{stage}") for stage in "123"),
    ],
)
def test_the_engine_is_what_config_and_launcher_say(engine, processes, environment, expected):
    assert engine_name(DistributedConfig(engine=engine), processes, environment) == expected


@pytest.mark.parametrize(
    ("config", "environment", "expected"),
    [
        ({"engine": "ddp"}, FSDP, r"engine is ddp, but the launcher's config file asks for fsdp2"),
        ({"engine": "zero2"}, zero("3"), r"is zero2, but .* asks for zero3 \(distributed_type DEEPSPEED, zero_st"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, r"fsdp_version 1: only 2 is supported"),
        ({}, zero("0"), r"zero_stage 0: expected 1, 2 or 3"),
        ({}, zero("2", ACCELERATE_DEEPSPEED_CONFIG_FILE="ds.json"), r"deepspeed_config_file \(ds\.json\).* not read"),
        ({}, FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, r"offloads \(FSDP_OFFLOAD_PARAMS=true\).* set it to parameters"),
        ({}, zero("2", ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu"), r"set it to optimizer"),
    ],
)  # fmt: skip
def test_a_launcher_that_asks_for_something_else_is_refused(config, environment, expected):
    with pytest.raises(EngineError, match=expected):
        engine_name(DistributedConfig(**config), 2, environment)


@pytest.mark.parametrize(
    ("engine", "offload", "wrapping", "expected"),
    [
        ("zero3", "none", {"compile": True}, r"engine zero3 cannot .*\n  wrapping\.compile is true"),
        ("fsdp2", "none", {"compile": True}, r"wrapping\.compile is true"),
        ("zero1", "none", {"mixed_precision": "fp16"}, r"mixed_precision is fp16.* use bf16 or no"),
        ("fsdp2", "optimizer", {}, r"offload is optimizer: with fsdp2 it can be none, parameters"),
        ("zero2", "parameters", {}, r"with zero2 it can be none, optimizer"),
        ("ddp", "optimizer", {}, r"with ddp it can be none"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_with_the_reason(engine, offload, wrapping, expected):
    with pytest.raises(EngineError, match=expected):
        check_engine(engine, offload, WrappingConfig(**wrapping))
    if not engine.startswith("zero") or importlib.util.find_spec("deepspeed"):
        check_engine(engine, "none", WrappingConfig(gradient_checkpointing="all"))


def test_the_first_lines_tell_engine_world_hosts_devices_and_the_global_batch():
    peers = [Peer(rank, f"node{rank // 2}", 100 + rank, "NVIDIA H100") for rank in range(4)]
    split = split_global_batch(64, 4, 8)
    assert split == BatchSplit(64, 4, accumulation=2, micro_batch=8)
    accelerator = SimpleNamespace(mixed_precision="bf16")
    lines = first_lines(accelerator, split, peers[:1], "single")
    assert lines[0] == "engine: one process; 1 x NVIDIA H100; hosts: node0 (1); mixed precision bf16"
    assert lines[1].startswith("global batch 64 = 8 micro-batch x 2 accumulation x 4 processes")


@pytest.mark.parametrize("path", sorted(FILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_launch_file_is_read_by_accelerate_and_leaves_precision_to_the_run(path):
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(path))  # refuses keys that it does not know
    content = yaml.safe_load(path.read_text())
    assert str(getattr(read.distributed_type, "value", read.distributed_type)) == content["distributed_type"]
    assert content["mixed_precision"] == "no"
    assert f"launch/accelerate/{path.name}" in path.read_text()  # its own command line


ENGINES = [
    "fsdp2",
    *(["ddp", "ddp_nodes", "zero1", "zero2", "zero3"] if os.environ.get("LDM_ENGINES") == "all" else []),
]


@pytest.mark.parametrize("name", ENGINES)
def test_the_documented_command_runs_its_engine_here(name, tmp_path):
    words = tiny_runs.make(tmp_path / "material")
    one_node = ["--num_machines", "1"] if name == "ddp_nodes" else []
    command = ["accelerate", "launch", "--config_file", FILES / f"{name}.yaml", *one_node, "--num_processes", "2",
               "--main_process_port", "0", ROOT / "ldm" / "train.py", *words, "--training.steps=3"]  # fmt: skip
    settings = {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        list(map(str, command)), env=os.environ | settings, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    title = {"fsdp2": "FSDP2", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}.get(name, "DDP")
    assert f"engine: {title} over gloo, 2 processes; 2 x CPU, 1 threads; hosts: " in done.stderr + done.stdout
    assert "finished after 3 of 3 steps" in done.stderr + done.stdout
