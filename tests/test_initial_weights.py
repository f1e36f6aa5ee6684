"""A run that begins with released weights: what diffusers computes with them; closed forms where the ends differ."""

import os
import re
import shutil
from pathlib import Path

import pytest
import tiny_sources
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from forked_runs import ForkServer
from safetensors.torch import load_file, save_file
from tiny_models import make_clip
from torch import Tensor
from training_runs import assert_same_state, metrics, train, weights

from ldm.models.conditioning import Conditioning
from ldm.models.pretrained import weights_hash
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.training.initial_weights import load_initial
from tools.replay import replay

FILE = "diffusion_pytorch_model.safetensors"


def fresh(**settings) -> UNet:
    """The run's network before it begins, as its seed makes it."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in tiny_sources.SD.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet(UNetConfig(**(values | settings))).eval()


def begun(source: Path | str, **settings) -> tuple[UNet, str, list[str]]:
    unet, said = fresh(**settings), []
    record = load_initial(unet, str(source), said.append)
    return unet, record, said


def inputs(channels: int, width: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, channels, 8, 8, generator=generator)
    return x, torch.tensor([3, 900]), torch.randn(2, 5, width, generator=generator)


@torch.no_grad()
def ours(unet: UNet, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return unet(x, t, Conditioning(text))


@torch.no_grad()
def theirs(unet, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return unet(x, t, text).sample


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_with_equal_ends_the_network_computes_what_diffusers_does_and_the_record_names_its_weights(tmp_path):
    source = tiny_sources.make_unet(tmp_path / "released")
    unet, record, said = begun(tmp_path / "released")
    assert_close(ours(unet, *inputs(4)), theirs(source, *inputs(4)))
    assert record == f"released, xxh3 {weights_hash(source.state_dict().items())}"
    assert [str(tmp_path / "released") in line for line in said] == [True]
    assert str(tmp_path) not in record


@pytest.mark.parametrize("layout", ["pipeline", "file", "sharded", "fp16"])
def test_every_layout_of_a_released_network_begins_the_same(tmp_path, layout):
    source = tiny_sources.make_unet(tmp_path / "unet")
    name, tolerance = tmp_path / "unet", {"rtol": 1e-5, "atol": 1e-5}
    if layout == "pipeline":
        name = tmp_path
        (tmp_path / "model_index.json").write_text("{}")
    elif layout == "file":
        name = tmp_path / "unet" / FILE
    elif layout == "sharded":
        source.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
        name = tmp_path / "shards"
    else:
        source.half().save_pretrained(tmp_path / "unet", variant="fp16")
        (tmp_path / "unet" / FILE).unlink()
        source.float()
    torch.testing.assert_close(ours(begun(name)[0], *inputs(4)), theirs(source, *inputs(4)), **tolerance)


def test_new_input_channels_change_nothing_whatever_they_hold_and_learn(tmp_path):
    source = tiny_sources.make_unet(tmp_path / "released")
    unet, record, said = begun(tmp_path / "released", in_channels=9)
    x, t, text = inputs(9)
    assert_close(ours(unet, x, t, text), theirs(source, x[:, :4], t, text))
    unet(x, t, Conditioning(text)).square().mean().backward()
    assert unet.conv_in.weight.grad[:, 4:].abs().min() > 0
    assert "conv_in: 4 input channels became 9, the weights of the 5 new ones are zero" in said[1]
    assert said[1].strip() in record
    assert weights_hash(source.state_dict().items()) in record  # the source's, not those that were changed


def test_fewer_input_channels_keep_the_first_as_if_the_others_were_zero(tmp_path):
    source = tiny_sources.make_unet(tmp_path / "released", in_channels=9)
    unet, _, said = begun(tmp_path / "released")
    x, t, text = inputs(4)
    padded = torch.cat([x, torch.zeros(2, 5, 8, 8)], dim=1)
    assert_close(ours(unet, x, t, text), theirs(source, padded, t, text))
    assert "conv_in: 9 input channels became 4, the first 4 are kept" in said[1]


def test_output_channels_are_the_sources_first_and_new_ones_are_zero(tmp_path):
    four, six = (tiny_sources.make_unet(tmp_path / str(n), out_channels=n) for n in (4, 6))
    found = ours(begun(tmp_path / "4", out_channels=6)[0], *inputs(4))
    assert_close(found[:, :4], theirs(four, *inputs(4)))
    assert not found[:, 4:].any()
    found = ours(begun(tmp_path / "6")[0], *inputs(4))
    assert_close(found, theirs(six, *inputs(4))[:, :4])


def test_another_context_width_draws_keys_and_values_from_the_seed_and_keeps_all_else(tmp_path):
    source = tiny_sources.make_unet(tmp_path / "released")
    unet, _, said = begun(tmp_path / "released", cross_attention_dim=48)
    seeded, released, found = fresh(cross_attention_dim=48).state_dict(), source.state_dict(), unet.state_dict()
    drawn = {name for name in found if re.search(r"attn2\.to_[kv]\.weight$", name)}
    assert len(drawn) == 2 * 4  # transformers: one down, one in the middle, two up
    assert f"context of 32 became 48, {len(drawn)} tensors (to_k, to_v) are drawn anew from the run's seed" in said[1]
    for name, tensor in found.items():
        assert torch.equal(tensor, (seeded if name in drawn else released)[name]), name
    x, t, _ = inputs(4)
    # Keys and values have no bias: of states that are zero both networks see nothing.
    assert_close(ours(unet, x, t, torch.zeros(2, 5, 48)), theirs(source, x, t, torch.zeros(2, 5, 32)))


def test_another_network_is_refused_with_every_setting(tmp_path):
    tiny_sources.make_unet(tmp_path / "released", block_out_channels=(24, 32), layers_per_block=2, in_channels=9)
    with pytest.raises(ValueError, match="another network") as error:
        begun(tmp_path / "released", attention_head_dim=[2, 2])
    text = str(error.value)
    assert text.startswith("init_from: ")
    assert "unet.block_out_channels: the source has [24, 32], this run [16, 32]" in text
    assert "unet.layers_per_block: the source has [2, 2], this run [1, 1]" in text
    assert text.count(", this run") == 2  # one number for all levels and a list of it are the same; ends may differ


@pytest.mark.parametrize("ends", [{}, {"in_channels": 9, "out_channels": 6, "cross_attention_dim": 48}])
def test_weights_that_do_not_fit_are_listed_by_name_and_nothing_is_taken(tmp_path, ends):
    tiny_sources.make_unet(tmp_path / "released")
    file = tmp_path / "released" / FILE
    state = load_file(file)
    del state["mid_block.resnets.0.conv1.weight"]
    state["spare.weight"] = torch.zeros(3)
    state["conv_in.weight"] = state["conv_in.weight"][:, :3].contiguous()
    state["time_embedding.linear_1.bias"] = torch.zeros(7)
    save_file(state, file)
    unet = fresh(**ends)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with pytest.raises(ValueError, match="4 differences") as error:
        load_initial(unet, str(tmp_path / "released"), print)
    text = str(error.value)
    for line in (
        "missing: mid_block.resnets.0.conv1.weight",
        "unexpected: spare.weight",
        "wrong shape: conv_in.weight is (16, 3, 3, 3)",
        "wrong shape: time_embedding.linear_1.bias is (7,)",
    ):
        assert line in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Parts of a run, a released network and the run's config in one folder."""
    folder = tmp_path_factory.mktemp("finetune")
    tiny_sources.make_pictures(folder / "raw")
    tiny_sources.make_vae(folder / "vae")
    make_clip(folder / "text_encoder")
    released = tiny_sources.make_unet(folder / "released")
    settings = {
        "run_dir": "run",
        "init_from": str(folder / "released"),
        "autoencoder": str(folder / "vae"),
        "data": {"shards": str(folder / "raw"), "resolution": 16, "workers": 0},
        "text_encoder": {"source": str(folder / "text_encoder")},
        "unet": tiny_sources.settings_of(released),
        "optimizer": {"lr": 1e-3, "warmup_steps": 0, "schedule": "constant"},
        "training": {"steps": 4, "global_batch": 8, "checkpoint_every": 2},
        "wrapping": {"mixed_precision": "no", "attention": "sdpa"},
        "metrics": {"log_every": 1, "tensorboard": False},
        "previews": {"every": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def undisturbed(place) -> Path:
    train(place / "undisturbed", place / "raw", config=place / "config.yaml")
    return place / "undisturbed"


def test_weights_and_average_begin_as_the_source(place, tmp_path):
    train(tmp_path / "run", "", "--training.steps=1", "--optimizer.lr=1e-12", config=place / "config.yaml")
    found, released = weights(tmp_path / "run/checkpoints/latest"), load_file(place / "released" / FILE)
    for name, tensor in released.items():
        torch.testing.assert_close(found[f"weight {name}"], tensor, rtol=0, atol=1e-10)
        torch.testing.assert_close(found[f"ema {name}"], tensor, rtol=0, atol=1e-6)  # an average of equal numbers


def test_resuming_needs_no_source_and_gives_the_undisturbed_run_with_its_card(place, undisturbed, tmp_path, capfd):
    home = tmp_path / "home"
    shutil.copytree(place / "released", home / "released")
    words = (f"--init_from={home / 'released'}",)
    train(tmp_path / "run", "", *words, config=place / "config.yaml")
    assert "initial weights from" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    (tmp_path / "run/checkpoints/latest").unlink()
    shutil.rmtree(home)
    train(tmp_path / "run", "", *words, config=place / "config.yaml")
    assert "initial weights from" not in capfd.readouterr().err
    assert_same_state(tmp_path / "run/checkpoints/latest", undisturbed / "checkpoints/latest")
    cards = [folder / "checkpoints/latest/README.md" for folder in (tmp_path / "run", undisturbed)]
    assert cards[0].read_bytes() == cards[1].read_bytes()
    assert weights_hash(load_file(place / "released" / FILE).items()) in cards[0].read_text()
    assert str(tmp_path) not in cards[0].read_text()


def test_resuming_from_another_source_is_refused(place, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    with pytest.raises(ValueError, match=r"init_from: .*released -> elsewhere"):
        train(run, "", "--init_from=elsewhere", "--training.steps=5", config=place / "config.yaml")


def test_replay_begins_with_the_source_as_the_run_did(place, undisturbed):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    assert list(replay(undisturbed, 1, None, None))[-1]["loss"] == metrics(undisturbed)[0]["loss"]


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


def test_two_processes_begin_with_the_source_and_give_the_run_of_one(place, undisturbed, tmp_path, server):
    words = [f"--config={place / 'config.yaml'}", "--run_dir=run"]
    server.start(tmp_path, words, 2).finish()
    for one, other in zip(metrics(tmp_path / "run"), metrics(undisturbed), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    found, expected = (weights(run / "checkpoints/latest") for run in (tmp_path / "run", undisturbed))
    for name, tensor in expected.items():
        if name.startswith("ema"):
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def in_own_folder(folder: str) -> None:
    """Gives each process a working directory of its own, as machines have disks of their own."""
    os.chdir(Path(folder) / os.environ["RANK"])


def test_processes_that_find_different_weights_under_one_name_are_told(place, tmp_path, server):
    for rank in (0, 1):
        tiny_sources.make_unet(tmp_path / str(rank) / "released", seed=rank)
    words = [f"--config={place / 'config.yaml'}", f"--run_dir={tmp_path / 'run'}", "--init_from=released"]
    started = server.start(tmp_path, words, 2, hook="test_initial_weights:in_own_folder", told=str(tmp_path))
    assert all(code != 0 for code in started.wait())
    assert "init_from: processes read different weights from released" in started.output()
    assert not (tmp_path / "run/checkpoints").exists()
