"""What an autoencoder is trained on and measured by: L1, perceptual distance and KL; peak signal-to-noise ratio.

In: pictures (B, 3, H, W) in [-1, 1], their reconstructions and the posterior's moments.
Out: one loss to minimize with its parts, or decibels a picture.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.models.autoencoder import kl_divergence
from ldm.models.perceptual import PerceptualDistance


@dataclass
class AutoencoderLossConfig:
    """Weights of the loss's parts; the mean absolute error of pictures in [-1, 1] has weight 1."""

    perceptual: float = 0.1
    """Weight of the distance in EfficientNet's features; 0 leaves it out, with the package that it needs."""
    kl: float = 1e-6
    """Weight of the posterior's divergence from a unit normal, in nats a colour value of the picture."""

    def __post_init__(self) -> None:
        for name in ("perceptual", "kl"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name}: found {getattr(self, name)}, expected 0 or more")


class AutoencoderLoss(nn.Module):
    """L1 + perceptual + KL of a micro-batch (Rombach et al. 2022, appendix G, without its discriminator)."""

    def __init__(self, config: AutoencoderLossConfig) -> None:
        super().__init__()
        self.config = config
        self.perceptual = PerceptualDistance() if config.perceptual else None

    def forward(self, images: Tensor, reconstructions: Tensor, moments: Tensor) -> dict[str, Tensor]:
        """Scalars "loss" (with gradient), "l1", "perceptual" and "kl", each the mean over the micro-batch."""
        l1 = (reconstructions.float() - images).abs().mean()
        kl = kl_divergence(moments).mean() / images[0].numel()
        loss = l1 + self.config.kl * kl
        parts = {"l1": l1.detach(), "kl": kl.detach()}
        if self.perceptual is not None:
            perceptual = self.perceptual(reconstructions, images).mean()
            loss = loss + self.config.perceptual * perceptual
            parts["perceptual"] = perceptual.detach()
        return {"loss": loss, **parts}


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in decibels of reconstructions as 8-bit pictures, which they become.

    10 log10(255^2 / mean squared error) of each picture; both inputs (B, 3, H, W) in [-1, 1], reconstructions are
    clamped. An exact reconstruction counts as 100 dB, so that a mean stays finite.
    """
    error = to_8_bit(images) - to_8_bit(reconstructions)
    return (10 * torch.log10(255**2 / error.square().mean(dim=(1, 2, 3)))).clamp(max=100)


def to_8_bit(images: Tensor) -> Tensor:
    """Whole numbers 0..255, as float32, of pictures in [-1, 1]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round()
