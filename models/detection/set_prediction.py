"""What the detectors of the DETR line share: padded images, boxes relative to them, and the best boxes of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert

DETECTIONS = 100  # per image, as COCO counts them


class Batch(NamedTuple):
    """Images of several sizes in one tensor.

    Attributes:
        pixels: `[B, 3, H, W]`, zero beyond each image.
        mask: `[B, H, W]`, true within the image.
        sizes: height and width of every image in pixels.
    """

    pixels: Tensor
    mask: Tensor
    sizes: list[tuple[int, int]]

    @property
    def padded(self) -> list[tuple[int, int]]:
        """Height and width of the whole tensor, once for every image."""
        return [tuple(self.pixels.shape[-2:])] * len(self.sizes)


def pad_images(images: Sequence[Tensor], divisor: int = 32) -> Batch:
    """Lay images `[3, h, w]` into the upper left corners of one batch, whose sides `divisor` divides."""
    sizes = [tuple(image.shape[-2:]) for image in images]
    height, width = (-(-max(side) // divisor) * divisor for side in zip(*sizes, strict=True))
    pixels = images[0].new_zeros(len(images), 3, height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.bool, device=pixels.device)
    for i, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
        pixels[i, :, :h, :w] = image
        mask[i, :h, :w] = True
    return Batch(pixels, mask, sizes)


def relative_targets(targets: Sequence[dict[str, Tensor]], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Return targets as transformers takes them.

    Args:
        targets: of each image, `boxes` `[n, 4]` (x1, y1, x2, y2) in pixels and `labels` `[n]`.
        sizes: height and width that the boxes are divided by.

    Returns:
        Of each image, `boxes` `[n, 4]` (cx, cy, w, h), as shares of the sides, and `class_labels` `[n]`.
    """
    return [
        {
            "class_labels": target["labels"],
            "boxes": box_convert(target["boxes"].float(), "xyxy", "cxcywh") / _whwh(size, target["boxes"]),
        }
        for target, size in zip(targets, sizes, strict=True)
    ]


def best_boxes(scores: Tensor, boxes: Tensor, batch: Batch, *, of_padded: bool = False) -> list[dict[str, Tensor]]:
    """Return the most probable pairs of box and class of every image.

    Args:
        scores: `[B, Q, classes]`.
        boxes: `[B, Q, 4]` (cx, cy, w, h), as shares of the sides.
        batch: the images.
        of_padded: the sides are those of the padded batch, not of the image.

    Returns:
        Of each image, `boxes` `[n, 4]` (x1, y1, x2, y2) in pixels within the image, `labels` and `scores` `[n]`,
        the most probable first.
    """
    top = scores.flatten(1).topk(min(DETECTIONS, scores[0].numel()))
    queries, labels = top.indices // scores.shape[-1], top.indices % scores.shape[-1]
    corners = box_convert(boxes, "cxcywh", "xyxy").gather(1, queries.unsqueeze(-1).expand(-1, -1, 4))
    found = []
    for i, (size, shown) in enumerate(zip(batch.padded if of_padded else batch.sizes, batch.sizes, strict=True)):
        pixels = (corners[i] * _whwh(size, corners)).clamp(min=0).minimum(_whwh(shown, corners))
        found.append({"boxes": pixels, "labels": labels[i], "scores": top.values[i]})
    return found


def _whwh(size: tuple[int, int], like: Tensor) -> Tensor:
    height, width = size
    return torch.tensor([width, height, width, height], dtype=torch.float32, device=like.device)
