"""Scheduler settings of a pipeline come back from a single file, by its family or by the file written beside it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert_checkpoint import convert, refused, save, tokenizer, words
from tiny_checkpoints import checkpoint

from ldm.models.checkpoint_scheduler import released

__all__ = ["tokenizer"]


def scheduler_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    for family in ("sd1", "sd2", "sdxl"):
        save(checkpoint(family), root / f"{family}.safetensors")
        convert(root / f"{family}.safetensors", root / family, *words(family, tokenizer))
    return {family: root / family for family in ("sd1", "sd2", "sdxl")}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"beta_start": 1e-4},
        {"beta_end": 0.02},
        {"prediction_type": "epsilon", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"num_train_timesteps": 500, "prediction_type": "epsilon"},
        {"rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2]},
        {"_class_name": "DDPMScheduler", "variance_type": "learned_range", "prediction_type": "epsilon"},
        {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "v_prediction", "own_setting": 3},
        {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "sigma_max": 120.0},
        {"_class_name": "EDMDPMSolverMultistepScheduler"},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_a_model_was_trained_with_comes_back_from_a_single_file(
    folders: dict[str, Path],
    tmp_path: Path,
    tokenizer: str,
    capsys: pytest.CaptureFixture[str],
    family: str,
    change: dict[str, Any],
) -> None:
    original = scheduler_of(folders[family])
    values = {**original, **change}
    path = folders[family] / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(values))
    try:
        convert(folders[family], tmp_path / "b.safetensors")
    finally:
        path.write_text(json.dumps(original))
    assert f"they lie beside it: {tmp_path}/b.scheduler.json" in capsys.readouterr().out
    tokenizers = words("sdxl" if family == "sdxl" else "sd1", tokenizer)  # without --prediction_type
    convert(tmp_path / "b.safetensors", tmp_path / "back", *tokenizers)
    assert f"scheduler from {tmp_path}/b.scheduler.json" in capsys.readouterr().out
    assert scheduler_of(tmp_path / "back") == values
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", values["_class_name"]]
    if values["prediction_type"] == "sample":
        other = ["--prediction_type", "epsilon"]
        error = refused(capsys, tmp_path / "b.safetensors", tmp_path / "x", *tokenizers, *other)
        assert "prediction_type is 'sample', but --prediction_type epsilon is given" in error


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("change", [{}, {"timestep_spacing": "trailing", "_class_name": "DPMSolverMultistepScheduler"}])
def test_nothing_lies_beside_a_file_whose_training_was_that_of_its_family(
    folders: dict[str, Path],
    tmp_path: Path,
    tokenizer: str,
    capsys: pytest.CaptureFixture[str],
    family: str,
    change: dict[str, Any],
) -> None:
    original = scheduler_of(folders[family])
    path = folders[family] / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**original, **change}))
    try:
        convert(folders[family], tmp_path / "b.safetensors")
    finally:
        path.write_text(json.dumps(original))
    assert not list(tmp_path.glob("*.json"))
    assert "not converted: scheduler, tokenizer" in capsys.readouterr().out  # the sampler is lost, and that is said
    convert(tmp_path / "b.safetensors", tmp_path / "back", *words(family, tokenizer))
    assert scheduler_of(tmp_path / "back") == original == released(family == "sdxl", "epsilon", False)


def test_the_file_beside_goes_before_marks_and_is_written_only_where_they_do_not_tell_the_same(
    tmp_path: Path,
    tokenizer: str,
) -> None:
    file = save({**checkpoint("sdxl"), "v_pred": torch.zeros(0)}, tmp_path / "a.safetensors")
    convert(file, tmp_path / "marked", *words("sdxl", tokenizer))
    convert(tmp_path / "marked", tmp_path / "b.safetensors")
    assert not list(tmp_path.glob("*.json"))
    convert(file, tmp_path / "epsilon", *words("sdxl", tokenizer), "--prediction_type", "epsilon")
    convert(tmp_path / "epsilon", tmp_path / "c.safetensors")
    convert(tmp_path / "c.safetensors", tmp_path / "back", *words("sdxl", tokenizer))
    assert scheduler_of(tmp_path / "back")["prediction_type"] == "epsilon"


def test_a_file_that_is_no_scheduler_is_refused_and_none_is_overwritten(
    folders: dict[str, Path],
    tmp_path: Path,
    tokenizer: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = save(checkpoint("sd1"), tmp_path / "a.safetensors")
    for content, message in (
        ("{", "is not JSON"),
        ("{}", "expected a diffusers scheduler's settings"),
        ('{"_class_name": "DDIMScheduler", "prediction_type": "x"}', "'x', expected one of epsilon, v_pred"),
    ):
        (tmp_path / "a.scheduler.json").write_text(content)
        error = refused(capsys, file, tmp_path / "x", *words("sd1", tokenizer))
        assert error.startswith(f"error: {tmp_path}/a.scheduler.json")
        assert message in error
    (tmp_path / "b.scheduler.json").write_text("{}")
    error = refused(capsys, folders["sd1"], tmp_path / "b.safetensors")
    assert "b.scheduler.json would be read as the config of" in error
