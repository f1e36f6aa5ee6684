"""What a run tells the model card of its checkpoints: its settings, data and progress, without places of this machine.

Enters: the RunConfig, the opened data, the steps done. Leaves: the text of README.md, the same for the same run
wherever its folders lie.
"""

from typing import Any

import yaml

from ldm.config import RunConfig, to_dict
from ldm.pipeline.model_card import model_card
from ldm.training.run_data import RunData

ELSEWHERE = ("run_dir", "card", "encoding", "distributed", "metrics")
"""Settings that say where and how a run was executed, or that the card has in words."""
DATA_ELSEWHERE = ("shards", "stream", "validation", "cache", "workers", "prefetch")


def card_of(config: RunConfig, data: RunData, steps: int, initialized_from: str | None) -> str:
    """README.md of the checkpoint after `steps` optimizer steps."""
    return model_card(
        config.card,
        config_yaml=yaml.safe_dump(shown(config), sort_keys=False, width=120),
        steps=steps,
        samples_seen=steps * config.training.global_batch,
        data_lines=data.card_lines(),
        initialized_from=initialized_from,
    )


def shown(config: RunConfig) -> dict[str, Any]:
    """The settings that say what is computed, without those that say where."""
    replaced = () if config.continuous_noise is None and config.corruption is None else ("noise",)
    values = {name: value for name, value in to_dict(config).items() if name not in (*ELSEWHERE, *replaced)}
    values["data"] = {name: value for name, value in values["data"].items() if name not in DATA_ELSEWHERE}
    return values
