"""The real training program in forked processes: a start costs a fork and not five seconds of imports.

Enters: command lines of `ldm/train.py` with a rank and a world size. Leaves: processes that can be watched and killed.
`ForkServer` is the test's side; this file run as a program is the server: it has imported everything, has executed no
torch operation and started no thread, and forks one process, in a process group of its own, for each line it reads.
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# Imported by the server because the program imports them late, in each process.
PRELOADED = (
    "ldm.train",
    "ldm.training.engine_fsdp2",
    "accelerate.tracking",
    "torch.utils.data._utils.worker",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "torch.nn.parallel.distributed",
    "torch.distributed.algorithms.join",
)


class Processes:
    """The processes of one start of the program, one a rank."""

    def __init__(self, server: "ForkServer", pids: list[int], log: Path) -> None:
        self._server = server
        self.pids = pids
        self.log = log
        self.codes: list[int | None] = [None] * len(pids)
        """Exit code of each rank, negative for a signal; None while it runs."""

    def running(self) -> bool:
        """Whether any rank still runs; collects the exit codes of those that have ended."""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                self.codes[rank] = self._server.ask({"wait": pid})
        return None in self.codes

    def kill(self, *ranks: int, sign: int = signal.SIGKILL, workers: bool = True) -> None:
        """A signal to ranks (all when none is named), with their loaders' workers or without."""
        for rank in ranks or range(len(self.pids)):
            if self.codes[rank] is None:  # the server has not collected it: the number is still this process's
                with suppress(ProcessLookupError):
                    (os.killpg if workers else os.kill)(self.pids[rank], sign)

    def wait(self, seconds: float = 120.0) -> list[int | None]:
        """Waits until all ranks have ended; returns their exit codes. Past the time they are killed."""
        deadline = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"still running after {seconds} s:\n{self.output()}")
            time.sleep(0.003)
        return self.codes

    def finish(self, expected: int = 0, seconds: float = 120.0) -> None:
        """Waits for the end; every rank must exit with `expected`; the first to fail takes all along."""
        deadline = time.monotonic() + seconds
        while self.running():
            failed = any(code not in (None, expected) for code in self.codes)
            if failed or time.monotonic() > deadline:
                time.sleep(1.0)  # the others say what they see
                self.kill()
                self.wait()
                break
            time.sleep(0.003)
        assert self.codes == [expected] * len(self.codes), f"exit codes {self.codes}\n{self.output()}"

    def output(self) -> str:
        """What all ranks wrote to stdout and stderr since the log began."""
        return self.log.read_text(errors="replace")


class ForkServer:
    """A server process that forks the training program; a context manager, so that nothing of it is left running."""

    def __enter__(self) -> "ForkServer":
        import ldm

        here, package = Path(__file__).parent, Path(ldm.__file__).parent.parent
        settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(here / "forked_runs.py")],
            env=os.environ
            | settings
            | {"PYTHONPATH": os.pathsep.join([str(package), str(here), os.environ.get("PYTHONPATH", "")])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the test, which ends its processes itself
        )
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # at the end of its input the server kills what it has forked
        self._process.wait(timeout=60)

    def ask(self, job: dict[str, Any]) -> Any:
        """The server's answer to one line: a pid for a start, an exit code or None for a wait."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the fork server has ended with status {self._process.wait()}"
        return json.loads(answer)

    def start(
        self,
        folder: Path,
        words: Sequence[str],
        world: int = 1,
        *,
        program: str = "ldm.train:main",
        hook: str | None = None,
        told: Any = None,
        folders: Sequence[Path] = (),
    ) -> Processes:
        """Starts `program` with the words of its command line in `world` processes, in `folder` as working directory.

        Args:
            folder: where `output.log` of all ranks grows too.
            program: "module:function", called with the words.
            hook: "module:function", called with `told` before the program; how a test puts something into it.
            folders: working directories of the ranks, where each has its own.
        """
        # What torchrun sets; a single process is started as `python ldm/train.py` would start it.
        group = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0"}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        log = folder / "output.log"
        pids = []
        for rank in range(world):
            environment = {"ACCELERATE_USE_CPU": "true"}
            if world > 1:
                environment |= group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            here = folders[rank] if folders else folder
            job = {"words": list(words), "environment": environment, "folder": str(here), "log": str(log)}
            pids.append(self.ask(job | {"program": program, "hook": hook, "told": told}))
        return Processes(self, pids, log)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def serve() -> dict[str, Any] | None:
    """Answers lines until there are no more; returns twice: a job in each forked process, None in the server."""
    children: set[int] = set()
    while line := sys.stdin.readline():
        job = json.loads(line)
        if "wait" in job:
            pid, status = os.waitpid(job["wait"], os.WNOHANG)
            children.discard(pid)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return dict(job)
            with suppress(OSError):  # here and in the process itself: whoever comes first
                os.setpgid(answer, answer)
            children.add(answer)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in children:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return None


def run(job: dict[str, Any]) -> int:
    """The forked process: its group, its environment, its log, then the program as if it had been started alone."""
    with suppress(OSError):
        os.setpgid(0, 0)
    os.environ.update(job["environment"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job["folder"])
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    if job["hook"]:
        named(job["hook"])(job["told"])
    status: int = named(job["program"])(job["words"])
    return status


def named(name: str) -> Any:
    """The function of "module:function"."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    for module in PRELOADED:
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork copies one thread: the server may have no other"
    gc.freeze()  # else a collection in a forked process touches, and so copies, all that was imported
    forked = serve()
    if forked is not None:
        sys.exit(run(forked))
