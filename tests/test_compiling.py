"""A pipeline compiled to sample draws the same picture, and one that is compiled wrongly draws none."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo

from ldm.models.parity_gate import ParityError
from ldm.pipeline.pipeline import Pipeline
from ldm.sampling import compiling
from ldm.sampling.compiling import compile_pipeline
from ldm.sampling.generation import generate

SETTINGS: dict[str, Any] = {"seed": 0, "steps": 3, "sampler": "dpmpp_2m", "guidance": 3.0}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_torchs_own_compiler_draws_the_networks_picture_and_compiles_once(pipeline: Pipeline) -> None:
    expected = generate(pipeline, ["a heart", "a star"], **SETTINGS)
    names = list(pipeline.unet.state_dict())
    assert compile_pipeline(pipeline, pipeline.latent_shape, 2, SETTINGS["guidance"]) < 1e-4
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = generate(pipeline, ["a heart", "a star"], **SETTINGS)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before, "sampling has the shape of the trial"
    assert int(np.abs(found.astype(int) - expected.astype(int)).max()) <= 1
    assert list(pipeline.unet.state_dict()) == names


def test_a_network_that_is_compiled_wrongly_is_caught(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrongly(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return lambda *given: [1.05 * one for one in graph(*given)]

    monkeypatch.setattr(compiling, "compile_frozen", lambda unet: unet.compile(backend=wrongly))
    with pytest.raises(ParityError, match=r"output is 0\.05 relative off .* draw without --compile"):
        compile_pipeline(pipeline, pipeline.latent_shape, 1, 1.0)
