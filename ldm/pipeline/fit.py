"""Whether a pipeline's network, autoencoder and text encoders are made for each other.

Enters: configs of the network and the autoencoder, the text encoders, all of one pipeline's folder. Leaves: a line for
each field that does not fit, with its file; or the reason why a network cannot draw out of what is given.
"""

from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.text_conditioner import TextConditioner
from ldm.models.unet_config import UNetConfig

UNET = "unet/config.json"


def inpaints(unet: UNetConfig, autoencoder: AutoencoderConfig) -> bool:
    """Whether the network takes a picture's latents and a mask beside the noisy latents, as inpainting does."""
    return unet.in_channels == 2 * autoencoder.latent_channels + 1


def learns_variance(unet: UNetConfig, autoencoder: AutoencoderConfig) -> bool:
    """Whether the network puts out a variance beside its prediction: twice the latents' channels, the second half."""
    return unet.out_channels == 2 * autoencoder.latent_channels


def fit_problems(unet: UNetConfig, autoencoder: AutoencoderConfig, text_encoder: TextConditioner) -> list[str]:
    """A line for each field in which the parts of a pipeline's folder do not fit each other; none where they do."""
    problems = []
    channels = autoencoder.latent_channels
    if unet.in_channels != channels and not inpaints(unet, autoencoder):
        problems.append(
            f"{UNET}: in_channels is {unet.in_channels}, but vae/config.json: latent_channels is {channels} (expected "
            f"{channels}, or {2 * channels + 1} for inpainting)"
        )
    if unet.out_channels != channels and not learns_variance(unet, autoencoder):
        problems.append(
            f"{UNET}: out_channels is {unet.out_channels}, but vae/config.json: latent_channels is {channels} "
            f"(expected {channels}, or {2 * channels} with learned variance)"
        )
    pair = len(text_encoder.encoders) > 1
    folders = "text_encoder/ and text_encoder_2/ together" if pair else "text_encoder/"
    if unet.cross_attention_dim != text_encoder.hidden_size:
        problems.append(
            f"{UNET}: cross_attention_dim is {unet.cross_attention_dim}, but the states of {folders} are "
            f"{text_encoder.hidden_size} wide"
        )
    pooled = text_encoder.pooled_size
    if unet.pooled_channels and not pooled:
        problems.append(
            f"{UNET}: addition_embed_type is text_time, which takes pooled text, but model_index.json names a pipeline "
            "with one text encoder, which gives none: expected text_encoder_2/ of a StableDiffusionXLPipeline"
        )
    elif pooled and not unet.pooled_channels:
        problems.append(
            f"{UNET}: addition_embed_type is {unet.addition_embed_type!r}, but model_index.json names a pipeline with "
            "two text encoders, whose pooled text and sizes only text_time takes"
        )
    elif pooled != unet.pooled_channels:
        problems.append(
            f"{UNET}: projection_class_embeddings_input_dim is {unet.projection_class_embeddings_input_dim}, so that "
            f"beside 6 sizes of {unet.addition_time_embed_dim} (addition_time_embed_dim) {unet.pooled_channels} are "
            f"left for pooled text, but text_encoder_2/config.json: projection_dim is {pooled}"
        )
    return problems


def check_draws(unet: UNetConfig, autoencoder: AutoencoderConfig, *, masked: bool) -> None:
    """Raises ValueError for an inpainting network to which no picture and mask are given (`masked`)."""
    if inpaints(unet, autoencoder) and not masked:
        raise ValueError(
            f"{UNET}: in_channels is {unet.in_channels}: an inpainting network, which takes a picture and a mask "
            "beside the prompt and does not draw without them; give both (--init_image, --mask; no --operator), or a "
            f"checkpoint with in_channels {autoencoder.latent_channels}"
        )
