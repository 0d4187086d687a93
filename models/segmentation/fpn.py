"""Semantic FPN (Kirillov et al., Panoptic Feature Pyramid Networks, arXiv 1901.02446, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import DATBackbone, TimmBackbone
from ..options import at_least, rate
from .parts import ConvModule, Segmenter, classifier_layer, resize


class SemanticFPN(Segmenter):
    """A feature pyramid whose levels are upsampled step by step to the size of the first one and added.

    Args:
        backbone: maps images to four feature maps.
        num_classes: number of classes.
        channels: channels of the head.
        pyramid_channels: channels of the pyramid.
        dropout: probability of dropping a channel before the logits.
    """

    def __init__(
        self,
        backbone: DATBackbone | TimmBackbone,
        *,
        num_classes: int,
        channels: int = 128,
        pyramid_channels: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(backbone)
        at_least(1).require("channels", channels)
        at_least(1).require("pyramid_channels", pyramid_channels)
        rate().require("dropout", dropout)
        self.neck = Pyramid(backbone.channels, pyramid_channels)
        self.decode_head = FPNHead(pyramid_channels, channels, num_classes, dropout)

    def get_classifier(self) -> nn.Module:
        """Return the layer that computes the logits."""
        return self.decode_head.conv_seg

    def logits(self, maps: list[Tensor]) -> Tensor:
        return self.decode_head(self.neck(maps))


class Pyramid(nn.Module):
    """A feature pyramid network (Lin et al., arXiv 1612.03144) for maps ``[B, C, h, w]``, finest first."""

    def __init__(self, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(_Conv(c, out_channels, 1) for c in channels)
        self.fpn_convs = nn.ModuleList(_Conv(out_channels, out_channels, 3) for _ in channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for level in range(len(maps) - 1, 0, -1):
            maps[level - 1] = maps[level - 1] + F.interpolate(maps[level], size=maps[level - 1].shape[-2:])
        return [conv(x) for conv, x in zip(self.fpn_convs, maps, strict=True)]


class _Conv(nn.Module):
    """A convolution under the parameter names of mmsegmentation."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FPNHead(nn.Module):
    """Convolves each level and upsamples it by 2 until it has the size of the first one; classifies the sum.

    Maps the levels ``[B, in_channels, h, w]`` to logits ``[B, classes, H, W]`` of the size of the first level.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.scale_heads = nn.ModuleList(_scale_head(in_channels, channels, doublings) for doublings in range(4))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier_layer(channels, num_classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        levels = [head(x) for head, x in zip(self.scale_heads, maps, strict=True)]
        size = levels[0].shape[-2:]
        return self.conv_seg(self.dropout(sum((resize(x, size) for x in levels[1:]), levels[0])))


def _scale_head(in_channels: int, channels: int, doublings: int) -> nn.Sequential:
    layers: list[nn.Module] = [ConvModule(in_channels, channels, 3)]
    for step in range(doublings):
        layers += [ConvModule(channels, channels, 3)] if step else []
        layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)
