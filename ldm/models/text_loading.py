"""Finding and loading the models and tokenizers of text encoders, from every place where released ones lie.

Enters: a source (component or pipeline folder, single checkpoint, `package:`, hub name) and which of its encoders is
meant. Leaves: a frozen transformers model with every weight from that source, and its tokenizer; or one error that
lists all that does not fit.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.models.pretrained import read_json, resolve_source
from ldm.models.single_file import text_encoder_weights
from ldm.models.weight_files import Weights, weight_files

logger = logging.getLogger(__name__)

FOLDERS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
"""Of the first and the second encoder in a pipeline's folder: the model's, the tokenizer's."""

# Class in transformers for each model_type of a config.json. A whole CLIP model carries its text model within.
MODEL_CLASSES = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "bert": "BertModel",
}
PROJECTING = "CLIPTextModelWithProjection"
"""Class of the second of a pair: it alone gives pooled text."""
PROJECTION = "text_projection.weight"

# Weights of whole models (CLIP's vision half, T5's decoder, BERT's heads) that a text encoder has no use for.
OTHER_PARTS = (
    "vision_model.",
    "visual_projection.",
    "text_projection.",
    "logit_scale",
    "decoder.",
    "lm_head.",
    "cls.",
)

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")

# eos_token_id of CLIP files from before transformers knew the real one; it pools at the highest id of a caption.
LEGACY_END = 2

# Widths of OpenCLIP's text models (activation gelu) in SD 2.x and SDXL, which were trained with captions padded with
# the first token of the vocabulary; CLIP's own (quick_gelu) with captions padded with their end.
OPENCLIP_WIDTHS = (1024, 1280)
OPENCLIP_PADDING = 0
SD2_LAYERS, SD2_WIDTH = 23, 1024
"""Of SD 2.x' text encoder as it is shipped: OpenCLIP's without the last layer."""


def locate(source: str, tokenizer: str | None, number: int) -> tuple[Path, Path]:
    """Where the model lies (a component's folder, or a .safetensors file) and the folder of its tokenizer.

    Args:
        source: a component's folder with the tokenizer within or beside it, a pipeline's folder, or a file.
        tokenizer: folder of the tokenizer, or of a pipeline; None to look for it in `source`.
        number: 1, or 2 for the second of a pair, whose folders have other names in a pipeline.

    Raises:
        FileNotFoundError: no config.json, or no tokenizer, in any of the places.
        ValueError: a single checkpoint, which holds no tokenizer, and none is named.
    """
    component, its_tokenizer = FOLDERS[number - 1]
    model = resolve_source(source, component)
    folder = model if model.is_dir() else model.parent
    if model.is_file():
        weight_files(model, component)  # raises for pickles
    if tokenizer is not None:
        places = [resolve_source(tokenizer, its_tokenizer)]
    elif model.is_file() and not _describes_text(folder):
        raise ValueError(
            f"{component}.source: {model} is a single checkpoint, which holds no tokenizer: "
            f"set {component}.tokenizer to the folder of one (the {its_tokenizer}/ of a pipeline, say)"
        )
    elif folder.name in dict(FOLDERS):
        # In a pipeline its neighbour counts, whatever else lies in the folder; the other encoder's tokenizer never.
        places = [folder.parent / dict(FOLDERS)[folder.name], folder]
    else:
        places = [folder / "tokenizer", folder, folder.parent / "tokenizer"]
    if model.is_dir() and not (model / "config.json").is_file():
        raise FileNotFoundError(
            f"{model}: no text encoder here: expected config.json, or {component}/config.json in a pipeline's folder"
        )
    for place in places:
        if any((place / name).is_file() for name in TOKENIZER_FILES):
            return model, place
    looked = ", ".join(str(place) for place in places)
    raise FileNotFoundError(
        f"{tokenizer or model}: no tokenizer: expected {' or '.join(TOKENIZER_FILES)} in one of {looked}"
    )


def load_model(source: Path, number: int, *, cut_last: bool, dtype: torch.dtype) -> Any:
    """The frozen transformers model of a component's folder or a single file, in eval mode.

    Args:
        number: 2 for the second of a pair, which projects its pooled output.
        cut_last: leave the last layer out, as SD 2.x does: the final norm follows the penultimate one.
        dtype: of the model's weights, whatever that of the file is.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: a model type that is no text encoder; weights that are missing, left over, of other shapes, damaged,
            or only there as a pickle; `cut_last` for weights that are without the last layer already.
    """
    import transformers  # 2 to 3 s: not before a model is loaded, so that --help answers at once

    name, config, tensors = _read(source, number)
    if cut_last:
        _check_uncut(source, number, config)
        config.num_hidden_layers -= 1
    model_class = getattr(transformers, name)
    try:
        with _quiet_transformers():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are listed with the rest, and raised, below
            )
    except Exception as error:  # transformers raises a dozen types here; each means this one thing
        raise ValueError(f"{source}: cannot be loaded as {name}: {error}") from error
    _check_weights(source, model, info, cut_last)
    model.config.architectures = [name]
    model.config._name_or_path = ""  # older releases save it: a path of this machine
    return model.eval().requires_grad_(False)


def describe(folder: Path, number: int = 1) -> tuple[str, Any]:
    """Name of the class in transformers that opens a component's folder, and its config.

    Raises:
        ValueError: config.json describes no text encoder, or none that can be the second of a pair.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    found = read_json(path).get("model_type")
    if found not in MODEL_CLASSES:
        raise ValueError(f"{path}: model_type is {found!r}, expected one of {', '.join(MODEL_CLASSES)}")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    inner = config.text_config if found == "clip" else config
    if number == 1:
        return MODEL_CLASSES[found], inner
    if MODEL_CLASSES[found] != "CLIPTextModel":
        raise ValueError(
            f"{path}: model_type is {found!r}, expected CLIP's for the second of a pair: it gives pooled text"
        )
    # A whole model's own projection_dim is that of its weights; its text config may hold another.
    inner.projection_dim = config.projection_dim
    return PROJECTING, inner


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, without the paths of this machine that it would save again."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as in load_model
        raise ValueError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
    tokenizer.name_or_path = ""
    for name in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def check_tokenizer(model: Any, tokenizer: Any, folder: Path) -> None:
    """Raises ValueError where ids of the tokenizer are none of the model's, or it cannot tell where a caption ends.

    Warns where an OpenCLIP model as SD 2.x and SDXL have it would get captions padded otherwise than they were there.
    """
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the {type(model).__name__} has embeddings for "
            f"{model.config.vocab_size}: it is the tokenizer of another model"
        )
    end = model.config.eos_token_id
    if type(model).__name__ == PROJECTING and end not in (LEGACY_END, tokenizer.eos_token_id):
        # transformers would take the first position of each caption, without a word.
        raise ValueError(
            f"{folder}: the tokenizer ends captions with id {tokenizer.eos_token_id}, but the model's eos_token_id, "
            f"where pooled text is taken, is {end}"
        )
    config = model.config
    openclip = getattr(config, "hidden_act", None) == "gelu" and config.hidden_size in OPENCLIP_WIDTHS
    if openclip and type(model).__name__.startswith("CLIP") and tokenizer.pad_token_id != OPENCLIP_PADDING:
        # No error: OpenCLIP's whole models are released with such a tokenizer, and a model can be trained with it.
        logger.warning(
            "%s: the tokenizer pads captions with id %s (%r), but SD 2.x and SDXL were trained with this text encoder "
            "and id %d (%r): their UNets need the tokenizer of their own pipeline",
            folder, tokenizer.pad_token_id, tokenizer.pad_token,
            OPENCLIP_PADDING, tokenizer.convert_ids_to_tokens(OPENCLIP_PADDING),
        )  # fmt: skip


def _read(source: Path, number: int) -> tuple[str, Any, dict[str, Tensor]]:
    """Class, config and weights of the model in a component's folder or a file."""
    folder = source.parent if source.is_file() else source
    if source.is_dir() or _describes_text(folder):
        name, config = describe(folder, number)
        return name, config, dict(Weights(source, FOLDERS[number - 1][0]).tensors())
    from transformers import CLIPTextConfig

    values, tensors = text_encoder_weights(source, number)
    return values["architectures"][0], CLIPTextConfig(**values), tensors()


def _check_uncut(source: Path, number: int, config: Any) -> None:
    openclip = getattr(config, "hidden_act", None) == "gelu"
    if openclip and (config.num_hidden_layers, config.hidden_size) == (SD2_LAYERS, SD2_WIDTH):
        raise ValueError(
            f"{FOLDERS[number - 1][0]}.layer: found 'penultimate', but {source} has {SD2_LAYERS} layers, as SD 2.x "
            "ships it: the last layer is gone already; set layer: last"
        )
    whole_checkpoint = source.is_file() and not _describes_text(source.parent)
    if openclip and number == 1 and whole_checkpoint:
        raise ValueError(
            f"{FOLDERS[0][0]}.layer: found 'penultimate', but {source} is a checkpoint of SD 2.x, of whose text "
            "encoder the last layer is left out already; set layer: last"
        )


def _describes_text(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") in MODEL_CLASSES


def _check_weights(source: Path, model: Any, info: dict[str, Any], cut_last: bool) -> None:
    missing = sorted(info["missing_keys"])
    pooler = [name for name in missing if name.startswith("pooler.")]
    for name in pooler:
        # The pooled output is not used; zeros instead of random numbers keep saved files a function of the source.
        torch.nn.init.zeros_(model.get_parameter(name))
    problems = [f"missing: {name} {tuple(model.get_parameter(name).shape)}" for name in missing if name not in pooler]
    layers = model.config.num_hidden_layers
    cut = tuple(f"{stack}.{layers}." for stack in ("layers", "layer", "block")) if cut_last else ()
    for name in sorted(info["unexpected_keys"]):
        if not name.startswith(OTHER_PARTS) and not any(part in name for part in cut):
            problems.append(f"unexpected: {name}")
    problems += [
        f"wrong shape: {name} is {tuple(found)} in the file, {tuple(expected)} in the model"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    if PROJECTION in missing:
        problems.append(
            "without a projection it gives no pooled text: it cannot be the second of a pair, only the first"
        )
    if problems:
        raise ValueError(
            f"{source}: its weights are not those of the {type(model).__name__} that its config describes:\n  "
            + "\n  ".join(problems)
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' bars and reports: what they say is checked here and raised as an error where it matters."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
