"""Linear layers of transformer blocks in 8-bit floats, by torchao: an experiment, for GPUs that multiply them.

Enters: a UNet. Leaves: the same UNet, whose matrix products are of float8 numbers, scaled tensor by tensor
(Micikevicius et al. 2022, arXiv:2209.05433); its parameters stay as they are, in float32 and under their names.
"""

import importlib.util

import torch
from torch import nn

from ldm.models.blocks import TransformerBlock
from ldm.models.unet import UNet
from ldm.training.launched import EngineError

MULTIPLE = 16
"""Of both sides of a matrix, as kernels for float8 take it."""
CAPABILITY = (8, 9)
"""The first GPUs that multiply 8-bit floats: Ada and Hopper."""


def use_fp8(unet: UNet, device: torch.device, *, emulated: bool = False) -> int:
    """Turns linear layers of the transformer blocks to float8 in place; returns their number.

    Args:
        emulated: rounds to float8 and multiplies in the dtype of computation, on any device: for tests.

    Raises:
        EngineError: torchao is not installed, or the device has no float8 products.
    """
    if importlib.util.find_spec("torchao") is None:
        raise EngineError("wrapping.fp8 is true, but torchao is not installed: pip install 'ldm[fp8]', or set it false")
    if not emulated and (device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY):
        found = (
            "no GPU"
            if device.type != "cuda"
            else f"{torch.cuda.get_device_name(device)}, capability "
            + ".".join(map(str, torch.cuda.get_device_capability(device)))
        )
        raise EngineError(
            f"wrapping.fp8 is true: found {found}, expected an NVIDIA GPU of capability 8.9 or more (L4, L40S, RTX "
            "4090, H100 and later); set it false"
        )
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    converted = 0

    def fits(module: nn.Module, name: str) -> bool:
        nonlocal converted
        chosen = isinstance(module, nn.Linear) and not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
        converted += chosen
        return chosen

    for block in [module for module in unet.modules() if isinstance(module, TransformerBlock)]:
        convert_to_float8_training(block, module_filter_fn=fits, config=Float8LinearConfig(emulate=emulated))
    return converted
