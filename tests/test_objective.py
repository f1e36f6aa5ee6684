"""Objective: closed forms for Gaussian data, published weights, exact conversions, precision at both ends."""

import math
from collections.abc import Callable
from itertools import product
from statistics import NormalDist
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ldm.diffusion.objective import DISTANCES, add_noise, coefficients, loss_per_sample
from ldm.diffusion.objective_config import ObjectiveConfig
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.diffusion.targets import TARGETS, convert
from ldm.diffusion.timesteps import TIMESTEP_SAMPLING, timesteps
from ldm.diffusion.weights import WEIGHTS, weight
from ldm.models.conditioning import Conditioning

NAMES = ["epsilon", "v", "x0"]
LEVELS = [0, 1, 146, 147, 500, 900, 998, 999]
SCHEDULE = Schedule(ScheduleConfig())
ZERO_SNR = Schedule(ScheduleConfig(rescale_betas_zero_snr=True))


def nothing(batch: int) -> Conditioning:
    return Conditioning(torch.zeros(batch, 1, 1))


def process(schedule: Schedule, t: int) -> tuple[float, float]:
    """alpha and sigma of a timestep from alphas_cumprod, which test_schedule compares with published figures."""
    alphas_cumprod = schedule.alphas_cumprod[t].item()
    return math.sqrt(alphas_cumprod), math.sqrt(1 - alphas_cumprod)


def pairs(schedule: Schedule) -> list[tuple[str, str]]:
    sources = NAMES if schedule is SCHEDULE else ["v", "x0"]
    return [*product(sources, NAMES)]


class Gaussian:
    """Independent Gaussian data in `dims` dimensions: the best predictor and what error it is left with."""

    def __init__(self, dims: int) -> None:
        rng = np.random.default_rng(dims)
        self.dims = dims
        self.mean = torch.from_numpy(rng.normal(size=dims))
        self.std = torch.from_numpy(rng.uniform(0.2, 2.0, size=dims))

    def cubature(self) -> tuple[Tensor, Tensor]:
        """4 dims equally weighted (x0, noise) whose average of any quadratic function is its exact expectation."""
        size = 2 * self.dims
        points = torch.cat([torch.eye(size), -torch.eye(size)]).double() * math.sqrt(size)
        x0 = self.mean + self.std * points[:, : self.dims]
        return x0.view(-1, self.dims, 1, 1), points[:, self.dims :].reshape(-1, self.dims, 1, 1)

    def network(self, parameterization: str, schedule: Schedule) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
        """Puts out the expectation of the parameterization given x_t."""

        def predict(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            alpha, sigma = process(schedule, int(t[0]))
            mean, std = self.mean.view(-1, 1, 1), self.std.view(-1, 1, 1)
            x0 = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)
            if parameterization == "x0":
                return x0
            noise = (x_t - alpha * x0) / sigma
            return noise if parameterization == "epsilon" else alpha * noise - sigma * x0

        return predict

    def residual(self, loss: str, schedule: Schedule, t: int) -> float:
        """Mean squared error of the best predictor: the posterior variance, in terms of the loss's target."""
        alpha, sigma = process(schedule, t)
        x0_error = (self.std**2 * sigma**2 / (alpha**2 * self.std**2 + sigma**2)).mean().item()
        return x0_error * {"x0": 1.0, "epsilon": (alpha / sigma) ** 2, "v": sigma**-2}[loss]


def published_weight(name: str, loss: str, snr: float, gamma: float) -> float:
    if name == "uniform":
        return 1.0
    if name in ("p2", "edm"):
        # Of the noise's error: Choi et al. 2022, Eq. 8, k = gamma = 1; Karras et al. 2022, lambda(sigma) sigma^2 for
        # data of deviation 1, infinite at SNR 0.
        on_noise = 1 / (1 + snr) if name == "p2" else (1 + 1 / snr if snr else math.inf)
        if name == "edm" and not snr:
            return {"epsilon": math.inf, "v": 1.0, "x0": 1.0}[loss]
        return on_noise * {"epsilon": 1.0, "v": snr / (1 + snr), "x0": snr}[loss]
    if loss == "epsilon":
        return min(snr, gamma) / snr if snr else 1.0
    return min(snr, gamma) / (snr + 1) if loss == "v" else min(snr, gamma)


@pytest.mark.parametrize("dims", [1, 3, 16])
@pytest.mark.parametrize("weighting", [*WEIGHTS])
@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["scaled_linear", "zero_snr"])
def test_loss_of_the_perfect_predictor_is_the_known_residual(schedule: Schedule, weighting: str, dims: int) -> None:
    data = Gaussian(dims)
    x0, noise = data.cubature()
    for (source, loss), t in product(pairs(schedule), LEVELS):
        config = ObjectiveConfig(parameterization=source, loss=loss, weight=weighting)  # type: ignore[arg-type]
        found = loss_per_sample(
            data.network(source, schedule), schedule, config, x0, noise, torch.full((len(x0),), t), nothing(len(x0))
        )
        alpha, sigma = process(schedule, t)
        if weighting == "edm" and not alpha and loss == "epsilon":
            loss = "x0"  # of the noise's error, which is 0, the weight is infinite; it is the same loss
        expected = data.residual(loss, schedule, t) * published_weight(weighting, loss, (alpha / sigma) ** 2, 5.0)
        case = f"{source} network, {loss} loss, t {t}"
        assert found.mean().item() == pytest.approx(expected, rel=1e-9, abs=1e-20), case


def test_min_snr_weights_are_the_published_formula_of_each_loss() -> None:
    t = torch.tensor([0, 146, 147, 354, 500, 999])
    snr = SCHEDULE.snr(t)
    clipped = torch.minimum(snr, torch.tensor(5.0))
    expected = {"epsilon": clipped / snr, "v": clipped / (snr + 1), "x0": clipped}
    for loss in NAMES:
        config = ObjectiveConfig(parameterization="v", loss=loss, weight="min_snr", min_snr_gamma=5.0)  # type: ignore[arg-type]
        torch.testing.assert_close(weight(SCHEDULE, config, t), expected[loss], rtol=1e-12, atol=0)
    # SNR exceeds 5 up to t = 146: there the weight of epsilon is below 1, from 147 on it is 1.
    by_t = weight(SCHEDULE, ObjectiveConfig(weight="min_snr"), torch.arange(1000))
    assert int((by_t < 1).sum()) == 147
    assert bool((by_t[147:] == 1).all())


def test_min_snr_gives_the_same_loss_whichever_error_it_is_written_for() -> None:
    seed = 5
    draws = np.random.default_rng(seed)
    x0, noise, output = (torch.from_numpy(draws.normal(size=(6, 4, 3, 3))) for _ in range(3))
    t = torch.tensor([0, 100, 300, 600, 900, 999])
    for source in NAMES:
        losses = []
        for loss in NAMES:
            config = ObjectiveConfig(parameterization=source, loss=loss, weight="min_snr")  # type: ignore[arg-type]
            losses.append(loss_per_sample(lambda *_: output, SCHEDULE, config, x0, noise, t, nothing(6)))
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0, msg=f"seed {seed}")
        torch.testing.assert_close(losses[0], losses[2], rtol=1e-10, atol=0, msg=f"seed {seed}")


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["scaled_linear", "zero_snr"])
def test_conversions_agree_with_the_definitions_at_every_timestep(schedule: Schedule) -> None:
    draws = np.random.default_rng(11)
    x0, noise = (torch.from_numpy(draws.normal(size=(1000, 2, 2, 2))) for _ in range(2))
    alphas_cumprod = schedule.alphas_cumprod.view(-1, 1, 1, 1)
    alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    x_t = alpha * x0 + sigma * noise
    values = {"epsilon": noise, "v": alpha * noise - sigma * x0, "x0": x0}
    for source, target in pairs(schedule):
        levels = coefficients(schedule, torch.arange(1000), x_t)
        found = convert(values[source], x_t, *levels, source=source, target=target)
        torch.testing.assert_close(found, values[target], rtol=0, atol=2e-12)


def test_noisy_latents_and_velocity_are_those_of_diffusers() -> None:
    draws = np.random.default_rng(12)
    x0, noise = (torch.from_numpy(draws.normal(size=(4, 4, 8, 8))).float() for _ in range(2))
    t = torch.tensor([0, 250, 750, 999])
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x_t = add_noise(SCHEDULE, x0, noise, t)
    torch.testing.assert_close(x_t, theirs.add_noise(x0, noise, t), rtol=1e-5, atol=1e-5)
    velocity = convert(noise, x_t, *coefficients(SCHEDULE, t, x_t), source="epsilon", target="v")
    torch.testing.assert_close(velocity, theirs.get_velocity(x0, noise, t), rtol=1e-4, atol=1e-4)
    assert add_noise(SCHEDULE, x0.half(), noise.half(), t).dtype == torch.float32


@pytest.mark.parametrize("source", ["v", "x0"])
def test_float32_loss_is_right_where_alpha_or_sigma_is_small(source: str) -> None:
    """A network that is off by 1e-4 everywhere: converted before the difference, the error is wrong by up to 490 %."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1, 4, 16, 16, generator=generator) for _ in range(2))
    for t in [0, 1, 997, 998]:
        alpha, sigma = process(ZERO_SNR, t)
        target = x0.double() if source == "x0" else alpha * noise.double() - sigma * x0.double()
        output = (target + 1e-4).float()
        offset = ((output.double() - target) ** 2).mean().item()
        in_x0 = offset if source == "x0" else offset * sigma**2
        expected = {"x0": in_x0, "epsilon": in_x0 * (alpha / sigma) ** 2, "v": in_x0 / sigma**2}
        for loss in NAMES:
            config = ObjectiveConfig(parameterization=source, loss=loss)  # type: ignore[arg-type]
            found = loss_per_sample(lambda *_, y=output: y, ZERO_SNR, config, x0, noise, torch.tensor([t]), nothing(1))
            assert found.dtype == torch.float32
            assert found.item() == pytest.approx(expected[loss], rel=1e-3, abs=0), f"{loss} loss at t = {t}"


def test_loss_at_zero_snr_is_finite_and_right_for_networks_that_can_learn_there() -> None:
    x0, noise = torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2)
    # Both networks put out x0 = 0; at alpha = 0, v = -x0, and the noise is the input, so that it has no error.
    expected = {"x0": 0.25, "v": 0.25, "epsilon": 0.0}
    for source, loss, weighting in product(["v", "x0"], NAMES, [*WEIGHTS]):
        config = ObjectiveConfig(parameterization=source, loss=loss, weight=weighting)  # type: ignore[arg-type]
        found = loss_per_sample(
            lambda x_t, t, c: torch.zeros_like(x_t), ZERO_SNR, config, x0, noise, torch.tensor([999]), nothing(1)
        )
        # min-SNR weighs x0's error with min(0, gamma) = 0, p2 with 0 / (k + 0), EDM with 1 for infinite noise and data
        # of deviation 1, whatever error they are written for.
        error = {"uniform": expected[loss], "min_snr": 0.0, "p2": 0.0, "edm": 0.25}[weighting]
        assert found.item() == pytest.approx(error, abs=1e-12)


def test_epsilon_network_with_zero_terminal_snr_is_an_error() -> None:
    for loss in NAMES:
        config = ObjectiveConfig(parameterization="epsilon", loss=loss)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="found 'epsilon' with zero terminal SNR"):
            loss_per_sample(
                lambda x_t, t, c: x_t, ZERO_SNR, config, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1),
                torch.tensor([0]), nothing(1),
            )  # fmt: skip


class Recorder(nn.Module):
    """A convolution that keeps what it was called with and what it gave."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)
        self.calls: list[tuple[Tensor, Tensor, Conditioning, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        output = self.convolution(x_t)
        self.calls.append((x_t, t, conditioning, output))
        return output


def test_loss_is_float32_under_autocast_and_the_network_is_called_once() -> None:
    generator = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    t, conditioning = torch.tensor([10, 500, 990]), nothing(3)
    for source in NAMES:
        network = Recorder()
        config = ObjectiveConfig(parameterization=source, loss=source, weight="min_snr")  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16):
            found = loss_per_sample(network, SCHEDULE, config, x0, noise, t, conditioning)
        assert len(network.calls) == 1
        x_t, given_t, given_conditioning, output = network.calls[0]
        assert output.dtype == torch.bfloat16
        assert x_t.dtype == torch.float32
        assert given_t is t
        assert given_conditioning is conditioning
        assert found.dtype == torch.float32
        for i in range(3):
            alpha, sigma = process(SCHEDULE, int(t[i]))
            x, e = x0[i].double(), noise[i].double()
            target = {"epsilon": e, "v": alpha * e - sigma * x, "x0": x}[source]
            error = ((output[i].double() - target) ** 2).mean().item()
            expected = error * published_weight("min_snr", source, (alpha / sigma) ** 2, 5.0)
            assert found[i].item() == pytest.approx(expected, rel=1e-5)


def test_a_samples_loss_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(2)
    x0, noise = (torch.randn(5, 4, 8, 8, generator=generator) for _ in range(2))
    t, network = torch.tensor([0, 300, 600, 900, 999]), Recorder()
    config = ObjectiveConfig(parameterization="v", loss="epsilon", weight="min_snr")
    together = loss_per_sample(network, SCHEDULE, config, x0, noise, t, nothing(5))
    assert together.shape == (5,)
    for i in range(5):
        rows = slice(i, i + 1)
        alone = loss_per_sample(network, SCHEDULE, config, x0[rows], noise[rows], t[rows], nothing(1))
        torch.testing.assert_close(together[rows], alone, rtol=1e-5, atol=0)


def test_loss_never_waits_for_the_device() -> None:
    # The meta device has no values: whatever would be fetched to the host raises.
    latents = torch.zeros(2, 4, 8, 8, device="meta")
    schedule = SCHEDULE.to("meta")
    for source, loss, weighting, sampling in product(NAMES, NAMES, WEIGHTS, TIMESTEP_SAMPLING):
        config = ObjectiveConfig(source, loss, weighting, timestep_sampling=sampling)  # type: ignore[arg-type]
        t = timesteps(torch.zeros(2, dtype=torch.float64, device="meta"), schedule, config)
        found = loss_per_sample(lambda x_t, t, c: x_t, schedule, config, latents, latents, t, nothing(2))
        assert found.shape == (2,)


def test_a_prediction_of_another_shape_is_an_error() -> None:
    latents = torch.zeros(2, 4, 8, 8)
    for shape in ((2, 8, 8, 8), (2, 4, 8, 1)):
        with pytest.raises(ValueError, match=r"output has shape .* expected \(2, 4, 8, 8\)"):
            loss_per_sample(
                lambda *_, s=shape: torch.zeros(s), SCHEDULE, ObjectiveConfig(), latents, latents,
                torch.tensor([1, 2]), nothing(2),
            )  # fmt: skip


def test_uniform_timesteps_cut_the_unit_interval_into_equal_parts() -> None:
    u = torch.tensor([0.0, 0.000999999, 0.001, 0.5, 0.9989999, 0.999, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert timesteps(u, SCHEDULE).tolist() == [0, 0, 1, 500, 998, 999, 999]
    assert timesteps(u, SCHEDULE).dtype == torch.int64
    middles = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.equal(timesteps(middles, SCHEDULE), torch.arange(1000))
    highest = torch.tensor([math.nextafter(1.0, 0.0)], dtype=torch.float64)
    for count in (2, 3, 512, 513, 999, 4095):
        assert timesteps(highest, Schedule(ScheduleConfig(num_train_timesteps=count))).item() == count - 1


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.5)])
def test_logit_normal_timesteps_have_a_normal_logit(mean: float, std: float) -> None:
    count = 20_000
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    t = timesteps(u, SCHEDULE, ObjectiveConfig(timestep_sampling="logit_normal", logit_mean=mean, logit_std=std))
    normal = NormalDist(mean, std)
    for threshold in (1, 50, 250, 500, 750, 950, 999):
        position = threshold / 1000
        expected = normal.cdf(math.log(position / (1 - position)))
        assert (t < threshold).double().mean().item() == pytest.approx(expected, abs=1 / count)
    ends = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    far = ObjectiveConfig(timestep_sampling="logit_normal", logit_mean=30.0)
    assert timesteps(ends, SCHEDULE, far).tolist() == [0, 999]


def test_the_noise_s_error_is_minimized_unless_set_whatever_the_network_puts_out() -> None:
    assert [ObjectiveConfig(parameterization=name).loss for name in NAMES] == ["epsilon"] * len(NAMES)
    assert ObjectiveConfig(parameterization="v", loss="v").loss == "v"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parameterization": "v_prediction"}, "objective.parameterization: found 'v_prediction'"),
        ({"loss": "noise"}, "objective.loss: found 'noise'"),
        ({"weight": "snr"}, "objective.weight: found 'snr'"),
        ({"timestep_sampling": "cosine"}, "objective.timestep_sampling: found 'cosine'"),
        ({"min_snr_gamma": 0.0}, "objective.min_snr_gamma: found 0.0"),
        ({"logit_std": math.nan}, "objective.logit_std: found nan"),
    ],
)
def test_wrong_settings_are_errors_that_name_the_field(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**settings)


def test_the_settings_help_names_the_tables_entries() -> None:
    hints = get_type_hints(ObjectiveConfig)
    tables = {
        "parameterization": TARGETS,
        "weight": WEIGHTS,
        "timestep_sampling": TIMESTEP_SAMPLING,
        "distance": DISTANCES,
    }
    for name, table in tables.items():
        assert [*get_args(hints[name])] == [*table]
