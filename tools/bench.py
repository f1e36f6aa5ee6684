"""All benchmarks behind one front: `python tools/bench.py NAME [options]`, or `all --quick`, into one JSON.

In: a benchmark's name and its own options (`python tools/bench.py NAME --help`), or `all`. Out: what the benchmarks
print, and with `--json FILE` the records of all of them as one list. Each runs in a process of its own: memory, threads
and accelerate's state of one are none of the next one's. `sample` and `loop` take what launch/quickstart.sh left.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# What launch/quickstart.sh leaves.
CHECKPOINT = HERE.parent / "runs" / "quickstart" / "checkpoints" / "latest"


@dataclass(frozen=True)
class Benchmark:
    """One of the programs behind the front."""

    script: str
    about: str
    quick: tuple[str, ...]
    """Options with which `--quick` runs it, in seconds instead of minutes: to see that it works."""


BENCHMARKS = {
    "train": Benchmark(
        "bench_train.py",
        "a training step, against diffusers' network as its script drives it and better",
        ("--widths", "64", "--size", "8", "--batch", "1", "--rounds", "2", "--precisions", "no"),
    ),
    "sample": Benchmark(
        "bench_sample.py",
        "pictures by DPM-Solver++(2M), against diffusers' pipeline",
        ("--batches", "1", "--steps", "2", "--rounds", "2"),
    ),
    "encode": Benchmark(
        "bench_encode.py",
        "raw shards to encoded shards, against the bare VAE",
        ("--samples", "32", "--batch", "16", "--rounds", "2"),
    ),
    "optimizer": Benchmark(
        "bench_optimizer.py",
        "clipping, AdamW and EMA, against diffusers' script and foreach forms",
        ("--widths", "32", "--rounds", "2"),
    ),
    "loop": Benchmark("bench_loop.py", "the training loop around an empty network", ("--steps", "20", "--rounds", "2")),
    "loader": Benchmark(
        "bench_loader.py",
        "reading encoded shards, against stock webdataset",
        ("--count", "2", "--samples", "50", "--batch", "16", "--rounds", "2", "--seconds", "0", "--resumes", "0"),
    ),
    "samplers": Benchmark(
        "bench_samplers.py",
        "samplers around a network that costs nothing, against diffusers' schedulers",
        ("--steps", "4", "--batches", "1", "--rounds", "2"),
    ),
    "checkpoint": Benchmark(
        "bench_checkpoint.py",
        "training's pause for a checkpoint, against accelerate's save_state",
        ("--channels", "32", "--rounds", "1"),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 where a benchmark failed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    listing = "\n".join(f"  {name:11s} {one.about}" for name, one in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="tools/bench.py",
        description=f"{(__doc__ or '').splitlines()[0]}\n\n{listing}\n  all         each of them with its defaults",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Options beside these are the benchmark's own: tools/bench.py NAME --help lists them.",
        add_help=not words or words[0] not in BENCHMARKS,
    )
    parser.add_argument("name", choices=[*BENCHMARKS, "all"], help="which benchmark")
    parser.add_argument("--quick", action="store_true", help="sizes that take seconds: to see that it works")
    parser.add_argument("--json", type=Path, help="file for the records of all that ran")
    options, own = parser.parse_known_args(words)
    if options.name == "all" and own:
        parser.error(f"options of one benchmark, with all: {' '.join(own)}")
    records: list[dict[str, Any]] = []
    failed: list[str] = []
    names = list(BENCHMARKS) if options.name == "all" else [options.name]
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        for name in names:
            print(f"== {name}: {BENCHMARKS[name].about}", flush=True)
            file = Path(scratch) / f"{name}.json"
            done = subprocess.run(command(name, options.quick, own, Path(scratch), file), check=False)
            if done.returncode:
                failed.append(name)
            if file.exists():
                records += json.loads(file.read_text("utf-8"))
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def command(name: str, quick: bool, own: Sequence[str], scratch: Path, file: Path) -> list[str]:
    """The words that run a benchmark, whose own options come last and so win."""
    one = BENCHMARKS[name]
    words = [sys.executable, str(HERE / one.script)]
    if name == "sample" and not {"--sd15", "--checkpoint"} & set(own):
        words += ["--checkpoint", str(CHECKPOINT)]
    if name == "checkpoint" and "--folder" not in own:
        words += ["--folder", str(scratch / "checkpoint")]
    return [*words, *(one.quick if quick else ()), *own, "--json", str(file)]


if __name__ == "__main__":
    sys.exit(main())
