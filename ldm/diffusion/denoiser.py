"""The network as a denoiser, whatever it was trained to put out.

Enters: a network and its schedule. Leaves: D(x, sigma, conditioning) in variance-exploding coordinates x = x0 + sigma
noise; guidance.py makes denoise(x, sigma) of it, which is all that a sampler knows of the model.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ldm.diffusion.objective import Network
from ldm.diffusion.objective_config import SIGMA_DATA, check_parameterization, check_path
from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.targets import TARGETS, Coefficient, determinant, network_input
from ldm.diffusion.variance import halves
from ldm.models.conditioning import Conditioning

Denoiser = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x (B, C, H, W), sigma (B,), conditioning) -> expected clean latents (B, C, H, W)."""
Denoise = Callable[[Tensor, Tensor], Tensor]
"""The same with its conditioning and guidance inside."""


class Prediction(NamedTuple):
    """What a network says of x0 at one noise level."""

    x0: Tensor
    """Expected clean latents, (B, C, H, W)."""
    raw_variance: Tensor | None
    """Second half of the output of a network with 2C channels, (B, C, H, W); variance.learned_log_variance makes the
    log-variance of a step from sigma to sigma_next of it, with log_variance_bounds(sigma, sigma_next). None where the
    network has C."""


Predictor = Callable[[Tensor, Tensor, Conditioning], Prediction]
"""(x (B, C, H, W), sigma (B,), conditioning) -> expected clean latents, and the variance half where there is one."""
Predict = Callable[[Tensor, Tensor], Prediction]
"""The same with its conditioning inside."""


class Coefficients(NamedTuple):
    """What a prediction needs of its level: numbers, or of levels that differ tensors that broadcast to x."""

    time: Coefficient
    """What the network is told."""
    alpha: Coefficient
    """Of the process, as is sigma: x_t = alpha x0 + sigma noise."""
    sigma: Coefficient
    b: Coefficient
    """x0 = (b x_t - sigma output) scale, which is `targets.convert` to x0, without the half that it multiplies by 0."""
    scale: Coefficient


def denoiser(
    network: Network, schedule: ForwardProcess, parameterization: str, sigma_data: float = SIGMA_DATA
) -> Denoiser:
    """Expected clean latents D(x, sigma) = E[x0 | x = x0 + sigma noise] out of a network of any parameterization.

    The network sees x / sqrt(1 + sigma^2), or x times its schedule's alpha or EDM's c_in, in the dtype of its
    parameters, and the time of sigma, float32 at least (bf16 would round 999 to 1000) and fractional between training
    timesteps; the result has x's dtype and device. sigma is best given on the CPU, as samplers do: its check and its
    timestep then never wait for an accelerator. All of a batch at one level costs least: what is computed of a level is
    remembered, with the same results bit for bit. At TERMINAL_SIGMA, the terminal timestep of a zero-SNR schedule, the
    network sees the start noise alone. Of a network with 2C channels the first half is used (`predictor` has both).

    Args:
        sigma_data: deviation of the data in EDM's preconditioning; other parameterizations do not use it.

    Raises:
        ValueError: unknown parameterization; one that the schedule cannot serve, as epsilon with zero terminal SNR;
            when called, sigma outside the schedule.
    """
    predict = predictor(network, schedule, parameterization, sigma_data)
    return lambda x, sigma, conditioning: predict(x, sigma, conditioning).x0


def predictor(
    network: Network, schedule: ForwardProcess, parameterization: str, sigma_data: float = SIGMA_DATA
) -> Predictor:
    """`denoiser`, with the variance half of a network that learned it."""
    if parameterization not in TARGETS:
        raise ValueError(f"parameterization: found {parameterization!r}, expected one of {[*TARGETS]}")
    check_parameterization(parameterization, schedule.zero_terminal_snr)
    check_path(parameterization, schedule)
    schedule, known = _on_cpu(schedule)
    first = next(network.parameters(), None) if isinstance(network, nn.Module) else None

    def coefficients(x: Tensor, sigma: Tensor) -> Coefficients:
        levels = sigma.tolist()
        if len(set(levels)) == 1 and not sigma.requires_grad:
            return known(levels[0], x.dtype, parameterization, sigma_data)
        mixed = _coefficients(schedule, sigma, x.dtype, parameterization, sigma_data)
        shape = (-1, *[1] * (x.ndim - 1))
        scales = (c.to(x.device).view(shape) if isinstance(c, Tensor) else c for c in mixed[1:])
        return Coefficients(mixed.time, *scales)

    def predict(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Prediction:
        dtype = x.dtype if first is None else first.dtype
        at = coefficients(x, sigma)
        told = torch.promote_types(dtype, torch.float32)
        if isinstance(at.time, Tensor):
            time = at.time.to(x.device, told)
        else:
            time = torch.full(sigma.shape, at.time, dtype=told, device=x.device)
        x_t = x * at.alpha
        seen = x_t
        if parameterization == "edm":
            # Tensors, because an accelerator divides by a number as it multiplies by the inverse, which rounds twice.
            alpha, sigma_t = (c if isinstance(c, Tensor) else x_t.new_full((), c) for c in (at.alpha, at.sigma))
            seen = network_input(parameterization, x_t, alpha, sigma_t, sigma_data)
        output, raw = halves(network(seen.to(dtype), time, conditioning), x.shape[1])
        if parameterization == "x0":
            x0 = output.to(x.dtype)
        else:
            # In place in a copy of the output: each new tensor would cost more than the arithmetic in it.
            x0 = torch.empty_like(x_t).copy_(output).mul_(-at.sigma)
            x0.add_(x_t if isinstance(at.b, float) and at.b == 1 else x_t * at.b).mul_(at.scale)
        return Prediction(x0, None if raw is None else raw.to(x.dtype))

    return predict


_KNOWN: WeakKeyDictionary[ForwardProcess, tuple[ForwardProcess, Callable[..., Coefficients]]] = WeakKeyDictionary()
"""What _on_cpu returned, while the schedule lives, which nobody changes in place. Runs visit the same levels again and
again, each time with a new denoiser, and the coefficients of a level cost as much as several steps of a sampler."""


def _on_cpu(schedule: ForwardProcess) -> tuple[ForwardProcess, Callable[..., Coefficients]]:
    """The schedule on the CPU, and (level, dtype, parameterization, sigma_data) -> Coefficients, which remembers."""
    if schedule not in _KNOWN:
        copied = schedule.to("cpu")  # Never the schedule itself, which would then live as long as what is known of it.

        @lru_cache(maxsize=1024)
        def known(level: float, dtype: torch.dtype, parameterization: str, sigma_data: float) -> Coefficients:
            one = torch.tensor([level], dtype=torch.float64)
            return Coefficients(*map(float, _coefficients(copied, one, dtype, parameterization, sigma_data)))

        _KNOWN[schedule] = copied, known
    return _KNOWN[schedule]


def _coefficients(
    schedule: ForwardProcess, sigma: Tensor, dtype: torch.dtype, parameterization: str, sigma_data: float
) -> Coefficients:
    """Of levels (N,): time in float64, the others in x's dtype, all (N,) on the CPU; raises as schedule.timestep."""
    sigma = sigma.to("cpu", torch.float64)
    time = schedule.network_time(schedule.timestep(sigma))
    alpha = schedule.path.alpha(sigma)
    alpha, sigma = alpha.to(dtype), (alpha * sigma).to(dtype)
    _, b = TARGETS[parameterization](alpha, sigma, sigma_data)
    return Coefficients(time, alpha, sigma, b, 1 / determinant(parameterization, alpha, sigma, sigma_data))
