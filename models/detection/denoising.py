"""Contrastive denoising queries (DINO, arXiv 2203.03605, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from .queries import MATCHED, NO_OBJECT, PADDED, PADDING, Assignment, Queries, Targets


def noised_queries(
    truth: Targets, label_contents: nn.Embedding, number: int, *, label_noise: float, box_noise: float
) -> tuple[Queries, Assignment]:
    """Return noised copies of all objects: positives, to be reconstructed, and negatives, to be rejected.

    Args:
        truth: the objects; without any, there are no queries.
        label_contents: content of a query by label.
        number: approximate number of positives per image: every image gets complete groups of its objects, at least
            one.
        label_noise: twice the probability that a label is replaced by a random one.
        box_noise: scale of the box noise, in halves of the box's sides: corners of positives move by up to 1 times this
            scale, those of negatives by 1 to 2 times.

    Returns:
        The queries, group after group, and their assigned objects.
    """
    device, longest = truth.boxes.device, max(truth.counts)
    groups = max(number // max(longest, 1), 1)
    # One row per image, its objects first: [B, longest].
    place = torch.arange(longest, device=device).expand(len(truth.counts), -1)
    there = place < torch.tensor(truth.counts, device=device)[:, None]
    rows = (truth.starts[:, None] + place).clamp(max=truth.total - 1)
    # Each group holds the positives and then the negatives: [B, groups, 2, longest].
    shape = (len(rows), groups, 2, longest)
    positive = torch.tensor([True, False], device=device)[:, None].expand(shape)
    there = there[:, None, None].expand(shape)
    labels = truth.labels[rows][:, None, None].expand(shape)
    noisy = torch.rand(shape, device=device) < label_noise / 2
    labels = torch.where(noisy, torch.randint_like(labels, label_contents.num_embeddings), labels)
    boxes = _noised(truth.boxes[rows][:, None, None].expand(*shape, 4), positive, box_noise)
    group = torch.arange(MATCHED + 1, MATCHED + 1 + groups, device=device)[:, None, None].expand(shape)
    assignment = torch.where(positive, place[:, None, None], NO_OBJECT).masked_fill(~there, PADDING)
    queries = Queries(label_contents(labels).flatten(1, 3), boxes.flatten(1, 3), group.where(there, PADDED).flatten(1))
    return queries, assignment.flatten(1)


def _noised(boxes: Tensor, positive: Tensor, scale: float) -> Tensor:
    corners = box_convert(boxes, "cxcywh", "xyxy")
    halves = boxes[..., 2:].repeat(*[1] * (boxes.dim() - 1), 2) / 2  # (w, h, w, h) / 2
    signs = torch.randint_like(corners, 2) * 2 - 1
    far = torch.rand_like(corners) + (~positive).unsqueeze(-1)
    moved = (corners + signs * far * halves * scale).clamp(0, 1)
    # Opposite corners of negatives may pass each other. The side is then 0, as in the authors' code, not negative.
    return box_convert(moved, "xyxy", "cxcywh").clamp(min=0)
