"""Measures samplers against diffusers' schedulers: time outside the network, for a network that costs nothing.

In: nothing. Out: a table on standard output, and records of it as JSON with versions and machine (`--json FILE`): for
each sampler that both have, milliseconds of a run from pure noise to latents, spacing and guidance included, without
what the network's calls and the draws of noise cost by themselves, which both libraries take from the same functions.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from bench_record import Record, about, write_records
from torch import Tensor, nn

from ldm.diffusion.denoiser import denoiser
from ldm.diffusion.guidance import guided
from ldm.diffusion.sampler_contract import Noise, start
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.diffusion.spacing import sigmas
from ldm.models.conditioning import Conditioning

SHAPE = (4, 64, 64)
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# Scheduler's name in diffusers, its settings, whether it adds noise
SHARED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, True),
    "ddim": (
        "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}, False,
    ),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, False),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, True),
    "heun": ("HeunDiscreteScheduler", {"timestep_spacing": "trailing"}, False),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, False),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing", "solver_order": 3}, False),
    "dpmpp_2m_sde": (
        "DPMSolverMultistepScheduler", {"timestep_spacing": "trailing", "algorithm_type": "sde-dpmsolver++"}, True,
    ),
    "unipc": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}, False),
}  # fmt: skip
DIFFERENT = {"dpmpp_3m"}
"""Samplers whose results differ on purpose (see their docstrings)."""


class Fixed(nn.Module):
    """A float32 network that returns one prediction, or half of its input, and counts its calls."""

    def __init__(self, prediction: Tensor | None) -> None:
        super().__init__()
        self.dtype_of = nn.Parameter(torch.zeros(()))
        self.prediction, self.calls = prediction, 0

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning | None) -> Tensor:
        self.calls += 1
        return 0.5 * x if self.prediction is None else self.prediction


@cache
def schedule() -> Schedule:
    """Stable Diffusion's."""
    return Schedule(ScheduleConfig())


@cache
def scheduler(name: str) -> Any:
    """diffusers' counterpart of a sampler."""
    import diffusers

    kind, settings, _ = SHARED[name]
    return getattr(diffusers, kind)(**STABLE_DIFFUSION, **settings)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools/bench_samplers.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="steps of a run (20)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="samples of a batch (1 8)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds, of which median and range are told")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale; 1 is without (1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="file for the records")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, runs = about(options.device), []
    for batch in options.batches:
        for name in SHARED:
            runs.append(
                compare(name, options.steps, batch, options.rounds, torch.device(options.device), options.guidance)
            )
            print(line(runs[-1]), flush=True)
    if options.json is not None:
        shared = {"steps": options.steps, "shape": SHAPE, "guidance": options.guidance}
        write_records(options.json, [record(run, shared) for run in runs], found)
    return 0


def compare(
    name: str, steps: int, batch: int, rounds: int, device: torch.device, guidance: float = 1.0
) -> dict[str, Any]:
    """Milliseconds of ours and of theirs in `rounds` interleaved rounds, after their outputs were compared."""
    generator = torch.Generator(device=device).manual_seed(7)
    z = torch.randn((batch, *SHAPE), generator=generator, device=device)
    both = batch if guidance == 1 else 2 * batch
    prediction = torch.randn((both, *SHAPE), generator=generator, device=device)

    half = Fixed(None).to(device)
    difference = (ours(name, half, z, steps, guidance) - theirs(name, half, z, steps, guidance)).abs().max().item()
    if name not in DIFFERENT and not difference < 1e-4:
        raise RuntimeError(f"{name}: outputs differ by {difference:.3g}, so that times would compare different things")
    runs: dict[str, Callable[[], Tensor]] = {}
    for who, run in (("ours", ours), ("theirs", theirs)):
        nothing = Fixed(prediction).to(device)
        run(name, nothing, z, steps, guidance)
        draws = (steps if who == "theirs" else steps - 1) if SHARED[name][2] else 0  # theirs in the last step too
        runs[who] = partial(run, name, nothing, z, steps, guidance)
        runs[f"{who}_inside"] = partial(inside, nothing, nothing.calls, draws, z)
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, timed in runs.items():
            times[key].append(milliseconds(timed, device))
    return {"sampler": name, "batch": batch, "difference": difference, "milliseconds": times}


def ours(name: str, network: Fixed, z: Tensor, steps: int, guidance: float) -> Tensor:
    """A run of our sampler through the denoiser, float32 in and out, as a pipeline does it."""
    levels, text = sigmas(schedule(), steps), Conditioning(torch.zeros(len(z), 1, 1))
    denoise = guided(denoiser(network, schedule(), "epsilon"), text, text, guidance)
    return SAMPLERS[name](denoise, start(z, levels), levels, noise=fresh_noise(z))


def theirs(name: str, network: Fixed, z: Tensor, steps: int, guidance: float) -> Tensor:
    """The loop of a diffusers pipeline over its scheduler."""
    solver, generator = scheduler(name), torch.Generator(device=z.device).manual_seed(1)
    settings: dict[str, Any] = {"generator": generator} if SHARED[name][2] else {}
    solver.set_timesteps(steps, device=z.device)
    # Some count in variance-exploding coordinates, and start 0.2 % below the deviation of noisy unit data.
    exploding = float(solver.init_noise_sigma) != 1
    x = start(z, solver.sigmas) if exploding else z
    for t in solver.timesteps:
        seen = solver.scale_model_input(x if guidance == 1 else torch.cat([x, x]), t)
        predicted = network(seen, t, None)
        if guidance != 1:
            without, with_text = predicted.chunk(2)
            predicted = without + guidance * (with_text - without)
        x = solver.step(predicted, t, x, **settings).prev_sample
    return x


def inside(network: Fixed, calls: int, draws: int, z: Tensor) -> Tensor:
    """What a run has in common with any other way to do it: the network's calls and the draws."""
    noise = fresh_noise(z)
    for i in range(draws):
        noise(i)
    for _ in range(calls):
        network(z, z, None)
    return z


def fresh_noise(z: Tensor) -> Noise:
    """The same draws as diffusers makes, in the order of the steps."""
    generator = torch.Generator(device=z.device).manual_seed(1)
    return lambda step: torch.randn(z.shape, generator=generator, device=z.device)


def milliseconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """Of one run, the first of two being a warm-up: processor time, or on an accelerator time until it is done."""
    on_host = device.type == "cpu"
    clock = time.process_time if on_host else time.perf_counter
    for _ in range(2):
        begun = clock()
        run()
        if not on_host:
            torch.cuda.synchronize(device)
        taken = clock() - begun
    return 1000 * taken


def outside_network(run: dict[str, Any]) -> dict[str, float]:
    """Median milliseconds of ours and of theirs, without what the network's calls and the draws take."""
    median = {key: statistics.median(values) for key, values in run["milliseconds"].items()}
    return {who: median[who] - median[f"{who}_inside"] for who in ("ours", "theirs")}


def record(run: dict[str, Any], shared: dict[str, Any]) -> Record:
    """The time outside the network as a record, which also has all times that were taken."""
    outside = outside_network(run)
    return Record(
        f"sampler {run['sampler']}, batch {run['batch']}, outside the network",
        outside["ours"],
        outside["theirs"],
        f"diffusers' {SHARED[run['sampler']][0]}",
        "ms",
        difference=run["difference"],
        extra=shared | {name: run[name] for name in ("sampler", "batch", "milliseconds")},
    )


def line(run: dict[str, Any]) -> str:
    """One row: medians of the time outside the network, with the ranges of whole runs, and the ratio of the medians."""
    outside, told = outside_network(run), []
    for who, value in outside.items():
        whole = run["milliseconds"][who]
        told.append(f"{who} {value:6.2f} (whole runs {min(whole):.2f} to {max(whole):.2f})")
    head = f"{run['sampler']:16} batch {run['batch']}"
    return (
        f"{head}  ms: {'  '.join(told)}  ratio {outside['ours'] / outside['theirs']:.2f}  |d| {run['difference']:.1g}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
