"""Scores a checkpoint: retrieval of its training pictures, likelihood of latents, variances of its reverse steps.

Enters: a checkpoint and shards. Leaves: files in the folder `--out`, named after the scores: `retrieval.json` and
`.png` (raw shards), `elbo.json` and `.png`, `ode.json`, `variances.json` (raw or encoded ones). It downloads nothing.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ldm.data.manifest import Manifest, ManifestError
from ldm.diffusion.sampler_choice import chosen_sampler
from ldm.diffusion.separate_steps import ToleranceError
from ldm.evaluation.latent_likelihood import bounds, densities, elbo_report, ode_report, write_elbo, write_report
from ldm.evaluation.latent_samples import LatentBatch, latent_batches
from ldm.evaluation.latent_variances import estimate_variances
from ldm.evaluation.retrieval import choose_captions, read_pictures, retrieval
from ldm.evaluation.retrieval import write_report as write_retrieval
from ldm.models.text_encoder import DTYPES
from ldm.pipeline.pipeline import Pipeline, check_of_noise
from ldm.pipeline.variances import VARIANCES, write_variances
from ldm.sampling.generation import generate
from ldm.sampling.options import (
    add_sampling_options,
    check_folder,
    choose_device,
    open_checkpoint,
    positive,
    progress_bar,
    whole,
    with_variances,
)
from ldm.training.checkpoint import CheckpointError


class Scored(NamedTuple):
    """What a score says at the end, and its file."""

    line: str
    path: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        check_folder("out", options.out)
        device = choose_device(options.device)
        pipeline, name = open_checkpoint(options.checkpoint, device, DTYPES[options.dtype])
        options.sampler = chosen_sampler(options.sampler, pipeline.corruption)
        pipeline = with_variances(pipeline, options.variances, options.sampler)
        for score in dict.fromkeys(options.scores):
            if score != "retrieval":
                check_of_noise(pipeline, f"scores {score}")
            line, path = SCORES[score](pipeline, name, options)
            print(f"{name}: {line}; {path}")
    except (OSError, ValueError, ToleranceError, CheckpointError, ManifestError) as error:
        parser.error(str(error))
    return 0


def score_retrieval(pipeline: Pipeline, name: str, options: argparse.Namespace) -> Scored:
    """Samples captions and looks for the picture that lies nearest to each sample."""
    resolution = pipeline.latent_shape[1] * pipeline.autoencoder.downsample_factor
    pictures, picture_captions, passed_over = read_pictures(options.shards, resolution)
    for line in passed_over:
        say_passed_over(line)
    captions = choose_captions(picture_captions, options.captions, options.seed)
    names = ("seed", "sampler", "steps", "spacing", "guidance", "guidance_rescale")
    sampling = {key: getattr(options, key) for key in names}
    with progress_bar("sampling") as report:
        samples = generate(pipeline, captions, batch_size=options.batch_size, progress=report, **sampling)
    outcome = retrieval(samples, captions, pictures, picture_captions)
    counts = {"pictures": len(pictures), "passed_over": len(passed_over)}
    settings = {"checkpoint": name, "dtype": options.dtype, **sampling, **provenance(options), **counts}
    write_retrieval(options.out, outcome, samples, captions, pictures, picture_captions, settings)
    counted = f"({len(captions)} captions, {len(pictures)} pictures)"
    return Scored(f"top-1 {outcome.top_1:.3f}, top-5 {outcome.top_5:.3f} {counted}", options.out / "retrieval.json")


def score_elbo(pipeline: Pipeline, name: str, options: argparse.Namespace) -> Scored:
    """The variational bound of latents, term by term."""
    passed_over: list[str] = []
    found = bounds(pipeline, batches_of(pipeline, options, passed_over), timesteps=options.timesteps, seed=options.seed)
    report = elbo_report(pipeline, found, options.timesteps)
    report["settings"] = latent_settings(name, options, passed_over) | {"timesteps": options.timesteps}
    write_elbo(options.out, report, f"{name}: {report['bits_per_dimension']:.3f} bits per dimension at most")
    parts = ", ".join(f"{part} {report[part]:.4f}" for part in ("L_T", "L_between", "L_0"))
    return Scored(f"at most {bits_of(report)} ({parts})", options.out / "elbo.json")


def score_ode(pipeline: Pipeline, name: str, options: argparse.Namespace) -> Scored:
    """The log-density of latents by the probability-flow ODE."""
    passed_over: list[str] = []
    batches = batches_of(pipeline, options, passed_over)
    found = densities(pipeline, batches, probes=options.probes, tolerance=options.tolerance, seed=options.seed)
    report = ode_report(pipeline, found, options.probes)
    report["settings"] = latent_settings(name, options, passed_over) | {"tolerance": options.tolerance}
    write_report(options.out / "ode.json", report)
    probes = report["standard_error_of_probes"]
    error = "" if probes is None else f", of which {options.probes} probes make {probes:.2g}"
    return Scored(f"{bits_of(report)}{error}", options.out / "ode.json")


def score_variances(pipeline: Pipeline, name: str, options: argparse.Namespace) -> Scored:
    """What the sampler analytic_dpm needs of this network."""
    passed_over: list[str] = []
    batches = batches_of(pipeline, options, passed_over)
    found = estimate_variances(pipeline, batches, levels=options.timesteps, seed=options.seed)
    about = found.about() | {"settings": latent_settings(name, options, passed_over) | {"timesteps": options.timesteps}}
    write_variances(options.out / VARIANCES, found.variances, pipeline.unet, about)
    low, high = (float(found.variances.levels[end]) for end in (0, -1))
    return Scored(
        f"variances at {len(found.variances.levels)} levels from {low:.4g} to {high:.4g}", options.out / VARIANCES
    )


SCORES: dict[str, Callable[[Pipeline, str, argparse.Namespace], Scored]] = {
    "retrieval": score_retrieval,
    "elbo": score_elbo,
    "ode": score_ode,
    "variances": score_variances,
}


def batches_of(pipeline: Pipeline, options: argparse.Namespace, passed_over: list[str]) -> Iterator[LatentBatch]:
    """Batches of latents behind a bar; samples that cannot be used are said, and added to `passed_over`."""

    def say(line: str) -> None:
        passed_over.append(line)
        say_passed_over(line)

    batches: Iterable[LatentBatch] = latent_batches(
        pipeline,
        options.shards,
        samples=options.samples,
        seed=options.seed,
        batch_size=options.batch_size,
        passed_over=say,
    )
    with tqdm(desc="latents", unit="sample", dynamic_ncols=True) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.numbers))


def say_passed_over(line: str) -> None:
    """One sample that could not be used, on standard error."""
    tqdm.write(f"passed over: {line}", file=sys.stderr)


def latent_settings(name: str, options: argparse.Namespace, passed_over: Sequence[str]) -> dict[str, Any]:
    """What a score of latents depends on besides the network."""
    own = {"checkpoint": name, "dtype": options.dtype, "seed": options.seed, "samples": options.samples}
    return {**own, **provenance(options), "passed_over": len(passed_over)}


def provenance(options: argparse.Namespace) -> dict[str, str]:
    """Which shards they were, by name and content."""
    return {"shards": options.shards.resolve().name, "manifest": Manifest.load(options.shards).digest()}


def bits_of(report: dict[str, Any]) -> str:
    """Mean and standard error, for people."""
    error = report["standard_error"]
    return f"{report['bits_per_dimension']:.4f}{'' if error is None else f' +- {error:.2g}'} bits per dimension"


def make_parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="ldm/evaluate.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--scores",
        nargs="+",
        choices=[*SCORES],
        default=["retrieval"],
        metavar="SCORE",
        help="retrieval (default), elbo: variational bound of latents in bits per dimension, ode: their exact "
        "log-density, variances: what the sampler analytic_dpm needs",
    )
    parser.add_argument(
        "--shards",
        type=Path,
        required=True,
        metavar="DIR",
        help="raw shards of the training pictures; but for retrieval any that the checkpoint fits, raw or encoded",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for each score's .json and .png")
    parser.add_argument(
        "--captions", type=whole(1), default=64, metavar="N", help="captions to sample, for retrieval (64)"
    )
    parser.add_argument(
        "--samples",
        type=whole(1),
        default=64,
        metavar="N",
        help="latents taken from the shards, for the others (64)",
    )
    parser.add_argument(
        "--timesteps",
        type=whole(0),
        default=128,
        metavar="N",
        help="noise levels of each sample at which elbo and variances evaluate the network; 0 is all of them (128)",
    )
    parser.add_argument("--probes", type=whole(1), default=4, metavar="N", help="of Hutchinson's trace, for ode (4)")
    parser.add_argument(
        "--tolerance", type=positive, default=1e-4, metavar="F", help="of each step of the solver, for ode (1e-4)"
    )
    add_sampling_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
