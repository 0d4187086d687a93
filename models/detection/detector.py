"""The interface of detectors, and padding images of different sizes to one tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from ..contract import TakenOver
from ..dense import DenseModel
from .mmdetection import from_mmdetection, is_mmdetection


class Detector(DenseModel):
    """Base class of detectors: the interface between the task and all kinds of detectors."""

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses in training, detections in evaluation.

        Args:
            images: normalised, `[3, h, w]` each, of any sizes; or `[b, 3, h, w]`.
            targets: in training; for each image, `boxes` `[n, 4]` (x1, y1, x2, y2 in pixels), `labels` `[n]` from 0 on,
                and for those that learn masks `masks` `[n, h, w]`, uint8. There may be no object.

        Returns:
            In training named losses, whose sum is minimised. In evaluation, of each image, `boxes`, `labels` and
            `scores`, the most probable first; those that find masks add `masks` `[n, m, m]`: probabilities on a grid
            over the box of each.
        """
        raise NotImplementedError

    def run_layers(self, images: Tensor) -> None:
        """Run all layers on images `[B, 3, H, W]` and a fixed number of regions, without selecting them.

        Used by `tools.complexity`: unlike that of `forward`, the cost does not depend on the detections.
        """
        raise NotImplementedError

    def take_over(self, weights: dict[str, Tensor]) -> TakenOver:
        """Convert weights of mmdetection, of the same detector, or of a classifier for the backbone."""
        return super().take_over(from_mmdetection(weights) if is_mmdetection(weights) else weights)


def pad_images(images: Sequence[Tensor], divisor: int) -> ImageList:
    """Pad images `[3, h, w]` with zeros at the right and bottom to one tensor with sides divisible by `divisor`."""
    sizes = [tuple(image.shape[-2:]) for image in images]
    height, width = (math.ceil(max(sides) / divisor) * divisor for sides in zip(*sizes, strict=True))
    padded = [F.pad(image, (0, width - w, 0, height - h)) for image, (h, w) in zip(images, sizes, strict=True)]
    return ImageList(torch.stack(padded), sizes)
