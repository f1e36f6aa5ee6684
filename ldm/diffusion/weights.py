"""Weights of the loss by noise level.

Enters: times of a batch and the settings. Leaves: the factor of each sample's squared error. A weighting is one
function, the target whose error it is written for, and one line in WEIGHTS.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.objective_config import ObjectiveConfig
from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.targets import determinant


def one(snr: Tensor, config: ObjectiveConfig) -> Tensor:
    """1."""
    return torch.ones_like(snr)


def min_snr(snr: Tensor, config: ObjectiveConfig) -> Tensor:
    """min(SNR, gamma) / SNR (Hang et al. 2023, section 3.4), and its limit 1 at SNR 0."""
    return (config.min_snr_gamma / snr).clamp(max=1)


def p2(snr: Tensor, config: ObjectiveConfig) -> Tensor:
    """1 / (k + SNR)^gamma (Choi et al. 2022, Eq. 8)."""
    return (config.p2_k + snr) ** -config.p2_gamma


class Weighting(NamedTuple):
    """A weight as a function of the SNR, and the target of whose squared error it is the weight."""

    of: str | None
    """None: of the error that `loss` names."""
    value: Callable[[Tensor, ObjectiveConfig], Tensor]


WEIGHTS: dict[str, Weighting] = {
    # The simple loss when `loss` is epsilon (Ho et al. 2020, Eq. 14).
    "uniform": Weighting(None, one),
    # On x0's error this is min(SNR, gamma), on v's min(SNR, gamma) / (SNR + 1).
    "min_snr": Weighting("epsilon", min_snr),
    "p2": Weighting("epsilon", p2),
    # On x0's error this is lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Karras et al. 2022, table 1).
    "edm": Weighting("edm", one),
}


def weight(schedule: ForwardProcess, config: ObjectiveConfig, t: Tensor) -> Tensor:
    """Weight of the squared error of `config.loss` at times t (B,), float64; may be infinite at an SNR of 0."""
    return weight_of_error(schedule, config, t, config.loss)


def weight_of_error(schedule: ForwardProcess, config: ObjectiveConfig, t: Tensor, target: str) -> Tensor:
    """Weight of the squared error of any target at times t (B,), float64, that makes up the same loss.

    Finite wherever that target determines x0 and the noise: for a network's own output, at every time it can learn.
    """
    of, value = WEIGHTS[config.weight]
    of = of or config.loss
    weights = value(schedule.snr(t), config)
    if of == target:
        return weights
    levels = schedule.alpha(t), schedule.sigma(t)
    ratio = determinant(of, *levels, config.sigma_data) / determinant(target, *levels, config.sigma_data)
    return weights * ratio**2
