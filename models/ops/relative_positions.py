"""Relative positions on a grid, in buckets that grow with the distance, as in DeBERTa (arXiv 2006.03654)."""

from __future__ import annotations

import math
from itertools import groupby, product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .caching import cached_tensors, under_modes


class Relation(NamedTuple):
    """Pairs of patches i and j with the same relative position: ``low <= i - j <= high`` on both axes.

    Attributes:
        index: row of the table.
        opposite: row of the opposite relative position.
        low: smallest displacement, (y, x).
        high: largest displacement, (y, x).
    """

    index: int
    opposite: int
    low: tuple[int, int]
    high: tuple[int, int]


class Buckets:
    """Buckets of the displacements of a grid.

    On each side of an axis, displacements up to ``span`` have a bucket each, those up to ``farthest`` share
    ``span - 1`` buckets on a logarithmic scale, and larger ones use the last bucket. The table has a row for each pair
    of buckets (y, x), and three more for the prefix tokens: prefix to patch, patch to prefix, and prefix to prefix.

    Args:
        span: largest displacement with its own bucket; at least 1.
        farthest: where the last bucket begins.
    """

    def __init__(self, span: int, farthest: int) -> None:
        self.span, self.farthest = span, max(farthest, span)
        self.last = self.of(self.farthest)
        self.side = 2 * self.last + 1
        self.rows = self.side**2 + 3

    def of(self, displacement: int) -> int:
        """Return the bucket of a displacement on one axis, from ``-last`` to ``last``."""
        distance = min(abs(displacement), self.farthest)
        if distance > self.span:
            share = math.log(distance / self.span) / math.log(self.farthest / self.span)
            distance = self.span + math.ceil(share * (self.span - 1) - 1e-9)
        return distance if displacement >= 0 else -distance

    def relations(self, grid: tuple[int, int]) -> list[Relation]:
        """Return all relative positions of the patches of a grid."""
        axes = []
        for length in grid:
            runs = groupby(range(1 - length, length), key=self.of)
            axes.append([(bucket, min(run), max(run)) for bucket, run in ((b, list(r)) for b, r in runs)])
        return [
            Relation(self._row(y, x), self._row(-y, -x), (y_low, x_low), (y_high, x_high))
            for (y, y_low, y_high), (x, x_low, x_high) in product(*axes)
        ]

    def _row(self, y: int, x: int) -> int:
        return (y + self.last) * self.side + x + self.last


@cached_tensors
@torch.compiler.assume_constant_result  # otherwise the graph would copy these lists to the device in every step
def table_index(span: int, farthest: int, grid: tuple[int, int], prefix: int, device: torch.device) -> Tensor:
    """Return the row of the table of `Buckets` for every query and key, int64 ``[N, N]``.

    Args:
        span: see `Buckets`.
        farthest: see `Buckets`.
        grid: number of rows and columns of patches.
        prefix: number of tokens before the patches.
        device: device of the index.
    """
    buckets = Buckets(span, farthest)
    with _disable_current_modes():  # an exported graph holds the index itself, not how it is computed
        y, x = (
            torch.tensor([[buckets.of(i - j) for j in range(length)] for i in range(length)]) + buckets.last
            for length in grid
        )
        patches = (y[:, None, :, None] * buckets.side + x[:, None, :]).reshape(grid[0] * grid[1], -1)
        index = torch.full((prefix + len(patches),) * 2, buckets.rows - 1)
        index[:prefix, prefix:], index[prefix:, :prefix] = buckets.rows - 3, buckets.rows - 2
        index[prefix:, prefix:] = patches
    return under_modes(index, device)
