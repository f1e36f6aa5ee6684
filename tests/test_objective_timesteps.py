"""Stratified and log-normal times: one sample a stratum in each global batch, whoever draws it; exact distributions."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from ldm.data.draws import Purpose, uniforms
from ldm.data.positions import Positions
from ldm.diffusion.continuous import ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.objective_config import ObjectiveConfig
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.diffusion.timesteps import stratified, timesteps

SCHEDULE = Schedule(ScheduleConfig())
BATCHES = [1, 2, 3, 4, 7, 8, 12, 30, 32, 97, 256, 1000, 2048]


def strata(draws: torch.Tensor, batch: int) -> list[int]:
    """Part of [0, 1) that each draw lies in, by its bounds."""
    bounds = (torch.arange(1, batch + 1, dtype=torch.float64)) / batch
    return torch.searchsorted(bounds, draws, right=True).tolist()


@pytest.mark.parametrize("batch", BATCHES)
def test_each_global_batch_has_exactly_one_draw_in_each_part(batch: int) -> None:
    for step in (0, 1, 2, 1_000_003):
        positions = torch.arange(step * batch, (step + 1) * batch)
        below_one = torch.full((batch,), math.nextafter(1.0, 0.0), dtype=torch.float64)
        for u in (torch.zeros_like(below_one), below_one, torch.from_numpy(np.random.default_rng(step).random(batch))):
            assert sorted(strata(stratified(u, positions, batch), batch)) == [*range(batch)]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (8, 1)])
def test_times_of_a_global_batch_do_not_depend_on_processes_or_accumulation(world: int, accumulation: int) -> None:
    batch, seed = 32, 5
    config = ObjectiveConfig(stratified=True)
    for step in (0, 9):
        expected = {}
        for p in range(step * batch, (step + 1) * batch):
            u = torch.from_numpy(uniforms(seed, [Purpose.TIMESTEP], np.array([p]))[0])
            expected[p] = timesteps(u, SCHEDULE, config, torch.tensor([p]), batch).item()
        found = {}
        for rank in range(world):
            share = Positions(
                rank=rank, world=world, micro_batch=batch // world // accumulation, accumulation=accumulation,
                start_step=step, stop_step=step + 1,
            )  # fmt: skip
            for part in share:
                u = torch.from_numpy(uniforms(seed, [Purpose.TIMESTEP], np.array(part))[0])
                t = timesteps(u, SCHEDULE, config, torch.tensor(part), batch)
                found.update(zip(part, t.tolist(), strict=True))
        assert found == expected
        assert sorted(t * batch // 1000 for t in found.values()) == [*range(batch)]


def test_a_process_s_share_covers_the_range_and_a_place_gets_every_part() -> None:
    batch = 64
    half = torch.full((batch,), 0.5, dtype=torch.float64)
    share = stratified(half[:16], torch.arange(16), batch).sort().values
    assert float(share.diff().max()) < 0.13
    places = stratified(half, torch.arange(batch) * batch + 5, batch)
    assert sorted(strata(places, batch)) == [*range(batch)]


def test_the_variance_of_a_batch_s_mean_falls_as_of_one_sample_a_stratum() -> None:
    """The mean of t^2 over 16 samples: stratified, its variance is about the within-stratum one."""
    seed, batch, trials = 11, 16, 4000
    u = torch.from_numpy(np.random.default_rng(seed).random(batch * trials))
    positions = torch.arange(batch * trials)
    means = stratified(u, positions, batch).square().view(trials, batch).mean(1)
    edges = np.arange(batch + 1) / batch
    moments = [np.diff(edges ** (k + 1)) / (k + 1) * batch for k in (2, 4)]
    expected = (moments[1] - moments[0] ** 2).sum() / batch**2
    assert float(means.mean()) == pytest.approx(1 / 3, abs=4 * math.sqrt(expected / trials)), f"seed {seed}"
    # The variance of a sample variance of 4000 is 2.2 % of it.
    assert float(means.var()) == pytest.approx(expected, rel=0.1), f"seed {seed}"
    assert expected < (1 / 5 - 1 / 9) / batch / 100


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "log_normal"])
def test_stratified_draws_keep_each_distribution(sampling: str) -> None:
    batch, steps = 8, 2500
    plain = ObjectiveConfig(timestep_sampling=sampling)  # type: ignore[arg-type]
    config = ObjectiveConfig(timestep_sampling=sampling, stratified=True)  # type: ignore[arg-type]
    seed = 3
    u = torch.from_numpy(np.random.default_rng(seed).random(batch * steps))
    found = timesteps(u, SCHEDULE, config, torch.arange(batch * steps), batch).sort().values
    grid = (torch.arange(batch * steps, dtype=torch.float64) + 0.5) / (batch * steps)
    expected = timesteps(grid, SCHEDULE, plain).sort().values
    assert float((found - expected).abs().double().mean()) < 6, f"seed {seed}"


def test_log_normal_levels_have_a_normal_logarithm() -> None:
    count = 20_000
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    config = ObjectiveConfig(timestep_sampling="log_normal", log_sigma_mean=-1.2, log_sigma_std=1.2)
    edm = ContinuousSchedule(ContinuousScheduleConfig(kind="edm"))
    normal = NormalDist(-1.2, 1.2)
    for schedule in (edm, SCHEDULE, ContinuousSchedule(ContinuousScheduleConfig(kind="flow"))):
        level = schedule.sigma_hat(timesteps(u, schedule, config))
        for threshold in (0.1, 0.3, 1.0, 5.0):
            share = (level < threshold).double().mean().item()
            # A discrete schedule rounds to its levels, about 1 % apart there.
            assert share == pytest.approx(normal.cdf(math.log(threshold)), abs=0.01 if schedule is SCHEDULE else 1e-4)
    ends = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    far = ObjectiveConfig(timestep_sampling="log_normal", log_sigma_std=50.0)
    assert timesteps(ends, SCHEDULE, far).tolist() == [0, 999]
    assert timesteps(ends, edm, far).tolist() == pytest.approx([0.002, 80], rel=1e-12)


def test_times_of_a_continuous_schedule_are_within_it_at_both_ends() -> None:
    ends = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    for kind in ("vp", "cosine", "flow", "edm"):
        schedule = ContinuousSchedule(ContinuousScheduleConfig(kind=kind))  # type: ignore[arg-type]
        for sampling in ("uniform", "logit_normal", "log_normal"):
            t = timesteps(ends, schedule, ObjectiveConfig(timestep_sampling=sampling))  # type: ignore[arg-type]
            assert t.dtype == torch.float64
            assert schedule.t_min <= t[0] < t[1] <= schedule.t_max
            schedule.alpha(t)


def test_stratified_sampling_without_a_place_in_the_batch_is_an_error() -> None:
    u = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="given no positions and global_batch"):
        timesteps(u, SCHEDULE, ObjectiveConfig(stratified=True))
    with pytest.raises(ValueError, match="global_batch: found 0"):
        timesteps(u, SCHEDULE, ObjectiveConfig(stratified=True), torch.arange(2), 0)


def test_stratifying_never_waits_for_the_device() -> None:
    u, positions = torch.zeros(4, dtype=torch.float64, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    assert stratified(u, positions, 32).shape == (4,)
