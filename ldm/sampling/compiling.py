"""A pipeline whose network is compiled before it draws, and compared with itself as it was.

Enters: a Pipeline and the shape of what it will draw. Leaves: the same pipeline, its network compiled in place for this
shape, or a ParityError: compilers have had wrong kernels.
"""

import torch
from torch import Tensor

from ldm.models.compiled import compile_blocks, compile_frozen
from ldm.models.conditioning import Conditioning
from ldm.models.parity_gate import LIMITS, ParityError
from ldm.pipeline.pipeline import Pipeline
from ldm.sampling.generation import with_sizes


@torch.no_grad()
def compile_pipeline(pipeline: Pipeline, shape: tuple[int, int, int], batch: int, guidance: float) -> float:
    """Compiles the network, and returns the relative deviation of an evaluation from its own uncompiled one.

    By block on a GPU, whole with frozen weights on a CPU. The evaluation is of the shape that sampling will ask for,
    so that nothing is compiled twice.

    Args:
        shape: (C, h, w) of the latents.
        batch: pictures that are drawn at once; `guidance` other than 1 doubles it.

    Raises:
        ParityError: the compiled network computes something else.
    """
    unet, rows = pipeline.unet, batch if guidance == 1 else 2 * batch
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(rows, *size, generator=generator).to(pipeline.device)

    x = normal(unet.config.in_channels, *shape[1:])
    conditioning = Conditioning(normal(pipeline.text_encoder.max_length, unet.config.cross_attention_dim))
    if unet.config.pooled_channels:
        conditioning.pooled = normal(unet.config.pooled_channels)
    conditioning = with_sizes(pipeline, conditioning, x)
    t = torch.linspace(1, 999, rows, device=pipeline.device)
    with pipeline.precision():
        conditioning = unet.with_keys_values(conditioning)
        expected = unet(x, t, conditioning).float()
        (compile_frozen if pipeline.device.type == "cpu" else compile_blocks)(unet)
        found = unet(x, t, conditioning).float()
    deviation = float((found - expected).norm() / expected.norm())
    if not deviation <= LIMITS[pipeline.dtype]:  # also when it is not a number
        raise ParityError(
            f"compile: the compiled network's output is {deviation:.2g} relative off the network's own (limit "
            f"{LIMITS[pipeline.dtype]} in {pipeline.dtype}, torch {torch.__version__}, {pipeline.device}). This torch "
            "compiles it wrongly here: draw without --compile, or install another version of torch"
        )
    return deviation
