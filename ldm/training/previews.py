"""Sample grids during training: the averaged weights draw the same prompts from the same noise, every N steps.

Enters: a Pipeline around the averaged network. Leaves: `samples/step-00001000.png`, a labelled grid.
"""

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ldm.diffusion.sampler_choice import CORRUPTION_SAMPLERS, chosen_sampler
from ldm.diffusion.samplers import OF_NOISE_ALONE
from ldm.grid import labelled_grid
from ldm.pipeline.pipeline import Pipeline
from ldm.sampling.generation import generate


@dataclass
class PreviewConfig:
    """Prompts that a run draws as it trains, and how; the noise of each is fixed by the run's seed."""

    every: int = 1000
    """Optimizer steps between two grids; 0 draws none."""
    prompts: list[str] = field(default_factory=list)
    """Prompts of the grid, in order."""
    sampler: str | None = None
    """Sampler of the grid, a name that `ldm/sample.py --help` lists; unset: dpmpp_2m, or the corruption's own."""
    steps: int = 20
    """Sampling steps."""
    guidance: float = 5.0
    """Scale of classifier-free guidance; 1 is the conditional network alone."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"previews.every: found {self.every}, expected 0 (off) or more")
        names = (*OF_NOISE_ALONE, *CORRUPTION_SAMPLERS)
        if self.sampler is not None and self.sampler not in names:
            raise ValueError(f"previews.sampler: found {self.sampler!r}, expected one of {', '.join(names)}")
        if self.steps < 1:
            raise ValueError(f"previews.steps: found {self.steps}, expected 1 or more")


def draw_previews(pipeline: Pipeline, config: PreviewConfig, *, seed: int, step: int, run_dir: Path) -> Image.Image:
    """Draws the grid of `step`, writes it under `run_dir/samples` and returns it; `pipeline` has averaged weights."""
    training = pipeline.unet.training
    pipeline.unet.eval()
    try:
        pictures = generate(
            pipeline,
            config.prompts,
            seed=seed,
            indices=list(range(len(config.prompts))),
            sampler=chosen_sampler(config.sampler, pipeline.corruption),
            steps=config.steps,
            guidance=config.guidance,
        )
    finally:
        pipeline.unet.train(training)
    grid = labelled_grid(pictures, config.prompts)
    folder = run_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(folder / f"step-{step:08d}.png")
    return grid
