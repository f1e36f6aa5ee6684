"""A compiled network is tried against itself, uncompiled, before it trains: compilers have had wrong kernels.

Enters: a network whose blocks were compiled, and the shape of what it will be given. Leaves: nothing, or a ParityError
that names what deviates; and compiled programs of the run's shape, which its first step then finds ready.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.models.compiled import eager
from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig

LIMITS = {torch.float32: 1e-2, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Relative deviation of the output, and of each parameter's gradient, by the dtype of computation. Reordered sums gave
7e-6 in float32 and 0.03 in bfloat16 for the demo's network on a CPU; float32 has room for TF32."""
FLOOR = 0.5
"""Share of the gradients' common root mean square below which a gradient's own is not what its deviation is measured
by: a bias before a norm of its own channel has none but rounding."""
FILL = 0.05
"""Deviation of what stands in for parameters that are zero, so that no branch is switched off while it is tried."""


class ParityError(RuntimeError):
    """A compiled network computes something else than the network."""


@dataclass(frozen=True)
class Trial:
    """Shape of what the network is given in a run."""

    micro_batch: int
    side: int
    """Height and width of the latents."""
    text_length: int

    def inputs(self, config: UNetConfig, device: torch.device) -> tuple[Tensor, Tensor, Conditioning]:
        """Latents, timesteps over the whole range and conditioning, the same at each call."""
        generator = torch.Generator().manual_seed(0)
        batch = self.micro_batch

        def normal(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=generator)

        x, text = normal(config.in_channels, self.side, self.side), normal(self.text_length, config.cross_attention_dim)
        conditioning = Conditioning(text)
        if config.pooled_channels:
            conditioning.pooled = normal(config.pooled_channels)
            conditioning.sizes = torch.tensor([[512, 512, 0, 0, 512, 512]]).expand(batch, -1)
        return x.to(device), torch.linspace(1, 999, batch, device=device).long(), conditioning.to(device)


def check_compiled(unet: UNet, trial: Trial, device: torch.device, dtype: torch.dtype) -> float:
    """Compares forward and backward of the compiled network with the eager one; returns the largest deviation.

    Parameters that are zero, as last layers are before training, have other values while it is tried and are zero
    again afterwards. It costs two training steps, and the memory of the gradients twice.

    Args:
        dtype: of computation, that of autocast where it is not float32.

    Raises:
        ParityError: a deviation beyond LIMITS, or a number that is not finite; names where it is.
    """
    inputs = trial.inputs(unet.config, device)
    upstream = torch.randn(inputs[0].shape[0], unet.config.out_channels, trial.side, trial.side,
                           generator=torch.Generator().manual_seed(1)).to(device)  # fmt: skip
    with _filled(unet):
        with eager(unet):
            expected = _forward_backward(unet, inputs, upstream, dtype)
        found = _forward_backward(unet, inputs, upstream, dtype)
    worst_name, worst = "", 0.0
    output = found.pop(OUTPUT), expected.pop(OUTPUT)
    rms = sum(float(g.square().sum()) for g in expected.values()) / sum(g.numel() for g in expected.values())
    floor = FLOOR * rms**0.5
    for name, got, reference in [(OUTPUT, *output), *((name, found[name], g) for name, g in expected.items())]:
        deviation = float((got - reference).norm()) / max(float(reference.norm()), floor * reference.numel() ** 0.5)
        if not deviation <= worst:  # also when it is not a number
            worst_name, worst = name, deviation
            if worst != worst:
                break
    if not worst <= LIMITS[dtype]:
        what = "the output" if worst_name == OUTPUT else f"the gradient of {worst_name}"
        raise ParityError(
            f"wrapping.compile: {what} of the compiled network is {worst:.2g} relative off the network's own (limit "
            f"{LIMITS[dtype]} in {dtype}, batch {trial.micro_batch}, latents {trial.side}x{trial.side}, torch "
            f"{torch.__version__}, {device}). This torch compiles it wrongly here: set wrapping.compile to false, or "
            "install another version of torch"
        )
    return worst


OUTPUT = "(output)"


def _forward_backward(
    unet: nn.Module, inputs: tuple[Tensor, Tensor, Conditioning], upstream: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The output and the gradients of all parameters, by name."""
    unet.zero_grad(set_to_none=True)
    with torch.enable_grad():
        with torch.autocast(upstream.device.type, dtype, enabled=dtype != torch.float32):
            output = unet(*inputs)
        output.float().backward(upstream)
    found = {OUTPUT: output.detach().float()}
    found |= {name: p.grad.float() for name, p in unet.named_parameters() if p.grad is not None}
    unet.zero_grad(set_to_none=True)
    return found


@contextmanager
def _filled(network: nn.Module) -> Iterator[None]:
    """Within the block no parameter is zero throughout."""
    zero = [parameter for parameter in network.parameters() if not parameter.any()]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in zero:
            parameter.copy_(FILL * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zero:
                parameter.zero_()
