"""The text-conditioned UNet of Stable Diffusion 1.x, 2.x and XL, in any width (arXiv:2112.10752, arXiv:2307.01952).

Enters: noisy latents (B, C, h, w), timesteps (B,), a Conditioning. Leaves: a prediction (B, out, h, w).
Names of weights and settings are those of diffusers' UNet2DConditionModel.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.attention import BACKENDS
from ldm.models.blocks import (
    Attention,
    Downsample,
    Embedding,
    GroupNorm,
    ResidualBlock,
    SpatialTransformer,
    Upsample,
    embed_numbers,
    run,
)
from ldm.models.conditioning import Conditioning
from ldm.models.pretrained import (
    Weights,
    build_from_weights,
    config_from_dict,
    read_config,
    resolve_source,
    save_component,
)

CLASS_NAME = "UNet2DConditionModel"
DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")

# What diffusers can set beside UNetConfig, with the one value that is supported: that of SD 1.x, 2.x and XL.
FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}


@dataclass
class UNetConfig:
    """Shape of the UNet, with the field names and defaults of diffusers' UNet2DConditionModel.

    A list has one entry for each level, from the latents inwards.
    """

    sample_size: int | None = None
    """Height and width of the latents it is trained on; sampling takes its picture size from here."""
    in_channels: int = 4
    """Channels of the noisy latents; 9 for inpainting (with mask and masked latents)."""
    out_channels: int = 4
    """Channels of the prediction."""
    down_block_types: list[str] = field(default_factory=lambda: ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    """CrossAttnDownBlock2D (with transformers) or DownBlock2D, for each level on the way down."""
    up_block_types: list[str] = field(default_factory=lambda: ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    """CrossAttnUpBlock2D or UpBlock2D, for each level on the way up: the innermost level first."""
    block_out_channels: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    """Channels; each level but the innermost halves height and width."""
    layers_per_block: int | list[int] = 2
    """Residual blocks of a level on the way down; there is one more on the way up."""
    transformer_layers_per_block: int | list[int] = 1
    """Transformer blocks after each residual block."""
    attention_head_dim: int | list[int] = 8
    """NUMBER of heads, in spite of its name, which published config files have fixed."""
    cross_attention_dim: int = 1280
    """Features D of the text states."""
    use_linear_projection: bool = False
    """Transformers project with linear layers (SD 2.x, XL) instead of 1x1 convolutions (SD 1.x)."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm."""
    norm_eps: float = 1e-5
    """Epsilon of the residual blocks' GroupNorms; that of transformers is always 1e-6."""
    flip_sin_to_cos: bool = True
    """Cosines before sines in the embedding of numbers."""
    freq_shift: int = 0
    """Shift of the embedding's frequencies: 10000^(-i / (half - shift))."""
    upcast_attention: bool | None = False
    """Kept for SD 2.1's config file, without effect: every backend keeps attention scores in float32."""
    addition_embed_type: str | None = None
    """text_time adds pooled text and sizes to the timestep's embedding (XL); unset adds nothing."""
    addition_time_embed_dim: int | None = None
    """Features of each of the six sizes, with text_time."""
    projection_class_embeddings_input_dim: int | None = None
    """With text_time: 6 * addition_time_embed_dim + features of the pooled text."""

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name, allowed in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            found = getattr(self, name)
            if len(found) != levels or any(kind not in allowed for kind in found):
                raise ValueError(
                    f"unet {name}: found {list(found)}, expected {levels} (one a level) of {' and '.join(allowed)}"
                )
        for name in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim"):
            entries = self.per_level(name)
            if len(entries) != levels or any(not isinstance(entry, int) or entry < 1 for entry in entries):
                raise ValueError(
                    f"unet {name}: found {getattr(self, name)}, expected one or {levels} positive integers"
                )
        if levels < 1 or any(channels < 1 or channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(
                f"unet block_out_channels: found {list(self.block_out_channels)}, expected multiples of "
                f"norm_num_groups {self.norm_num_groups}"
            )
        heads_per_level = self.per_level("attention_head_dim")
        for level, (channels, heads) in enumerate(zip(self.block_out_channels, heads_per_level, strict=True)):
            attends = "CrossAttn" in self.down_block_types[level] + self.up_block_types[-1 - level]
            if channels % heads and (attends or level == levels - 1):
                raise ValueError(
                    f"unet attention_head_dim: {heads} heads cannot share {channels} channels equally "
                    "(this field is the number of heads)"
                )
        if self.block_out_channels[0] % 2 or (self.addition_time_embed_dim or 0) % 2:
            raise ValueError("unet block_out_channels[0], addition_time_embed_dim: expected even (sines and cosines)")
        for name in ("in_channels", "out_channels", "cross_attention_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"unet {name}: found {getattr(self, name)}, expected 1 or more")
        self._check_addition()

    def _check_addition(self) -> None:
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(
                f"unet addition_embed_type: found {self.addition_embed_type!r}, expected text_time or unset"
            )
        for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            if (getattr(self, name) is None) != (self.addition_embed_type is None):
                raise ValueError(
                    f"unet {name}: found {getattr(self, name)} with addition_embed_type {self.addition_embed_type!r}; "
                    "it is set with text_time, and only then"
                )
        if self.addition_embed_type and self.pooled_channels < 1:
            raise ValueError(
                f"unet projection_class_embeddings_input_dim: found {self.projection_class_embeddings_input_dim}, "
                f"expected more than 6 * addition_time_embed_dim = {6 * (self.addition_time_embed_dim or 0)}"
            )

    def per_level(self, name: str) -> list[int]:
        """A field that is one number or one for each level, as a list."""
        value = getattr(self, name)
        return [value] * len(self.block_out_channels) if isinstance(value, int) else list(value)

    @property
    def embedding_channels(self) -> int:
        """Features E of the embedding of timestep, pooled text and sizes."""
        return 4 * self.block_out_channels[0]

    @property
    def pooled_channels(self) -> int:
        """Features P of the pooled text; zero without text_time."""
        if self.addition_time_embed_dim is None or self.projection_class_embeddings_input_dim is None:
            return 0
        return self.projection_class_embeddings_input_dim - 6 * self.addition_time_embed_dim

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "UNetConfig":
        """Reads a diffusers unet/config.json; raises ValueError, naming each setting that is not supported."""
        return config_from_dict(cls, values, FIXED)

    def to_dict(self) -> dict[str, Any]:
        """The settings of a diffusers unet/config.json."""
        return {**dataclasses.asdict(self), **FIXED}


class Level(nn.Module):
    """Residual blocks of one size, of which the first `transformers` are followed by a transformer."""

    checkpointing = False

    def __init__(self, config: UNetConfig, level: int, inputs: list[int], transformers: int) -> None:
        """`inputs`: channels that enter each residual block, those of a skip included."""
        super().__init__()
        channels, groups = config.block_out_channels[level], config.norm_num_groups
        embedding = config.embedding_channels
        self.resnets = nn.ModuleList(
            ResidualBlock(entering, channels, groups=groups, eps=config.norm_eps, embedding_channels=embedding)
            for entering in inputs
        )
        self.attentions = nn.ModuleList(
            SpatialTransformer(
                channels,
                config.per_level("attention_head_dim")[level],
                depth=config.per_level("transformer_layers_per_block")[level],
                context_channels=config.cross_attention_dim,
                groups=groups,
                linear=config.use_linear_projection,
            )
            for _ in range(transformers)
        )

    def layer(self, index: int, x: Tensor, embedding: Tensor, context: Tensor, skip: Tensor | None = None) -> Tensor:
        """Residual block and transformer of a given index."""
        x = run(self.resnets[index], x, embedding, skip, checkpointing=self.checkpointing)
        return self.attentions[index](x, context) if index < len(self.attentions) else x


class DownLevel(Level):
    """A level on the way down; the outputs of its blocks are skips for the way up."""

    def __init__(self, config: UNetConfig, level: int, inputs: list[int]) -> None:
        attends = config.down_block_types[level] == "CrossAttnDownBlock2D"
        super().__init__(config, level, inputs, len(inputs) if attends else 0)
        last = level == len(config.block_out_channels) - 1
        channels = config.block_out_channels[level]
        self.downsamplers = nn.ModuleList([] if last else [Downsample(channels, asymmetric=False)])

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """All outputs, of which the last goes on to the next level. A tuple: engines put hooks on its tensors."""
        outputs = []
        for index in range(len(self.resnets)):
            x = self.layer(index, x, embedding, context)
            outputs.append(x)
        for downsample in self.downsamplers:
            outputs.append(downsample(x))
        return tuple(outputs)


class MidLevel(Level):
    """The innermost level: a transformer between two residual blocks."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config, -1, [config.block_out_channels[-1]] * 2, transformers=1)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        for index in range(len(self.resnets)):
            x = self.layer(index, x, embedding, context)
        return x


class UpLevel(Level):
    """A level on the way up; each of its blocks takes one skip, the latest first."""

    def __init__(self, config: UNetConfig, level: int, inputs: list[int]) -> None:
        attends = config.up_block_types[-1 - level] == "CrossAttnUpBlock2D"
        super().__init__(config, level, inputs, len(inputs) if attends else 0)
        channels = config.block_out_channels[level]
        self.upsamplers = nn.ModuleList([Upsample(channels)] if level > 0 else [])

    def forward(
        self, x: Tensor, skips: tuple[Tensor, ...], embedding: Tensor, context: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """`skips`: one for each block, in the order in which they were made; `size`: that of the next level out."""
        for index in range(len(self.resnets)):
            x = self.layer(index, x, embedding, context, skips[-1 - index])
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x


class UNet(nn.Module):
    """The network; state-dict names are those of diffusers' UNet2DConditionModel.

    Constructed, it predicts zero, so that a loss on unit noise starts at one: the last layers of the network, of each
    residual block and of each transformer are zero, as in CompVis' latent-diffusion; the rest is torch's default.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, layers = config.block_out_channels, config.per_level("layers_per_block")
        levels = len(channels)

        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = Embedding(channels[0], config.embedding_channels)
        if config.projection_class_embeddings_input_dim is not None:
            self.add_embedding = Embedding(config.projection_class_embeddings_input_dim, config.embedding_channels)

        self.down_blocks = nn.ModuleList()
        entering, skips = channels[0], [channels[0]]
        for level in range(levels):
            inputs = [entering] + [channels[level]] * (layers[level] - 1)
            self.down_blocks.append(DownLevel(config, level, inputs))
            entering = channels[level]
            skips += [entering] * (layers[level] + (level < levels - 1))  # one more: the downsampled

        self.mid_block = MidLevel(config)

        self.up_blocks = nn.ModuleList()
        self.skips_taken = [layers[level] + 1 for level in reversed(range(levels))]
        for level in reversed(range(levels)):
            inputs = []
            for _ in range(layers[level] + 1):
                inputs.append(entering + skips.pop())
                entering = channels[level]
            self.up_blocks.append(UpLevel(config, level, inputs))

        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

        lasts: list[nn.Module] = [module.conv2 for module in self.modules() if isinstance(module, ResidualBlock)]
        lasts += [module.proj_out for module in self.modules() if isinstance(module, SpatialTransformer)]
        for parameter in nn.ModuleList([self.conv_out, *lasts]).parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Predicts epsilon, v or x0, as it was trained to.

        Args:
            x: noisy latents (B, in_channels, h, w), scaled; cast to the dtype of the weights. A size that is not halved
                evenly is rounded up on the way down and restored on the way up.
            t: timesteps (B,), 0 to 999, integers or between them.
            conditioning: text (B, L, D), and with text_time pooled (B, P) and sizes (B, 6).

        Raises:
            ValueError: a shape that does not fit.

        Returns:
            (B, out_channels, h, w), in the dtype of the weights or of autocast.
        """
        if x.shape[1] != self.config.in_channels or t.shape != x.shape[:1]:
            raise ValueError(
                f"unet: found latents {tuple(x.shape)} and timesteps {tuple(t.shape)}, expected latents "
                f"(B, {self.config.in_channels}, h, w) and timesteps (B,)"
            )
        conditioning.check(len(x), self.config.cross_attention_dim, self.config.pooled_channels)
        dtype = self.conv_in.weight.dtype
        embedding = self._embed(t, conditioning, dtype)  # (B, E)
        context = conditioning.text.to(dtype)
        x = self.conv_in(x.to(dtype))
        skips = [x]
        for down in self.down_blocks:
            outputs = down(x, embedding, context)
            skips += outputs
            x = outputs[-1]
        x = self.mid_block(x, embedding, context)
        for up, count in zip(self.up_blocks, self.skips_taken, strict=True):
            taken, skips = tuple(skips[-count:]), skips[:-count]
            # Odd sizes were rounded up on the way down: the size to return to is that of the next skip.
            height, width = (skips[-1] if skips else x).shape[-2:]
            x = up(x, taken, embedding, context, (height, width))
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _embed(self, t: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> Tensor:
        """Embedding of timestep, and of pooled text and sizes, after the SiLU with which each residual block begins."""
        config = self.config
        flip, shift = config.flip_sin_to_cos, config.freq_shift
        waves = embed_numbers(t, config.block_out_channels[0], cosine_first=flip, shift=shift)
        embedding = self.time_embedding(waves.to(dtype))
        if config.addition_time_embed_dim is not None:
            pooled, sizes = conditioning.pooled, conditioning.sizes
            assert pooled is not None
            assert sizes is not None
            waves = embed_numbers(sizes.flatten(), config.addition_time_embed_dim, cosine_first=flip, shift=shift)
            added = torch.cat([pooled.to(dtype), waves.view(len(sizes), -1).to(dtype)], dim=-1)  # (B, P + 6 A)
            embedding = embedding + self.add_embedding(added)
        return F.silu(embedding)

    def enable_checkpointing(self) -> None:
        """Keeps the inputs of residual and transformer blocks only; the backward pass computes the rest again."""
        for module in self.modules():
            if isinstance(module, Level | SpatialTransformer):
                module.checkpointing = True

    def set_attention_backend(self, name: str) -> None:
        """Sets the backend of all attention layers to one that `select_backend` returned."""
        if name not in BACKENDS:
            raise ValueError(f"attention backend: found {name!r}, expected {', '.join(BACKENDS)} (see select_backend)")
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = name

    @classmethod
    def from_pretrained(cls, source: str | Path, dtype: torch.dtype = torch.float32) -> "UNet":
        """Opens a diffusers UNet2DConditionModel folder (see `resolve_source`); raises what `load_weights` raises."""
        config, weights = cls.open(source)
        return build_from_weights(lambda: cls(config), weights, dtype)

    @staticmethod
    def open(source: str | Path) -> tuple[UNetConfig, Weights]:
        """Config and weights of a UNet, the latter not read yet; raises what `Weights` raises."""
        folder = resolve_source(source)
        config = UNetConfig.from_dict(read_config(folder, class_name=CLASS_NAME))
        return config, Weights(folder, f"unet {source}")

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Writes a folder that diffusers' UNet2DConditionModel opens; weights as `dtype`, or as they are."""
        save_component(self, self.config.to_dict(), folder, class_name=CLASS_NAME, dtype=dtype)
