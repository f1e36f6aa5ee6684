"""The corruption of a pipeline's folder: what its network undoes in place of noise, where the scheduler's file stands.

Enters: a CorruptionConfig. Leaves: the values of scheduler_config.json, under a class that diffusers does not have, so
that it refuses the folder instead of drawing nonsense; and the same config back, or an error that names the field.
"""

import dataclasses
from typing import Any

from ldm.diffusion.corruption_config import CorruptionConfig

CORRUPTION_CLASS = "LatentCorruptionScheduler"


def corruption_values(config: CorruptionConfig) -> dict[str, Any]:
    """What scheduler_config.json says of a network that was trained on a corruption."""
    return {"_class_name": CORRUPTION_CLASS, **dataclasses.asdict(config)}


def corruption_in(values: dict[str, Any]) -> CorruptionConfig:
    """The corruption that the values of a scheduler_config.json tell of.

    Raises:
        ValueError: a setting is missing, unknown, or has a value that is not supported; names it.
    """
    names = {one.name for one in dataclasses.fields(CorruptionConfig)}
    found = values.keys() - {"_class_name"}
    if found != names:
        lacks, unknown = (", ".join(sorted(some)) or "none" for some in (names - found, found - names))
        raise ValueError(f"settings of a {CORRUPTION_CLASS}: it lacks {lacks}, and has as unknown ones {unknown}")
    try:
        return CorruptionConfig(**{name: values[name] for name in names})
    except TypeError as error:  # a text where a number belongs
        raise ValueError(f"a value of another type than its setting's: {error}") from error
