"""The settings of the objective, and which of them go together.

Enters: the `objective` part of a run's config. Leaves: an ObjectiveConfig, or an error that names field, value and what
is allowed; `check_objective` does the checks that need the schedule as well.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ldm.diffusion.process import ForwardProcess
from ldm.diffusion.schedule import Schedule

TargetName = Literal["epsilon", "v", "x0", "flow", "edm"]
WeightName = Literal["uniform", "min_snr", "p2", "edm"]
TimestepSamplingName = Literal["uniform", "logit_normal", "log_normal"]
DistanceName = Literal["squared", "huber", "pseudo_huber"]

# Of latents that are scaled to unit deviation. Karras et al. 2022 have 0.5, for pixels in [-1, 1].
SIGMA_DATA = 1.0


@dataclass
class ObjectiveConfig:
    """The loss of a sample: weight(t) times the mean squared error of one view of the network's prediction."""

    parameterization: TargetName = "epsilon"
    """What the network puts out: the noise, the velocity v = alpha noise - sigma x0, the clean latents, the velocity
    noise - x0 of the straight path (flow), or what EDM's preconditioning leaves to it (Karras et al. 2022)."""
    loss: TargetName = "epsilon"
    """Whose error is minimized, after exact conversion of the prediction; independent of the parameterization."""
    weight: WeightName = "uniform"
    """Weight of that error: 1, or min(SNR, gamma) in terms of x0's error (Hang et al. 2023), or 1 / (k + SNR)^gamma in
    terms of the noise's (Choi et al. 2022), or 1 in terms of EDM's own output, the three whatever `loss` is. With zero
    terminal SNR min_snr and p2 give the last timestep, where sampling starts, weight 0: uniform suits it better."""
    min_snr_gamma: float = 5.0
    """Gamma of min_snr: the SNR from which on all timesteps have the same weight on x0's error."""
    timestep_sampling: TimestepSamplingName = "uniform"
    """Distribution of t / T in training: uniform, or logit-normal, which prefers the middle (Esser et al. 2024); or
    that of the noise level: log_normal in sigma / alpha (Karras et al. 2022), what lies outside going to the ends."""
    logit_mean: float = 0.0
    """Mean of logit(t / T) with logit_normal; above 0 prefers noisier timesteps."""
    logit_std: float = 1.0
    """Standard deviation of logit(t / T) with logit_normal."""
    log_sigma_mean: float = -0.5
    """Mean of ln(sigma / alpha) with log_normal. Karras et al. 2022 have -1.2 for data of deviation 0.5: the same for
    unit deviation is ln 2 higher."""
    log_sigma_std: float = 1.2
    """Standard deviation of ln(sigma / alpha) with log_normal."""
    stratified: bool = False
    """Draw the B timesteps of a global batch from B equal parts of their distribution, one from each: the same
    distribution over the run, with less variance of the batch's mean loss (Kingma et al. 2021, appendix I.1)."""
    sigma_data: float = SIGMA_DATA
    """Standard deviation of the latents in EDM's preconditioning and weight; 1 for latents scaled as usual."""
    p2_gamma: float = 1.0
    """Gamma of p2: how strongly low noise levels lose weight (Choi et al. 2022: 0.5 or 1)."""
    p2_k: float = 1.0
    """k of p2: the SNR about which the weight starts to fall."""
    distance: DistanceName = "squared"
    """Distance between prediction and target: d^2, or one that grows as d^2 below huber_c and as 2 huber_c |d| above,
    with a corner in its second derivative (huber) or smoothly (pseudo_huber; Song & Dhariwal 2024, Eq. 8)."""
    huber_c: float = 0.1
    """Error from which on huber and pseudo_huber grow linearly, in units of what `loss` names."""
    offset_noise: float = 0.0
    """Deviation of a constant that is added to the noise of each sample and channel, so that large bright and dark
    areas are learned without zero terminal SNR (Guttenberg 2023: 0.1); 0 adds none."""
    learned_variance: bool = False
    """The network puts out 2C channels, the second half the variance of the reverse step between its two bounds; the
    bound's term is added for it, while the mean learns from the simple loss alone (Nichol & Dhariwal 2021, Eq. 16)."""
    vlb_weight: float = 0.001
    """Weight of the variational bound, in bits per dimension, beside the simple loss with learned_variance."""

    def __post_init__(self) -> None:
        choices: dict[str, object] = {
            "parameterization": TargetName,
            "loss": TargetName,
            "weight": WeightName,
            "timestep_sampling": TimestepSamplingName,
            "distance": DistanceName,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"objective.{name}: found {getattr(self, name)!r}, expected one of {[*get_args(allowed)]}"
                )
        positive = (
            "min_snr_gamma", "logit_std", "log_sigma_std", "sigma_data", "p2_k", "huber_c", "vlb_weight",
        )  # fmt: skip
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"objective.{name}: found {getattr(self, name)}, expected a positive number")
        for name in ("p2_gamma", "offset_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"objective.{name}: found {getattr(self, name)}, expected 0 or more")
        for name in ("logit_mean", "log_sigma_mean"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"objective.{name}: found {getattr(self, name)}, expected a finite number")
        if self.learned_variance and self.offset_noise:
            raise ValueError(
                f"objective.offset_noise: found {self.offset_noise} with learned_variance, expected 0: the bound that "
                "the variance learns from holds for noise that is independent in each element"
            )


def check_parameterization(parameterization: str, zero_terminal_snr: bool) -> None:
    """Raises ValueError for a network that puts out the noise where a timestep holds nothing but noise.

    There the prediction is the input itself and tells nothing of x0 = (x_t - sigma noise) / alpha, with alpha = 0.
    """
    if zero_terminal_snr and parameterization == "epsilon":
        raise ValueError(
            "objective.parameterization: found 'epsilon' with zero terminal SNR (noise.rescale_betas_zero_snr), where "
            "x0 cannot be computed from it; expected 'v' or 'x0', or a schedule without rescaling"
        )


def check_path(name: str, schedule: ForwardProcess, field: str = "parameterization") -> None:
    """Raises ValueError for a target that is not defined, or has no bounds, on this process.

    v belongs to alpha^2 + sigma^2 = 1. Where alpha is 1 at every level, only EDM's preconditioning keeps what the
    network sees and puts out within bounds.
    """
    path = schedule.path.name
    if name == "v" and path != "variance_preserving":
        raise ValueError(
            f"objective.{field}: found 'v' on a {path} process, expected another target: v = alpha noise - sigma x0 "
            "is defined where alpha^2 + sigma^2 = 1"
        )
    if field == "parameterization" and path == "variance_exploding" and name != "edm":
        raise ValueError(
            f"objective.parameterization: found {name!r} on a variance-exploding process, expected 'edm': no other "
            "scales the network's input, which grows with sigma there"
        )


def check_objective(config: ObjectiveConfig, schedule: ForwardProcess) -> None:
    """Raises ValueError for an objective that the schedule cannot serve; names field, value and what is allowed."""
    check_parameterization(config.parameterization, schedule.zero_terminal_snr)
    check_path(config.parameterization, schedule)
    check_path(config.loss, schedule, "loss")
    if config.learned_variance and not isinstance(schedule, Schedule):
        raise ValueError(
            "objective.learned_variance: found True with a schedule of continuous time, expected False, or a discrete "
            "schedule: the variance is that of one of its steps"
        )
