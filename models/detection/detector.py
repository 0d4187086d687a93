"""What every detector takes and returns, and how images of several sizes become one tensor."""

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
    """A network that finds objects: the interface between the task and every kind of detector."""

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Learn or find objects.

        Args:
            images: normalised, `[3, h, w]` each, of any sizes; or `[b, 3, h, w]`.
            targets: in training; of each image, `boxes` `[n, 4]` (x1, y1, x2, y2 in pixels), `labels` `[n]` from 0 on,
                and for those that learn masks `masks` `[n, h, w]`, uint8. There may be no object.

        Returns:
            In training named losses, whose sum is minimised. In evaluation, of each image, `boxes`, `labels` and
            `scores`, the most probable first; those that find masks add `masks` `[n, m, m]`: probabilities on a grid
            over the box of each.
        """
        raise NotImplementedError

    def run_layers(self, images: Tensor) -> None:
        """Run all layers on images `[B, 3, H, W]` and on as many regions of each as are kept, without choosing them.

        `tools.complexity` counts what this costs: unlike `forward`, it does not depend on what is found.
        """
        raise NotImplementedError

    def take_over(self, weights: dict[str, Tensor]) -> TakenOver:
        """Take weights of mmdetection, of a detector like this, or of a classifier for the backbone alone."""
        return super().take_over(from_mmdetection(weights) if is_mmdetection(weights) else weights)


def pad_images(images: Sequence[Tensor], divisor: int) -> ImageList:
    """Return images as one tensor, with zeros to the right and below, whose sides `divisor` divides."""
    sizes = [tuple(image.shape[-2:]) for image in images]
    height, width = (math.ceil(max(sides) / divisor) * divisor for sides in zip(*sizes, strict=True))
    padded = [F.pad(image, (0, width - w, 0, height - h)) for image, (h, w) in zip(images, sizes, strict=True)]
    return ImageList(torch.stack(padded), sizes)
