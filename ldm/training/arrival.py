"""A batch's way to the device, beside what the device computes for the step before.

Enters: a batch as the loader gives it, in pinned memory where there is a GPU. Leaves: the same batch on the device,
with text states and moments, which are encoded on the way where the shards have none.

The host is about a step ahead of a GPU: when it asks for a batch, the GPU has most of the step before still to do. So
no batch is read ahead of its step, and what a checkpoint, a signal or the ledger sees is the same as without any of
this; copies and encoders go into a queue of their own, beside the step's, which waits for them and for nothing else.
"""

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from ldm.data.batch import Batch
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.conditioning import Conditioning
from ldm.models.text_conditioner import TextConditioner


class Arrival:
    """Brings batches to a device, one at a time.

    Args:
        encode: gives the batch what its shards lack; called with the batch on the device.
    """

    def __init__(self, device: torch.device, encode: Callable[[Batch], Batch]) -> None:
        self._device = device
        self._encode = encode
        self._beside = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device and complete; on a GPU the host does not wait for it, and the current stream does."""
        if self._beside is None:
            return self._encode(batch.to(self._device))
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._beside):
            arrived = self._encode(batch.to(self._device, non_blocking=True))
        current.wait_stream(self._beside)
        for tensor in tensors_of(arrived):
            # Memory of the other stream: not to be given out there again before this step is done with it.
            tensor.record_stream(current)
        return arrived


def tensors_of(batch: Batch) -> list[Tensor]:
    """All tensors of a batch."""
    return [value for one in fields(batch) if isinstance(value := getattr(batch, one.name), Tensor)]


def completed(batch: Batch, text_encoder: TextConditioner, autoencoder: AutoencoderKL) -> Batch:
    """The batch with text states (B, L, D), pooled text (B, P) of a pair, and moments (B, 2C, h, w), and no pictures.

    Those of the shards as they are, the others encoded from captions and pictures.
    """
    text = text_of(batch, text_encoder)
    moments = moments_of(batch, autoencoder)
    return replace(batch, text_states=text.text, text_pooled=text.pooled, moments=moments, images=None)


@torch.no_grad()
def text_of(batch: Batch, text_encoder: TextConditioner) -> Conditioning:
    """Text (B, L, D), and pooled text (B, P) of a pair, of all captions: from the shard, or encoded."""
    if batch.text_states is None:
        return text_encoder.encode(batch.captions)
    return Conditioning(batch.text_states, batch.text_pooled)


@torch.no_grad()
def moments_of(batch: Batch, autoencoder: AutoencoderKL) -> Tensor:
    """Moments (B, 2C, h, w), raw: from the shard, or encoded."""
    if batch.moments is not None:
        return batch.moments
    assert batch.images is not None, "a batch holds moments or images"
    return autoencoder.encode(batch.images)
