"""GroupNorm with SiLU over channels_last maps, as Triton kernels that read and write each element once a pass.

Enters: x (B, C, H, W) channels_last, in float32, float16 or bfloat16. Leaves: the same, normalized; kept for the
backward pass are x and float32 statistics alone. A map is (B, P, C) here, of P positions: statistics are taken by
channel, over pieces of the map, so that reads are whole rows of memory whatever the size of a group, then joined by
group. Nothing is added up in an order that depends on timing: equal inputs give equal bits.
"""

# mypy: allow-untyped-defs
# Triton gives the arguments of kernels their types.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

POSITIONS, CHANNELS = 32, 64
"""Of the tile that a program holds at a time."""
PIECES = 128
"""At most so many pieces has a map; they are joined by one program for each group."""


@triton.jit
def _statistics(x, means, squares, positions, channels, length, pieces, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Mean and sum of squared deviations of each channel in a piece of `length` positions (Chan et al. 1979)."""
    piece, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = block * WIDTH + tl.arange(0, WIDTH)
    inside = channel < channels
    x += row.to(tl.int64) * positions * channels
    count = 0.0
    mean = tl.zeros([WIDTH], tl.float32)
    square = tl.zeros([WIDTH], tl.float32)
    last = tl.minimum(positions, (piece + 1) * length)
    for start in range(piece * length, last, TILE):
        position = start + tl.arange(0, TILE)
        there = (position < last)[:, None] & inside[None, :]
        place = position[:, None].to(tl.int64) * channels + channel[None, :]
        values = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        here = tl.minimum(last - start, TILE).to(tl.float32)
        mean_here = tl.sum(values, 0) / here
        off = tl.where(there, values - mean_here[None, :], 0.0)
        step = mean_here - mean
        total = count + here
        mean += step * (here / total)
        square += tl.sum(off * off, 0) + step * step * (count * here / total)
        count = total
    out = (row * pieces + piece) * channels + channel
    tl.store(means + out, mean, mask=inside)
    tl.store(squares + out, square, mask=inside)


@triton.jit
def _join(means, squares, mean, rstd, positions, channels, length, pieces, groups, eps,
          PIECES: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """Mean and 1 / deviation of a group from those of its channels in all pieces."""
    group, row = tl.program_id(0), tl.program_id(1)
    size = channels // groups
    piece, channel = tl.arange(0, PIECES), tl.arange(0, SIZE)
    there = (piece < pieces)[:, None] & (channel < size)[None, :]
    place = (row * pieces + piece[:, None]) * channels + group * size + channel[None, :]
    found = tl.load(means + place, mask=there, other=0.0)
    counts = tl.where(there, tl.minimum(length, positions - piece * length)[:, None], 0).to(tl.float32)
    total = positions * size * 1.0
    middle = tl.sum(tl.sum(found * counts, 1), 0) / total
    off = tl.where(there, found - middle, 0.0)
    spread = tl.load(squares + place, mask=there, other=0.0) + off * off * counts
    variance = tl.sum(tl.sum(spread, 1), 0) / total
    tl.store(mean + row * groups + group, middle)
    tl.store(rstd + row * groups + group, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _tile(tile, block, row, positions, channels, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Channels of a tile and whether they are any; places of its elements in the map, and whether they are any."""
    channel = block * WIDTH + tl.arange(0, WIDTH)
    inside = channel < channels
    position = tile * TILE + tl.arange(0, TILE)
    there = (position < positions)[:, None] & inside[None, :]
    place = row.to(tl.int64) * positions * channels + position[:, None].to(tl.int64) * channels + channel[None, :]
    return channel, inside, place, there


@triton.jit
def _of_channels(weight, bias, mean, rstd, channel, group, inside):
    """1 / deviation and mean of each channel's group; its weight and bias."""
    scale = tl.load(rstd + group, mask=inside, other=0.0)
    middle = tl.load(mean + group, mask=inside, other=0.0)
    w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return scale, middle, w, b


@triton.jit
def _normalize(x, y, weight, bias, mean, rstd, positions, channels, groups,
               TILE: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    tile, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel, inside, place, there = _tile(tile, block, row, positions, channels, TILE, WIDTH)
    group = row * groups + channel // (channels // groups)
    scale, middle, w, b = _of_channels(weight, bias, mean, rstd, channel, group, inside)
    values = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    out = (values - middle[None, :]) * scale[None, :] * w[None, :] + b[None, :]
    if SILU:
        out = out * tl.sigmoid(out)
    tl.store(y + place, out.to(y.dtype.element_ty), mask=there)


@triton.jit
def _before_silu(upstream, out, SILU: tl.constexpr):
    """Gradient of what the SiLU was given, `out`."""
    if SILU:
        s = tl.sigmoid(out)
        upstream = upstream * s * (1.0 + out * (1.0 - s))
    return upstream


@triton.jit
def _sums(dy, x, weight, bias, mean, rstd, of_weight, of_bias, positions, channels, groups, length, pieces,
          TILE: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """Each channel's share of the gradients of weight and bias in a piece of the map."""
    piece, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = block * WIDTH + tl.arange(0, WIDTH)
    inside = channel < channels
    group = row * groups + channel // (channels // groups)
    scale, middle, w, b = _of_channels(weight, bias, mean, rstd, channel, group, inside)
    first = row.to(tl.int64) * positions * channels
    with_x = tl.zeros([WIDTH], tl.float32)
    alone = tl.zeros([WIDTH], tl.float32)
    last = tl.minimum(positions, (piece + 1) * length)
    for start in range(piece * length, last, TILE):
        position = start + tl.arange(0, TILE)
        there = (position < last)[:, None] & inside[None, :]
        place = first + position[:, None].to(tl.int64) * channels + channel[None, :]
        normal = (tl.load(x + place, mask=there, other=0.0).to(tl.float32) - middle[None, :]) * scale[None, :]
        upstream = tl.load(dy + place, mask=there, other=0.0).to(tl.float32)
        upstream = _before_silu(upstream, normal * w[None, :] + b[None, :], SILU)
        with_x += tl.sum(upstream * normal, 0)
        alone += tl.sum(upstream, 0)
    out = (row * pieces + piece) * channels + channel
    tl.store(of_weight + out, with_x, mask=inside)
    tl.store(of_bias + out, alone, mask=inside)


@triton.jit
def _join_sums(pieces_of_weight, pieces_of_bias, weight, of_rows, along, across, positions, channels, pieces, groups,
               rows, PIECES: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """Sums over pieces: of each channel for the gradients of weight and bias, of a group for that of x."""
    group, row = tl.program_id(0), tl.program_id(1)
    size = channels // groups
    piece, channel = tl.arange(0, PIECES), tl.arange(0, SIZE)
    inside = channel < size
    there = (piece < pieces)[:, None] & inside[None, :]
    place = (row * pieces + piece[:, None]) * channels + group * size + channel[None, :]
    with_x = tl.sum(tl.load(pieces_of_weight + place, mask=there, other=0.0), 0)
    alone = tl.sum(tl.load(pieces_of_bias + place, mask=there, other=0.0), 0)
    out = row * channels + group * size + channel
    tl.store(of_rows + out, with_x, mask=inside)
    tl.store(of_rows + rows * channels + out, alone, mask=inside)
    w = tl.load(weight + group * size + channel, mask=inside, other=0.0).to(tl.float32)
    total = positions * size * 1.0
    tl.store(along + row * groups + group, tl.sum(w * with_x, 0) / total)
    tl.store(across + row * groups + group, tl.sum(w * alone, 0) / total)


@triton.jit
def _gradient(dy, x, dx, weight, bias, mean, rstd, along, across, positions, channels, groups,
              TILE: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """dx = rstd (w u - across - normal along), u the gradient of what the SiLU was given."""
    tile, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel, inside, place, there = _tile(tile, block, row, positions, channels, TILE, WIDTH)
    group = row * groups + channel // (channels // groups)
    scale, middle, w, b = _of_channels(weight, bias, mean, rstd, channel, group, inside)
    a = tl.load(along + group, mask=inside, other=0.0)
    c = tl.load(across + group, mask=inside, other=0.0)
    normal = (tl.load(x + place, mask=there, other=0.0).to(tl.float32) - middle[None, :]) * scale[None, :]
    upstream = tl.load(dy + place, mask=there, other=0.0).to(tl.float32)
    upstream = _before_silu(upstream, normal * w[None, :] + b[None, :], SILU)
    out = scale[None, :] * (upstream * w[None, :] - c[None, :] - normal * a[None, :])
    tl.store(dx + place, out.to(dx.dtype.element_ty), mask=there)


def fused_group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """silu(group_norm(x)), or without the SiLU; differentiable in x, weight and bias, once.

    Args:
        x: (B, C, H, W), channels_last. weight, bias: (C,), of any floating dtype.

    Returns:
        (B, C, H, W), channels_last, in x's dtype.
    """
    out: Tensor = _forward(x, weight, bias, groups, eps, silu)[0]
    return out


@torch.library.custom_op("ldm::group_norm_silu", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, channels, positions, length, pieces, blocks = _layout(x)
    means, squares = x.new_empty(2, rows, pieces, channels, dtype=torch.float32)
    mean, rstd = (x.new_empty(rows, groups, dtype=torch.float32) for _ in range(2))  # outputs share no memory
    y = torch.empty_like(x, memory_format=torch.channels_last)
    tile = {"TILE": POSITIONS, "WIDTH": CHANNELS}
    joined = _joined(pieces, channels // groups)
    grid = (triton.cdiv(positions, POSITIONS), blocks, rows)
    with torch.cuda.device_of(x):
        _statistics[(pieces, blocks, rows)](x, means, squares, positions, channels, length, pieces, **tile)
        _join[(groups, rows)](means, squares, mean, rstd, positions, channels, length, pieces, groups, eps, **joined)
        _normalize[grid](x, y, weight, bias, mean, rstd, positions, channels, groups, SILU=silu, **tile)
    return y, mean, rstd


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.channels_last)
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    return y, mean, rstd


@torch.library.custom_op("ldm::group_norm_silu_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, channels, positions, length, pieces, blocks = _layout(x)
    dy = dy.contiguous(memory_format=torch.channels_last)
    of_weight, of_bias = x.new_empty(2, rows, pieces, channels, dtype=torch.float32)
    of_rows = x.new_empty(2, rows, channels, dtype=torch.float32)
    along, across = x.new_empty(2, rows, groups, dtype=torch.float32)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    tile: dict[str, Any] = {"TILE": POSITIONS, "WIDTH": CHANNELS, "SILU": silu}
    known = (weight, bias, mean, rstd)
    sizes = (positions, channels, groups)
    grid = (triton.cdiv(positions, POSITIONS), blocks, rows)
    with torch.cuda.device_of(x):
        _sums[(pieces, blocks, rows)](dy, x, *known, of_weight, of_bias, *sizes, length, pieces, **tile)
        _join_sums[(groups, rows)](
            of_weight, of_bias, weight, of_rows, along, across, positions, channels, pieces, groups, rows,
            **_joined(pieces, channels // groups),
        )  # fmt: skip
        _gradient[grid](dy, x, dx, *known, along, across, *sizes, **tile)
    return dx, of_rows[0].sum(0).to(weight.dtype), of_rows[1].sum(0).to(bias.dtype)


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, torch.empty_like(weight), torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw, db = _backward(dy, *ctx.saved_tensors, ctx.groups, ctx.silu)
    return dx, dw, db, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def _layout(x: Tensor) -> tuple[int, int, int, int, int, int]:
    """Rows, channels, positions, positions of a piece, pieces of a map, tiles that its channels take."""
    rows, channels, height, width = x.shape
    positions = height * width
    length = POSITIONS * triton.cdiv(triton.cdiv(positions, POSITIONS), PIECES)
    return rows, channels, positions, length, triton.cdiv(positions, length), triton.cdiv(channels, CHANNELS)


def _joined(pieces: int, size: int) -> dict[str, int]:
    return {"PIECES": triton.next_power_of_2(pieces), "SIZE": triton.next_power_of_2(size)}
