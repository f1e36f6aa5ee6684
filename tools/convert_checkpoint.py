"""Converts released checkpoints: a single CompVis file to a diffusers pipeline folder or back, a pickle to safetensors.

In: FILE (.safetensors, .ckpt, .pt, .bin) or a FOLDER of diffusers. Out: a folder, or one .safetensors file, whole or
not at all. No tensor is lost: what diffusers has no place for is kept in compvis_extra.safetensors. Nothing is run.
"""

import argparse
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.models import checkpoint_scheduler
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.checkpoint_layouts import EXTRA_NAME, TEXT_FOLDERS, to_folders, to_single_file
from ldm.models.durable import write_text
from ldm.models.pretrained import CONFIG_NAME, INDEX_NAME, misfits, read_config, resolve_source
from ldm.models.single_file import CLASS_NAMES, CONFIGS, OPENCLIP_1, SDXL_2, SingleFile, text_encoder_weights
from ldm.models.tensor_stream import Pending, write_stream
from ldm.models.text_loading import OPENCLIP_PADDING, load_tokenizer
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.models.weight_files import PICKLES, WEIGHTS_NAME, Weights, listing

# Packages of training programs and of numbers, whose names stand in checkpoints beside the tensors. Their classes are
# replaced by an empty one, so that none of their code runs; any other name is a reason to refuse the file.
KNOWN_PACKAGES = ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "omegaconf", "numpy")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json")
TASKS = {4: "", 9: "Inpaint"}  # what a pipeline's class is called after, by its UNet's input channels
LAYOUT = "0.20.0"  # release of diffusers whose folders these are; its inpainting pipelines insist on one
SD2_V_SIZE, SD2_SIZE = 96, 64  # latents' height and width of the model of 768 pixels, and of the others

C = TypeVar("C", UNetConfig, AutoencoderConfig)


class Inert:
    """Stands for an object of a class that is not loaded: takes whatever it is given and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def __setstate__(self, state: Any) -> None:
        del state


def read_pickle(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of a pickled checkpoint (of its `state_dict`, where it has one), mapped where its format allows.

    Returns:
        The tensors by name, and the names of all else that is in the file.

    Raises:
        ValueError: no checkpoint of torch, or one that names code which no checkpoint needs; nothing of it has run.
    """
    zipped = zipfile.is_zipfile(path)  # the older format can be neither looked into nor mapped
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) if zipped else []
        foreign = [name for name in names if name.split(".")[0] not in KNOWN_PACKAGES]
    except Exception as error:  # torch and pickle raise a dozen types here; each means this one thing
        raise unread(path, error) from error
    if foreign:
        raise ValueError(
            f"{path} is not read: it names {listing(foreign)}, which is no part of a checkpoint's tensors and could "
            "run code"
        )
    try:
        inert: list[Any] = [(type("Inert", (Inert,), {}), name) for name in names]
        with torch.serialization.safe_globals(inert):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # as above
        raise unread(path, error) from error
    state = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected tensors by name, or a state_dict of them")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    return tensors, others + [str(name) for name in found if state is not found and name != "state_dict"]


def unread(path: Path, error: Exception) -> ValueError:
    """What to raise for an error of torch, whose text alone can be a bare number."""
    return ValueError(f"{path} is not read: no checkpoint that torch reads ({type(error).__name__}: {error})")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = build_parser().parse_args(argv)
    source, out = Path(options.source), Path(options.out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        check_paths(source, out)
        if source.is_dir():
            folder_to_file(source, out, partial)
        elif out.suffix == ".safetensors":
            if source.suffix not in PICKLES:
                raise ValueError(f"{source} and {out} are both single files of safetensors: name a folder to write to")
            unpickle(source, out)
        else:
            file_to_folder(source, out, partial, options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"wrote {out}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/convert_checkpoint.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="single file, pipeline folder, or folder of one component (unet/, vae/)")
    parser.add_argument("out", help="folder to make, or .safetensors file; must not be there yet")
    parser.add_argument(
        "--tokenizer", help="the text encoder's tokenizer, which no single file holds: its folder, or a pipeline's"
    )
    parser.add_argument("--tokenizer_2", help="the second text encoder's tokenizer (SDXL)")
    parser.add_argument(
        "--prediction_type",
        choices=("epsilon", "v_prediction"),
        help="what the UNet predicts. To be given for SD 2.x, whose files do not tell: v_prediction for the models of "
        "768 pixels, epsilon for those of 512 and for inpainting. Others: epsilon. Not for a file with a "
        "FILE.scheduler.json beside it, which says so",
    )
    parser.add_argument("--ema", action="store_true", help="the averaged weights (model_ema.*) for unet/")
    return parser


def check_paths(source: Path, out: Path) -> None:
    """Raises OSError where the source is not there, or something is where the output is to be."""
    if not source.exists():
        raise FileNotFoundError(f"{source}: there is no such file or folder")
    if out.exists():
        raise FileExistsError(f"{out} is there already: it is not overwritten; remove it or choose another name")
    configs = [out.with_suffix(suffix) for suffix in (".unet.json", ".vae.json", ".scheduler.json", ".json")]
    if out.suffix == ".safetensors" and (there := [str(path) for path in configs if path.exists()]):
        raise FileExistsError(
            f"{', '.join(there)} would be read as the config of {out}: remove it or choose another name"
        )
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out.absolute().parent}: there is no such folder to write to")
    if source.is_dir() and out.suffix != ".safetensors":
        raise ValueError(f"{out}: a folder is converted to a single file; name one that ends in .safetensors")


def unpickle(source: Path, out: Path) -> None:
    """Writes a pickle's tensors as safetensors, under the same names."""
    tensors, others = read_pickle(source)
    if others:
        print(f"not tensors, left out: {listing(others)}")
    write({out: {name: Pending.of(tensor) for name, tensor in tensors.items()}})


def write(files: Mapping[Path, Mapping[str, Pending]]) -> None:
    """Writes safetensors files, with a bar of the bytes."""
    total = sum(tensor.size for tensors in files.values() for tensor in tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        for path, tensors in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            bar.set_description(path.name)
            write_stream(tensors, path, bar.update)


def file_to_folder(source: Path, out: Path, partial: Path, options: argparse.Namespace) -> None:
    """Single file to pipeline folder; a model by itself to the folder of a component."""
    partial.mkdir()
    safe = source
    if source.suffix in PICKLES:
        safe = partial / "unpickled.safetensors"
        unpickle(source, safe)
    single = SingleFile(safe, f"checkpoint {source}", known_as=source)
    holding = single.contents
    if not holding.parts or any(part.layout != "compvis" for part in holding.parts.values()):
        raise ValueError(f"{source} holds {holding}, expected a UNet, an autoencoder or both in CompVis' names")
    unet = config_of(single, "unet", UNetConfig, options.ema)
    vae = config_of(single, "vae", AutoencoderConfig, options.ema)
    family = single.family()
    scheduler = scheduler_of(single, family, options)
    if unet is not None and family == "sd2" and unet.sample_size is None:
        # The model of 768 pixels overflows float16 in its attention; its released config says so.
        large = checkpoint_scheduler.predicted(scheduler) == "v_prediction"
        unet = replace(unet, sample_size=SD2_V_SIZE if large else SD2_SIZE, upcast_attention=large)
    if unet is not None and vae is not None and unet.in_channels not in TASKS:
        raise ValueError(f"{source} has a UNet of {unet.in_channels} input channels: expected 4, or 9 for inpainting")
    tensors = dict(Weights(safe, single.what).tensors())
    folders = to_folders(tensors, holding, unet, vae, averaged=options.ema)
    with torch.device("meta"):
        models: dict[str, nn.Module] = {} if unet is None else {"unet": UNet(unet)}
        models |= {} if vae is None else {"vae": AutoencoderKL(vae)}
    for component, model in models.items():
        shapes = {name: tensor.shape for name, tensor in folders.parts[component].items()}
        if problems := misfits(model.state_dict(), shapes):
            raise ValueError(f"{source} does not hold the {component} that it seems to:\n  " + "\n  ".join(problems))
    whole = len(folders.parts) > 1
    files = {}
    for folder, part in folders.parts.items():
        name = "model.safetensors" if folder.startswith("text_encoder") else WEIGHTS_NAME
        files[(partial / folder if whole else partial) / name] = part
    if folders.extra:
        files[partial / EXTRA_NAME] = folders.extra
        print(f"no place in diffusers' folders, kept in {EXTRA_NAME}: {listing(folders.extra)}")
    if holding.text:
        copy_tokenizers(partial, holding.text, options)
    write(files)
    for component, config in (("unet", unet), ("vae", vae)):
        if config is not None:
            text = json.dumps({"_class_name": CLASS_NAMES[component], **config.to_dict()}, indent=2) + "\n"
            write_text(text, (partial / component if whole else partial) / CONFIG_NAME)
    for number, prefix in enumerate(holding.text, start=1):
        settings, _ = text_encoder_weights(safe, number)
        write_text(json.dumps(settings, indent=2) + "\n", partial / TEXT_FOLDERS[prefix] / CONFIG_NAME)
    if unet is not None and whole:
        (partial / checkpoint_scheduler.SCHEDULER_FILE).parent.mkdir()
        write_text(json.dumps(scheduler, indent=2) + "\n", partial / checkpoint_scheduler.SCHEDULER_FILE)
    if unet is not None and vae is not None:
        write_index(partial, holding.text, unet, scheduler)
    elif whole:
        print("no whole pipeline: the file lacks a UNet or an autoencoder; its other folders are written")
    if safe != source:
        safe.unlink()
    partial.rename(out)


def config_of(single: SingleFile, component: str, kind: type[C], averaged: bool) -> C | None:
    """Config of a model in a file, None where it has no such model; prints where it comes from."""
    if component not in single.contents.parts:
        return None
    values = single.values(component)
    try:
        config = kind.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{single.config_beside(component) or single.known_as}: {error}") from error
    print(single.origin(component, averaged))
    return config


def scheduler_of(single: SingleFile, family: str | None, options: argparse.Namespace) -> dict[str, Any]:
    """Settings of the scheduler: those of the file beside a single file, or else as far as the file itself tells."""
    path, asked = checkpoint_scheduler.beside(single.known_as), options.prediction_type
    if path.is_file():
        found = checkpoint_scheduler.read(path)
        if asked not in (None, checkpoint_scheduler.predicted(found)):
            raise ValueError(
                f"{path}: prediction_type is {checkpoint_scheduler.predicted(found)!r}, but --prediction_type {asked} "
                "is given: leave that out, or move the file away if it is wrong"
            )
        print(f"scheduler from {path}")
        return found
    prediction, zero_snr = checkpoint_scheduler.told(single.shapes, family)
    if asked is None and prediction is None:
        raise ValueError(
            "SD 2.x: add --prediction_type v_prediction (models of 768 pixels) or --prediction_type epsilon (models of "
            "512 pixels, inpainting): both kinds have the same tensors, so that no file tells"
        )
    return checkpoint_scheduler.released(SDXL_2 in single.contents.text, asked or prediction, zero_snr)


def copy_tokenizers(partial: Path, prefixes: Sequence[str], options: argparse.Namespace) -> None:
    """Copies the tokenizers of a checkpoint's text encoders into their folders."""
    for prefix in prefixes:
        folder = TEXT_FOLDERS[prefix].replace("text_encoder", "tokenizer")
        openclip = prefix in (OPENCLIP_1, SDXL_2)
        given = getattr(options, folder)
        place = resolve_source(given, folder) if given else None
        files = [place / name for name in TOKENIZER_FILES if (place / name).is_file()] if place else []
        if place is None or not files:
            wanted = "OpenCLIP's (padded with !)" if openclip else "that of the text encoder"
            raise ValueError(
                f"the text encoder under {prefix} needs a tokenizer, which a single file does not hold: give "
                f"--{folder} FOLDER, {wanted}, with vocab.json or tokenizer.json; found {given}"
            )
        if openclip and (tokenizer := load_tokenizer(place)).pad_token_id != OPENCLIP_PADDING:
            raise ValueError(
                f"--{folder} {given}: it pads captions with id {tokenizer.pad_token_id} ({tokenizer.pad_token!r}), but "
                f"the text encoder under {prefix} was trained with id {OPENCLIP_PADDING}: give that of an SD 2.x or "
                "SDXL pipeline (padded with !)"
            )
        for file in files:
            (partial / folder).mkdir(exist_ok=True)
            shutil.copyfile(file, partial / folder / file.name)


def write_index(folder: Path, prefixes: Sequence[str], unet: UNetConfig, scheduler: Mapping[str, Any]) -> None:
    """Writes model_index.json."""
    pair = SDXL_2 in prefixes
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if pair else ''}{TASKS[unet.in_channels]}Pipeline",
        "_diffusers_version": LAYOUT,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", CLASS_NAMES["unet"]],
        "vae": ["diffusers", CLASS_NAMES["vae"]],
    }
    if not pair:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    else:
        index["force_zeros_for_empty_prompt"] = True
    for name in ("text_encoder", "text_encoder_2") if pair else ("text_encoder",):
        present = (folder / name).is_dir()
        kind = "CLIPTextModelWithProjection" if name == "text_encoder_2" else "CLIPTextModel"
        index[name] = ["transformers", kind] if present else [None, None]
        index[name.replace("text_encoder", "tokenizer")] = (
            ["transformers", "CLIPTokenizer"] if present else [None, None]
        )
    write_text(json.dumps(index, indent=2) + "\n", folder / INDEX_NAME)


def folder_to_file(source: Path, out: Path, partial: Path) -> None:
    """Pipeline folder, or the folder of one component, to a single file; configs that it cannot tell go beside it."""
    configs: dict[str, Any] = {}
    places: dict[str, Path] = {}
    if (source / CONFIG_NAME).is_file():
        component = component_of(source)
        places = {component: source}
    else:
        names = ("unet", "vae", "text_encoder", "text_encoder_2")
        places = {name: source / name for name in names if (source / name / CONFIG_NAME).is_file()}
    if "unet" not in places and "vae" not in places:
        raise ValueError(f"{source}: no UNet and no autoencoder here: expected unet/, vae/, or config.json of either")
    for name, folder in places.items():
        if name in CLASS_NAMES:
            values = read_config(folder, class_name=CLASS_NAMES[name])
            configs[name] = CONFIGS[name].from_dict(values)
        else:
            configs[name] = json.loads((folder / CONFIG_NAME).read_text())
    tensors = {name: dict(Weights(folder, f"{name} of {source}").tensors()) for name, folder in places.items()}
    if (source / EXTRA_NAME).is_file():
        tensors[""] = dict(Weights(source / EXTRA_NAME, f"{EXTRA_NAME} of {source}").tensors())
    scheduler = source / checkpoint_scheduler.SCHEDULER_FILE
    schedule = checkpoint_scheduler.read(scheduler) if scheduler.is_file() else None
    made = to_single_file(tensors, configs)
    partial.mkdir()
    whole = partial / out.name
    write({whole: made})
    untold = untold_configs(whole, {name: configs[name] for name in CLASS_NAMES if name in configs})
    untold += untold_scheduler(whole, schedule)
    kept = [*places, *(["scheduler"] if checkpoint_scheduler.beside(whole) in untold else [])]
    left = [p.name for p in source.iterdir() if p.is_dir() and p.name not in kept]
    if len(places) > 1 and left:
        print(f"no place in a single file, not converted: {listing(left)}; going back needs the tokenizers again")
    for file in untold:
        print(f"the file alone does not tell its settings, so they lie beside it: {out.with_name(file.name)}")
        file.rename(out.with_name(file.name))
    whole.rename(out)


def component_of(folder: Path) -> str:
    """unet or vae, by the class that the folder's config.json names."""
    found = json.loads((folder / CONFIG_NAME).read_text()).get("_class_name")
    for component, name in CLASS_NAMES.items():
        if found == name:
            return component
    raise ValueError(f"{folder / CONFIG_NAME}: _class_name is {found!r}, expected {' or '.join(CLASS_NAMES.values())}")


def untold_configs(file: Path, configs: Mapping[str, UNetConfig | AutoencoderConfig]) -> list[Path]:
    """Writes a config file beside a single file for each model whose settings would not be told by it."""
    single = SingleFile(file, f"checkpoint {file}")
    written = []
    for component, config in configs.items():
        settings = asdict(config)
        try:
            told = asdict(type(config).from_dict(single.told(component)))
        except ValueError:
            told = {}
        notes = {"sample_size", "upcast_attention"}  # which do not change the network
        if {name: told.get(name) for name in settings if name not in notes} != {
            name: value for name, value in settings.items() if name not in notes
        }:
            path = file.with_suffix(f".{component}.json")
            write_text(json.dumps({"_class_name": CLASS_NAMES[component], **config.to_dict()}, indent=2) + "\n", path)
            written.append(path)
    return written


def untold_scheduler(file: Path, found: Mapping[str, Any] | None) -> list[Path]:
    """Writes the scheduler's file beside a single file where that would come back with another one."""
    single = SingleFile(file, f"checkpoint {file}")
    told = checkpoint_scheduler.told(single.shapes, single.family())
    if found is None or not checkpoint_scheduler.differ(
        found, checkpoint_scheduler.released(SDXL_2 in single.contents.text, *told)
    ):
        return []
    path = checkpoint_scheduler.beside(file)
    write_text(json.dumps(found, indent=2) + "\n", path)
    return [path]


if __name__ == "__main__":
    raise SystemExit(main())
