"""The contact sheet of the samplers: equal evaluations, a row a sampler, the pictures that sampling draws."""

import re
from pathlib import Path

import numpy as np
from conftest import ROOT, run_tool
from PIL import Image
from tiny_models import make_clip, make_pipeline

from ldm.grid import labelled_grid
from ldm.pipeline.pipeline import save_pipeline
from ldm.sampling.generation import generate

EVALUATIONS = {"ddim": 6, "heun": 5, "dpm_solver_2": 5, "dpm_solver_3": 4, "predictor_corrector": 5, "ddpm": 6}
"""The most of 6 that each can take: 2 a step, or 3, but 1 in the last."""


def test_each_sampler_draws_a_row_with_no_more_evaluations_than_asked_for(tmp_path: Path) -> None:
    make_clip(tmp_path / "clip")
    pipeline = make_pipeline(str(tmp_path / "clip"))
    save_pipeline(tmp_path / "pipeline", pipeline)
    shown = run_tool(
        ROOT / "tools/compare_samplers.py", "--checkpoint", tmp_path / "pipeline", "--out", tmp_path / "sheet.png",
        "--evaluations", "6", "--guidance", "2", "--device", "cpu", "--prompt", "a", "--prompt", "b",
        "--samplers", *EVALUATIONS,
    )  # fmt: skip
    found = {name: int(count) for name, count in re.findall(r"(\w+) +\d+ steps, +(\d+) evaluations", shown)}
    assert found == EVALUATIONS
    assert {name for name in EVALUATIONS if re.search(rf"{name} .*stochastic", shown)} == {
        "predictor_corrector",
        "ddpm",
    }
    first = generate(pipeline, ["a", "b"], seed=0, sampler="ddim", steps=6, guidance=2.0)
    with Image.open(tmp_path / "sheet.png") as sheet:
        row = labelled_grid(first, ["ddim (6): a", "ddim (6): b"], columns=2)
        height = row.height - 8  # without the margin below
        assert sheet.width == row.width
        assert sheet.height >= (len(EVALUATIONS) + 1) * height
        np.testing.assert_array_equal(np.asarray(sheet)[:height], np.asarray(row)[:height])
