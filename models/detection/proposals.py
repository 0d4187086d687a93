"""Region proposals (Faster R-CNN, arXiv 1506.01497), based on torchvision, with the settings of mmdetection 2."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from .matching import AnchorMatcher
from .pyramid import Anchors

_POSITIVE_IOU, _NEGATIVE_IOU, _BEST_IOU = 0.7, 0.3, 0.3


class RegionProposals(RegionProposalNetwork):
    """Predicts boxes that may contain an object, on all maps of a pyramid.

    Args:
        channels: channels of the maps.
        strides: strides of the maps.
        anchor_scale: side of a square anchor, as a multiple of the stride.
        candidates: largest number of proposals per map before NMS, for ``training`` and ``testing``.
        proposals: largest number of proposals per image, likewise.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        anchor_scale: float,
        candidates: dict[str, int],
        proposals: dict[str, int],
    ) -> None:
        anchors = Anchors(strides, scales=[anchor_scale])
        super().__init__(
            anchors,
            _Head(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=_POSITIVE_IOU,
            bg_iou_thresh=_NEGATIVE_IOU,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=candidates,
            post_nms_top_n=proposals,
            nms_thresh=0.7,
        )
        self.proposal_matcher = AnchorMatcher(_POSITIVE_IOU, _NEGATIVE_IOU, best_iou=_BEST_IOU)


class _Head(RPNHead):
    """Returns float32: torchvision computes boxes in the precision of the offsets, half precision under autocast."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, offsets = super().forward(x)
        return [of_map.float() for of_map in logits], [of_map.float() for of_map in offsets]
