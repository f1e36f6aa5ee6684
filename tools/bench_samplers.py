"""Measures samplers against diffusers' schedulers: time outside the network, for a network that costs nothing.

In: nothing. Out: a table on standard output, and the same as JSON with versions and machine (`--json FILE`): for each
sampler that both have, milliseconds of a run, and their ratio; both from pure noise to latents, spacing included.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.denoiser import denoiser
from ldm.diffusion.guidance import unguided
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
    """A float32 network that returns one prediction, or half of its input."""

    def __init__(self, prediction: Tensor | None) -> None:
        super().__init__()
        self.dtype_of = nn.Parameter(torch.zeros(()))
        self.prediction = prediction

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning | None) -> Tensor:
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
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"about": about(options.device), "steps": options.steps, "shape": SHAPE, "runs": []}
    for batch in options.batches:
        for name in SHARED:
            results["runs"].append(compare(name, options.steps, batch, options.rounds, torch.device(options.device)))
            print(line(results["runs"][-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(name: str, steps: int, batch: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of ours and of theirs in `rounds` interleaved rounds, after their outputs were compared."""
    generator = torch.Generator(device=device).manual_seed(7)
    z = torch.randn((batch, *SHAPE), generator=generator, device=device)
    prediction = torch.randn((batch, *SHAPE), generator=generator, device=device)

    half, nothing = Fixed(None).to(device), Fixed(prediction).to(device)
    difference = (ours(name, half, z, steps) - theirs(name, half, z, steps)).abs().max().item()
    if name not in DIFFERENT and not difference < 1e-4:
        raise RuntimeError(f"{name}: outputs differ by {difference:.3g}, so that times would compare different things")
    run_ours, run_theirs = partial(ours, name, nothing, z, steps), partial(theirs, name, nothing, z, steps)
    run_alone = partial(alone, name, prediction, z, steps)
    times: dict[str, list[float]] = {"ours": [], "theirs": [], "sampler_alone": []}
    for _ in range(rounds):
        for key, run in (("ours", run_ours), ("theirs", run_theirs), ("sampler_alone", run_alone)):
            times[key].append(milliseconds(run, device))
    return {"sampler": name, "batch": batch, "difference": difference, "milliseconds": times}


def ours(name: str, network: Fixed, z: Tensor, steps: int) -> Tensor:
    """A run of our sampler through the denoiser, float32 in and out, as a pipeline does it."""
    levels = sigmas(schedule(), steps)
    denoise = unguided(denoiser(network, schedule(), "epsilon"), Conditioning(torch.zeros(len(z), 1, 1)))
    return SAMPLERS[name](denoise, start(z, levels), levels, noise=fresh_noise(z)).float()


def alone(name: str, denoised: Tensor, z: Tensor, steps: int) -> Tensor:
    """The sampler's own arithmetic: the denoiser returns one tensor."""
    levels, denoised = sigmas(schedule(), steps), denoised.double()
    return SAMPLERS[name](lambda x, sigma: denoised, start(z, levels), levels, noise=fresh_noise(z))


def theirs(name: str, network: Fixed, z: Tensor, steps: int) -> Tensor:
    """The loop of a diffusers pipeline over its scheduler."""
    solver, generator = scheduler(name), torch.Generator(device=z.device).manual_seed(1)
    settings: dict[str, Any] = {"generator": generator} if SHARED[name][2] else {}
    solver.set_timesteps(steps, device=z.device)
    # Some count in variance-exploding coordinates, and start 0.2 % below the deviation of noisy unit data.
    exploding = float(solver.init_noise_sigma) != 1
    x = start(z, solver.sigmas).float() if exploding else z
    for t in solver.timesteps:
        x = solver.step(network(solver.scale_model_input(x, t), t, None), t, x, **settings).prev_sample
    return x


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


def line(run: dict[str, Any]) -> str:
    """One row: medians with ranges, and the ratio of the medians."""
    told = []
    for key in ("ours", "theirs", "sampler_alone"):
        values = run["milliseconds"][key]
        told.append(f"{key} {statistics.median(values):7.2f} ({min(values):.2f} to {max(values):.2f})")
    ratio = statistics.median(run["milliseconds"]["theirs"]) / statistics.median(run["milliseconds"]["ours"])
    head = f"{run['sampler']:16} batch {run['batch']}"
    return f"{head}  ms: {'  '.join(told)}  {ratio:5.1f} times  |d| {run['difference']:.1g}"


def about(device: str) -> dict[str, Any]:
    """Versions and machine, so that figures can be placed later."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
