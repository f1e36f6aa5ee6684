"""ldm/models/perceptual.py against ImageNet's own facts: parameter count, classes of pictures, TensorFlow's padding."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch.nn import functional as F

from ldm.models.perceptual import EfficientNetLite0, PerceptualDistance, SameConv2d
from tools.make_demo_data import STYLES, list_emoji

# Index of the class among ImageNet's 1,000, and an emoji of it.
CLASSES = {
    "soccer ball": 805,
    "violin": 889,
    "teddy bear": 850,
    "hourglass done": 604,
    "strawberry": 949,
    "lemon": 951,
    "zebra": 340,
    "ambulance": 407,
}


def picture(name: str, size: int, style: str = "twemoji") -> torch.Tensor:
    (emoji,) = [one for one in list_emoji() if one.name == name]
    return as_tensor(STYLES[style](emoji, size))


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1  # (1, 3, H, W)


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0.from_package()


@pytest.fixture(scope="module")
def distance() -> PerceptualDistance:
    return PerceptualDistance()


def test_lite0_has_the_published_number_of_parameters_and_takes_no_gradients(network: EfficientNetLite0) -> None:
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 49
    assert {norm.eps for norm in norms} == {1e-3}  # TensorFlow's, as published; PyTorch's own is 1e-5


def test_the_imagenet_classifier_finds_the_class_of_eight_emoji_among_1000(network: EfficientNetLite0) -> None:
    """Geometric mean of the ranks, best of 1,000 is 1; a network with a wrong part ranks them by chance, about 370."""
    ranks = []
    with torch.no_grad():
        for name, index in CLASSES.items():
            logits = network(picture(name, 224))[0]
            ranks.append(1 + int((logits > logits[index]).sum()))
    geometric_mean = float(np.exp(np.log(ranks).mean()))
    print(f"\nranks {dict(zip(CLASSES, ranks, strict=True))}, geometric mean {geometric_mean:.1f}")
    assert ranks[0] == 1
    assert geometric_mean < 8


@pytest.mark.parametrize(("size", "kernel", "stride"), [(64, 3, 2), (64, 5, 2), (33, 3, 2), (16, 5, 1), (17, 5, 2)])
def test_same_padding_is_tensorflows(size: int, kernel: int, stride: int) -> None:
    """tf.nn.convolution, padding "SAME": ceil(n / s) outputs; of the p zeros needed, floor(p / 2) come first."""
    torch.manual_seed(0)
    layer = SameConv2d(2, 2, kernel, stride, bias=False)
    x = torch.randn(1, 2, size, size)
    outputs = -(-size // stride)
    needed = max((outputs - 1) * stride + kernel - size, 0)
    first = needed // 2
    padded = F.pad(x, (first, needed - first, first, needed - first))
    windows = padded.unfold(2, kernel, stride).unfold(3, kernel, stride)  # (1, C, h, w, k, k)
    expected = torch.einsum("bchwij,ocij->bohw", windows, layer.weight)
    found = layer(x)
    assert found.shape == (1, 2, outputs, outputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_pixels_enter_as_x_minus_127_over_128(network: EfficientNetLite0, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(network.conv_stem, "forward", lambda x: seen.append(x) or torch.zeros(1, 32, 4, 4))
    network.block_features(torch.tensor([-1.0, 0.0, 1.0]).expand(1, 3, 8, 3), (0,))
    torch.testing.assert_close(seen[0][0, 0, 0], torch.tensor([-127 / 128, 0.5 / 128, 1.0]))


def test_equal_pictures_have_distance_zero_and_the_batch_does_not_matter(distance: PerceptualDistance) -> None:
    a, b = picture("red heart", 64), picture("black cat", 64)
    both = distance(torch.cat([a, a]), torch.cat([a, b]))
    assert both.shape == (2,)
    assert both[0] == 0
    torch.testing.assert_close(both[1], distance(a, b)[0], rtol=1e-4, atol=1e-6)


def test_blur_is_further_than_darkening_of_the_same_error_and_slight_noise_and_nearer_than_another_picture(
    distance: PerceptualDistance,
) -> None:
    """What a squared error does not tell apart and eyes do, on three emoji."""
    generator = torch.Generator().manual_seed(0)
    for name in ("zebra", "flag of Norway", "grapes"):
        sharp = picture(name, 64)
        pil = Image.fromarray(((sharp[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
        blurred = as_tensor(pil.filter(ImageFilter.GaussianBlur(2)))
        error = (blurred - sharp).square().mean().sqrt()
        darker = sharp - error  # the same root mean square error as the blur
        noisy = sharp + 0.1 * error * torch.randn(sharp.shape, generator=generator)
        d_blurred, d_noisy, d_darker = (float(distance(x, sharp)) for x in (blurred, noisy, darker))
        d_other = float(distance(picture("blue heart", 64), sharp))
        print(f"\n{name}: noisy {d_noisy:.3f}, darker {d_darker:.3f}, blurred {d_blurred:.3f}, other {d_other:.3f}")
        assert 0 < d_noisy < d_blurred < d_other <= 4
        assert d_darker < d_blurred


def test_gradients_reach_the_reconstruction_not_the_target_and_lead_back_to_it(distance: PerceptualDistance) -> None:
    target = picture("black cat", 64).requires_grad_()
    moving = (
        target.detach() + 0.3 * torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    ).requires_grad_()
    evaluated = distance(moving, target).sum()
    distance.train()  # must not switch BatchNorm to batch statistics
    start = distance(moving, target).sum()
    assert start == evaluated
    start.backward()
    assert target.grad is None
    assert moving.grad is not None
    assert float(moving.grad.abs().mean()) > 0
    with torch.no_grad():
        lower = distance(moving - moving.grad / moving.grad.norm(), target).sum()
    assert lower < start
