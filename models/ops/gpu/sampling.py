"""Bilinear sampling of a map, with one kernel for each gradient.

The weight of a pixel in a sample is the product of two hat functions ``max(0, 1 - distance)``, one per axis. The
gradient of the map is therefore a matrix product, weights ``[pixels, samples]`` times the gradient of the samples
``[samples, channels]``, and needs no atomic additions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..forms import operator
from .blocks import as_index, dot, launch, move_closer

SAMPLES = 16  # samples per block
PIXELS = 64  # pixels per block
CHANNELS = 64  # channels per block
LAUNCH = {"num_warps": 4, "num_stages": 1}
SIZES = ("height", "width", "samples")  # see `launch`


@triton.jit
def _places(positions, sample, samples, height, width):
    """Return sample positions in pixels; those far outside are moved closer, where samples are also zero.

    NaN is kept, as it is on a CPU.
    """
    there = sample < samples
    y = (tl.load(positions + sample * 2, mask=there, other=0.0) + 1) * ((height - 1) / 2)
    x = (tl.load(positions + sample * 2 + 1, mask=there, other=0.0) + 1) * ((width - 1) / 2)
    return move_closer(y, height), move_closer(x, width)


@triton.jit
def _cells(positions, sample, samples, height, width):
    """Return row and column of the pixel at the top left of each sample, and the distances of the sample from it."""
    y, x = _places(positions, sample, samples, height, width)
    top, left = tl.floor(y), tl.floor(x)
    return as_index(top), as_index(left), (y - top)[:, None], (x - left)[:, None]


@triton.jit
def _corner(x, row, column, channel, height, width, channels, inside):
    """Return the pixels of ``[H, W, C]`` at one corner of the samples, zero beyond the map."""
    mask = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = (row * width + column) * channels
    return tl.load(x + place[:, None] + channel[None, :], mask=mask[:, None] & inside, other=0.0).to(tl.float32)


@triton.jit
def _corners(x, row, column, channel, height, width, channels, inside):
    """Return the pixels at the four corners of the samples: top left, top right, bottom left, bottom right."""
    a = _corner(x, row, column, channel, height, width, channels, inside)
    b = _corner(x, row, column + 1, channel, height, width, channels, inside)
    c = _corner(x, row + 1, column, channel, height, width, channels, inside)
    d = _corner(x, row + 1, column + 1, channel, height, width, channels, inside)
    return a, b, c, d


@triton.jit(do_not_specialize=SIZES)
def _forward(
    x, positions, out, height, width, channels, groups, samples, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr
):
    blocks = tl.cdiv(samples, SAMPLES)
    block, image_group = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    image, group = image_group // groups, image_group % groups
    per_group = channels // groups
    sample = block * SAMPLES + tl.arange(0, SAMPLES)
    row, column, down, right = _cells(positions + image_group * samples * 2, sample, samples, height, width)
    x += image * height * width * channels + group * per_group
    out += image * samples * channels + group * per_group
    for first in range(0, per_group, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside = (sample < samples)[:, None] & (channel < per_group)[None, :]
        a, b, c, d = _corners(x, row, column, channel, height, width, channels, inside)
        result = (1 - down) * ((1 - right) * a + right * b) + down * ((1 - right) * c + right * d)
        place = out + sample[:, None] * channels + channel[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _backward_map(
    positions, grad, to_map, height, width, channels, groups, samples,
    SAMPLES: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    per_group = channels // groups
    slices, blocks = tl.cdiv(per_group, CHANNELS), tl.cdiv(height * width, PIXELS)
    part, block = tl.program_id(0) % slices, (tl.program_id(0) // slices) % blocks
    image_group = (tl.program_id(0) // slices // blocks).to(tl.int64)
    image, group = image_group // groups, image_group % groups
    positions += image_group * samples * 2
    pixel, channel = block * PIXELS + tl.arange(0, PIXELS), part * CHANNELS + tl.arange(0, CHANNELS)
    row, column = (pixel // width).to(tl.float32), (pixel % width).to(tl.float32)
    grad += image * samples * channels + group * per_group
    result = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for first in range(0, samples, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        y, x = _places(positions, sample, samples, height, width)
        hats = tl.maximum(1 - tl.abs(row[:, None] - y[None, :]), 0.0)
        hats *= tl.maximum(1 - tl.abs(column[:, None] - x[None, :]), 0.0)
        inside = (sample < samples)[:, None] & (channel < per_group)[None, :]
        place = grad + sample[:, None] * channels + channel[None, :]
        result += dot(hats, tl.load(place, mask=inside, other=0.0).to(tl.float32), "tf32x3")
    place = to_map + image * height * width * channels + group * per_group
    place += pixel[:, None] * channels + channel[None, :]
    mask = (pixel < height * width)[:, None] & (channel < per_group)[None, :]
    tl.store(place, result.to(to_map.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _backward_positions(
    x, positions, grad, to_positions, height, width, channels, groups, samples,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(samples, SAMPLES)
    block, image_group = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    image, group = image_group // groups, image_group % groups
    per_group = channels // groups
    sample = block * SAMPLES + tl.arange(0, SAMPLES)
    row, column, down, right = _cells(positions + image_group * samples * 2, sample, samples, height, width)
    x += image * height * width * channels + group * per_group
    grad += image * samples * channels + group * per_group
    to_y, to_x = tl.zeros([SAMPLES], tl.float32), tl.zeros([SAMPLES], tl.float32)
    for first in range(0, per_group, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside = (sample < samples)[:, None] & (channel < per_group)[None, :]
        a, b, c, d = _corners(x, row, column, channel, height, width, channels, inside)
        place = grad + sample[:, None] * channels + channel[None, :]
        gradient = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        to_y += tl.sum(gradient * ((1 - right) * (c - a) + right * (d - b)), 1)
        to_x += tl.sum(gradient * ((1 - down) * (b - a) + down * (d - c)), 1)
    place = to_positions + (image_group * samples + sample) * 2
    tl.store(place, to_y * ((height - 1) / 2), mask=sample < samples)
    tl.store(place + 1, to_x * ((width - 1) / 2), mask=sample < samples)


def _sizes(x: Tensor, positions: Tensor) -> tuple[int, ...]:
    return *x.shape[1:], *positions.shape[1:3]


def _channels(x: Tensor, positions: Tensor) -> int:
    return min(CHANNELS, max(16, triton.next_power_of_2(x.shape[-1] // positions.shape[1])))


@torch.library.custom_op(operator("sample"), mutates_args=())
def sample(x: Tensor, positions: Tensor) -> Tensor:
    """Return the samples ``[B, Ns, C]`` of a map ``[B, H, W, C]`` at ``[B, g, Ns, 2]``, float32; all contiguous."""
    images, groups, samples, _ = positions.shape
    out = x.new_empty(images, samples, x.shape[-1])
    if out.numel():
        launch(
            _forward, triton.cdiv(samples, SAMPLES) * images * groups,
            x, positions, out, *_sizes(x, positions), SAMPLES=SAMPLES, CHANNELS=_channels(x, positions), **LAUNCH,
        )  # fmt: skip
    return out


@sample.register_fake
def _(x, positions) -> Tensor:
    return x.new_empty(x.shape[0], positions.shape[2], x.shape[-1])


@torch.library.custom_op(operator("sample_backward"), mutates_args=())
def sample_backward(grad: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of map and positions, given that of the samples ``[B, Ns, C]``; shapes as in `sample`."""
    to_map, to_positions = torch.empty_like(x), torch.empty_like(positions)
    images, groups, samples, _ = positions.shape
    if x.numel():
        sizes, channels = _sizes(x, positions), _channels(x, positions)
        slices = triton.cdiv(x.shape[-1] // groups, channels)
        pixels = triton.cdiv(x.shape[1] * x.shape[2], PIXELS)
        launch(
            _backward_map, slices * pixels * images * groups,
            positions, grad, to_map, *sizes, SAMPLES=SAMPLES, PIXELS=PIXELS, CHANNELS=channels, **LAUNCH,
        )  # fmt: skip
        launch(
            _backward_positions, triton.cdiv(samples, SAMPLES) * images * groups,
            x, positions, grad, to_positions, *sizes, SAMPLES=SAMPLES, CHANNELS=channels, **LAUNCH,
        )  # fmt: skip
    return to_map, to_positions


@sample_backward.register_fake
def _(grad, x, positions) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(x), torch.empty_like(positions)


def _setup_context(ctx, inputs, output) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    return sample_backward(grad.contiguous(), *ctx.saved_tensors)


sample.register_autograd(_differentiate, setup_context=_setup_context)
