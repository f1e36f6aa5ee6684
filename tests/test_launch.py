"""The files of launch/ start real runs: what Slurm, Kubernetes and SkyPilot would execute, on two simulated hosts."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_runs
import training_runs
import two_hosts
import yaml
from conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*/*.sh"), *LAUNCH.glob("*/*.sbatch")]
STEPS = 80


@dataclass
class Nodes:
    """Two nodes: what to put before a command to run it there, their names, and the environment of both."""

    prefixes: list[list[str]]
    names: list[str]
    environment: dict[str, str]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Two network namespaces where that is possible, else this machine twice."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with ExitStack() as stack:
        if two_hosts.why_not() is not None:
            yield Nodes([[], []], ["localhost", "localhost"], environment)
            return
        hosts = stack.enter_context(two_hosts.two_hosts())
        yield Nodes(
            [host.command() for host in hosts], [host.name for host in hosts], environment | hosts[0].environment
        )


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    config = tiny_runs.make(tmp_path_factory.mktemp("launch") / "material")
    return [*config, f"--training.steps={STEPS}", "--training.checkpoint_every=50"]


def free_port() -> int:
    """A port that nobody listens on, of those that train.sbatch chooses from."""
    for port in range(20_000 + os.getpid() % 10_000, 40_000):
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


class Slurm:
    """What train.sbatch finds on a cluster: `srun` and `scontrol` that do what theirs do, and the job's variables."""

    def __init__(self, folder: Path, nodes: Nodes) -> None:
        self.folder = folder
        self.nodes = nodes
        bin_ = folder / "bin"
        bin_.mkdir(parents=True)
        for rank, prefix in enumerate(nodes.prefixes):
            self.script(f"on-node-{rank}", f'exec {shlex.join(prefix)} "$@"')
        self.script(
            "srun",
            'while [ "$1" != bash ]; do shift; done',
            "tasks=()",
            'for rank in 0 1; do SLURM_NODEID=$rank "on-node-$rank" "$@" & tasks+=($!); done',
            "trap 'kill -USR1 \"${tasks[@]}\"' USR1",
            "status=0",
            'for task in "${tasks[@]}"; do',
            '  while true; do wait "$task"; code=$?; kill -0 "$task" 2>/dev/null || break; done',
            '  [ "$code" = 0 ] || status=$code',
            "done",
            'exit "$status"',
        )
        self.script(
            "scontrol",
            f'if [ "$1" = show ]; then printf "%s\\n" {shlex.join(nodes.names)}; exit; fi',
            f'echo "$@" >>{folder}/requeued',
        )

    def script(self, name: str, *lines: str) -> None:
        path = self.folder / "bin" / name
        path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
        path.chmod(0o755)

    def start(self, *words: str) -> subprocess.Popen:
        """The job as Slurm starts it, from a copy of the script in a place of its own."""
        copy = self.folder / "slurm_script"
        shutil.copy(LAUNCH / "slurm/train.sbatch", copy)
        job = {
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "1",
            "SLURM_JOB_NODELIST": "node-[0-1]",
            "SLURM_JOB_ID": str(free_port() - 20_000),
            "PATH": f"{self.folder / 'bin'}:{self.nodes.environment['PATH']}",
        }
        return subprocess.Popen(
            ["bash", str(copy), *words],
            env=self.nodes.environment | job,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "requeued"
        return path.read_text().splitlines() if path.exists() else []


def finished(process: subprocess.Popen, seconds: float = 600.0) -> str:
    """Output of a process at its end; past the time its group is killed."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(process.communicate()[0]) from None


def outcome(run_dir: Path) -> str:
    return json.loads((run_dir / "status.json").read_text())["outcome"]


def run_on(nodes: Nodes, commands: list[list[str]], environments: list[dict[str, str]]) -> list[str]:
    """Starts a command on each node; their output, all of them having ended well."""
    processes = [
        subprocess.Popen(
            [*prefix, *command],
            env=nodes.environment | environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for prefix, command, environment in zip(nodes.prefixes, commands, environments, strict=True)
    ]
    said = [finished(process) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return said


def manifest_of_training() -> dict:
    return yaml.safe_load((LAUNCH / "kubernetes/train.yaml").read_text())


@pytest.fixture(scope="module")
def whole(nodes: Nodes, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the two pods of the Kubernetes manifest."""
    manifest, run_dir = manifest_of_training(), tmp_path_factory.mktemp("kubernetes") / "run"
    (container,) = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    given = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    # What a test has to replace: how many GPUs there are, the name of the first pod.
    given |= {"HEAD": nodes.names[0], "PORT": str(free_port()), "PROCESSES_PER_NODE": "1"}
    command = [*container["command"], *words, f"--run_dir={run_dir}"]
    said = run_on(nodes, [command] * 2, [given | {"NODE_RANK": str(number)} for number in range(2)])
    assert "2 processes" in said[0]
    assert outcome(run_dir) == "finished"
    return run_dir


def test_kubernetes_manifest_is_of_one_piece() -> None:
    manifest = manifest_of_training()
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["backoffLimit"] == 0  # a failed pod ends its job, and the set starts all pods anew
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    given = {one["name"]: one.get("value") for one in container["env"]}
    assert int(given["NODES"]) == spec["parallelism"] == spec["completions"]
    assert int(given["PROCESSES_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert given["HEAD"] == f"{manifest['metadata']['name']}-{job['name']}-0-0.{manifest['metadata']['name']}"
    (rank,) = [one for one in container["env"] if one["name"] == "NODE_RANK"]
    assert "job-completion-index" in rank["valueFrom"]["fieldRef"]["fieldPath"]
    claims = [one["persistentVolumeClaim"]["claimName"] for one in pod["volumes"] if "persistentVolumeClaim" in one]
    volume = yaml.safe_load((LAUNCH / "kubernetes/shared-volume.yaml").read_text())
    assert claims == [volume["metadata"]["name"]]
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert mounts.keys() == {one["name"] for one in pod["volumes"]}
    assert all(word.partition("=")[2].startswith(("/shared/", "configs/")) for word in container["args"])
    assert pod["terminationGracePeriodSeconds"] >= 60 + 240  # node.sh gives workers 240 s


def test_slurm_job_that_is_told_to_end_requeues_itself_and_ends_with_the_same_weights(
    whole: Path, nodes: Nodes, words: list[str], tmp_path: Path
) -> None:
    slurm, run_dir = Slurm(tmp_path, nodes), tmp_path / "run"
    process = slurm.start(*words, f"--run_dir={run_dir}")
    while not (run_dir / "metrics.jsonl").exists() or len(training_runs.metrics(run_dir)) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)  # to the batch script alone, as --signal=B: says
    said = finished(process)
    assert outcome(run_dir) == "interrupted", said
    assert process.returncode == 75, said
    assert len(slurm.requeued) == 1
    assert slurm.requeued[0].startswith("requeue ")
    done = json.loads((run_dir / "status.json").read_text())["step"]
    assert 2 <= done < STEPS
    process = slurm.start(*words, f"--run_dir={run_dir}")
    said = finished(process)
    assert process.returncode == 0, said
    assert f"resuming after step {done}" in said
    assert len(slurm.requeued) == 1
    training_runs.assert_same_state(run_dir / "checkpoints/latest", whole / "checkpoints/latest")


def test_slurm_job_with_wrong_settings_ends_before_it_takes_up_nodes(
    nodes: Nodes, words: list[str], tmp_path: Path
) -> None:
    slurm = Slurm(tmp_path, nodes)
    slurm.script("srun", f"touch {tmp_path}/started")
    process = slurm.start(*words, f"--run_dir={tmp_path / 'run'}", "--optimizer.lr=-1")
    said = finished(process)
    assert process.returncode == 2, said
    assert "optimizer.lr: found -1" in said
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 143)], ids=["time", "scancel"])
def test_slurm_job_that_is_cancelled_ends_its_run_and_stays_out_of_the_queue(
    sign: signal.Signals, status: int, nodes: Nodes, words: list[str], tmp_path: Path
) -> None:
    slurm, run_dir = Slurm(tmp_path, nodes), tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    saves = f"ln -s step-00000002 {run_dir}/checkpoints/latest; exit 1"
    slurm.script("srun", f"trap '{saves}' USR1; touch {tmp_path}/ready; while true; do sleep 0.1; done")
    process = slurm.start(*words, f"--run_dir={run_dir}")
    while not (tmp_path / "ready").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(sign)
    said = finished(process)
    assert (process.returncode, len(slurm.requeued)) == (status, 1 if status == 75 else 0), said
    assert (run_dir / "checkpoints/latest").is_symlink()


@pytest.mark.parametrize(
    ("outcome", "further", "requeued"),
    [
        ("failed", False, False),
        ("failed", True, True),
        ("interrupted", False, False),  # what an earlier job wrote: this one got nowhere
        ("finished", False, False),  # an earlier job of fewer steps
    ],
)
def test_slurm_job_that_failed_is_put_back_only_if_it_got_further(
    outcome: str, further: bool, requeued: bool, nodes: Nodes, words: list[str], tmp_path: Path
) -> None:
    slurm, run_dir = Slurm(tmp_path, nodes), tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints/latest").symlink_to("step-00000001")
    (run_dir / "status.json").write_text(json.dumps({"outcome": outcome}))
    slurm.script("srun", f"{f'ln -sfn step-00000002 {run_dir}/checkpoints/latest' if further else ':'}; exit 1")
    process = slurm.start(*words, f"--run_dir={run_dir}")
    said = finished(process)
    assert (process.returncode, bool(slurm.requeued)) == ((75, True) if requeued else (1, False)), said
    assert ("not put back into the queue" in said) == (not requeued)


def test_skypilots_nodes_start_the_launcher_as_the_others_do(nodes: Nodes, tmp_path: Path) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task.keys() == {"name", "num_nodes", "resources", "workdir", "volumes", "envs", "setup", "run"}
    assert task["envs"]["RUN_DIR"].startswith(f"{next(iter(task['volumes']))}/")
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    # The launcher's words instead of a run: pods and Slurm's nodes start the same node.sh for real. In a folder of its
    # own, where no .venv puts the real launcher first.
    shutil.copytree(LAUNCH, tmp_path / "workdir/launch")
    (tmp_path / "accelerate").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "accelerate").chmod(0o755)
    sky = task["envs"] | {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.9",
        "PATH": f"{tmp_path}:{nodes.environment['PATH']}",
    }
    environments = [sky | {"SKYPILOT_NODE_RANK": str(number)} for number in range(2)]
    for number, said in enumerate(
        run_on(nodes, [["bash", "-c", f"cd {tmp_path}/workdir\n{task['run']}"]] * 2, environments)
    ):
        words = said.split()
        asked = dict(zip(words[1:-3:2], words[2:-3:2], strict=False))
        assert words[0] == "launch"
        assert asked["--num_machines"] == "2"
        assert asked["--num_processes"] == "16"
        assert asked["--machine_rank"] == str(number)
        assert asked["--main_process_ip"] == "10.0.0.7"
        assert (ROOT / asked["--config_file"]).is_file()
        assert words[-5:] == ["ldm/train.py", "--config", task["envs"]["CONFIG"], "--run_dir", task["envs"]["RUN_DIR"]]


def start_node(folder: Path, *launcher: str, **given: str) -> subprocess.Popen:
    """node.sh with a launcher of these lines, which appends a line to `started` before them."""
    path = folder / "accelerate"
    path.write_text("\n".join(["#!/usr/bin/env bash", f"echo >>{folder}/started", *launcher, ""]))
    path.chmod(0o755)
    node = {"NODES": "2", "NODE_RANK": "0", "HEAD": "localhost", "PORT": "1", "PROCESSES_PER_NODE": "1"}
    return subprocess.Popen(
        ["bash", str(LAUNCH / "node.sh"), "--config", "x.yaml"],
        env=os.environ | node | given | {"PATH": f"{folder}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def starts(folder: Path) -> int:
    return len((folder / "started").read_text().splitlines()) if (folder / "started").exists() else 0


@pytest.mark.parametrize(("allowed", "status", "expected"), [("5", 0, 3), ("2", 0, 3), ("1", 7, 2), ("0", 7, 1)])
def test_a_node_starts_a_failed_launcher_again_so_many_times(
    allowed: str, status: int, expected: int, tmp_path: Path
) -> None:
    fails_twice = f'[ "$(wc -l <{tmp_path}/started)" -gt 2 ] || exit 7'
    process = start_node(tmp_path, fails_twice, MAX_RESTARTS=allowed, RESTART_PAUSE="0")
    said = finished(process, 120)
    assert (process.returncode, starts(tmp_path)) == (status, expected), said
    assert said.count("the launcher ended with 7; starting again") == expected - 1


@pytest.mark.parametrize("when", ["training", "pausing"])
@pytest.mark.parametrize("sign", [signal.SIGUSR1, signal.SIGTERM])
def test_a_node_that_is_told_to_end_passes_it_on_and_starts_nothing_again(
    when: str, sign: signal.Signals, tmp_path: Path
) -> None:
    told = f"trap 'echo >{tmp_path}/told; exit 7' TERM; touch {tmp_path}/ready; while true; do sleep 0.1; done"
    process = start_node(tmp_path, told if when == "training" else "exit 7", RESTART_PAUSE="600")
    if when == "training":
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
    else:
        assert process.stdout is not None
        assert "starting again in 600 s" in process.stdout.readline()
    process.send_signal(sign)
    finished(process, 120)
    assert (process.returncode, starts(tmp_path)) == (7, 1)
    assert (tmp_path / "told").exists() == (when == "training")


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_every_script_is_bash_that_stops_at_errors(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "set -euo pipefail" in script.read_text()
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_slurm_asks_for_the_signal_that_its_script_handles() -> None:
    text = (LAUNCH / "slurm/train.sbatch").read_text()
    options = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert "--requeue" in options
    assert "--open-mode=append" in options  # the log of before the requeue stays
    assert "--ntasks-per-node=1" in options
    (told,) = [option for option in options if option.startswith("--signal=")]
    kind, _, seconds = told.removeprefix("--signal=").partition("@")
    assert kind == "B:USR1"
    given = next(line for line in (LAUNCH / "node.sh").read_text().splitlines() if "SHUTDOWN_TIMEOUT:-" in line)
    assert int(seconds) > int(given.partition(":-")[2].rstrip('}"'))  # Slurm waits longer than the launcher does
