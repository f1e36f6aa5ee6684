"""How a run ended, for people and schedulers: `status.json`, since launchers hide exit codes; and one program a folder.

Enters: outcome, step and reason. Leaves: `status.json` in the run's folder, whole at any time:
    {"outcome": "running" | "finished" | "interrupted" | "failed", "step": ..., "reason": ..., "host", "pid", "time"}
A "running" whose process is gone was killed; the same command again resumes it, as it does after "interrupted".
"""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

STATUS = "status.json"
LOCK = ".lock"
INTERRUPTED = 75
"""Exit status of a run that was asked to stop and wrote a checkpoint (EX_TEMPFAIL: try again)."""


class RunFolderError(RuntimeError):
    """Another program is training in the run's folder."""


def write_status(run_dir: Path, outcome: str, step: int | None, reason: str) -> None:
    """Replaces `status.json`.

    A failure takes nothing from a run that finished there, nor from the process of this launch that failed first: the
    others only see that it is gone.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / STATUS
    if outcome == "failed" and path.exists():
        before = json.loads(path.read_text())
        own_start = psutil.Process().create_time()
        if before["outcome"] == "finished" or (before["outcome"] == "failed" and before["time"] > own_start):
            return
    temporary = run_dir / f".{STATUS}.{os.getpid()}.partial"
    about = {"host": platform.node(), "pid": os.getpid(), "time": time.time()}
    temporary.write_text(json.dumps({"outcome": outcome, "step": step, "reason": reason} | about) + "\n")
    os.replace(temporary, path)


@contextmanager
def only_program(run_dir: Path, is_main: bool) -> Iterator[None]:
    """Holds the folder for the main process of one run; the system lets go of it when the process ends, however.

    Raises:
        RunFolderError: another program holds it.
    """
    if not is_main:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("a") as file:
        try:
            # A record lock belongs to the process: loader workers that outlive a killed run do not keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"another program is training in {run_dir} (see its {STATUS}): end it first, or give another --run_dir"
            ) from None
        yield
