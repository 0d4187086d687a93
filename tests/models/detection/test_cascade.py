"""The three stages of the cascade: thresholds, box encoding, weights, and regions passed on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from models.detection.cascade import CascadeHeads

CLASSES = 4
IMAGE = [(200, 400)]
TRUTH = [0.0, 0.0, 100.0, 100.0]
TARGETS = [{"boxes": torch.tensor([TRUTH]), "labels": torch.tensor([2]), "masks": torch.ones(1, 200, 400)}]


class _Recorder(nn.Module):
    """Pools regions to zeros and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.regions: list[Tensor] = []

    def forward(self, _maps: object, boxes: list[Tensor]) -> Tensor:
        (of_image,) = boxes
        self.regions.append(of_image)
        return torch.zeros(len(of_image), 1)


class _Stage(nn.Module):
    """Predicts the same for each region."""

    def __init__(self, logits: list[float], offsets: list[float]) -> None:
        super().__init__()
        self.logits, self.offsets = torch.tensor(logits), torch.tensor(offsets)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits.expand(len(regions), -1), self.offsets.expand(len(regions), -1)

    def masks(self, regions: Tensor) -> Tensor:
        return torch.zeros(len(regions), CLASSES, 28, 28)


def heads(*stages: _Stage) -> CascadeHeads:
    settings = {
        "fg_iou_thresh": 0.5,
        "bg_iou_thresh": 0.5,
        "batch_size_per_image": 64,
        "positive_fraction": 0.5,
        "bbox_reg_weights": None,
        "score_thresh": 0.05,
        "nms_thresh": 0.5,
        "detections_per_img": 100,
    }
    return CascadeHeads(list(stages), _Recorder(), _Recorder(), **settings)


def with_ious(*ious: float) -> Tensor:
    """Return boxes that have these IoUs with the true box."""
    return torch.tensor([[0.0, 0.0, 100.0, 100 * iou] for iou in ious])


def test_each_stage_has_its_threshold_and_the_true_box_once() -> None:
    cascade = heads(*[_Stage([0.0] * CLASSES, [0.0] * 4)] * 3)
    cascade({}, [with_ious(0.49, 0.51, 0.59, 0.61, 0.69, 0.71)], IMAGE, TARGETS)
    for all_of_stage in cascade.box_roi_pool.regions:
        assert sorted(all_of_stage[:, 3].tolist()) == pytest.approx([49, 51, 59, 61, 69, 71, 100])
    positive = [sorted(regions[:, 3].tolist()) for regions in cascade.mask_roi_pool.regions]
    assert positive[0] == pytest.approx([51, 59, 61, 69, 71, 100])
    assert positive[1] == pytest.approx([61, 69, 71, 100])
    assert positive[2] == pytest.approx([71, 100])


def test_true_boxes_are_not_refined_for_the_next_stage() -> None:
    cascade = heads(*[_Stage([0.0] * CLASSES, [0.5, 0.0, 0.0, 0.0])] * 3)
    cascade({}, [torch.tensor([[10.0, 0.0, 110.0, 100.0]])], IMAGE, TARGETS)
    lefts = [sorted(regions[:, 0].tolist()) for regions in cascade.box_roi_pool.regions]
    assert lefts == [pytest.approx([0, 10]), pytest.approx([0, 15]), pytest.approx([0, 17.5])]


def test_losses_are_weighted_and_boxes_encoded_by_stage() -> None:
    cascade = heads(*[_Stage([0.0] * CLASSES, [0.0] * 4)] * 3)
    _, losses = cascade({}, [with_ious(0.2, 0.8)], IMAGE, TARGETS)
    deviations = [(0.1, 0.2), (0.05, 0.1), (0.033, 0.067)]  # of the centre and of the logarithm of the size
    for number, (weight, (centre, size)) in enumerate(zip((1.0, 0.5, 0.25), deviations, strict=True)):
        assert losses[f"classifier_{number}"].item() == pytest.approx(weight * math.log(4), rel=1e-5)
        assert losses[f"mask_{number}"].item() == pytest.approx(weight * math.log(2), rel=1e-5)
        # The centre of the region is 10 pixels above that of the object, and it is 80 pixels high.
        errors = (10 / 80 / centre, math.log(100 / 80) / size)
        smooth = sum(error - 0.5 if error >= 1 else error**2 / 2 for error in errors)
        assert losses[f"box_reg_{number}"].item() == pytest.approx(weight * smooth / 3, rel=1e-4)


def test_regions_are_refined_by_stage_and_scores_averaged() -> None:
    offsets = [1.0, -0.5, -0.5, 1.0]
    cascade = heads(
        _Stage([0.0, 3.0, 0.0, 0.0], offsets),
        _Stage([0.0, 0.0, 0.0, 6.0], offsets),
        _Stage([0.0, 0.0, 3.0, 0.0], offsets),
    ).eval()
    ((found,), losses) = cascade({}, [torch.tensor([[100.0, 50.0, 200.0, 90.0]])], IMAGE)
    assert losses == {}
    # Centre (150, 70), 100 pixels wide and 40 high.
    x, y, width, height = 150.0, 70.0, 100.0, 40.0
    expected = [[100.0, 50.0, 200.0, 90.0]]
    for centre, size in [(0.1, 0.2), (0.05, 0.1), (0.033, 0.067)]:
        x, y = x + centre * width, y - 0.5 * centre * height
        width, height = width * math.exp(-0.5 * size), height * math.exp(size)
        expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    regions = [*(one[0].tolist() for one in cascade.box_roi_pool.regions), found["boxes"][0].tolist()]
    assert regions == [pytest.approx(box, abs=1e-3) for box in expected]
    scores = torch.tensor([0.0, 1.0, 1.0, 2.0]).softmax(0)
    assert found["labels"][0] == 3
    assert found["scores"].tolist() == pytest.approx(sorted(scores[1:].tolist(), reverse=True))
