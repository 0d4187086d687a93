"""Faster R-CNN (arXiv 1506.01497) as an auxiliary head, based on torchvision, used only in training."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss

from .mask_rcnn import ROI_SETTINGS
from .positives import Positives
from .proposals import RegionProposals
from .pyramid import AlignedPool

ANCHOR = 8  # side of a square anchor in pixels of its map


class FasterRCNNHead(nn.Module):
    """Predicts proposals on every map, and a class and a box for each proposal.

    Args:
        width: channels of the maps.
        num_classes: number of classes, without "no object".
        strides: strides of the maps in pixels.
    """

    def __init__(self, width: int, num_classes: int, strides: list[int]) -> None:
        super().__init__()
        self.rpn = RegionProposals(
            width,
            strides,
            anchor_scale=ANCHOR,
            candidates=dict.fromkeys(("training", "testing"), 2000),
            proposals=dict.fromkeys(("training", "testing"), 1000),
        )
        self.roi_heads = RoIHeads(
            AlignedPool(7, strides),
            TwoMLPHead(width * 7 * 7, width),
            FastRCNNPredictor(width, num_classes + 1),
            batch_size_per_image=512,
            **ROI_SETTINGS,
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
        features = {str(level): x for level, x in enumerate(maps)}
        targets = [{"boxes": target["boxes"], "labels": target["labels"] + 1} for target in targets]  # 0: no object
        proposals, losses = self.rpn(images, features, targets)
        heads = self.roi_heads
        proposals, objects, labels, changes = heads.select_training_samples(proposals, targets)
        seen = heads.box_head(heads.box_roi_pool(features, proposals))
        class_loss, box_loss = fastrcnn_loss(*heads.box_predictor(seen), labels, changes)
        by_image = seen.split([len(boxes) for boxes in proposals])
        positives = [
            Positives(boxes[label > 0], objects_of[label > 0], features_of[label > 0])
            for boxes, objects_of, label, features_of in zip(proposals, objects, labels, by_image, strict=True)
        ]
        return {"class": class_loss, "box": box_loss, **losses}, positives
