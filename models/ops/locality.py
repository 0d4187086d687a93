"""Windows around the patches of a grid: masks, and sums over windows in linear time.

Tokens are the prefix tokens, which attend to all tokens and are visible to all, and then the patches, row by row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("sequence", "box")


class Window(NamedTuple):
    """The patches visible to a patch: those within a distance.

    Attributes:
        kind: ``sequence`` measures the distance in the order of the tokens, ``box`` in rows and columns of the grid.
        reach: largest visible distance in patches.
    """

    kind: str
    reach: int


def window_mask(grid: tuple[int, int], prefix: int, window: Window, *, device: torch.device | None = None) -> Tensor:
    """Return a mask of the keys visible to each query, bool ``[prefix + H*W, prefix + H*W]``."""
    token = torch.arange(grid[0] * grid[1], device=device)
    places = torch.stack((token // grid[1], token % grid[1]) if window.kind == "box" else (token,))
    near = ((places[:, :, None] - places[:, None]).abs() <= window.reach).all(dim=0)
    return F.pad(near, (prefix, 0, prefix, 0), value=True)


def range_sum(x: Tensor, low: int, high: int, dim: int) -> Tensor:
    """Return, for every i of an axis of a tensor of any shape, the sum of all ``x[j]`` with ``low <= i - j <= high``.

    The axis is split into blocks as long as the range, so every range is the end of one block and the beginning of the
    next: the sum of two running sums, whatever the length of the range. Nothing is subtracted, so sums of positive
    numbers keep their relative precision, unlike differences of one long running sum.
    """
    n = x.shape[dim]
    low, high = max(low, 1 - n), min(high, n - 1)
    if low > high:
        return torch.zeros_like(x)
    if (low, high) == (1 - n, n - 1):
        return x.sum(dim, keepdim=True).expand_as(x)
    length = high - low + 1
    x = x.movedim(dim, 0)
    blocks = math.ceil((n + length - 1) / length)
    x = F.pad(x, (0, 0) * (x.dim() - 1) + (high, blocks * length - n - high))  # a negative padding crops
    if length == 1:
        return x.movedim(0, dim)
    x = x.unflatten(0, (blocks, length))
    until, since = x.cumsum(1).flatten(0, 1), x.flip(1).cumsum(1).flip(1).flatten(0, 1)
    starts_inside = (torch.arange(n, device=x.device) % length > 0).view(-1, *(1,) * (until.dim() - 1))
    return (until[length - 1 : length - 1 + n] + since[:n] * starts_inside).movedim(0, dim)


def window_sum(x: Tensor, grid: tuple[int, int], window: Window, dim: int) -> Tensor:
    """Return the sum over the window of every patch for a tensor of any shape, whose axis ``dim`` holds the patches."""
    if window.kind == "sequence":
        return range_sum(x, -window.reach, window.reach, dim)
    x = x.unflatten(dim, grid)
    for axis in (dim, dim + 1):
        x = range_sum(x, -window.reach, window.reach, axis)
    return x.flatten(dim, dim + 1)
