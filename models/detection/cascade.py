"""Cascade Mask R-CNN: three stages, each trained on the boxes that the previous one refined (arXiv 1906.09756)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.ops import clip_boxes_to_image

from .mask_loss import mask_loss
from .mask_rcnn import HeadParts, TwoStageDetector
from .pyramid import AlignedPool

# Per stage: IoU threshold of positive regions, standard deviations of the box encoding, loss weight.
_IOUS = (0.5, 0.6, 0.7)
_DEVIATIONS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
_WEIGHTS = (1.0, 0.5, 0.25)


class CascadeMaskRCNN(TwoStageDetector):
    """Cascade Mask R-CNN with class-agnostic box regression."""

    proposals_in_training = 2
    sized_by_classes = tuple(
        f"roi_heads.stages.{stage}.{layer}."
        for stage in range(len(_IOUS))
        for layer in ("cls_score", "mask_predictor.mask_fcn_logits")
    )

    def build_heads(self, parts: HeadParts) -> RoIHeads:
        stages = [_Stage(parts.channels, parts.hidden, parts.classes) for _ in _IOUS]
        return CascadeHeads(stages, parts.box_pool, parts.mask_pool, **parts.settings)

    def run_heads(self, for_boxes: Tensor, for_masks: Tensor) -> None:
        for stage in self.roi_heads.stages:
            stage(for_boxes)
            stage.masks(for_masks)


class _Stage(nn.Module):
    """The heads of a stage, for class logits, box offsets and mask logits of pooled regions."""

    def __init__(self, channels: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.box_head = TwoMLPHead(channels * 7**2, hidden)
        self.cls_score = nn.Linear(hidden, classes)
        self.bbox_pred = nn.Linear(hidden, 4)
        self.mask_head = MaskRCNNHeads(channels, [channels] * 4, dilation=1)
        self.mask_predictor = MaskRCNNPredictor(channels, channels, classes)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``[n, classes]``, background first, and box offsets ``[n, 4]``."""
        x = self.box_head(regions)
        return self.cls_score(x).float(), self.bbox_pred(x).float()

    def masks(self, regions: Tensor) -> Tensor:
        """Return mask logits ``[n, classes, 28, 28]``."""
        return self.mask_predictor(self.mask_head(regions)).float()


class CascadeHeads(RoIHeads):
    """The stages, with torchvision's assignment, sampling and NMS of regions.

    Args:
        stages: heads of the stages, in order.
        box_pool: pools regions to ``[n, channels, 7, 7]``.
        mask_pool: pools regions to ``[n, channels, 14, 14]``.
        **settings: further arguments of `RoIHeads`.
    """

    def __init__(self, stages: list[_Stage], box_pool: AlignedPool, mask_pool: AlignedPool, **settings: Any) -> None:
        super().__init__(box_pool, None, None, **settings)
        self.stages = nn.ModuleList(stages)
        self.mask_roi_pool = mask_pool
        self._coders = [BoxCoder(tuple(1 / deviation for deviation in of_stage)) for of_stage in _DEVIATIONS]

    def has_mask(self) -> bool:
        """Return True: there are always masks."""
        return True

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: Sequence[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return detections and losses. Detections are empty in training, losses in evaluation."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}

    def _losses(
        self,
        maps: dict[str, Tensor],
        regions: list[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for number, (stage, coder, weight) in enumerate(zip(self.stages, self._coders, _WEIGHTS, strict=True)):
            self.box_coder = coder
            self.proposal_matcher = Matcher(_IOUS[number], _IOUS[number])
            regions, matched, labels, wanted = self.select_training_samples(list(regions), targets)
            logits, offsets = stage(self.box_roi_pool(maps, regions))
            label, positive = torch.cat(labels), torch.cat(labels) > 0
            box_loss = F.smooth_l1_loss(offsets[positive], torch.cat(wanted)[positive], reduction="sum")
            has_object = [region_labels > 0 for region_labels in labels]
            boxes = [region[mask] for region, mask in zip(regions, has_object, strict=True)]
            objects = [match[mask] for match, mask in zip(matched, has_object, strict=True)]
            of_masks = mask_loss(stage.masks(self.mask_roi_pool(maps, boxes)), boxes, targets, objects)
            losses |= {
                f"classifier_{number}": weight * F.cross_entropy(logits, label),
                f"box_reg_{number}": weight * box_loss / len(label),
                f"mask_{number}": weight * of_masks,
            }
            refined = self._refined(coder, offsets.detach(), regions, sizes)
            # `select_training_samples` added the true boxes, and does so again in the next stage.
            regions = [
                box[~_is_one_of(region, target["boxes"])]
                for box, region, target in zip(refined, regions, targets, strict=True)
            ]
        return losses

    def _detect(
        self, maps: dict[str, Tensor], regions: list[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        stage_logits = []
        for stage, coder in zip(self.stages, self._coders, strict=True):
            last_regions = regions
            logits, offsets = stage(self.box_roi_pool(maps, regions))
            regions = self._refined(coder, offsets, regions, sizes)
            stage_logits.append(logits)
        self.box_coder = coder
        mean = torch.stack(stage_logits).mean(0)
        offsets = offsets.repeat(1, mean.shape[1])  # torchvision expects a box per class
        boxes, scores, labels = self.postprocess_detections(mean, offsets, last_regions, sizes)
        pooled = self.mask_roi_pool(maps, boxes)
        masks = [maskrcnn_inference(stage.masks(pooled), labels) for stage in self.stages]
        return [
            {"boxes": boxes[i], "labels": labels[i], "scores": scores[i], "masks": torch.stack(of_image).mean(0)}
            for i, of_image in enumerate(zip(*masks, strict=True))
        ]

    def _refined(
        self, coder: BoxCoder, offsets: Tensor, regions: list[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        # torchvision decodes offsets to [n, 1, 4], but none to [0, 4].
        boxes = coder.decode(offsets, regions).reshape(-1, 4).split([len(region) for region in regions])
        return [clip_boxes_to_image(box, size) for box, size in zip(boxes, sizes, strict=True)]


def _is_one_of(regions: Tensor, boxes: Tensor) -> Tensor:
    """Return which regions ``[n, 4]`` are equal to one of the boxes ``[m, 4]``, bool ``[n]``."""
    return (regions[:, None] == boxes[None]).all(-1).any(1)
