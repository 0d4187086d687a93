"""Bilinear sampling of a map at one set of positions per channel group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gpu
from .forms import check_form, needs_plain_operations
from .rows import neighbours, weighted_rows

FORMS = ("auto", "reference", "rows", "triton")


def sample(x: Tensor, positions: Tensor, *, form: str = "auto") -> Tensor:
    """Sample every channel group of a map at that group's positions.

    Args:
        x: map ``[B, H, W, C]``.
        positions: ``[B, g, Ns, 2]``, (y, x), at least float32; -1 and +1 are the centres of the corner pixels.
        form: ``reference`` is `F.grid_sample`, which needs a copy of the map with the channels first and saves it for
            the backward pass; ``rows`` sums the four pixels around every position; ``triton`` is a GPU kernel.
            ``auto`` uses `choose_form`.

    Returns:
        Samples ``[B, Ns, C]`` in the dtype of ``x``; zero outside the map.

    Raises:
        ValueError: the form is unknown or does not support the arguments.
    """
    check_form(form, FORMS, "sampling")
    if form == "triton" and not gpu.suits(x):
        raise ValueError("form 'triton' of sampling needs a GPU and at most float32; choose auto")
    if form == "auto":
        form = choose_form(x)
    if form == "triton":
        from .gpu.sampling import sample as sample_on_gpu

        return sample_on_gpu(x.contiguous(), positions.float().contiguous())
    if form == "rows":
        return _sample_rows(x, positions)
    batch, groups = positions.shape[:2]
    maps = x.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)  # [B*g, C/g, H, W]
    grid = positions.flip(-1).flatten(0, 1).unsqueeze(1)  # [B*g, 1, Ns, (x, y)]
    samples = F.grid_sample(maps.to(grid.dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return samples.to(x.dtype).reshape(batch, x.shape[-1], positions.shape[2]).transpose(1, 2)


def choose_form(x: Tensor) -> str:
    """Return the form that `sample` uses for ``auto``."""
    if x.is_cuda and gpu.suits(x):
        return "triton"
    if x.device.type != "cpu" or needs_plain_operations():
        return "reference"
    if len(x) == 1:  # `rows` has more overhead, and for a single image there is nothing to copy
        return "reference"
    return "rows"


def _sample_rows(x: Tensor, positions: Tensor) -> Tensor:
    batch, height, width, channels = x.shape
    groups = positions.shape[1]
    (rows, row_weights), (columns, column_weights) = (
        neighbours(axis * ((length - 1) / 2), length)
        for axis, length in zip((positions + 1).unbind(-1), (height, width), strict=True)
    )
    image = torch.arange(batch, device=x.device).view(-1, 1, 1, 1, 1)
    group = torch.arange(groups, device=x.device).view(-1, 1, 1, 1)
    taps = ((image * height + rows.unsqueeze(-1)) * width + columns.unsqueeze(-2)) * groups + group  # [B, g, Ns, 2, 2]
    weights = row_weights.unsqueeze(-1) * column_weights.unsqueeze(-2)
    pixels = x.to(weights.dtype).reshape(batch * height * width * groups, channels // groups)
    samples = weighted_rows(pixels, taps.flatten(3), weights.flatten(3))  # [B, g, Ns, C/g]
    return samples.to(x.dtype).transpose(1, 2).flatten(2)
