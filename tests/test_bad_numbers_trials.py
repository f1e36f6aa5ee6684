"""NaN, infinity and overflow put into random samples, ranks and steps: skipped by all, logged, and without a trace.

Four here; all of them: LDM_BAD_NUMBERS=100 LDM_TEST_WORKERS=0 bash tests/run.sh -s tests/test_bad_numbers_trials.py
"""

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import tiny_runs
import torch
import trials
from forked_runs import ForkServer
from safetensors.torch import load_file

BAD_NUMBERS = trials.number("LDM_BAD_NUMBERS", 4)
GLOBAL_BATCH = 24
LOSSES = ("nan", "inf", "-inf", "nan times", "huge")
GRADIENTS = ("nan gradient", "inf gradient")
WORLDS = (1, 2, 4)


def draw_bad(rng: random.Random, world: int, number: int) -> list[dict[str, Any]]:
    """That many bad numbers: half of them in losses; steps, the first and the last among them, may have several."""
    bad: list[dict[str, Any]] = []
    for _ in range(number):
        step = rng.randint(1, tiny_runs.STEPS)
        if bad and rng.random() < 0.3:  # next to the one before, or in the same step
            step = min(step_of(bad[-1]) + rng.randint(0, 1), tiny_runs.STEPS)
        if rng.random() < 0.6:
            position = (step - 1) * GLOBAL_BATCH + rng.randrange(GLOBAL_BATCH)
            bad.append({"position": position, "kind": rng.choice(LOSSES)})
        else:
            where = {"rank": rng.randrange(world), "parameter": rng.randrange(1000)}
            bad.append({"step": step, "kind": rng.choice(GRADIENTS)} | where)
    return bad


def step_of(bad: dict[str, Any]) -> int:
    step: int = bad["step"] if "step" in bad else bad["position"] // GLOBAL_BATCH + 1
    return step


def rank_of(bad: dict[str, Any], world: int) -> int:
    rank: int = bad["rank"] if "rank" in bad else bad["position"] % GLOBAL_BATCH * world // GLOBAL_BATCH
    return rank


def log_problems(lines: list[dict[str, Any]], bad: list[dict[str, Any]]) -> list[str]:
    """What is wrong with bad_steps.jsonl: a line a bad step, with the samples whose loss is bad, else all."""
    steps = sorted({step_of(one) for one in bad})
    if [line["step"] for line in lines] != steps:
        return [f"bad_steps.jsonl has steps {[line['step'] for line in lines]}, bad were {steps}"]
    problems = []
    for line in lines:
        here = [one for one in bad if step_of(one) == line["step"]]
        kinds = {one["position"]: one["kind"] for one in here if "position" in one}  # the last one told counts
        named = sorted(position for position, kind in kinds.items() if kind != "huge")
        first = (line["step"] - 1) * GLOBAL_BATCH
        expected = [named] if named else [list(range(first, first + GLOBAL_BATCH))]
        if not named and kinds:  # huge: infinite already in the loss, or in its gradient only
            expected.append(sorted(kinds))
        if line["positions"] not in expected:
            problems.append(f"step {line['step']} names positions {line['positions']}, expected {expected[0]}")
    return problems


def state_problems(run: Path, plain: Path) -> list[str]:
    """Tensors of the run's last checkpoint that are not those of the loop that left the bad steps out."""
    last = run / "checkpoints" / "latest"
    pairs = {
        "weights": last / "training_state" / "unet.safetensors",
        "average": last / "unet" / "diffusion_pytorch_model.safetensors",
        "optimizer": last / "training_state" / "optimizer.safetensors",
    }
    problems = []
    for name, path in pairs.items():
        ours, theirs = load_file(path), load_file(plain / f"{name}.safetensors")
        different = [key for key in theirs if key not in ours or not torch.equal(ours[key], theirs[key])]
        if different or ours.keys() != theirs.keys():
            problems.append(f"{name}: {len(different)} of {len(theirs)} tensors differ, such as {different[:2]}")
    return problems


def test_bad_numbers_at_random_ranks_and_steps_leave_the_weights_of_a_run_without_those_steps(tmp_path: Path) -> None:
    """4 NaNs, infinities and overflows (LDM_BAD_NUMBERS): all ranks agree, the log names them, weights equal."""
    rng, counts, gone_wrong = random.Random(trials.SEED), Counter(), []
    words = tiny_runs.make(tmp_path / "material")
    done, runs = 0, 0
    with ForkServer() as server:
        for number in itertools.count():
            if done >= BAD_NUMBERS:
                break
            world = WORLDS[number % len(WORLDS)]
            bad = draw_bad(rng, world, min(rng.randint(3, 8), BAD_NUMBERS - done))
            options = [f"--training.max_micro_batch={rng.choice((24, 6, 3))}", f"--distributed.processes={world}"]
            folder, plain = tmp_path / f"run-{number}", tmp_path / f"plain-{number}"
            folder.mkdir()
            plain.mkdir()
            # Only the last checkpoint is compared.
            told = [*words, *options, "--training.checkpoint_every=0"]
            server.start(folder, told, world, hook="injected_numbers:install", told=bad).finish()
            without = sorted({step_of(one) for one in bad})
            loop = "injected_numbers:train_without"
            server.start(plain, told, world, program=loop, hook="injected_numbers:leave_out", told=without).finish()
            lines = [json.loads(line) for line in (folder / "run" / "bad_steps.jsonl").read_text().splitlines()]
            problems = log_problems(lines, bad) + state_problems(folder / "run", plain)
            came_to = {(folder / f"rank-{rank}.json").read_text() for rank in range(world)}
            if len(came_to) != 1:
                problems.append(f"the ranks came to {came_to}")
            losses = [json.loads(line)["loss"] for line in tiny_runs.log_of(folder / "run")]
            if len(losses) != tiny_runs.STEPS or None in losses:
                problems.append(f"the log's losses are {losses}")
            done, runs = done + len(bad), runs + 1
            for one in bad:
                counts[one["kind"]] += 1
                counts[f"rank {rank_of(one, world)} of {world}"] += 1
            if problems:
                gone_wrong.append(f"run {number}, {world} processes, {options}, {bad}: {problems}")
    trials.report(
        "bad numbers", bad_numbers=done, runs=runs, equal_runs=runs - len(gone_wrong), what=dict(sorted(counts.items()))
    )
    assert not gone_wrong, "\n".join(gone_wrong)
