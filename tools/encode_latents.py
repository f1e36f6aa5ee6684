"""Encodes raw shards into latents: `accelerate launch tools/encode_latents.py --config configs/X.yaml`.

In: `encoding.shards` (and `encoding.validation`) with their manifests. Out: encoded shards in `data.shards` (and
`data.validation`): moments, captions, text states and pooled text, and a manifest with the encoder's identity. Several
processes share the shards; run again, it goes on where it stopped.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from ldm.config import RunConfig, parse_config
from ldm.data.encoding import claim_folder, encode_shards, encoder_identity, pending_shards
from ldm.data.manifest import MANIFEST_NAME, Manifest, build_manifest
from ldm.data.quarantine import FEWEST_SEEN, Ledger, QuarantineLimitError
from ldm.data.storage import is_url
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text_conditioner import TextConditioner
from ldm.training.distributed import start_accelerator
from ldm.training.fit import loading
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
    accelerator = start_accelerator(config.distributed, "no")
    with loading("autoencoder"):
        autoencoder = AutoencoderKL.from_pretrained(checked_source(config.autoencoder, "vae")).eval()
    text_encoder = TextConditioner.load(list(checked_text_configs(config)), accelerator.device, config.empty_caption)
    autoencoder.to(accelerator.device)
    for raw, out in pairs:
        encode_folder(Path(raw), Path(out), config, accelerator, autoencoder, text_encoder)
    accelerator.end_training()
    return 0


def encode_folder(
    raw: Path,
    out: Path,
    config: RunConfig,
    accelerator: Accelerator,
    autoencoder: AutoencoderKL,
    text_encoder: TextConditioner,
) -> None:
    """Encodes one folder of raw shards; the manifest comes last, when all processes are done."""
    manifest = Manifest.load(raw)
    manifest.check_files()
    stores_text = config.encoding.text_states
    buckets = config.data.buckets
    identity = encoder_identity(
        autoencoder, text_encoder, config.data.resolution, config.encoding, text_states=stores_text, buckets=buckets
    )
    with accelerator.main_process_first():
        claim_folder(out, identity | {"raw_shards": manifest.digest()})
    rank, world = accelerator.process_index, accelerator.num_processes
    shards = pending_shards(manifest, out, rank, world)
    # Each process has a ledger of its own: lines of several in one file could interleave on shared storage.
    name = "quarantine.jsonl" if world == 1 else f"quarantine-{rank}.jsonl"
    ledger = Ledger(out / name, config.data.quarantine_limit)
    if rank == 0:
        ledger.append(manifest.damaged())
    done = encode_shards(
        manifest,
        shards,
        out,
        autoencoder,
        text_encoder if stores_text else None,
        ledger,
        resolution=config.data.resolution,
        config=config.encoding,
        device=accelerator.device,
        buckets=buckets,
    )
    total = sum(manifest.counts[shard] for shard in shards)
    with tqdm(total=total, desc=f"encoding {raw}", unit="picture", disable=rank != 0) as bar:
        for samples in done:
            bar.update(samples)
    truncated = sum(gather_object([text_encoder.truncated]))  # waits for all processes, too
    if accelerator.is_main_process:
        publish(manifest, out, identity, config.data.quarantine_limit, truncated if stores_text else 0)
    accelerator.wait_for_everyone()


def publish(manifest: Manifest, out: Path, identity: dict[str, Any], limit: float, truncated: int) -> None:
    """Writes the manifest of the encoded shards, and says what could not be used.

    Raises:
        QuarantineLimitError: more samples were lost than `limit` allows; without a manifest nobody trains on the rest.
        ValueError: the folder holds shards that are not of this manifest.
    """
    strangers = {path.name for path in out.glob("*.tar")} - {shard.name for shard in manifest.shards}
    if strangers:
        raise ValueError(
            f"{out} holds shards that {manifest.folder} has not: {', '.join(sorted(strangers)[:5])}; remove them"
        )
    encoded = build_manifest(out, encoder=identity, progress=False)
    lost = sum(manifest.counts) - sum(encoded.counts)
    if lost > limit * sum(manifest.counts) and lost > limit * FEWEST_SEEN:
        (out / MANIFEST_NAME).unlink()
        raise QuarantineLimitError(
            f"{lost:,} of {sum(manifest.counts):,} samples of {manifest.folder} could not be used; "
            f"data.quarantine_limit allows {limit:.2%}. They are listed in {out}/quarantine*.jsonl"
        )
    print(
        f"{out}: {sum(encoded.counts):,} encoded samples in {len(encoded.counts)} shards"
        + (f"; {lost:,} could not be used, see {out}/quarantine*.jsonl" if lost else "")
        + (f"; {truncated:,} captions were longer than the text encoder takes and were cut" if truncated else "")
    )


if __name__ == "__main__":
    sys.exit(main())
