"""The text-conditioned UNet of Stable Diffusion 1.x, 2.x and XL, in any width (arXiv:2112.10752, arXiv:2307.01952).

Enters: noisy latents (B, C, h, w), timesteps (B,), a Conditioning. Leaves: a prediction (B, out, h, w).
Names of weights and settings are those of diffusers' UNet2DConditionModel.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.attention import BACKENDS
from ldm.models.blocks import (
    Attention,
    Downsample,
    Embedding,
    ResidualBlock,
    SpatialTransformer,
    TransformerBlock,
    Upsample,
    embed_numbers,
    run,
)
from ldm.models.conditioning import Conditioning, KeysValues
from ldm.models.convolution import Conv2d
from ldm.models.norms import GroupNorm
from ldm.models.pretrained import (
    Weights,
    build_from_weights,
    save_component,
)
from ldm.models.unet_config import UNetConfig

CLASS_NAME = "UNet2DConditionModel"


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
        self.depth = config.per_level("transformer_layers_per_block")[level]

    def layer(
        self, index: int, x: Tensor, embedding: Tensor, context: Tensor | KeysValues, skip: Tensor | None = None
    ) -> Tensor:
        """Residual block and transformer of a given index; `context`: text, or keys and values for the whole level."""
        x = run(self.resnets[index], x, embedding, skip, checkpointing=self.checkpointing)
        if index >= len(self.attentions):
            return x
        return self.attentions[index](x, part_of(context, index * self.depth, self.depth))


def part_of(context: Tensor | KeysValues, start: int, count: int) -> Tensor | KeysValues:
    """What some of the cross-attentions are told: the text that all are told, or their own keys and values."""
    return context if isinstance(context, Tensor) else context[start : start + count]


class DownLevel(Level):
    """A level on the way down; the outputs of its blocks are skips for the way up."""

    def __init__(self, config: UNetConfig, level: int, inputs: list[int]) -> None:
        attends = config.down_block_types[level] == "CrossAttnDownBlock2D"
        super().__init__(config, level, inputs, len(inputs) if attends else 0)
        last = level == len(config.block_out_channels) - 1
        channels = config.block_out_channels[level]
        self.downsamplers = nn.ModuleList([] if last else [Downsample(channels, asymmetric=False)])

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | KeysValues) -> tuple[Tensor, ...]:
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

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | KeysValues) -> Tensor:
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
        self,
        x: Tensor,
        skips: tuple[Tensor, ...],
        embedding: Tensor,
        context: Tensor | KeysValues,
        size: tuple[int, int],
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

        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
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

        self.cross_attentions: list[tuple[int, int]] = []
        """The first cross-attention of each level, in the order of the levels, and how many there are in it."""
        self.key_channels: list[int] = []
        """Features of keys and values of each cross-attention, in the order of the levels."""
        for part in (*self.down_blocks, self.mid_block, *self.up_blocks):
            widths = [m.attn2.to_k.out_features for m in part.modules() if isinstance(m, TransformerBlock)]
            self.cross_attentions.append((len(self.key_channels), len(widths)))
            self.key_channels += widths

        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], config.norm_eps, silu=True)
        self.conv_out = Conv2d(channels[0], config.out_channels, 3, padding=1)

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
            conditioning: text (B, L, D), and with text_time pooled (B, P) and sizes (B, 6). With keys and values of
                this network's (`with_keys_values`) the text is not read.

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
        context = self._context(conditioning, dtype)
        x = self.conv_in(x.to(dtype))
        parts = iter([part_of(context, first, count) for first, count in self.cross_attentions])
        skips = [x]
        for down in self.down_blocks:
            outputs = down(x, embedding, next(parts))
            skips += outputs
            x = outputs[-1]
        x = self.mid_block(x, embedding, next(parts))
        for up, count in zip(self.up_blocks, self.skips_taken, strict=True):
            taken, skips = tuple(skips[-count:]), skips[:-count]
            # Odd sizes were rounded up on the way down: the size to return to is that of the next skip.
            height, width = (skips[-1] if skips else x).shape[-2:]
            x = up(x, taken, embedding, next(parts), (height, width))
        return self.conv_out(self.conv_norm_out(x))

    def with_keys_values(self, conditioning: Conditioning) -> Conditioning:
        """The conditioning with keys and values for each cross-attention, which `forward` then takes from there.

        For texts that many evaluations share, as in sampling; in the precision that `forward` would have here, so call
        it within the same autocast. Parameters must lie whole in the modules, as no module's forward is called.

        Raises:
            ValueError: a shape that does not fit.
        """
        conditioning.check(len(conditioning), self.config.cross_attention_dim, self.config.pooled_channels)
        text = conditioning.text.to(self.conv_in.weight.dtype)
        layers = [module.attn2 for module in self.modules() if isinstance(module, TransformerBlock)]
        return replace(conditioning, keys_values=tuple(layer.keys_values(text) for layer in layers))

    def _context(self, conditioning: Conditioning, dtype: torch.dtype) -> Tensor | KeysValues:
        """What the cross-attentions are told; raises ValueError where keys and values are not of this network."""
        given = conditioning.keys_values
        if given is None:
            return conditioning.text.to(dtype)
        rows, length = conditioning.text.shape[:2]
        expected = [(rows, length, channels) for channels in self.key_channels]
        found = [tuple(k.shape) for k, _ in given]
        if found != expected or found != [tuple(v.shape) for _, v in given]:
            raise ValueError(
                f"conditioning.keys_values: found {len(found)} pairs, keys of shapes {sorted(set(found))}, the network "
                f"expects {len(expected)}, {sorted(set(expected))}: make them with this network's with_keys_values"
            )
        return given

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

    def set_attention_backend(self, name: str) -> None:
        """Sets the backend of all attention layers to one that `select_backend` returned."""
        if name not in BACKENDS:
            raise ValueError(f"attention backend: found {name!r}, expected {', '.join(BACKENDS)} (see select_backend)")
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = name

    @classmethod
    def from_pretrained(cls, source: str | Path, dtype: torch.dtype = torch.float32) -> "UNet":
        """Opens a UNet from a folder of diffusers or a single file; raises what `open` and `load_weights` raise."""
        config, weights = cls.open(source)
        return build_from_weights(lambda: cls(config), weights, dtype)

    @staticmethod
    def open(source: str | Path) -> tuple[UNetConfig, Weights]:
        """Config and weights of a UNet, the latter not read yet; raises what `open_component` raises."""
        from ldm.models.components import UNET, open_component  # which knows this class

        return open_component(UNET, source)

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Writes a folder that diffusers' UNet2DConditionModel opens; weights as `dtype`, or as they are."""
        save_component(self, self.config.to_dict(), folder, class_name=CLASS_NAME, dtype=dtype)
