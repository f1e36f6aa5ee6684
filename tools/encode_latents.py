"""Encodes raw shards into latents: `accelerate launch tools/encode_latents.py --config configs/X.yaml`.

In: `encoding.shards` (and `encoding.validation`) with their manifests. Out: encoded shards in `data.shards` (and
`data.validation`): moments, captions, text states and pooled text, and a manifest with the encoder's identity. Any
number of processes share the shards, started together or apart, on one host or on many that see the same folders; run
again, it goes on where it stopped.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from tqdm import tqdm

from ldm.config import RunConfig, parse_config
from ldm.data.encoding import encode_shards, encoder_identity
from ldm.data.encoding_folder import LEDGER_NAME, EncodingFolder
from ldm.data.manifest import Manifest
from ldm.data.storage import is_url
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text_conditioner import TextConditioner
from ldm.training.fit import loading
from ldm.training.launched import EngineError, processes_asked_of_launcher
from ldm.training.own_checkpoints import checked_source
from ldm.training.run import checked_text_configs


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    config = parse_config(argv, prog="tools/encode_latents.py", description=(__doc__ or "").splitlines()[0])
    if config.encoding.shards is None:
        raise SystemExit("encoding.shards is not set: name the folder of the raw shards")
    if not isinstance(config.data.shards, str):
        raise SystemExit("data.shards names several sources: encode each by itself, --data.shards=FOLDER to write to")
    pairs = [(config.encoding.shards, config.data.shards)]
    if config.encoding.validation is not None:
        if config.data.validation is None:
            raise SystemExit("encoding.validation is set, but data.validation is not: name the folder to write to")
        pairs.append((config.encoding.validation, config.data.validation))
    for raw, out in pairs:
        if is_url(raw) or is_url(out):
            raise SystemExit(f"{raw if is_url(raw) else out} is a URL: encoding reads and writes local folders")
        if Path(raw).resolve() == Path(out).resolve():
            raise SystemExit(f"raw and encoded shards have the same folder {raw}: set data.shards to another")
    device = device_of_process()
    # A claim is let go of on the way out: others need not wait until it has been silent for long enough.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with loading("autoencoder"):
        autoencoder = AutoencoderKL.from_pretrained(checked_source(config.autoencoder, "vae")).eval()
    text_encoder = TextConditioner.load(list(checked_text_configs(config)), device, config.empty_caption)
    autoencoder.to(device)
    for raw, out in pairs:
        encode_folder(Path(raw), Path(out), config, device, autoencoder, text_encoder)
    return 0


def device_of_process() -> torch.device:
    """The device of this process among those that its launcher started on this host.

    Raises:
        EngineError: the launcher started fewer processes than it was asked for.
    """
    wanted, started = processes_asked_of_launcher(), int(os.environ.get("WORLD_SIZE", "1"))
    if wanted not in (None, started):
        raise EngineError(
            f"{wanted} processes were asked of the launcher, but it started {started}. `accelerate launch --cpu` "
            "starts only one; on CPU use ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N, or "
            "torchrun --nproc_per_node N."
        )
    if not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    device = torch.device("cuda", local % torch.cuda.device_count())  # a task of Slurm's may see its own GPU alone
    torch.cuda.set_device(device)
    return device


def encode_folder(
    raw: Path,
    out: Path,
    config: RunConfig,
    device: torch.device,
    autoencoder: AutoencoderKL,
    text_encoder: TextConditioner,
) -> None:
    """Encodes one folder of raw shards together with whoever else does; returns when all of it is there."""
    manifest = Manifest.load(raw)
    manifest.check_files()
    stores_text = config.encoding.text_states
    buckets = config.data.buckets
    identity = encoder_identity(
        autoencoder, text_encoder, config.data.resolution, config.encoding, text_states=stores_text, buckets=buckets
    )
    speaks = os.environ.get("RANK", "0") == "0"
    limit, patience = config.data.quarantine_limit, config.encoding.patience
    bar = tqdm(desc=f"encoding {raw}", unit="picture", disable=not speaks)
    with bar, EncodingFolder(manifest, out, identity, limit, patience) as folder:
        waiting = False
        while missing := folder.missing():
            bar.total = bar.n + sum(manifest.counts[shard] for shard in missing)  # others have taken some
            before = bar.n
            done = encode_shards(
                manifest,
                folder.take_missing(),
                folder.own,
                autoencoder,
                text_encoder if stores_text else None,
                folder.ledger,
                resolution=config.data.resolution,
                config=config.encoding,
                device=device,
                buckets=buckets,
                written=folder.put,
            )
            try:
                for samples in done:
                    bar.update(samples)
            except FileNotFoundError:
                # Others took over what this process was slow to encode, and have removed what it was writing.
                if folder.published() is None:
                    raise
            if bar.n == before:
                if not waiting:
                    tqdm.write(f"{out}: waiting for shards of {', '.join(folder.holders())}")
                waiting = True
                folder.wait()
        encoded = folder.finish()
    if speaks:
        lost = sum(manifest.counts) - sum(encoded.counts)
        print(
            f"{out}: {sum(encoded.counts):,} encoded samples in {len(encoded.counts)} shards"
            + (f"; {lost:,} could not be used, see {out / LEDGER_NAME}" if lost else "")
        )


if __name__ == "__main__":
    sys.exit(main())
