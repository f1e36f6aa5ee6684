"""Bound and log-density of a checkpoint's latents against exact densities, from shards on; draws, batches, damage.

LDM_LIKELIHOOD_SAMPLES: samples of the comparison with the exact density, 48 unless told.
"""

import math
import os
from pathlib import Path

import pytest
import torch
from exact_pipelines import (
    DIMS,
    FACTOR,
    SPREAD,
    Data,
    exact_pipeline,
    joint_mixture,
    narrow,
    nats,
    two_modes,
    write_exact_shards,
)
from tiny_models import make_clip, make_pipeline, tiny_autoencoder
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.diffusion.continuous import ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.objective_config import TargetName
from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.evaluation.latent_likelihood import SampleBound, bounds, densities, elbo_report, ode_report
from ldm.evaluation.latent_samples import LatentBatch, latent_batches, likelihood_seed
from ldm.models.conditioning import Conditioning
from ldm.pipeline.pipeline import Pipeline

COUNT = int(os.environ.get("LDM_LIKELIHOOD_SAMPLES", "48"))
SHARDS = max(64, COUNT)
LN2 = math.log(2)
SD = Schedule(ScheduleConfig())
ZERO_SNR = Schedule(ScheduleConfig(rescale_betas_zero_snr=True))
FEW = Schedule(ScheduleConfig("linear", 0.001, 0.2, 100, rescale_betas_zero_snr=True))
FLOW, EDM, VP = (ContinuousSchedule(ContinuousScheduleConfig(kind)) for kind in ("flow", "edm", "vp"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("encoder") / "clip"
    make_clip(folder)
    return make_pipeline(str(folder), size=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents whose elements are independent, of two modes."""
    folder = tmp_path_factory.mktemp("shards") / "exact"
    write_exact_shards(folder, two_modes(), SHARDS)
    return folder


def refuse(line: str) -> None:
    raise AssertionError(line)


def read(pipeline: Pipeline, shards: Path, samples: int, batch_size: int = 64, seed: int = 0) -> list[LatentBatch]:
    return list(latent_batches(pipeline, shards, samples=samples, seed=seed, batch_size=batch_size, passed_over=refuse))


def exact(data: Data, batches: list[LatentBatch], sigma: float = 0.0) -> Tensor:
    """Minus the log-density of each sample, nats per dimension."""
    return torch.cat([nats(data, batch.latents, batch.conditioning, sigma) for batch in batches])


def totals(found: list[SampleBound]) -> Tensor:
    """In nats per dimension."""
    return torch.tensor([one.total for one in found], dtype=torch.float64) * LN2


@pytest.mark.parametrize(
    ("schedule", "name", "learned", "timesteps"),
    [
        pytest.param(SD, "epsilon", False, 0, id="epsilon, all timesteps"),
        pytest.param(ZERO_SNR, "v", False, 128, id="v, pure noise, 128 timesteps"),
        pytest.param(FEW, "x0", True, 0, id="x0, learned variance"),
        pytest.param(FLOW, "flow", False, 96, id="flow"),
        pytest.param(EDM, "edm", False, 96, id="edm"),
        pytest.param(VP, "v", False, 96, id="vp, continuous"),
    ],
)
def test_the_bound_of_an_exact_network_is_the_exact_log_density_and_not_above_it(
    tiny: Pipeline, shards: Path, schedule: ForwardProcess, name: TargetName, learned: bool, timesteps: int
) -> None:
    """In the mean over the samples within 0.001 nats per dimension, and four standard errors of what noise adds."""
    data = two_modes()
    pipeline = exact_pipeline(tiny, data, schedule, name, learned=learned)
    batches = read(pipeline, shards, COUNT)
    found = bounds(pipeline, batches, timesteps=timesteps, seed=0)
    above = totals(found) - exact(data, batches)
    mean, error = float(above.mean()), float(above.std()) / math.sqrt(COUNT)
    print(f"{name}: {COUNT} samples, bound less exact {mean:.5f} +- {error:.5f} nats per dimension")
    assert error < 0.035 / math.sqrt(COUNT)
    assert mean > -4 * error, "seed 0"
    assert mean < 0.001 + 4 * error, "seed 0"
    report = elbo_report(pipeline, found, timesteps)
    assert report["bits_per_dimension"] == pytest.approx(float(totals(found).mean()) / LN2)
    assert report["nats_per_dimension"] == pytest.approx(float(totals(found).mean()))
    # z = x / 0.7: its density is 0.7 times that of x, for each element.
    assert report["unscaled_bits_per_dimension"] == pytest.approx(report["bits_per_dimension"] - math.log2(FACTOR))
    parts = report["L_T"] + report["L_between"] + report["L_0"]
    assert parts == pytest.approx(report["bits_per_dimension"])
    assert sum(level["bits_per_dimension"] for level in report["levels"]) == pytest.approx(report["L_between"])
    assert sum(report["L_between_by_quarter_of_the_noise"]) == pytest.approx(report["L_between"])
    edges = [level["from_sigma"] for level in report["levels"]] + [report["levels"][-1]["to_sigma"]]
    assert edges == sorted(edges)
    assert (edges[0], edges[-1]) == pytest.approx((schedule.sigma_min, schedule.sigma_max))


def test_a_network_that_learned_the_best_variance_has_a_better_bound(tiny: Pipeline, tmp_path: Path) -> None:
    """Of the same samples and noises, narrow and with few steps, so that much is to be gained."""
    write_exact_shards(tmp_path / "narrow", narrow(), 64)
    schedule, found = Schedule(ScheduleConfig("linear", 0.02, 0.6, 12)), []
    for learned in (False, True):
        pipeline = exact_pipeline(tiny, narrow(), schedule, "v", learned=learned)
        found.append(bounds(pipeline, read(pipeline, tmp_path / "narrow", 64), timesteps=0, seed=0))
        assert elbo_report(pipeline, found[-1], 0)["variance"] == ("learned" if learned else "beta")
    gained = totals(found[0]) - totals(found[1])
    assert float(gained.mean()) > 6 * float(gained.std()) / math.sqrt(64), "seed 0"


def test_latents_are_drawn_once_from_their_posteriors_and_scaled_once(tiny: Pipeline, shards: Path) -> None:
    """By their exact entropy: without the posterior's noise it would be lower by 0.05 nats per dimension."""
    data = two_modes()
    pipeline = exact_pipeline(tiny, data, ZERO_SNR, "v")
    drawn = exact(data, read(pipeline, shards, SHARDS))
    entropy = nats(data, data.sample(20_000, seed=1).view(-1, 4, 2, 2), _without_caption(20_000))
    assert abs(float(drawn.mean() - entropy.mean())) < 4 * float(entropy.std()) / math.sqrt(len(drawn))
    first = read(pipeline, shards, SHARDS)
    assert all(batch.numbers == [int(key.split("/")[1]) for key in batch.keys] for batch in first)
    moved = torch.cat([batch.latents - batch.conditioning.text[:, :1, :1, None] for batch in first])
    variance = 0.6 * (0.25 + 0.36) + 0.4 * (0.49 + 0.81)
    assert float(moved.square().mean()) == pytest.approx(variance, abs=4 * 1.2 * variance / math.sqrt(SHARDS * DIMS))
    rows, again = (rows_of(batches) for batches in (first, read(pipeline, shards, SHARDS, seed=1)))
    other = torch.stack([again[key] - row for key, row in rows.items()])
    assert likelihood_seed(0) != 0, "the draws of a training with this seed"
    # Two draws of one posterior: their difference has twice its variance.
    assert float(other.square().mean().sqrt()) == pytest.approx(math.sqrt(2) * FACTOR * SPREAD, rel=0.1)


def rows_of(batches: list[LatentBatch]) -> dict[str, Tensor]:
    """Latents by key, of all samples that there are."""
    return {key: row for batch in batches for key, row in zip(batch.keys, batch.latents, strict=True)}


def _without_caption(count: int) -> Conditioning:
    return Conditioning(torch.zeros(count, 1, 1))


def test_l_t_is_torchs_divergence_from_the_prior(tiny: Pipeline, shards: Path) -> None:
    pipeline = exact_pipeline(tiny, two_modes(), SD, "v")
    batches = read(pipeline, shards, 8)
    found = bounds(pipeline, batches, timesteps=4, seed=0)
    alpha, sigma = SD.alpha(torch.tensor(999)), SD.sigma(torch.tensor(999))
    divergence = kl_divergence(Normal(alpha * batches[0].latents.double(), sigma), Normal(0 * alpha, 1.0))
    bits = divergence.flatten(1).mean(1) / LN2
    torch.testing.assert_close(torch.tensor([one.prior for one in found], dtype=torch.float64), bits)
    assert float(bits.mean()) > 0.001


def test_drawn_timesteps_estimate_the_sum_over_all(tiny: Pipeline, shards: Path) -> None:
    pipeline = exact_pipeline(tiny, two_modes(), FEW, "v")
    batches = read(pipeline, shards, SHARDS)
    whole, some = (bounds(pipeline, batches, timesteps=timesteps, seed=0) for timesteps in (0, 16))
    difference = totals(some) - totals(whole)
    error = float(difference.std()) / math.sqrt(SHARDS)
    assert error < 0.02
    assert abs(float(difference.mean())) < 4 * error, "seed 0"
    for q in range(4):
        parts = [torch.tensor([one.quarters[q] for one in found], dtype=torch.float64) for found in (some, whole)]
        difference = parts[0] - parts[1]
        # Of the last quarter, where 0.002 bits are lost, hardly a sample draws a timestep.
        tolerated = 0.01 if q == 3 else 4 * float(difference.std()) / math.sqrt(SHARDS)
        assert abs(float(difference.mean())) < tolerated, f"seed 0, quarter {q}"
    # The reported error is that of the mean over samples.
    report = elbo_report(pipeline, some, 16)
    assert report["standard_error"] == pytest.approx(float(totals(some).std()) / LN2 / math.sqrt(SHARDS))


@pytest.mark.parametrize(
    ("schedule", "name", "tolerated"),
    [
        pytest.param(ZERO_SNR, "v", 3e-4, id="v, pure noise"),
        pytest.param(FLOW, "flow", 3e-4, id="flow"),
        # A finite highest level leaves what the prior misses, which goes out of the mean.
        pytest.param(SD, "epsilon", 2e-2, id="epsilon"),
        pytest.param(EDM, "edm", 4e-3, id="edm"),
    ],
)
def test_the_ode_gives_the_exact_log_density_of_each_sample(
    tiny: Pipeline, shards: Path, schedule: ForwardProcess, name: TargetName, tolerated: float
) -> None:
    """Of independent elements, whose trace any Rademacher probe gives exactly, in nats per dimension."""
    data = two_modes()
    pipeline = exact_pipeline(tiny, data, schedule, name)
    batches = read(pipeline, shards, COUNT)
    found = densities(pipeline, batches, probes=2, tolerance=1e-4, seed=0)
    errors = torch.tensor([one.bits_per_dimension for one in found]) * LN2 - exact(data, batches, schedule.sigma_min)
    assert float(errors.abs().max()) < tolerated
    assert abs(float(errors.mean())) < 0.001 + 4 * float(errors.std()) / math.sqrt(COUNT)
    # Taken at the data themselves, which have no noise of the lowest level, the mean is the same.
    clean = torch.tensor([one.bits_per_dimension for one in found]) * LN2 - exact(data, batches)
    assert abs(float(clean.mean())) < 0.001 + 4 * float(errors.std()) / math.sqrt(COUNT)
    report = ode_report(pipeline, found, 2)
    assert report["unscaled_bits_per_dimension"] == pytest.approx(report["bits_per_dimension"] - math.log2(FACTOR))
    assert report["standard_error_of_probes"] == pytest.approx(0, abs=1e-5)


def test_hutchinsons_probes_are_within_their_stated_error(tiny: Pipeline, tmp_path: Path) -> None:
    data = joint_mixture()
    write_exact_shards(tmp_path / "joint", data, 32)
    pipeline = exact_pipeline(tiny, data, ZERO_SNR, "v")
    batches = read(pipeline, tmp_path / "joint", 32)
    found = densities(pipeline, batches, probes=24, tolerance=1e-4, seed=0)
    errors = torch.tensor([one.bits_per_dimension for one in found]) - exact(data, batches, ZERO_SNR.sigma_min) / LN2
    stated = torch.tensor([one.probe_error or 0 for one in found])
    assert abs(float(errors.mean())) < 4 * ode_report(pipeline, found, 24)["standard_error_of_probes"], "seed 0"
    assert 0.5 < float((errors / stated).square().mean()) < 2, "seed 0"
    one = densities(pipeline, batches[:1], probes=1, tolerance=1e-2, seed=0)
    assert one[0].probe_error is None
    assert ode_report(pipeline, one, 1)["standard_error_of_probes"] is None


def test_a_samples_numbers_do_not_depend_on_batches_and_other_samples(tiny: Pipeline, tmp_path: Path) -> None:
    """Of a joint mixture, whose density by the ODE tells one probe from another."""
    write_exact_shards(tmp_path / "joint", joint_mixture(), 16)
    pipeline = exact_pipeline(tiny, joint_mixture(), ZERO_SNR, "v")
    by_batch = {}
    for size in (1, 3, 8):
        batches = read(pipeline, tmp_path / "joint", 8, size)
        elbos = bounds(pipeline, batches, timesteps=12, seed=5)
        odes = densities(pipeline, batches, probes=2, tolerance=1e-5, seed=5)
        by_batch[size] = {
            bound.key: (bound.caption, bound.total, density.bits_per_dimension, density.evaluations)
            for bound, density in zip(elbos, odes, strict=True)
        }
    assert by_batch[1].keys() == by_batch[3].keys() == by_batch[8].keys()
    assert len({evaluations for *_, evaluations in by_batch[8].values()}) > 1
    for key, (caption, *numbers) in by_batch[1].items():
        assert caption == f"caption {int(key.split('/')[1])}"
        for size in (3, 8):
            assert list(by_batch[size][key][1:]) == pytest.approx(numbers, rel=1e-9)
    other = bounds(pipeline, read(pipeline, tmp_path / "joint", 8, 8), timesteps=12, seed=6)
    assert all(one.total != by_batch[8][one.key][1] for one in other)


def test_damaged_samples_are_passed_over_and_said_and_the_others_keep_their_numbers(
    tiny: Pipeline, tmp_path: Path
) -> None:
    data = two_modes()
    write_exact_shards(tmp_path / "whole", data, 12)
    write_exact_shards(tmp_path / "damaged", data, 12, damaged=(2, 7))
    pipeline = exact_pipeline(tiny, data, ZERO_SNR, "v")
    lines: list[str] = []
    batches = list(
        latent_batches(pipeline, tmp_path / "damaged", samples=12, seed=3, batch_size=4, passed_over=lines.append)
    )
    assert sorted(line.split("/")[1] for line in lines) == [
        "0002: member .moments.npy holds NaN or infinity",
        "0007: member .moments.npy holds NaN or infinity",
    ]
    found = {one.key: one.total for one in bounds(pipeline, batches, timesteps=8, seed=3)}
    whole = {
        one.key: one.total
        for one in bounds(pipeline, read(pipeline, tmp_path / "whole", 12, seed=3), timesteps=8, seed=3)
    }
    assert len(found) == 10
    assert found == pytest.approx({key: whole[key] for key in found}, rel=1e-9)
    # Fewer than there are: damaged ones cost others no place.
    few = list(
        latent_batches(pipeline, tmp_path / "damaged", samples=9, seed=3, batch_size=4, passed_over=lines.append)
    )
    assert sum(len(batch.keys) for batch in few) == 9


def test_what_has_no_likelihood_is_refused(tiny: Pipeline, shards: Path) -> None:
    flow = exact_pipeline(tiny, two_modes(), FLOW, "flow")
    with pytest.raises(ValueError, match="timesteps: found 0, every one, expected 1 or more"):
        bounds(flow, [], timesteps=0, seed=0)
    inpainting = make_pipeline(str(tiny.text_encoder.encoders[0].config.source), size=2, inpainting=True)
    for score in (
        lambda: bounds(inpainting, [], timesteps=1, seed=0),
        lambda: densities(inpainting, [], probes=1, tolerance=1.0, seed=0),
    ):
        with pytest.raises(ValueError, match="in_channels is 9: an inpainting network"):
            score()
    lower = exact_pipeline(tiny, two_modes(), FLOW, "flow")
    lower.dtype = torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype: found torch\.bfloat16, expected float32"):
        densities(lower, [], probes=1, tolerance=1.0, seed=0)


def test_latents_of_another_autoencoder_are_refused(tiny: Pipeline, tmp_path: Path) -> None:
    from ldm.data.encoding import EncodingConfig, encoder_identity
    from ldm.data.manifest import build_manifest

    write_exact_shards(tmp_path / "exact", two_modes(), 4)
    other = tiny_autoencoder(sample_size=4, scaling_factor=0.6)
    for autoencoder, fits in ((tiny.autoencoder, True), (other, False)):
        identity = encoder_identity(autoencoder, tiny.text_encoder, 4, EncodingConfig(), text_states=False)
        build_manifest(tmp_path / "exact", identity, progress=False)
        if fits:
            assert len(read(tiny, tmp_path / "exact", 4)[0].keys) == 4
            continue
        with pytest.raises(
            ValueError, match=r"does not belong to this checkpoint:\s+the shards were encoded with autoenc"
        ):
            read(tiny, tmp_path / "exact", 4)
