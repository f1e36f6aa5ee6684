"""Which files of a hub's repository are asked for: those of one component, and no second copy of its weights.

The client's own filter decides here what would be downloaded; only the transfer is left out.
"""

from collections.abc import Iterable
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from ldm.models.pretrained import resolve_source

PIPELINE = [
    "README.md",
    "model_index.json",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder_2/config.json",
    "text_encoder_2/model.fp16.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "tokenizer_2/merges.txt",
    "tokenizer_2/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
]
ALONE = [
    "README.md",
    "config.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "onnx/model.safetensors",
    "onnx/unet/config.json",
]


class Hub:
    """Repositories by name; `snapshot_download` makes empty files of what its patterns let through."""

    def __init__(self, cache: Path, **repositories: list[str]) -> None:
        self.cache = cache
        self.repositories = {name.replace("__", "/"): files for name, files in repositories.items()}

    def snapshot_download(
        self, repository: str, *, allow_patterns: Iterable[str], ignore_patterns: Iterable[str] | None
    ) -> str:
        files = self.repositories[repository]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (self.cache / repository / file).parent.mkdir(parents=True, exist_ok=True)
            (self.cache / repository / file).touch()
        (self.cache / repository).mkdir(parents=True, exist_ok=True)
        return str(self.cache / repository)

    def taken(self, repository: str) -> set[str]:
        root = self.cache / repository
        return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    nested = [f"models/a/{name}" for name in PIPELINE]
    found = Hub(tmp_path, o__pipeline=PIPELINE, o__alone=ALONE, o__nested=nested, o__pickles=["config.json", "x.bin"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", found.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.mark.parametrize(
    ("component", "files"),
    [
        ("unet", {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}),
        ("vae", {"vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"}),
        (
            "text_encoder",
            {
                "text_encoder/config.json",
                "text_encoder/model.safetensors",
                "tokenizer/merges.txt",
                "tokenizer/vocab.json",
            },
        ),
        (
            "text_encoder_2",
            {
                "text_encoder_2/config.json",
                "text_encoder_2/model.fp16.safetensors",
                "tokenizer_2/merges.txt",
                "tokenizer_2/vocab.json",
            },
        ),
    ],
)
@pytest.mark.parametrize(("repository", "within"), [("o/pipeline", ""), ("o/nested", "models/a/")])
def test_of_a_pipeline_one_component_comes_and_its_variant_only_where_there_is_nothing_else(
    hub: Hub, component: str, files: set[str], repository: str, within: str
) -> None:
    source = f"{repository}/{within}".rstrip("/")
    assert resolve_source(source, component) == hub.cache / repository / within / component
    assert hub.taken(repository) == {within + name for name in files | {"model_index.json"}}


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_model_by_itself_comes_from_the_root_without_the_folders_below(hub: Hub, component: str) -> None:
    assert resolve_source("o/alone", component) == hub.cache / "o/alone"
    assert hub.taken("o/alone") == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_a_folder_that_is_named_is_taken_as_the_component(hub: Hub) -> None:
    assert resolve_source("o/pipeline/unet", "unet") == hub.cache / "o/pipeline/unet"
    assert hub.taken("o/pipeline") == {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}


def test_without_a_component_all_but_pickles_comes(hub: Hub) -> None:
    assert resolve_source("o/pipeline") == hub.cache / "o/pipeline"
    assert hub.taken("o/pipeline") == {name for name in PIPELINE if not name.endswith((".bin", ".ckpt", ".md"))}


def test_pickles_are_not_downloaded(hub: Hub) -> None:
    assert resolve_source("o/pickles", "vae") == hub.cache / "o/pickles"
    assert hub.taken("o/pickles") == {"config.json"}


def test_a_pipeline_on_the_hub_that_lacks_the_component_is_an_error(hub: Hub) -> None:
    hub.repositories["o/few"] = ["model_index.json", "unet/config.json"]
    with pytest.raises(FileNotFoundError, match="has no vae/"):
        resolve_source("o/few", "vae")
