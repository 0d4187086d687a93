"""RetinaNet: a one-stage detector with focal loss (Lin et al., arXiv 1708.02002)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, sigmoid_focal_loss

from ..backbone import DATBackbone, TimmBackbone
from ..options import at_least, check_divisible, not_negative, positive, share
from .detector import Detector
from .matching import AnchorMatcher
from .pyramid import Anchors, Pyramid

_SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))


class RetinaNet(Detector):
    """RetinaNet with the settings of mmdetection 2.

    Args:
        backbone: maps images to feature maps of strides 8, 16 and 32.
        num_classes: number of classes, without the background.
        channels: channels of the pyramid and the head.
        anchor_scale: side of the smallest square anchor, as a multiple of the stride.
        norm_groups: groups of the group norm after each convolution of the head, which speeds up training from random
            weights; 0 for no norm, as in the paper.
        score_threshold: smallest score of a detection.
        nms_threshold: IoU threshold of NMS.
        candidates: largest number of detections per map before NMS.
        detections: largest number of detections per image.

    Raises:
        ValueError: a value is out of range, or the backbone has another number of maps.
    """

    maps = 3
    sized_by_classes = ("head.classification_head.cls_logits.",)

    def __init__(
        self,
        backbone: DATBackbone | TimmBackbone,
        *,
        num_classes: int,
        channels: int = 256,
        anchor_scale: float = 4.0,
        norm_groups: int = 0,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        candidates: int = 1000,
        detections: int = 100,
    ) -> None:
        super().__init__(backbone)
        for name, number in {"channels": channels, "candidates": candidates, "detections": detections}.items():
            at_least(1).require(name, number)
        positive().require("anchor_scale", anchor_scale)
        share().require("score_threshold", score_threshold)
        share().require("nms_threshold", nms_threshold)
        not_negative().require("norm_groups", norm_groups)
        if norm_groups:
            check_divisible("channels", channels, "norm_groups", norm_groups)
        self.neck = Pyramid(backbone.channels, backbone.strides, width=channels, convolved=True)
        self.anchors = Anchors(self.neck.strides, scales=[anchor_scale * scale for scale in _SCALES])
        norm = partial(nn.GroupNorm, norm_groups) if norm_groups else None
        self.head = RetinaNetHead(channels, self.anchors.num_anchors_per_location()[0], num_classes, norm)
        self._matcher = AnchorMatcher(0.5, 0.4, best_iou=0.0)
        self._coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self._score_threshold = score_threshold
        self._nms_threshold = nms_threshold
        self._candidates = candidates
        self._detections = detections

    def process(
        self, batch: ImageList, targets: Sequence[dict[str, Tensor]] | None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        maps = list(self.neck(self.backbone(batch.tensors)).values())
        out = self.head(maps)
        logits, deltas = out["cls_logits"].float(), out["bbox_regression"].float()  # [B, anchors, classes or 4]
        anchors = self.anchors(batch, maps)
        if self.training:
            return self.losses(logits, deltas, anchors, targets)
        per_pixel = self.anchors.num_anchors_per_location()
        lengths = [x.shape[-2] * x.shape[-1] * number for x, number in zip(maps, per_pixel, strict=True)]
        levels = zip(logits.split(lengths, 1), deltas.split(lengths, 1), anchors[0].split(lengths), strict=True)
        found = [self._candidates_of(*level) for level in levels]
        return [self._detect([level[i] for level in found], size) for i, size in enumerate(batch.image_sizes)]

    def run_layers(self, images: Tensor) -> None:
        self.head(list(self.neck(self.backbone(images)).values()))

    def losses(
        self, logits: Tensor, deltas: Tensor, anchors: list[Tensor], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the focal loss and the L1 loss of the boxes, each divided by the number of positive anchors.

        Args:
            logits: ``[B, anchors, classes]``, map after map.
            deltas: encoded boxes ``[B, anchors, 4]``.
            anchors: boxes ``[anchors, 4]`` (x1, y1, x2, y2 in pixels) for each image.
            targets: ``boxes`` ``[n, 4]`` and ``labels`` ``[n]`` for each image.
        """
        matches = torch.stack([self._match(a, t["boxes"]) for a, t in zip(anchors, targets, strict=True)])
        positive = matches >= 0
        wanted = torch.zeros_like(logits)
        boxes = []
        for i, target in enumerate(targets):
            chosen = matches[i][positive[i]]
            wanted[i, positive[i], target["labels"][chosen]] = 1.0
            boxes.append(self._coder.encode_single(target["boxes"][chosen], anchors[i][positive[i]]))
        counted = matches != AnchorMatcher.BETWEEN_THRESHOLDS
        number = positive.sum().clamp(min=1)
        return {
            "classification": sigmoid_focal_loss(logits[counted], wanted[counted], reduction="sum") / number,
            "boxes": F.l1_loss(deltas[positive], torch.cat(boxes), reduction="sum") / number,
        }

    def _match(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """Return the index of the box that each anchor matches, ``[anchors]``; negative for none."""
        if not len(boxes):
            return torch.full((len(anchors),), AnchorMatcher.BELOW_LOW_THRESHOLD, device=anchors.device)
        return self._matcher(box_iou(boxes, anchors))

    def _candidates_of(self, logits: Tensor, deltas: Tensor, anchors: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return boxes, scores and labels of the best detections of one map, for each image."""
        found = []
        for scores, offsets in zip(logits.sigmoid(), deltas, strict=True):
            best, place = scores.flatten().topk(min(self._candidates, scores.numel()))
            place, best = place[best > self._score_threshold], best[best > self._score_threshold]
            anchor, label = place // scores.shape[1], place % scores.shape[1]
            found.append((self._coder.decode_single(offsets[anchor], anchors[anchor]), best, label))
        return found

    def _detect(self, levels: list[tuple[Tensor, Tensor, Tensor]], size: tuple[int, int]) -> dict[str, Tensor]:
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*levels, strict=True))
        boxes = clip_boxes_to_image(boxes, size)
        keep = batched_nms(boxes, scores, labels, self._nms_threshold)[: self._detections]
        return {"boxes": boxes[keep], "labels": labels[keep], "scores": scores[keep]}
