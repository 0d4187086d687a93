"""Bilinear sampling of a map at one set of positions per channel group."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sample(x: Tensor, positions: Tensor) -> Tensor:
    """Sample every channel group of a map at that group's positions.

    Args:
        x: map ``[B, H, W, C]``.
        positions: ``[B, g, Ns, 2]``, (y, x), -1 and +1 being the centres of the corner pixels; at least float32.

    Returns:
        Samples ``[B, Ns, C]`` in the dtype of ``x``; what lies outside the map counts as zero.
    """
    batch, groups = positions.shape[:2]
    maps = x.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)  # [B*g, C/g, H, W]
    grid = positions.flip(-1).flatten(0, 1).unsqueeze(1)  # [B*g, 1, Ns, (x, y)]
    samples = F.grid_sample(maps.to(grid.dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return samples.to(x.dtype).reshape(batch, x.shape[-1], -1).transpose(1, 2)
