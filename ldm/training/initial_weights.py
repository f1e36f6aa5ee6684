"""A trained network to begin with: released weights put into the run's UNet, whose ends may have other widths.

Enters: a UNet with its random weights, and the source of a trained one. Leaves: the UNet with the source's weights, and
a sentence for the record that says where they are from and what was changed.

Latents of other channels change the first and the last convolution, states of another width the keys and values of
cross-attention. Anything else that differs is another network, and refused.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ldm.diffusion.schedule import ScheduleConfig
from ldm.model_card import without_paths
from ldm.models.pretrained import load_weights, resolve_source, weights_hash
from ldm.models.unet import UNet, UNetConfig
from ldm.models.weight_files import Weights
from ldm.pipeline_folder import read_scheduler
from ldm.training.fit import loading

MAY_DIFFER = ("in_channels", "out_channels", "cross_attention_dim", "sample_size", "upcast_attention")
"""Fields of UNetConfig in which the run's network may differ from the source's; the last two change no weights."""
PER_LEVEL = ("layers_per_block", "transformer_layers_per_block", "attention_head_dim")
CONTEXT_PROJECTIONS = ("attn2.to_k.weight", "attn2.to_v.weight")


class FittedWeights(Weights):
    """Weights of a source with the tensors at its ends fitted to another network, as they are read."""

    def __init__(self, source: Weights, found: UNetConfig, unet: UNet) -> None:
        vars(self).update(vars(source))  # not super().__init__, which would look for the files again
        self.source = source
        self.originals: dict[str, Tensor] = {}
        """Tensors that were not taken as they are, as the source has them; complete when all are read."""
        self.own = unet.state_dict()
        self.ends = _ends(found, self.own, unet.config)
        fits = {name for name, shape in source.shapes.items() if self.ends.get(name) == shape}
        self.shapes = {
            name: tuple(self.own[name].shape) if name in fits else shape for name, shape in source.shapes.items()
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor in the shape that the network has for it."""
        for name, tensor in self.source.tensors():
            if name in self.ends:
                self.originals[name] = tensor.float()
                tensor = _fitted(name, tensor, self.own[name])
            yield name, tensor


def load_initial(unet: UNet, source: str, say: Callable[[str], None]) -> str:
    """Puts the weights of a trained UNet into `unet`; says what was done and returns it as one sentence.

    New channels of the first convolution are zero, so that the network begins as the source's, whatever they hold; new
    rows of the last one are zero; channels that are fewer are the source's first. Keys and values of another context
    width stay as `unet` has them: drawn from the run's seed.

    Args:
        source: a UNet's or a pipeline's folder, single file or hub name (see `resolve_source`).

    Raises:
        FileNotFoundError, ValueError: no UNet there, one of another architecture, or weights that do not fit its config
            (each difference is listed); the message begins with init_from.
    """
    with loading("init_from"):
        found, weights = UNet.open(source)
        check_same_network(found, unet.config)
        fitted = FittedWeights(weights, found, unet)
        load_weights(unet, fitted)
    changes = list(_changes(found, unet.config, sum(name.endswith(CONTEXT_PROJECTIONS) for name in fitted.ends)))
    # In float32 and before changes: what `weights_hash(UNet.from_pretrained(source).state_dict().items())` gives.
    digest = weights_hash((unet.state_dict() | fitted.originals).items())
    record = "; ".join([f"{without_paths(source)}, xxh3 {digest}", *changes])
    say(f"initial weights from {source}, xxh3 {digest}")
    for change in changes:
        say(f"  {change}")
    return record


def check_same_network(found: UNetConfig, expected: UNetConfig) -> None:
    """Raises ValueError with every field in which two networks differ, but for those of their ends."""
    problems = []
    for one in dataclasses.fields(UNetConfig):
        if one.name in MAY_DIFFER:
            continue
        a, b = (config.per_level(one.name) if one.name in PER_LEVEL else getattr(config, one.name)
                for config in (found, expected))  # fmt: skip
        if a != b:
            problems.append(f"unet.{one.name}: the source has {a}, this run {b}")
    if problems:
        raise ValueError(
            f"the source is another network than this run's; besides {', '.join(MAY_DIFFER)} all has to be equal:\n  "
            + "\n  ".join(problems)
            + "\nSet them as the source has them, or choose another source."
        )


def objective_changes(source: str, parameterization: str, noise: ScheduleConfig) -> list[str]:
    """In what the run's objective and noise differ from those that the source was trained with, a sentence each.

    Allowed, and to be said: at its first steps the network puts out what it was trained to put out. Only a pipeline's
    folder (or the unet/ in one) tells, and only with a scheduler of this kind.
    """
    try:
        folder = resolve_source(source, "scheduler")
        schedule, predicted = read_scheduler(folder.parent if folder.name in ("scheduler", "unet") else folder)
    except (OSError, ValueError):
        return []
    changes = []
    if predicted != parameterization:
        changes.append(f"objective: the source predicts {predicted}, this run trains it to predict {parameterization}")
    for one in dataclasses.fields(ScheduleConfig):
        a, b = getattr(schedule.config, one.name), getattr(noise, one.name)
        if a != b:
            changes.append(f"noise.{one.name}: {a} became {b}")
    return changes


def _ends(found: UNetConfig, own: dict[str, Tensor], expected: UNetConfig) -> dict[str, tuple[int, ...]]:
    """Names of the tensors whose widths differ, with the shapes that the source must have for them."""
    ends: dict[str, tuple[int, ...]] = {}
    if found.in_channels != expected.in_channels:
        rows, _, *kernel = own["conv_in.weight"].shape
        ends["conv_in.weight"] = (rows, found.in_channels, *kernel)
    if found.out_channels != expected.out_channels:
        for name in ("conv_out.weight", "conv_out.bias"):
            ends[name] = (found.out_channels, *own[name].shape[1:])
    if found.cross_attention_dim != expected.cross_attention_dim:
        for name, tensor in own.items():
            if name.endswith(CONTEXT_PROJECTIONS):
                ends[name] = (tensor.shape[0], found.cross_attention_dim)
    return ends


def _fitted(name: str, tensor: Tensor, own: Tensor) -> Tensor:
    if name.endswith(CONTEXT_PROJECTIONS):
        return own
    fitted = torch.zeros(own.shape, dtype=torch.float32)
    kept = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, own.shape, strict=True))
    fitted[kept] = tensor[kept].float()
    return fitted


def _changes(found: UNetConfig, expected: UNetConfig, projections: int) -> Iterator[str]:
    for name, what, layer in (("in_channels", "input channels", "conv_in"), ("out_channels", "rows", "conv_out")):
        a, b = getattr(found, name), getattr(expected, name)
        if a != b:
            done = f"the weights of the {b - a} new ones are zero" if b > a else f"the first {b} are kept"
            yield f"{layer}: {a} {what} became {b}, {done}"
    a, b = found.cross_attention_dim, expected.cross_attention_dim
    if a != b:
        drawn = f"{projections} tensors (to_k, to_v) are drawn anew from the run's seed"
        yield f"cross-attention: context of {a} became {b}, {drawn}"
