"""A trained network to begin with: released weights put into the run's UNet, whose ends may have other widths.

Enters: a UNet with its random weights, and the source of a trained one. Leaves: the UNet with the source's weights, and
a sentence for the record that says where they are from and what was changed.

Latents of other channels change the first and the last convolution, a variance that only one of the two learns the last
one, states of another width the keys and values of cross-attention. Anything else that differs is another network, and
refused.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.continuous import ContinuousSchedule
from ldm.diffusion.corruption_config import CorruptionConfig
from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.models import checkpoint_scheduler
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.pretrained import CONFIG_NAME, INDEX_NAME, load_weights, read_json, resolve_source, weights_hash
from ldm.models.single_file import SingleFile
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.models.weight_files import Weights
from ldm.pipeline.folder import SCHEDULER
from ldm.pipeline.model_card import without_path
from ldm.pipeline.scheduler import Trained, read_scheduler
from ldm.training.fit import loading
from ldm.training.own_checkpoints import own_checkpoint

MAY_DIFFER = ("in_channels", "out_channels", "cross_attention_dim", "sample_size", "upcast_attention")
"""Fields of UNetConfig in which the run's network may differ from the source's; the last two change no weights."""
PER_LEVEL = ("layers_per_block", "transformer_layers_per_block", "attention_head_dim")
ZEROS = "force_zeros_for_empty_prompt"
"""Of model_index.json: whether an empty negative prompt stands for zeros."""
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
        self.halves = _channels(found), _channels(unet.config)
        fits = {name for name, shape in source.shapes.items() if self.ends.get(name) == shape}
        self.shapes = {
            name: tuple(self.own[name].shape) if name in fits else shape for name, shape in source.shapes.items()
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor in the shape that the network has for it."""
        for name, tensor in self.source.tensors():
            if name in self.ends:
                self.originals[name] = tensor.float()
                tensor = _fitted(name, tensor, self.own[name], *self.halves)
            yield name, tensor


def load_initial(unet: UNet, source: str, say: Callable[[str], None]) -> str:
    """Puts the weights of a trained UNet into `unet`; says what was done and returns it as one sentence.

    New channels of the first convolution are zero, so that the network begins as the source's, whatever they hold; new
    rows of the last one are zero, so that a new variance begins at the geometric mean of its bounds; channels that are
    fewer are the source's first. Keys and values of another context width stay as `unet` has them: drawn from the
    run's seed.

    Args:
        source: a UNet's or a pipeline's folder, single file or hub name (see `resolve_source`); of this program's
            checkpoints as `checked_source` gives it.

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
    record = "; ".join([f"{without_path(source)}, xxh3 {digest}", *changes])
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


def objective_changes(
    source: str,
    own: Trained,
    empty_caption: str | None,
    autoencoder: AutoencoderConfig,
) -> list[str]:
    """In what the run differs from what the source was trained with besides the network, a sentence each.

    Allowed, and to be said: at its first steps the network puts out what it was trained to put out, for latents and
    empty captions as they were. A pipeline's folder (or the unet/ in one) tells what its files say, a single file what
    its family and its marks do, a UNet's folder by itself nothing.

    Args:
        own: what the run trains with, as its pipeline has it.
        empty_caption: the run's, where it has two text encoders; None where it has one.
    """
    try:
        path = resolve_source(source, "scheduler")
    except FileNotFoundError:  # a pipeline without one, or a hub that cannot be asked again
        path = Path(source).expanduser()
    folder = path if path.is_dir() else path.parent
    if folder.name in ("scheduler", "unet") and (path.is_dir() or (folder.parent / SCHEDULER).is_file()):
        folder = folder.parent
    elif path.is_file():
        found = _told_by_file(path, own, empty_caption, autoencoder)
        return [f"warning: {one}" for one in found]
    elif not path.is_dir():
        return []
    found = chain(
        _scheduler_changes(folder / SCHEDULER, own),
        _empty_caption_changes(folder, empty_caption),
        _latent_changes(folder, autoencoder),
    )
    return [f"warning: {one}" for one in found]


def _scheduler_changes(file: Path, own: Trained) -> Iterator[str]:
    try:
        found = read_scheduler(file)
    except OSError:
        return
    except ValueError as error:
        yield f"objective, noise: the source's could not be compared with this run's: {error}"
        return
    if found.parameterization != own.parameterization:
        yield (
            f"objective: the source predicts {found.parameterization}, this run trains it to predict "
            f"{own.parameterization}"
        )
    if found.corruption is not None or own.corruption is not None:
        yield from _corruption_changes(found.corruption, own.corruption)
        return
    if own.parameterization == found.parameterization == "edm" and found.sigma_data != own.sigma_data:
        yield f"objective.sigma_data: {found.sigma_data} became {own.sigma_data}"
    yield from _noise_changes(found.schedule, own.schedule)


def _corruption_changes(found: CorruptionConfig | None, own: CorruptionConfig | None) -> Iterator[str]:
    if found is None or own is None:
        a, b = ("Gaussian noise" if one is None else one.kind for one in (found, own))
        yield f"corruption: {a} became {b}"
        return
    for one in dataclasses.fields(CorruptionConfig):
        a, b = getattr(found, one.name), getattr(own, one.name)
        if a != b and not one.name.startswith("start_"):  # how sampling starts is no part of what was learned
            yield f"corruption.{one.name}: {a} became {b}"


def _noise_changes(found: ForwardProcess, own: ForwardProcess) -> Iterator[str]:
    if isinstance(found, Schedule) and isinstance(own, Schedule):
        for one in dataclasses.fields(ScheduleConfig):
            a, b = getattr(found.config, one.name), getattr(own.config, one.name)
            if a != b:
                yield f"noise.{one.name}: {a} became {b}"
    elif _kind(found) != _kind(own):
        yield f"noise: {_kind(found)} became {_kind(own)}"
    else:
        for name in ("sigma_min", "sigma_max"):
            a, b = getattr(found, name), getattr(own, name)
            if a != b:
                yield f"continuous_noise.{name}: {a} became {b}"


def _kind(schedule: ForwardProcess) -> str:
    return f"continuous {schedule.config.kind}" if isinstance(schedule, ContinuousSchedule) else "timesteps"


def _empty_caption_changes(folder: Path, empty_caption: str | None) -> Iterator[str]:
    try:
        values = read_json(folder / INDEX_NAME)
    except OSError:
        return
    except ValueError as error:
        yield f"empty_caption: the source's could not be compared with this run's: {error}"
        return
    if "XL" in str(values.get("_class_name")):
        # diffusers' default, for files that do not say.
        yield from _caption_change("zeros" if values.get(ZEROS, True) else "encoded", empty_caption)


def _caption_change(found: str, empty_caption: str | None) -> Iterator[str]:
    if empty_caption not in (None, found):
        yield (
            f"empty_caption: the source was trained with {found} ({ZEROS}), this run has {empty_caption}; "
            f"to go on as it was trained, set empty_caption to {found}"
        )


def _latent_changes(folder: Path, autoencoder: AutoencoderConfig) -> Iterator[str]:
    try:
        values = read_json(folder / "vae" / CONFIG_NAME)
    except OSError:
        return
    except ValueError as error:
        yield f"autoencoder: the source's could not be compared with this run's: {error}"
        return
    # A checkpoint of this program has the shift inside the autoencoder's convolutions; its config tells of none.
    inside = own_checkpoint(folder) is not None and not values.get("shift_factor")
    yield from _factor_changes(values | ({"shift_factor": autoencoder.shift_factor} if inside else {}), autoencoder)


def _factor_changes(values: Mapping[str, Any], autoencoder: AutoencoderConfig) -> Iterator[str]:
    scale, shift = values.get("scaling_factor", AutoencoderConfig.scaling_factor), values.get("shift_factor") or 0
    for name, a, b in (("scaling", scale, autoencoder.scaling_factor), ("shift", shift, autoencoder.shift_factor or 0)):
        if a != b:
            yield (
                f"autoencoder: the source was trained on latents of {name}_factor {a}, those of this run have {b}; "
                "take the source's own autoencoder unless this is meant"
            )


def _told_by_file(path: Path, own: Trained, empty_caption: str | None, autoencoder: AutoencoderConfig) -> Iterator[str]:
    single = SingleFile(path, str(path))
    scheduler = checkpoint_scheduler.beside(path)
    if scheduler.is_file():
        yield from _scheduler_changes(scheduler, own)
    else:
        yield from _marked_changes(single, own)
    if single.family() == "sdxl":
        yield from _caption_change("zeros", empty_caption)
    if "vae" in single.contents.parts:
        try:
            values = single.values("vae")
        except ValueError as error:
            yield f"autoencoder: the source's could not be compared with this run's: {error}"
            return
        yield from _factor_changes(values, autoencoder)


def _marked_changes(single: SingleFile, own: Trained) -> Iterator[str]:
    marked, values = "v_pred" in single.shapes, single.values("unet")
    if values.get("use_linear_projection") and not values.get("addition_embed_type") and not marked:
        yield (
            "objective: the source is a single file like those of SD 2.x, which does not tell what its network "
            f"predicts (v in the models of 768 pixels, epsilon in the others); this run trains it to predict "
            f"{own.parameterization}"
        )
    elif (predicted := "v" if marked else "epsilon") != own.parameterization:
        mark = "its file carries the mark v_pred" if marked else "its file carries no mark v_pred"
        yield (
            f"objective: the source predicts {predicted} ({mark}), this run trains it to predict {own.parameterization}"
        )
    # Whole checkpoints of all families were trained with the default noise; a UNet by itself may be any.
    bare = single.family() is None
    if bare and not isinstance(own.schedule, Schedule):
        return
    usual = own.schedule.config if bare and isinstance(own.schedule, Schedule) else ScheduleConfig()
    marked_config = dataclasses.replace(usual, rescale_betas_zero_snr="ztsnr" in single.shapes)
    yield from _noise_changes(Schedule(marked_config), own.schedule)


def _ends(found: UNetConfig, own: dict[str, Tensor], expected: UNetConfig) -> dict[str, tuple[int, ...]]:
    """Names of the tensors whose widths differ, with the shapes that the source must have for them."""
    ends: dict[str, tuple[int, ...]] = {}
    if found.in_channels != expected.in_channels:
        rows, _, *kernel = own["conv_in.weight"].shape
        ends["conv_in.weight"] = (rows, found.in_channels, *kernel)
    if (found.out_channels, _channels(found)) != (expected.out_channels, _channels(expected)):
        for name in ("conv_out.weight", "conv_out.bias"):
            ends[name] = (found.out_channels, *own[name].shape[1:])
    if found.cross_attention_dim != expected.cross_attention_dim:
        for name, tensor in own.items():
            if name.endswith(CONTEXT_PROJECTIONS):
                ends[name] = (tensor.shape[0], found.cross_attention_dim)
    return ends


def _channels(config: UNetConfig) -> int:
    """Rows of the last convolution that predict the mean: half of them where the others are a learned variance."""
    learned = config.out_channels == 2 * config.in_channels
    return config.out_channels // 2 if learned else config.out_channels


def _fitted(name: str, tensor: Tensor, own: Tensor, source_channels: int, channels: int) -> Tensor:
    if name.endswith(CONTEXT_PROJECTIONS):
        return own
    fitted = torch.zeros(own.shape, dtype=torch.float32)
    if name.startswith("conv_out"):  # mean on mean, variance on variance
        pairs = list(zip(fitted.split(channels), tensor.split(source_channels), strict=False))
    else:
        pairs = [(fitted, tensor)]
    for to, of in pairs:
        kept = tuple(slice(min(a, b)) for a, b in zip(of.shape, to.shape, strict=True))
        to[kept] = of[kept].float()
    return fitted


def _changes(found: UNetConfig, expected: UNetConfig, projections: int) -> Iterator[str]:
    channels, rows = (found.in_channels, expected.in_channels), (_channels(found), _channels(expected))
    for (a, b), what, layer in ((channels, "input channels", "conv_in"), (rows, "rows", "conv_out")):
        if a != b:
            done = f"the weights of the {b - a} new ones are zero" if b > a else f"the first {b} are kept"
            yield f"{layer}: {a} {what} became {b}, {done}"
    had, has = (config.out_channels - own for config, own in zip((found, expected), rows, strict=True))
    if has and not had:
        yield f"conv_out: {has} rows of a variance are new and zero: it begins at the geometric mean of its bounds"
    elif had and not has:
        yield f"conv_out: the {had} rows of the source's learned variance are left out"
    a, b = found.cross_attention_dim, expected.cross_attention_dim
    if a != b:
        drawn = f"{projections} tensors (to_k, to_v) are drawn anew from the run's seed"
        yield f"cross-attention: context of {a} became {b}, {drawn}"
