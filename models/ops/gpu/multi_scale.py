"""Multi-scale deformable attention as Triton kernels.

A program of `_forward` and `_backward_locations` processes some rows, each of which is one query and head.

The gradient of the values sums over all samples next to a pixel, in a fixed order, without atomic additions. Samples
are sorted, stably, by the cell between four pixels in which they lie. A program of `_backward_values`, for one pixel
and head, iterates over the samples of the four cells around its pixel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import launch

ROWS = 16  # rows per program
SAMPLES = 16  # samples of a cell loaded at a time
SIZES = ("rows", "pixels", "queries")  # see `launch`


def forward(shapes: Tensor, starts: Tensor, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Return the attention ``[B, Q, heads * C]``; arguments as in `ms_deform_attn`, tensors on one device."""
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    batch, queries, heads, levels, points = weights.shape
    channels, rows = value.shape[3], batch * queries * heads
    out = value.new_empty(batch, queries, heads * channels)
    if out.numel():
        launch(
            _forward, triton.cdiv(rows, ROWS),
            value, shapes, starts, locations, weights, out, rows, value.shape[1], queries, heads,
            channels, levels, points, ROWS, triton.next_power_of_2(channels),
        )  # fmt: skip
    return out


def backward(
    shapes: Tensor, starts: Tensor, grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of values, locations and weights, given that of `forward`'s result."""
    grad, value, locations, weights = (x.contiguous() for x in (grad, value, locations, weights))
    batch, queries, heads, levels, points = weights.shape
    pixels, channels, rows = value.shape[1], value.shape[3], batch * queries * heads
    to_value, to_locations, to_weights = (torch.empty_like(x) for x in (value, locations, weights))
    if rows and weights.numel():
        launch(
            _backward_locations, triton.cdiv(rows, ROWS),
            value, shapes, starts, locations, weights, grad, to_locations, to_weights, rows, pixels, queries, heads,
            channels, levels, points, ROWS, triton.next_power_of_2(channels),
        )  # fmt: skip
    if value.numel():
        order, first, origins = _by_cell(shapes, locations, pixels)
        launch(
            _backward_values, batch * pixels * heads,
            shapes, starts, origins, order, first, locations, weights, grad, to_value, pixels, heads,
            channels, levels, points, SAMPLES, triton.next_power_of_2(channels),
        )  # fmt: skip
    return to_value, to_locations, to_weights


def _by_cell(shapes: Tensor, locations: Tensor, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort samples by the cell in which they lie.

    A level of H x W pixels has (H + 1) x (W + 1) cells, including those at its border: at most four per pixel.

    Returns:
        The indices of the sorted samples; the start of the samples of every image, cell and head among them,
        ``[B * 4 * pixels * heads + 1]``; and the first cell of every level, ``[levels]``.
    """
    batch, heads = locations.shape[0], locations.shape[2]
    sizes = shapes.flip(-1)[:, None]  # [levels, 1, (x, y)]
    areas = (shapes + 1).prod(1)
    origins = areas.cumsum(0) - areas
    low = (locations * sizes - 0.5).floor()
    inside = ((low >= -1) & (low < sizes)).all(-1)  # [B, Q, heads, levels, points]
    x, y = torch.where(inside.unsqueeze(-1), low, -1).long().add_(1).unbind(-1)
    cells = origins[:, None] + y * (sizes[..., 0] + 1) + x
    image = torch.arange(batch, device=cells.device).view(-1, 1, 1, 1, 1)
    head = torch.arange(heads, device=cells.device).view(-1, 1, 1)
    count = batch * 4 * pixels * heads
    keys = torch.where(inside, (image * 4 * pixels + cells) * heads + head, count)
    keys, order = keys.flatten().sort(stable=True)
    first = torch.searchsorted(keys, torch.arange(count + 1, device=keys.device))
    return order, first, origins


@triton.jit
def _axis(place, length):
    """Return a position in pixels, moved close to the axis if it is far outside; NaN is kept."""
    place = place * length - 0.5
    place = tl.where(place < -2, -2, place)
    return tl.where(place > length + 1, length + 1, place)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    value,
    shapes,
    starts,
    locations,
    weights,
    out,
    rows,
    pixels,
    queries,
    heads,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    exists = row < rows
    first = row // (queries * heads) * pixels
    head = row % heads
    sums = tl.zeros((ROWS, BLOCK), dtype=weights.dtype.element_ty)
    for level in range(LEVELS):
        height, width = tl.load(shapes + 2 * level), tl.load(shapes + 2 * level + 1)
        start = tl.load(starts + level)
        for point in range(POINTS):
            sample = (row * LEVELS + level) * POINTS + point
            x = _axis(tl.load(locations + 2 * sample, mask=exists, other=0), width)
            y = _axis(tl.load(locations + 2 * sample + 1, mask=exists, other=0), height)
            weight = tl.load(weights + sample, mask=exists, other=0)
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    px, py = tl.floor(x) + dx, tl.floor(y) + dy
                    inside = exists & (px >= 0) & (px < width) & (py >= 0) & (py < height)
                    pixel = start + (tl.where(inside, py, 0) * width + tl.where(inside, px, 0)).to(tl.int64)
                    inside = inside & (pixel < pixels)
                    address = ((first + pixel) * heads + head)[:, None] * CHANNELS + channel
                    mask = inside[:, None] & (channel < CHANNELS)
                    pixel_weight = weight * (1 - tl.abs(x - px)) * (1 - tl.abs(y - py))
                    sums += pixel_weight[:, None] * tl.load(value + address, mask=mask, other=0)
    tl.store(out + row[:, None] * CHANNELS + channel, sums, mask=exists[:, None] & (channel < CHANNELS))


@triton.jit(do_not_specialize=SIZES)
def _backward_locations(
    value,
    shapes,
    starts,
    locations,
    weights,
    grad,
    to_locations,
    to_weights,
    rows,
    pixels,
    queries,
    heads,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    exists = row < rows
    first = row // (queries * heads) * pixels
    head = row % heads
    whole = exists[:, None] & (channel < CHANNELS)
    out = tl.load(grad + row[:, None] * CHANNELS + channel, mask=whole, other=0).to(weights.dtype.element_ty)
    for level in range(LEVELS):
        height, width = tl.load(shapes + 2 * level), tl.load(shapes + 2 * level + 1)
        start = tl.load(starts + level)
        for point in range(POINTS):
            sample = (row * LEVELS + level) * POINTS + point
            x = _axis(tl.load(locations + 2 * sample, mask=exists, other=0), width)
            y = _axis(tl.load(locations + 2 * sample + 1, mask=exists, other=0), height)
            weight = tl.load(weights + sample, mask=exists, other=0)
            to_x, to_y, to_weight = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    px, py = tl.floor(x) + dx, tl.floor(y) + dy
                    inside = exists & (px >= 0) & (px < width) & (py >= 0) & (py < height)
                    pixel = start + (tl.where(inside, py, 0) * width + tl.where(inside, px, 0)).to(tl.int64)
                    inside = inside & (pixel < pixels)
                    address = ((first + pixel) * heads + head)[:, None] * CHANNELS + channel
                    values = tl.load(value + address, mask=inside[:, None] & (channel < CHANNELS), other=0)
                    product = tl.sum(out * values, axis=1)
                    across, down = 1 - tl.abs(x - px), 1 - tl.abs(y - py)
                    to_weight += across * down * product
                    to_x += (2 * dx - 1) * down * product
                    to_y += (2 * dy - 1) * across * product
            tl.store(to_weights + sample, to_weight, mask=exists)
            tl.store(to_locations + 2 * sample, to_x * weight * width, mask=exists)
            tl.store(to_locations + 2 * sample + 1, to_y * weight * height, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def _backward_values(
    shapes,
    starts,
    origins,
    order,
    first,
    locations,
    weights,
    grad,
    to_value,
    pixels,
    heads,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    head = row % heads
    image = row // heads // pixels
    pixel = row // heads % pixels
    sums = tl.zeros((BLOCK,), dtype=weights.dtype.element_ty)
    for level in range(LEVELS):
        height, width = tl.load(shapes + 2 * level), tl.load(shapes + 2 * level + 1)
        place = pixel - tl.load(starts + level)
        inside = (place >= 0) & (place < height * width)
        py, px = place // width, place % width
        for dy in tl.static_range(2):
            for dx in tl.static_range(2):
                cell = tl.load(origins + level) + (py + 1 - dy) * (width + 1) + px + 1 - dx
                key = (image * 4 * pixels + cell) * heads + head
                begin, end = tl.load(first + key, mask=inside, other=0), tl.load(first + key + 1, mask=inside, other=0)
                for at in range(begin, end, SAMPLES):
                    index = at + tl.arange(0, SAMPLES)
                    exists = index < end
                    sample = tl.load(order + index, mask=exists, other=0)
                    x = tl.load(locations + 2 * sample, mask=exists, other=0) * width - 0.5
                    y = tl.load(locations + 2 * sample + 1, mask=exists, other=0) * height - 0.5
                    weight = tl.load(weights + sample, mask=exists, other=0)
                    weight = weight * (1 - tl.abs(x - px)) * (1 - tl.abs(y - py))
                    address = (sample // (LEVELS * POINTS))[:, None] * CHANNELS + channel
                    mask = exists[:, None] & (channel < CHANNELS)
                    sums += tl.sum(weight[:, None] * tl.load(grad + address, mask=mask, other=0), axis=0)
    tl.store(to_value + row * CHANNELS + channel, sums, mask=channel < CHANNELS)
