"""Feature pyramids, anchors and pooling of regions over torchvision's, with the arithmetic of mmdetection 2.

torchvision rounds anchors to integers, derives strides from sizes, and pools with a half-pixel offset; weights trained
without this would lose accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool


class Pyramid(nn.Module):
    """A feature pyramid (Lin et al., arXiv 1612.03144) with coarser maps on top.

    Args:
        channels: of the backbone's maps.
        strides: of the backbone's maps.
        width: channels of every map of the pyramid.
        convolved: two more maps, each a convolution of the previous one, as in RetinaNet; otherwise one, the last map
            subsampled by 2.

    Attributes:
        strides: of its maps.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], *, width: int, convolved: bool) -> None:
        super().__init__()
        more = _Convolutions(channels[-1], width) if convolved else LastLevelMaxPool()
        self.fpn = FeaturePyramidNetwork(list(channels), width, extra_blocks=more)
        self.strides = [*strides, *(strides[-1] << level for level in range(1, 3 if convolved else 2))]

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return maps `[b, width, h, w]` by name, finest first."""
        return self.fpn({str(level): x for level, x in enumerate(maps)})


class _Convolutions(ExtraFPNBlock):
    """Two coarser maps from the last map of the backbone, without an activation between them."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        for module in (self.p6, self.p7):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(x[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


class Anchors(AnchorGenerator):
    """Anchors of exact sizes at exact strides.

    Args:
        strides: of the maps.
        scales: side of a square anchor, as multiples of the stride.
        ratios: height / width.
    """

    def __init__(
        self, strides: Sequence[int], *, scales: Sequence[float], ratios: Sequence[float] = (0.5, 1.0, 2.0)
    ) -> None:
        self.strides = strides
        sizes = tuple(tuple(stride * scale for scale in scales) for stride in strides)
        super().__init__(sizes, (tuple(ratios),) * len(strides))

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - as the method that it replaces
    ) -> Tensor:
        """Return `[len(aspect_ratios) * len(scales), 4]` around the origin, not rounded."""
        sizes = torch.tensor(scales, dtype=dtype, device=device)
        roots = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        widths, heights = (sizes / roots).flatten(), (sizes * roots).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors `[n, 4]` of all maps for each image; those of one pixel are consecutive."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        strides = [[torch.tensor(stride, device=feature_maps[0].device)] * 2 for stride in self.strides]
        anchors = self.grid_anchors([list(x.shape[-2:]) for x in feature_maps], strides)
        return [torch.cat(anchors)] * len(image_list.image_sizes)


class AlignedPool(nn.Module):
    """RoIAlign without an offset (He et al., arXiv 1703.06870), from the level that matches the size of each region.

    Args:
        size: side of the result.
        strides: of the maps to pool from; others are not used.
    """

    def __init__(self, size: int, strides: Sequence[int]) -> None:
        super().__init__()
        self._size = size
        self._strides = tuple(strides)
        # Side from which on a region is pooled from the second map: 112 for strides from 4 on.
        self._second = 28 * strides[0]

    def forward(self, maps: dict[str, Tensor], boxes: Sequence[Tensor], _image_sizes: object = None) -> Tensor:
        """Return `[regions, channels, size, size]` for the boxes `[n, 4]` of each image."""
        levels = list(maps.values())[: len(self._strides)]
        image = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        regions = torch.cat([image, torch.cat(list(boxes))], dim=1)
        sides = ((regions[:, 3] - regions[:, 1]) * (regions[:, 4] - regions[:, 2])).clamp(min=0).sqrt()
        chosen = torch.log2(2 * sides / self._second + 1e-6).floor().clamp(0, len(levels) - 1)
        pooled = levels[0].new_zeros(len(regions), levels[0].shape[1], self._size, self._size)
        for level, (x, stride) in enumerate(zip(levels, self._strides, strict=True)):
            here = torch.where(chosen == level)[0]
            part = roi_align(x, regions[here].to(x.dtype), self._size, 1 / stride, sampling_ratio=0, aligned=True)
            pooled = pooled.index_put((here,), part.to(pooled.dtype))
        return pooled
