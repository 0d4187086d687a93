"""A head with adaptive training sample selection (ATSS, arXiv 1912.02424), used only in training."""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from .. import ranks
from .initial_weights import set_prior
from .positives import Positives

CANDIDATES = 9  # anchors per level that are considered for an object, the nearest ones
ANCHOR = 8  # side of an anchor in pixels of its map
BOX_WEIGHT = 2.0
_NO_OBJECT = -1


class ATSSHead(nn.Module):
    """Predicts class, box and centerness for one square anchor per pixel of each map.

    Args:
        width: channels of the maps.
        num_classes: number of classes, without "no object".
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(width // 8, width), nn.ReLU())
        self.class_logits = nn.Conv2d(width, num_classes, 3, padding=1)
        self.changes = nn.Conv2d(width, 4, 3, padding=1)
        self.centerness = nn.Conv2d(width, 1, 3, padding=1)
        self.coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        for conv in (self.class_logits, self.changes, self.centerness):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        set_prior(self, num_classes)

    def forward(
        self, maps: list[Tensor], strides: list[float], targets: list[dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], list[Positives]]:
        """Return the losses for maps ``[B, C, h, w]``, and the positive samples of each image.

        The losses are divided by numbers of positive samples that are averaged over ranks.

        Args:
            maps: maps of the encoder, finest first.
            strides: strides of the maps in pixels.
            targets: for each image, ``boxes`` (x1, y1, x2, y2) in pixels and ``labels``.
        """
        towers = [self.tower(x) for x in maps]
        logits = _flatten([self.class_logits(x) for x in towers])
        changes = _flatten([self.changes(x) for x in towers])
        centerness = _flatten([self.centerness(x) for x in towers]).squeeze(-1)
        features = _flatten(maps)
        anchors = square_anchors(maps, strides)
        counts = [x.shape[-2] * x.shape[-1] for x in maps]
        assigned = torch.stack([assign(anchors, counts, target["boxes"]) for target in targets])  # [B, S]
        positive = assigned != _NO_OBJECT
        positives = [Positives(anchors[p], a[p], f[p]) for p, a, f in zip(positive, assigned, features, strict=True)]
        labels, boxes = (
            torch.cat([target[name][one.objects] for target, one in zip(targets, positives, strict=True)])
            for name in ("labels", "boxes")
        )
        classes = torch.zeros_like(logits, dtype=torch.float32)
        classes[positive] = F.one_hot(labels, logits.shape[-1]).float()
        positive_anchors = torch.cat([one.boxes for one in positives])
        predicted = self.coder.decode_single(changes[positive].float(), positive_anchors)
        wanted = _centerness(positive_anchors, boxes)
        totals = torch.stack([positive.sum().float(), wanted.sum()])
        number, centerness_sum = ranks.mean_over_ranks(totals).clamp(min=1)
        focal = sigmoid_focal_loss(logits.float(), classes, alpha=0.25, gamma=2.0, reduction="sum")
        giou = generalized_box_iou_loss(predicted, boxes) * wanted
        entropy = F.binary_cross_entropy_with_logits(centerness[positive].float(), wanted, reduction="sum")
        losses = {
            "class": focal / number,
            "box": BOX_WEIGHT * giou.sum() / centerness_sum,
            "centerness": entropy / number,
        }
        return losses, positives


def _flatten(maps: list[Tensor]) -> Tensor:
    """Return the pixels of maps ``[B, C, h, w]``, level after level, ``[B, S, C]``."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)


def square_anchors(maps: list[Tensor], strides: list[float]) -> Tensor:
    """Return an anchor (x1, y1, x2, y2) in image pixels around each pixel of all maps ``[B, C, h, w]``, ``[S, 4]``."""
    anchors = []
    for x, stride in zip(maps, strides, strict=True):
        rows, columns = (torch.arange(side, device=x.device) + 0.5 for side in x.shape[-2:])
        y, x = torch.meshgrid(rows * stride, columns * stride, indexing="ij")
        centers = torch.stack([x, y], -1).flatten(0, 1)
        anchors.append(torch.cat([centers - ANCHOR * stride / 2, centers + ANCHOR * stride / 2], -1))
    return torch.cat(anchors)


def assign(anchors: Tensor, counts: list[int], boxes: Tensor) -> Tensor:
    """Assign the index of an object to each anchor, or -1 (section 3.2).

    The candidates of an object are the nearest anchors of each level. A candidate is positive if its IoU with the
    object is at least mean plus standard deviation over all candidates, and if its centre lies within the object.

    Args:
        anchors: anchors (x1, y1, x2, y2) of all levels, ``[S, 4]``.
        counts: number of anchors of each level.
        boxes: boxes (x1, y1, x2, y2) of the objects, ``[n, 4]``.
    """
    if not len(boxes):
        return torch.full((len(anchors),), _NO_OBJECT, device=anchors.device)
    overlaps = box_iou(anchors, boxes)  # [S, n]
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    distances = torch.cdist(centers, (boxes[:, :2] + boxes[:, 2:]) / 2)
    starts = accumulate(counts[:-1], initial=0)
    nearest = torch.cat(
        [
            start + level.topk(min(CANDIDATES, count), dim=0, largest=False).indices
            for start, count, level in zip(starts, counts, distances.split(counts), strict=True)
        ]
    )  # [candidates, n]
    candidates = overlaps.gather(0, nearest)
    inside = (centers[nearest] > boxes[:, :2]).all(-1) & (centers[nearest] < boxes[:, 2:]).all(-1)
    chosen = (candidates >= candidates.mean(0) + candidates.std(0)) & inside
    kept = torch.full_like(overlaps, -1.0).scatter(0, nearest, candidates.where(chosen, -1.0))
    best = kept.max(dim=1)
    return best.indices.where(best.values >= 0, _NO_OBJECT)


def _centerness(anchors: Tensor, boxes: Tensor) -> Tensor:
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    before, after = centers - boxes[:, :2], boxes[:, 2:] - centers  # [n, 2]
    return (torch.minimum(before, after) / torch.maximum(before, after)).prod(-1).clamp(min=0).sqrt()
