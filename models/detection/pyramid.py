"""Feature pyramids, anchors and pooling of regions, based on torchvision, with the arithmetic of mmdetection 2.

torchvision rounds anchors to integers, derives strides from sizes, and pools with a half-pixel offset, which would cost
accuracy with weights from mmdetection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from ..layers import Float32Conv2d


class Pyramid(nn.Module):
    """A feature pyramid network (Lin et al., arXiv 1612.03144) with additional coarser maps.

    Args:
        channels: channels of the backbone's maps.
        strides: strides of the backbone's maps.
        width: channels of the maps of the pyramid.
        convolved: whether to add two maps by strided convolutions, as in RetinaNet, instead of one map by subsampling
            the last one.

    Attributes:
        strides: strides of the maps of the pyramid.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], *, width: int, convolved: bool) -> None:
        super().__init__()
        more = _Convolutions(channels[-1], width) if convolved else LastLevelMaxPool()
        self.fpn = FeaturePyramidNetwork(list(channels), width, extra_blocks=more)
        self.strides = [*strides, *(strides[-1] << level for level in range(1, 3 if convolved else 2))]

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return maps ``[b, width, h, w]`` by name, finest first."""
        return self.fpn({str(level): x for level, x in enumerate(maps)})


class _Convolutions(ExtraFPNBlock):
    """Adds two coarser maps, computed from the last map of the backbone without an activation in between."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        # In bfloat16 on a CPU, PyTorch's gradient of a strided convolution of a single pixel is wrong.
        self.p6 = Float32Conv2d(channels, width, 3, stride=2, padding=1)
        self.p7 = Float32Conv2d(width, width, 3, stride=2, padding=1)
        for module in (self.p6, self.p7):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(x[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


class Anchors(AnchorGenerator):
    """Anchors whose sizes and positions are not rounded.

    Args:
        strides: strides of the maps.
        scales: sides of a square anchor, as multiples of the stride.
        ratios: height divided by width.
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
        device: torch.device = torch.device("cpu"),  # noqa: B008 - the default of the overridden method
    ) -> Tensor:
        """Return anchors ``[len(aspect_ratios) * len(scales), 4]``, (x1, y1, x2, y2), around the origin."""
        sizes = torch.tensor(scales, dtype=dtype, device=device)
        roots = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        widths, heights = (sizes / roots).flatten(), (sizes * roots).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors ``[n, 4]`` of all maps ``[B, C, h, w]``, for each image, in the order of the pixels."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        strides = [[torch.tensor(stride, device=feature_maps[0].device)] * 2 for stride in self.strides]
        anchors = self.grid_anchors([list(x.shape[-2:]) for x in feature_maps], strides)
        return [torch.cat(anchors)] * len(image_list.image_sizes)


class AlignedPool(nn.Module):
    """RoIAlign (He et al., arXiv 1703.06870) without a half-pixel offset, on the level that fits the size of a region.

    Args:
        size: side of the result.
        strides: strides of the maps to pool from, the first ones of the pyramid.
    """

    def __init__(self, size: int, strides: Sequence[int]) -> None:
        super().__init__()
        self._size = size
        self._strides = tuple(strides)
        self._second = 28 * strides[0]  # smallest side of a region on the second level: 112 pixels if it has stride 8

    def forward(self, maps: dict[str, Tensor], boxes: Sequence[Tensor], _image_sizes: object = None) -> Tensor:
        """Return ``[regions, channels, size, size]`` for the boxes ``[n, 4]`` of each image."""
        levels = list(maps.values())[: len(self._strides)]
        image = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        regions = torch.cat([image, torch.cat(list(boxes))], dim=1).float()
        sides = ((regions[:, 3] - regions[:, 1]) * (regions[:, 4] - regions[:, 2])).clamp(min=0).sqrt()
        chosen = torch.log2(2 * sides / self._second + 1e-6).floor().clamp(0, len(levels) - 1)
        pooled = levels[0].new_zeros(len(regions), levels[0].shape[1], self._size, self._size)
        for level, (x, stride) in enumerate(zip(levels, self._strides, strict=True)):
            here = torch.where(chosen == level)[0]
            # In float32, since half precision would round coordinates by up to several pixels.
            part = roi_align(x.float(), regions[here], self._size, 1 / stride, sampling_ratio=0, aligned=True)
            pooled = pooled.index_put((here,), part.to(pooled.dtype))
        return pooled
