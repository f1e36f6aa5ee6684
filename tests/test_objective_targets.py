"""Every target and weight on every schedule: residuals of the best predictor, gradients, published formulas."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler
from exact_mixtures import Coefficients, Mixture, gaussian, mixture
from torch import Tensor

from ldm.diffusion.continuous import ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.objective import loss_per_sample
from ldm.diffusion.objective_config import ObjectiveConfig, check_objective
from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.diffusion.targets import TARGETS, convert, determinant, network_input
from ldm.diffusion.weights import WEIGHTS, weight
from ldm.models.conditioning import Conditioning

SIGMA_DATA = 0.7
SCHEDULES: dict[str, ForwardProcess] = {
    "scaled_linear": Schedule(ScheduleConfig()),
    "sigmoid": Schedule(ScheduleConfig(beta_schedule="sigmoid")),
    "zero_snr": Schedule(ScheduleConfig(rescale_betas_zero_snr=True)),
    **{kind: ContinuousSchedule(ContinuousScheduleConfig(kind=kind)) for kind in ("vp", "cosine", "flow", "edm")},  # type: ignore[arg-type]
}
NAMES = [*TARGETS]


def definition(name: str) -> Coefficients:
    """The target out of x0 and noise as its paper writes it, not as targets.py does."""

    def edm(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        s = sigma / alpha  # Karras et al. 2022, table 1 and Eq. 8: (x0 - c_skip (x0 + s noise)) / c_out
        c_skip = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2)
        c_out = s * SIGMA_DATA / (s**2 + SIGMA_DATA**2).sqrt()
        return (1 - c_skip) / c_out, -c_skip * s / c_out

    tables: dict[str, Coefficients] = {
        "epsilon": lambda alpha, sigma: (0.0, 1.0),
        "v": lambda alpha, sigma: (-sigma, alpha),
        "x0": lambda alpha, sigma: (1.0, 0.0),
        "flow": lambda alpha, sigma: (-1.0, 1.0),
        "edm": edm,
    }
    return tables[name]


def unscale(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t of EDM's c_in x with c_in = 1 / sqrt(s^2 + sigma_data^2), x = x_t / alpha."""
    return x * alpha * ((sigma / alpha) ** 2 + SIGMA_DATA**2).sqrt()


def admitted(schedule: ForwardProcess, config: ObjectiveConfig) -> bool:
    try:
        check_objective(config, schedule)
    except ValueError:
        return False
    return True


def levels(schedule: ForwardProcess) -> Tensor:
    """Times over the range, without that of pure noise, at which these networks in closed form divide by alpha."""
    return schedule.at(torch.tensor([0.0, 0.01, 0.2, 0.5, 0.8, 0.98], dtype=torch.float64))


def standard_grid(size: int = 41, reach: float = 8.0) -> tuple[Tensor, Tensor]:
    """Points and weights of the expectation over a standard normal, by the trapezoidal rule: errors below 1e-12."""
    points = torch.linspace(-reach, reach, size, dtype=torch.float64)
    weights = (-(points**2) / 2).exp()
    return points, weights / weights.sum()


def every_draw(data: Mixture) -> tuple[Tensor, Tensor, Tensor]:
    """x0, noise and weights of a grid over one-dimensional data and noise."""
    points, weights = standard_grid()
    x0 = (data.means[:, 0, None] + data.stds[:, None] * points).flatten()
    share = (data.weights[:, None] * weights).flatten()
    first, second = torch.meshgrid(x0, points, indexing="ij")
    return first.reshape(-1, 1, 1, 1), second.reshape(-1, 1, 1, 1), torch.outer(share, weights).flatten()


def in_error_of(loss: str, alpha: float, sigma: float) -> float:
    """Squared error of a target for a squared error of 1 in x0."""
    c_out = sigma * SIGMA_DATA / math.sqrt(sigma**2 + alpha**2 * SIGMA_DATA**2)
    factors = {
        "epsilon": alpha / sigma, "v": (alpha**2 + sigma**2) / sigma, "x0": 1.0, "flow": (alpha + sigma) / sigma,
        "edm": 1 / c_out,
    }  # fmt: skip
    return factors[loss] ** 2


def published_weight(name: str, loss: str, alpha: float, sigma: float) -> float:
    """Weight of x0's error, or, uniform, of the loss's in terms of x0's."""
    snr, level = (alpha / sigma) ** 2, sigma / alpha
    return {
        "uniform": in_error_of(loss, alpha, sigma),
        "min_snr": min(snr, 5.0),
        "p2": snr / (1 + snr),
        "edm": (level**2 + SIGMA_DATA**2) / (level * SIGMA_DATA) ** 2,
    }[name]


@pytest.mark.parametrize("name", [*SCHEDULES])
def test_loss_of_the_best_predictor_of_a_mixture_is_its_posterior_variance(name: str) -> None:
    schedule, data = SCHEDULES[name], mixture(1)
    x0, noise, share = every_draw(data)
    for t in levels(schedule)[[0, 2, 4]]:
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        expected = data.residual(sigma / alpha)
        rows = torch.full((len(x0),), t.item(), dtype=t.dtype)
        for source, weighting in [*product(NAMES, ["uniform"]), *product(["edm"], WEIGHTS)]:
            config = ObjectiveConfig(source, source, weighting, sigma_data=SIGMA_DATA)  # type: ignore[arg-type]
            if not admitted(schedule, config):
                continue
            network = data.network(schedule, definition(source), unscale if source == "edm" else None)
            found = loss_per_sample(network, schedule, config, x0, noise, rows, Conditioning(torch.zeros(1, 1, 1)))
            mean = float((share * found).sum()) / published_weight(weighting, source, alpha, sigma)
            assert mean == pytest.approx(expected, rel=1e-8), f"{source}, {weighting} at t = {t}"


@pytest.mark.parametrize("name", [*SCHEDULES])
def test_every_pair_of_output_and_loss_has_the_residual_of_gaussian_data(name: str) -> None:
    schedule, data = SCHEDULES[name], gaussian(0.4, 0.8)
    # Equally weighted points that integrate every quadratic function of x0 and noise exactly.
    points = torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64) * math.sqrt(2)
    x0, noise = (0.4 + 0.8 * points[:, 0]).view(-1, 1, 1, 1), points[:, 1].view(-1, 1, 1, 1)
    tried, t = 0, levels(schedule)
    for source, loss, weighting in product(NAMES, NAMES, WEIGHTS):
        config = ObjectiveConfig(source, loss, weighting, sigma_data=SIGMA_DATA)  # type: ignore[arg-type]
        if not admitted(schedule, config):
            continue
        network = data.network(schedule, definition(source), unscale if source == "edm" else None)
        rows = t.repeat_interleave(4)
        found = loss_per_sample(
            network, schedule, config, x0.repeat(6, 1, 1, 1), noise.repeat(6, 1, 1, 1), rows,
            Conditioning(torch.zeros(1, 1, 1)),
        )  # fmt: skip
        for i, mean in enumerate(found.view(6, 4).mean(1).tolist()):
            alpha, sigma = float(schedule.alpha(t[i])), float(schedule.sigma(t[i]))
            posterior = 0.64 * sigma**2 / (alpha**2 * 0.64 + sigma**2)
            expected = posterior * published_weight(weighting, loss, alpha, sigma)
            assert mean == pytest.approx(expected, rel=1e-8), f"{source}, {loss}, {weighting}, t = {t[i]}"
            tried += 1
    assert tried >= 6 * (4 if name == "edm" else 48)


@pytest.mark.parametrize("name", [*SCHEDULES])
def test_weights_are_the_published_formulas_of_each_loss(name: str) -> None:
    schedule = SCHEDULES[name]
    t = levels(schedule)
    for loss, weighting in product(NAMES, WEIGHTS):
        config = ObjectiveConfig("edm", loss, weighting, sigma_data=SIGMA_DATA)  # type: ignore[arg-type]
        if not admitted(schedule, config):
            continue
        pairs = zip(schedule.alpha(t).tolist(), schedule.sigma(t).tolist(), strict=True)
        expected = [published_weight(weighting, loss, a, s) / in_error_of(loss, a, s) for a, s in pairs]
        np.testing.assert_allclose(weight(schedule, config, t).numpy(), expected, rtol=1e-9)


def test_p2_is_the_published_formula_for_other_gammas_and_ks() -> None:
    schedule = SCHEDULES["scaled_linear"]
    t = torch.tensor([0, 354, 999])
    config = ObjectiveConfig(weight="p2", p2_gamma=0.5, p2_k=2.0)
    torch.testing.assert_close(weight(schedule, config, t), 1 / (2 + schedule.snr(t)).sqrt())


@pytest.mark.parametrize("name", [*SCHEDULES])
def test_conversions_agree_with_the_definitions(name: str) -> None:
    schedule = SCHEDULES[name]
    draws = np.random.default_rng(3)
    t = levels(schedule)
    x0, noise = (torch.from_numpy(draws.normal(size=(len(t), 2, 3, 3))) for _ in range(2))
    alpha, sigma = schedule.alpha(t).view(-1, 1, 1, 1), schedule.sigma(t).view(-1, 1, 1, 1)
    x_t = alpha * x0 + sigma * noise
    values = {}
    for target in NAMES:
        a, b = definition(target)(alpha, sigma)
        values[target] = a * x0 + b * noise
        torch.testing.assert_close(determinant(target, alpha, sigma, SIGMA_DATA), b * alpha - a * sigma)
    for source, target in product(NAMES, NAMES):
        found = convert(values[source], x_t, alpha, sigma, source=source, target=target, sigma_data=SIGMA_DATA)
        torch.testing.assert_close(found, values[target], rtol=1e-9, atol=1e-9 / float(alpha.min()))


def test_edm_preconditioning_is_that_of_diffusers_and_has_unit_variance() -> None:
    theirs = EDMEulerScheduler(sigma_data=SIGMA_DATA)
    draws = np.random.default_rng(4)
    x, output = (torch.from_numpy(draws.normal(size=(1, 2, 3, 3))) for _ in range(2))
    schedule = SCHEDULES["edm"]
    for level in (0.002, 0.3, 1.0, 80.0):
        s = torch.tensor(level, dtype=torch.float64)
        one = torch.ones(1, dtype=torch.float64)
        expected = theirs.precondition_outputs(x, output, s)
        found = convert(output, x, one, s, source="edm", target="x0", sigma_data=SIGMA_DATA)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            network_input("edm", x, one, s, SIGMA_DATA), theirs.precondition_inputs(x, s), rtol=1e-12, atol=0
        )
        torch.testing.assert_close(schedule.network_time(schedule.timestep(s)), theirs.precondition_noise(s))
        a, b = TARGETS["edm"](one, s, SIGMA_DATA)
        assert float(a**2 * SIGMA_DATA**2 + b**2) == pytest.approx(1)


def test_edm_with_unit_data_is_minus_v() -> None:
    schedule = SCHEDULES["zero_snr"]
    t = torch.tensor([0, 500, 999])
    for ours, v in zip(
        TARGETS["edm"](schedule.alpha(t), schedule.sigma(t), 1.0),
        TARGETS["v"](schedule.alpha(t), schedule.sigma(t), 1.0),
        strict=True,
    ):
        torch.testing.assert_close(ours, -v)


@pytest.mark.parametrize("name", [*SCHEDULES])
def test_gradients_are_those_of_the_formula_written_out(name: str) -> None:
    schedule = SCHEDULES[name]
    draws = np.random.default_rng(6)
    t = levels(schedule)[1:5]
    x0, noise = (torch.from_numpy(draws.normal(size=(4, 2, 3, 3))) for _ in range(2))
    start = torch.from_numpy(draws.normal(size=(2, 2)))
    alpha, sigma = schedule.alpha(t).view(-1, 1, 1, 1), schedule.sigma(t).view(-1, 1, 1, 1)
    x_t = alpha * x0 + sigma * noise
    for source, loss, weighting in product(NAMES, NAMES, WEIGHTS):
        config = ObjectiveConfig(source, loss, weighting, sigma_data=SIGMA_DATA)  # type: ignore[arg-type]
        if not admitted(schedule, config):
            continue
        ours, direct = start.clone().requires_grad_(), start.clone().requires_grad_()
        found = loss_per_sample(
            lambda x, time, c, w=ours: torch.einsum("oi,bihw->bohw", w, x).tanh(), schedule, config, x0, noise, t,
            Conditioning(torch.zeros(4, 1, 1)),
        )  # fmt: skip
        found.sum().backward()
        seen = x_t / alpha / ((sigma / alpha) ** 2 + SIGMA_DATA**2).sqrt() if source == "edm" else x_t
        output = torch.einsum("oi,bihw->bohw", direct, seen).tanh()
        # Solve output = a x0_hat + b noise_hat and x_t = alpha x0_hat + sigma noise_hat, then compare what loss names.
        a, b = (torch.as_tensor(c, dtype=torch.float64).expand(4, 1, 1, 1) for c in definition(source)(alpha, sigma))
        system = torch.stack([torch.cat([a, b], 1)[..., 0, 0], torch.cat([alpha, sigma], 1)[..., 0, 0]], 1)  # (4, 2, 2)
        solved = torch.linalg.solve(system, torch.stack([output, x_t], 1).flatten(2))
        x0_hat, noise_hat = solved[:, 0].view_as(x0), solved[:, 1].view_as(x0)
        c, d = definition(loss)(alpha, sigma)
        square = ((c * x0_hat + d * noise_hat) - (c * x0 + d * noise)) ** 2
        factors = [
            published_weight(weighting, loss, float(p), float(q)) / in_error_of(loss, float(p), float(q))
            for p, q in zip(alpha.flatten(), sigma.flatten(), strict=True)
        ]
        expected = square.flatten(1).mean(1) * torch.tensor(factors, dtype=torch.float64)
        expected.sum().backward()
        case = f"{source}, {loss}, {weighting}"
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12, msg=lambda text, c=case: f"{c}: {text}")
        torch.testing.assert_close(
            ours.grad, direct.grad, rtol=1e-7, atol=1e-9, msg=lambda text, c=case: f"{c}: {text}"
        )


@pytest.mark.parametrize("loss", NAMES)
def test_a_network_that_learns_at_pure_noise_has_a_finite_loss_there(loss: str) -> None:
    for name, source, weighting in product(["zero_snr", "cosine", "flow"], ["v", "x0", "flow", "edm"], WEIGHTS):
        schedule = SCHEDULES[name]
        config = ObjectiveConfig(source, loss, weighting)  # type: ignore[arg-type]
        if not admitted(schedule, config):
            continue
        t = schedule.timestep(torch.tensor([schedule.sigma_max], dtype=torch.float64))
        t = t.long() if name == "zero_snr" else t
        draws = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 1, 1, 2, 2)))
        found = loss_per_sample(lambda x, *_: 0 * x, schedule, config, *draws, t, Conditioning(torch.zeros(1, 1, 1)))
        assert math.isfinite(found.item()), f"{name}, {source}, {weighting}"


@pytest.mark.parametrize(("name", "source"), [("flow", "flow"), ("edm", "edm"), ("zero_snr", "edm"), ("vp", "flow")])
def test_float32_loss_of_small_errors_is_right_at_both_ends(name: str, source: str) -> None:
    """A network that is off by 1e-4 everywhere, in float32."""
    schedule = SCHEDULES[name]
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1, 4, 16, 16, generator=generator) for _ in range(2))
    for t in schedule.at(torch.tensor([[0.0], [0.001], [0.5], [0.999]], dtype=torch.float64)):
        alpha, sigma = (c.view(1, 1, 1, 1) for c in (schedule.alpha(t), schedule.sigma(t)))
        a, b = definition(source)(alpha.clamp(min=1e-12), sigma)
        target = a * x0.double() + b * noise.double()
        output = (target + 1e-4).float()
        own = (output.double() - target).square().mean().item()
        for weighting in WEIGHTS:
            config = ObjectiveConfig(source, source, weighting, sigma_data=SIGMA_DATA)  # type: ignore[arg-type]
            found = loss_per_sample(
                lambda *_, y=output: y, schedule, config, x0, noise, t, Conditioning(torch.zeros(1, 1, 1))
            )
            assert found.dtype == torch.float32
            expected = own * weight(schedule, config, t).item()
            assert found.item() == pytest.approx(expected, rel=1e-2), f"{weighting} at t = {t.item()}"
