"""Common parts of the DETR family: padding masks, relative boxes, selection of the best boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert

from .detector import Detector

DETECTIONS = 100  # largest number of detections per image, as in COCO's metrics


class SetDetector(Detector):
    """A detector whose queries predict one box each and which needs no NMS."""

    def predict(self, images: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predictions of all queries.

        Args:
            images: normalised batch ``[B, 3, H, W]``; H and W are multiples of ``divisor``.
            inside: ``[B, H, W]``, true within the image, false in its padding.

        Returns:
            Probabilities ``[B, Q, classes]``, and boxes ``[B, Q, 4]`` (cx, cy, w, h), relative to the sides.
        """
        raise NotImplementedError

    def run_layers(self, images: Tensor) -> None:
        self.predict(images, _without_padding(images))


class AllQueries(nn.Module):
    """A detector as a function from tensor to tensor, for export. Images have no padding.

    Args:
        detector: the detector, in evaluation mode.
    """

    def __init__(self, detector: SetDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[B, 3, H, W]`` to boxes and probabilities ``[B, Q, 4 + classes]``, see `SetDetector.predict`."""
        scores, boxes = self.detector.predict(images, _without_padding(images))
        return torch.cat([boxes, scores], -1)


def _without_padding(images: Tensor) -> Tensor:
    return torch.ones_like(images[:, 0], dtype=torch.bool)


def image_mask(batch: ImageList) -> Tensor:
    """Return a mask of the pixels of a batch that are not padding, bool ``[B, H, W]``."""
    rows, columns = (torch.arange(side, device=batch.tensors.device) for side in batch.tensors.shape[-2:])
    return torch.stack([(rows[:, None] < height) & (columns < width) for height, width in batch.image_sizes])


def padded_sizes(batch: ImageList) -> list[tuple[int, int]]:
    """Return height and width of the padded batch, once for every image."""
    return [tuple(batch.tensors.shape[-2:])] * len(batch.image_sizes)


def relative_targets(targets: Sequence[dict[str, Tensor]], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Convert targets to transformers' format.

    Args:
        targets: for each image, ``boxes`` ``[n, 4]`` (x1, y1, x2, y2) in pixels and ``labels`` ``[n]``.
        sizes: for each image, height and width by which its boxes are divided.

    Returns:
        For each image, ``boxes`` ``[n, 4]`` (cx, cy, w, h), relative to the sides, and ``class_labels`` ``[n]``.
    """
    return [
        {
            "class_labels": target["labels"],
            "boxes": box_convert(target["boxes"].float(), "xyxy", "cxcywh") / _whwh(size, target["boxes"]),
        }
        for target, size in zip(targets, sizes, strict=True)
    ]


def best_boxes(scores: Tensor, boxes: Tensor, batch: ImageList, *, of_padded: bool = False) -> list[dict[str, Tensor]]:
    """Return the most probable pairs of box and class of every image.

    Args:
        scores: ``[B, Q, classes]``.
        boxes: ``[B, Q, 4]`` (cx, cy, w, h), relative to the sides.
        batch: the images.
        of_padded: whether boxes are relative to the padded batch instead of the image.

    Returns:
        For each image, ``boxes`` ``[n, 4]`` (x1, y1, x2, y2) in pixels within the image, ``labels`` and ``scores``
        ``[n]``, the most probable first.
    """
    top = scores.flatten(1).topk(min(DETECTIONS, scores[0].numel()))
    queries, labels = top.indices // scores.shape[-1], top.indices % scores.shape[-1]
    corners = box_convert(boxes, "cxcywh", "xyxy").gather(1, queries.unsqueeze(-1).expand(-1, -1, 4))
    found = []
    for i, (size, shown) in enumerate(
        zip(padded_sizes(batch) if of_padded else batch.image_sizes, batch.image_sizes, strict=True)
    ):
        pixels = (corners[i] * _whwh(size, corners)).clamp(min=0).minimum(_whwh(shown, corners))
        found.append({"boxes": pixels, "labels": labels[i], "scores": top.values[i]})
    return found


def _whwh(size: tuple[int, int], like: Tensor) -> Tensor:
    height, width = size
    return torch.tensor([width, height, width, height], dtype=torch.float32, device=like.device)
