"""What every benchmark measures with and writes: interleaved times, and records of ours against a peer's.

Enters: ways to do the same work, as functions. Leaves: seconds of each way in rounds that take turns, and a JSON list
of records; each holds `name`, `ours`, `peer`, `peer_name`, `ratio` and `unit`, and what its figures belong to.
"""

import argparse
import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LESS_IS_BETTER = ("s", "ms", "us", "%", "MB", "GiB")
"""Units of times, shares and sizes. Of every other unit, which must be a rate ("pictures/s"), more is better."""
PACKAGES = ("torch", "diffusers", "accelerate", "transformers", "numpy", "triton", "xformers")


@dataclass(frozen=True)
class Record:
    """One figure of ours beside one of a peer's for the same work; medians where it was measured in rounds."""

    name: str
    """What was done, with all that makes it another figure: model, precision, batch."""
    ours: float
    peer: float
    peer_name: str
    """Whose figure it is: a library driven in a stated way, a published result, or a limit that was set."""
    unit: str
    """Of `ours` and `peer`: one of LESS_IS_BETTER, or a rate that ends in "/s"."""
    ours_range: tuple[float, float] | None = None
    """Lowest and highest round."""
    peer_range: tuple[float, float] | None = None
    ratio_range: tuple[float, float] | None = None
    """Lowest and highest ratio within a round, of which both ways were measured one after the other."""
    difference: float | None = None
    """How far apart both results were before anything was timed, relative to the largest value."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever else belongs to the figure."""

    def __post_init__(self) -> None:
        if self.unit not in LESS_IS_BETTER and not self.unit.endswith("/s"):
            raise ValueError(
                f"record {self.name!r}: found unit {self.unit!r}, expected {', '.join(LESS_IS_BETTER)} or a rate in x/s"
            )

    @property
    def ratio(self) -> float:
        """How many times better ours is than the peer's: above 1 ours is ahead, whatever the unit.

        The peer's time (or share, or size) divided by ours; ours divided by the peer's where the unit is a rate.
        """
        return ratio_of(self.ours, self.peer, self.unit)

    def to_dict(self) -> dict[str, Any]:
        """As it is written to JSON, which knows no infinite ratio (null then); `extra` beside the other names."""
        named = {
            name: getattr(self, name)
            for name in ("name", "ours", "peer", "peer_name", "ratio", "unit")
            + ("ours_range", "peer_range", "ratio_range", "difference")
        }
        if taken := named.keys() & self.extra.keys():
            raise ValueError(f"record {self.name!r}: extra names {sorted(taken)} are taken")
        named["ratio"] = self.ratio if math.isfinite(self.ratio) else None
        return named | self.extra


def ratio_of(ours: float, peer: float, unit: str) -> float:
    """As Record.ratio; infinite where the divisor is 0."""
    above, below = (peer, ours) if unit in LESS_IS_BETTER else (ours, peer)
    return above / below if below else float("inf")


def compared(
    name: str,
    ours: Sequence[float],
    peer: Sequence[float],
    peer_name: str,
    unit: str,
    difference: float | None = None,
    **extra: Any,
) -> Record:
    """A record of medians and ranges out of the figures of the same rounds.

    Raises:
        ValueError: there are no rounds, or not as many of one as of the other.
    """
    if not ours or len(ours) != len(peer):
        raise ValueError(f"record {name!r}: found {len(ours)} rounds of ours and {len(peer)} of {peer_name}")
    ratios = [ratio_of(a, b, unit) for a, b in zip(ours, peer, strict=True)]
    return Record(
        name,
        statistics.median(ours),
        statistics.median(peer),
        peer_name,
        unit,
        (min(ours), max(ours)),
        (min(peer), max(peer)),
        (min(ratios), max(ratios)),
        difference,
        {"rounds": len(ours)} | extra,
    )


def write_records(path: Path, records: Sequence[Record], about: dict[str, Any]) -> None:
    """Writes the records as one JSON list, each with `about`: what its figures belong to."""
    rows = [record.to_dict() | {"about": about} for record in records]
    path.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def line(record: Record) -> str:
    """A record as a line of text: medians, with ranges in brackets where there are some."""
    told = [
        f"{record.name:44s} ours {figure(record.ours, record.ours_range)} {record.unit}",
        f"{record.peer_name} {figure(record.peer, record.peer_range)}",
        f"ratio {record.ratio:.2f}"
        + ("" if record.ratio_range is None else " ({:.2f} to {:.2f})".format(*record.ratio_range)),
    ]
    if record.difference is not None:
        told.append(f"|d| {record.difference:.1g}")
    return "  ".join(told)


def figure(value: float, around: tuple[float, float] | None) -> str:
    """A median in four digits, and its range."""
    return f"{value:.4g}" + ("" if around is None else " ({:.4g} to {:.4g})".format(*around))


def about(device: torch.device | str) -> dict[str, Any]:
    """What figures belong to: machine, its load, versions and the date."""
    device = torch.device(device)
    found = {
        "device": device_name(device),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """Rounds, device, threads and the file for the records, as benchmarks of a device take them."""
    told = "interleaved rounds, of which median and range are told"
    parser.add_argument("--rounds", type=int, default=rounds, help=f"{told} ({rounds})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="of the processor; torch's default otherwise")
    parser.add_argument("--json", type=Path, help="file for the records")


def begin(options: argparse.Namespace) -> tuple[torch.device, dict[str, Any]]:
    """Sets the threads of `add_options`; device and `about`, whose heading is printed."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    found = about(device)
    print(heading(found), flush=True)
    return device, found


def heading(about: dict[str, Any]) -> str:
    """What figures belong to, as a line of text."""
    versions = ", ".join(f"{package} {about[package]}" for package in PACKAGES if about.get(package))
    return (
        f"{about['date']}: {about['device']}, {about['cores']} cores, {about['threads']} threads, "
        f"load {about['load']:.1f}; Python {about['python']}, {versions}"
    )


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    ways: dict[str, Callable[[], Any]], rounds: int, device: torch.device | str, warmups: int = 1
) -> dict[str, list[float]]:
    """Seconds of each way in each round, on the clock, until the device is done.

    All ways are done `warmups` times before any is timed. Their order is turned around in every other round, so that
    none always follows the same one; garbage of one is collected before the next begins.
    """
    device = torch.device(device)
    for way in ways.values():
        for _ in range(warmups):
            way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in ways if number % 2 == 0 else reversed(ways):
            gc.collect()
            wait_for(device)
            begun = time.perf_counter()
            ways[name]()
            wait_for(device)
            seconds[name].append(time.perf_counter() - begun)
    return seconds
