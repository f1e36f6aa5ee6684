"""The KL autoencoder between pictures and latents (Rombach et al. 2022, arXiv:2112.10752).

Enters: pictures (B, 3, H, W) in [-1, 1], or unscaled latents (B, C, H / f, W / f).
Leaves: raw moments (B, 2C, H / f, W / f) of the posterior, or pictures. Latents are scaled here and nowhere else.
"""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.autocast import autocast_dtype, without_autocast
from ldm.models.blocks import (
    Downsample,
    ResidualBlock,
    SpatialAttention,
    Upsample,
)
from ldm.models.convolution import Conv2d
from ldm.models.norms import GroupNorm
from ldm.models.pretrained import (
    Weights,
    build_from_weights,
    config_from_dict,
    save_component,
)

CLASS_NAME = "AutoencoderKL"
EPS = 1e-6  # of all GroupNorms, as in every published autoencoder of this kind

# What diffusers can set beside AutoencoderConfig, with the one value that is supported.
FIXED: dict[str, Any] = {"act_fn": "silu", "latents_mean": None, "latents_std": None}


@dataclass
class AutoencoderConfig:
    """Shape of a KL autoencoder, with the field names and defaults of diffusers' AutoencoderKL."""

    in_channels: int = 3
    """Channels of the pictures that enter."""
    out_channels: int = 3
    """Channels of the pictures that leave."""
    down_block_types: list[str] = field(default_factory=lambda: ["DownEncoderBlock2D"])
    """One DownEncoderBlock2D for each level of the encoder."""
    up_block_types: list[str] = field(default_factory=lambda: ["UpDecoderBlock2D"])
    """One UpDecoderBlock2D for each level of the decoder."""
    block_out_channels: list[int] = field(default_factory=lambda: [64])
    """Channels of each level, from the picture inwards; each level but the last halves height and width."""
    layers_per_block: int = 1
    """Residual blocks of a level of the encoder; the decoder has one more."""
    latent_channels: int = 4
    """Channels C of the latents; the encoder gives 2C, mean and log-variance."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm."""
    sample_size: int = 32
    """Height and width of the pictures it was trained on; a note for its users."""
    scaling_factor: float = 0.18215
    """Latents are multiplied by this for the diffusion network, so that their variance is about one."""
    shift_factor: float | None = None
    """Subtracted from latents before they are scaled; unset is zero."""
    force_upcast: bool = True
    """Its activations leave float16's range: float16 autocast is switched off, float16 weights are refused."""
    use_quant_conv: bool = True
    """A 1x1 convolution after the encoder."""
    use_post_quant_conv: bool = True
    """A 1x1 convolution before the decoder."""
    mid_block_add_attention: bool = True
    """Attention between the residual blocks of the innermost level."""

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            found = list(getattr(self, name))
            if found != [kind] * levels:
                raise ValueError(
                    f"autoencoder {name}: found {found}, expected {kind} for each of the {levels} levels of "
                    f"block_out_channels {list(self.block_out_channels)}"
                )
        if levels < 1 or any(channels < 1 or channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(
                f"autoencoder block_out_channels: found {list(self.block_out_channels)}, expected multiples "
                f"of norm_num_groups {self.norm_num_groups}"
            )
        for name in ("in_channels", "out_channels", "latent_channels", "layers_per_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"autoencoder {name}: found {getattr(self, name)}, expected 1 or more")
        if self.scaling_factor <= 0:
            raise ValueError(f"autoencoder scaling_factor: found {self.scaling_factor}, expected a positive number")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AutoencoderConfig":
        """Reads a diffusers vae/config.json; raises ValueError, naming each setting that is not supported."""
        return config_from_dict(cls, values, FIXED)

    def to_dict(self) -> dict[str, Any]:
        """The settings of a diffusers vae/config.json."""
        return {**dataclasses.asdict(self), **FIXED}


class MidBlock(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, channels: int, groups: int, add_attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups=groups, eps=EPS) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups=groups, eps=EPS)] if add_attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class EncoderLevel(nn.Module):
    """Residual blocks, then half the size, unless it is the last level."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, downsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(in_channels if i == 0 else out_channels, out_channels, groups=groups, eps=EPS)
            for i in range(layers)
        )
        self.downsamplers = nn.ModuleList([Downsample(out_channels, asymmetric=True)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.resnets, *self.downsamplers):
            x = block(x)
        return x


class DecoderLevel(nn.Module):
    """Residual blocks, then twice the size, unless it is the last level."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(in_channels if i == 0 else out_channels, out_channels, groups=groups, eps=EPS)
            for i in range(layers)
        )
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x)
        return x


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) to (B, 2C, H / f, W / f)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            EncoderLevel(channels[max(i - 1, 0)], channels[i], config.layers_per_block, groups, i < len(channels) - 1)
            for i in range(len(channels))
        )
        self.mid_block = MidBlock(channels[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, channels[-1], EPS, silu=True)
        self.conv_out = Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x))


class Decoder(nn.Module):
    """Latents (B, C, h, w) to pictures (B, 3, f h, f w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            DecoderLevel(
                channels[max(i - 1, 0)],
                channels[i],
                config.layers_per_block + 1,
                groups,
                i < len(channels) - 1,
            )
            for i in range(len(channels))
        )
        self.conv_norm_out = GroupNorm(groups, channels[-1], EPS, silu=True)
        self.conv_out = Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(x))


class AutoencoderKL(nn.Module):
    """Encoder and decoder; state-dict names are those of diffusers' AutoencoderKL."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = Conv2d(channels, channels, 1) if config.use_post_quant_conv else None

    @property
    def downsample_factor(self) -> int:
        """f: side of a picture over side of its latents."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, images: Tensor) -> Tensor:
        """Moments of the posterior, mean and log-variance, raw (neither clamped nor scaled).

        Args:
            images: (B, 3, H, W) in [-1, 1]; H and W multiples of `downsample_factor`.

        Returns:
            (B, 2C, H / f, W / f), for `sample_posterior` or `posterior_mean`.
        """
        height, width = images.shape[-2:]
        if height % self.downsample_factor or width % self.downsample_factor:
            raise ValueError(
                f"autoencoder: found pictures of {height}x{width} pixels, expected multiples of "
                f"{self.downsample_factor}: crop or pad them"
            )
        with self._range_kept(images.device):
            moments = self.encoder(images.to(self.dtype))
            return moments if self.quant_conv is None else self.quant_conv(moments)

    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, f h, f w), about [-1, 1] and not clamped, of unscaled latents z (B, C, h, w)."""
        with self._range_kept(z.device):
            z = z.to(self.dtype)
            return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction from a sample of the posterior, and its moments: what training an autoencoder needs.

        One call for both halves, so that wrappers of a module's forward (DDP, compile) see all parameters.
        """
        moments = self.encode(images)
        return self.decode(sample_posterior(moments, noise)), moments

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, to which pictures and latents are cast."""
        return self.encoder.conv_in.weight.dtype

    def _range_kept(self, device: torch.device) -> AbstractContextManager[object]:
        if self.config.force_upcast and self.dtype == torch.float16:
            raise ValueError(
                "autoencoder: found float16 weights, but its config has force_upcast, as its activations leave "
                "the range of float16; load it as float32 or bfloat16"
            )
        overflows = self.config.force_upcast and autocast_dtype(device) == torch.float16
        return without_autocast(device) if overflows else nullcontext()

    @classmethod
    def from_pretrained(cls, source: str | Path, dtype: torch.dtype = torch.float32) -> "AutoencoderKL":
        """Opens an autoencoder from a folder of diffusers (its names of 2022 too) or a file; raises as `open`."""
        config, weights = cls.open(source)
        return build_from_weights(lambda: cls(config), weights, dtype)

    @staticmethod
    def open(source: str | Path) -> tuple[AutoencoderConfig, Weights]:
        """Config and weights of an autoencoder, the latter not read yet; raises what `open_component` raises."""
        from ldm.models.components import VAE, open_component  # which knows this class

        return open_component(VAE, source)

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Writes a folder that diffusers' AutoencoderKL opens; weights as `dtype`, or as they are."""
        save_component(self, self.config.to_dict(), folder, class_name=CLASS_NAME, dtype=dtype)


# Names in the autoencoders published before diffusers 0.15 (stabilityai/sd-vae-ft-mse, the vae/ of SD 1.x).
_OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_name(name: str) -> str:
    """Today's state-dict name for a name that an autoencoder's file may carry."""
    head, marker, tail = name.partition("mid_block.attentions.0.")
    layer, dot, parameter = tail.partition(".")
    return head + marker + _OLD_ATTENTION_NAMES.get(layer, layer) + dot + parameter


def _mean_and_logvar(moments: Tensor) -> tuple[Tensor, Tensor]:
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """z = mean + std * noise in float32, unscaled.

    Args:
        moments: (B, 2C, h, w), raw; the log-variance is clamped to [-30, 20] here.
        noise: (B, C, h, w), unit normal.
    """
    mean, logvar = _mean_and_logvar(moments)
    return mean + torch.exp(0.5 * logvar) * noise


def posterior_mean(moments: Tensor) -> Tensor:
    """The posterior's mode, (B, C, h, w) in float32, unscaled: for reconstructions, not for training."""
    return _mean_and_logvar(moments)[0]


def kl_divergence(moments: Tensor) -> Tensor:
    """KL(posterior || unit normal) of each sample in nats, (B,): the sum over C, h and w."""
    mean, logvar = _mean_and_logvar(moments)
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)


def scale_latents(z: Tensor, config: AutoencoderConfig) -> Tensor:
    """Latents as the diffusion network knows them, from the autoencoder's: (z - shift) * scaling_factor."""
    return (z - (config.shift_factor or 0.0)) * config.scaling_factor


def unscale_latents(x: Tensor, config: AutoencoderConfig) -> Tensor:
    """The inverse of `scale_latents`, before decoding."""
    return x / config.scaling_factor + (config.shift_factor or 0.0)
