"""Coordinate grids of deformable attention, in both published conventions.

A coordinate of -1 or +1 is the centre of a map's first or last pixel (``align_corners=True`` of `F.grid_sample`).

* ``dat++`` (arXiv 2309.01430): reference points ``2 (i + 0.5) / (n - 1) - 1``, the last of which exceeds +1, and the
  query grid ``2 i / (n - 1) - 1``.
* ``cvpr22`` (arXiv 2201.00520): both are ``2 (i + 0.5) / n - 1``.

An axis of length one has the single coordinate 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .caching import cached_tensors

# Shift and inset of the coordinates ``2 (i + shift) / (n - inset) - 1`` of each convention.
_REFERENCE_POINTS = {"dat++": (0.5, 1), "cvpr22": (0.5, 0)}
_QUERIES = {"dat++": (0.0, 1), "cvpr22": (0.5, 0)}
COORDINATES = tuple(_QUERIES)


@cached_tensors
def reference_points(size: tuple[int, int], *, coordinates: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the sampling positions of a key grid without offsets, shape ``[h, w, 2]``, (y, x)."""
    return _grid(size, *_REFERENCE_POINTS[coordinates], dtype=dtype, device=device)


@cached_tensors
def query_grid(size: tuple[int, int], *, coordinates: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the coordinates of a map's queries, shape ``[h, w, 2]``, (y, x)."""
    return _grid(size, *_QUERIES[coordinates], dtype=dtype, device=device)


def query_steps(size: tuple[int, int], *, coordinates: str) -> list[float]:
    """Return step and start of the `query_grid` along y, then along x."""
    shift, inset = _QUERIES[coordinates]
    numbers = []
    for length in size:
        step = 2 / (length - inset) if length > 1 else 0.0
        numbers += [step, shift * step - 1 if length > 1 else 0.0]
    return numbers


def _grid(size: tuple[int, int], shift: float, inset: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    axes = []
    for length in size:
        index = torch.arange(length, dtype=dtype, device=device)
        axes.append((index + shift) * (2 / (length - inset)) - 1 if length > 1 else index)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
