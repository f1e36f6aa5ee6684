"""Residual, resampling and transformer blocks of which the UNet and the autoencoder are made.

Enters: feature maps (B, C, H, W), for the UNet also an embedding of the timestep and the text states.
Leaves: feature maps. Attribute names are those of diffusers' state dicts; memory order (channels_last) stays.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.models.attention import attention
from ldm.models.conditioning import KeysValues
from ldm.models.convolution import Conv2d
from ldm.models.geglu import geglu
from ldm.models.norms import GroupNorm, LayerNorm


def embed_numbers(numbers: Tensor, channels: int, *, cosine_first: bool, shift: int) -> Tensor:
    """Sines and cosines of numbers at geometric frequencies (Ho et al. 2020, arXiv:2006.11239, after Vaswani et al.).

    Args:
        numbers: (N,), timesteps or sizes in pixels, integers or not.

    Returns:
        (N, channels) in float32, whatever autocast says: bfloat16 would round timesteps above 256 together.
    """
    half = channels // 2
    # Multiplied before divided, as diffusers rounds it: at t = 999 the other order moves angles by 6e-5.
    exponents = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=numbers.device) / (half - shift)
    angles = numbers.float()[:, None] * torch.exp(exponents)  # (N, half)
    parts = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=-1)


class Embedding(nn.Module):
    """Two linear layers with a SiLU between them (diffusers' TimestepEmbedding)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, GroupNorm and SiLU before each, around a shortcut (diffusers' ResnetBlock2D)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        embedding_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps, silu=True)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding_channels, out_channels) if embedding_channels else None
        self.norm2 = GroupNorm(groups, out_channels, eps, silu=True)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, embedding: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """`embedding`, (B, E), is that of the timestep after the SiLU, which all blocks share.

        `skip` is joined to the channels of x in here, so that checkpointing does not keep the joined copy.
        """
        x = x if skip is None else torch.cat([x, skip], dim=1)
        h = self.conv1(self.norm1(x))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(embedding)[:, :, None, None]
        h = self.conv2(self.norm2(h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halves height and width with a strided 3x3 convolution.

    `asymmetric` pads the lower and right edge only (the autoencoder's way); else all edges are padded (the
    UNet's), and an odd size is rounded up.
    """

    def __init__(self, channels: int, *, asymmetric: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Repeats pixels to a given size, twice the input's unless the way down rounded up, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = size if size is not None else (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=(height, width), mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention of tokens (B, N, C) to a context (B, M, D), or to themselves.

    In place of the context its keys and values, as `keys_values` gives them, are as good.
    """

    def __init__(self, channels: int, heads: int, *, context_channels: int | None = None, bias: bool = False) -> None:
        super().__init__()
        context_channels = channels if context_channels is None else context_channels
        self.heads = heads
        self.backend = "sdpa"
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_channels, channels, bias=bias)
        self.to_v = nn.Linear(context_channels, channels, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))  # a sequence of one for the name, to_out.0

    def forward(self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None) -> Tensor:
        k, v = context if isinstance(context, tuple) else self.keys_values(x if context is None else context)
        q = self._split(self.to_q(x))  # (B, heads, N, d)
        out = attention(q, self._split(k.to(q.dtype)), self._split(v.to(q.dtype)), self.backend)
        return self.to_out(out.transpose(1, 2).reshape(x.shape))  # (B, N, C)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, M, C) of a context (B, M, D)."""
        return self.to_k(context), self.to_v(context)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class SpatialAttention(Attention):
    """Attention of pixels to each other, with one head, around a shortcut (the autoencoder's)."""

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, 1, bias=True)
        self.group_norm = GroupNorm(groups, channels, eps)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + to_map(super().forward(to_tokens(self.group_norm(x))), x)


class GEGLU(nn.Module):
    """a * gelu(b) with (a, b) two halves of one projection (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU to four times the channels and a projection back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The middle one is diffusers' dropout: it only keeps the number in the name of the last, net.2.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward, each after a LayerNorm, around a shortcut."""

    def __init__(self, channels: int, heads: int, context_channels: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels=context_channels)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (diffusers' Transformer2DModel).

    `linear` projects tokens with linear layers (SD 2.x, SDXL), else pixels with 1x1 convolutions (SD 1.x).
    """

    checkpointing = False

    def __init__(
        self, channels: int, heads: int, *, depth: int, context_channels: int, groups: int, linear: bool
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_channels) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor | KeysValues) -> Tensor:
        """`context`: states of the text (B, M, D), or keys and values for each block."""
        h = self.norm(x)
        h = self.proj_in(to_tokens(h)) if self.linear else to_tokens(self.proj_in(h))  # (B, HW, C)
        for index, block in enumerate(self.transformer_blocks):
            told = context if isinstance(context, Tensor) else context[index]
            h = run(block, h, told, checkpointing=self.checkpointing)
        h = to_map(self.proj_out(h), x) if self.linear else self.proj_out(to_map(h, x))
        return x + h


def run(block: nn.Module, *inputs: Tensor | tuple[Tensor, Tensor] | None, checkpointing: bool) -> Tensor:
    """Calls a block; with checkpointing its activations are computed again in the backward pass, not kept."""
    if checkpointing and torch.is_grad_enabled():
        # No block draws random numbers: keeping the generators' states would stop for the device at each of
        # them.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, HW, C); a view when x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, HW, C) -> (B, C, H, W), always a view, which is channels_last."""
    return tokens.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)
