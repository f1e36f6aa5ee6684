"""AdamW and the average in one walk through memory, for processors: piece by piece, each as large as a cache holds.

Enters: gradients, a fused optimizer with its state, the average of the weights. Leaves: what the average's update and,
after it, the optimizer's step leave, bit by bit. Both are bound by memory: done one after the other they read the
weights twice, and find nothing of them in the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.training.ema import EMA
from ldm.training.optimizer import MOMENTS

PIECE = 1 << 15
"""Elements of a piece a thread: with both moments, gradient and average 640 KiB, less than any current core's share."""


@dataclass
class Piece:
    """Tensors, or parts of them, that are updated together."""

    group: int
    gradients: slice
    """Which of all segments, in the optimizer's order."""
    weights: list[Tensor]
    averages: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    steps: list[Tensor]


class JointStep:
    """Takes steps of `optimizer` together with updates of an average."""

    def __init__(self, optimizer: torch.optim.AdamW) -> None:
        self._optimizer = optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        cached = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in self._parameters)
        self._usable = cached and bool(optimizer.defaults["fused"])
        self._addresses: list[int] = []
        self._pieces: list[Piece] = []
        self._steps = torch.empty(0)
        self._parameters_laid_out: list[tuple[Tensor, tuple[int, ...], bool]] = []
        """Each parameter with its strides, and whether it is one segment."""

    def serves(self, ema: EMA) -> bool:
        """Whether the next step can be taken together with an update of `ema`: else they are to be done by themselves.

        The first step is the optimizer's own, which makes its state.
        """
        if not self._usable or len(self._optimizer.state) < len(self._parameters):
            return False
        # Addresses and not objects: a tensor's storage may be another one after it was exchanged or loaded.
        addresses = [p.data_ptr() for p in self._parameters]
        addresses += [average.data_ptr() for average in ema.averages]
        addresses += [state[MOMENTS[0]].data_ptr() for state in self._optimizer.state.values()]
        if addresses != self._addresses:
            self._addresses = []
            if not self._lay_out(ema):
                return False
            self._addresses = addresses
        return all(p.grad is not None for p in self._parameters)

    @torch.no_grad()
    def take(self, ema: EMA, grad_scale: Tensor | None) -> None:
        """Updates `ema`, then takes an optimizer step with gradients divided by `grad_scale`; after `serves`."""
        weight = ema.count_update()
        self._steps += 1
        gradients: list[Tensor] = []
        for p, stride, whole in self._parameters_laid_out:
            gradient = p.grad
            assert gradient is not None
            if gradient.stride() != stride:
                gradient = _laid_out_as(p, gradient)
            if whole:
                gradients.append(gradient)
            else:
                gradients += _segments(gradient)
        groups = self._optimizer.param_groups
        for piece in self._pieces:
            group = groups[piece.group]
            torch._foreach_lerp_(piece.averages, piece.weights, weight)
            torch._fused_adamw_(
                piece.weights,
                gradients[piece.gradients],
                piece.first,
                piece.second,
                [],
                piece.steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=grad_scale,
            )

    def _lay_out(self, ema: EMA) -> bool:
        """Cuts the tensors into segments and gathers these into pieces, none of two groups; False where they differ."""
        averages = ema.by_parameter()
        if averages.keys() != set(self._parameters):
            return False
        states = [self._optimizer.state[p] for p in self._parameters]
        for p, state in zip(self._parameters, states, strict=True):
            if any(tensor.stride() != p.stride() for tensor in (averages[p], *(state[key] for key in MOMENTS))):
                return False
        # Counts become parts of one tensor: to add one to each by itself costs as much as AdamW of a million weights.
        self._steps = torch.stack([state["step"] for state in states])
        for state, step in zip(states, self._steps.unbind(), strict=True):
            state["step"] = step
        tensors = [
            (p, averages[p], *(state[key] for key in (*MOMENTS, "step")))
            for p, state in zip(self._parameters, states, strict=True)
        ]
        self._parameters_laid_out = [(p, p.stride(), p.numel() <= PIECE) for p in self._parameters]
        self._pieces = []
        rows = iter(tensors)
        begun = 0
        for number, group in enumerate(self._optimizer.param_groups):
            segments = [segment for _ in group["params"] for segment in _rows_of_segments(next(rows))]
            size, first = 0, 0
            for last, segment in enumerate(segments, 1):
                size += segment[0].numel()
                if size >= PIECE * torch.get_num_threads() or last == len(segments):
                    columns = [list(column) for column in zip(*segments[first:last], strict=True)]
                    self._pieces.append(Piece(number, slice(begun + first, begun + last), *columns))
                    size, first = 0, last
            begun += len(segments)
        return True


def _rows_of_segments(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """(weights, average, moments, step) of each segment of a parameter."""
    *cut, step = tensors
    for segments in zip(*map(_segments, cut), strict=True):
        yield *segments, step


def _segments(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor in the order of its memory, in parts that a piece can take; a small one as it is."""
    if tensor.numel() <= PIECE:
        return (tensor,)
    return tensor.detach().as_strided((tensor.numel(),), (1,)).split(PIECE)


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in its parameter's memory format, as autograd gives it; copied where it is in another."""
    # Strides of dimensions of size 1 mean nothing.
    strides = zip(gradient.shape, gradient.stride(), parameter.stride(), strict=True)
    if all(size == 1 or theirs == ours for size, theirs, ours in strides):
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
