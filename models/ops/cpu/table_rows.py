"""The table bias of deformable attention as weighted sums of rows, without a displacement per query and key.

Bilinear sampling of a table is separable in y and x, and the queries form a regular grid. Two methods use this. Each of
their passes computes weighted sums of the rows of a matrix with `F.embedding_bag`:

* `crop_bias`, if neighbouring queries are one cell of the table apart: the bias of a key is a weighted sum of four
  crops of the table, whose corners and weights depend only on the key.
* `separable_bias`, for any spacing: interpolates columns of the table for every query column, then rows for every query
  row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..caching import cached_tensors
from ..rows import neighbours, weighted_rows

WHOLE_CROP = 256  # largest map in pixels whose crops are stored as a whole; larger ones are stored row by row


def crop_bias(crops: Tensor, positions: Tensor, *, map_size: tuple[int, int]) -> Tensor:
    """Return the bias of queries that are one cell of the table apart, the first at (-1, -1).

    Args:
        crops: crops of the table, from `table_crops`.
        positions: key positions ``[B, g, Ns, 2]``, (y, x) in [-1, 1]; the heads of a group share them.
        map_size: ``(H, W)`` of the queries, the native size of the table.

    Returns:
        Bias ``[B, heads, Ns, H*W]``.
    """
    height, width = map_size
    batch, groups, keys, _ = positions.shape
    heads = len(crops) // (_crop_rows(map_size) * (width + 1))
    spans, taps = _crop_taps(heads, groups, map_size, positions.dtype, positions.device)
    cells = (1 - positions) * spans  # positions on the table of the first query's bias
    first = cells.detach().floor().nan_to_num(0.0)  # the weights of a NaN position are NaN anyway
    y, x = torch.stack((1 - (cells - first), cells - first), dim=-1).unbind(-2)
    weights = (y.unsqueeze(-1) * x.unsqueeze(-2)).view(batch, groups, 1, keys, *[1] * (taps.dim() - 4), 4)
    top, left = first.long().unbind(-1)
    taps = torch.add(left, top, alpha=width + 1).view(batch, groups, 1, keys, *[1] * (taps.dim() - 3)) + taps
    return weighted_rows(crops, taps, weights.expand_as(taps)).view(batch, heads, keys, height * width)


@cached_tensors
def _crop_taps(
    heads: int, groups: int, map_size: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the factor from ``1 - position`` to cells of the table, ``[2]``, and the taps for the first cell.

    The taps are the rows of `table_crops` for the cell and its three neighbours, ``[g, heads/g, 1, 4]``, or
    ``[g, heads/g, 1, H, 4]`` if crops are stored row by row.
    """
    height, width = map_size
    pitch = width + 1
    first = torch.arange(heads, device=device).view(groups, -1, 1, 1) * (_crop_rows(map_size) * pitch)
    if not _is_stored_whole(map_size):
        first = first.unsqueeze(-1) + torch.arange(height, device=device)[:, None] * pitch
    spans = torch.tensor([(height - 1) / 2, (width - 1) / 2], dtype=dtype, device=device)
    return spans, first + torch.tensor([0, 1, pitch, pitch + 1], device=device)


def _is_stored_whole(map_size: tuple[int, int]) -> bool:
    return map_size[0] * map_size[1] <= WHOLE_CROP


def _crop_rows(map_size: tuple[int, int]) -> int:
    """Return the number of rows of the table at which an entry of `table_crops` starts."""
    return map_size[0] + 1 if _is_stored_whole(map_size) else 2 * map_size[0]


def table_crops(table: Tensor, map_size: tuple[int, int]) -> Tensor:
    """Return all crops of a table ``[heads, 2*H-1, 2*W-1]`` as rows of a matrix, which `crop_bias` sums.

    A row of the matrix is a whole crop, ``[heads * (H+1) * (W+1), H*W]``, or on large maps, to save memory, one row of
    a crop, ``[heads * 2*H * (W+1), W]``. The table gets one more row and column of zeros, for taps of weight zero.
    """
    height, width = map_size
    crops = F.pad(table, (0, 1, 0, 1)).unfold(2, width, 1)  # [heads, 2*H, W+1, W]
    if _is_stored_whole(map_size):
        crops = crops.unfold(1, height, 1).transpose(-1, -2)  # [heads, H+1, W+1, H, W]
        return crops.reshape(-1, height * width)
    return crops.reshape(-1, width)


def separable_bias(columns: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Return the bias of queries at any spacing.

    Args:
        columns: columns of the table, from `table_columns`, ``[heads * (2*W0-1), 2*H0-1]``; zero outside.
        y: position on the rows of the table for every key and query row, ``[B, heads, Ns, H]``.
        x: position on the columns of the table for every key and query column, ``[B, heads, Ns, W]``.

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
    """Return the columns of a table ``[heads, 2*H0-1, 2*W0-1]`` as rows of a matrix, for `separable_bias`.

    Returns:
        ``[heads * (2*W0-1), 2*H0-1]``.
    """
    return table.transpose(1, 2).reshape(-1, table.shape[1])
