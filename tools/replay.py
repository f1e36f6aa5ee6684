"""Computes a step's loss again from the checkpoint before it: `python tools/replay.py --run runs/X --step 1234`.

In: a run's folder, the number of a step (as in metrics.jsonl, from 1), and if wanted the position of one sample.
Out: one JSON object a sample (position, key, caption, timestep, loss, ...) and one for the step; nothing is written to
the run. Steps between the checkpoint and the one asked for are trained again, in memory.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.config import RunConfig, load_config
from ldm.data.batch import Batch
from ldm.train import batch_loss, settle, train_step
from ldm.training.checkpoint import CheckpointError, checkpoint_name, verify_checkpoint
from ldm.training.distributed import split_global_batch, start_accelerator
from ldm.training.metrics import Clock, Console
from ldm.training.run import Run, build_run
from ldm.training.run_state import begin, restore
from ldm.training.wrapping import resolve_precision


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 where the step cannot be computed again."""
    parser = argparse.ArgumentParser(
        prog="tools/replay.py",
        description=(__doc__ or "").splitlines()[0],
        epilog="The processes of the run do not matter: all of the global batch is computed here, in one.",
    )
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--step", type=int, required=True, help="number of the step, as in metrics.jsonl: from 1")
    parser.add_argument("--position", type=int, help="position of one sample in the run; without it, all of the step")
    parser.add_argument("--shards", help="where the shards are now, if not where the run's config says")
    options = parser.parse_args(argv)
    try:
        for line in replay(options.run, options.step, options.position, options.shards):
            print(json.dumps({name: readable(value) for name, value in line.items()}))
    except (OSError, ValueError, ArithmeticError, RuntimeError) as error:
        print(f"tools/replay.py: {error}", file=sys.stderr)
        return 2
    return 0


def replay(folder: Path, step: int, position: int | None, shards: str | None) -> Iterator[dict[str, Any]]:
    """Yields a record a sample of step `step` (or of the one at `position`), then one of the step.

    Raises:
        FileNotFoundError: the folder is no run's.
        ValueError: the run has no such step, or the step no such position.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected the folder of a run that has begun")
    config = load_config(path)
    if config.data.stream is not None:
        raise ValueError(f"{folder} trains on data.stream, which has no order: its steps cannot be computed again")
    if shards is not None and not isinstance(config.data.shards, str):
        raise ValueError("--shards: the run has several sources; put them back where its config.yaml says")
    if not 1 <= step <= config.training.steps:
        raise ValueError(f"--step {step}: the run has steps 1 to {config.training.steps}")
    size = config.training.global_batch
    if position is not None and not (step - 1) * size <= position < step * size:
        raise ValueError(
            f"--position {position} belongs to step {position // size + 1}; "
            f"step {step} has positions {(step - 1) * size} to {step * size - 1}"
        )
    checkpoint = newest_before(folder / "checkpoints", step)
    with tempfile.TemporaryDirectory() as scratch:  # ledger and logs of what is done again
        run = run_like(config, scratch, shards)
        if checkpoint is None:
            begin(run, say)
        start = restore(run, checkpoint, say) if checkpoint is not None else 0
        say(f"going on after step {start}, from {checkpoint or 'the initial weights'}")
        batches = run.data.training_batches(run.share, start, step)
        for number in tqdm(range(start, step - 1), "training again", unit="step", file=Console()):
            train_step(run, number, batches, Clock())
        settle(run)
        yield from losses(run, step, batches, position, logged_loss(folder, step))


def newest_before(root: Path, step: int) -> Path | None:
    """The newest complete checkpoint from before step `step`; None where there is none."""
    for checkpoint in sorted(root.glob("step-*"), reverse=True):
        if checkpoint.name < checkpoint_name(step):
            try:
                verify_checkpoint(checkpoint)
                return checkpoint
            except CheckpointError as error:
                say(f"passing over {error}")
    return None


def run_like(config: RunConfig, scratch: str, shards: str | None) -> Run:
    """The run's parts in this one process; what they write goes to `scratch`."""
    data = config.data if shards is None else replace(config.data, shards=shards)
    config = replace(
        config,
        run_dir=scratch,
        data=data,
        metrics=replace(config.metrics, tensorboard=False, wandb_project=None),
        validation=replace(config.validation, every=0),
        distributed=replace(config.distributed, engine="auto", offload="none", processes=None),
    )
    accelerator = start_accelerator(config.distributed, resolve_precision(config.wrapping.mixed_precision))
    split = split_global_batch(config.training.global_batch, 1, config.training.max_micro_batch)
    return build_run(config, accelerator, split, say)


@torch.no_grad()
def losses(
    run: Run, step: int, batches: Iterator[Batch], position: int | None, logged: float | None
) -> Iterator[dict[str, Any]]:
    """The records of one step, whose batches come next."""
    total, count = 0.0, 0
    for _ in range(run.split.accumulation):
        batch = next(batches)
        loss, t, latents = batch_loss(run, run.engine.network, batch.to(run.accelerator.device))
        total, count = total + float(loss.double().sum()), count + len(loss)
        replaced = {one.position: f"{one.shard}/{one.key}: {one.reason}" for one in batch.quarantined}
        for row, place in enumerate(batch.positions.tolist()):
            if position in (None, place):
                yield {
                    "position": place,
                    "sample": batch.keys[row],
                    "instead_of": replaced.get(place),
                    "caption": batch.captions[row],
                    "dropped": bool(batch.dropped[row]),
                    **noise_level(run, t[row]),
                    "latent_std": float(latents[row].float().std()),
                    "loss": float(loss[row]),
                }
    yield {"step": step, "samples": count, "loss": total / count, "logged_loss": logged}


def noise_level(run: Run, t: Tensor) -> dict[str, float]:
    """What a sample was trained at: timestep (a fraction of continuous time) and sigma, or a corruption's level."""
    if run.corruption is not None:
        return {"level": t.item()}
    return {"timestep": t.item(), "sigma": float(run.pipeline.schedule.sigma_hat(t))}


def logged_loss(folder: Path, step: int) -> float | None:
    """The loss that metrics.jsonl has for this step alone; None where a line tells of several steps, or is missing."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    found = {line["step"]: line["loss"] for line in lines}
    return found.get(step) if step == 1 or step - 1 in found else None


def readable(value: Any) -> Any:
    """NaN and infinities as strings: JSON has no numbers for them."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def say(line: str) -> None:
    """Progress, on standard error: standard output is for the records."""
    tqdm.write(line, file=Console())


if __name__ == "__main__":
    sys.exit(main())
