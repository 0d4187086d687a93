"""Position biases of deformable attention: terms added to the logits, shape ``[B or 1, heads, queries, keys]``."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def displacements(grid: Tensor, positions: Tensor) -> Tensor:
    """Return query minus key, ``[B, g, h*w, Ns, 2]``, for a ``grid [h, w, 2]`` and ``positions [B, g, Ns, 2]``."""
    return grid.flatten(0, 1)[:, None] - positions[:, :, None]


def table_bias(table: Tensor, grid: Tensor, positions: Tensor) -> Tensor:
    """Sample a table of relative position biases at (query - position) / 2 (DAT, section 3.2).

    Args:
        table: ``[heads, 2*H0-1, 2*W0-1]`` for a map of native size H0 x W0.
        grid: query coordinates ``[h, w, 2]``.
        positions: key positions ``[B, g, Ns, 2]``; the heads of a group share them.

    Returns:
        Bias ``[B, heads, h*w, Ns]``, zero for displacements beyond the table.
    """
    batch, groups = positions.shape[:2]
    shift = (displacements(grid, positions) / 2).flip(-1).flatten(0, 1)  # [B*g, h*w, Ns, (x, y)]
    tables = table.to(shift.dtype).unflatten(0, (groups, -1)).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    bias = F.grid_sample(tables, shift, mode="bilinear", padding_mode="zeros", align_corners=True)
    return bias.unflatten(0, (batch, groups)).flatten(1, 2)


def log_continuous_bias(network: Callable[[Tensor], Tensor], grid: Tensor, positions: Tensor) -> Tensor:
    """Return a small network's bias for log-spaced displacements (Swin V2, arXiv 2111.09883, section 3.3).

    Args:
        network: maps displacements ``[..., 2]`` to the biases ``[..., heads / g]`` of one group; shared by the groups.
        grid: query coordinates ``[h, w, 2]``.
        positions: key positions ``[B, g, Ns, 2]``.

    Returns:
        Bias ``[B, heads, h*w, Ns]``.
    """
    shift = 4 * displacements(grid, positions)
    shift = torch.sign(shift) * torch.log2(shift.abs() + 1) / math.log2(8)
    return network(shift).permute(0, 1, 4, 2, 3).flatten(1, 2)  # from [B, g, h*w, Ns, heads/g]


def fixed_bias(
    table: Tensor,
    *,
    native: tuple[tuple[int, int], tuple[int, int]],
    size: tuple[tuple[int, int], tuple[int, int]],
) -> Tensor:
    """Return one bias per query and key, resized bilinearly if the map does not have the native size.

    Args:
        table: ``[heads, H0*W0, Hk0*Wk0]``.
        native: sizes of the query and key grids of the table, ``((H0, W0), (Hk0, Wk0))``.
        size: sizes of the current query and key grids, ``((h, w), (hk, wk))``.

    Returns:
        Bias ``[1, heads, h*w, hk*wk]``.
    """
    (query0, key0), (query, key) = native, size
    if query != query0:
        columns = table.transpose(1, 2).unflatten(2, query0)
        table = F.interpolate(columns, query, mode="bilinear").flatten(2).transpose(1, 2)
    if key != key0:
        table = F.interpolate(table.unflatten(2, key0), key, mode="bilinear").flatten(2)
    return table.unsqueeze(0)
