"""Times the training loop around a network that computes nothing, against the steps of the run that it belongs to.

In: a run's config, the demo's by default; its data and frozen parts are used, its folder is not. Out: a line and, with
`--json FILE`, a record: milliseconds a step of the loop alone (conditioning, noise, loss, optimizer and average of a
single weight, metrics) and of the run's own waiting for its loader; and one per cent of the run's own step, which is
the most that they may be. What a loop that does nothing else waits for the loader is told beside it: in the run the
loader works while the network computes.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from bench_record import about, compared, heading, line, write_records
from torch import Tensor, nn

from ldm.config import RunConfig, parse_config
from ldm.models.conditioning import Conditioning
from ldm.train import run_steps
from ldm.training.breakdown import StepParts
from ldm.training.distributed import roll_call, split_global_batch, start_accelerator
from ldm.training.ema import EMA
from ldm.training.engine import PlainEngine
from ldm.training.optimizer import make_optimizer
from ldm.training.outcome import only_program
from ldm.training.run import Run, build_run
from ldm.training.signals import StopRequest
from ldm.training.watch import Watch
from ldm.training.wrapping import resolve_precision

CONFIG = Path(__file__).parent.parent / "configs/demo.yaml"
SHARE = 0.01
"""Of the run's step, that the loop around it may take."""


class Nothing(nn.Module):
    """A network of one weight, for what surrounds a network."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return x * self.weight


class EndedError(Exception):
    """Enough steps were taken."""


class Stamps(Watch):
    """Notes when the steps after `warmup` begin and end, and ends the run after `steps` of them."""

    def __init__(self, run: Run, warmup: int, steps: int) -> None:
        super().__init__(run.accelerator, roll_call(run.accelerator), 0)
        self.parts, self.warmup, self.last = run.parts, warmup, warmup + steps
        self.begun = self.ended = 0.0

    def alive(self, done: int) -> None:
        super().alive(done)
        if done == self.warmup:
            self.parts.read()  # with what the loader's start took
            self.begun = time.perf_counter()
        if done == self.last:
            self.ended = time.perf_counter()
            raise EndedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools/bench_loop.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG, help="the run's config (configs/demo.yaml)")
    parser.add_argument("--steps", type=int, default=10, help="steps of the run in a round (10)")
    parser.add_argument("--empty-steps", type=int, default=200, help="steps of the loop alone in a round (200)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds, of which median and range are told")
    parser.add_argument("--json", type=Path, help="file for the records")
    parser.add_argument("settings", nargs="*", help="dotted options of ldm/train.py, as data.shards=FOLDER")
    options = parser.parse_args(arguments)
    ours: list[float] = []
    limits: list[float] = []
    parts: dict[str, float] = {}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="bench-loop-") as scratch:
            given = [f"--{setting}" for setting in options.settings]
            words = [f"--config={options.config}", *given, f"--run_dir={scratch}/run"]
            config = parse_config(words, prog="tools/bench_loop.py", description="")
            of_run, parts_of_run = step_seconds(config, options.steps, empty=False)
            limits.append(SHARE * 1000 * of_run)
            seconds, parts = step_seconds(config, options.empty_steps, empty=True)
            ours.append(1000 * (seconds - parts["data"] + parts_of_run["data"]))
    found = about("cuda" if torch.cuda.is_available() else "cpu")
    name = f"loop around an empty network, {options.config.stem}"
    of_parts = {f"{part}_ms": 1000 * seconds for part, seconds in parts.items()}
    record = compared(name, ours, limits, f"{SHARE:.0%} of the run's step", "ms", **of_parts)
    print(heading(found))
    print(line(record))
    print(
        "the empty loop's parts, in ms: " + ", ".join(f"{part} {1000 * seconds:.3f}" for part, seconds in parts.items())
    )
    if options.json is not None:
        write_records(options.json, [record], found)
    return 0


def step_seconds(config: RunConfig, steps: int, *, empty: bool) -> tuple[float, dict[str, float]]:
    """Mean seconds of a step of ldm/train.py's loop after a fifth as many to warm up, and of its parts.

    Args:
        empty: with a network that computes nothing.
    """
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = start_accelerator(config.distributed, resolve_precision(config.wrapping.mixed_precision))
    with only_program(Path(config.run_dir), accelerator) as status:
        split = split_global_batch(config.training.global_batch, 1, config.training.max_micro_batch)
        run = build_run(config, accelerator, split, lambda text: None)
        if empty:
            network = Nothing().to(accelerator.device)
            made = make_optimizer(network.named_parameters(), config.optimizer)
            run.engine = PlainEngine(accelerator, network, network, made)  # type: ignore[arg-type]
            run.ema = EMA(network, config.ema, run.engine.parts)
        run.parts = parts = StepParts(accelerator.device)
        warmup = max(2, steps // 5)
        stamps = Stamps(run, warmup, steps)
        with suppress(EndedError):
            run_steps(run, StopRequest(), status, stamps, lambda text: None)
        run.metrics.close()
    return (stamps.ended - stamps.begun) / steps, parts.read()


if __name__ == "__main__":
    sys.exit(main())
