"""Noise that sampling starts from, and the latents that it ends with, as safetensors files.

Enters: a file with the tensor `noise` (N, C, h, w), made by another tool, say; or final latents, or the noise of a
picture, with their settings. Leaves: that noise, checked; or a file with the tensor `latents` or `noise`.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

NOISE = "noise"
LATENTS = "latents"
SUFFIX = ".safetensors"


def read_noise(file: Path, count: int) -> Tensor:
    """Unit noise (N, C, h, w) float32 of N = `count` pictures, in their order.

    A standard deviation far from 1 is used as it is, and reported: other tools may have scaled it already.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no safetensors file, no tensor `noise`, another number of rows or dimensions, numbers that are not
            finite.
    """
    if not file.is_file():
        raise FileNotFoundError(f"noise: there is no file {file}")
    try:
        with safe_open(file, framework="pt") as tensors:
            names = sorted(tensors.keys())
            if NOISE not in names:
                raise ValueError(
                    f"noise: {file} holds {', '.join(names) or 'no tensors'}, expected the tensor {NOISE!r}"
                )
            noise: Tensor = tensors.get_tensor(NOISE)
    except SafetensorError as error:
        raise ValueError(f"noise: {file} is damaged or no safetensors file ({error})") from error
    if noise.ndim != 4 or len(noise) != count or not noise.numel() or not noise.is_floating_point():
        raise ValueError(
            f"noise: {file} holds {tuple(noise.shape)} {noise.dtype}, expected ({count}, C, h, w) floating-point "
            "numbers: a row for each picture"
        )
    noise = noise.float()
    if not bool(noise.isfinite().all()):
        raise ValueError(f"noise: {file} holds numbers that are not finite")
    deviation = float(noise.square().mean().sqrt())
    if not 0.5 < deviation < 2:
        logger.warning("noise: %s has a standard deviation of %.3g, expected 1; used as it is", file.name, deviation)
    return noise


def check_tensor_out(option: str, file: Path) -> None:
    """Raises ValueError where `file` of that option cannot take a tensor: before, not after it is computed."""
    if file.suffix != SUFFIX or file.is_dir():
        raise ValueError(f"{option}: found {file}, expected a file name that ends in {SUFFIX}")


def write_tensor(name: str, tensor: Tensor, file: Path, texts: Mapping[str, str]) -> None:
    """Writes LATENTS, scaled as the network knows them, or NOISE (N, C, h, w) with texts as metadata, whole or not."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file({name: tensor.to("cpu", torch.float32).contiguous()}, temporary, metadata=dict(texts))
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
