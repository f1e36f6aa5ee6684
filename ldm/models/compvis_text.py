"""Text encoders in CompVis' single files, as CLIPTextModel of transformers: names, shapes, and tensors, both ways.

Enters: tensors under `transformer.*` (CLIP, the same names) or `model.*` (OpenCLIP: queries, keys and values in one
matrix, the projection the other way round). Leaves: those of transformers, and back, with identical bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_FUSED = ("q_proj", "k_proj", "v_proj")
_LAYERS = "text_model.encoder.layers"
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_WHOLE = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
PROJECTION = ("text_projection", "text_projection.weight")
"""Name in OpenCLIP, and in transformers, where it is transposed."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a CompVis file, and the tensors of transformers that hold its numbers: three for a fused one."""

    stored: str
    """Name in the file, without the prefix of its text encoder."""
    names: tuple[str, ...]
    """Names in transformers."""
    transposed: bool = False
    """The matrix is stored the other way round."""

    def split(self, tensor: Tensor) -> list[Tensor]:
        """transformers' tensors, in the order of `names`; views of the stored one."""
        if self.transposed:
            return [tensor.T]
        return list(tensor.chunk(len(self.names))) if len(self.names) > 1 else [tensor]

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The stored tensor of those in transformers; the inverse of `split`."""
        parts = [tensors[name] for name in self.names]
        if self.transposed:
            return parts[0].T.contiguous()
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of `join`, without reading a tensor."""
        first = shapes[self.names[0]]
        return first[::-1] if self.transposed else (first[0] * len(self.names), *first[1:])


def clip_entries(layers: int) -> list[Entry]:
    """Tensors of a CLIP text model of so many layers under `cond_stage_model.transformer.`, in transformers' names."""
    names = [*_WHOLE.values()]
    for layer in range(layers):
        modules = [*_BLOCK.values(), *(f"self_attn.{part}" for part in _FUSED)]
        names += [f"{_LAYERS}.{layer}.{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    return [Entry(name, (name,)) for name in names]


def openclip_entries(layers: int, projection: bool) -> list[Entry]:
    """Tensors of an OpenCLIP text model under `cond_stage_model.model.` or `conditioner.embedders.1.model.`.

    Args:
        layers: how many are used: SD 2.x takes the states of the last but one, and is shipped without the last.
        projection: whether the pooled text is projected (SDXL).
    """
    entries = [Entry(stored, (name,)) for stored, name in _WHOLE.items()]
    if projection:
        entries.append(Entry(PROJECTION[0], (PROJECTION[1],), transposed=True))
    for layer in range(layers):
        block, ours = f"transformer.resblocks.{layer}", f"{_LAYERS}.{layer}"
        for kind in ("weight", "bias"):
            entries += [Entry(f"{block}.{a}.{kind}", (f"{ours}.{b}.{kind}",)) for a, b in _BLOCK.items()]
            fused = tuple(f"{ours}.self_attn.{part}.{kind}" for part in _FUSED)
            entries.append(Entry(f"{block}.attn.in_proj_{kind}", fused))
    return entries
