"""Which activations a network keeps for its backward pass, and which it computes again: activation checkpointing.

Enters: a UNet and a policy's name. Leaves: the same network, whose blocks keep only their inputs where the policy says
so. Outputs and gradients stay the same; tools/plan_run.py tells each policy's memory and time.
"""

from typing import Literal, get_args

from torch import nn

from ldm.models.blocks import SpatialTransformer
from ldm.models.unet import Level, UNet

Policy = Literal["none", "transformers", "outer", "all"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


def recompute(unet: UNet, policy: Policy) -> None:
    """Sets which blocks compute their activations again in the backward pass; raises ValueError for another policy.

    none: no block. transformers: transformer blocks alone. outer: all blocks of the outermost level, on the way down
    and up, whose maps are the largest. all: every residual and transformer block.
    """
    if policy not in POLICIES:
        raise ValueError(f"wrapping.gradient_checkpointing: found {policy!r}, expected one of {', '.join(POLICIES)}")
    outer = {*unet.down_blocks[0].modules(), *unet.up_blocks[-1].modules()}

    def recomputes(module: nn.Module) -> bool:
        kinds = {"none": False, "transformers": isinstance(module, SpatialTransformer), "outer": module in outer}
        return kinds.get(policy, True)

    for module in unet.modules():
        if isinstance(module, Level | SpatialTransformer):
            module.checkpointing = recomputes(module)
