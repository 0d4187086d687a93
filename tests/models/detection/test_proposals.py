"""Region proposals: their number, their precision under autocast, and those of Co-DETR's auxiliary head."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from models.detection import DETECTORS
from models.detection.faster_rcnn_head import FasterRCNNHead
from models.detection.mask_rcnn import _BoxPredictor
from models.detection.proposals import RegionProposals
from tests.models.detection.test_detectors import TARGETS, build, build_any, images
from tests.models.detection.test_pyramid import columns
from tests.models.small import without_gradient

BATCH = ImageList(torch.zeros(1, 3, 1024, 1280), [(1024, 1280)])


def proposals_of(rpn: RegionProposals, maps: dict[str, Tensor], *, half: bool) -> Tensor:
    """Return the proposals of the batch, sorted by their coordinates."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
        ((boxes,), _) = rpn(BATCH, maps)
    return torch.tensor(sorted(boxes.tolist()))


def test_autocast_does_not_round_proposals() -> None:
    numbers = dict.fromkeys(("training", "testing"), 1000)
    rpn = RegionProposals(4, [64], anchor_scale=1.0, candidates=numbers, proposals=numbers).eval()
    torch.nn.init.zeros_(rpn.head.bbox_pred.weight)
    rpn.head.bbox_pred.bias.data.copy_(torch.tensor([0.125, -0.25, 0.0, 0.125]).repeat(3))
    maps = {"0": torch.rand(1, 4, 16, 20)}
    exact, rounded = (proposals_of(rpn, maps, half=half) for half in (False, True))
    assert exact[:, 2].max() > 1200
    assert exact.shape == rounded.shape
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.01)


def test_autocast_does_not_round_detections() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert {x.dtype for x in _BoxPredictor(8, 3)(torch.rand(2, 8))} == {torch.float32}


@pytest.mark.parametrize("name", DETECTORS)
def test_autocast_trains_every_parameter(name: str) -> None:
    detector = build_any(name)
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(images(), TARGETS)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert without_gradient(detector) == []


@pytest.mark.parametrize(("name", "in_training"), [("mask_rcnn", 20), ("cascade", 40)])
def test_number_of_proposals(name: str, in_training: int) -> None:
    rpn = build(name).rpn
    assert (rpn.pre_nms_top_n(), rpn.post_nms_top_n()) == (40, in_training)
    rpn.eval()
    assert (rpn.pre_nms_top_n(), rpn.post_nms_top_n()) == (20, 20)


def test_auxiliary_head_uses_the_strides_of_the_maps() -> None:
    strides, sizes = [8, 16, 32, 64], [100, 50, 25, 13]
    head = FasterRCNNHead(1, 3, strides)
    maps = {str(i): columns(size, size, stride) for i, (size, stride) in enumerate(zip(sizes, strides, strict=True))}
    batch = ImageList(torch.zeros(1, 3, 800, 800), [(800, 800)])
    (anchors,) = head.rpn.anchor_generator(batch, list(maps.values()))
    assert ((anchors[-1, :2] + anchors[-1, 2:]) / 2).tolist() == [768, 768]
    square = anchors[1]
    assert (square[2:] - square[:2]).tolist() == [64, 64]
    # A first batch of another size does not change the pooling of the second one.
    first = {name: x[..., : x.shape[-1] // 2 + 1] for name, x in maps.items()}
    boxes = torch.tensor([[100.0, 100.0, 170.0, 170.0], [80.0, 90.0, 640.0, 700.0]])
    head.roi_heads.box_roi_pool(first, [boxes[:1]], [(800, 410)])
    pooled = head.roi_heads.box_roi_pool(maps, [boxes], batch.image_sizes)
    for of_region, (left, _, right, _) in zip(pooled[:, 0], boxes.tolist(), strict=True):
        centres = left + (torch.arange(7) + 0.5) * (right - left) / 7
        torch.testing.assert_close(of_region, centres.expand(7, 7), rtol=0, atol=1e-3)
