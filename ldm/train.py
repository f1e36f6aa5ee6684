"""Trains a text-to-image latent diffusion model: `accelerate launch ldm/train.py --config configs/X.yaml`.

Enters: a RunConfig. Leaves: the run's folder with metrics, sample grids and checkpoints that are pipeline folders.
Walk of a step: loader (position -> sample -> draws -> Batch) -> latents and conditioning -> loss per sample ->
backward, accumulated over micro-batches -> clip -> AdamW -> average. The same command again resumes.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ldm.config import RunConfig, flat, parse_config, to_dict, to_yaml
from ldm.data.batch import Batch
from ldm.diffusion.corruption import corruption_loss, drawn_levels
from ldm.diffusion.objective import Network, loss_per_sample
from ldm.diffusion.timesteps import stratified, timesteps
from ldm.models.autoencoder import sample_posterior, scale_latents
from ldm.models.conditioning import Conditioning
from ldm.models.durable import write_text
from ldm.training.arrival import moments_of, text_of
from ldm.training.bad_numbers import StepNumbers, poisoned
from ldm.training.corruption_start import with_start
from ldm.training.distributed import check_same, first_lines, roll_call, split_global_batch, start_accelerator
from ldm.training.launched import engine_name
from ldm.training.metrics import Clock, Console, peak_memory_gib, window_metrics
from ldm.training.optimizer import learning_rate
from ldm.training.outcome import INTERRUPTED, RunStatus, fail_before_start, only_program
from ldm.training.previews import draw_previews
from ldm.training.run import Run, build_run
from ldm.training.run_state import finish_writing, resume, save
from ldm.training.signals import StopRequest
from ldm.training.stragglers import straggler
from ldm.training.validation import validation_loss
from ldm.training.watch import Watch
from ldm.training.wrapping import resolve_precision


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the training program; returns the exit status: 0 finished, 75 interrupted and resumable."""
    config = parse_config(argv, prog="ldm/train.py", description=(__doc__ or "").splitlines()[0])
    run_dir = Path(config.run_dir)
    with StopRequest() as stop:
        try:
            accelerator = start_accelerator(config.distributed, resolve_precision(config.wrapping.mixed_precision))
        except BaseException as error:
            fail_before_start(run_dir, error)
            raise
        with only_program(run_dir, accelerator) as status:
            outcome, step = train(config, accelerator, stop, status)
            if accelerator.is_main_process:
                status.write(outcome, step, stop.received or "")
        accelerator.end_training()
    return 0 if outcome == "finished" else INTERRUPTED


def train(
    config: RunConfig, accelerator: Accelerator, stop: StopRequest, status: RunStatus
) -> tuple[Literal["finished", "interrupted"], int]:
    """Runs or resumes the training of `config`; returns "finished" or "interrupted", and the steps done."""
    say, peers = sayer(accelerator), roll_call(accelerator)
    engine = engine_name(config.distributed, accelerator.num_processes)
    # First of all: what one process alone refuses leaves the others waiting.
    check_same(peers, flat(to_dict(config)) | {"engine": engine, "torch": torch.__version__})
    split = split_global_batch(config.training.global_batch, accelerator.num_processes, config.training.max_micro_batch)
    for line in first_lines(accelerator, split, peers, engine):
        say(line)
    with Watch(accelerator, peers, config.distributed.hang_minutes) as watch:
        run = build_run(config, accelerator, split, say)
        check_same(peers, {"data.shards, by their content": run.data.digest()})
        return run_steps(run, stop, status, watch, say)


def run_steps(
    run: Run, stop: StopRequest, status: RunStatus, watch: Watch, say: Callable[[str], None]
) -> tuple[Literal["finished", "interrupted"], int]:
    """The steps of a run, from where it stands; as `train`."""
    config, accelerator = run.config, run.accelerator
    start, steps = resume(run, say), config.training.steps
    if accelerator.is_main_process:
        write_text(to_yaml(config), run.run_dir / "config.yaml")
        status.write("running", start, "")
    estimate_start(run)
    batches = run.data.training_batches(run.share, start, steps)
    held_out = run.data.validation_batches(run.share, config.validation.samples)
    done, clock = start, Clock()
    quiet = not accelerator.is_main_process
    with tqdm(total=steps, initial=start, unit="step", disable=quiet, mininterval=1.0, file=Console()) as bar:
        for step in range(start, steps):
            latents = train_step(run, step, batches, clock)
            done = step + 1
            watch.alive(done)
            bar.update()
            stopping = stop.agreed(run.agreement)  # before what may take longer than the sender of a signal waits
            validating = held_out is not None and due(done, config.validation.every, steps)
            validating = validating and (done == steps or not stopping)
            if validating or done == 1 or due(done, config.metrics.log_every, steps):
                record = measure(run, done, latents, clock)
                if validating and held_out is not None:
                    with clock.paused():
                        record["validation_loss"] = validate(run, held_out)
                with run.parts("log"):
                    run.metrics.write(done, record)
                bar.set_postfix({name: record[name] for name in ("loss", "lr")})
            with clock.paused():
                if stopping or due(done, config.training.checkpoint_every, steps):
                    settle(run)
                    save(run, done)
                if stopping:
                    break  # at once: whoever sent the signal kills what is still there after a while
                if config.previews.every and config.previews.prompts and due(done, config.previews.every, steps):
                    preview(run, done)
    finish_writing(run)
    run.metrics.close()
    outcome: Literal["finished", "interrupted"] = "finished" if done >= steps else "interrupted"
    say(f"{outcome} after {done} of {steps} steps; checkpoint {run.run_dir / 'checkpoints' / 'latest'}")
    return outcome, done


def estimate_start(run: Run) -> None:
    """Estimates what sampling of a corruption starts from, where nothing tells it: of the run's first positions.

    On the main process alone, which draws and saves; the same for any number of processes.
    """
    corruption = run.pipeline.corruption
    if corruption is None or not corruption.lacks_start or not run.accelerator.is_main_process:
        return
    alone = replace(run.split, processes=1, accumulation=run.split.accumulation * run.split.processes)
    steps = math.ceil(corruption.start_samples / run.config.training.global_batch)
    batches = run.data.training_batches(replace(run.share, rank=0, split=alone), 0, steps)
    latents = (latents_of(run, batch.to(run.accelerator.device)) for batch in batches)
    run.pipeline.corruption = with_start(corruption, latents)


def train_step(run: Run, step: int, batches: Iterator[Batch], clock: Clock) -> Tensor:
    """One optimizer step over one global batch; returns the last micro-batch's latents. `settle` ends it."""
    config, engine = run.config, run.engine
    positions, losses = [], []
    for micro in range(run.split.accumulation):
        with clock.waiting(), run.parts("data"):
            batch = next(batches)
        run.ledger.collect(batch.quarantined, len(batch.positions))
        with run.parts("copy"), run.own_time.forward():
            batch = run.arrival(batch)
        # Gradients are exchanged once a step, in the last micro-batch's backward.
        last = micro == run.split.accumulation - 1
        with engine.exchanging(last):
            with run.parts("forward"), run.own_time.forward():
                loss, t, latents = batch_loss(run, engine.network, batch)
            # All micro-batches have one size, so that the mean of their means is the mean of the global batch.
            with run.parts("backward"):
                engine.backward(poisoned(loss) / run.split.accumulation)
        run.window.add(loss.detach(), run.position(t), batch.dropped)
        positions.append(batch.positions)
        losses.append(loss.detach())
        clock.images += len(batch.positions) * run.split.processes
    with run.parts("optimizer"):
        engine.clip(config.optimizer.max_grad_norm)  # after accumulation
    with clock.paused():
        run.writer.wait_copied()  # a checkpoint's copy, which ran beside forward and backward
    if run.bad_steps.verdict(run.accelerator):  # on the step before, while the device computes this one
        with run.parts("average"):
            engine.average_before_step(run.ema)
    with run.parts("optimizer"):
        skipped, grad_norm = engine.step(learning_rate(step, config.training.steps, config.optimizer))
    run.own_time.step()
    run.parts.step()
    run.bad_steps.hold(StepNumbers(step + 1, positions, losses), skipped, grad_norm)
    return latents


def settle(run: Run) -> None:
    """Ends the step that was taken last, once: its share of the average, or its line in the log of bad steps."""
    if run.bad_steps.verdict(run.accelerator):
        with run.parts("average"):
            run.ema.update()


def batch_loss(run: Run, network: Network, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per sample (B,), times (B,) of the schedule and latents (B, C, h, w) of a batch on the device.

    With a corruption its levels stand for the times.
    """
    schedule, objective = run.pipeline.schedule, run.config.objective
    latents, conditioning = latents_of(run, batch), conditioning_of(run, batch)
    if run.corruption is not None:
        u = stratified(batch.u, batch.positions, run.config.training.global_batch) if objective.stratified else batch.u
        level, distance = drawn_levels(u, run.corruption), (objective.distance, objective.huber_c)
        loss = corruption_loss(network, run.corruption, latents, batch.noise, level, conditioning, *distance)
        return loss, level, latents
    t = timesteps(batch.u, schedule, objective, batch.positions, run.config.training.global_batch)
    loss = loss_per_sample(network, schedule, objective, latents, batch.noise, t, conditioning, batch.offset)
    return loss, t, latents


@torch.no_grad()
def latents_of(run: Run, batch: Batch) -> Tensor:
    """Scaled latents (B, C, h, w): moments from the shard or the autoencoder, sampled, and scaled here, once."""
    autoencoder = run.pipeline.autoencoder
    moments = moments_of(batch, autoencoder)
    return scale_latents(sample_posterior(moments, batch.posterior_noise), autoencoder.config)


@torch.no_grad()
def conditioning_of(run: Run, batch: Batch) -> Conditioning:
    """Text (B, L, D), of a pair pooled text (B, P), both of dropped captions the empty caption's; and sizes (B, 6)."""
    text_encoder = run.pipeline.text_encoder
    text = text_of(batch, text_encoder).where(batch.dropped, text_encoder.empty())
    return Conditioning(text.text, text.pooled, batch.sizes)


def measure(run: Run, done: int, latents: Tensor, clock: Clock) -> dict[str, Any]:
    """The numbers of step `done`; empties the window. The only place where a step waits for the device. Collective."""
    settle(run)
    with run.parts("log"):
        record = window_metrics(run.window.total())
        run.window.clear()
        run.ledger.share(run.accelerator)
        return record | {
            "lr": learning_rate(done - 1, run.config.training.steps, run.config.optimizer),
            "grad_norm": run.bad_steps.grad_norm,
            "latent_std": float(latents.float().std()),
            "ema_decay": run.ema.decay(max(run.ema.updates - 1, 0)),
            "quarantined": run.ledger.replaced,
            "skipped_steps": run.bad_steps.total,
            "memory_gib": peak_memory_gib(run.accelerator.device),
            **straggler(run.agreement, run.own_time.read(clock.waited)),
            **clock.read(),
        }


@torch.no_grad()
def validate(run: Run, held_out: Iterable[Batch]) -> float:
    """Mean loss of the averaged weights over all held-out batches. Collective."""
    device = run.accelerator.device

    def loss_of(batch: Batch) -> Tensor:
        run.ledger.collect(batch.quarantined, len(batch.positions))
        return batch_loss(run, unet, batch.to(device))[0]

    with run.engine.averaged(run.ema) as unet:
        return validation_loss(unet, held_out, loss_of, device)


def preview(run: Run, done: int) -> None:
    """Draws the sample grid on the main process while the others wait. Collective."""
    settle(run)
    with run.engine.averaged(run.ema) as unet:
        if run.accelerator.is_main_process:
            pipeline = replace(run.pipeline, unet=unet)
            grid = draw_previews(pipeline, run.config.previews, seed=run.config.seed, step=done, run_dir=run.run_dir)
            run.metrics.picture(done, "samples", grid)
    run.accelerator.wait_for_everyone()


def due(done: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps, and after the last one, happens after `done` steps."""
    return done == steps or bool(every and done % every == 0)


def sayer(accelerator: Accelerator) -> Callable[[str], None]:
    """Prints a line above the progress bar, on the main process only."""
    return lambda line: tqdm.write(line, file=Console()) if accelerator.is_main_process else None


if __name__ == "__main__":
    sys.exit(main())
