"""How many nats the model's variational bound takes for given latents, term by term.

Enters: predict(x, sigma) of a trained network (denoiser.predictor with its conditioning), latents, keyed noise. Leaves:
every term of the bound in nats for each sample, their sum, and bits per dimension; ode_likelihood.py is exact instead.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, Predict, Prediction
from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.variance import learned_log_variance, step_bounds, step_nats

VarianceName = Literal["beta_tilde", "beta", "learned"]
TermNoise = Callable[[int], Tensor]
"""Timestep or node -> unit normal noise (B, C, H, W); the caller's, addressed by seed, sample and this integer."""


@dataclass
class Bound:
    """Terms of the negative variational bound of B samples, in nats: the smaller, the likelier."""

    prior: Tensor
    """L_T, (B,): the divergence of q(x_T | x0) from the prior."""
    steps: Tensor
    """(N, B), the terms between: L_{t-1} of t = T-1, ..., 1, or the integral's parts from noisy to clean."""
    reconstruction: Tensor
    """L_0, (B,): minus the log-density of the latents under the decoder; may be negative."""
    dimensions: int
    """Elements of one sample."""

    @property
    def nats(self) -> Tensor:
        """The bound on minus the log-density of each sample, (B,)."""
        return self.prior + self.steps.sum(0) + self.reconstruction

    @property
    def bits_per_dimension(self) -> Tensor:
        """The same in bits for each element, (B,). Of latents, whose density depends on their scale, not of pixels."""
        return bits_per_dimension(self.nats, self.dimensions)


def bits_per_dimension(nats: Tensor, dimensions: int) -> Tensor:
    """nats / (dimensions ln 2)."""
    return nats / (dimensions * math.log(2))


def prior_nats(x0: Tensor, sigma_max: float) -> Tensor:
    """KL divergence of N(x0, sigma_max^2) from N(0, 1 + sigma_max^2), what sampling starts from; nats, (B,).

    In x_t's coordinates L_T, of N(alpha_T x0, sigma_T^2) from the unit normal (Ho et al. 2020, Eq. 5).
    """
    x0 = x0.double().flatten(1)
    shrink = math.log1p(sigma_max**-2) - 1 / (1 + sigma_max**2)  # minus log of the variances' ratio, and it less 1
    return (x0.square().sum(1) / (1 + sigma_max**2) + x0.shape[1] * shrink) / 2


@torch.no_grad()
def elbo(
    predict: Predict,
    schedule: Schedule,
    x0: Tensor,
    noise: TermNoise,
    *,
    variance: VarianceName = "beta",
    at: Sequence[int] | None = None,
) -> Bound:
    """Terms of the variational bound of a discrete model (Ho et al. 2020, Eq. 5): one evaluation for each timestep.

    L_0 is the Gaussian decoder's density, with the step's own variance (variance.step_bounds). Computed in float64.

    Args:
        predict: (x, sigma) -> Prediction; `lambda x, sigma: Prediction(denoise(x, sigma), None)` of a denoiser.
        noise: t -> noise (B, C, H, W) of x_t; the terms' expectation is over it.
        variance: of the model's reverse steps; "learned" needs a network with 2C channels. DDPM's "beta" gives the
            better bound of the fixed ones where T is large, because data is wide compared with the noise of most steps.
        at: timesteps to evaluate, 0 and others, each of these standing for an equal share of t = 1, ..., T - 1: an
            estimate with fewer evaluations. Unset: all.

    Raises:
        ValueError: an unknown variance, "learned" of a network without, timesteps out of range or without 0.
    """
    if variance not in ("beta_tilde", "beta", "learned"):
        raise ValueError(f"variance: found {variance!r}, expected one of ['beta_tilde', 'beta', 'learned']")
    inner = schedule.num_timesteps - 1
    chosen = sorted(range(schedule.num_timesteps) if at is None else set(at), reverse=True)
    if len(chosen) < 2 or chosen[-1] != 0 or chosen[0] > inner:
        raise ValueError(f"at: found {chosen}, expected 0 and other timesteps up to {inner}")
    x0 = x0.double()
    schedule = schedule.to(x0.device)
    terms = [
        _term(predict, schedule, x0, noise(t).to(x0), torch.full((len(x0),), t, device=x0.device), variance)
        for t in chosen
    ]
    share = inner / (len(chosen) - 1)
    steps = torch.stack(terms[:-1]) * share
    return Bound(prior_nats(x0, schedule.sigma_max), steps, terms[-1], x0[0].numel())


def _term(predict: Predict, schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor, variance: VarianceName) -> Tensor:
    """The bound's term at timestep t, (B,) nats."""
    shape = (-1, *[1] * (x0.ndim - 1))
    sigma = schedule.sigma_hat(t)
    predicted, raw = predict(x0 + sigma.view(shape) * noise, sigma.cpu())
    low, high = (bound.view(shape) for bound in step_bounds(schedule, t))
    if variance == "learned":
        if raw is None:
            raise ValueError("variance: found 'learned', but the network puts out no second half; expected 'beta'")
        log_variance = learned_log_variance(raw.double(), low, high)
    else:
        log_variance = high if variance == "beta" else low
    return step_nats(schedule, t, (x0 - predicted.double()).square(), log_variance).flatten(1).sum(1)


@torch.no_grad()
def continuous_bound(
    denoise: Denoise, schedule: ForwardProcess, x0: Tensor, noise: TermNoise, *, nodes: int = 64
) -> Bound:
    """The bound in the limit of infinitely many steps, which no schedule between its ends changes (Kingma et al. 2021).

    1/2 the integral of E |noise - predicted noise|^2 over log-SNR (their Eq. 17), by Gauss-Legendre nodes between the
    schedule's ends; the decoder at the lowest level is N(D(x), v) with v = sigma_min^2 / (1 + sigma_min^2), exact for
    unit normal data as DDPM's beta_0.

    Args:
        noise: node 0, ..., nodes -> noise (B, C, H, W); the last is the decoder's.

    Raises:
        ValueError: no nodes, or a schedule that ends in pure noise, where the integral has no upper end.
    """
    if nodes < 1:
        raise ValueError(f"nodes: found {nodes}, expected 1 or more")
    if schedule.zero_terminal_snr:
        raise ValueError("the schedule ends in pure noise, at log-SNR -inf; expected one with a finite sigma_max")
    x0 = x0.double()
    low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
    points, weights = gauss_legendre(nodes)
    steps = []
    for node in reversed(range(nodes)):
        sigma = math.exp(low + (high - low) * (points[node] + 1) / 2)
        error = _squared_error(denoise, x0, noise(node).to(x0), sigma) / sigma**2
        # log-SNR is -2 log sigma, and its half cancels.
        steps.append(weights[node] * (high - low) / 2 * error)
    v = schedule.sigma_min**2 / (1 + schedule.sigma_min**2)
    error = _squared_error(denoise, x0, noise(nodes).to(x0), schedule.sigma_min)
    reconstruction = (x0[0].numel() * math.log(2 * math.pi * v) + error / v) / 2
    return Bound(prior_nats(x0, schedule.sigma_max), torch.stack(steps), reconstruction, x0[0].numel())


def _squared_error(denoise: Denoise, x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """|x0 - D(x0 + sigma noise)|^2, (B,)."""
    denoised = denoise(x0 + sigma * noise, torch.full((len(x0),), sigma, dtype=torch.float64))
    return (x0 - denoised.double()).square().flatten(1).sum(1)


def gauss_legendre(nodes: int) -> tuple[list[float], list[float]]:
    """Nodes, ascending, and weights of Gauss-Legendre quadrature on [-1, 1] (Golub & Welsch 1969)."""
    k = torch.arange(1, nodes, dtype=torch.float64)
    off_diagonal = k / (4 * k**2 - 1).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return points.tolist(), (2 * vectors[0] ** 2).tolist()


def without_variance(denoise: Denoise) -> Predict:
    """A denoiser, guided or not, as `elbo` takes it."""
    return lambda x, sigma: Prediction(denoise(x, sigma), None)
