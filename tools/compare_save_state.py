"""What accelerate's own save_state does when its process is killed: a common training script under counted SIGKILLs.

Enters: a number of kills. Leaves: a small table, and JSON where asked for: how many runs resumed equal to the
undisturbed one, how many could not resume, how many went on differently without a word.

The script is the one of accelerate's documentation: automatic checkpoint naming, total_limit=2, resume from the
highest-numbered folder. It is helped where it can be: samplers and loaders draw from generators of their own, so that a
stop between two saves and a load give the undisturbed run bit by bit; `orderly` in the report says whether they do.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

STEPS, EVERY, BATCH, SAMPLES = 24, 2, 24, 72
CHECKPOINTS = Path("run") / "checkpoints"


class Average:
    """An exponential moving average of the weights and the number of steps done, as a script registers them."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.average = [p.detach().clone() for p in parameters]
        self.step = 0

    @torch.no_grad()
    def update(self) -> None:
        for average, parameter in zip(self.average, self.parameters, strict=True):
            average.lerp_(parameter, 0.1)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average, self.step = state["average"], state["step"]


def train(words: Sequence[str]) -> int:
    """The common script; a word "stop" ends it in order after half of the steps. Writes losses and a final digest."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
    from torch.utils.data import DataLoader, TensorDataset

    from ldm.models.conditioning import Conditioning
    from ldm.models.unet import UNet
    from ldm.models.unet_config import UNetConfig

    project = ProjectConfiguration("run", automatic_checkpoint_naming=True, total_limit=2)
    loading = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, project_config=project, dataloader_config=loading)
    set_seed(0)
    data = torch.Generator().manual_seed(1)
    latents = torch.randn(SAMPLES, 4, 4, 4, generator=data)
    texts = torch.randn(SAMPLES, 8, 32, generator=data)
    unet: Any = UNet(
        UNetConfig(
            sample_size=4,
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
            block_out_channels=[16, 40],
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=32,
            norm_num_groups=8,
        )
    )
    optimizer: Any = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    decay: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 + 0.5 * math.cos(math.pi * k / STEPS))
    loader: Any = DataLoader(
        TensorDataset(latents, texts), BATCH // accelerator.num_processes, shuffle=True, generator=torch.Generator()
    )
    unet, optimizer, loader, decay = accelerator.prepare(unet, optimizer, loader, decay)
    average = Average(list(unet.parameters()))
    accelerator.register_for_checkpointing(average)
    found = sorted(int(path.name.split("_")[1]) for path in CHECKPOINTS.glob("checkpoint_*"))
    if found:
        accelerator.load_state(str(CHECKPOINTS / f"checkpoint_{found[-1]}"))
        project.iteration = found[-1] + 1
    while average.step < STEPS:
        epoch, done = divmod(average.step, len(loader))
        loader.set_epoch(epoch)
        for clean, text in accelerator.skip_first_batches(loader, done):
            noise, t = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
            alpha = (1 - t / 1000).view(-1, 1, 1, 1)
            noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
            loss = (unet(noisy, t, Conditioning(text=text)) - noise).square().mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
            average.update()
            if accelerator.is_main_process:
                with open("losses.jsonl", "a") as file:
                    file.write(json.dumps([average.step, loss.item()]) + "\n")
            if average.step % EVERY == 0:
                accelerator.save_state()
            if "stop" in words and average.step == STEPS // 2:
                return 0
    digest = xxhash.xxh3_128()
    for tensor in [*unet.parameters(), *average.average, *moments(optimizer)]:
        digest.update(tensor.detach().numpy().tobytes())
    if accelerator.is_main_process:
        Path("digest").write_text(digest.hexdigest())
    accelerator.end_training()
    return 0


def moments(optimizer: Any) -> list[Tensor]:
    """All of AdamW's state, in the order of the parameters."""
    state = optimizer.optimizer.state
    return [state[p][name] for group in optimizer.param_groups for p in group["params"] for name in sorted(state[p])]


def outcome(folder: Path) -> tuple[str, dict[int, float]]:
    """Digest of weights, average and optimizer, and the loss that was logged last for each step."""
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines() if line.endswith("]")]
    return (folder / "digest").read_text(), dict(lines)


def files_of(checkpoint: Path) -> dict[str, int]:
    """Names and sizes of a checkpoint's files."""
    return {path.name: path.stat().st_size for path in checkpoint.iterdir()}


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by number."""
    return sorted((folder / CHECKPOINTS).glob("checkpoint_*"), key=lambda path: int(path.name.split("_")[1]))


def wait_for_instant(processes: Any, folder: Path, inside: bool, seconds: float, rng: random.Random) -> None:
    """Returns at a random instant of the run, or of the writing of one of its checkpoints."""
    if not inside:
        time.sleep(rng.uniform(0, seconds))
        return
    wanted = folder / CHECKPOINTS / f"checkpoint_{rng.randrange(STEPS // EVERY - 1)}"
    while not wanted.exists() and processes.running():
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.03))


def trial(server: Any, folder: Path, world: int, whole: dict[str, Any], inside: bool, rng: random.Random) -> list[str]:
    """One run that is killed once and started again; what there is to count about it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    processes = server.start(folder, [], world, program="compare_save_state:train")
    wait_for_instant(processes, folder, inside, whole["seconds"], rng)
    processes.kill()
    if -signal.SIGKILL not in processes.wait():
        return []
    left = checkpoints(folder)
    halves = [path for path in left if files_of(path).keys() != whole["files"].keys()]
    halves += [path for path in left if path not in halves and files_of(path) != whole["files"]]
    counted = ["kills", "kills that left a half-written checkpoint" if halves else "kills that left whole ones only"]
    again = server.start(folder, [], world, program="compare_save_state:train")
    codes = again.wait()
    if codes == [0] * world:
        equal = outcome(folder) == whole["outcome"]
        counted.append("resumed equal" if equal else "went on differently without a word")
        if not equal and halves:
            counted.append("went on differently, from a half-written checkpoint")
    else:
        counted.append("could not resume: an error")
        others = [path for path in left if path not in halves]
        counted.append(
            "could not resume, an older whole checkpoint was there" if others else "no whole checkpoint left"
        )
    return counted


def undisturbed(server: Any, folder: Path, world: int) -> dict[str, Any]:
    """The run that nobody kills, and whether one that is stopped in order and started again is equal to it."""
    for name in ("warm", "whole", "orderly"):
        (folder / name).mkdir(parents=True)
    server.start(folder / "warm", ["stop"], world, program="compare_save_state:train").finish()
    began = time.monotonic()
    server.start(folder / "whole", [], world, program="compare_save_state:train").finish()
    seconds = time.monotonic() - began
    for words in (["stop"], []):
        server.start(folder / "orderly", words, world, program="compare_save_state:train").finish()
    whole = outcome(folder / "whole")
    files = files_of(checkpoints(folder / "whole")[-1])
    return {"outcome": whole, "seconds": seconds, "files": files, "orderly": outcome(folder / "orderly") == whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="kills for each number of processes (60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the instants (0)")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2], help="numbers of processes (1 2)")
    parser.add_argument("--out", type=Path, help="file for the counts as JSON")
    options = parser.parse_args()
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here.parent / "tests"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    from forked_runs import ForkServer

    report: dict[str, Any] = {"seed": options.seed}
    with tempfile.TemporaryDirectory() as name, ForkServer() as server:
        for world in options.worlds:
            rng, counts = random.Random(f"{options.seed} {world}"), Counter[str]()
            folder = Path(name) / str(world)
            whole = undisturbed(server, folder, world)
            while counts["kills"] < options.kills:
                inside = rng.random() < 0.4
                counts.update(trial(server, folder / "trial", world, whole, inside, rng))
            report[f"{world} processes"] = {"orderly stop and load equal": whole["orderly"], **counts}
            print(f"\n{world} processes, seed {options.seed}; an orderly stop and load is equal: {whole['orderly']}")
            for what, count in counts.items():
                print(f"{count:6}  {what}")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
