"""The table bias of deformable attention as weighted sums of rows, without a displacement per query and key.

Sampling a table bilinearly is separable in y and x, and the queries lie on a regular grid. Both ways that follow from
it take the table coordinates of the queries; each of their passes is an `embedding_bag`, weighted sums of matrix rows:

* `crop_bias`, where neighbouring queries are one cell of the table apart: the bias of a key is a blend of four crops of
  the table, whose corners and weights depend on the key alone.
* `separable_bias`, for any spacing: blend columns of the table for every query column, then rows for every query row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rows import cell, neighbours, weighted_rows

WHOLE_CROP = 256  # pixels of the largest map whose crops are stored whole; larger ones are stored by row


def crop_bias(crops: Tensor, y: Tensor, x: Tensor, *, map_size: tuple[int, int]) -> Tensor:
    """Return the bias of queries that are one cell of the table apart.

    Args:
        crops: of the table, from `table_crops`.
        y: row of the table, ``[B, heads, Ns]``, that the first query row of every key falls on, between 0 and H - 1.
        x: column of the table, ``[B, heads, Ns]``, that the first query column falls on, between 0 and W - 1.
        map_size: ``(H, W)`` of the queries and of the map that the table was made for.

    Returns:
        Bias ``[B, heads, Ns, H*W]``.
    """
    height, width = map_size
    top, left = cell(y, height), cell(x, width)
    down, right = y - top, x - left
    up, back = 1 - down, 1 - right
    weights = torch.stack((up * back, up * right, down * back, down * right), dim=-1)  # [B, heads, Ns, 4]

    head = torch.arange(y.shape[1], device=y.device)[:, None]
    whole = height * width <= WHOLE_CROP
    rows = height + 1 if whole else 2 * height
    corner = ((head * rows + top.long()) * (width + 1) + left.long()).unsqueeze(-1)
    step = torch.arange(2, device=y.device)
    taps = corner + (step[:, None] * (width + 1) + step).flatten()
    if not whole:
        taps = taps.unsqueeze(-2) + torch.arange(height, device=y.device)[:, None] * (width + 1)  # [B, heads, Ns, H, 4]
        weights = weights.unsqueeze(-2).expand_as(taps)
    return weighted_rows(crops, taps, weights).flatten(3).view(*y.shape, height * width)


def table_crops(table: Tensor, map_size: tuple[int, int]) -> Tensor:
    """Return what `crop_bias` adds up: every crop of a table ``[heads, 2*H-1, 2*W-1]``, as rows of a matrix.

    A row of the matrix is a whole crop, ``[heads * (H+1) * (W+1), H*W]``, or on large maps, where those would be many,
    one row of a crop, ``[heads * 2*H * (W+1), W]``. A zero row and column follow the table, for taps of weight zero.
    """
    height, width = map_size
    crops = F.pad(table, (0, 1, 0, 1)).unfold(2, width, 1)  # [heads, 2*H, W+1, W]
    if height * width <= WHOLE_CROP:
        crops = crops.unfold(1, height, 1).transpose(-1, -2)  # [heads, H+1, W+1, H, W]
        return crops.reshape(-1, height * width)
    return crops.reshape(-1, width)


def separable_bias(columns: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Return the bias of queries at any spacing.

    Args:
        columns: of the table, from `table_columns`, ``[heads * (2*W0-1), 2*H0-1]``; zero outside.
        y: row of the table, ``[B, heads, Ns, H]``, for every key and query row.
        x: column of the table, ``[B, heads, Ns, W]``, for every key and query column.

    Returns:
        Bias ``[B, heads, Ns, H*W]``.
    """
    heads, height = y.shape[1], columns.shape[1]
    width = len(columns) // heads
    head = torch.arange(heads, device=y.device)[:, None, None, None]
    taps, weights = neighbours(x, width)
    blend = weighted_rows(columns, taps + head * width, weights)  # [B, heads, Ns, W, 2*H0-1]
    taps, weights = neighbours(y, height)
    key = torch.arange(y[..., 0].numel(), device=y.device).view(*y.shape[:3], 1, 1)
    bias = weighted_rows(blend.transpose(-1, -2).reshape(-1, x.shape[-1]), taps + key * height, weights)
    return bias.flatten(3)  # [B, heads, Ns, H, W] -> [B, heads, Ns, H*W]


def table_columns(table: Tensor) -> Tensor:
    """Return what `separable_bias` blends: the columns of a table ``[heads, 2*H0-1, 2*W0-1]`` as rows of a matrix.

    Returns:
        ``[heads * (2*W0-1), 2*H0-1]``.
    """
    return table.transpose(1, 2).reshape(-1, table.shape[1])
