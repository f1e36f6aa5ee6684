"""The quarantine ledger: each sample that could not be used, and the rate past which a run stops.

In: the `Quarantined` records that come with each batch, and how many samples were seen.
Out: a line of JSON for each (shard, key, reason), once in a run's life, and an error past the limit.
"""

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

# One bad picture in the first batch of 32 is no rate of 3 %.
FEWEST_SEEN = 1000


@dataclass(frozen=True)
class Quarantined:
    """A sample that could not be used."""

    shard: str
    key: str
    reason: str
    position: int
    """Position in the run that asked for it; -1 outside of a run, as when indexing or encoding finds the damage."""
    replacement: str
    """"shard/key" of the sample that stood in for it; empty where nothing asked for it yet."""


class QuarantineLimitError(RuntimeError):
    """More samples were replaced than the config allows."""


class Ledger:
    """The ledger file of a run and the rate of replaced samples.

    An existing file is read again, so that a resumed run adds no line twice. With several processes each collects its
    own records, and `share` brings them together; only the main process writes.

    Args:
        path: `quarantine.jsonl` in the run's folder.
        limit: largest allowed share of replaced samples, 0 .. 1, counted over at least 1,000 samples; 0 stops at the
            first one.
    """

    def __init__(self, path: Path, limit: float) -> None:
        if not 0 <= limit <= 1:
            raise ValueError(f"quarantine_limit is {limit}; allowed are 0 to 1")
        self.path = Path(path)
        self.limit = limit
        self.seen = 0
        self.replaced = 0
        self._lines: set[tuple[str, str, str]] = set()
        self._last: list[Quarantined] = []
        self._pending: list[Quarantined] = []
        self._pending_seen = 0
        self._whole: int | None = None
        self._reload()

    def append(self, records: Iterable[Quarantined], seen: int = 0) -> None:
        """Counts `seen` samples and the unusable ones among them, and writes the lines that are not there yet.

        Without samples seen (damage that indexing found) nothing is counted.
        """
        lines = self._count(records, seen)
        if self._whole is not None:
            os.truncate(self.path, self._whole)
            self._whole = None
        if lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(lines))
                file.flush()
                os.fsync(file.fileno())

    def _count(self, records: Iterable[Quarantined], seen: int) -> list[str]:
        """Counts, and returns the lines that are not in the file yet."""
        lines = []
        self.seen += seen
        unusable: set[object] = set()
        for record in records:
            # A bad reserve adds a line, but its position was replaced once; outside of a run there is no position.
            unusable.add((record.shard, record.key) if record.position == -1 else record.position)
            self._last = [*self._last[-4:], record]
            line = (record.shard, record.key, record.reason)
            if line not in self._lines:
                self._lines.add(line)
                lines.append(json.dumps(asdict(record)) + "\n")
        self.replaced += len(unusable) if seen else 0
        return lines

    def check(self) -> None:
        """Compares the rate with the limit.

        Raises:
            QuarantineLimitError: past the limit; the message gives rate, limit and the last reasons.
        """
        if self.replaced <= self.limit * max(self.seen, FEWEST_SEEN):
            return
        last = "\n".join(f"  {record.shard}/{record.key}: {record.reason}" for record in self._last)
        raise QuarantineLimitError(
            f"{self.replaced:,} of {self.seen:,} samples could not be used "
            f"({self.replaced / max(self.seen, 1):.2%}); data.quarantine_limit allows {self.limit:.2%} of at least "
            f"{FEWEST_SEEN:,}. All are listed in {self.path}; the last ones:\n{last}"
        )

    def collect(self, records: Iterable[Quarantined], seen: int) -> None:
        """Keeps the records of one micro-batch of this process until `share`."""
        self._pending += records
        self._pending_seen += seen

    def share(self, accelerator: "Accelerator") -> None:
        """Brings all processes' records together, writes them on the main process, and checks the rate on all.

        Collective: called by all processes at the same step.

        Raises:
            QuarantineLimitError: past the limit, on all processes alike.
        """
        from accelerate.utils import gather_object

        parts = gather_object([(self._pending, self._pending_seen)])
        self._pending, self._pending_seen = [], 0
        records = [record for part, _ in parts for record in part]
        write = self.append if accelerator.is_main_process else self._count
        write(records, sum(seen for _, seen in parts))
        self.check()

    def state(self) -> dict[str, int]:
        """The counts and the length of the file in bytes, for a checkpoint; after `share` or `append`."""
        length = self.path.stat().st_size if self.path.exists() else 0
        return {"seen": self.seen, "replaced": self.replaced, "bytes": length}

    def restore(self, state: dict[str, int]) -> None:
        """Takes the counts of a checkpoint; lines that were written after it are of work that is done again, and go."""
        self.seen, self.replaced = state["seen"], state["replaced"]
        stored = self.path.read_bytes() if self.path.exists() else b""
        length = state.get("bytes", len(stored))
        kept = stored[:length]
        # A file that is no continuation of the checkpoint's is another folder's, and is left as it is.
        if len(kept) == length < len(stored) and (not kept or kept.endswith(b"\n")):
            self._lines.clear()
            self._whole = len(kept)
            self._read(kept)

    def _reload(self) -> None:
        if not self.path.exists():
            return
        stored = self.path.read_bytes()
        whole = stored[: stored.rfind(b"\n") + 1]
        if len(whole) < len(stored):
            warnings.warn(f"{self.path}: the last line is cut short (the run was killed), left out", stacklevel=3)
            self._whole = len(whole)  # cut at the next `append`: only the main process may change the file
        self._read(whole)

    def _read(self, whole: bytes) -> None:
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self._lines.add((record["shard"], record["key"], record["reason"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number}, is not a ledger line ({error}): repair or remove it"
                ) from error
