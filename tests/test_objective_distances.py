"""Huber distances against torch's, offset noise against its covariance, settings that do not go together."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ldm.diffusion.continuous import ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.objective import DISTANCES, loss_per_sample, with_offset
from ldm.diffusion.objective_config import ObjectiveConfig, check_objective
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.models.conditioning import Conditioning

SCHEDULE = Schedule(ScheduleConfig())
NOTHING = Conditioning(torch.zeros(1, 1, 1))


def normals(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_huber_is_twice_torchs_and_the_square_of_small_errors() -> None:
    error = torch.cat([normals(200, seed=0), 1e-3 * normals(200, seed=1)])
    for c in (0.1, 1.0, 3.0):
        expected = 2 * functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=c)
        torch.testing.assert_close(DISTANCES["huber"](error, c), expected, rtol=1e-12, atol=0)
        pseudo = 2 * c * ((error**2 + c**2).sqrt() - c)
        torch.testing.assert_close(DISTANCES["pseudo_huber"](error, c), pseudo, rtol=1e-7, atol=1e-14)
    for name in DISTANCES:
        small, large = torch.tensor([1e-4], dtype=torch.float64), torch.tensor([1e4], dtype=torch.float64)
        assert DISTANCES[name](small, 0.5).item() == pytest.approx(1e-8, rel=1e-6)
        expected_large = 1e8 if name == "squared" else 2 * 0.5 * 1e4
        assert DISTANCES[name](large, 0.5).item() == pytest.approx(expected_large, rel=1e-3)


def test_pseudo_huber_is_right_in_float32_for_small_errors() -> None:
    error = torch.tensor([1e-5])  # sqrt(1 + d^2) - 1 is 0 in float32
    assert DISTANCES["pseudo_huber"](error, 1.0).item() == pytest.approx(1e-10, rel=1e-5)


@pytest.mark.parametrize("distance", [*DISTANCES])
@pytest.mark.parametrize("loss", ["epsilon", "v", "x0", "flow", "edm"])
def test_the_distance_is_taken_of_the_error_that_loss_names(distance: str, loss: str) -> None:
    x0, noise, weights = normals(3, 2, 3, 3, seed=2), normals(3, 2, 3, 3, seed=3), normals(2, 2, seed=4)
    t = torch.tensor([10, 400, 990])
    alpha, sigma = SCHEDULE.alpha(t).view(-1, 1, 1, 1), SCHEDULE.sigma(t).view(-1, 1, 1, 1)
    x_t = alpha * x0 + sigma * noise
    ours, direct = (weights.clone().requires_grad_() for _ in range(2))
    config = ObjectiveConfig("v", loss, "min_snr", distance=distance, huber_c=0.3)  # type: ignore[arg-type]
    found = loss_per_sample(
        lambda x, *_: torch.einsum("oi,bihw->bohw", ours, x), SCHEDULE, config, x0, noise, t, NOTHING
    )
    v = torch.einsum("oi,bihw->bohw", direct, x_t)
    views = []
    for velocity in (v, alpha * noise - sigma * x0):
        data, unit = alpha * x_t - sigma * velocity, sigma * x_t + alpha * velocity
        views.append({"epsilon": unit, "v": velocity, "x0": data, "flow": unit - data, "edm": -velocity}[loss])
    error = views[0] - views[1]
    c = 0.3
    distances = {
        "squared": error**2,
        "huber": 2 * functional.huber_loss(*views, reduction="none", delta=c),
        "pseudo_huber": 2 * c * ((error**2 + c**2).sqrt() - c),
    }
    snr = (alpha / sigma).flatten() ** 2
    determinant = {
        "epsilon": alpha, "v": torch.ones_like(alpha), "x0": sigma, "flow": alpha + sigma, "edm": torch.ones_like(alpha)
    }[loss].flatten()  # fmt: skip
    weighting = snr.clamp(max=5) * SCHEDULE.sigma(t) ** 2 / determinant**2
    expected = weighting * distances[distance].flatten(1).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, direct.grad, rtol=1e-8, atol=1e-12)


def test_offset_noise_has_its_covariance_within_a_channel_and_none_across() -> None:
    seed, count, strength = 7, 40_000, 0.5
    noise, offset = normals(count, 2, 1, 2, seed=seed), normals(count, 2, seed=seed + 1)
    found = with_offset(noise, offset, ObjectiveConfig(offset_noise=strength)).flatten(1)
    covariance = found.T @ found / count
    block = np.eye(2) + strength**2
    expected = torch.from_numpy(np.kron(np.eye(2), block))
    assert float((covariance - expected).abs().max()) < 4 * 2 / math.sqrt(count), f"seed {seed}, {count} draws"
    assert with_offset(noise, None, ObjectiveConfig()) is noise


def test_loss_with_offset_noise_is_the_residual_of_its_best_predictor() -> None:
    """Gaussian data of unit deviation, n pixels: the noise's covariance is I + s^2 J, and so is what can be known."""
    pixels, strength = 3, 0.8
    t = 600
    alpha, sigma = float(SCHEDULE.alpha(torch.tensor(t))), float(SCHEDULE.sigma(torch.tensor(t)))
    covariance = torch.eye(pixels, dtype=torch.float64) + strength**2
    total = alpha**2 * torch.eye(pixels, dtype=torch.float64) + sigma**2 * covariance
    gain = sigma * covariance @ torch.linalg.inv(total)  # of E[noise | x_t]
    residual = torch.trace(covariance - gain @ (sigma * covariance)).item() / pixels
    # 2 (2 n + 1) equally weighted points in (x0, noise, offset) that integrate every quadratic exactly.
    size = 2 * pixels + 1
    points = torch.cat([torch.eye(size), -torch.eye(size)]).double() * math.sqrt(size)
    x0, noise = points[:, :pixels].reshape(-1, 1, 1, pixels), points[:, pixels:-1].reshape(-1, 1, 1, pixels)
    config = ObjectiveConfig(offset_noise=strength)

    def network(x_t: Tensor, time: Tensor, c: Conditioning) -> Tensor:
        return torch.einsum("ij,bchj->bchi", gain, x_t)

    rows = torch.full((len(x0),), t)
    found = loss_per_sample(network, SCHEDULE, config, x0, noise, rows, NOTHING, offset=points[:, -1:])
    assert found.mean().item() == pytest.approx(residual, rel=1e-10)


def test_offset_noise_without_its_draw_is_an_error() -> None:
    x, t = torch.zeros(2, 4, 2, 2), torch.tensor([3, 4])
    for offset in (None, torch.zeros(2), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match=r"offset_noise is 0\.1: found an offset of shape .* expected one draw"):
            loss_per_sample(
                lambda x, *_: x, SCHEDULE, ObjectiveConfig(offset_noise=0.1), x, x, t, NOTHING, offset=offset
            )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distance": "l1"}, "objective.distance: found 'l1'"),
        ({"huber_c": 0.0}, "objective.huber_c: found 0.0"),
        ({"sigma_data": -1.0}, "objective.sigma_data: found -1.0"),
        ({"p2_k": 0.0}, "objective.p2_k: found 0.0"),
        ({"p2_gamma": -0.5}, "objective.p2_gamma: found -0.5"),
        ({"offset_noise": -0.1}, "objective.offset_noise: found -0.1"),
        ({"vlb_weight": 0.0}, "objective.vlb_weight: found 0.0"),
        ({"log_sigma_std": math.inf}, "objective.log_sigma_std: found inf"),
        ({"log_sigma_mean": math.nan}, "objective.log_sigma_mean: found nan"),
    ],
)
def test_wrong_settings_are_errors_that_name_the_field(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("flow", {"parameterization": "epsilon"}, "found 'epsilon' with zero terminal SNR"),
        ("flow", {"parameterization": "v"}, "found 'v' on a straight process"),
        ("flow", {"parameterization": "flow", "loss": "v"}, "objective.loss: found 'v' on a straight process"),
        ("edm", {"parameterization": "x0", "loss": "x0"}, "found 'x0' on a variance-exploding process"),
        ("vp", {"parameterization": "v", "learned_variance": True}, "schedule of continuous time"),
    ],
)
def test_an_objective_that_its_schedule_cannot_serve_is_an_error(kind: str, settings: dict, message: str) -> None:
    schedule = ContinuousSchedule(ContinuousScheduleConfig(kind=kind))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        check_objective(ObjectiveConfig(**settings), schedule)
