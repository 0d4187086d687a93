"""Assignment of objects to anchors by their IoU, with the rules of mmdetection 2."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher


class AnchorMatcher(Matcher):
    """Assigns each anchor to the object of the largest IoU, and the best anchors of each object to that object.

    torchvision assigns the best anchor of an object to another object if the IoU with that one is larger, so that an
    object may have no anchor. Here, only objects with the same best anchor may: the last one gets it.

    Args:
        positive_iou: smallest IoU of a positive anchor.
        negative_iou: anchors below this IoU are negative; those in between are ignored.
        best_iou: smallest IoU of the best anchors of an object, which are positive too.
    """

    def __init__(self, positive_iou: float, negative_iou: float, *, best_iou: float) -> None:
        super().__init__(positive_iou, negative_iou, allow_low_quality_matches=True)
        self._best_iou = best_iou

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:  # noqa: ARG002 - as in the overridden method
        """Change ``matches`` ``[anchors]`` for the best anchors of each object, given IoUs ``[objects, anchors]``."""
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        # Without an overlap all anchors would be the best ones.
        chosen = (match_quality_matrix == best) & (best >= self._best_iou) & (best > 0)
        objects = torch.arange(len(best), device=best.device)[:, None]
        last = torch.where(chosen, objects, -1).amax(dim=0)
        matches.copy_(torch.where(last >= 0, last, matches))
