"""Multi-scale deformable attention as weighted sums of rows, for CPUs.

Every level is copied with a border of zeros, so every sample is a weighted sum of four rows of a matrix; a location far
outside is moved into the border. Queries are processed a few at a time, so that their samples stay in the CPU cache.
The backward pass recomputes the samples. It sorts them by the pixel at their upper left, so that the gradient of the
values is a weighted sum of rows, too, in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BORDER = 2  # rows of zeros above and below a level, and columns left of it, which also follow the previous row
AT_A_TIME = 1 << 15  # samples processed at a time
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


class _Samples(NamedTuple):
    """The samples of some queries, ``[queries, heads, levels * points]`` each.

    Attributes:
        queries: slice of the queries of all images.
        base: row of the matrix that holds the pixel at the upper left.
        fx: fraction of the way from the left to the right pixel.
        fy: fraction of the way from the upper to the lower pixel.
        weight: attention weight.
    """

    queries: slice
    base: Tensor
    fx: Tensor
    fy: Tensor
    weight: Tensor

    def corners(self) -> Iterator[Tensor]:
        """Yield the weights of the four pixels, in the order of `CORNERS`."""
        return _corner_weights(self.fx, self.fy, self.weight)


def _corner_weights(fx: Tensor, fy: Tensor, weight: Tensor) -> Iterator[Tensor]:
    lower = weight * fy
    for row in (weight - lower, lower):
        right = row * fx
        yield row - right
        yield right


class _Layout:
    """The matrix of all pixels with their borders: a row per image, pixel and head."""

    def __init__(self, levels: Sequence[Sequence[int]], starts: Sequence[int], value: Tensor) -> None:
        self.levels, self.starts = levels, starts
        self.batch, self.pixels, self.heads, self.channels = value.shape
        self.widths = [width + BORDER for _, width in levels]
        areas = [(height + 2 * BORDER) * width for (height, _), width in zip(levels, self.widths, strict=True)]
        self.planes = [sum(areas[:i]) for i in range(len(areas))]
        self.area = sum(areas)
        self.rows = self.batch * self.area * self.heads
        self.tail = BORDER * self.heads  # zeros after the last row
        self.index = torch.int32 if self.rows + self.tail < 2**31 else torch.int64

    def pad(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the matrix of all values and their borders, ``[rows, C]``."""
        padded = torch.zeros(self.rows + self.tail, self.channels, dtype=dtype)
        planes = padded[: self.rows].view(self.batch, self.area, self.heads, self.channels)
        for level in range(len(self.levels)):
            self._inner(planes, level).copy_(self._map(value, level))
        return padded

    def add_shifted(self, out: Tensor, sums: Tensor, corner: tuple[int, int]) -> None:
        """Add sums per upper left pixel, ``[rows, C]``, to the pixels at one corner of it, ``out [B, S, heads, C]``."""
        planes = sums.view(self.batch, self.area, self.heads, self.channels)
        for level in range(len(self.levels)):
            self._map(out, level).add_(self._inner(planes, level, corner))

    def _map(self, value: Tensor, level: int) -> Tensor:
        height, width = self.levels[level]
        return value.narrow(1, self.starts[level], height * width).unflatten(1, (height, width))

    def _inner(self, planes: Tensor, level: int, corner: tuple[int, int] = (0, 0)) -> Tensor:
        (height, width), (dy, dx) = self.levels[level], corner
        rows, columns = height + 2 * BORDER, self.widths[level]
        plane = planes.narrow(1, self.planes[level], rows * columns).unflatten(1, (rows, columns))
        return plane.narrow(1, BORDER - dy, height).narrow(2, BORDER - dx, width)

    def samples(self, locations: Tensor, weights: Tensor) -> Iterator[_Samples]:
        """Yield the samples of a few queries at a time."""
        _, queries, heads, levels, points, _ = locations.shape
        each = heads * levels * points
        locations, weights = locations.reshape(-1, 2 * each), weights.reshape(-1, each)

        def row(numbers: Sequence, dtype: torch.dtype) -> Tensor:
            """Expand one value per level to all samples of a query."""
            numbers = torch.tensor(numbers, dtype=dtype).view(levels, 1, -1)
            return numbers.expand(heads, levels, points, -1).flatten()

        sizes = row([(width, height) for height, width in self.levels], weights.dtype)
        widths = row(self.widths, self.index)
        head = torch.arange(heads, dtype=self.index).repeat_interleave(levels * points)
        origins = [p + BORDER * w + BORDER for p, w in zip(self.planes, self.widths, strict=True)]
        origins = row(origins, self.index) * heads + head
        image = torch.arange(self.batch, dtype=self.index).repeat_interleave(queries)[:, None] * (self.area * heads)
        count = max(1, AT_A_TIME // max(each, 1))
        shape = (-1, heads, levels * points)
        for first in range(0, len(weights), count):
            part = slice(first, first + count)
            place = (locations[part] * sizes).sub_(0.5).clamp_(min=-BORDER)
            place = torch.minimum(place, sizes, out=place).unflatten(1, (-1, 2))
            low = place.floor()
            place.sub_(low)
            x, y = low.nan_to_num_(0.0).to(self.index).unbind(-1)
            base = (y * widths).add_(x).mul_(heads).add_(origins).add_(image[part])
            fx, fy = (f.contiguous().view(shape) for f in place.unbind(-1))
            yield _Samples(part, base.view(shape), fx, fy, weights[part].view(shape))

    def taps(self, samples: _Samples) -> Tensor:
        """Return the rows of the four pixels of every sample, ``[queries, heads, 4, levels * points]``."""
        base = samples.base
        points = base.shape[2] // len(self.levels)
        below = torch.tensor(self.widths, dtype=self.index).mul_(self.heads).repeat_interleave(points)
        taps = base.new_empty(*base.shape[:2], 4, base.shape[2])
        for corner, (dy, dx) in enumerate(CORNERS):
            torch.add(base, below * dy + self.heads * dx, out=taps[:, :, corner])
        return taps


def forward(
    levels: Sequence[Sequence[int]], starts: Sequence[int], value: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """Return the attention ``[B, Q, heads * C]``; arguments as in `ms_deform_attn`."""
    batch, queries, heads = locations.shape[:3]
    layout = _Layout(levels, starts, value)
    out = value.new_zeros(batch, queries, heads * layout.channels)
    if not out.numel() or not weights.numel():
        return out
    matrix = layout.pad(value, weights.dtype)
    for samples in layout.samples(locations, weights):
        taps = layout.taps(samples)
        corners = torch.empty(taps.shape, dtype=weights.dtype)
        for corner, weight in enumerate(samples.corners()):
            corners[:, :, corner] = weight
        count = math.prod(taps.shape[2:])
        sums = F.embedding_bag(taps.view(-1, count), matrix, mode="sum", per_sample_weights=corners.view(-1, count))
        out.flatten(0, 1)[samples.queries] = sums.view(-1, out.shape[2])
    return out


def backward(
    levels: Sequence[Sequence[int]],
    starts: Sequence[int],
    grad: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of values, locations and weights given that of `forward`'s result."""
    layout = _Layout(levels, starts, value)
    to_value, to_locations, to_weights = (torch.zeros(x.shape, dtype=x.dtype) for x in (value, locations, weights))
    if not grad.numel() or not weights.numel():
        return to_value, to_locations, to_weights
    grad = grad.to(weights.dtype).reshape(-1, layout.channels)  # [B*Q*heads, C]
    matrix = layout.pad(value, weights.dtype)
    sizes = weights.new_tensor([(width, height) for height, width in levels])[:, None]
    places = to_locations.view(-1, *locations.shape[2:])
    parts = list(layout.samples(locations, weights))
    for samples in parts:
        products = _products(layout.taps(samples), matrix, grad, samples.queries)
        weight, fx, fy = _gradients_of_places(samples, products)
        to_weights.view(-1, *samples.base.shape[1:])[samples.queries] = weight
        shape = (-1, *locations.shape[2:5])
        torch.mul(torch.stack((fx.view(shape), fy.view(shape)), dim=-1), sizes, out=places[samples.queries])
    del matrix
    _add_to_values(to_value, layout, parts, grad)
    return to_value, to_locations, to_weights


def _products(taps: Tensor, matrix: Tensor, grad: Tensor, queries: slice) -> Tensor:
    """Return the dot product of every sampled row with the gradient of its query, in the shape of ``taps``."""
    heads, count = taps.shape[1], math.prod(taps.shape[2:])
    bag = torch.arange(taps.numel() // count, dtype=taps.dtype)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad.unflatten(0, (-1, heads))[queries].flatten(0, 1),
        matrix,
        taps.flatten(),
        bag * count,
        bag.repeat_interleave(count),
        0,
    )
    return products.view_as(taps)


def _gradients_of_places(samples: _Samples, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the attention weights, ``fx`` and ``fy``."""
    upper_left, upper_right, lower_left, lower_right = products.unbind(2)
    upper, lower = upper_right - upper_left, lower_right - lower_left
    above = torch.addcmul(upper_left, samples.fx, upper)
    down = torch.addcmul(lower_left, samples.fx, lower).sub_(above)
    across = lower.sub_(upper).mul_(samples.fy).add_(upper).mul_(samples.weight)
    return above.addcmul_(samples.fy, down), across, down.mul_(samples.weight)


def _add_to_values(out: Tensor, layout: _Layout, parts: Sequence[_Samples], grad: Tensor) -> None:
    """Add the gradients of the values, one corner of the samples after another."""
    base, order = torch.cat([samples.base.flatten() for samples in parts]).sort(stable=True)
    counts = torch.bincount(base, minlength=layout.rows)
    first = (counts.cumsum(0) - counts).to(layout.index)
    del base, counts
    fx, fy, weight = (
        torch.cat([getattr(samples, name).flatten() for samples in parts])[order] for name in ("fx", "fy", "weight")
    )
    rows = order.div_(parts[0].base.shape[2], rounding_mode="floor").to(layout.index)
    for corner, corner_weight in zip(CORNERS, _corner_weights(fx, fy, weight), strict=True):
        sums = F.embedding_bag(rows, grad, first, mode="sum", per_sample_weights=corner_weight)
        layout.add_shifted(out, sums, corner)
