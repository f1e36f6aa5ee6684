"""Which sampler draws with which model.

Enters: a name as a program's option or a config gives it, or none, and what the model was trained with. Leaves: the
name of a sampler that the model knows, or an error that lists them.
"""

from ldm.diffusion.corruption_config import CorruptionConfig, CorruptionName
from ldm.diffusion.samplers import SAMPLERS

OF_NOISE = "dpmpp_2m"
OF_CORRUPTION: dict[CorruptionName, str] = {
    "masking": "denoise_renoise",
    "growing_mask": "cold_diffusion",
    "blur": "cold_diffusion",
}
"""Of each kind of corruption the sampler that is taken where none is named; each of them samples all kinds."""
CORRUPTION_SAMPLERS = ("denoise_renoise", "cold_diffusion")
SAMPLER_NAMES = (*SAMPLERS, *CORRUPTION_SAMPLERS)
"""All that a person may name."""


def chosen_sampler(name: str | None, corruption: CorruptionConfig | None) -> str:
    """The sampler of that name, or where there is none the one that suits the model: of noise, or of its corruption.

    Raises:
        ValueError: a sampler of noise with a corruption, one of corruptions with noise, or an unknown name.
    """
    if corruption is None:
        allowed, model, default = (*SAMPLERS,), "a model of Gaussian noise", OF_NOISE
    else:
        allowed, model, default = (
            CORRUPTION_SAMPLERS,
            f"a model of the corruption {corruption.kind}",
            OF_CORRUPTION[corruption.kind],
        )
    if name is not None and name not in allowed:
        raise ValueError(f"sampler: found {name!r}, expected one of {', '.join(allowed)}, for {model}")
    return name or default
