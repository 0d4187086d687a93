"""Linear sampling of sequences, images and volumes at arbitrary positions.

A position of -1 or +1 is the outer edge of an axis (``align_corners=False`` of `F.grid_sample`): the centre of cell i
of n lies at ``(2 i + 1) / n - 1``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cell_grid(size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the indices of every cell, ``[len(size), *size]``, in the order of the axes."""
    steps = [torch.arange(length, dtype=dtype, device=device) for length in size]
    return torch.stack(torch.meshgrid(*steps, indexing="ij"))


def sample_points(x: Tensor, positions: Tensor) -> Tensor:
    """Sample a map with one, two or three axes.

    Args:
        x: ``[B, C, *size]``.
        positions: ``[B, *points, len(size)]``, at least float32, with as many axes of points as the map has. As in
            `F.grid_sample`, the first coordinate belongs to the last axis of the map.

    Returns:
        Samples ``[B, C, *points]`` in the dtype of ``x``; values outside the map are zero.
    """
    sequence = x.dim() == 3
    if sequence:  # as an image one pixel wide, sampled at the centre of that pixel
        x, positions = x.unsqueeze(-1), F.pad(positions, (1, 0)).unsqueeze(2)
    samples = F.grid_sample(x.to(positions.dtype), positions, padding_mode="zeros", align_corners=False).to(x.dtype)
    return samples.squeeze(-1) if sequence else samples
