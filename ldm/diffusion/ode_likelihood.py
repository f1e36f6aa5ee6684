"""The exact log-density of latents under the probability-flow ODE of a denoiser.

Enters: denoise(x, sigma), latents, the ends of the noise levels, keyed probes for the trace. Leaves: the log-density of
each sample in nats and in bits per dimension, with the sampling error that the probes leave.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.likelihood import bits_per_dimension
from ldm.diffusion.separate_steps import integrate_each


@dataclass
class LogDensity:
    """Log-densities of B samples, of which each probe gives an estimate of its own."""

    by_probe: Tensor
    """(K, B) nats: one row for each probe, one alone with the exact trace."""
    noise: Tensor
    """(B, C, H, W): where the ODE takes the latents to, unit normal under the model."""
    dimensions: int
    """Elements of one sample."""
    evaluations: Tensor
    """(B,) int64: evaluations of the network that each sample alone needs, each with a backward pass for each probe, or
    for each dimension."""

    @property
    def nats(self) -> Tensor:
        """Log-density of each sample, (B,): the mean over the probes."""
        return self.by_probe.mean(0)

    @property
    def standard_error(self) -> Tensor:
        """Of that mean, (B,); not a number with one probe, 0 with the exact trace."""
        if len(self.by_probe) == 1:
            return torch.full_like(self.by_probe[0], math.nan)
        return self.by_probe.std(0) / math.sqrt(len(self.by_probe))

    @property
    def bits_per_dimension(self) -> Tensor:
        """Minus the log-density in bits for each element, (B,)."""
        return bits_per_dimension(-self.nats, self.dimensions)


def rademacher(noise: Tensor) -> Tensor:
    """Probes of +-1 out of any symmetric keyed noise: Hutchinson's, whose variance is the least of independent ones."""
    return torch.where(noise >= 0, 1.0, -1.0).to(noise)


def log_density(
    denoise: Denoise,
    x: Tensor,
    *,
    sigma_min: float,
    sigma_max: float,
    probes: Tensor | None = None,
    tolerance: float = 1e-6,
    max_steps: int = 1000,
) -> LogDensity:
    """Log-density of x (B, C, H, W) by the probability-flow ODE from sigma_min to sigma_max (Song et al. 2021, Eq. 39).

    It is the density of the data with noise of sigma_min added, the cleanest that the network knows, taken at x; the
    prior at sigma_max is N(0, 1 + sigma_max^2), which sampling starts from. The ODE is solved in float64, in
    z = x / sqrt(1 + sigma^2) = x cos(angle) and angle = atan(sigma), where dz/dangle = (z cos(angle) - D) / sin(angle)
    (Salimans & Ho 2022, appendix D) is bounded from clean data to pure noise, TERMINAL_SIGMA.

    Args:
        denoise: differentiable in x, no sample's result depending on another's.
        probes: (K, B, C, H, W) of mean 0 and unit covariance, `rademacher` of keyed noise or normal itself, for
            Hutchinson's estimate of the trace (their Eq. 40): each one backward pass an evaluation. None: the exact
            trace, one backward pass for each element of a sample; for few dimensions.
        tolerance: of each step, absolute and relative, on z and on the log-density; each sample takes its own steps.
        max_steps: steps of a sample tried before the solver gives up.

    Raises:
        ValueError: levels that do not ascend from above 0, or probes of another shape.
        ToleranceError: the solver did not reach the tolerance in max_steps.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min, sigma_max: found {sigma_min}, {sigma_max}, expected 0 < sigma_min < sigma_max")
    if probes is not None and probes.shape[1:] != x.shape:
        raise ValueError(f"probes: found shape {tuple(probes.shape)}, expected (K, {', '.join(map(str, x.shape))})")
    shape, dimensions = x.shape, x[0].numel()
    vectors = _units(x) if probes is None else probes.to(x.device, torch.float64)

    def slope(angle: Tensor, state: Tensor) -> Tensor:
        sigma = angle.tan().clamp(sigma_min, sigma_max)
        sine, cosine = angle.sin().to(x.device)[:, None], angle.cos().to(x.device)[:, None]
        z = state[:, :dimensions]
        with torch.enable_grad():
            x_sigma = (z / cosine).reshape(shape).requires_grad_()
            denoised = denoise(x_sigma, sigma).double()
            products = [_product(denoised, x_sigma, vectors[i], i == len(vectors) - 1) for i in range(len(vectors))]
        traces = torch.stack(products, dim=1)  # (B, K)
        if probes is None:
            traces = traces.sum(1, keepdim=True)
        # Of dz/dangle: dD/dz is dD/dx / cosine.
        divergence = (dimensions * cosine - traces / cosine) / sine
        return torch.cat([(cosine * z - denoised.detach().flatten(1)) / sine, divergence], dim=1)

    start, end = math.atan(sigma_min), math.atan(sigma_max)
    with torch.no_grad():
        z = (x.double() * math.cos(start)).flatten(1)
        logs = z.new_zeros(len(z), 1 if probes is None else len(vectors))
        state, _, steps = integrate_each(
            slope, torch.cat([z, logs], dim=1), start, end, first_step=(end - start) / 100, tolerance=tolerance,
            max_steps=max_steps,
        )  # fmt: skip
    noise, change = state[:, :dimensions], state[:, dimensions:]
    prior = -(noise.square().sum(1) + dimensions * math.log(2 * math.pi)) / 2
    density = prior + change.T + dimensions * math.log(math.cos(start))
    return LogDensity(density, noise.reshape(shape), dimensions, 6 * steps + 1)


def _product(denoised: Tensor, x: Tensor, v: Tensor, last: bool) -> Tensor:
    """v^T (dD/dx) v of each sample, (B,)."""
    (gradient,) = torch.autograd.grad(denoised, x, v, retain_graph=not last)
    return (gradient * v).flatten(1).sum(1)


def _units(x: Tensor) -> Tensor:
    """The unit vectors of one sample's elements for all samples, (D, B, C, H, W)."""
    dimensions = x[0].numel()
    units = torch.eye(dimensions, dtype=torch.float64, device=x.device).reshape(dimensions, 1, *x.shape[1:])
    return units.expand(dimensions, *x.shape)
