"""Times a training step against diffusers' network with the same weights, driven as in its script and better.

In: nothing (UNets of Stable Diffusion's shape in three widths), or a run's config. Out: a line for each peer, and the
same as JSON (`--json FILE`): seconds of forward, backward, clip, AdamW and EMA, with pictures and TFLOP per second, the
share of what matrix products reach on the same device, and peak memory. `--steps N` also measures a run: see
bench_run.py.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_record import Record, add_options, begin, compared, interleaved, line, wait_for, write_records
from bench_run import measure_run, told_run
from train_ways import (
    PEERS,
    Inputs,
    Ours,
    Way,
    check_same,
    check_updates,
    fresh_accelerator,
    initial_weights,
    reference,
)

from ldm.config import parse_config
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.training.simulation import LiveBytes, forward_flop

CONFIGS = Path(__file__).parent.parent / "configs"
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}
TEXT_LENGTH = 77
CEILING_SIDE = {"cpu": 2048, "cuda": 8192}
CEILING_ROUNDS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools/bench_train.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 96, 128], help="channels of the outermost level")
    parser.add_argument("--config", type=Path, help="take the network from a run's config instead")
    parser.add_argument("--size", type=int, default=16, help="height and width of the latents (16)")
    parser.add_argument("--batch", type=int, default=4, help="samples of a step (4)")
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"], choices=list(DTYPES), help="autocast")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), help="all; on CPU without compiled")
    parser.add_argument("--compile", action="store_true", help="ours compiled, as wrapping.compile does it")
    parser.add_argument("--calls", type=int, default=1, help="steps of each way in a round (1)")
    parser.add_argument("--steps", type=int, default=0, help="also measure so many steps of a run; 0 leaves it out")
    add_options(parser, rounds=5)
    options = parser.parse_args(arguments)
    device, found = begin(options)
    if options.peers is None:
        options.peers = [name for name in PEERS if device.type == "cuda" or name != "compiled"]
    records: list[Record] = []
    for name, config in networks(options.widths, options.config, options.size):
        for precision in options.precisions:
            if options.steps:
                records += run_records(name, config, precision, options, device)
                save(options.json, records, found)
            for record in compare(name, config, precision, options, device):
                records.append(record)
                save(options.json, records, found)  # after each: minutes lie between them, and a time limit may end all
                print(told(record), flush=True)
    return 0


def save(file: Path | None, records: Sequence[Record], found: dict[str, Any]) -> None:
    """Writes what there is so far, where a file is asked for."""
    if file is not None:
        write_records(file, records, found)


def networks(widths: Sequence[int], config: Path | None, side: int) -> list[tuple[str, UNetConfig]]:
    """Names and settings of the networks that are measured."""
    if config is not None:
        read = parse_config([f"--config={config}"], prog="tools/bench_train.py", description="")
        return [(config.stem, replace(read.unet, sample_size=side))]
    return [
        (
            f"width {width}",
            UNetConfig(
                sample_size=side, block_out_channels=[width, 2 * width, 4 * width, 4 * width], cross_attention_dim=768
            ),
        )
        for width in widths
    ]


def compare(
    name: str, config: UNetConfig, precision: str, options: argparse.Namespace, device: torch.device
) -> Iterator[Record]:
    """A record for each peer; of the networks only ours and one peer's are there at a time."""
    gc.collect()  # the last call's engine knows its own network
    inputs = Inputs.random(config, options.batch, options.size, TEXT_LENGTH, device)
    weights = initial_weights(config, device)
    exact = reference(config, weights, inputs) if precision != "no" else None
    picture = picture_tflop(config, options.size)
    ceiling = matmul_ceiling(device, DTYPES[precision])
    accelerator = fresh_accelerator(precision)
    ours = Ours(config, weights, inputs, accelerator, compiled=options.compile)
    for kind in options.peers:
        peer = PEERS[kind](config, weights, inputs, accelerator)
        start_again(ours, weights)
        difference = check_same(ours, peer, precision, exact)
        check_updates(ours, peer, precision)
        ways = {"ours": repeated(ours, options.calls), "peer": repeated(peer, options.calls)}
        taken = interleaved(ways, options.rounds, device, warmups=3 if device.type == "cuda" else 1)
        seconds = {who: [one / options.calls for one in each] for who, each in taken.items()}
        extra: dict[str, Any] = {"batch": options.batch, "side": options.size, "compiled": options.compile}
        for who, way in (("ours", ours), ("peer", peer)):
            rate = options.batch / median(seconds[who])
            extra |= {
                f"{who}_pictures_per_second": rate,
                f"{who}_tflops": rate * picture,
                f"{who}_share_of_ceiling": rate * picture / ceiling,
            }
            if device.type == "cuda" or not way.compiled:
                extra[f"{who}_step_gib"] = step_memory(way, device) / 2**30
        extra |= {"ceiling_tflops": ceiling, "differences": difference}
        compiled = ", compiled" if options.compile else ""
        what = f"training step, {name}, {precision}, batch {options.batch}, {options.size}x{options.size}{compiled}"
        apart = max(difference["output"], difference["gradients"])
        yield compared(what, seconds["ours"], seconds["peer"], peer.name, "s", apart, **extra)
        del peer, ways, way
        accelerator.free_memory()  # which keeps what it has prepared: three networks of SD's size would not fit


def run_records(
    name: str, config: UNetConfig, precision: str, options: argparse.Namespace, device: torch.device
) -> list[Record]:
    """Records of a run with this network and a real loader; prints the breakdown of its steps."""
    overrides = [f"--wrapping.compile={str(options.compile).lower()}"]
    if options.config is None:
        overrides.append(f"--unet.block_out_channels={config.block_out_channels}")
    source = options.config or CONFIGS / "sd15.yaml"
    sizes = (options.size, options.batch, precision, options.steps)
    figures, records = measure_run(name, source, *sizes, overrides, device)
    gc.collect()  # the run's parts know each other
    torch.cuda.empty_cache()
    print("\n".join([f"run, {name}, {precision}", told_run(figures), *map(line, records)]), flush=True)
    return records


def start_again(ours: Ours, weights: dict[str, torch.Tensor]) -> None:
    """Puts the first weights back and forgets the optimizer's state, so that the next peer starts from the same."""
    ours.engine.load_weights(weights)
    ours.engine.optimizer.optimizer.state.clear()


def repeated(way: Way, calls: int) -> Callable[[], None]:
    """So many steps, one after the other."""

    def steps() -> None:
        for _ in range(calls):
            way.step()

    return steps


def picture_tflop(config: UNetConfig, side: int) -> float:
    """10^12 operations that training on one picture takes: three forward passes, a multiply-accumulate being two."""
    with torch.device("meta"):
        return 3 * forward_flop(UNet(config), side, TEXT_LENGTH) / 1e12


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the best of some products of large square matrices: what the device reaches at all."""
    side = CEILING_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    taken = interleaved({"product": lambda: a @ b}, CEILING_ROUNDS, device, warmups=2)
    return 2 * side**3 / min(taken["product"]) / 1e12


def step_memory(way: Way, device: torch.device) -> float:
    """Bytes that a step takes at its peak, beyond weights, moments and average; on a CPU not of a compiled network.

    There every operator is watched, which no compiled program lets anyone do.
    """
    wait_for(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        way.step()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    live = LiveBytes()
    live.ignore([*way.weights().values(), *way.average()])
    with live:
        way.step()
    return live.peak


def told(record: Record) -> str:
    """The record's line, and below it what else a step is judged by."""
    extra = record.extra
    parts = [
        f"{who}: {extra[f'{who}_pictures_per_second']:.4g} pictures/s, {extra[f'{who}_tflops']:.3g} TFLOP/s "
        f"({100 * extra[f'{who}_share_of_ceiling']:.0f} % of {extra['ceiling_tflops']:.3g})"
        + (f", {extra[f'{who}_step_gib']:.3g} GiB" if f"{who}_step_gib" in extra else "")
        for who in ("ours", "peer")
    ]
    return "\n    ".join([line(record), *parts])


if __name__ == "__main__":
    sys.exit(main())
