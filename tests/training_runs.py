"""Runs of the training program for tests: in this process, or under the real launchers; and what they leave."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import DEBUG, ROOT
from safetensors.torch import load_file

from ldm.train import main


def train(run_dir: Path, shards: Path | str, *options: str, config: Path | None = None) -> list[dict]:
    """Runs the program in this process; returns the lines of its metrics. A `config` of its own names its shards."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    source = [f"--config={DEBUG}", f"--data.shards={shards}"] if config is None else [f"--config={config}"]
    assert main([*source, f"--run_dir={run_dir}", *options]) == 0
    return metrics(run_dir)


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def launch(
    launcher: list[str], run_dir: Path, shards: Path, *options: str, config: Path = DEBUG, **environment: str
) -> subprocess.Popen:
    """Starts the program under a launcher, two threads in all."""
    program = [*launcher, str(ROOT / "ldm/train.py"), f"--config={config}"]
    words = [*program, f"--run_dir={run_dir}", f"--data.shards={shards}"]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [*words, *options],
        env=settings | environment,
        cwd=run_dir.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_steps(process: subprocess.Popen, run_dir: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


TORCHRUN_2 = ["torchrun", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
ACCELERATE_2 = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    state = checkpoint / "training_state"
    return {
        **{f"ema {n}": t for n, t in load_file(checkpoint / "unet/diffusion_pytorch_model.safetensors").items()},
        **{f"weight {n}": t for n, t in load_file(state / "unet.safetensors").items()},
        **{f"optimizer {n}": t for n, t in load_file(state / "optimizer.safetensors").items()},
    }


def assert_same_state(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
