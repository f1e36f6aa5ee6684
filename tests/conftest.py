"""Real data for tests that train: emoji shards made by the project's tools, raw and encoded, once per test process."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import make_clip, make_pipeline

from ldm.pipeline.pipeline import Pipeline
from ldm.training.signals import StopRequest

ROOT = Path(__file__).parent.parent
DEBUG = ROOT / "configs" / "debug.yaml"


# Files that take longest, 40 s to 3 minutes each: begun last, one would keep a worker busy long after all others.
LONGEST = (
    "test_kills",
    "test_launch",
    "test_engines",
    "test_train",
    "test_engine_failures",
    "test_engine_hosts",
    "test_elastic",
    "test_encoding_hosts",
    "test_run_data",
    "test_bad_numbers_trials",
    "test_corruption_training",
    "test_encoding",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files of LONGEST first, in that order; the rest stays as it was collected."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Puts the signals' handlers back: a run that ended as a signal asked ignores them, and so would its children."""
    before = {number: signal.getsignal(number) for number in StopRequest.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run_tool(*words: str | Path) -> str:
    """Runs one of the project's programs with this Python; its output, or a failure that shows it."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def raw_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard of emoji: hearts, shapes, mammals and vehicles, plain and detailed ones."""
    out = tmp_path_factory.mktemp("emoji") / "some"
    subset = ("heart", "geometric", "animal-mammal", "transport-ground")
    run_tool(ROOT / "tools/make_demo_data.py", "--out", out, "--subset", *subset, "--shards", "1000")
    return out / "train"


@pytest.fixture(scope="session")
def encoded_shards(raw_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shards encoded by tools/encode_latents.py."""
    out = tmp_path_factory.mktemp("encoded") / "shards"
    run_tool(
        ROOT / "tools/encode_latents.py",
        f"--config={DEBUG}",
        f"--encoding.shards={raw_shards}",
        f"--data.shards={out}",
        "--encoding.workers=0",
    )
    return out


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny CLIP text encoder and its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder") / "clip"
    make_clip(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pipeline(clip: str) -> Pipeline:
    """A tiny pipeline of random weights around it."""
    return make_pipeline(clip)
