"""The UNet's config, files, precision, memory, compilation and errors; test_unet_parity.py compares its numbers."""

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from published_configs import SD14
from torch import Tensor
from unet_pairs import PARITY_LIMIT, SMALL, call_diffusers, deviation, random_inputs, small_pair

from ldm.models import attention as attention_module
from ldm.models.attention import BACKENDS
from ldm.models.blocks import Attention, embed_numbers
from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNet
from ldm.models.unet_config import FIXED, UNetConfig
from ldm.training.recomputation import recompute


def test_defaults_and_fixed_settings_are_the_defaults_of_diffusers() -> None:
    # A config.json may leave out what has its default: another default here would build another network in silence.
    signature = inspect.signature(UNet2DConditionModel.__init__).parameters
    theirs = {name: p.default for name, p in signature.items() if name != "self"}
    ours = UNetConfig().to_dict()
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()} == ours


def test_every_setting_of_diffusers_that_would_change_the_network_is_refused_by_name() -> None:
    wrong = {name: 7 if value in (None, 64) else "other" for name, value in FIXED.items()}
    with pytest.raises(ValueError, match="not supported") as error:
        UNetConfig.from_dict({**SD14, **wrong, "made_up": 1, "_class_name": "x", "_diffusers_version": "0.6"})
    assert all(f"{name}: found" in str(error.value) for name in wrong)
    assert "made_up: 1 is not a known setting" in str(error.value)
    assert "_class_name" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": [16, 30]}, r"block_out_channels: found \[16, 30\], expected multiples of .* 4"),
        ({"up_block_types": ["UpBlock2D"]}, r"up_block_types: found \['UpBlock2D'\]"),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "down_block_types"),
        ({"attention_head_dim": 3}, "attention_head_dim: 3 heads cannot share 32 channels"),
        ({"attention_head_dim": [2, 2, 2]}, r"attention_head_dim: found \[2, 2, 2\]"),
        ({"layers_per_block": 0}, "layers_per_block: found 0"),
        ({"addition_embed_type": "text"}, "addition_embed_type: found 'text'"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim: found None"),
        ({"addition_time_embed_dim": 8}, "addition_time_embed_dim: found 8"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused_with_field_and_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{**SMALL, **change})


def test_diffusers_opens_what_save_pretrained_writes(tmp_path: Path) -> None:
    ours, _ = small_pair(upcast_attention=True)
    ours.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    theirs, report = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    config = {name: list(v) if isinstance(v, tuple) else v for name, v in theirs.config.items() if name[0] != "_"}
    assert config == ours.config.to_dict()
    x, t, conditioning = random_inputs(ours.config, 0, (8, 8))
    assert deviation(ours(x, t, conditioning), call_diffusers(theirs, x, t, conditioning)) < PARITY_LIMIT


@pytest.mark.parametrize("shard_size", ["10GB", "60KB"])
def test_from_pretrained_opens_what_diffusers_writes_whole_and_in_shards(tmp_path: Path, shard_size: str) -> None:
    ours, theirs = small_pair()
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "60KB")
    opened = UNet.from_pretrained(tmp_path)
    assert opened.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), ours.parameters(), strict=True))


def test_half_precision_files_are_saved_and_opened_in_the_dtype_asked_for(tmp_path: Path) -> None:
    ours, _ = small_pair()
    ours.save_pretrained(tmp_path, dtype=torch.float16)
    half, full = UNet.from_pretrained(tmp_path, dtype=torch.bfloat16), UNet.from_pretrained(tmp_path)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    weight = ours.conv_in.weight
    assert torch.equal(full.conv_in.weight, weight.half().float())
    assert next(ours.parameters()).dtype == torch.float32  # saving leaves the network as it is


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    ours, _ = small_pair()
    ours.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text().replace("UNet2DConditionModel", "AutoencoderKL")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="_class_name is 'AutoencoderKL', expected 'UNet2DConditionModel'"):
        UNet.from_pretrained(tmp_path)


def test_a_new_network_predicts_zero_so_that_an_epsilon_loss_starts_at_the_variance_of_the_noise() -> None:
    unet = UNet(UNetConfig(**SMALL))
    x, t, conditioning = random_inputs(unet.config, 0, (8, 8))
    noise = torch.randn(2, 4, 8, 8)
    assert F.mse_loss(unet(x, t, conditioning), noise) == noise.square().mean()


def test_zero_layers_do_not_stop_learning_every_parameter_has_a_gradient_within_four_steps() -> None:
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**SMALL))
    x, t, conditioning = random_inputs(unet.config, 0, (8, 8))
    reached: set[str] = set()
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        F.mse_loss(unet(x, t, conditioning), x).backward()
        reached |= {name for name, p in unet.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert reached == {name for name, _ in unet.named_parameters()}


def test_only_last_layers_start_at_zero() -> None:
    unet = UNet(UNetConfig(**SMALL))
    zero = {name.rsplit(".", 1)[0] for name, p in unet.named_parameters() if p.ndim > 1 and not p.any()}
    expected = {n for n, _ in unet.named_modules() if n.endswith((".conv2", ".proj_out"))} | {"conv_out"}
    assert zero == expected


def test_embedding_of_numbers_is_the_closed_form_in_float32_also_under_autocast() -> None:
    numbers = torch.tensor([0.0, 1.0, 499.5, 500.0, 999.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = embed_numbers(numbers, 32, cosine_first=True, shift=0)
    i = np.arange(16, dtype=np.float64)
    angles = numbers.double().numpy()[:, None] * np.exp(-math.log(10_000) * i / 16)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)  # float32 angles up to 999


def test_bfloat16_weights_still_tell_neighbouring_timesteps_apart() -> None:
    # bfloat16 has eight bits: 500 and 501 are one number in it, so timesteps must be embedded before they are rounded.
    unet = small_pair()[0].bfloat16()
    x, _, conditioning = random_inputs(unet.config, 0, (8, 8))
    first, second = (unet(x, torch.tensor([t, t]), conditioning) for t in (500, 501))
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first, second)


def test_channels_last_computes_the_same_and_stays_channels_last() -> None:
    ours, _ = small_pair()
    x, t, conditioning = random_inputs(ours.config, 0, (9, 6))
    expected = ours(x, t, conditioning)
    found = ours.to(memory_format=torch.channels_last)(x, t, conditioning)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert deviation(found, expected) < PARITY_LIMIT


def test_autocast_to_bfloat16_stays_near_float32_and_norms_run_in_bfloat16() -> None:
    # On CUDA autocast would choose float32 for norms; on the CPU it leaves them as they are.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = small_pair()[0].to(device)
    x, t, conditioning = random_inputs(ours.config, 0, (8, 8))
    x, t, conditioning = x.to(device), t.to(device), conditioning.to(device)
    expected = ours(x, t, conditioning)
    kinds = []
    ours.conv_norm_out.register_forward_hook(lambda module, args, out: kinds.append((args[0].dtype, out.dtype)))
    with torch.autocast(device, dtype=torch.bfloat16):
        found = ours(x, t, conditioning)
    assert kinds == [(torch.bfloat16, torch.bfloat16)]
    assert float(((found - expected).norm() / expected.norm()).detach()) < 0.02
    found.float().square().sum().backward()
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}


def saved_bytes_and_gradients(unet: UNet) -> tuple[int, list[Tensor]]:
    x, t, conditioning = random_inputs(unet.config, 0, (16, 16))
    storages = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = unet(x, t, conditioning)
    kept = sum(size for pointer, size in storages.items() if pointer not in parameters)
    return kept, list(torch.autograd.grad(out.square().sum(), list(unet.parameters())))


def test_checkpointing_keeps_less_than_a_third_and_gives_the_same_gradients() -> None:
    ours, _ = small_pair(layers_per_block=2)
    plain, gradients = saved_bytes_and_gradients(ours)
    recompute(ours, "all")
    kept, again = saved_bytes_and_gradients(ours)
    assert kept < plain / 3, (kept, plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_whole_network_is_one_graph_that_other_timesteps_do_not_retrace(checkpointing: bool) -> None:
    from torch._dynamo.testing import CompileCounter

    ours, _ = small_pair()
    if checkpointing:
        recompute(ours, "all")
    counter = CompileCounter()
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    for seed in (0, 2, 4):
        x, t, conditioning = random_inputs(ours.config, seed, (8, 8))
        assert deviation(compiled(x, t, conditioning), ours(x, t, conditioning)) < PARITY_LIMIT
    assert counter.frame_count == 1


def test_set_attention_backend_reaches_every_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = small_pair()
    calls = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape)
        return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v

    x, t, conditioning = random_inputs(ours.config, 0, (8, 8))
    expected = ours(x, t, conditioning)
    monkeypatch.setitem(attention_module.BACKENDS, "counted", counted)
    ours.set_attention_backend("counted")
    assert deviation(ours(x, t, conditioning), expected) < PARITY_LIMIT
    assert len(calls) == sum(isinstance(m, Attention) for m in ours.modules()) == 8  # 4 transformers, 2 in each
    with pytest.raises(ValueError, match="found 'fastest', expected"):
        ours.set_attention_backend("fastest")
    assert {"sdpa", "xformers"} <= set(BACKENDS)


def test_inputs_that_do_not_fit_are_named_with_their_shapes() -> None:
    values = {"addition_embed_type": "text_time", "addition_time_embed_dim": 6}
    unet = UNet(UNetConfig(**SMALL, **values, projection_class_embeddings_input_dim=46))
    x, t, conditioning = random_inputs(unet.config, 0, (8, 8))
    cases: list[tuple[tuple[Tensor, Tensor, Conditioning], str]] = [
        ((x[:, :3], t, conditioning), r"found latents \(2, 3, 8, 8\) .* expected latents \(B, 4, h, w\)"),
        ((x, t[:1], conditioning), r"timesteps \(1,\)"),
        ((x, t, Conditioning(conditioning.text)), r"conditioning.pooled: found shape None, .* expects \(2, 10\)"),
        ((x, t, conditioning.select(slice(0, 1))), r"conditioning.text: found shape \(1, 7, 12\)"),
        ((x, t, Conditioning(torch.zeros(2, 7, 13))), r"conditioning.text: found shape \(2, 7, 13\), .* \(2, 7, 12\)"),
        ((x, t, Conditioning(conditioning.text, conditioning.pooled)), r"conditioning.sizes: found shape None"),
    ]
    for inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            unet(*inputs)


def test_conditioning_joins_selects_and_moves_all_parts_and_loses_none() -> None:
    a = Conditioning(torch.randn(2, 3, 4), torch.randn(2, 5), torch.arange(12.0).view(2, 6) + 1001)
    b = Conditioning(torch.randn(1, 3, 4), torch.randn(1, 5), torch.zeros(1, 6))
    joined = Conditioning.cat([a, b])
    assert len(joined) == 3
    for name in ("text", "pooled", "sizes"):
        assert torch.equal(getattr(joined, name), torch.cat([getattr(a, name), getattr(b, name)]))
        assert torch.equal(getattr(joined.select(torch.tensor([2, 0])), name)[1], getattr(a, name)[0])
        assert torch.equal(getattr(b.expand(4), name)[3], getattr(b, name)[0])
    moved = a.to(dtype=torch.bfloat16)
    assert moved.pooled is not None
    assert moved.text.dtype == moved.pooled.dtype == torch.bfloat16
    assert torch.equal(moved.sizes, a.sizes)  # 1001 pixels are not a bfloat16
    with pytest.raises(ValueError, match=r"conditioning.pooled is given in 1 of 2"):
        Conditioning.cat([a, Conditioning(b.text)])
