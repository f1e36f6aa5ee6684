"""The network as a denoiser, whatever it was trained to put out.

Enters: a network and its schedule. Leaves: D(x, sigma, conditioning) in variance-exploding coordinates x = x0 + sigma
noise; guidance.py makes denoise(x, sigma) of it, which is all that a sampler knows of the model.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.diffusion.objective import TARGETS, Network, check_parameterization, convert
from ldm.diffusion.schedule import Schedule
from ldm.models.conditioning import Conditioning

Denoiser = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x (B, C, H, W), sigma (B,), conditioning) -> expected clean latents (B, C, H, W)."""
Denoise = Callable[[Tensor, Tensor], Tensor]
"""The same with its conditioning and guidance inside."""


def denoiser(network: Network, schedule: Schedule, parameterization: str) -> Denoiser:
    """Expected clean latents D(x, sigma) = E[x0 | x = x0 + sigma noise] out of a network of any parameterization.

    The network sees x / sqrt(1 + sigma^2), in the dtype of its parameters, and the timestep of sigma, float32 at least
    (bf16 would round 999 to 1000) and fractional between training timesteps; the result has x's dtype and device. sigma
    is best given on the CPU, as samplers do: its check and its timestep then never wait for an accelerator.
    At TERMINAL_SIGMA, the terminal timestep of a zero-SNR schedule, the network sees the start noise alone.

    Raises:
        ValueError: unknown parameterization; epsilon with zero terminal SNR; when called, sigma outside the schedule.
    """
    if parameterization not in TARGETS:
        raise ValueError(f"parameterization: found {parameterization!r}, expected one of {[*TARGETS]}")
    check_parameterization(parameterization, schedule.zero_terminal_snr)
    schedule = schedule.to("cpu")
    first = next(network.parameters(), None) if isinstance(network, nn.Module) else None

    def denoise(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        sigma = sigma.to("cpu", torch.float64)
        dtype = x.dtype if first is None else first.dtype
        t = schedule.timestep(sigma).to(x.device, torch.promote_types(dtype, torch.float32))
        alpha = (1 + sigma**2).rsqrt()
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = (c.to(x.device, x.dtype).view(shape) for c in (alpha, alpha * sigma))  # variance-preserving
        x_t = alpha * x
        prediction = network(x_t.to(dtype), t, conditioning).to(x.dtype)
        return convert(prediction, x_t, alpha, sigma, source=parameterization, target="x0")

    return denoise
