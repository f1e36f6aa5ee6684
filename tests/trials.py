"""Counted trials: how many are made, from which seed, and what was counted.

Enters: environment variables (a number of trials, LDM_TRIAL_SEED, LDM_TRIAL_REPORT). Leaves: one line on the screen
(pytest -s) and, where LDM_TRIAL_REPORT names a file, one JSON object a set of trials at its end.
"""

import json
import os
from pathlib import Path

SEED = int(os.environ.get("LDM_TRIAL_SEED", "0"))


def number(variable: str, few: int) -> int:
    """Trials to make: what the environment says, `few` where it says nothing."""
    return int(os.environ.get(variable, few))


def report(claim: str, **counts: object) -> None:
    """Prints the counts of a set of trials, and appends them to the file of LDM_TRIAL_REPORT."""
    line = json.dumps({"claim": claim, "seed": SEED, **counts})
    print(f"\n{line}")
    path = os.environ.get("LDM_TRIAL_REPORT")
    if path:
        with Path(path).open("a") as file:
            file.write(line + "\n")
