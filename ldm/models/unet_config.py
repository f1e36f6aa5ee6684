"""Settings of the UNet, under the names that diffusers' UNet2DConditionModel has for them in its config.json.

Enters: settings of a run's config, or of a released model's config.json. Leaves: a UNetConfig whose parts fit each
other, or an error that names the field, what was found and what is allowed.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ldm.models.pretrained import config_from_dict

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
