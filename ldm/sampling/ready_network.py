"""The network and its prompts as sampling wants them: what stays the same over all evaluations is done once.

Enters: a Pipeline and the conditioning of a batch. Leaves: its network, whose kernels are laid out (CPU) or whose
evaluations are replayed (GPU), and prompts that carry their keys and values; within the pipeline's precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ldm.models.conditioning import Conditioning
from ldm.pipeline.pipeline import Pipeline
from ldm.sampling.graphs import replayed
from ldm.sampling.packed_weights import packed_convolutions


@contextmanager
def ready(
    pipeline: Pipeline, conditioning: Conditioning, unconditional: Conditioning, guidance: float
) -> Iterator[tuple[nn.Module, Conditioning, Conditioning]]:
    """Within the block: the network, and both prompts for it. Weights must not change there.

    At guidance 1, which does not look at it, `unconditional` stays as it is.
    """
    unet = pipeline.unet
    with pipeline.precision(), packed_convolutions(unet):
        led = unconditional if guidance == 1 else unet.with_keys_values(unconditional)
        yield replayed(unet) if pipeline.replays else unet, unet.with_keys_values(conditioning), led
