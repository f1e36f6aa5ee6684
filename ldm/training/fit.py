"""Whether the parts of a run fit each other: UNet, autoencoder, text encoders, resolution and shards.

Enters: the config, and the parts as they are loaded. Leaves: nothing, or one error with all that does not fit, by the
names of the settings.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ldm.config import RunConfig
from ldm.data.encoding import encoder_identity, identity_problems
from ldm.data.manifest import Manifest
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text_conditioner import TextConditioner
from ldm.pipeline.fit import inpaints, learns_variance
from ldm.training.checkpoint import CheckpointError


@contextmanager
def loading(setting: str) -> Iterator[None]:
    """Puts the setting that names a model's source before errors from loading it."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{setting}: {error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{setting}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from None


def check_parts(
    config: RunConfig, autoencoder: AutoencoderKL, text_encoder: TextConditioner, manifests: Sequence[Manifest]
) -> None:
    """Raises ValueError with every setting that does not fit autoencoder, text encoder or shards."""
    problems = [
        *latent_problems(config, autoencoder),
        *text_problems(config, text_encoder),
        *size_problems(config, autoencoder),
    ]
    of_shards = list(shard_problems(config, autoencoder, text_encoder, manifests))
    if of_shards:
        advice = (
            "Put back the settings with which the shards were encoded, or encode raw shards with these "
            "(tools/encode_latents.py)."
        )
        of_shards.append(advice)
    if problems or of_shards:
        raise ValueError("the parts of this run do not fit each other:\n  " + "\n  ".join(problems + of_shards))


def latent_problems(config: RunConfig, autoencoder: AutoencoderKL) -> Iterator[str]:
    """Channels of the UNet against those of the latents, a sentence each."""
    channels = autoencoder.config.latent_channels
    if inpaints(config.unet, autoencoder.config):
        yield (
            f"unet.in_channels is {config.unet.in_channels}: an inpainting network, which also takes a mask and masked "
            f"latents; training has no masks, only the {channels} channels of the autoencoder's latents"
        )
    elif config.unet.in_channels != channels:
        yield f"unet.in_channels is {config.unet.in_channels}, but the autoencoder's latents have {channels}"
    expected = channels * (2 if config.objective.learned_variance else 1)
    if config.unet.out_channels == expected:
        return
    found = f"unet.out_channels is {config.unet.out_channels}, but the autoencoder's latents have {channels}"
    if config.objective.learned_variance:
        yield (
            f"{found} and objective.learned_variance is true: expected {expected}, the second half for the variance; "
            "or set objective.learned_variance to false"
        )
    elif learns_variance(config.unet, autoencoder.config):
        yield (
            f"{found}: the second half would be a variance, which this objective does not train; set "
            f"objective.learned_variance to true, or unet.out_channels to {channels}"
        )
    else:
        yield found


def text_problems(config: RunConfig, text_encoder: TextConditioner) -> Iterator[str]:
    """Context and pooled text of the UNet against what the text encoders give, a sentence each."""
    unet, pair = config.unet, config.text_encoder_2 is not None
    if unet.cross_attention_dim != text_encoder.hidden_size:
        whose = "both text encoders' joined states are" if pair else "the text encoder's states are"
        yield f"unet.cross_attention_dim is {unet.cross_attention_dim}, but {whose} {text_encoder.hidden_size} wide"
    if unet.pooled_channels and not pair:
        yield (
            "unet.addition_embed_type is text_time: such a network takes pooled text, which comes from a second text "
            "encoder: set text_encoder_2"
        )
    elif pair and not unet.pooled_channels:
        yield (
            "text_encoder_2 is set, but the UNet has no place for its pooled text: set unet.addition_embed_type to "
            "text_time, or unset text_encoder_2"
        )
    elif pair and unet.pooled_channels != text_encoder.pooled_size:
        yield (
            f"unet.projection_class_embeddings_input_dim is {unet.projection_class_embeddings_input_dim}, which leaves "
            f"{unet.pooled_channels} for pooled text, but that of text_encoder_2 is {text_encoder.pooled_size} wide: "
            f"expected {6 * (unet.addition_time_embed_dim or 0) + text_encoder.pooled_size}, six sizes of "
            "unet.addition_time_embed_dim and the pooled text"
        )


def size_problems(config: RunConfig, autoencoder: AutoencoderKL) -> Iterator[str]:
    """Resolution and buckets against autoencoder and UNet, a sentence each."""
    unet, factor = config.unet, autoencoder.downsample_factor
    if config.data.resolution % factor:
        yield f"data.resolution {config.data.resolution} is no multiple of the autoencoder's factor {factor}"
    elif unet.sample_size not in (None, config.data.resolution // factor):
        yield (
            f"unet.sample_size is {unet.sample_size}, but pictures of {config.data.resolution} have latents of "
            f"{config.data.resolution // factor}"
        )
    elif unet.sample_size is None and config.previews.every and config.previews.prompts:
        yield "unet.sample_size is not set: previews need the size of the latents"
    buckets, steepest = config.data.buckets, 2 ** (len(unet.block_out_channels) - 1)
    if buckets is not None and buckets.step % (factor * steepest):
        yield (
            f"data.buckets.step is {buckets.step}, but autoencoder and UNet together halve a side to 1 /"
            f" {factor * steepest}: it has to be a multiple of that"
        )


def shard_problems(
    config: RunConfig, autoencoder: AutoencoderKL, text_encoder: TextConditioner, manifests: Sequence[Manifest]
) -> Iterator[str]:
    """What encoded shards were encoded with against what this run has, a sentence each."""
    for manifest in manifests:
        if manifest.encoder is not None:
            expected = encoder_identity(
                autoencoder,
                text_encoder,
                config.data.resolution,
                config.encoding,
                text_states=manifest.encoder.get("text_encoder") is not None,
                buckets=config.data.buckets,
            )
            for one in identity_problems(manifest.encoder, expected):
                yield f"{manifest.folder}: {one}"
