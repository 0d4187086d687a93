"""Weights of mmdetection: all entries of a file load."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from models.detection import DETECTORS
from models.detection.mmdetection import from_mmdetection
from models.weights import adapt
from tests.models.detection.test_detectors import TINY, build
from training.checkpoint import load_strictly
from training.weight_sets import pick_weights

WIDTH, HIDDEN, CLASSES = 16, 16, 3


def published(name: str, backbone: dict[str, Tensor], channels: list[int], classes: int = CLASSES) -> dict[str, Tensor]:
    """Return random weights under the names of mmdetection 2."""
    shapes = {}
    for i, number in enumerate(channels):
        shapes[f"neck.lateral_convs.{i}.conv"] = (WIDTH, number, 1, 1)
        shapes[f"neck.fpn_convs.{i}.conv"] = (WIDTH, WIDTH, 3, 3)
    if name == "retinanet":
        shapes |= {"neck.fpn_convs.3.conv": (WIDTH, channels[-1], 3, 3), "neck.fpn_convs.4.conv": (WIDTH, WIDTH, 3, 3)}
        for i in range(4):
            shapes |= {f"bbox_head.{kind}_convs.{i}.conv": (WIDTH, WIDTH, 3, 3) for kind in ("cls", "reg")}
        shapes |= {"bbox_head.retina_cls": (9 * classes, WIDTH, 3, 3), "bbox_head.retina_reg": (36, WIDTH, 3, 3)}
    else:
        shapes |= {"rpn_head.rpn_conv": (WIDTH, WIDTH, 3, 3), "rpn_head.rpn_cls": (3, WIDTH, 1, 1)}
        shapes |= {"rpn_head.rpn_reg": (12, WIDTH, 1, 1)}
        for stage in ("0.", "1.", "2.") if name == "cascade" else ("",):
            box, mask = f"roi_head.bbox_head.{stage}", f"roi_head.mask_head.{stage}"
            shapes |= {f"{box}shared_fcs.0": (HIDDEN, WIDTH * 49), f"{box}shared_fcs.1": (HIDDEN, HIDDEN)}
            shapes |= {f"{box}fc_cls": (classes + 1, HIDDEN)}
            shapes |= {f"{box}fc_reg": (4 if name == "cascade" else 4 * classes, HIDDEN)}
            shapes |= {f"{mask}convs.{i}.conv": (WIDTH, WIDTH, 3, 3) for i in range(4)}
            shapes |= {f"{mask}upsample": (WIDTH, WIDTH, 2, 2), f"{mask}conv_logits": (classes, WIDTH, 1, 1)}
    torch.manual_seed(3)
    heads = {f"{module}.weight": torch.rand(shape) for module, shape in shapes.items()}
    heads |= {f"{module}.bias": torch.rand(shape[0]) for module, shape in shapes.items()}
    norms = {f"norms.{i}.norm.{kind}": torch.rand(8 << i) for i in range(4) for kind in ("weight", "bias")}
    return {f"backbone.{key}": value for key, value in (norms | backbone).items()} | heads


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn", "cascade"])
def test_all_entries_of_published_weights_load(name: str) -> None:
    detector = build(name)
    weights = published(name, detector.backbone.state_dict(), detector.backbone.channels)
    file = {"meta": {"epoch": 12}, "state_dict": weights}
    state, report = adapt(pick_weights(file, "file.pth", detector).weights, detector)
    assert not report.new
    assert not report.left_out
    assert set(report.loaded) == set(state)
    spare = {"backbone.norms.0.norm.weight", "backbone.norms.0.norm.bias"} if name == "retinanet" else set()
    assert set(from_mmdetection(weights)) - set(state) == spare
    detector.load_state_dict(state)
    if name == "mask_rcnn":
        logits, theirs = state["roi_heads.box_predictor.cls_score.weight"], weights["roi_head.bbox_head.fc_cls.weight"]
        assert torch.equal(logits, torch.cat([theirs[-1:], theirs[:-1]]))
        boxes = state["roi_heads.box_predictor.bbox_pred.weight"]
        assert torch.equal(boxes[4:], weights["roi_head.bbox_head.fc_reg.weight"])
        assert not boxes[:4].any()


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn", "cascade"])
def test_published_weights_can_be_evaluated(name: str) -> None:
    detector = build(name)
    weights = published(name, detector.backbone.state_dict(), detector.backbone.channels)
    given = pick_weights({"meta": {"epoch": 12}, "state_dict": weights}, "file.pth", detector)
    assert given.notes[-1] == "file.pth: the names of another library were translated"
    load_strictly(detector, given.weights, "file.pth")


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade"])
def test_weights_of_one_class_load(name: str) -> None:
    kind, several = DETECTORS[name], build(name)
    detector = kind.build(several.backbone, num_classes=1, **TINY[name])
    weights = published(name, detector.backbone.state_dict(), detector.backbone.channels, classes=1)
    state, report = adapt(weights, detector)
    assert not report.new
    assert not report.left_out
    detector.load_state_dict(state)
    if name == "mask_rcnn":
        boxes = state["roi_heads.box_predictor.bbox_pred.weight"]
        assert torch.equal(boxes[4:], weights["roi_head.bbox_head.fc_reg.weight"])


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn", "cascade"])
def test_weights_of_another_number_of_classes_start_a_detector(name: str) -> None:
    detector = build(name)
    weights = published(name, detector.backbone.state_dict(), detector.backbone.channels, classes=5)
    state, report = adapt(weights, detector)
    assert 2 <= len(report.of_other_classes) < len(report.loaded)
    assert len(report.of_other_classes) + len(report.loaded) == len(state)
    detector.load_state_dict(state)


def test_unknown_entries_are_an_error() -> None:
    detector = build("retinanet")
    weights = published("retinanet", detector.backbone.state_dict(), detector.backbone.channels)
    weights["bbox_head.more.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=re.escape("bbox_head.more.weight is not in this model")):
        adapt(weights, detector)
