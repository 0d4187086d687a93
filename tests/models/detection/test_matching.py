"""Assignment of objects to anchors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.detection.faster_rcnn_head import FasterRCNNHead
from models.detection.matching import AnchorMatcher
from tests.models.detection.test_detectors import build


def with_ious(*ious: float, left: float = 0.0) -> Tensor:
    """Return boxes that have these IoUs with the box (left, 0, left + 100, 100)."""
    return torch.tensor([[left, 0.0, left + 100, 100 * iou] for iou in ious])


def test_the_best_anchor_of_an_object_is_assigned_to_it() -> None:
    matcher = AnchorMatcher(0.7, 0.3, best_iou=0.3)
    ious = torch.tensor(
        [
            [0.80, 0.75, 0.10, 0.00, 0.20],
            [0.50, 0.10, 0.00, 0.00, 0.50],  # both of its best anchors, also the one of the first object
            [0.00, 0.00, 0.00, 0.29, 0.00],  # no anchor that is good enough
        ]
    )
    assert matcher(ious).tolist() == [1, 0, -1, -1, 1]
    assert AnchorMatcher(0.7, 0.3, best_iou=0.0)(ious).tolist() == [1, 0, -1, 2, 1]


def test_an_object_without_overlap_gets_no_anchor() -> None:
    ious = torch.tensor([[0.0, 0.0, 0.0], [0.45, 0.2, 0.9]])
    assert AnchorMatcher(0.5, 0.4, best_iou=0.0)(ious).tolist() == [-2, -1, 1]


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade", "faster_rcnn"])
def test_thresholds_of_region_proposals(name: str) -> None:
    rpn = FasterRCNNHead(8, 3, [8, 16, 32, 64]).rpn if name == "faster_rcnn" else build(name).rpn
    anchors = torch.cat([with_ious(0.29, 0.31, 0.69, 0.71, 0.9), with_ious(0.31, left=200), with_ious(0.29, left=400)])
    objects = torch.cat([with_ious(1, left=left) for left in (0, 200, 400)])
    (labels,), (boxes,) = rpn.assign_targets_to_anchors([anchors], [{"boxes": objects}])
    assert labels.tolist() == [0, -1, -1, 1, 1, 1, 0]
    assert boxes[3:6].tolist() == objects[[0, 0, 1]].tolist()
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, 0.5)
    assert rpn.nms_thresh == 0.7


def test_thresholds_of_retinanet() -> None:
    anchors = torch.cat([with_ious(0.39, 0.41, 0.49, 0.51, 0.9), with_ious(0.02, left=200)])
    objects = torch.cat([with_ious(1), with_ious(1, left=200)])
    assert build("retinanet")._match(anchors, objects).tolist() == [-1, -2, -2, 0, 0, 1]
