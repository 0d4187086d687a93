"""Queries of a decoder, the assignment of objects to them, and set prediction losses (DETR, arXiv 2005.12872)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher

from .. import ranks

# [B, Q]: the index of the object of the image that is assigned to each query, or NO_OBJECT or PADDING.
Assignment = Tensor
NO_OBJECT, PADDING = -1, -2
MATCHED, PADDED = 0, -1  # groups of queries, see `Queries`
CLASS_COST, L1_COST, GIOU_COST = 2.0, 5.0, 2.0
CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 1.0, 5.0, 2.0


class Queries(NamedTuple):
    """Queries of a batch of images.

    Attributes:
        contents: ``[B, Q, C]``.
        boxes: ``[B, Q, 4]`` (cx, cy, w, h), relative to the sides of the image.
        groups: ``[B, Q]``. Queries attend to the queries of their own group; those of groups above MATCHED also attend
            to the matched queries, but not vice versa. All padding is in the group PADDED, so that it attends to
            something: a softmax over nothing would be NaN.
    """

    contents: Tensor
    boxes: Tensor
    groups: Tensor

    @classmethod
    def matched(cls, contents: Tensor, boxes: Tensor) -> Queries:
        """Return queries of the group MATCHED."""
        return cls(contents, boxes, torch.full(boxes.shape[:2], MATCHED, device=boxes.device))

    @classmethod
    def joined(cls, parts: Sequence[Queries]) -> Queries:
        """Concatenate queries."""
        return cls(*(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)))

    def attention_mask(self) -> Tensor:
        """Return the additive mask of the self-attention, ``[B, 1, Q, Q]``, which hides known objects from queries."""
        seeing, seen = self.groups.unsqueeze(-1), self.groups.unsqueeze(-2)
        visible = (seeing == seen) | ((seen == MATCHED) & (seeing > MATCHED))
        mask = torch.zeros(visible.shape, dtype=self.contents.dtype, device=visible.device)
        return mask.masked_fill(~visible, -torch.inf).unsqueeze(1)


class Targets:
    """The objects of a batch of images.

    Args:
        images: for each image, ``boxes`` ``[n, 4]`` (cx, cy, w, h), relative to its sides, and ``class_labels``
            ``[n]``.

    Attributes:
        counts: number of objects of each image.
        total: number of objects of all images.
        boxes: boxes of all images, concatenated, ``[total, 4]``.
        labels: labels of all images, concatenated, ``[total]``.
        starts: index of the first object of each image in ``boxes`` and ``labels``, ``[B]``.
    """

    def __init__(self, images: list[dict[str, Tensor]]) -> None:
        self.images = images
        self.counts = [len(image["boxes"]) for image in images]
        self.total = sum(self.counts)
        self.boxes = torch.cat([image["boxes"] for image in images])
        self.labels = torch.cat([image["class_labels"] for image in images])
        self.starts = torch.tensor([0, *self.counts[:-1]], device=self.labels.device).cumsum(0)

    def without_classes(self) -> Targets:
        """Return the same objects, all with the label 0."""
        return Targets([{**image, "class_labels": torch.zeros_like(image["class_labels"])} for image in self.images])

    def in_pixels(self, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Return for each image ``boxes`` ``[n, 4]`` (x1, y1, x2, y2) in pixels and ``labels`` ``[n]``."""
        return [
            {
                "boxes": box_convert(image["boxes"], "cxcywh", "xyxy") * image["boxes"].new_tensor([width, height] * 2),
                "labels": image["class_labels"],
            }
            for image, (height, width) in zip(self.images, sizes, strict=True)
        ]


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, truth: Targets) -> Assignment:
    """Return the matching of queries and objects with the lowest cost, by transformers' Hungarian matcher.

    The matcher raises an error for NaN, which would stop this rank while the others wait for it. NaN is therefore
    replaced; the losses of the matched queries still contain it, so that all ranks skip the update.

    Args:
        logits: ``[B, Q, classes]``.
        boxes: ``[B, Q, 4]`` (cx, cy, w, h), relative to the sides of the image.
        truth: the objects.
    """
    matcher = DeformableDetrHungarianMatcher(CLASS_COST, L1_COST, GIOU_COST)
    predictions = {"logits": logits.float().nan_to_num(), "pred_boxes": boxes.float().nan_to_num(0.5)}
    pairs = matcher(predictions, truth.images)
    assignment = torch.full(logits.shape[:2], NO_OBJECT, device=logits.device)
    for row, (queries, objects) in zip(assignment, pairs, strict=True):
        row[queries.to(row.device)] = objects.to(row.device)
    return assignment


def set_losses(logits: Tensor, boxes: Tensor, assignment: Assignment, truth: Targets) -> dict[str, Tensor]:
    """Return focal, L1 and GIoU loss, divided by the number of queries with an object, averaged over ranks.

    Args:
        logits: ``[B, Q, classes]``.
        boxes: ``[B, Q, 4]`` (cx, cy, w, h), relative to the sides of the image.
        assignment: the object of each query.
        truth: the objects.
    """
    logits, boxes = logits.float(), boxes.float()
    positive = assignment >= 0
    objects = (assignment + truth.starts[:, None])[positive]
    classes = torch.zeros_like(logits)
    classes[positive] = torch.nn.functional.one_hot(truth.labels[objects], logits.shape[-1]).to(classes.dtype)
    number = ranks.mean_over_ranks(positive.sum()).clamp(min=1)
    focal = sigmoid_focal_loss(logits, classes, alpha=0.25, gamma=2.0)[assignment != PADDING]
    found, wanted = boxes[positive], truth.boxes[objects]
    corners = (box_convert(x, "cxcywh", "xyxy") for x in (found, wanted))
    return {
        "class": CLASS_WEIGHT * focal.sum() / number,
        "l1": L1_WEIGHT * (found - wanted).abs().sum() / number,
        "giou": GIOU_WEIGHT * generalized_box_iou_loss(*corners, reduction="sum") / number,
    }
