"""The sampling program's defaults on every kind of noise, against the exact solution of an exact denoiser."""

import pytest
import torch
from exact_mixtures import mixture

from ldm.diffusion.continuous import ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.sampler_choice import chosen_sampler
from ldm.diffusion.sampler_contract import start
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.diffusion.spacing import SPACINGS, sigmas
from ldm.sample import make_parser

SCHEDULES: dict[str, ForwardProcess] = {
    "flow": ContinuousSchedule(ContinuousScheduleConfig(kind="flow")),
    "edm": ContinuousSchedule(ContinuousScheduleConfig(kind="edm")),
    "sigmoid": Schedule(ScheduleConfig(beta_schedule="sigmoid", beta_start=1e-4, beta_end=0.02)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_with_the_default_sampler_and_steps_no_spacing_is_much_better_than_the_default(name: str) -> None:
    options = make_parser().parse_args(["--checkpoint=x", "--out=x"])
    sampler = chosen_sampler(options.sampler, None)
    schedule, data = SCHEDULES[name], mixture(16)
    noise = torch.randn(64, 16, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fine = sigmas(schedule, 500)
    exact = SAMPLERS["heun"](data.denoise, start(noise, fine), fine)

    def error(spacing: str) -> float:
        levels = sigmas(schedule, options.steps, spacing)
        x = SAMPLERS[sampler](data.denoise, start(noise, levels), levels)
        return float((x - exact).square().mean().sqrt())

    errors = {}
    for spacing in SPACINGS:
        try:
            errors[spacing] = error(spacing)
        except ValueError as refusal:  # of whole timesteps, or of finite levels
            assert "use trailing" in str(refusal)  # noqa: PT017
    print(f"\n{name}: " + ", ".join(f"{spacing} {value:.4f}" for spacing, value in sorted(errors.items())))
    assert errors[options.spacing] < 0.03  # of data of about unit deviation
    assert errors[options.spacing] <= 1.5 * min(errors.values())
