"""Faster R-CNN (arXiv 1506.01497) as an auxiliary head, built from torchvision, used only in training."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from .positives import Positives

ANCHOR = 8  # side of an anchor in pixels of its map
RATIOS = (0.5, 1.0, 2.0)


class FasterRCNNHead(nn.Module):
    """Predicts proposals on every map, and a class and a box for each proposal.

    Args:
        width: channels of the maps.
        num_classes: number of classes, without "no object".
        strides: strides of the maps in pixels.
    """

    def __init__(self, width: int, num_classes: int, strides: list[int]) -> None:
        super().__init__()
        levels = [str(level) for level in range(len(strides))]
        anchors = AnchorGenerator(tuple((ANCHOR * stride,) for stride in strides), (RATIOS,) * len(strides))
        sampling = {"fg_iou_thresh": 0.7, "bg_iou_thresh": 0.3, "batch_size_per_image": 256, "positive_fraction": 0.5}
        proposals = {"pre_nms_top_n": dict.fromkeys(("training", "testing"), 2000), "nms_thresh": 0.7}
        self.rpn = RegionProposalNetwork(
            anchors,
            RPNHead(width, len(RATIOS)),
            post_nms_top_n=dict.fromkeys(("training", "testing"), 1000),
            **sampling,
            **proposals,
        )
        self.roi_heads = RoIHeads(
            MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
            TwoMLPHead(width * 7 * 7, width),
            FastRCNNPredictor(width, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=512,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
        )

    def forward(
        self, maps: list[Tensor], images: ImageList, targets: list[dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], list[Positives]]:
        """Return the losses for maps ``[B, C, h, w]``, and the positive samples of each image.

        Args:
            maps: maps of the encoder, finest first.
            images: the batch, in torchvision's format.
            targets: for each image, ``boxes`` (x1, y1, x2, y2) in pixels and ``labels``.
        """
        features = {str(level): x.float() for level, x in enumerate(maps)}
        targets = [{"boxes": target["boxes"], "labels": target["labels"] + 1} for target in targets]  # 0: no object
        proposals, losses = self.rpn(images, features, targets)
        heads = self.roi_heads
        proposals, objects, labels, changes = heads.select_training_samples(proposals, targets)
        seen = heads.box_head(heads.box_roi_pool(features, proposals, images.image_sizes))
        class_loss, box_loss = fastrcnn_loss(*heads.box_predictor(seen), labels, changes)
        by_image = seen.split([len(boxes) for boxes in proposals])
        positives = [
            Positives(boxes[label > 0], objects_of[label > 0], features_of[label > 0])
            for boxes, objects_of, label, features_of in zip(proposals, objects, labels, by_image, strict=True)
        ]
        return {"class": class_loss, "box": box_loss, **losses}, positives
