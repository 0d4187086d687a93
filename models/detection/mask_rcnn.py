"""Mask R-CNN: region proposals, then classes, boxes and masks of the regions (He et al., arXiv 1703.06870)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss

from ..backbone import DATBackbone, TimmBackbone
from ..options import at_least, positive
from .detector import Detector
from .mask_loss import mask_loss
from .proposals import RegionProposals
from .pyramid import AlignedPool, Pyramid

# Arguments of torchvision's `RoIHeads` as in mmdetection 2.
ROI_SETTINGS = {
    "fg_iou_thresh": 0.5,
    "bg_iou_thresh": 0.5,
    "bbox_reg_weights": (10.0, 10.0, 5.0, 5.0),
    "positive_fraction": 0.25,
    "score_thresh": 0.05,
    "nms_thresh": 0.5,
    "detections_per_img": 100,
}


class HeadParts(NamedTuple):
    """What `TwoStageDetector.build_heads` builds the heads from.

    Attributes:
        channels: channels of the maps and of the mask head.
        hidden: width of the two hidden layers of the box head.
        classes: number of classes, including the background.
        box_pool: pools regions to ``[n, channels, 7, 7]``.
        mask_pool: pools regions to ``[n, channels, 14, 14]``.
        settings: further arguments of `RoIHeads`.
    """

    channels: int
    hidden: int
    classes: int
    box_pool: AlignedPool
    mask_pool: AlignedPool
    settings: dict[str, Any]


class TwoStageDetector(Detector):
    """Region proposals from a feature pyramid, and heads for the regions, with the settings of mmdetection 2.

    Internally, class 0 is the background, as in torchvision.

    Args:
        backbone: maps images to feature maps of strides 4, 8, 16 and 32.
        num_classes: number of classes, without the background.
        channels: channels of the pyramid and of the mask head.
        hidden: width of the two hidden layers of the box head.
        anchor_scale: side of a square anchor, as a multiple of the stride.
        proposals: number of proposals per image in evaluation; training uses `proposals_in_training` times as many.
        samples: number of proposals per image that train the heads.
        detection: ``score_thresh``, ``nms_thresh`` and ``detections_per_img`` of torchvision's `RoIHeads`.

    Attributes:
        proposals_in_training: number of proposals per image in training, as a multiple of those in evaluation.

    Raises:
        ValueError: a value is out of range, or the backbone has another number of maps.
    """

    proposals_in_training = 1

    def __init__(
        self,
        backbone: DATBackbone | TimmBackbone,
        *,
        num_classes: int,
        channels: int = 256,
        hidden: int = 1024,
        anchor_scale: float = 8.0,
        proposals: int = 1000,
        samples: int = 512,
        detection: dict[str, float] | None = None,
    ) -> None:
        super().__init__(backbone)
        numbers = {"channels": channels, "hidden": hidden, "proposals": proposals, "samples": samples}
        for name, number in numbers.items():
            at_least(1).require(name, number)
        positive().require("anchor_scale", anchor_scale)
        self.neck = Pyramid(backbone.channels, backbone.strides, width=channels, convolved=False)
        self.rpn = RegionProposals(
            channels,
            self.neck.strides,
            anchor_scale=anchor_scale,
            candidates={"training": 2 * proposals, "testing": proposals},
            proposals={"training": self.proposals_in_training * proposals, "testing": proposals},
        )
        settings = {**ROI_SETTINGS, "batch_size_per_image": samples, **(detection or {})}
        pools = AlignedPool(7, backbone.strides), AlignedPool(14, backbone.strides)
        self.roi_heads = self.build_heads(HeadParts(channels, hidden, num_classes + 1, *pools, settings))

    def build_heads(self, parts: HeadParts) -> RoIHeads:
        """Build the heads for classes, boxes and masks of the regions."""
        raise NotImplementedError

    def process(
        self, batch: ImageList, targets: Sequence[dict[str, Tensor]] | None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if targets is not None:
            targets = [{**target, "labels": target["labels"] + 1} for target in targets]
        maps = self.neck(self.backbone(batch.tensors))
        proposals, losses = self.rpn(batch, maps, targets)
        found, losses_of_regions = self.roi_heads(maps, proposals, batch.image_sizes, targets)
        if self.training:
            return {name.removeprefix("loss_"): loss for name, loss in (losses | losses_of_regions).items()}
        return [{**one, "labels": one["labels"] - 1, "masks": one["masks"][:, 0]} for one in found]

    def run_layers(self, images: Tensor) -> None:
        maps = list(self.neck(self.backbone(images)).values())
        self.rpn.head(maps)
        channels = maps[0].shape[1]
        for_boxes = images.new_empty(len(images) * self.rpn.post_nms_top_n(), channels, 7, 7)
        for_masks = images.new_empty(len(images) * self.roi_heads.detections_per_img, channels, 14, 14)
        self.run_heads(for_boxes, for_masks)

    def run_heads(self, for_boxes: Tensor, for_masks: Tensor) -> None:
        """Run all layers on pooled regions ``[n, channels, 7, 7]`` and ``[m, channels, 14, 14]``."""
        raise NotImplementedError


class MaskRCNN(TwoStageDetector):
    """Mask R-CNN with one box and one mask per class."""

    sized_by_classes = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")

    def build_heads(self, parts: HeadParts) -> RoIHeads:
        channels = parts.channels
        return _Heads(
            parts.box_pool,
            TwoMLPHead(channels * 7**2, parts.hidden),
            _BoxPredictor(parts.hidden, parts.classes),
            mask_roi_pool=parts.mask_pool,
            mask_head=MaskRCNNHeads(channels, [channels] * 4, dilation=1),
            mask_predictor=MaskRCNNPredictor(channels, channels, parts.classes),
            **parts.settings,
        )

    def run_heads(self, for_boxes: Tensor, for_masks: Tensor) -> None:
        heads = self.roi_heads
        heads.box_predictor(heads.box_head(for_boxes))
        heads.mask_predictor(heads.mask_head(for_masks))


class _BoxPredictor(FastRCNNPredictor):
    """Returns float32: torchvision computes boxes in the precision of the offsets, half precision under autocast."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, offsets = super().forward(x)
        return logits.float(), offsets.float()


class _Heads(RoIHeads):
    """torchvision's heads with `mask_loss`, as torchvision's masks are half a pixel off."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: Sequence[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return detections and losses. Detections are empty in training, losses in evaluation."""
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        regions, matched, labels, wanted = self.select_training_samples(proposals, targets)
        found = self.box_predictor(self.box_head(self.box_roi_pool(features, regions)))
        class_loss, box_loss = fastrcnn_loss(*found, labels, wanted)
        has_object = [of_image > 0 for of_image in labels]
        boxes = [region[mask] for region, mask in zip(regions, has_object, strict=True)]
        objects = [match[mask] for match, mask in zip(matched, has_object, strict=True)]
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes)))
        losses = {"loss_classifier": class_loss, "loss_box_reg": box_loss}
        return [], losses | {"loss_mask": mask_loss(logits, boxes, targets, objects)}
