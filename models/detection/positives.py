"""Positive samples of heads with one-to-many assignment, as queries of the decoder (Co-DETR, arXiv 2211.12860)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from .queries import PADDED, PADDING, Assignment, Queries


class Positives(NamedTuple):
    """The positive samples of an image.

    Attributes:
        boxes: anchors or proposals (x1, y1, x2, y2) in pixels, ``[n, 4]``.
        objects: index of the assigned object of the image, ``[n]``.
        features: features at the samples, ``[n, C]``.
    """

    boxes: Tensor
    objects: Tensor
    features: Tensor

    def at_most(self, number: int) -> Positives:
        """Return the samples, or a random subset of ``number`` if there are more."""
        if len(self.boxes) <= number:
            return self
        kept = torch.randperm(len(self.boxes), device=self.boxes.device)[:number]
        return Positives(*(tensor[kept] for tensor in self))


def as_queries(
    positives: list[Positives], sizes: list[tuple[int, int]], content: nn.Module, group: int
) -> tuple[Queries, Assignment]:
    """Return positive samples as queries (section 3.2, equation 4), and their assigned objects.

    Args:
        positives: positive samples of each image.
        sizes: height and width of each image in pixels.
        content: maps features to contents of queries.
        group: group of the queries; below MATCHED, so that they attend only to each other.
    """
    boxes = [
        box_convert(one.boxes, "xyxy", "cxcywh") / one.boxes.new_tensor([width, height] * 2)
        for one, (height, width) in zip(positives, sizes, strict=True)
    ]
    assignment = pad_sequence([one.objects for one in positives], batch_first=True, padding_value=PADDING)
    features = pad_sequence([one.features for one in positives], batch_first=True)
    groups = torch.full_like(assignment, group).masked_fill(assignment == PADDING, PADDED)
    return Queries(content(features), pad_sequence(boxes, batch_first=True).clamp(0, 1), groups), assignment
