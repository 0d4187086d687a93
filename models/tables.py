"""Resizing position tables to other image or window sizes.

A mixer's method ``position_tables`` returns a resize function for each of its tables. The function takes a table and a
target shape, and returns the resized table, or a table of another shape if resizing is not possible.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

Resize = Callable[[Tensor, torch.Size], Tensor]


def between_corners(table: Tensor, shape: torch.Size) -> Tensor:
    """Resize a table ``[heads, 2*H-1, 2*W-1]`` that is sampled at positions relative to its corners.

    The corners stay aligned, so the resized table represents the same function of position. A table with a value per
    query and key, which ``fixed_pes`` stores under the same name, is recognised by an even side and returned unchanged;
    with two odd sides, as for a 7 x 7 map, it cannot be told apart and is resized like the others.
    """
    if table.shape[1] % 2 == 0 or table.shape[2] % 2 == 0:
        return table
    return _bicubic(table, shape[1:], align_corners=True)


def by_cells(table: Tensor, shape: torch.Size) -> Tensor:
    """Resize a table ``[heads, rows, columns]`` with one value per displacement in pixels."""
    return _bicubic(table, shape[1:])


def square_along(axis: int) -> Resize:
    """Return the function that resizes a table whose ``axis`` is a flattened square."""

    def resize(table: Tensor, shape: torch.Size) -> Tensor:
        side = isqrt(shape[axis])
        return _resize_axis(table, axis, (side, side))

    return resize


def per_query_and_key(
    queries: tuple[int, int], keys: tuple[int, int], *, stored: tuple[tuple[int, int] | None, ...] = (None, None)
) -> Resize:
    """Return the function that resizes a table ``[heads, H*W, Hk*Wk]`` to other grids of queries and keys.

    Args:
        queries: height and width of the map of queries.
        keys: height and width of the grid of keys.
        stored: the same two of the table; None if unknown.
    """

    def resize(table: Tensor, shape: torch.Size) -> Tensor:  # noqa: ARG001
        return _resize_axis(_resize_axis(table, 1, queries, stored[0]), 2, keys, stored[1])

    return resize


def _resize_axis(table: Tensor, axis: int, grid: tuple[int, int], stored: tuple[int, int] | None = None) -> Tensor:
    """Resize a grid that is flattened along an axis; other axes are not changed.

    If the ``stored`` grid is unknown, it is taken for a square, or else for one with the aspect ratio of the new grid.
    """
    cells = table.shape[axis]
    height = stored[0] if stored else isqrt(cells)
    if height**2 != cells and not stored:
        height = isqrt(cells * grid[0] // grid[1])
    if height == 0 or cells % height or (height, cells // height) == grid:
        return table
    grids = table.movedim(axis, -1).unflatten(-1, (height, cells // height))
    return _bicubic(grids, grid).flatten(-2).movedim(-1, axis)


def _bicubic(grids: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Resize the last two axes, in float32, and return the dtype of the input."""
    flat = grids.reshape(1, -1, *grids.shape[-2:]).float()
    resized = F.interpolate(flat, tuple(size), mode="bicubic", align_corners=align_corners)
    return resized.reshape(*grids.shape[:-2], *size).to(grids.dtype)
