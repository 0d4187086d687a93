"""Resizing position tables to other image or window sizes.

A mixer's `position_tables` returns the resize function of each of its tables. The function takes the table and the
target shape, and returns a table of that shape, or of a different shape if this is not possible.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

Resize = Callable[[Tensor, torch.Size], Tensor]


def between_corners(table: Tensor, shape: torch.Size) -> Tensor:
    """Resize a table ``[heads, 2*H-1, 2*W-1]`` that is sampled from corner to corner, whatever the map.

    Interpolating between its corner centres preserves the function.
    """
    if table.shape[1] % 2 == 0 or table.shape[2] % 2 == 0:  # one value per query and key
        return table
    return _bicubic(table, shape[1:], align_corners=True)


def by_cells(table: Tensor, shape: torch.Size) -> Tensor:
    """Resize a table ``[heads, rows, columns]`` of one value per displacement."""
    return _bicubic(table, shape[1:])


def square_along(axis: int) -> Resize:
    """Return the function that resizes a table whose ``axis`` lists the cells of a square."""

    def resize(table: Tensor, shape: torch.Size) -> Tensor:
        side = isqrt(shape[axis])
        return _resize_axis(table, axis, (side, side))

    return resize


def per_query_and_key(queries: tuple[int, int], keys: tuple[int, int]) -> Resize:
    """Return the function that resizes ``[heads, H*W, Hk*Wk]`` to these grids of queries and keys."""

    def resize(table: Tensor, shape: torch.Size) -> Tensor:  # noqa: ARG001
        return _resize_axis(_resize_axis(table, 1, queries), 2, keys)

    return resize


def _resize_axis(table: Tensor, axis: int, grid: tuple[int, int]) -> Tensor:
    """Resize a grid flattened along an axis, from a square or else from a grid of the same aspect ratio.

    An axis that is neither is left unchanged.
    """
    cells = table.shape[axis]
    height = isqrt(cells)
    if height**2 != cells:
        height = isqrt(cells * grid[0] // grid[1])
    if height == 0 or cells % height or (height, cells // height) == grid:
        return table
    grids = table.movedim(axis, -1).unflatten(-1, (height, cells // height))
    return _bicubic(grids, grid).flatten(-2).movedim(-1, axis)


def _bicubic(grids: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Resize the last two axes, aligned at the edges of the corner cells or, with `align_corners`, at their centres."""
    flat = grids.reshape(1, -1, *grids.shape[-2:]).float()
    resized = F.interpolate(flat, tuple(size), mode="bicubic", align_corners=align_corners)
    return resized.reshape(*grids.shape[:-2], *size).to(grids.dtype)
