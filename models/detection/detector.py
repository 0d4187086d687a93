"""The interface of detectors, and the padding of images of different sizes to a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from ..backbone import DATBackbone, TimmBackbone
from ..contract import ConvertedWeights
from ..dense import DenseModel
from .mmdetection import from_mmdetection, is_mmdetection


class Detector(DenseModel):
    """Base class of detectors: the interface to the task.

    Args:
        backbone: maps images to `maps` feature maps.

    Attributes:
        maps: number of feature maps that it uses, the coarsest of the backbone.

    Raises:
        ValueError: the backbone has another number of maps.
    """

    maps: ClassVar[int] = 4

    def __init__(self, backbone: DATBackbone | TimmBackbone) -> None:
        super().__init__(backbone)
        if len(backbone.strides) != self.maps:
            raise ValueError(
                f"{type(self).__name__} uses {self.maps} feature map{'s' * (self.maps > 1)}; the backbone gives those "
                f"of strides {', '.join(map(str, backbone.strides))}: choose them by its out_indices"
            )

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses in training, detections in evaluation.

        Args:
            images: normalised images ``[3, h, w]`` of any sizes, or a batch ``[b, 3, h, w]``.
            targets: only in training; for each image, ``boxes`` ``[n, 4]`` (x1, y1, x2, y2 in pixels), ``labels``
                ``[n]`` from 0, and for detectors with masks ``masks`` ``[n, h, w]``, uint8. n may be 0.

        Returns:
            In training, named losses, whose sum is minimised. In evaluation, for each image, ``boxes``, ``labels`` and
            ``scores``, the most probable first, and for detectors with masks ``masks`` ``[n, m, m]``, probabilities on
            a grid over each box.

        Raises:
            ValueError: in training, there are no targets.
        """
        if self.training and targets is None:
            raise ValueError("a detector in training mode needs targets; call eval() for detections")
        return self.process(pad_images(images, self.divisor), targets)

    def process(
        self, batch: ImageList, targets: Sequence[dict[str, Tensor]] | None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return what `forward` does, for its images padded to a batch ``[B, 3, H, W]``."""
        raise NotImplementedError

    def run_layers(self, images: Tensor) -> None:
        """Run all layers on images ``[B, 3, H, W]`` and a fixed number of regions.

        Used by `tools.complexity`: the cost of `forward` depends on the detections, this one does not.
        """
        raise NotImplementedError

    def rename_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of mmdetection under the names of this detector, and others unchanged.

        Norms of maps that this detector does not use, which backbones of mmdetection have, are left out.
        """
        if not is_mmdetection(weights):
            return weights
        own, renamed = self.state_dict().keys(), from_mmdetection(weights)
        return {name: x for name, x in renamed.items() if name in own or not name.startswith("backbone.norms.")}

    def convert_weights(self, weights: dict[str, Tensor]) -> ConvertedWeights:
        """Convert weights of mmdetection, of the same detector, or of a classifier (for the backbone)."""
        return super().convert_weights(self.rename_weights(weights))


def pad_images(images: Sequence[Tensor], divisor: int) -> ImageList:
    """Pad images ``[3, h, w]`` with zeros at the right and bottom to a batch whose sides ``divisor`` divides."""
    sizes = [tuple(image.shape[-2:]) for image in images]
    height, width = (math.ceil(max(sides) / divisor) * divisor for sides in zip(*sizes, strict=True))
    padded = [F.pad(image, (0, width - w, 0, height - h)) for image, (h, w) in zip(images, sizes, strict=True)]
    return ImageList(torch.stack(padded), sizes)
