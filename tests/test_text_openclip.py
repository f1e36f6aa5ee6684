"""Text encoders of SD 2.x, of SDXL and of whole CLIP models: layers, padding and widths that differ are noticed.

What is refused would give other states than the UNet was trained with, without a word.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_text_loading import CAPTIONS, sources, states
from tiny_models import LENGTH, clip_text_config, make_clip_tokenizer, save_random

from ldm.models.text_encoder import TextEncoder, TextEncoderConfig

__all__ = ["sources"]


def test_the_penultimate_layer_of_sd2_as_it_is_shipped_is_refused(sources: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "sd2"
    shutil.copytree(sources["clip"], folder)
    config = json.loads((folder / "config.json").read_text())
    shipped = {"num_hidden_layers": 23, "hidden_size": 1024, "hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps({**config, **shipped}))
    with pytest.raises(ValueError, match=r"23 layers, as SD 2\.x ships it: .* gone already; set layer: last"):
        states(folder, layer="penultimate")
    for whole in ({"num_hidden_layers": 24}, {"hidden_act": "quick_gelu"}):  # beyond that, of these weights
        (folder / "config.json").write_text(json.dumps({**config, **shipped, **whole}))
        with pytest.raises(ValueError, match="weights are not those of the CLIPTextModel"):
            states(folder, layer="penultimate")


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(("width", "activation"), [(1024, "gelu"), (1280, "gelu"), (1024, "quick_gelu"), (64, "gelu")])
def test_an_openclip_encoder_of_sd2_or_sdxl_with_another_padding_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int, width: int, activation: str
) -> None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tokens = make_clip_tokenizer(tmp_path / "end", ["r e"])
    make_clip_tokenizer(tmp_path / "first", ["r e"], pad_token="!")
    config = clip_text_config(tokens, width=width, hidden_act=activation)
    config.num_hidden_layers, config.intermediate_size = 1, 8
    save_random((CLIPTextModelWithProjection if number == 2 else CLIPTextModel)(config), tmp_path / "model")
    states(tmp_path / "model", number, tokenizer=str(tmp_path / "first"))
    assert not caplog.records
    states(tmp_path / "model", number, tokenizer=str(tmp_path / "end"))
    said = [record.message for record in caplog.records]
    assert len(said) == (activation == "gelu" and width > 64)
    assert all(f"with id {tokens - 1} ('<|endoftext|>')" in line and "id 0 ('!')" in line for line in said)


def test_the_projection_of_a_whole_model_is_as_wide_as_the_whole_model_says(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    tokens = make_clip_tokenizer(tmp_path, ["r e"], pad_token="!")
    text = clip_text_config(tokens, width=32, end_token=tokens - 1, projection_dim=99).to_dict()
    sides = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=text, vision_config={**sides, "image_size": 8, "patch_size": 4}, projection_dim=24)
    torch.manual_seed(4)
    model = CLIPModel(config).eval()
    save_random(model, tmp_path)
    encoder = TextEncoder(TextEncoderConfig(str(tmp_path), max_length=LENGTH), number=2)
    ids = encoder.tokenizer(CAPTIONS, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.text_projection(model.text_model(ids).pooler_output)
    pooled = encoder.encode(CAPTIONS).pooled
    assert pooled is not None
    assert encoder.pooled_size == pooled.shape[1] == 24
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
