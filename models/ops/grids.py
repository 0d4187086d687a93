"""Coordinate grids of deformable attention, in both published conventions.

A coordinate of -1 or +1 is the centre of a map's first or last pixel (align-corners convention).

* ``dat++`` (arXiv 2309.01430): reference points ``2 (i + 0.5) / (n - 1) - 1``, which pass +1 at the last row, and the
  query grid ``2 i / (n - 1) - 1``.
* ``cvpr22`` (arXiv 2201.00520): both are ``2 (i + 0.5) / n - 1``.

An axis of length one has the single coordinate 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kept import made_once

COORDINATES = ("dat++", "cvpr22")


def _steps(length: int, *, shift: float, inset: int) -> tuple[float, float]:
    """Return step and start of an axis whose coordinates are ``2 (i + shift) / (n - inset) - 1``."""
    step = 2 / (length - inset) if length > 1 else 0.0
    return step, shift * step - 1 if length > 1 else 0.0


def _plane(size: tuple[int, int], *, shift: float, inset: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``2 (i + shift) / (n - inset) - 1`` on both axes, shape ``[h, w, 2]``, (y, x)."""
    axes = []
    for length in size:
        steps = torch.arange(length, dtype=dtype, device=device)
        axes.append((steps + shift) * (2 / (length - inset)) - 1 if length > 1 else steps)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


@made_once
def reference_points(size: tuple[int, int], *, coordinates: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the undeformed sampling positions of a key grid, shape ``[h, w, 2]``, (y, x)."""
    return _plane(size, shift=0.5, inset=1 if coordinates == "dat++" else 0, dtype=dtype, device=device)


@made_once
def query_grid(size: tuple[int, int], *, coordinates: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the coordinates of a map's queries, shape ``[h, w, 2]``, (y, x)."""
    shift, inset = (0.0, 1) if coordinates == "dat++" else (0.5, 0)
    return _plane(size, shift=shift, inset=inset, dtype=dtype, device=device)


def query_steps(size: tuple[int, int], *, coordinates: str) -> list[float]:
    """Return the step and the start of `query_grid`, on the y axis, then on the x axis."""
    shift, inset = (0.0, 1) if coordinates == "dat++" else (0.5, 0)
    return [value for length in size for value in _steps(length, shift=shift, inset=inset)]
