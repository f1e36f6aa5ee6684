"""The network as a denoiser, whatever it was trained to put out.

Enters: a network and its schedule. Leaves: D(x, sigma, conditioning) in variance-exploding coordinates x = x0 + sigma
noise; guidance.py makes denoise(x, sigma) of it, which is all that a sampler knows of the model.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar
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


C = TypeVar("C", float, Tensor)


class Coefficients(NamedTuple, Generic[C]):
    """x0 = c_skip x + c_out network(c_in x, time) (Karras et al. 2022, Eq. 7), which every target has a form of.

    Numbers, or of levels that differ tensors that broadcast to x. It is `targets.convert` to x0, of x_t = alpha x.
    """

    time: C
    c_in: C
    c_skip: C
    c_out: C


def denoiser(
    network: Network, schedule: ForwardProcess, parameterization: str, sigma_data: float = SIGMA_DATA
) -> Denoiser:
    """Expected clean latents D(x, sigma) = E[x0 | x = x0 + sigma noise] out of a network of any parameterization.

    The network sees x / sqrt(1 + sigma^2), or x times its schedule's alpha or EDM's c_in, in the dtype of its
    parameters, and the time of sigma, float32 at least (bf16 would round 999 to 1000) and fractional between training
    timesteps; the result has x's dtype and device. sigma is best given on the CPU, as samplers do: its check and its
    timestep then never wait for an accelerator. All of a batch at one level costs least: what is computed of a level is
    remembered, and the same up to rounding. At TERMINAL_SIGMA, the terminal timestep of a zero-SNR schedule, the
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
    dtype = None if first is None else first.dtype

    def predict(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Prediction:
        seen = x.dtype if dtype is None else dtype
        told = torch.promote_types(seen, torch.float32)
        levels = sigma.tolist()
        at: Coefficients[float] | Coefficients[Tensor]
        if len(set(levels)) == 1 and not sigma.requires_grad:
            at = known(levels[0], parameterization, sigma_data)
            time = torch.full(sigma.shape, at.time, dtype=told, device=x.device)
        else:
            mixed = _coefficients(schedule, sigma, parameterization, sigma_data)
            time, shape = mixed.time.to(x.device, told), (-1, *[1] * (x.ndim - 1))
            at = Coefficients(time, *(c.to(x).view(shape) for c in mixed[1:]))
        output, raw = halves(network(_in(seen, x * at.c_in), time, conditioning), x.shape[1])
        output = _in(x.dtype, output)
        x0 = output if parameterization == "x0" else _combine(x, at.c_skip, output, at.c_out)
        return Prediction(x0, None if raw is None else _in(x.dtype, raw))

    return predict


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    """x in that dtype; asked first, as a conversion that changes nothing costs a quarter of an addition."""
    return x if x.dtype == dtype else x.to(dtype)


def _combine(x: Tensor, c_skip: Coefficient, output: Tensor, c_out: Coefficient) -> Tensor:
    """c_skip x + c_out output in one pass or two: each costs as much as all that is computed on the host."""
    if isinstance(c_out, Tensor):
        return torch.addcmul(x * c_skip, output, c_out)
    return torch.add(x, output, alpha=c_out) if c_skip == 1 else (x * c_skip).add_(output, alpha=c_out)


_KNOWN: WeakKeyDictionary[ForwardProcess, tuple[ForwardProcess, Callable[..., Coefficients[float]]]] = (
    WeakKeyDictionary()
)
"""What _on_cpu returned, while the schedule lives, which nobody changes in place. Runs visit the same levels again and
again, each time with a new denoiser, and the coefficients of a level cost as much as several steps of a sampler."""


def _on_cpu(schedule: ForwardProcess) -> tuple[ForwardProcess, Callable[..., Coefficients[float]]]:
    """The schedule on the CPU, and (level, parameterization, sigma_data) -> Coefficients, which remembers."""
    if schedule not in _KNOWN:
        copied = schedule.to("cpu")  # Never the schedule itself, which would then live as long as what is known of it.

        @lru_cache(maxsize=1024)
        def known(level: float, parameterization: str, sigma_data: float) -> Coefficients[float]:
            one = torch.tensor([level], dtype=torch.float64)
            return Coefficients(*map(float, _coefficients(copied, one, parameterization, sigma_data)))

        _KNOWN[schedule] = copied, known
    return _KNOWN[schedule]


def _coefficients(
    schedule: ForwardProcess, sigma: Tensor, parameterization: str, sigma_data: float
) -> Coefficients[Tensor]:
    """Of levels (N,): (N,) each, float64 on the CPU; raises as schedule.timestep."""
    sigma = sigma.to("cpu", torch.float64)
    time = schedule.network_time(schedule.timestep(sigma))
    alpha = schedule.path.alpha(sigma)
    sigma = alpha * sigma
    _, b = TARGETS[parameterization](alpha, sigma, sigma_data)
    c_in = network_input(parameterization, alpha, alpha, sigma, sigma_data)  # of x_t = alpha, which is x = 1
    whole = determinant(parameterization, alpha, sigma, sigma_data)
    return Coefficients(time, c_in, b * alpha / whole, -sigma / whole)
