"""Denoiser at one level for the whole batch: the definition to rounding, and what it remembers and forgets."""

import copy
import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_denoiser_targets import NOTHING, SCHEDULES, SERVED, SIGMA_DATA
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.diffusion import denoiser as module
from ldm.diffusion.continuous import ContinuousSchedule, ContinuousScheduleConfig
from ldm.diffusion.denoiser import denoiser, predictor
from ldm.diffusion.process import TERMINAL_SIGMA, ForwardProcess
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.diffusion.targets import convert, network_input
from ldm.models.conditioning import Conditioning


class Wave(nn.Module):
    """A network of one dtype whose output depends on what it sees and is told, and which keeps both."""

    def __init__(self, dtype: torch.dtype, channels: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=dtype))
        self.channels = channels
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        self.calls.append((x, time))
        output = torch.sin(self.weight * x + time.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) / 500)
        return torch.cat([output] * self.channels, 1)


def defined(network: Wave, schedule: ForwardProcess, source: str, x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser as its docstring defines it, in float64: the scaled input, the network, then `convert`."""
    level, x = sigma.double(), x.double()
    alpha = schedule.path.alpha(level)
    alpha, noise = (c.view(-1, 1, 1, 1) for c in (alpha, alpha * level))
    seen = network_input(source, alpha * x, alpha, noise, SIGMA_DATA)
    output = network(seen, schedule.network_time(schedule.timestep(level)), NOTHING)[:, : x.shape[1]]
    return convert(output, alpha * x, alpha, noise, source=source, target="x0", sigma_data=SIGMA_DATA)


def assert_defined(network: Wave, schedule: ForwardProcess, source: str, x: Tensor, sigma: Tensor, x0: Tensor) -> None:
    """What the network saw, was told, and what was made of its output: the definition, rounded as often as needed."""
    level, ((seen, told),) = sigma.double(), network.calls
    dtype = network.weight.dtype
    assert seen.dtype == dtype
    assert told.dtype == torch.promote_types(dtype, torch.float32)
    assert x0.dtype == x.dtype
    time = schedule.network_time(schedule.timestep(level))
    assert torch.equal(told, time.to(told.dtype))
    alpha = schedule.path.alpha(level)
    alpha, noise = (c.view(-1, 1, 1, 1) for c in (alpha, alpha * level))
    x_t = alpha * x.double()
    unit = torch.finfo(x.dtype).eps
    expected = network_input(source, x_t, alpha, noise, SIGMA_DATA)
    torch.testing.assert_close(seen.double(), expected, rtol=2 * max(unit, torch.finfo(dtype).eps), atol=0)
    output = network(seen, told, NOTHING)[:, : x.shape[1]].double()
    found, of_x, of_output = (
        convert(o, x, alpha, noise, source=source, target="x0", sigma_data=SIGMA_DATA)
        for o, x in ((output, x_t), (0 * output, x_t), (output, 0 * x_t))
    )
    assert bool(((x0.double() - found).abs() <= 4 * unit * (of_x.abs() + of_output.abs())).all())


def levels(schedule: ForwardProcess, count: int, seed: int) -> Iterator[float]:
    """Levels of a schedule's range: both ends, just within the tolerance beyond, and random ones between."""
    low, high = schedule.sigma_min, schedule.sigma_max
    yield from (low, high, low * (1 - 9e-7), high * (1 + 9e-7))
    ends = math.log(low), math.log(min(high, 1e3))
    yield from np.exp(np.random.default_rng(seed).uniform(*ends, size=count)).tolist()


CASES = [(name, source) for name, served in SERVED.items() for source in served]


@pytest.mark.parametrize(("name", "source"), CASES)
@pytest.mark.parametrize("x_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_one_level_is_the_definition_to_rounding(
    name: str, source: str, x_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    schedule, random = SCHEDULES[name], np.random.default_rng(5)
    with torch.no_grad():
        for i, level in enumerate(levels(schedule, count=12, seed=3)):
            batch, channels = (1, 3, 8, 9)[i % 4], 1 + i % 2
            sigma = torch.full((batch,), level, dtype=torch.float64)
            x = torch.from_numpy(random.normal(size=(batch, 2, 3, 5)) * math.sqrt(1 + level**2)).to(x_dtype)
            network, before = Wave(dtype, channels), x.clone()
            found = predictor(network, schedule, source, SIGMA_DATA)(x, sigma, NOTHING)
            assert_defined(network, schedule, source, x, sigma, found.x0)
            assert (found.raw_variance is None) == (channels == 1)
            assert torch.equal(x, before)


@pytest.mark.parametrize(("name", "source"), CASES)
def test_levels_that_differ_within_a_batch_are_each_the_definition_to_rounding(name: str, source: str) -> None:
    schedule = SCHEDULES[name]
    sigma = torch.tensor([*levels(schedule, count=5, seed=4), schedule.sigma_min], dtype=torch.float64)
    for x_dtype in (torch.float64, torch.float32):
        x = torch.from_numpy(np.random.default_rng(6).normal(size=(len(sigma), 2, 3, 5))).to(x_dtype)
        network = Wave(torch.float32)
        with torch.no_grad():
            found = denoiser(network, schedule, source, SIGMA_DATA)(x, sigma, NOTHING)
            assert_defined(network, schedule, source, x, sigma, found)


@pytest.mark.parametrize("source", SERVED["scaled_linear"])
def test_what_the_network_saw_and_put_out_is_left_as_it_was(source: str) -> None:
    output, x = (torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 2, 3, 3))) for seed in (1, 2))
    outputs = [output, output.clone()]
    seen: list[Tensor] = []

    def network(x: Tensor, *_: object) -> Tensor:
        seen.extend((x, x.clone()))
        return output

    denoiser(network, SCHEDULES["scaled_linear"], source)(x, torch.tensor([2.0]), NOTHING)
    assert torch.equal(*outputs)
    assert torch.equal(*seen)


@pytest.mark.parametrize("source", SERVED["scaled_linear"])
def test_gradients_are_those_of_the_definition(source: str) -> None:
    schedule = SCHEDULES["scaled_linear"]
    for of_sigma in (False, True):
        gradients = []
        for D in (denoiser(Wave(torch.float64), schedule, source, SIGMA_DATA), None):
            x = torch.linspace(-2, 2, 36, dtype=torch.float64).view(2, 2, 3, 3).requires_grad_()
            sigma = torch.full((2,), 1.7, dtype=torch.float64, requires_grad=of_sigma)
            found = D(x, sigma, NOTHING) if D else defined(Wave(torch.float64), schedule, source, x, sigma)
            gradients.append(torch.autograd.grad(found.square().sum(), [x, sigma] if of_sigma else [x]))
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_with_sigma_on_the_cpu_nothing_waits_for_the_device_of_x() -> None:
    # Of a tensor on "meta" there is nothing that could be read back: whatever tries is an error.
    x = torch.empty((2, 2, 3, 3), dtype=torch.float64, device="meta")
    for name, source in CASES:
        network = Wave(torch.float32).to("meta")
        found = denoiser(network, SCHEDULES[name], source)(x, torch.full((2,), 1.5), NOTHING)
        assert (found.device.type, found.shape, found.dtype) == ("meta", x.shape, x.dtype)
        ((seen, told),) = network.calls
        assert {seen.device.type, told.device.type} == {"meta"}


class Operations(TorchDispatchMode):
    """Counts what is done to tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("name", "source"), CASES)
def test_a_level_that_was_seen_costs_a_new_denoiser_few_operations(name: str, source: str) -> None:
    parameters, x, sigma = Wave(torch.float32), torch.randn(1, 2, 3, 3, dtype=torch.float64), torch.tensor([1.234])
    parameters.forward = lambda x, *_: x  # type: ignore[method-assign]
    counts = []
    for _ in range(2):
        with torch.no_grad(), Operations() as operations:
            denoiser(parameters, SCHEDULES[name], source)(x, sigma, NOTHING)
        counts.append(operations.count)
    assert counts[1] <= {"x0": 5, "epsilon": 6}.get(source, 7)


def test_what_is_known_of_a_level_is_that_of_its_schedule_target_data_and_dtype() -> None:
    x = torch.linspace(-2, 2, 18).view(1, 2, 3, 3)
    other = ContinuousSchedule(ContinuousScheduleConfig(kind="vp", beta_max=15.0))
    changed = copy.copy(SCHEDULES["vp"])
    changed.__dict__.update(vars(other))
    for _ in range(2):  # What the first round left behind is there in the second.
        for schedule in (SCHEDULES["vp"], changed, other, SCHEDULES["scaled_linear"]):
            for source in SERVED["vp"]:
                for sigma_data in (0.5, SIGMA_DATA):
                    for x_dtype in (torch.float64, torch.float32):
                        one, two = (torch.tensor(levels) for levels in ([1.5], [1.5, 3.0]))
                        given, network = x.to(x_dtype), Wave(torch.float64)
                        with torch.no_grad():
                            found = denoiser(network, schedule, source, sigma_data)(given, one, NOTHING)
                            # A batch of two levels is not remembered.
                            fresh = denoiser(network, copy.copy(schedule), source, sigma_data)
                            expected = fresh(torch.cat([given] * 2), two, NOTHING)[:1]
                            unit = 8 * torch.finfo(x_dtype).eps
                            torch.testing.assert_close(found, expected, rtol=unit, atol=unit)


def test_a_level_outside_is_an_error_every_time_and_leaves_the_others_as_they_were() -> None:
    network, x = Wave(torch.float32), torch.ones(2, 1, 2, 2)
    D = denoiser(network, SCHEDULES["scaled_linear"], "v")
    for sigma in (15.0, 0.0, -1.0, math.inf, math.nan) * 2:
        D(x, torch.tensor([2.0, 2.0]), NOTHING)
        for levels_given in ([sigma, sigma], [2.0, sigma]):
            with pytest.raises(ValueError, match="expected noise levels from"):
                D(x, torch.tensor(levels_given), NOTHING)
    assert len(network.calls) == 10


def test_what_is_known_goes_with_its_schedule_and_is_bounded() -> None:
    schedule = Schedule(ScheduleConfig(beta_start=0.001))
    D, x = denoiser(lambda x, *_: x, schedule, "v"), torch.ones(1, 1, 2, 2)
    for level in torch.linspace(0.1, 10, 1100).tolist():
        D(x, torch.tensor([level]), NOTHING)
    _, known = module._KNOWN[schedule]
    assert known.cache_info().currsize == known.cache_info().maxsize < 1100  # type: ignore[attr-defined]
    gone, forgotten = weakref.ref(schedule), weakref.ref(known)
    del schedule, D, known
    gc.collect()
    assert gone() is None
    assert forgotten() is None


def test_an_empty_batch_stays_empty() -> None:
    for source in SERVED["scaled_linear"]:
        x, sigma = torch.ones(0, 2, 3, 3), torch.ones(0)
        assert denoiser(lambda x, *_: x, SCHEDULES["scaled_linear"], source)(x, sigma, NOTHING).shape == x.shape


@pytest.mark.parametrize(("name", "source"), [("zero_snr", "v"), ("flow", "flow"), ("flow", "edm")])
def test_at_the_terminal_level_the_start_noise_is_seen_bit_for_bit(name: str, source: str) -> None:
    noise = torch.from_numpy(np.random.default_rng(8).normal(size=(2, 4, 8, 8))).float().double()
    network, level = Wave(torch.float32), torch.full((2,), TERMINAL_SIGMA, dtype=torch.float64)
    with torch.no_grad():
        denoiser(network, SCHEDULES[name], source)(noise * math.sqrt(1 + TERMINAL_SIGMA**2), level, NOTHING)
    ((seen, _),) = network.calls
    assert torch.equal(seen, noise.float())
