"""The model card: README.md of a checkpoint's folder, which hubs show to those who find the model.

Enters: the section `card` of the config, the resolved config, and how far the run is. Leaves: Markdown with YAML front
matter; the same bytes for the same run, without dates and without paths of this machine.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

TITLE = "Text-to-image latent diffusion model"
DIFFUSERS = """With diffusers:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")
pipeline("a red heart", num_inference_steps=25, guidance_scale=5.0).images[0].save("heart.png")
```
"""
CORRUPTED = """The network undoes a corruption of latents that is not Gaussian noise ({kind}: `scheduler/` has its
settings), and predicts x0. Diffusers has no scheduler for it and refuses the folder.
"""
TEXTS = ("prompts",)
"""Settings whose values are text and no paths, whatever they begin with."""

_PATH = re.compile(r"(?:file://|(?<![\w.:/\\~]))(?:~[\w.-]*|[A-Za-z]:)?[/\\][^\s\"',;]+")
_UPWARDS = re.compile(r"(?<![\w.:/\\~-])(?:[\w.-]+[/\\])*\.\.[/\\][^\s\"',;]+")
_ONE_PATH = re.compile(r"(?:file://)?(?:~[\w.-]*|[A-Za-z]:)?[/\\].|(?:[^/\\:]*[/\\])*\.\.[/\\]")
_USER = re.compile(r"(?<=://)[^/@\s]*@")
_QUERY = re.compile(r"(\w://[^\s?]*)\?\S*")


@dataclass
class CardConfig:
    """What the README.md beside a checkpoint says besides what the run knows."""

    title: str | None = None
    """Heading of the card."""
    license: str | None = None
    """License of the weights, by the name that the front matter of a model card takes: `apache-2.0`, `cc-by-4.0`,
    `other`. Unset: the card says that none is stated."""
    data: str | None = None
    """What the pictures are and where they come from, with the attribution that their license asks for."""

    def __post_init__(self) -> None:
        for name in ("title", "license"):
            value = getattr(self, name)
            if value is not None and (not value.strip() or len(value.splitlines()) != 1):
                raise ValueError(f"card.{name}: found {value!r}, expected one line of text, or unset")


def model_card(
    card: CardConfig,
    *,
    config_yaml: str,
    steps: int,
    samples_seen: int,
    data_lines: Sequence[str],
    initialized_from: str | None,
) -> str:
    """Text of README.md.

    Args:
        config_yaml: the run's resolved config.
        steps: optimizer steps done.
        samples_seen: samples that these steps were computed from, repeated ones counted again.
        data_lines: what the run knows of its data, a line each.
        initialized_from: source of the weights that the run began with; None for random ones.
    """
    front: dict[str, Any] = {"license": card.license} if card.license else {}
    settings = yaml.safe_load(config_yaml)
    corruption = settings.get("corruption")
    if corruption:
        front |= {"pipeline_tag": "text-to-image", "tags": ["text-to-image", "cold-diffusion"]}
    else:
        front |= {
            "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            "tags": ["text-to-image", "latent-diffusion", "stable-diffusion"],
        }
    data = ([card.data.strip(), ""] if card.data else []) + [f"- {without_paths(line)}" for line in data_lines]
    began = f"the weights of `{without_paths(initialized_from)}`" if initialized_from else "random weights"
    license_text = f"`{card.license}`" if card.license else "Not stated."
    config = _dump(_shown(settings))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", config)), default=0))
    return f"""---
{_dump(front)}---

# {card.title or TITLE}

This folder is a pipeline in the layout of diffusers, which draws pictures of prompts; `unet/` holds averaged weights.

## Use

{CORRUPTED.format(kind=corruption["kind"]) if corruption else DIFFUSERS}
With the program that trained it:

```
python ldm/sample.py --checkpoint path/to/this/folder --prompt "a red heart" --out heart.png
```

## Training

- Optimizer steps: {steps:,}
- Samples seen: {samples_seen:,}
- Began with: {began}

## Data

{chr(10).join(data) if data else "Not stated."}

## License

{license_text}

## Config

{fence}yaml
{config}{fence}
"""


def without_paths(text: str) -> str:
    """The text with paths that are absolute or go upwards cut to their last component; URLs without user and query."""
    text = _QUERY.sub(r"\1", _USER.sub("", text))
    return _UPWARDS.sub(lambda match: _last(match[0]), _PATH.sub(lambda match: _last(match[0]), text))


def without_path(value: str) -> str:
    """A value that may be one path, with spaces and commas in it: its last component; other values as `without_paths`.

    Relative paths that go upwards count, those that stay below the working directory do not.
    """
    return (_last(value) or value) if _ONE_PATH.match(value) else without_paths(value)


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _shown(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _shown(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_shown(item, name) for item in value]
    if not isinstance(value, str):
        return value
    return without_paths(value) if name in TEXTS else without_path(value)


def _dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=120, allow_unicode=True)
