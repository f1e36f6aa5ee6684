"""A run's state, put into checkpoints and put back out of them; or the state that it begins with.

Enters: a Run. Leaves: checkpoints in its folder, which are pipeline folders; the Run as it was after some step.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ldm.config import differences, load_config, to_dict, to_yaml
from ldm.models.pretrained import INDEX_NAME
from ldm.pipeline.folder import FROZEN, SCHEDULER
from ldm.pipeline.pipeline import save_pipeline
from ldm.pipeline.scheduler import read_scheduler
from ldm.training.checkpoint import TrainingState, intact, load_training_state, newest_complete, point_latest
from ldm.training.fit import loading
from ldm.training.initial_weights import load_initial, objective_changes
from ldm.training.metrics import forget_after
from ldm.training.own_checkpoints import checked_source
from ldm.training.run import Run
from ldm.training.run_card import card_of


def resume(run: Run, say: Callable[[str], None]) -> int:
    """Puts back the newest complete checkpoint of the run's folder, or begins anew; returns the steps done. Collective.

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
    if name is None:
        begin(run, say)
    else:
        step = restore(run, Path(name), say)
        run.writer.last = Path(name)
        say(f"resuming after step {step} from {name}")
    run.metrics.start(step)
    if run.accelerator.is_main_process:
        forget_after(run.bad_steps.path, step)
    return step


def begin(run: Run, say: Callable[[str], None]) -> None:
    """The weights that the run begins with: random ones as they are, or those of `init_from`. Collective.

    Raises:
        CheckpointError: the source is a checkpoint of this program that is incomplete or altered; names the file.
        FileNotFoundError, ValueError: as `load_initial`, or the source is not the same for all processes.
    """
    config = run.config
    if config.init_from is None:
        return
    with loading("init_from"):
        source = checked_source(config.init_from, "unet", "scheduler", INDEX_NAME)
    with run.engine.initial() as unet:
        record = load_initial(unet, source, say)
    changes = objective_changes(
        source,
        run.pipeline,
        None if config.text_encoder_2 is None else config.empty_caption,
        run.pipeline.autoencoder.config,
    )
    for change in changes:
        say(f"  {change}")
    run.initialized_from = "; ".join([record, *changes])
    run.ema.load_state_dict(dict(zip(run.ema.names, run.engine.parts(), strict=True)), 0)
    # The engine made the processes' weights equal before these were read.
    records = gather_object([run.initialized_from])
    if len(set(records)) > 1:
        listing = "\n  ".join(f"process {rank}: {record}" for rank, record in enumerate(records))
        raise ValueError(
            f"init_from: processes read different weights from {source}; put the same on all machines:\n  {listing}"
        )


def restore(run: Run, checkpoint: Path, say: Callable[[str], None]) -> int:
    """Puts back the state of a checkpoint; returns the steps done.

    Raises:
        CheckpointError: it is incomplete or altered.
        ValueError: config or shards differ from the checkpoint's in something that would make it another run.
    """
    state, average = load_training_state(checkpoint)
    saved = to_dict(load_config(checkpoint / "training_state" / "config.yaml"))
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
    run.engine.load_weights(state.weights)
    # With what sampling starts from, which is estimated once.
    run.pipeline.corruption = read_scheduler(checkpoint / SCHEDULER).corruption
    run.engine.load_optimizer_tensors(state.optimizer)
    run.ema.load_state_dict(run.engine.parts_of(average), state.ema_updates)
    window = torch.tensor(state.scalars["loss_window"], dtype=torch.float64)
    run.window.restore(window, run.accelerator.is_main_process)
    run.ledger.restore(state.scalars["ledger"])
    run.initialized_from = state.scalars.get("initialized_from")
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
    finite = bool(torch.stack(torch._foreach_norm(run.engine.parts())).isfinite().all())
    if run.agreement.largest(not finite):
        raise FloatingPointError(
            f"after step {done} weights are not finite; checkpoints are from before. Lower optimizer.lr, or set "
            "wrapping.mixed_precision to bf16 or no"
        )
    engine = run.engine
    weights, optimizer, average = engine.weights(), engine.optimizer_tensors(), engine.average(run.ema)
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler
        run.writer.save(
            TrainingState(
                step=done,
                weights=weights,
                optimizer=optimizer,
                ema_updates=run.ema.updates,
                scalars={
                    "loss_window": window.tolist(),
                    "ledger": run.ledger.state(),
                    "bad_steps": run.bad_steps.state(),
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "shards": run.data.digest(),
                    "initialized_from": run.initialized_from,
                },
            ),
            average,
            partial(write_pipeline, run, done),
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


def write_pipeline(run: Run, done: int, folder: Path, averaged: Mapping[str, Tensor], earlier: Path | None) -> None:
    """The pipeline's files: averaged weights; frozen parts are links where an earlier checkpoint has them intact."""
    if earlier is not None and not intact(earlier, FROZEN):
        earlier = None
    card = card_of(run.config, run.data, done, run.initialized_from)
    save_pipeline(folder, run.pipeline, unet_state=averaged, frozen_from=earlier, card=card)
