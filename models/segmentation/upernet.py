"""UperNet (Xiao et al., Unified Perceptual Parsing for Scene Understanding, arXiv 1807.10221)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..backbone import DATBackbone, TimmBackbone
from ..options import Check, at_least, not_negative, rate
from .parts import ConvModule, Segmenter, classifier_layer, cross_entropy, resize

_POOLS = Check(
    lambda sides: (
        isinstance(sides, (list, tuple)) and bool(sides) and all(isinstance(side, int) and side >= 1 for side in sides)
    ),
    "a list of positive whole numbers, not empty",
)


class UperNet(Segmenter):
    """A feature pyramid with a pyramid pooling module (PSPNet, arXiv 1612.01105), and an auxiliary head in training.

    Args:
        backbone: maps images to four feature maps.
        num_classes: number of classes.
        channels: channels of the head.
        pools: sides of the pooled maps.
        auxiliary_channels: channels of the auxiliary fully convolutional head, on the third map.
        auxiliary_weight: weight of the auxiliary loss.
        dropout: probability of dropping a channel before the logits.
    """

    sized_by_classes = ("auxiliary_head.conv_seg.",)

    def __init__(
        self,
        backbone: DATBackbone | TimmBackbone,
        *,
        num_classes: int,
        channels: int = 512,
        pools: Sequence[int] = (1, 2, 3, 6),
        auxiliary_channels: int = 256,
        auxiliary_weight: float = 0.4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(backbone)
        at_least(1).require("channels", channels)
        at_least(1).require("auxiliary_channels", auxiliary_channels)
        not_negative().require("auxiliary_weight", auxiliary_weight)
        rate().require("dropout", dropout)
        _POOLS.require("pools", pools)
        self.auxiliary_weight = auxiliary_weight
        # A global pool has a single pixel, and the batch norm after it needs at least two values per channel.
        self.smallest_batch = 2 if 1 in pools else 1
        self.decode_head = UPerHead(backbone.channels, channels, pools, num_classes, dropout)
        self.auxiliary_head = FCNHead(backbone.channels[2], auxiliary_channels, num_classes, dropout)

    def get_classifier(self) -> nn.Module:
        """Return the layer that computes the logits."""
        return self.decode_head.conv_seg

    def logits(self, maps: list[Tensor]) -> Tensor:
        return self.decode_head(maps)

    def losses(self, maps: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        auxiliary = cross_entropy(self.auxiliary_head(maps[2]), labels)
        return super().losses(maps, labels) | {"auxiliary": self.auxiliary_weight * auxiliary}


class UPerHead(nn.Module):
    """Pyramid pooling of the last map, a feature pyramid over all maps, and their fusion at the size of the first map.

    Maps feature maps ``[B, C, h, w]`` to logits ``[B, classes, H, W]`` of the size of the first one.
    """

    def __init__(
        self, maps: Sequence[int], channels: int, pools: Sequence[int], num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvModule(maps[-1], channels, 1)) for side in pools
        )
        self.bottleneck = ConvModule(maps[-1] + len(pools) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(c, channels, 1) for c in maps[:-1])
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in maps[:-1])
        self.fpn_bottleneck = ConvModule(len(maps) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier_layer(channels, num_classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        last = maps[-1]
        pooled = [resize(module(last), last.shape[-2:]) for module in self.psp_modules]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.bottleneck(torch.cat([last, *pooled], dim=1)))
        for level in range(len(levels) - 1, 0, -1):
            levels[level - 1] = levels[level - 1] + resize(levels[level], levels[level - 1].shape[-2:])
        levels[:-1] = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)]
        size = levels[0].shape[-2:]
        fused = self.fpn_bottleneck(torch.cat([resize(x, size) for x in levels], dim=1))
        return self.conv_seg(self.dropout(fused))


class FCNHead(nn.Module):
    """A convolution and a classifier, ``[B, C, H, W]`` to ``[B, classes, H, W]`` (Long et al., arXiv 1411.4038)."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvModule(in_channels, channels, 3))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier_layer(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.convs(x)))
