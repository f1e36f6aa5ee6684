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
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.checkpoint_layouts import EXTRA_NAME, TEXT_FOLDERS, to_folders, to_single_file
from ldm.models.durable import write_text
from ldm.models.pretrained import CONFIG_NAME, INDEX_NAME, misfits, read_config
from ldm.models.single_file import CLASS_NAMES, SDXL_2, SingleFile, text_encoder_weights
from ldm.models.tensor_stream import Pending, write_stream
from ldm.models.unet import UNet, UNetConfig
from ldm.models.weight_files import PICKLES, WEIGHTS_NAME, Weights, listing

# Packages of training programs and of numbers, whose names stand in checkpoints beside the tensors. Their classes are
# replaced by an empty one, so that none of their code runs; any other name is a reason to refuse the file.
KNOWN_PACKAGES = ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "omegaconf", "numpy")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json")
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TASKS = {4: "", 9: "Inpaint"}  # what a pipeline's class is called after, by its UNet's input channels
LAYOUT = "0.20.0"  # release of diffusers whose folders these are; its inpainting pipelines insist on one
SD2_SIZES = {"epsilon": 64, "v_prediction": 96}  # latents' height and width of the two released models


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
        if foreign:
            raise ValueError(
                f"it names {listing(foreign)}, which is no part of a checkpoint's tensors and could run code"
            )
        inert: list[Any] = [(type("Inert", (Inert,), {}), name) for name in names]
        with torch.serialization.safe_globals(inert):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch and pickle raise a dozen types here; each means this one thing
        raise ValueError(f"{path} is not read: {error}") from error
    state = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected tensors by name, or a state_dict of them")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    return tensors, others + [str(name) for name in found if state is not found and name != "state_dict"]


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
    parser.add_argument("--tokenizer", help="folder of the text encoder's tokenizer, which no single file holds")
    parser.add_argument("--tokenizer_2", help="folder of the second text encoder's tokenizer (SDXL)")
    parser.add_argument(
        "--prediction_type",
        choices=("epsilon", "v_prediction"),
        help="what the UNet predicts. To be given for SD 2.x, whose files do not tell: v_prediction for the models of "
        "768 pixels, epsilon for those of 512 and for inpainting. Others: epsilon",
    )
    parser.add_argument("--ema", action="store_true", help="the averaged weights (model_ema.*) for unet/")
    return parser


def check_paths(source: Path, out: Path) -> None:
    """Raises OSError where the source is not there, or something is where the output is to be."""
    if not source.exists():
        raise FileNotFoundError(f"{source}: there is no such file or folder")
    if out.exists():
        raise FileExistsError(f"{out} is there already: it is not overwritten; remove it or choose another name")
    configs = [out.with_suffix(suffix) for suffix in (".unet.json", ".vae.json", ".json")]
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
    values = {component: single.values(component) for component in holding.parts}
    family = single.family()
    prediction = prediction_type(single, family, options)
    unet = UNetConfig.from_dict(values["unet"]) if "unet" in values else None
    vae = AutoencoderConfig.from_dict(values["vae"]) if "vae" in values else None
    if unet is not None and family == "sd2" and unet.sample_size is None:
        # The model of 768 pixels overflows float16 in its attention; its released config says so.
        unet = replace(unet, sample_size=SD2_SIZES[prediction], upcast_attention=prediction == "v_prediction")
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
    if unet is not None and vae is not None:
        write_pipeline(partial, holding.text, unet, prediction, zero_snr="ztsnr" in tensors)
    elif whole:
        print("no whole pipeline: the file lacks a UNet or an autoencoder; its other folders are written")
    if safe != source:
        safe.unlink()
    partial.rename(out)


def prediction_type(single: SingleFile, family: str | None, options: argparse.Namespace) -> str:
    """What the UNet predicts, as far as a file tells."""
    if options.prediction_type is None and family == "sd2":
        raise ValueError(
            "SD 2.x: add --prediction_type v_prediction (models of 768 pixels) or --prediction_type epsilon (models of "
            "512 pixels, inpainting): both kinds have the same tensors, so that no file tells"
        )
    # The mark that fine-tunings of SDXL carry.
    return options.prediction_type or ("v_prediction" if "v_pred" in single.shapes else "epsilon")


def copy_tokenizers(partial: Path, prefixes: Sequence[str], options: argparse.Namespace) -> None:
    """Copies the tokenizers of a checkpoint's text encoders into their folders."""
    for prefix in prefixes:
        folder = TEXT_FOLDERS[prefix].replace("text_encoder", "tokenizer")
        given = getattr(options, folder)
        files = [Path(given) / name for name in TOKENIZER_FILES if (Path(given) / name).is_file()] if given else []
        if not files:
            wanted = "OpenCLIP's (padded with !)" if prefix == SDXL_2 else "that of the text encoder"
            raise ValueError(
                f"the text encoder under {prefix} needs a tokenizer, which a single file does not hold: give "
                f"--{folder} FOLDER, {wanted}, with vocab.json or tokenizer.json; found {given}"
            )
        for file in files:
            (partial / folder).mkdir(exist_ok=True)
            shutil.copyfile(file, partial / folder / file.name)


def write_pipeline(folder: Path, prefixes: Sequence[str], unet: UNetConfig, prediction: str, zero_snr: bool) -> None:
    """Writes the scheduler, with the values of the released models, and model_index.json."""
    pair = SDXL_2 in prefixes
    sampler = "EulerDiscreteScheduler" if pair else "DDIMScheduler"
    scheduler = {
        "_class_name": sampler,
        **SCHEDULE,
        "prediction_type": prediction,
        "rescale_betas_zero_snr": zero_snr,
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if pair else ''}{TASKS[unet.in_channels]}Pipeline",
        "_diffusers_version": LAYOUT,
        "scheduler": ["diffusers", sampler],
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
    (folder / "scheduler").mkdir()
    write_text(json.dumps(scheduler, indent=2) + "\n", folder / "scheduler" / "scheduler_config.json")
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
            configs[name] = (UNetConfig if name == "unet" else AutoencoderConfig).from_dict(values)
        else:
            configs[name] = json.loads((folder / CONFIG_NAME).read_text())
    tensors = {name: dict(Weights(folder, f"{name} of {source}").tensors()) for name, folder in places.items()}
    if (source / EXTRA_NAME).is_file():
        tensors[""] = dict(Weights(source / EXTRA_NAME, f"{EXTRA_NAME} of {source}").tensors())
    made = to_single_file(tensors, configs)
    partial.mkdir()
    whole = partial / out.name
    write({whole: made})
    left = [p.name for p in source.iterdir() if p.is_dir() and p.name not in places]
    if len(places) > 1 and left:
        print(f"no place in a single file, not converted: {listing(left)}; going back needs the tokenizers again")
    for file in untold_configs(whole, {name: configs[name] for name in CLASS_NAMES if name in configs}):
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


if __name__ == "__main__":
    raise SystemExit(main())
