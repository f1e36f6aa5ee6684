"""One training step of the same network in several ways: as this program takes it, and as diffusers is driven.

Enters: a UNetConfig, weights and a batch. Leaves: objects with `step()` (forward, backward, clip, AdamW, EMA) and
`gradients()`, and the check that all of them compute the same before anyone times them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor

from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.training.distributed import split_global_batch, start_accelerator
from ldm.training.ema import EMA, EMAConfig
from ldm.training.launched import DistributedConfig
from ldm.training.optimizer import OptimizerConfig
from ldm.training.wrapping import WrappingConfig, wrap_network

LEARNING_RATE = 1e-4
FLOAT32_LIMIT = 1e-5
"""In float32: largest difference of outputs relative to the largest value, and length of the difference of all
gradients as one vector relative to theirs."""
TENSOR_LIMIT = 1e-4
"""The same of a single gradient by its largest value; diffusers in channels_last is 1.3e-5 from itself in NCHW."""
FLOOR = 1e-2
"""Share of the largest of all gradients below which a tensor's own largest is rounding: a bias before a GroupNorm
whose groups are single channels has none at all."""
ROUNDED_LIMIT = 1.5
"""In bfloat16: how many times the peer's own distance from float32's output ours may be away from it."""
REFERENCE_BATCH = 4
UPDATE_LIMITS = {"no": 0.05, "bf16": 0.5}
"""Relative difference of what one step changes in all weights: Adam's first step is a sign, which rounding may turn."""


@dataclass(frozen=True)
class Inputs:
    """A batch for the network, on the device."""

    x: Tensor
    """Noisy latents (B, 4, h, w)."""
    t: Tensor
    """Timesteps (B,)."""
    text: Tensor
    """(B, L, D)."""
    target: Tensor
    """What the network is to predict, as `x`."""

    @classmethod
    def random(cls, config: UNetConfig, batch: int, side: int, length: int, device: torch.device) -> "Inputs":
        """The same on every device."""
        generator = torch.Generator().manual_seed(7)
        shape = (batch, config.in_channels, side, side)
        x, target = (torch.randn(shape, generator=generator) for _ in range(2))
        text = torch.randn(batch, length, config.cross_attention_dim, generator=generator)
        t = torch.randint(0, 1000, (batch,), generator=generator)
        return cls(*(one.to(device) for one in (x, t, text, target)))


class Way(ABC):
    """A network in training with its optimizer and average."""

    name: str
    compiled: bool
    """Whether the network runs compiled."""

    @abstractmethod
    def step(self) -> None:
        """Forward, backward, clip, AdamW, average."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Trained weights under diffusers' names; not copies."""

    @abstractmethod
    def average(self) -> list[Tensor]:
        """Averaged weights, not copies."""

    @abstractmethod
    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The output for the batch, and the gradient of the loss by each weight; no step is taken."""


class Ours(Way):
    """The engine that `ldm/train.py` gets from wrapping.wrap_network, stepped as it is there."""

    name = "ldm"

    def __init__(
        self,
        config: UNetConfig,
        weights: Mapping[str, Tensor],
        inputs: Inputs,
        accelerator: Accelerator,
        *,
        compiled: bool = False,
        channels_last: bool = True,
    ) -> None:
        with inputs.x.device:
            unet = UNet(config)
        unet.load_state_dict(dict(weights))
        wrapping = WrappingConfig(channels_last=channels_last, compile=compiled)
        optimizer = OptimizerConfig(lr=LEARNING_RATE)
        split = split_global_batch(len(inputs.x), 1, None)
        self.unet, self.inputs, self.max_norm, self.compiled = unet, inputs, optimizer.max_grad_norm, compiled
        self.engine = wrap_network(unet, accelerator, wrapping, "single", DistributedConfig(), optimizer, split)
        self.ema = EMA(unet, EMAConfig(), self.engine.parts)
        self.stepped = False
        """Whether the average still lacks the last step's weights, which it takes within the next."""

    def _loss(self) -> tuple[Tensor, Tensor]:
        inputs = self.inputs
        out = self.engine.network(inputs.x, inputs.t, Conditioning(inputs.text))
        return out, (out.float() - inputs.target).square().mean()

    def step(self) -> None:
        with self.engine.exchanging(True):
            _, loss = self._loss()
            self.engine.backward(loss)
        self.engine.clip(self.max_norm)
        if self.stepped:
            self.engine.average_before_step(self.ema)
        self.engine.step(LEARNING_RATE)
        self.stepped = True

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.unet.named_parameters()}

    def average(self) -> list[Tensor]:
        if self.stepped:
            self.ema.update()
            self.stepped = False
        return list(self.ema.state_dict().values())

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        out, loss = self._loss()
        self.engine.backward(loss)
        return out.detach(), taken_gradients(self.unet)


class Script(Way):
    """diffusers driven as its examples/text_to_image/train_text_to_image.py does: NCHW, and every default.

    torch.optim.AdamW and clip_grad_norm_ as they come, EMAModel without foreach, the loss gathered and read in each
    step; autocast, where there is one, by accelerate.
    """

    name = "diffusers, as its script"
    channels_last = False
    foreach: bool | None = None
    compiled = False
    reads_loss = True

    def __init__(
        self, config: UNetConfig, weights: Mapping[str, Tensor], inputs: Inputs, accelerator: Accelerator
    ) -> None:
        from diffusers import UNet2DConditionModel
        from diffusers.training_utils import EMAModel

        with inputs.x.device:
            self.unet = UNet2DConditionModel.from_config(config.to_dict())
        self.unet.load_state_dict(dict(weights))
        self.unet.train()
        self.inputs, self.accelerator, self.loss_seen = inputs, accelerator, 0.0
        self.unet.to(accelerator.device)
        if self.channels_last:
            self.unet.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(self.unet.parameters(), lr=LEARNING_RATE, foreach=self.foreach)
        self.ema = EMAModel(self.unet.parameters(), foreach=bool(self.foreach))
        self.ema.to(accelerator.device)
        self.network = accelerator.prepare_model(self.unet)
        if self.compiled:
            self.network = torch.compile(self.network)
        self.optimizer = accelerator.prepare_optimizer(optimizer)

    def _loss(self) -> tuple[Tensor, Tensor]:
        inputs, x = self.inputs, self.inputs.x
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        out = self.network(x, inputs.t, inputs.text, return_dict=False)[0]
        return out, F.mse_loss(out.float(), inputs.target.float(), reduction="mean")

    def step(self) -> None:
        _, loss = self._loss()
        if self.reads_loss:
            self.loss_seen += self.accelerator.gather(loss.repeat(len(self.inputs.x))).mean().item()
        self.accelerator.backward(loss)
        if self.foreach:
            torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0, foreach=True)
        else:
            self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.unet.named_parameters()}

    def average(self) -> list[Tensor]:
        return list(self.ema.shadow_params)

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        out, loss = self._loss()
        self.accelerator.backward(loss)
        return out.detach(), taken_gradients(self.unet)


class Tuned(Script):
    """diffusers with what its user can turn on: channels_last, foreach in clip, AdamW and EMA; the loss is not read."""

    name = "diffusers, channels_last and foreach"
    channels_last = True
    foreach = True
    reads_loss = False


class Compiled(Tuned):
    """The same with torch.compile around the network."""

    name = "diffusers, compiled, channels_last and foreach"
    compiled = True


PEERS: dict[str, type[Script]] = {"script": Script, "tuned": Tuned, "compiled": Compiled}


def fresh_accelerator(precision: str) -> Accelerator:
    """An Accelerator of another precision than the one before it, which accelerate otherwise refuses in a process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return start_accelerator(DistributedConfig(), precision)


def initial_weights(config: UNetConfig, device: torch.device) -> dict[str, Tensor]:
    """Random weights of which no layer is zero, as diffusers draws them; the same each time on one device."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        return dict(UNet2DConditionModel.from_config(config.to_dict()).state_dict())


def reference(config: UNetConfig, weights: Mapping[str, Tensor], inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of diffusers' network in float32, a few samples at a time."""
    from diffusers import UNet2DConditionModel

    with inputs.x.device:
        unet = UNet2DConditionModel.from_config(config.to_dict())
    unet.load_state_dict(dict(weights))
    outputs = []
    for first in range(0, len(inputs.x), REFERENCE_BATCH):
        some = slice(first, first + REFERENCE_BATCH)
        out = unet(inputs.x[some], inputs.t[some], inputs.text[some], return_dict=False)[0]
        ((out - inputs.target[some]).square().sum() / inputs.target.numel()).backward()
        outputs.append(out.detach())
    return torch.cat(outputs), taken_gradients(unet)


def taken_gradients(unet: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients, which the network then has no more."""
    found = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
    unet.zero_grad(set_to_none=True)
    return found


def deviation(found: Tensor, expected: Tensor, least: float = 1e-30) -> float:
    """Largest difference relative to the largest value, or to `least`; infinite where one is not a number."""
    relative = float((found.float() - expected.float()).abs().max()) / max(float(expected.abs().max()), least)
    return math.inf if math.isnan(relative) else relative


def check_same(
    ours: Way, peer: Way, precision: str, exact: tuple[Tensor, dict[str, Tensor]] | None = None
) -> dict[str, float]:
    """How far ours and the peer's are apart in output and gradients; in bfloat16, how far ours are from `exact`.

    Args:
        exact: what `reference` gave; needed in other precisions than "no".

    Raises:
        ValueError: they differ by more than rounding, so that times would compare different things.
    """
    (out, gradients), (peer_out, peer_gradients) = ours.gradients(), peer.gradients()
    if gradients.keys() != peer_gradients.keys():
        raise ValueError(f"{peer.name}: gradients of other weights: {sorted(gradients.keys() ^ peer_gradients.keys())}")
    if precision == "no":
        least = FLOOR * max(float(one.abs().max()) for one in peer_gradients.values())
        apart = {name: deviation(gradients[name], peer_gradients[name], least) for name in gradients}
        worst = max(apart, key=lambda name: apart[name])
        own, theirs = _joined(gradients), _joined(peer_gradients)
        found = {"output": deviation(out, peer_out), "gradients": float((own - theirs).norm() / theirs.norm())}
        for what, value, limit in (
            *((what, value, FLOAT32_LIMIT) for what, value in found.items()),
            (f"gradients by {worst}", apart[worst], TENSOR_LIMIT),
        ):
            if not value <= limit:
                raise ValueError(
                    f"{what} of {ours.name} and of {peer.name} differ by {value:.2g} relative, allowed is {limit:g}: "
                    "times would compare different things"
                )
        return found
    assert exact is not None, "bfloat16 is compared with float32"
    joined = (_joined(gradients), _joined(peer_gradients), _joined(exact[1]))
    rounded: dict[str, float] = {}
    for what, (own, theirs, right) in {"output": (out, peer_out, exact[0]), "gradients": joined}.items():
        away, peer_away = (float((one.float() - right).norm() / right.norm()) for one in (own, theirs))
        if not away <= ROUNDED_LIMIT * peer_away:
            raise ValueError(
                f"{what} of {ours.name} in {precision} are {away:.2g} from float32's, those of {peer.name} "
                f"{peer_away:.2g}: times would compare different things"
            )
        rounded |= {what: away, f"peer_{what}": peer_away}
    return rounded


def check_updates(ours: Way, peer: Way, precision: str) -> None:
    """Takes one step of each and compares what it changes in the weights; averages must have moved.

    Raises:
        ValueError: the weights moved differently, or an average not at all.
    """
    changes = {}
    for way in (ours, peer):
        before, average = {name: w.clone() for name, w in way.weights().items()}, [a.clone() for a in way.average()]
        way.step()
        changes[way.name] = _joined({name: w - before[name] for name, w in way.weights().items()})
        if not any(bool((now != then).any()) for now, then in zip(way.average(), average, strict=True)):
            raise ValueError(f"{way.name}: a step left the average as it was")
    own, theirs = changes[ours.name], changes[peer.name]
    apart = float((own - theirs).norm() / theirs.norm())
    if not apart <= UPDATE_LIMITS[precision]:
        raise ValueError(
            f"a step of {ours.name} changes weights otherwise than one of {peer.name} ({apart:.2g} relative, "
            f"allowed is {UPDATE_LIMITS[precision]:g}): times would compare different things"
        )


def _joined(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])
