"""Times what follows a backward pass, clipping, AdamW and the average, against diffusers' script and its foreach forms.

In: nothing; the parameters are those of UNets of Stable Diffusion's shape in three widths, the gradients random. Out: a
line for each peer, and the same as JSON (`--json FILE`). Weights and averages are compared before anything is timed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Protocol

import torch
from accelerate import Accelerator
from bench_record import Record, add_options, begin, compared, interleaved, line, write_records
from diffusers.training_utils import EMAModel
from torch import Tensor

from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.training.ema import EMA, EMAConfig
from ldm.training.engine import PlainEngine
from ldm.training.optimizer import OptimizerConfig, make_optimizer

MAX_NORM = 1.0
LEARNING_RATE = 1e-4
DECAY = 0.9  # far from 1: a wrong weight of the average shows after a few steps
COMPARED_STEPS = 3
TOLERANCE = 1e-6


class Way(Protocol):
    """Parameters with gradients, and one way of taking a step with them."""

    unet: UNet

    def step(self, averaged: bool = True) -> None:
        """Clipping, AdamW, zeroing and, unless it is left out, the average of the weights."""

    def average(self) -> None:
        """The average alone."""

    def averages(self) -> list[Tensor]:
        """As it stands, a tensor for each parameter."""


class Ours:
    """The engine and the average of the training program, which averages the weights of before each step."""

    def __init__(self, unet: UNet, accelerator: Accelerator) -> None:
        self.unet = unet
        self.engine = PlainEngine(accelerator, unet, unet, make_optimizer(unet.named_parameters(), OptimizerConfig()))
        self.ema = EMA(unet, EMAConfig(DECAY, warmup=False), self.engine.parts)

    def step(self, averaged: bool = True) -> None:
        self.engine.clip(MAX_NORM)
        if averaged:
            self.engine.average_before_step(self.ema)
        self.engine.step(LEARNING_RATE)

    def average(self) -> None:
        self.ema.update()

    def averages(self) -> list[Tensor]:
        state = self.ema.state_dict()
        return [state[name] for name, _ in self.unet.named_parameters()]


class Diffusers:
    """What diffusers' examples/text_to_image/train_text_to_image.py does after a backward pass.

    Args:
        foreach: of torch's clipping and AdamW and of EMAModel; None leaves each its default.
    """

    def __init__(self, unet: UNet, foreach: bool | None) -> None:
        self.unet, self.foreach = unet, foreach
        # Groups as ours, so that the weights can be compared: the script decays biases and norms, too.
        groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups_of(unet)]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, foreach=foreach)
        self.ema = EMAModel(unet.parameters(), decay=DECAY, min_decay=DECAY, foreach=bool(foreach))
        for _ in range(2):  # whatever its decay, the first call copies the weights; ours is of those of before, too
            self.ema.step(unet.parameters())

    def step(self, averaged: bool = True) -> None:
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), MAX_NORM, foreach=self.foreach)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if averaged:
            self.average()

    def average(self) -> None:
        self.ema.step(self.unet.parameters())

    def averages(self) -> list[Tensor]:
        return list(self.ema.shadow_params)


PEERS: dict[str, bool | None] = {"diffusers, as its script": None, "diffusers, foreach": True}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools/bench_optimizer.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128], help="channels of the outermost level")
    add_options(parser, rounds=11)
    options = parser.parse_args(arguments)
    device, found = begin(options)
    accelerator = Accelerator(cpu=device.type == "cpu")
    records = []
    for width in options.widths:
        for peer_name, foreach in PEERS.items():
            for record in compare(width, peer_name, foreach, options.rounds, device, accelerator):
                records.append(record)
                print(line(record), flush=True)
    if options.json is not None:
        write_records(options.json, records, found)
    return 0


def compare(
    width: int, peer_name: str, foreach: bool | None, rounds: int, device: torch.device, accelerator: Accelerator
) -> list[Record]:
    """Records of all that follows a backward pass, of the average alone, and of what it adds."""
    ours = Ours(network(width, device).to(memory_format=torch.channels_last), accelerator)  # type: ignore[call-overload]
    peer = Diffusers(network(width, device), foreach)
    millions = sum(p.numel() for p in peer.unet.parameters()) / 1e6
    difference = check_same(ours, peer)
    ways: dict[str, Way] = {"ours": ours, "peer": peer}
    whole = {name: whole_step(way) for name, way in ways.items()}
    without = {f"{name} without": partial(step, averaged=False) for name, step in whole.items()}
    steps = interleaved(whole | without, rounds, device)
    averages = interleaved({name: way.average for name, way in ways.items()}, rounds, device)
    of = f"{millions:.0f} M parameters"
    return [
        compared(f"clip, AdamW and average, {of}", *as_ms(steps), peer_name, "ms", difference),
        compared(f"average alone, {of}", *as_ms(averages), f"{peer_name}: EMAModel", "ms", difference),
        Record(f"what the average adds to a step, {of}", *added(steps), f"{peer_name}: EMAModel", "ms"),
    ]


def network(width: int, device: torch.device) -> UNet:
    """A UNet of Stable Diffusion's shape, the same random weights each time."""
    config = UNetConfig(block_out_channels=[width, 2 * width, 4 * width, 4 * width], cross_attention_dim=768)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(config).to(device)


def groups_of(unet: UNet) -> list[dict[str, list[Tensor]]]:
    """The groups of parameters that our optimizer makes."""
    return list(make_optimizer(unet.named_parameters(), OptimizerConfig()).param_groups)


def check_same(ours: Ours, peer: Diffusers) -> float:
    """Largest difference of weights and averages after a few steps with the same gradients, relative to the largest.

    Raises:
        ValueError: it is more than rounding.
    """
    generator = torch.Generator().manual_seed(1)
    for _ in range(COMPARED_STEPS):
        for a, b in zip(ours.unet.parameters(), peer.unet.parameters(), strict=True):
            gradient = torch.randn(a.shape, generator=generator).to(a.device)
            a.grad, b.grad = torch.empty_like(a).copy_(gradient), gradient
        ours.step()
        peer.step()
    ours.average()  # of the weights after the last step
    pairs: list[tuple[Tensor, Tensor]] = [*zip(ours.unet.parameters(), peer.unet.parameters(), strict=True)]
    pairs += zip(ours.averages(), peer.averages(), strict=True)
    with torch.no_grad():
        largest = max(float(b.abs().max()) for _, b in pairs)
        difference = max(float((a - b).abs().max()) for a, b in pairs) / largest
    if not difference <= TOLERANCE:
        raise ValueError(f"weights or averages differ by {difference:.2g} of the largest after {COMPARED_STEPS} steps")
    return difference


def whole_step(way: Way) -> Callable[..., None]:
    """All of a step that follows its backward pass; the gradients are given again each time, which takes no copy."""
    parameters = list(way.unet.parameters())
    gradients = [torch.randn_like(p) for p in parameters]

    def step(averaged: bool = True) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        way.step(averaged)

    return step


def as_ms(seconds: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    """Ours and the peer's, in milliseconds."""
    ours, peer = ([one * 1000 for one in seconds[name]] for name in ("ours", "peer"))
    return ours, peer


def added(seconds: dict[str, list[float]]) -> tuple[float, float]:
    """Milliseconds that the average makes a step longer, ours and the peer's: medians over the rounds."""
    ours, peer = (
        1000 * median(a - b for a, b in zip(seconds[name], seconds[f"{name} without"], strict=True))
        for name in ("ours", "peer")
    )
    return max(ours, 0.0), peer


if __name__ == "__main__":
    sys.exit(main())
