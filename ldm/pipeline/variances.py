"""Analytic-DPM's variances beside a pipeline: a JSON file that belongs to one network's weights.

Enters: estimates with where they come from, or a file. Leaves: `variances.json`, which sampling finds in a pipeline's
folder (it is in no hash list, so that it can be laid there later) or is given; the same back, checked.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.reverse_variances import PosteriorVariances
from ldm.models.pretrained import read_json, weights_hash
from ldm.pipeline.folder import write_json

logger = logging.getLogger(__name__)

VARIANCES = "variances.json"


def write_variances(path: Path, estimated: PosteriorVariances, unet: nn.Module, about: dict[str, Any]) -> None:
    """Writes the estimates with the hash of the network's weights; `about` is for people."""
    values = {"levels": estimated.levels.tolist(), "variances": estimated.variances.tolist()}
    write_json(path, {"unet": weights_hash(unet.state_dict().items()), **values, **about})


def read_variances(path: Path, unet: nn.Module) -> PosteriorVariances:
    """The estimates of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not one of `write_variances`, or of another network than this.
    """
    if not path.is_file():
        raise FileNotFoundError(f"variances: there is no file {path}")
    values = read_json(path)
    try:
        numbers = [torch.tensor([float(one) for one in values[name]], dtype=torch.float64) for name in _FIELDS]
        found, estimated = str(values["unet"]), PosteriorVariances(*numbers)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"variances: {path} is not a file of `ldm/evaluate.py --scores variances` ({type(error).__name__}: {error})"
        ) from error
    own = weights_hash(unet.state_dict().items())
    if found != own:
        raise ValueError(
            f"variances: {path} was estimated with the network {found}, this checkpoint has {own}: estimate them again "
            "with `ldm/evaluate.py --scores variances`"
        )
    return estimated


_FIELDS = ("levels", "variances")


def variances_beside(folder: Path, unet: nn.Module) -> PosteriorVariances | None:
    """Those that lie in a pipeline's folder; None where there are none, or where they cannot be used, which is said."""
    if not (folder / VARIANCES).is_file():
        return None
    try:
        return read_variances(folder / VARIANCES, unet)
    except ValueError as error:
        logger.warning("%s; not used", error)
        return None


def variances_at(estimated: PosteriorVariances | None, levels: Tensor) -> Tensor:
    """The variances of a run of Analytic-DPM, (steps,).

    Raises:
        ValueError: there are none, or of other levels.
    """
    if estimated is None:
        raise ValueError(
            "sampler: analytic_dpm needs variances estimated for this network on latents: "
            "`python ldm/evaluate.py --scores variances --checkpoint CHECKPOINT --shards SHARDS --out FOLDER` writes "
            f"FOLDER/{VARIANCES}; give it as --variances, or put it into the checkpoint's folder"
        )
    return estimated.at(levels)
