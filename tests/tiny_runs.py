"""A tiny run for trials: encoded shards with text states, models of random weights and a config, in one folder.

Enters: a folder. Leaves: the words of a command line that trains 24 steps in a second or two, and what a finished run
left, in a form that can be compared with another run's.
"""

import json
from pathlib import Path

import numpy as np
import tiny_models
import torch
import yaml

from ldm.data.encoding import EncodingConfig, encoder_identity
from ldm.data.shards import write_shards
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.text_conditioner import TextConditioner
from ldm.models.text_encoder import TextEncoderConfig

STEPS = 24
LOGGED = ("step", "loss", "loss_quarter_1", "loss_quarter_4", "captions_dropped", "lr", "grad_norm", "latent_std",
          "ema_decay", "quarantined")  # fmt: skip
"""What a line of the log says besides times and memory."""


def make(folder: Path) -> list[str]:
    """Models, 55 encoded samples in 4 shards, one of them damaged, and a config; the words that name it."""
    folder.mkdir(parents=True)
    tiny_models.make_clip(folder / "text_encoder")
    text_encoder = TextConditioner.load([TextEncoderConfig(str(folder / "text_encoder"), max_length=8)])
    torch.manual_seed(5)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    autoencoder = AutoencoderKL(
        AutoencoderConfig(**blocks, block_out_channels=[8, 16], norm_num_groups=8, sample_size=8, scaling_factor=0.7)
    )
    autoencoder.save_pretrained(folder / "autoencoder")
    rng = np.random.default_rng(5)
    captions = [f"{('red', 'ape', 'pea')[i % 3]} {i}" for i in range(55)]
    with torch.no_grad():
        states = text_encoder.encode(captions).text.numpy().astype(np.float16)
    samples = [
        {
            "__key__": f"{i:05d}",
            "moments.npy": rng.standard_normal((8, 4, 4)).astype(np.float16),
            "text.npy": states[i],
            "txt": caption,
            "json": {"size": [9, 8 + i], "crop": [0, i % 3]},
        }
        for i, caption in enumerate(captions)
    ]
    identity = encoder_identity(autoencoder, text_encoder, 8, EncodingConfig(), text_states=True)
    manifest = write_shards(samples, folder / "shards", prefix="s", samples_per_shard=16, encoder=identity)
    index = manifest.index(1)
    flip_bit(folder / "shards" / "s-000001.tar", int(index.offsets[0] + index.sizes[0] // 2))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings(folder)))
    return [f"--config={folder / 'config.yaml'}"]


def settings(folder: Path) -> dict:
    """The run's settings; `run_dir` is relative, so that runs in different folders have equal configs."""
    return {
        "run_dir": "run",
        "autoencoder": str(folder / "autoencoder"),
        "data": {
            "shards": str(folder / "shards"),
            "resolution": 8,
            "workers": 0,
            "shards_per_block": 2,
            "quarantine_limit": 0.1,
        },
        "text_encoder": {"source": str(folder / "text_encoder"), "max_length": 8},
        "unet": {
            "sample_size": 4,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [16, 40],
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "cross_attention_dim": 32,
            "norm_num_groups": 8,
        },
        "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 3},
        "ema": {"decay": 0.9},
        "training": {"steps": STEPS, "global_batch": 24, "checkpoint_every": 2, "keep_checkpoints": 2},
        "wrapping": {"mixed_precision": "no", "attention": "sdpa"},
        "metrics": {"log_every": 1, "tensorboard": False},
        "previews": {"every": 0},
        "validation": {"every": 0},
    }


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    """Inverts one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def log_of(run_dir: Path) -> list[str]:
    """The run's log without times and memory: a line a logged step, numbers as they are written."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({name: line[name] for name in LOGGED}) for line in lines]


def left_by(run_dir: Path) -> dict[str, bytes | str | list[str]]:
    """All that a run is compared by: each file of its checkpoints (weights, EMA, optimizer, position), log, ledger."""
    found: dict[str, bytes | str | list[str]] = {"log": log_of(run_dir)}
    for path in sorted((run_dir / "checkpoints").rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(run_dir))] = str(path.readlink())
        elif path.is_file():
            found[str(path.relative_to(run_dir))] = path.read_bytes()
    found["quarantine.jsonl"] = (run_dir / "quarantine.jsonl").read_bytes()
    found["outcome"] = json.loads((run_dir / "status.json").read_text())["outcome"]
    return found


def differences(ours: dict, theirs: dict) -> list[str]:
    """Names of what differs between a run and the undisturbed one, or is left by one alone; empty where identical.

    Checkpoints older than any that the undisturbed run kept do not count: a run that is killed between its last
    checkpoint and the removal of the oldest has nothing more to do when it is started again.
    """
    oldest = min(name for name in theirs if name.startswith("checkpoints/step-"))
    names = {name for name in ours if not name.startswith("checkpoints/step-") or name >= oldest}
    return sorted(name for name in names | theirs.keys() if ours.get(name) != theirs.get(name))
