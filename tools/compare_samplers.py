"""Draws the same prompts with every sampler at about equal numbers of network evaluations, a row a sampler.

In: a checkpoint, as ldm/sample.py takes it, and prompts. Out: a labelled PNG (`--out FILE`), and on standard output
each sampler's evaluations and how far its pictures are from the exact solution: the same noise in many steps.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm.diffusion.samplers import OF_NOISE_ALONE, STOCHASTIC
from ldm.diffusion.separate_steps import ToleranceError
from ldm.diffusion.spacing import SPACINGS
from ldm.grid import labelled_grid, save_png
from ldm.models.text_encoder import DTYPES
from ldm.pipeline.pipeline import Pipeline
from ldm.sampling.generation import generate
from ldm.sampling.options import choose_device, finite, open_checkpoint, whole
from ldm.training.checkpoint import CheckpointError

PER_STEP = {"heun": 2, "dpm_solver_2": 2, "dpm_solver_3": 3, "predictor_corrector": 2}
"""Evaluations of a step, of which the last has one; other samplers have one in each."""
FIXED_STEPS = {"ode_adaptive": 20, "annealed_langevin": 2}
"""Samplers whose evaluations follow from a tolerance, or from a hundred at each level: they say how many they took."""
EXACT = ("dpmpp_3m", 100)
"""Sampler and steps that stand for the exact solution of the probability-flow ODE."""
PROMPTS = ("red heart", "green apple", "a black cat", "flag of France", "orange circle", "sports car")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = make_parser()
    options = parser.parse_args(argv)
    prompts = options.prompt or [*PROMPTS]
    try:
        pipeline, name = open_checkpoint(options.checkpoint, choose_device(options.device), DTYPES[options.dtype])
        rows: list[np.ndarray] = []
        labels: list[str] = []
        exact, _ = draw(pipeline, prompts, *EXACT, options)
        for sampler in options.samplers:
            steps = steps_for(sampler, options.evaluations)
            pictures, evaluations = draw(pipeline, prompts, sampler, steps, options)
            rows.append(pictures)
            labels += [f"{sampler} ({evaluations}): {prompt}" for prompt in prompts]
            print(line(sampler, steps, evaluations, pictures, exact), flush=True)
        rows.append(exact)
        labels += [f"{EXACT[0]}, {EXACT[1]} steps: {prompt}" for prompt in prompts]
        texts = {"checkpoint": name, "seed": str(options.seed), "guidance": str(options.guidance)}
        save_png(labelled_grid(np.concatenate(rows), labels, columns=len(prompts)), options.out, texts)
    except (OSError, ValueError, ToleranceError, CheckpointError) as error:
        parser.error(str(error))
    print(options.out)
    return 0


def steps_for(sampler: str, evaluations: int) -> int:
    """The most steps that take no more than so many evaluations, 1 at least."""
    per_step = PER_STEP.get(sampler, 1)
    return FIXED_STEPS.get(sampler) or max(1, (evaluations + per_step - 1) // per_step)


def draw(
    pipeline: Pipeline, prompts: Sequence[str], sampler: str, steps: int, options: argparse.Namespace
) -> tuple[np.ndarray, int]:
    """Pictures (N, H, W, 3) uint8, of noise that is the same for each sampler, and the network's evaluations."""
    asked = 0

    def count(*_: object) -> None:
        nonlocal asked
        asked += 1

    hook = pipeline.unet.register_forward_hook(count)
    try:
        pictures = generate(
            pipeline,
            prompts,
            seed=options.seed,
            sampler=sampler,
            steps=steps,
            spacing=options.spacing,
            guidance=options.guidance,
            batch_size=len(prompts),
        )
    finally:
        hook.remove()
    return pictures, asked


def line(sampler: str, steps: int, evaluations: int, pictures: np.ndarray, exact: np.ndarray) -> str:
    """One row of the table; the distance is a root mean square of pixels from 0 to 255."""
    head = f"{sampler:20} {steps:3} steps, {evaluations:3} evaluations"
    if sampler in STOCHASTIC:
        return f"{head}, stochastic"
    distance = np.sqrt(np.square(pictures.astype(float) - exact).mean())
    return f"{head}, {distance:5.1f} of 255 from the exact solution"


def make_parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="tools/compare_samplers.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="as ldm/sample.py takes it")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="PNG to write")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times (six of the demo's)")
    parser.add_argument("--evaluations", type=whole(1), default=10, metavar="N", help="of the network, a picture (10)")
    parser.add_argument("--samplers", nargs="+", choices=[*OF_NOISE_ALONE], default=[*OF_NOISE_ALONE], metavar="NAME")
    parser.add_argument("--spacing", choices=[*SPACINGS], default="trailing", help="of the noise levels (trailing)")
    parser.add_argument("--guidance", type=finite, default=4.0, metavar="F", help="guidance scale (4.0)")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="seed of all noise (0)")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", choices=[*DTYPES], default="float32", help="precision of the network (float32)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
