"""What a given picture changes in the walk from prompts to latents: where it starts, what the denoiser knows, the end.

Enters: a Pipeline and a GivenPicture. Leaves: an Edit, which generation.py asks at each stage of its walk; without a
picture it changes nothing.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.data.pictures import normalize
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.inpainting import known_region, known_start, resampled
from ldm.diffusion.inverse_problems import guided_by_measurement
from ldm.diffusion.linear_operators import LinearOperator, satisfying
from ldm.diffusion.sampler_contract import Noise, Progress, Sampler, start
from ldm.models.autocast import without_autocast
from ldm.models.autoencoder import AutoencoderKL, posterior_mean, scale_latents, unscale_latents
from ldm.models.conditioning import Conditioning
from ldm.pipeline.fit import inpaints
from ldm.pipeline.pipeline import Pipeline
from ldm.sampling.given_pictures import GivenPicture

DECODER_DEVIATION = 0.05
"""Of a measurement of decoded latents from that of a picture, in [-1, 1]: what the autoencoder loses."""
ITERATIONS = 3
"""Of conjugate gradients through the decoder in each evaluation."""


class InpaintingNetwork(nn.Module):
    """A network of 2C + 1 channels as one of C: the mask and the masked picture's latents are put beside the latents.

    `beside` is (1, 1 + C, h, w), the mask first, 1 where the picture is drawn anew.
    """

    def __init__(self, unet: nn.Module, beside: Tensor) -> None:
        super().__init__()
        self.unet, self.beside = unet, beside

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        predicted: Tensor = self.unet(torch.cat([x, self.beside.to(x).expand(len(x), -1, -1, -1)], 1), t, conditioning)
        return predicted


@dataclass(frozen=True)
class Measurement:
    """What is known of a picture by a linear operator."""

    operator: LinearOperator
    y: Tensor
    """(1, 3, h, w), measured of a picture in [-1, 1]."""
    autoencoder: AutoencoderKL

    def of_latents(self, latents: Tensor) -> Tensor:
        """What the operator measures of the picture that scaled latents (B, C, h, w) decode to."""
        # SDPA's fused kernels have no forward derivative; autocast would round what guidance is to correct.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), without_autocast(latents.device):
            return self.operator(self.autoencoder.decode(unscale_latents(latents, self.autoencoder.config)).float())


@dataclass(frozen=True)
class Edit:
    """A given picture, ready for the walk of pictures of one size."""

    latents: Tensor | None = None
    """The picture's, (1, C, h, w), scaled; None: no picture is given."""
    strength: float = 1.0
    """Share of the steps that are taken."""
    from_noise: bool = True
    """Whether a walk of all steps starts from noise alone."""
    free: Tensor | None = None
    """(1, 1, h, w), 1 where latents are drawn anew and 0 where they are the picture's; None: no latents are kept."""
    beside: Tensor | None = None
    """What InpaintingNetwork takes."""
    repeats: int = 1
    """Of each step, to let known and free parts come to fit."""
    measurement: Measurement | None = None
    pixels: Tensor | None = None
    """The picture (1, 3, H, W) in [-1, 1] of whose pixels some are kept."""
    drawn: Tensor | None = None
    """(1, 1, H, W) bool: pixels that are drawn anew."""

    @property
    def guides(self) -> bool:
        """Whether the denoiser, or the order of steps, is another one than the network's and the sampler's own."""
        return self.free is not None or self.measurement is not None or self.repeats > 1

    def network(self, unet: nn.Module) -> nn.Module:
        """The network as one that takes noisy latents alone."""
        return unet if self.beside is None else InpaintingNetwork(unet, self.beside)

    def levels(self, levels: Tensor) -> Tensor:
        """The last int(strength * steps) steps of a run, which begin at the level that the picture is noised to.

        Raises:
            ValueError: not one step is left.
        """
        steps = len(levels) - 1
        taken = min(int(steps * self.strength), steps)  # as diffusers counts, rounding of the product included
        if taken < 1:
            least = math.ceil(1000 / steps) / 1000  # rounded up, so that it does what the error says
            raise ValueError(
                f"strength: found {self.strength}, which of {steps} steps leaves none, expected {least:g} or "
                "more, or more steps"
            )
        return levels[steps - taken :]

    def start(self, noise: Tensor, levels: Tensor) -> Tensor:
        """x at the first level: the picture with that much noise, or noise alone."""
        if self.latents is None:
            return start(noise, levels)
        sigma = float(levels[0])
        noised = self.latents.to(noise) + sigma * noise
        if not self.from_noise or self.strength < 1:
            return noised
        x = start(noise, levels)
        return x if self.free is None else known_start(x, self.latents, self.free, noise, sigma)

    def denoise(self, denoise: Denoise) -> Denoise:
        """The denoiser that knows what is given of the picture."""
        if self.measurement is not None:
            return guided_by_measurement(
                denoise,
                self.measurement.of_latents,
                self.measurement.y,
                deviation=DECODER_DEVIATION,
                covariance="isotropic",
                iterations=ITERATIONS,
            )
        if self.free is not None:
            assert self.latents is not None
            return known_region(denoise, self.latents, self.free)
        return denoise

    def sample(
        self,
        sampler: Sampler,
        denoise: Denoise,
        x: Tensor,
        levels: Tensor,
        noise: Noise | None,
        progress: Progress | None,
    ) -> Tensor:
        """What the sampler makes of x, each step repeated where that is asked for."""
        if self.repeats == 1:
            return sampler(denoise, x, levels, noise=noise, progress=progress)
        if noise is None:
            raise ValueError("repeats: repeated steps add noise: give fresh_noise")
        return resampled(sampler, denoise, x, levels, repeats=self.repeats, noise=noise, progress=progress)

    def finished(self, images: Tensor) -> Tensor:
        """Decoded pictures (B, 3, H, W) that satisfy the measurement, or have the picture's own pixels where kept."""
        if self.measurement is not None:
            return satisfying(images.float(), self.measurement.operator, self.measurement.y, -1, 1)
        if self.drawn is not None:
            assert self.pixels is not None
            return torch.where(self.drawn, images.float(), self.pixels)
        return images


NOTHING = Edit()
"""No picture is given."""


@torch.no_grad()
def prepare(pipeline: Pipeline, given: GivenPicture, shape: tuple[int, int, int]) -> Edit:
    """Encodes a given picture for the walk: with the posterior's mean, which is the code that decodes to it best.

    A sample of the posterior, as training takes, would put noise into what is to be kept as it is; where a picture is
    noised on purpose, that noise is far larger.

    Args:
        shape: of one picture's latents.

    Raises:
        ValueError: a picture of another size than these are of, or a measurement of such a picture.
    """
    autoencoder, device = pipeline.autoencoder, pipeline.device
    given.check_size(*(side * autoencoder.downsample_factor for side in shape[1:]))
    pixels = normalize(given.pixels[None]).to(device)  # (1, 3, H, W)
    if given.operator is not None:
        operator = given.linear_operator()
        y = operator(pixels) if given.mask is not None else pixels
        latents = encoded(autoencoder, operator.pseudo_inverse(y).clamp(-1, 1))
        return Edit(latents, given.strength, measurement=Measurement(operator, y, autoencoder))
    if given.mask is None:
        return Edit(encoded(autoencoder, pixels), given.strength, from_noise=False)
    drawn = torch.from_numpy(given.mask)[None, None].to(device)  # (1, 1, H, W)
    latents, factor = encoded(autoencoder, pixels), autoencoder.downsample_factor
    free = beside = None
    if inpaints(pipeline.unet.config, autoencoder.config):
        # As such networks are trained: a latent is masked where the first of its pixels is; what is masked is grey.
        mask = drawn[..., ::factor, ::factor].to(latents)
        beside = torch.cat([mask, encoded(autoencoder, torch.where(drawn, 0, pixels))], 1)
    else:
        # A latent is kept only where all of its pixels are.
        free = torch.nn.functional.max_pool2d(drawn.to(latents), factor)
    return Edit(latents, given.strength, free=free, beside=beside, repeats=given.repeats, pixels=pixels, drawn=drawn)


def encoded(autoencoder: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) float32 of pictures (B, 3, H, W) in [-1, 1]: the posterior's mean."""
    return scale_latents(posterior_mean(autoencoder.encode(pixels)), autoencoder.config)
