"""Multi-scale deformable attention over the patches of a Vision Transformer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.caching import cached_tensors
from ..ops.locality import Window
from ..ops.precision import at_least_float32
from .ms_deform_attn import MSDeformAttn
from .tokens import check_unmasked


class PatchDeformableAttention(MSDeformAttn):
    """Every token attends to a few points of the grid of patches, and of smaller grids that are average-pooled from it.

    The reference point of a patch is its own position, that of a prefix token the centre of the grid. Prefix tokens are
    not attended to.

    Args:
        dim: channels.
        heads: attention heads; divides ``dim``.
        grid: number of rows and columns of patches.
        prefix: number of tokens before the patches.
        points: points per head and grid.
        scales: number of grids, each half as high and wide as the one before, rounded up.
        proj_drop: dropout rate of the output.

    Attributes:
        window: window of a patch, or None for the whole grid. The points of a patch are clamped to its window and lie
            only on the finest grid. A window of the kind ``sequence`` is replaced by the highest rectangle around the
            patch whose patches are all within reach.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        grid: tuple[int, int],
        prefix: int,
        points: int = 4,
        scales: int = 1,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(dim, scales, heads, points)
        self.grid, self.prefix = grid, prefix
        self.window: Window | None = None
        self.shapes = [tuple(-(-length // 2**scale) for length in grid) for scale in range(scales)]
        self.starts = [0, *accumulate(height * width for height, width in self.shapes)][:-1]
        self.proj_drop = nn.Dropout(proj_drop)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing; other attentions prepare for an epoch here."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens ``[B, N, C]`` to the same shape.

        Raises:
            ValueError: timm's blocks pass a mask, which only timm's own attention supports.
        """
        check_unmasked(attn_mask, is_causal=is_causal)
        places = token_places(self.grid, self.prefix, dtype=at_least_float32(x.dtype), device=x.device)
        reference = places[:, None].expand(x.shape[0], -1, self.n_levels, -1)
        return self.proj_drop(super().forward(x, reference, self._pyramid(x), self.shapes, self.starts))

    def _pyramid(self, x: Tensor) -> Tensor:
        """Return the pixels of all grids, flattened and concatenated, ``[B, S, C]``."""
        patches = x[:, self.prefix :]
        if self.n_levels == 1:
            return patches
        finest = patches.mT.unflatten(-1, self.grid)
        grids = [finest, *(F.adaptive_avg_pool2d(finest, shape) for shape in self.shapes[1:])]
        return torch.cat([grid.flatten(2).mT for grid in grids], dim=1)

    def sampling_locations(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: Sequence[Sequence[int]]
    ) -> Tensor:
        locations = super().sampling_locations(query, reference_points, spatial_shapes)
        if self.window is None:
            return locations
        of_prefix, of_patches = locations.split((self.prefix, query.shape[1] - self.prefix), dim=1)
        rows, columns = self._reach(self.window)
        reach = locations.new_tensor([columns / self.grid[1], rows / self.grid[0]])
        centre = reference_points[:, self.prefix :, None, :, None].to(locations.dtype)
        return torch.cat((of_prefix, centre + torch.clamp(of_patches - centre, -reach, reach)), dim=1)

    def sampling_logits(self, query: Tensor) -> Tensor:
        logits = super().sampling_logits(query)
        if self.window is None or self.n_levels == 1:
            return logits
        coarse = torch.arange(self.n_levels, device=query.device)[:, None] > 0
        patch = (torch.arange(query.shape[1], device=query.device) >= self.prefix)[:, None, None, None]
        return logits.masked_fill(patch & coarse, float("-inf"))

    def _reach(self, window: Window) -> tuple[int, int]:
        """Return the reach of a window in rows and columns."""
        if window.kind == "box":
            return window.reach, window.reach
        rows = window.reach // self.grid[1]
        return rows, window.reach - rows * self.grid[1]


@cached_tensors
def token_places(grid: tuple[int, int], prefix: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the place of every token, (x, y) from 0 to 1, ``[N, 2]``: of prefix tokens, the centre of the grid."""
    y, x = ((torch.arange(length, dtype=dtype, device=device) + 0.5) / length for length in grid)
    patches = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).flatten(0, 1)
    return torch.cat((torch.full((prefix, 2), 0.5, dtype=dtype, device=device), patches))
