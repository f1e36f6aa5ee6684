"""How many nats the model's variational bound takes for given latents, term by term.

Enters: predict(x, sigma) of a trained network (denoiser.predictor with its conditioning), latents, keyed noise. Leaves:
every term of the bound in nats for each sample, their sum, and bits per dimension; ode_likelihood.py is exact instead.

Information is what a level of noise leaves of unit normal latents, y = log(1 + SNR) = log(1 + sigma^-2), twice their
nats: each unit of it costs a perfect network of such latents half a nat, up to pure noise, where y is 0. So terms are
drawn, and integrals taken, over y.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, Predict, Prediction
from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.variance import VarianceName, learned_log_variance, step_bounds, step_nats

TermNoise = Callable[[int], Tensor]
"""Number of a term -> unit normal noise (B, C, H, W); the caller's, addressed by seed, sample and this integer.

0 is the decoder's; the others count from clean to noisy: timesteps where all are evaluated, else rows or nodes from 1.
"""


@dataclass
class Bound:
    """Terms of the negative variational bound of B samples, in nats: the smaller, the likelier."""

    prior: Tensor
    """L_T, (B,): the divergence of q(x_T | x0) from the prior."""
    steps: Tensor
    """(N, B), the terms between: L_{t-1} of t = T-1, ..., 1, or the sum's or integral's parts from noisy to clean."""
    times: Tensor
    """(N, B), the time of the schedule that each of these was evaluated at."""
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


@dataclass(frozen=True)
class ChosenTimesteps:
    """Timesteps that stand for all of t = 1, ..., T - 1."""

    t: Tensor
    """(N, B) int64, from clean to noisy in each column."""
    shares: Tensor
    """(N, B) float64: how many timesteps each stands for, so that sums times shares have the whole sum's mean."""


def choose_timesteps(schedule: Schedule, u: Tensor) -> ChosenTimesteps:
    """One timestep in each of N equal parts of the information between the schedule's ends, drawn by u.

    A part takes t with a probability that is the information which t loses in it. So the sum of terms times shares has
    no bias, and for unit normal latents, of which each term is half its information, no error.

    Args:
        u: (N, B) in [0, 1), the draws, a column for each sample.
    """
    y = information(schedule.sigma_hat(torch.arange(schedule.num_timesteps))).to(u.device)  # descending
    part = (y[0] - y[-1]) / len(u)
    place = torch.arange(len(u), device=u.device)[:, None] + u.double()
    t = torch.searchsorted(-y, part * place - y[0], right=True).clamp(1, schedule.num_timesteps - 1)
    return ChosenTimesteps(t, part / (y[t - 1] - y[t]))


def information(sigma: Tensor) -> Tensor:
    """log(1 + SNR) of levels: twice the nats, in each element, that they leave of unit normal latents."""
    return torch.log1p(sigma.double() ** -2)


@torch.no_grad()
def elbo(
    predict: Predict,
    schedule: Schedule,
    x0: Tensor,
    noise: TermNoise,
    *,
    variance: VarianceName = "beta",
    at: ChosenTimesteps | None = None,
) -> Bound:
    """Terms of the variational bound of a discrete model (Ho et al. 2020, Eq. 5): one evaluation for each timestep.

    L_0 is the Gaussian decoder's density, with the step's own variance (variance.step_bounds). Computed in float64.
    From the squared error of x0 is taken the part of it that the noise alone makes in unit normal latents, less its
    known mean: the terms' mean is the same, and the error of one draw a tenth.

    Args:
        predict: (x, sigma) -> Prediction; `lambda x, sigma: Prediction(denoise(x, sigma), None)` of a denoiser.
        noise: number of a term -> noise (B, C, H, W) of x_t; the terms' expectation is over it.
        variance: of the model's reverse steps; "learned" needs a network with 2C channels. DDPM's "beta" gives the
            better bound of the fixed ones where T is large, because data is wide compared with the noise of most steps.
        at: timesteps of `choose_timesteps` to evaluate beside 0: an estimate with fewer evaluations. Unset: all.

    Raises:
        ValueError: an unknown variance, "learned" of a network without, timesteps out of range or of other samples.
    """
    if variance not in ("beta_tilde", "beta", "learned"):
        raise ValueError(f"variance: found {variance!r}, expected one of ['beta_tilde', 'beta', 'learned']")
    x0, last = x0.double(), schedule.num_timesteps - 1
    schedule = schedule.to(x0.device)
    if at is None:
        t = torch.arange(1, last + 1, device=x0.device)[:, None].expand(-1, len(x0))
        shares = torch.ones_like(t, dtype=torch.float64)
    else:
        t, shares = at.t.to(x0.device), at.shares.to(x0.device)
    if not len(t) or t.shape[1:] != x0.shape[:1] or int(t.min()) < 1 or int(t.max()) > last:
        raise ValueError(f"at: found timesteps {tuple(t.shape)}, expected (N, {len(x0)}) from 1 to {last}")
    terms = [
        _term(predict, schedule, x0, noise(row + 1).to(x0), t[row], variance) * shares[row]
        for row in reversed(range(len(t)))
    ]
    reconstruction = _term(predict, schedule, x0, noise(0).to(x0), torch.zeros_like(t[0]), variance)
    return Bound(prior_nats(x0, schedule.sigma_max), torch.stack(terms), t.flip(0), reconstruction, x0[0].numel())


def _term(predict: Predict, schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor, variance: VarianceName) -> Tensor:
    """The bound's term at timesteps t (B,), (B,) nats."""
    shape = (-1, *[1] * (x0.ndim - 1))
    sigma = schedule.sigma_hat(t)
    predicted, raw = predict(x0 + sigma.view(shape) * noise, sigma.cpu())
    low, high = (bound.view(shape) for bound in step_bounds(schedule, t))
    error, known = (x0 - predicted.double()).square(), _known_error(sigma.view(shape), noise)
    if variance != "learned":
        nats = step_nats(schedule, t, error - known, high if variance == "beta" else low)
        return nats.flatten(1).sum(1)
    if raw is None:
        raise ValueError("variance: found 'learned', but the network puts out no second half; expected 'beta'")
    nats = step_nats(schedule, t, error, learned_log_variance(raw.double(), low, high))
    # Divided by a variance that the noise does not change: only then is the mean of what is taken away 0.
    known_nats = step_nats(schedule, t, known, high) - step_nats(schedule, t, torch.zeros_like(known), high)
    return (nats - known_nats).flatten(1).sum(1)


def _known_error(sigma: Tensor | float, noise: Tensor) -> Tensor:
    """The noise's part sigma^2 noise^2 / (1 + sigma^2)^2 of unit normal latents' squared error, less its mean."""
    return (sigma / (1 + sigma**2)) ** 2 * (noise**2 - 1)


@torch.no_grad()
def continuous_bound(
    denoise: Denoise, schedule: ForwardProcess, x0: Tensor, noise: TermNoise, *, nodes: int = 64
) -> Bound:
    """The bound in the limit of infinitely many steps, which no schedule between its ends changes (Kingma et al. 2021).

    1/2 the integral of E |x0 - D(x)|^2 over the SNR (their section 5.1), by Gauss-Legendre nodes in the information
    between the schedule's ends, which takes pure noise as any other; the decoder at the lowest level is N(D(x), v) with
    v = sigma_min^2 / (1 + sigma_min^2), exact for unit normal data as DDPM's beta_0. Noise's known part of the errors
    is taken away as in `elbo`.

    Args:
        noise: node 1, ..., nodes, from clean to noisy, and 0 for the decoder -> noise (B, C, H, W).

    Raises:
        ValueError: no nodes.
    """
    if nodes < 1:
        raise ValueError(f"nodes: found {nodes}, expected 1 or more")
    x0 = x0.double()
    y_max, y_min = (math.log1p(sigma**-2) for sigma in (schedule.sigma_min, schedule.sigma_max))
    points, weights = gauss_legendre(nodes)
    steps, levels = [], []
    for node in range(nodes):  # from noisy to clean
        y = y_min + (y_max - y_min) * (points[node] + 1) / 2
        levels.append(math.expm1(y) ** -0.5)
        error = _squared_error(denoise, x0, noise(nodes - node).to(x0), levels[-1])
        # dSNR = (1 + SNR) dy
        steps.append(weights[node] * (y_max - y_min) / 2 * math.exp(y) * error / 2)
    v = schedule.sigma_min**2 / (1 + schedule.sigma_min**2)
    error = _squared_error(denoise, x0, noise(0).to(x0), schedule.sigma_min)
    reconstruction = (x0[0].numel() * math.log(2 * math.pi * v) + error / v) / 2
    times = schedule.nearest(torch.tensor(levels, dtype=torch.float64))[:, None].expand(-1, len(x0))
    return Bound(
        prior_nats(x0, schedule.sigma_max), torch.stack(steps), times.to(x0.device), reconstruction, x0[0].numel()
    )


def _squared_error(denoise: Denoise, x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """|x0 - D(x0 + sigma noise)|^2 without what is known of it, (B,)."""
    denoised = denoise(x0 + sigma * noise, torch.full((len(x0),), sigma, dtype=torch.float64))
    return ((x0 - denoised.double()).square() - _known_error(sigma, noise)).flatten(1).sum(1)


def gauss_legendre(nodes: int) -> tuple[list[float], list[float]]:
    """Nodes, ascending, and weights of Gauss-Legendre quadrature on [-1, 1] (Golub & Welsch 1969)."""
    k = torch.arange(1, nodes, dtype=torch.float64)
    off_diagonal = k / (4 * k**2 - 1).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return points.tolist(), (2 * vectors[0] ** 2).tolist()


def without_variance(denoise: Denoise) -> Predict:
    """A denoiser, guided or not, as `elbo` takes it."""
    return lambda x, sigma: Prediction(denoise(x, sigma), None)
