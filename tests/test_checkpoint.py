"""Checkpoints are complete or not there: storage faults at each step of a save, and damage afterwards."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
import xxhash

from ldm.models.durable import write_tensors
from ldm.training import checkpoint
from ldm.training.checkpoint import (
    CheckpointError,
    TrainingState,
    find_checkpoint,
    intact,
    load_training_state,
    newest_complete,
    save_checkpoint,
    verify_checkpoint,
)


def state(step: int) -> TrainingState:
    weights = {"conv.weight": torch.full((3, 4), float(step)), "conv.bias": torch.tensor([float("nan"), 1.0])}
    optimizer = {
        "conv.weight/exp_avg": torch.arange(12.0).reshape(3, 4) + step,
        "conv.weight/step": torch.tensor(7.0),
    }
    return TrainingState(step, weights, optimizer, ema_updates=step, scalars={"loss_window": [1.5, step]})


def write_pipeline(folder: Path) -> None:
    (folder / "model_index.json").write_text("{}")
    (folder / "README.md").write_text("# A card\n")
    (folder / "unet").mkdir()
    write_tensors({"conv.weight": torch.ones(3, 4)}, folder / "unet" / "diffusion_pytorch_model.safetensors")


def save(root: Path, step: int, keep: int = 0) -> Path:
    return save_checkpoint(root, state(step), write_pipeline, config_yaml="seed: 0\n", keep=keep)


def test_state_comes_back_as_it_was_saved(tmp_path):
    saved = save(tmp_path, 3)
    assert saved.name == "step-00000003"
    assert (tmp_path / "latest").resolve() == saved.resolve()
    loaded, average = load_training_state(tmp_path / "latest")
    assert loaded.step == loaded.ema_updates == 3
    assert loaded.scalars == {"loss_window": [1.5, 3]}
    assert torch.equal(loaded.optimizer["conv.weight/exp_avg"], state(3).optimizer["conv.weight/exp_avg"])
    assert torch.equal(average["conv.weight"], torch.ones(3, 4))


def test_removing_any_file_or_changing_any_byte_is_found_and_named(tmp_path):
    saved = save(tmp_path, 1)
    names = sorted(json.loads((saved / "hashes.json").read_text()))
    assert "training_state/optimizer.safetensors" in names
    seed, trials = 5, 60
    print(f"seed {seed}, {trials} flipped bytes, {len(names)} missing files")
    draw = random.Random(seed)
    for _ in range(trials):
        path = saved / draw.choice(names)
        content = path.read_bytes()
        at = draw.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :])
        with pytest.raises(CheckpointError, match=f"{path.name} was altered"):
            load_training_state(saved)
        path.write_bytes(content)
    for name in names:
        content = (saved / name).read_bytes()
        (saved / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            load_training_state(saved)
        (saved / name).write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match=f"{name} has {len(content) - 1} bytes, expected {len(content)}"):
            load_training_state(saved)
        (saved / name).write_bytes(content)
    verify_checkpoint(saved)


def test_resume_takes_the_newest_complete_one_and_says_what_it_passed_over(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000003" / "training_state" / "unet.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000009").mkdir()
    said = []
    assert newest_complete(tmp_path, said.append).name == "step-00000002"
    assert len(said) == 2
    assert "step-00000009: hashes.json is missing" in said[0]
    assert "step-00000003: training_state/unet.safetensors has 4 bytes" in said[1]


def test_people_may_go_on_writing_in_the_model_card(tmp_path):
    saved = save(tmp_path, 1)
    (saved / "README.md").write_text("# A better card\n")
    assert load_training_state(saved)[0].step == 1
    assert newest_complete(tmp_path, pytest.fail) == saved


def test_none_complete_is_an_error_and_not_a_fresh_start(tmp_path):
    (tmp_path / "step-00000009").mkdir()
    with pytest.raises(CheckpointError, match="none is complete"):
        newest_complete(tmp_path, lambda line: None)
    assert newest_complete(tmp_path / "nothing", lambda line: None) is None


def rewrite(checkpoint: Path, name: str, content: str) -> None:
    """Gives a file other content and puts that into the hash list, as a program that knows the format would."""
    (checkpoint / name).write_text(content)
    hashes = json.loads((checkpoint / "hashes.json").read_text())
    hashes[name] = {"bytes": len(content), "xxh3": xxhash.xxh3_64(content.encode()).hexdigest()}
    (checkpoint / "hashes.json").write_text(json.dumps(hashes))


def test_a_checkpoint_of_another_format_is_named_and_not_gone_behind(tmp_path):
    save(tmp_path, 1)
    second = save(tmp_path, 2)
    record = json.loads((second / "training_state" / "state.json").read_text())
    rewrite(second, "training_state/state.json", json.dumps(record | {"format": 2}))
    for attempt in (load_training_state, verify_checkpoint):
        with pytest.raises(
            CheckpointError, match=r"step-00000002/.*state\.json: checkpoint format 2, .* reads format 1"
        ):
            attempt(second)
    with pytest.raises(CheckpointError, match="checkpoint format 2"):
        newest_complete(tmp_path, lambda line: None)


def test_a_hash_list_that_is_not_one_is_a_reason_and_not_a_crash(tmp_path):
    saved = save(tmp_path, 1)
    listing = saved / "hashes.json"
    good = listing.read_bytes()
    for bad in (b"", b"{}", b"[]", b"null", b'{"a": 1}', b'{"a": {"bytes": 1}}', b"\xff\xfe", good[:-9]):
        listing.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"hashes\.json (is not readable|does not list)"):
            load_training_state(saved)
    print(f"{len(good)} flipped bits of the hash list, one in each byte")
    refused = 0
    for at in range(len(good)):
        listing.write_bytes(good[:at] + bytes([good[at] ^ (1 << at * 5 % 8)]) + good[at + 1 :])
        try:
            loaded = load_training_state(saved)[0]
        except CheckpointError:
            refused += 1
        else:  # a flip in the spaces between words
            assert torch.equal(loaded.weights["conv.weight"], state(1).weights["conv.weight"])
    assert refused > 0.7 * len(good)
    listing.write_bytes(good)
    verify_checkpoint(saved)


def test_a_damaged_one_of_a_later_step_costs_no_good_one_its_place(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    (tmp_path / "step-00000020" / "model_index.json").write_text("[]")
    save(tmp_path, 15, keep=2)  # resumed after 10
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000010", "step-00000015"]


@pytest.mark.parametrize("fault", ["write_tensors", "flush", "file_hash", "replace", "pipeline"])
def test_a_storage_fault_at_any_stage_leaves_the_previous_checkpoint_in_place(tmp_path, monkeypatch, fault):
    first = save(tmp_path, 1, keep=1)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if fault == "replace":
            patch.setattr(os, "replace", fail)
        elif fault != "pipeline":
            patch.setattr(checkpoint, fault, fail)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, state(2), fail if fault == "pipeline" else write_pipeline, config_yaml="", keep=1)
    verify_checkpoint(first)
    assert (tmp_path / "latest").resolve() == first.resolve()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert save(tmp_path, 2, keep=1).is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000002"]


def test_what_a_kill_left_in_mid_save_is_removed_by_the_next_save(tmp_path):
    (tmp_path / ".step-00000007.partial" / "unet").mkdir(parents=True)
    save(tmp_path, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000008"]


def test_frozen_parts_are_linked_only_from_a_checkpoint_in_which_they_are_intact(tmp_path):
    saved = save(tmp_path, 1)
    assert intact(saved, ["unet"])
    (saved / "training_state" / "unet.safetensors").write_bytes(b"")
    assert intact(saved, ["unet"])
    (saved / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert not intact(saved, ["unet"])


@pytest.mark.parametrize("name", ["unet.safetensors", "config.yaml", "state.json", "hashes.json", "model_index.json"])
def test_storage_that_drops_bytes_in_silence_is_found_before_the_rename(tmp_path, monkeypatch, name):
    first = save(tmp_path, 1)
    fsync = os.fsync

    def cut(descriptor):  # the last byte is gone when the file is on the storage
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name.removeprefix(".").removesuffix(f".{os.getpid()}") == name:
            os.truncate(path, path.stat().st_size - 1)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", cut)
    with pytest.raises((OSError, CheckpointError), match=r"other bytes than were written|not readable as JSON"):
        save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", first.name]


def test_all_is_on_the_storage_and_in_the_hash_list_before_the_rename_and_the_rename_before_latest(
    tmp_path, monkeypatch
):
    flushed, renames, fsync, replace = set(), [], os.fsync, os.replace

    def watched_fsync(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)  # a file keeps its number when it is renamed
        fsync(descriptor)

    def watched_replace(source, target):
        if Path(target).name == "step-00000001":
            verify_checkpoint(Path(source))
            parts = [Path(source), *Path(source).rglob("*")]
            assert [path for path in parts if path.stat().st_ino not in flushed] == []
            assert tmp_path.stat().st_ino not in flushed
        if Path(target).name == "latest":
            assert tmp_path.stat().st_ino in flushed
            verify_checkpoint(tmp_path / os.readlink(source))
        renames.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    save(tmp_path, 1)
    assert renames[-2:] == ["step-00000001", "latest"]


def test_the_oldest_is_removed_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)
    alive = []
    prune = checkpoint._prune

    def watched(root, keep, newest):
        alive.append([verify_checkpoint(p) for p in root.glob("step-*")])
        assert (root / "latest").resolve() == newest.resolve()
        prune(root, keep, newest)

    monkeypatch.setattr(checkpoint, "_prune", watched)
    save(tmp_path, 3, keep=2)
    assert len(alive[0]) == 3
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]


def test_a_checkpoint_is_found_from_the_run_folder_or_the_error_says_what_was_expected(tmp_path):
    saved = save(tmp_path / "checkpoints", 1)
    for given in (tmp_path, tmp_path / "checkpoints", saved):
        assert find_checkpoint(given).resolve() == saved.resolve()
    with pytest.raises(CheckpointError, match=r"expected model_index\.json"):
        find_checkpoint(tmp_path / "elsewhere")


def test_a_team_on_shared_storage_can_read_what_one_of_them_wrote(tmp_path):
    before = os.umask(0o022)
    try:
        saved = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in saved.rglob("*") if path.is_file()} == {"0o644"}


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    names = json.loads((save(tmp_path, 1) / "hashes.json").read_text())
    assert {Path(name).suffix for name in names} == {".json", ".safetensors", ".yaml"}
