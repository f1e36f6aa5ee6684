"""How a run ended, for people and schedulers: `status.json`, since launchers hide exit codes; and one program a folder.

Enters: outcome, step and reason. Leaves: `status.json` in the run's folder, whole at any time:
    {"outcome": "running" | "finished" | "interrupted" | "failed", "step", "reason", "host", "pid", "time", "launch"}
A "running" whose process is gone was killed; the same command again resumes it, as it does after "interrupted".
"""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

STATUS = "status.json"
LOCK = ".lock"
INTERRUPTED = 75
"""Exit status of a run that was asked to stop and wrote a checkpoint (EX_TEMPFAIL: try again)."""


class RunFolderError(RuntimeError):
    """Another program is training in the run's folder."""


class RunStatus:
    """`status.json` as one launch writes it.

    Args:
        launch: what all processes of the launch have in common and no other launch has.
    """

    def __init__(self, run_dir: Path, launch: str) -> None:
        self.path = run_dir / STATUS
        self.launch = launch

    def write(self, outcome: str, step: int | None, reason: str) -> None:
        """Replaces the file."""
        about = {"host": platform.node(), "pid": os.getpid(), "time": time.time(), "launch": self.launch}
        temporary = self.path.with_name(f".{STATUS}.{os.urandom(4).hex()}.partial")  # process ids repeat between hosts
        temporary.write_text(json.dumps({"outcome": outcome, "step": step, "reason": reason} | about) + "\n")
        os.replace(temporary, self.path)

    def fail(self, error: BaseException) -> None:
        """Writes why the run failed, over nothing but this launch's "running": the first process that fails knows why.

        The others only see that it is gone. Never raises: the error that is under way says more.
        """
        with suppress(OSError, ValueError, KeyError):
            before = json.loads(self.path.read_text())
            if before["launch"] == self.launch and before["outcome"] == "running":
                self.write("failed", before["step"], f"{type(error).__name__}: {error}")


def fail_before_start(run_dir: Path, error: BaseException) -> None:
    """Writes why a launch failed before it held the run's folder, unless another program holds it. Never raises."""
    with suppress(OSError):
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / LOCK).open("a") as file:
            if _lock(file):
                RunStatus(run_dir, "").write("failed", None, f"{type(error).__name__}: {error}")


@contextmanager
def only_program(run_dir: Path, accelerator: Accelerator) -> Iterator[RunStatus]:
    """Holds the folder for one launch, whose status it gives; the system lets go of it when the main process ends.

    Raises:
        RunFolderError: another program holds it; on all processes, which then write nothing there. Collective.
    """
    launch, file = "", None
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK).open("a")
        if _lock(file):
            launch = os.urandom(8).hex()
    launch = broadcast_object_list([launch])[0]
    if not launch:
        raise RunFolderError(
            f"another program is training in {run_dir} (see its {STATUS}): end it first, or give another --run_dir"
        )
    status = RunStatus(run_dir, launch)
    if accelerator.is_main_process:
        status.write("running", None, "")
    try:
        yield status
    except BaseException as error:
        status.fail(error)
        raise
    finally:
        if file is not None:
            file.close()


def _lock(file: TextIO) -> bool:
    """Whether no other process has the file; a record lock: loader workers that outlive a killed run do not keep it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
