"""Mask targets agree with the pasting of masks; the loss of Mask R-CNN and of the cascade uses them."""

from __future__ import annotations

import math

import pytest
import torch
from faster_coco_eval.core import mask as rle
from torch import Tensor, nn

from models.detection.mask_loss import mask_loss, mask_targets
from tasks.coco import paste_masks
from tests.models.detection.test_detectors import build

SIZE = 28
BOXES = torch.tensor([[10.0, 12.0, 38.0, 40.0], [5.0, 30.0, 47.0, 58.0], [20.0, 3.0, 34.0, 31.0]])


def rectangles() -> Tensor:
    """Return masks that fill their boxes, ``[3, 64, 64]``."""
    masks = torch.zeros(3, 64, 64, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, BOXES.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return masks


def stroke() -> Tensor:
    """Return a cross of lines of one pixel in the first box, ``[1, 64, 64]``."""
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 20, 10:38] = mask[0, 12:40, 30] = 1
    return mask


def iou_after_pasting(masks: Tensor, boxes: Tensor) -> list[float]:
    """Return the IoUs of masks and their pasted targets."""
    targets = mask_targets(masks, boxes, torch.arange(len(boxes)), SIZE)
    assert set(targets.unique().tolist()) <= {0.0, 1.0}
    pasted = [torch.from_numpy(rle.decode(one)).bool() for one in paste_masks(targets, boxes, (64, 64))]
    return [((p & m).sum() / (p | m).sum()).item() for p, m in zip(pasted, masks.bool(), strict=True)]


def test_pasted_targets_equal_their_masks() -> None:
    assert iou_after_pasting(rectangles(), BOXES) == [1.0, 1.0, 1.0]
    assert iou_after_pasting(stroke(), BOXES[:1]) == [1.0]


def test_pasted_targets_of_a_larger_region_agree_with_their_masks() -> None:
    larger = BOXES + torch.tensor([-3.3, -2.1, 4.6, 2.2])
    assert min(iou_after_pasting(rectangles(), larger)) > 0.9


def test_targets_are_those_of_the_assigned_objects() -> None:
    targets = mask_targets(rectangles(), BOXES[[2, 0]], torch.tensor([2, 1]), SIZE)
    assert targets[0].all()
    assert targets[1].mean() == pytest.approx(10 / 28)  # rows 30 to 40


@pytest.mark.parametrize(("rows", "expected"), [(4, 0), (5, 1), (6, 1)])
def test_a_target_is_1_if_the_mask_covers_half_of_it(rows: int, expected: int) -> None:
    mask = torch.zeros(1, 20, 20, dtype=torch.uint8)
    mask[0, 5 : 5 + rows] = 1
    target = mask_targets(mask, torch.tensor([[5.0, 5.0, 15.0, 15.0]]), torch.tensor([0]), 1)
    assert target.item() == expected


def test_without_regions_the_loss_is_zero_and_has_a_gradient() -> None:
    logits = torch.zeros(0, 4, SIZE, SIZE, requires_grad=True)
    target = {"masks": torch.zeros(0, 64, 64, dtype=torch.uint8), "labels": torch.zeros(0, dtype=torch.long)}
    loss = mask_loss(logits, [torch.zeros(0, 4)], [target], [torch.zeros(0, dtype=torch.long)])
    loss.backward()
    assert loss == 0


class _Fixed(nn.Module):
    """Predicts for each region logits of 2 where the target is 1, and of -2 elsewhere."""

    def forward(self, regions: Tensor) -> Tensor:
        inside = mask_targets(stroke(), BOXES[:1], torch.zeros(1, dtype=torch.long), SIZE)
        return (4 * inside - 2).expand(len(regions), 4, SIZE, SIZE)


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade"])
def test_detectors_are_trained_with_these_targets(name: str) -> None:
    heads = build(name).roi_heads
    for module in heads.stages if name == "cascade" else [heads]:
        module.mask_head, module.mask_predictor = nn.Identity(), _Fixed()
    maps = {str(i): torch.zeros(1, 16, 16 >> i, 16 >> i) for i in range(4)}
    target = {"boxes": BOXES[:1], "labels": torch.tensor([2]), "masks": stroke()}
    _, losses = heads(maps, [torch.zeros(0, 4)], [(64, 64)], [target])
    found = [loss.item() for name, loss in losses.items() if "mask" in name]
    smallest = math.log(1 + math.exp(-2))  # all pixels are right
    assert found == pytest.approx([smallest, smallest / 2, smallest / 4][: len(found)], rel=1e-4)
