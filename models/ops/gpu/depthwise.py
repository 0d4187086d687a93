"""A depthwise convolution with a skip connection, optionally followed by GELU, in one kernel.

The backward pass recomputes the input of the GELU. One kernel writes its gradient and partial sums of the gradients of
weight and bias; the forward kernel then convolves the gradient with the flipped weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..forms import operator
from .blocks import launch

PIXELS = 32  # pixels per block
CHANNELS = 64  # channels per block
PROGRAMS = 1024  # largest number of programs of `_backward`, each of which writes a partial sum
LAUNCH = {"num_warps": 4, "num_stages": 1}
SIZES = ("images", "height", "width", "parts")  # see `launch`


@triton.jit
def _tap(x, pixel, channel, dy, dx, images, height, width, channels):
    """Return the pixels at offset (dy, dx) of pixels of ``[B, H, W, C]``, zero beyond the map."""
    row, column = (pixel // width) % height + dy, pixel % width + dx
    inside = (pixel < images * height * width) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = (pixel + dy * width + dx).to(tl.int64) * channels
    mask = inside[:, None] & (channel[None, :] < channels)
    return tl.load(x + place[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _with_skip(
    x, weight, pixel, channel, images, height, width, channels,
    SIZE: tl.constexpr, FLIPPED: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return ``x + conv(x)`` at a block of pixels, without the bias."""
    result = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for tap in tl.static_range(SIZE * SIZE):
        dy, dx = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2
        cell = SIZE * SIZE - 1 - tap if FLIPPED else tap
        factor = tl.load(weight + channel * SIZE * SIZE + cell, mask=channel < channels, other=0.0).to(tl.float32)
        if tap == SIZE * SIZE // 2:
            factor += 1.0
        result += _tap(x, pixel, channel, dy, dx, images, height, width, channels) * factor[None, :]
    return result


@triton.jit(do_not_specialize=SIZES)
def _forward(
    x, weight, bias, out, images, height, width, channels,
    SIZE: tl.constexpr, FLIPPED: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    slices = tl.cdiv(channels, CHANNELS)
    pixel = (tl.program_id(0) // slices) * PIXELS + tl.arange(0, PIXELS)
    channel = (tl.program_id(0) % slices) * CHANNELS + tl.arange(0, CHANNELS)
    z = _with_skip(x, weight, pixel, channel, images, height, width, channels, SIZE, FLIPPED, PIXELS, CHANNELS)
    if BIAS:
        z += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    if GELU:
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    place = out + pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    mask = (pixel[:, None] < images * height * width) & (channel[None, :] < channels)
    tl.store(place, z.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _backward(
    x, weight, bias, grad, dz, by_part, parts, images, height, width, channels,
    SIZE: tl.constexpr, GELU: tl.constexpr, TAPS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the GELU's input, and partial sums of those of weight and bias, ``[parts, k*k + 1, C]``."""
    slices = tl.cdiv(channels, CHANNELS)
    part, channel = tl.program_id(0) // slices, (tl.program_id(0) % slices) * CHANNELS + tl.arange(0, CHANNELS)
    bias_block = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    row = tl.arange(0, TAPS)[:, None]
    sums = tl.zeros([TAPS, CHANNELS], tl.float32)
    pixels = images * height * width
    for block in range(part, tl.cdiv(pixels, PIXELS), parts):
        pixel = block * PIXELS + tl.arange(0, PIXELS)
        place = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        mask = (pixel[:, None] < pixels) & (channel[None, :] < channels)
        gradient = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        if GELU:
            z = _with_skip(x, weight, pixel, channel, images, height, width, channels, SIZE, False, PIXELS, CHANNELS)
            z += bias_block[None, :]
            cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865476))  # of the standard normal distribution
            gradient *= cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
            tl.store(dz + place, gradient.to(dz.dtype.element_ty), mask=mask)
        for tap in tl.static_range(SIZE * SIZE):
            dy, dx = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2
            shifted = _tap(x, pixel, channel, dy, dx, images, height, width, channels)
            sums += tl.where(row == tap, tl.sum(gradient * shifted, 0)[None, :], 0.0)
        sums += tl.where(row == SIZE * SIZE, tl.sum(gradient, 0)[None, :], 0.0)
    place = by_part + (part * (SIZE * SIZE + 1) + row) * channels + channel[None, :]
    tl.store(place, sums, mask=(row <= SIZE * SIZE) & (channel[None, :] < channels))


def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor, *, flipped: bool, with_bias: bool, gelu: bool) -> Tensor:
    out, channels = torch.empty_like(x), x.shape[-1]
    block = min(CHANNELS, triton.next_power_of_2(channels))
    programs = triton.cdiv(x.numel() // channels, PIXELS) * triton.cdiv(channels, block)
    if programs:
        launch(
            _forward, programs,
            x, weight, bias, out, *x.shape, SIZE=weight.shape[-1], FLIPPED=flipped, BIAS=with_bias, GELU=gelu,
            PIXELS=PIXELS, CHANNELS=block, **LAUNCH,
        )  # fmt: skip
    return out


@torch.library.custom_op(operator("depthwise_residual"), mutates_args=())
def depthwise_residual(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """Return ``x + conv(x)`` of a depthwise convolution that keeps the size, or GELU of it. Tensors are contiguous.

    Args:
        x: map ``[B, H, W, C]``.
        weight: ``[C, 1, k, k]``, k odd.
        bias: ``[C]``.
        gelu: whether a GELU follows.
    """
    return _launch_forward(x, weight, bias, flipped=False, with_bias=True, gelu=gelu)


@depthwise_residual.register_fake
def _(x, weight, bias, gelu) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


@torch.library.custom_op(operator("depthwise_residual_backward"), mutates_args=())
def depthwise_residual_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of map, weight and bias; shapes as in `depthwise_residual`."""
    size, channels = weight.shape[-1], x.shape[-1]
    block = min(CHANNELS, triton.next_power_of_2(channels))
    slices, blocks = triton.cdiv(channels, block), triton.cdiv(x.numel() // channels, PIXELS)
    parts = min(blocks, triton.cdiv(PROGRAMS, slices))
    if not parts:
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    dz = torch.empty_like(x) if gelu else grad
    by_part = x.new_empty(parts, size * size + 1, channels, dtype=torch.float32)
    launch(
        _backward, parts * slices,
        x, weight, bias, grad, dz, by_part, parts, *x.shape, SIZE=size, GELU=gelu,
        TAPS=triton.next_power_of_2(size * size + 1), PIXELS=PIXELS, CHANNELS=block, **LAUNCH,
    )  # fmt: skip
    sums = by_part.sum(0)
    dx = _launch_forward(dz, weight, bias, flipped=True, with_bias=False, gelu=False)
    dweight = sums[:-1].t().reshape(weight.shape).to(weight.dtype).contiguous()  # until here a transposed view
    return dx, dweight, sums[-1].to(bias.dtype, copy=True)


@depthwise_residual_backward.register_fake
def _(grad, x, weight, bias, gelu) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx, inputs, output) -> None:  # noqa: ARG001
    *tensors, ctx.gelu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*depthwise_residual_backward(grad.contiguous(), *ctx.saved_tensors, ctx.gelu), None)


depthwise_residual.register_autograd(_differentiate, setup_context=_setup_context)
