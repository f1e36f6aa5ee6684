"""A folder that several processes, on one host or many, fill with encoded shards, without knowing of each other.

Enters: the raw shards' manifest, the encoder's identity, and shards as each process completes them. Leaves: each shard
once, whole or not at all; then, once, the ledger of what could not be used and the manifest. Whoever runs again, or is
added, takes what is left; what a killed process had begun is begun anew by another. Only this folder is shared.

    encoder.json           by what the folder is encoded; a process with another encoding is refused
    .encoding/NAME.tar.0   a claim (claims.py): which process works on a shard, or on the manifest
    .encoding/NAME.tar.json    what the shard lacks, written before the shard appears
    .encoding/HOST-PID-.../    what one process writes before it is complete; .encoding goes when the manifest is there
                               (as .encoding.XXXXXXXX, which is not looked at)
"""

import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm.data.claims import Claim, Claims, appear_once, write_once
from ldm.data.encoding import WrittenShard
from ldm.data.manifest import MANIFEST_NAME, Manifest, shard_entry, shard_files
from ldm.data.quarantine import FEWEST_SEEN, Ledger, QuarantineLimitError
from ldm.data.shard_index import ManifestError, index_path
from ldm.data.storage import write_whole

IDENTITY_NAME = "encoder.json"
LEDGER_NAME = "quarantine.jsonl"
WORK = ".encoding"
LONGEST_POLL = 1.0  # seconds between two looks at what others do


class EncodingFolder:
    """One process's part in filling `out`; a context manager.

    Args:
        manifest: of the raw shards.
        identity: what `encoder_identity` says.
        limit: share of samples that may be missing, 0 .. 1.
        patience: seconds after which the silent process of another host is given up.

    Raises:
        ValueError: the folder holds shards of another encoding or of other raw shards; names them.
    """

    def __init__(self, manifest: Manifest, out: Path, identity: dict[str, Any], limit: float, patience: float) -> None:
        self.manifest = manifest
        self.out = out
        self.identity = identity
        self.limit = limit
        self.names = [shard.name for shard in manifest.shards]
        begin_folder(out, identity | {"raw_shards": manifest.digest()})
        strangers = {path.name for path in shard_files(out)} - set(self.names)
        if strangers:
            listing = ", ".join(sorted(strangers)[:5])
            raise ValueError(f"{out} holds shards that {manifest.folder} has not: {listing}; remove them")
        self.work = out / WORK
        self.own = self.work / f"{platform.node()}-{os.getpid()}-{os.urandom(3).hex()}"
        """Where this process writes a shard until it is complete; there from its first claim on."""
        self.ledger = Ledger(self.own / LEDGER_NAME, limit)
        self._claims = Claims(self.work, patience)
        self._held: dict[str, Claim] = {}
        self._poll = min(LONGEST_POLL, patience / 10)

    def __enter__(self) -> "EncodingFolder":
        self._claims.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._claims.__exit__(*error)

    def missing(self) -> list[int]:
        """Shards that are not there yet, by number."""
        there = {path.name for path in shard_files(self.out)}
        return [number for number, name in enumerate(self.names) if name not in there]

    def take_missing(self) -> Iterator[int]:
        """Shards for this process to encode, one after the other, until each is there or another process's.

        It never waits: two processes, each with a shard under way, would wait for each other.
        """
        missing = self.missing()
        if missing:
            self.own.mkdir(parents=True, exist_ok=True)
        for number in missing:
            claim = self._claims.take(self.names[number])
            if claim is None:
                continue
            if (self.out / self.names[number]).exists():
                claim.finish()
                continue
            self._held[self.names[number]] = claim
            (self.out / MANIFEST_NAME).unlink(missing_ok=True)  # of a folder that was complete and has lost a shard
            yield number

    def put(self, written: WrittenShard) -> None:
        """Gives a complete shard its name, unless another process took it over and was faster."""
        name = self.names[written.number]
        lost = [asdict(record) for record in written.quarantined]
        write_whole(self._report(name), json.dumps({"quarantined": lost, "truncated": written.truncated}).encode())
        index = index_path(written.path)
        if appear_once(written.path, self.out / name):
            index.rename(index_path(self.out / name))
        else:
            index.unlink()
        self._held.pop(name).finish()

    def wait(self) -> None:
        """A moment, while others work on what is left."""
        time.sleep(self._poll)

    def holders(self) -> list[str]:
        """Who works on the shards that are left, for a message."""
        found = {self._claims.holder(self.names[number]) for number in self.missing()}
        return sorted(found - {""})

    def finish(self) -> Manifest:
        """Writes ledger and manifest, or waits until another process has; returns the manifest of the encoded shards.

        Raises:
            QuarantineLimitError: more samples are missing than `limit` allows; there is no manifest then.
        """
        while (published := self.published()) is None:
            self.work.mkdir(exist_ok=True)
            claim = self._claims.take(MANIFEST_NAME)
            if claim is None:
                self.wait()
                continue
            with claim:
                try:
                    if self.published() is None:
                        self._publish(claim)
                except FileNotFoundError:  # another took this claim over, and has removed what was half written
                    if self.published() is None:
                        raise
        for left in self.out.glob(".*.tmp"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        # Nobody needs the work any more: whoever comes now finds the manifest. It goes as a whole, claims with reports.
        with contextlib.suppress(FileNotFoundError):
            self.work.rename(self.out / f"{WORK}.{os.urandom(4).hex()}")
        for left in self.out.glob(f"{WORK}.*"):
            shutil.rmtree(left, ignore_errors=True)
        return published

    def published(self) -> Manifest | None:
        """The manifest, where it is there and is of the shards that are there."""
        if not (self.out / MANIFEST_NAME).exists():
            return None
        try:
            encoded = Manifest.load(self.out)
            sizes = [(self.out / shard.name).stat().st_size for shard in encoded.shards]
        except (FileNotFoundError, ManifestError):
            return None
        same = [shard.name for shard in encoded.shards] == sorted(self.names)
        same = same and sizes == [shard.bytes for shard in encoded.shards]
        return encoded if same and encoded.encoder == json.loads(json.dumps(self.identity)) else None

    def _publish(self, claim: Claim) -> None:
        truncated = self._write_ledger(claim)
        encoded = Manifest(self.out, [shard_entry(path) for path in shard_files(self.out)], self.identity)
        total, lost = sum(self.manifest.counts), sum(self.manifest.counts) - sum(encoded.counts)
        if lost > self.limit * total and lost > self.limit * FEWEST_SEEN:
            raise QuarantineLimitError(
                f"{lost:,} of {total:,} samples of {self.manifest.folder} could not be used; "
                f"data.quarantine_limit allows {self.limit:.2%}. They are listed in {self.out / LEDGER_NAME}"
            )
        encoded.save()
        if truncated:
            print(f"{self.out}: {truncated:,} captions were longer than the text encoder takes and were cut")

    def _write_ledger(self, claim: Claim) -> int:
        """One ledger out of what indexing found and of the shards' reports; returns how many captions were cut.

        The same whoever encoded which shard: in the order of the shards, and within one in that of its samples.

        Raises:
            FileNotFoundError: the reports are gone, or some were when they were read: another took the claim over.
        """
        lines: dict[str, list[str]] = {name: [] for name in self.names}
        path, truncated = self.out / LEDGER_NAME, 0
        before = path.read_text("utf-8").splitlines() if path.exists() else []
        for line in before:  # of shards that an earlier, completed run encoded
            lines[json.loads(line)["shard"]].append(line)
        for name in self.names:
            if self._report(name).exists():
                report = json.loads(self._report(name).read_bytes())
                lines[name] = [json.dumps(record) for record in report["quarantined"]]
                truncated += report["truncated"]
        if not claim.is_there():
            raise FileNotFoundError(f"{claim.path} is gone: another process has written {path}")
        for record in reversed(self.manifest.damaged()):
            lines[record.shard].insert(0, json.dumps(asdict(record)))
        ordered = list(dict.fromkeys(line for name in self.names for line in lines[name]))
        if ordered or before:
            write_whole(path, "".join(f"{line}\n" for line in ordered).encode())
        return truncated

    def _report(self, name: str) -> Path:
        return self.work / f"{name}.json"


def begin_folder(out: Path, identity: dict[str, Any]) -> None:
    """Marks `out` as encoded by `identity`, so that going on later with another encoder cannot mix the two.

    Raises:
        ValueError: the folder holds shards of another encoder; names the fields.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / IDENTITY_NAME
    if not path.exists():
        write_once(path, (json.dumps(identity, indent=1) + "\n").encode())
    found = json.loads(path.read_text("utf-8"))
    changed = [name for name in sorted(found.keys() | identity.keys()) if found.get(name) != identity.get(name)]
    if changed:
        raise ValueError(
            f"{out} was begun with another encoding; remove it or choose another folder:\n  "
            + "\n  ".join(f"{name} was {found.get(name)}, now {identity.get(name)}" for name in changed)
        )
