"""A text-to-image pipeline: its parts, and its folder on disk.

Enters: a folder in the layout of diffusers, or parts in memory. Leaves: such a folder, or a Pipeline, whose parts fit
each other; generation.py draws pictures with it.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.diffusion.corruption_config import CorruptionConfig
from ldm.diffusion.objective_config import SIGMA_DATA, TargetName
from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.reverse_variances import PosteriorVariances
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.pretrained import build_from_weights, save_component
from ldm.models.text_conditioner import TextConditioner
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.models.whitening import without_shift
from ldm.pipeline.fit import fit_problems, inpaints, learns_variance
from ldm.pipeline.folder import (
    CARD,
    FROZEN,
    SCHEDULER,
    check_files,
    link_folder,
    write_index,
)
from ldm.pipeline.scheduler import read_scheduler, write_scheduler
from ldm.pipeline.variances import variances_beside

logger = logging.getLogger(__name__)

ConfigCheck = Callable[[UNetConfig, AutoencoderKL], object]


@dataclass
class Pipeline:
    """The parts that make pictures out of prompts, all on one device."""

    unet: UNet
    """The network, in eval mode when it samples."""
    autoencoder: AutoencoderKL
    """Between latents and pictures; it decodes in its own dtype, float32 as loaded here."""
    text_encoder: TextConditioner
    """From captions to states, and to pooled text of a pair of encoders."""
    schedule: ForwardProcess
    """The noise levels of training, of timesteps or of continuous time."""
    parameterization: TargetName
    """What the network puts out: epsilon, v or x0; with continuous time flow or edm."""
    dtype: torch.dtype = torch.float32
    """Precision in which the network computes: float32, or the lower one of its autocast."""
    sigma_data: float = SIGMA_DATA
    """Deviation of the latents in EDM's preconditioning; other parameterizations do not use it."""
    corruption: CorruptionConfig | None = None
    """What the network undoes in place of noise, predicting x0; `schedule` then has no meaning. None for noise."""
    variances: PosteriorVariances | None = None
    """What the sampler analytic_dpm needs of this network; None where nobody has estimated it."""
    replays: bool = False
    """Whether sampling records the network's evaluations as CUDA graphs, whose memory stays taken until it is gone."""

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def learned_variance(self) -> bool:
        """Whether the network puts out 2C channels, the second half the variance of a reverse step."""
        return learns_variance(self.unet.config, self.autoencoder.config)

    def precision(self) -> AbstractContextManager[object]:
        """The network's precision, around all evaluations: autocast forgets its lowered weights when it ends."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one picture's latents; raises ValueError when the network's config does not tell its size."""
        return latent_shape_of(self.unet.config, self.autoencoder)


def check_of_noise(pipeline: Pipeline, what: str) -> None:
    """Raises ValueError for a network that undoes a corruption; `what`, a setting or option, needs levels of noise."""
    if pipeline.corruption is not None:
        raise ValueError(
            f"{what}: found a checkpoint of the corruption {pipeline.corruption.kind}, expected one of Gaussian noise"
        )


def latent_shape_of(
    unet: UNetConfig, autoencoder: AutoencoderKL, height: int | None = None, width: int | None = None
) -> tuple[int, int, int]:
    """(C, h, w) of a picture of that many pixels; None: of the size that the network was trained on.

    Raises:
        ValueError: no multiple of the autoencoder's factor, or None where the network's config tells no size.
    """
    factor, trained = autoencoder.downsample_factor, unet.sample_size
    for name, side in (("height", height), ("width", width)):
        if side is not None and (side < 1 or side % factor):
            raise ValueError(f"{name}: found {side} pixels, expected a multiple of the autoencoder's factor {factor}")
        if side is None and trained is None:
            raise ValueError("unet sample_size: not set, expected the height and width of the latents to sample")
    h, w = (trained if side is None else side // factor for side in (height, width))
    assert h is not None
    assert w is not None
    return autoencoder.config.latent_channels, h, w


def load_pipeline(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = False,
    check: ConfigCheck | None = None,
) -> Pipeline:
    """Loads a pipeline folder: one that this program wrote, or one of diffusers' for Stable Diffusion 1.x, 2.x or XL.

    Parts that drawing out of prompts does not need (safety checker, feature extractor) are left where they are.

    Args:
        dtype: precision of the network's computation; weights are float32 and autocast where it is lower.
        channels_last: keep the network's activations as (B, H, W, C) in memory.
        check: called before the weights of network and text encoders are read; what it raises ends the loading.

    Raises:
        FileNotFoundError: names every file that the folder lacks.
        ValueError: another kind of pipeline, or parts that do not fit each other; names file and field.
    """
    folder = Path(folder)
    check_files(folder)
    trained = read_scheduler(folder / SCHEDULER)
    unet_config, weights = UNet.open(folder / "unet")
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False)
    if check is not None:
        check(unet_config, autoencoder)
    text_encoder = TextConditioner.from_pipeline(folder, device)
    # Before the network's weights are read: they are most of a pipeline.
    if problems := fit_problems(unet_config, autoencoder.config, text_encoder):
        raise ValueError(f"{folder}: parts that do not fit each other:\n  " + "\n  ".join(problems))
    if trained.learned_variance and not learns_variance(unet_config, autoencoder.config):
        raise ValueError(
            f"{folder / SCHEDULER}: variance_type is 'learned_range', but unet/config.json: out_channels is "
            f"{unet_config.out_channels}, expected {2 * autoencoder.config.latent_channels}, the second half for the "
            "variance"
        )
    if autoencoder.config.shift_factor:
        logger.warning(
            "%s/vae/config.json: shift_factor %s is applied here; diffusers' pipelines of Stable Diffusion ignore it "
            "(saved by this program, it is inside the autoencoder's convolutions)",
            folder,
            autoencoder.config.shift_factor,
        )
    # The network's weights keep requires_grad: of others autocast makes its lowered copies anew at each step.
    unet = build_from_weights(lambda: UNet(unet_config), weights, torch.float32).eval().to(device)
    if channels_last:
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Pipeline(
        unet,
        autoencoder.to(device),
        text_encoder,
        trained.schedule,
        trained.parameterization,
        dtype,
        trained.sigma_data,
        trained.corruption,
        variances_beside(folder, unet),
        replays=unet.conv_in.weight.device.type == "cuda",
    )


def save_pipeline(
    folder: Path,
    pipeline: Pipeline,
    *,
    unet_state: Mapping[str, Tensor] | None = None,
    frozen_from: Path | None = None,
    card: str | None = None,
) -> None:
    """Writes a pipeline folder that `load_pipeline` and diffusers' DiffusionPipeline.from_pretrained open.

    The autoencoder's shift_factor, which diffusers' pipelines of Stable Diffusion ignore, goes into its convolutions.

    Args:
        unet_state: weights for unet/ instead of the network's own: averaged ones, by the same names.
        frozen_from: an earlier folder of the same run, from which vae/ and the folders of text encoders and tokenizers
            are hard-linked (or copied, where the file system cannot link the two) instead of written again.
        card: text of README.md, the model card; no such file when None.

    Raises:
        FileNotFoundError: `frozen_from` lacks files; names them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unet = pipeline.unet
    state = unet.state_dict() if unet_state is None else unet_state
    save_component(state, unet.config.to_dict(), folder / "unet", class_name="UNet2DConditionModel")
    if frozen_from is None:
        without_shift(pipeline.autoencoder).save_pretrained(folder / "vae")
        pipeline.text_encoder.save(folder)
    else:
        check_files(frozen_from)
        for name in FROZEN:
            link_folder(frozen_from / name, folder / name)
    scheduler = write_scheduler(folder, pipeline)
    inpainting = inpaints(unet.config, pipeline.autoencoder.config)
    write_index(folder, pipeline.text_encoder, scheduler=scheduler, inpainting=inpainting)
    if card is not None:
        (folder / CARD).write_text(card, encoding="utf-8")
