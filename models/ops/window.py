"""Window partitions of a map and their attention masks (Swin, arXiv 2103.14030, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def partition(x: Tensor, window: int) -> Tensor:
    """Split ``[B, H, W, C]`` into windows ``[B*nh*nw, window*window, C]``; H and W are multiples of the window."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(-1, window * window, channels)


def merge(windows: Tensor, window: int, size: tuple[int, int]) -> Tensor:
    """Reassemble windows ``[B*nh*nw, window*window, C]`` into a map ``[B, H, W, C]`` of the given ``(H, W)``."""
    height, width = size
    x = windows.reshape(-1, height // window, width // window, window, window, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


def relative_position_index(window: int) -> Tensor:
    """Return the row of the bias table for every query and key of a window, ``[window*window, window*window]``."""
    axis = torch.arange(window)
    cells = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).flatten(0, 1)  # [w*w, 2]
    offset = cells[:, None] - cells[None] + window - 1
    return offset[..., 0] * (2 * window - 1) + offset[..., 1]


def shift_mask(size: tuple[int, int], window: int, shift: int, device: torch.device | None = None) -> Tensor:
    """Return a mask of -100 for pixel pairs that share a window only because of the roll, ``[windows, w*w, w*w]``.

    Args:
        size: height and width of the rolled map, multiples of the window.
        window: side of the window.
        shift: number of rows and columns by which the map is rolled.
        device: device of the mask.
    """

    def bands(length: int) -> Tensor:
        position = torch.arange(length, device=device)
        return (position >= length - window).long() + (position >= length - shift).long()

    height, width = size
    region = 3 * bands(height)[:, None] + bands(width)
    region = partition(region[None, :, :, None], window).squeeze(-1)  # [windows, w*w]
    return (region[:, :, None] != region[:, None, :]).float() * -100.0


def padding_mask(
    size: tuple[int, int], padded: tuple[int, int], window: int, shift: int, device: torch.device
) -> Tensor:
    """Return a mask of minus infinity for pixels of the map attending to padding, ``[windows, w*w, w*w]``.

    Padding may attend to everything: its rows are cropped afterwards, and the softmax of only minus infinities is NaN.

    Args:
        size: height and width of the map.
        padded: its size after padding on the right and bottom, multiples of the window.
        window: side of the window.
        shift: number of rows and columns by which the padded map is rolled.
        device: device of the mask.
    """
    real = torch.zeros(padded, dtype=torch.bool, device=device)
    real[: size[0], : size[1]] = True
    real = partition(real.roll((-shift, -shift), (0, 1))[None, :, :, None], window).squeeze(-1)  # [windows, w*w]
    forbidden = real[:, :, None] & ~real[:, None, :]
    return torch.zeros(forbidden.shape, device=device).masked_fill(forbidden, float("-inf"))
