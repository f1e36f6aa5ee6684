"""Names of CompVis' single files and of diffusers for one UNet or autoencoder, and their shapes: a map, both ways.

Enters: how many blocks a network has, as its config says it. Leaves: a NameMap, which gives either name for the other.
What a tensor holds is the same in both, but for the autoencoder's attention: a 1x1 convolution there, linear here.
"""

from collections.abc import Mapping, Sequence

from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.unet_config import UNetConfig

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

_UNET_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESIDUAL = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_PROJECTIONS = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")


class NameMap:
    """A one-to-one map between CompVis' names and diffusers', given for the modules that hold the tensors."""

    def __init__(self, modules: Sequence[tuple[str, str, Mapping[str, str] | None]]) -> None:
        """`modules`: a module's name in CompVis and in diffusers, and those of its parts; None for equal parts."""
        self._forward = {theirs: (ours, parts) for theirs, ours, parts in modules}
        self._backward = {
            ours: (theirs, None if parts is None else {b: a for a, b in parts.items()})
            for theirs, ours, parts in modules
        }

    def to_diffusers(self, name: str) -> str | None:
        """diffusers' name for CompVis' (without the prefix of whole checkpoints); None when it is none of these."""
        return _translate(name, self._forward)

    def to_compvis(self, name: str) -> str | None:
        """CompVis' name for that of diffusers; None when it is none of these."""
        return _translate(name, self._backward)


def _translate(name: str, modules: Mapping[str, tuple[str, Mapping[str, str] | None]]) -> str | None:
    pieces = name.split(".")
    for length in range(len(pieces) - 1, 0, -1):
        found = modules.get(".".join(pieces[:length]))
        if found is None:
            continue
        other, parts = found
        inner, last = ".".join(pieces[length:-1]), pieces[-1]
        if parts is None:
            return ".".join([other, *pieces[length:]])
        return f"{other}.{parts[inner]}.{last}" if inner in parts else None
    return None


def unet_names(config: UNetConfig) -> NameMap:
    """Names of a UNet: `input_blocks`, `middle_block` and `output_blocks`, numbered through all levels, in CompVis."""
    return unet_names_of(
        config.per_level("layers_per_block"),
        ["CrossAttn" in kind for kind in config.down_block_types],
        ["CrossAttn" in kind for kind in config.up_block_types],
    )


def unet_names_of(layers: Sequence[int], down_attends: Sequence[bool], up_attends: Sequence[bool]) -> NameMap:
    """Names of a UNet with so many residual blocks a level on the way down, of which some have transformers.

    Args:
        layers: of each level, from the latents inwards; on the way up there is one more.
        down_attends: whether transformers follow a level's residual blocks.
        up_attends: the same for the way up, the innermost level first.
    """
    modules: list[tuple[str, str, Mapping[str, str] | None]] = [
        ("time_embed.0", "time_embedding.linear_1", None),
        ("time_embed.2", "time_embedding.linear_2", None),
        ("label_emb.0.0", "add_embedding.linear_1", None),
        ("label_emb.0.2", "add_embedding.linear_2", None),
        ("input_blocks.0.0", "conv_in", None),
        ("out.0", "conv_norm_out", None),
        ("out.2", "conv_out", None),
        ("middle_block.0", "mid_block.resnets.0", _UNET_RESIDUAL),
        ("middle_block.1", "mid_block.attentions.0", None),
        ("middle_block.2", "mid_block.resnets.1", _UNET_RESIDUAL),
    ]
    place = 1
    for level, count in enumerate(layers):
        for layer in range(count):
            modules.append((f"input_blocks.{place}.0", f"down_blocks.{level}.resnets.{layer}", _UNET_RESIDUAL))
            if down_attends[level]:
                modules.append((f"input_blocks.{place}.1", f"down_blocks.{level}.attentions.{layer}", None))
            place += 1
        if level < len(layers) - 1:
            modules.append((f"input_blocks.{place}.0.op", f"down_blocks.{level}.downsamplers.0.conv", None))
            place += 1
    place = 0
    for step, count in enumerate(reversed(layers)):
        for layer in range(count + 1):
            modules.append((f"output_blocks.{place}.0", f"up_blocks.{step}.resnets.{layer}", _UNET_RESIDUAL))
            if up_attends[step]:
                modules.append((f"output_blocks.{place}.1", f"up_blocks.{step}.attentions.{layer}", None))
            if layer == count and step < len(layers) - 1:
                part = 2 if up_attends[step] else 1
                modules.append((f"output_blocks.{place}.{part}.conv", f"up_blocks.{step}.upsamplers.0.conv", None))
            place += 1
    return NameMap(modules)


def vae_names(config: AutoencoderConfig) -> NameMap:
    """Names of an autoencoder."""
    return vae_names_of(len(config.block_out_channels), config.layers_per_block)


def vae_names_of(levels: int, layers: int) -> NameMap:
    """Names of an autoencoder of so many levels, of so many residual blocks each in its encoder.

    CompVis numbers the decoder's levels from the picture inwards, diffusers in the order in which they run.
    """
    modules: list[tuple[str, str, Mapping[str, str] | None]] = [
        ("quant_conv", "quant_conv", None),
        ("post_quant_conv", "post_quant_conv", None),
    ]
    for half in ("encoder", "decoder"):
        modules += [
            (f"{half}.conv_in", f"{half}.conv_in", None),
            (f"{half}.norm_out", f"{half}.conv_norm_out", None),
            (f"{half}.conv_out", f"{half}.conv_out", None),
            (f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", _VAE_RESIDUAL),
            (f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", _VAE_ATTENTION),
            (f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", _VAE_RESIDUAL),
        ]
    for level in range(levels):
        down, up, step = f"encoder.down.{level}", f"decoder.up.{level}", levels - 1 - level
        for layer in range(layers):
            modules.append((f"{down}.block.{layer}", f"encoder.down_blocks.{level}.resnets.{layer}", _VAE_RESIDUAL))
        for layer in range(layers + 1):
            modules.append((f"{up}.block.{layer}", f"decoder.up_blocks.{step}.resnets.{layer}", _VAE_RESIDUAL))
        modules.append((f"{down}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv", None))
        modules.append((f"{up}.upsample.conv", f"decoder.up_blocks.{step}.upsamplers.0.conv", None))
    return NameMap(modules)


def is_vae_projection(name: str) -> bool:
    """Whether diffusers' name is that of a matrix which CompVis stores as a 1x1 convolution."""
    return ".mid_block.attentions.0." in name and name.endswith(_VAE_PROJECTIONS)


def vae_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in diffusers of an autoencoder's tensor, by its name there: convolutions of one pixel become matrices."""
    flat = is_vae_projection(name) and len(shape) > 2 and set(shape[2:]) == {1}
    return shape[:2] if flat else shape


def ema_name(name: str) -> str:
    """Name under which CompVis keeps the average of `model.diffusion_model.*`: without its dots."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")
