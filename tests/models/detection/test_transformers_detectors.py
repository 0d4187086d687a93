"""Detectors of transformers on this project's backbones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from models.backbone import TimmBackbone
from models.detection.detector import pad_images
from models.detection.set_prediction import AllQueries, image_mask, padded_sizes, relative_targets
from models.detection.transformers_detectors import TransformersDetector
from models.detection.transformers_kinds import KINDS
from tests.models.detection.small import CLASSES, small_arguments, small_backbone, two_images
from tests.models.small import without_gradient


def small_detector(kind: str) -> TransformersDetector:
    torch.manual_seed(0)
    maps = range(4 - KINDS[kind].maps, 4)
    return TransformersDetector(kind, small_backbone(*maps), num_classes=CLASSES, **small_arguments(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_train_every_parameter_and_boxes_lie_in_their_images(kind: str) -> None:
    detector = small_detector(kind)
    images, targets = two_images()
    losses = detector(images, targets)
    sum(losses.values()).backward()
    assert without_gradient(detector) == []
    with torch.no_grad():
        found = detector.eval()(images)
    for image, one in zip(images, found, strict=True):
        height, width = image.shape[-2:]
        assert one["boxes"].shape == (20 * CLASSES, 4)
        assert bool((one["boxes"] >= 0).all())
        assert bool((one["boxes"] <= torch.tensor([width, height, width, height])).all())
        assert bool((one["scores"].diff() <= 0).all())
        assert set(one["labels"].tolist()) == set(range(CLASSES))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "deformable_detr_two_stage"])
def test_losses_sum_to_the_loss_of_transformers_except_for_the_class_weight(kind: str) -> None:
    detector = small_detector(kind)
    images, targets = two_images()
    torch.manual_seed(1)
    losses = detector(images, targets)
    batch = pad_images(images, 32)
    mask = {"pixel_mask": image_mask(batch).long()} if KINDS[kind].masked else {}
    labels = relative_targets(targets, batch.image_sizes if KINDS[kind].masked else padded_sizes(batch))
    torch.manual_seed(1)
    if KINDS[kind].class_weight != 1:
        losses["ce"] = losses["ce"] / 2
    torch.testing.assert_close(sum(losses.values()), detector.detector(batch.tensors, **mask, labels=labels).loss)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_have_xaviers_scale(kind: str) -> None:
    for name, module in small_detector(kind).detector.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
        elif isinstance(module, nn.Linear) and module.weight.any():
            outputs, inputs = module.weight.shape
            assert module.weight.abs().max() > 0.8 * (6 / (inputs + outputs)) ** 0.5, name  # Xavier's bound


def test_the_backbone_is_stored_once_and_keeps_its_weights() -> None:
    torch.manual_seed(3)
    backbone = small_backbone(1, 2, 3)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    detector = TransformersDetector(
        "deformable_detr", backbone, num_classes=CLASSES, **small_arguments("deformable_detr")
    )
    names = {name for name, _ in detector.named_parameters() if "patch_proj" in name}
    assert names
    assert all(name.startswith("backbone.patch_proj") for name in names)
    assert all(torch.equal(value, before[name]) for name, value in detector.backbone.state_dict().items())


def test_timm_models_are_backbones() -> None:
    backbone = TimmBackbone("resnet18", out_indices=(2, 3, 4))
    detector = TransformersDetector(
        "deformable_detr", backbone, num_classes=CLASSES, **small_arguments("deformable_detr")
    )
    assert sum(detector(*two_images()).values()).isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_querys": 5}, "detr has no argument 'num_querys'; did you mean num_queries"),
        ({"decoder_layers": 1}, "decoder_layers = 1 of detr is not allowed; give at least 2"),
        ({"d_model": "wide"}, "detr: .*d_model"),
    ],
)
def test_wrong_arguments_are_rejected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformersDetector("detr", small_backbone(3), num_classes=CLASSES, **arguments)


@pytest.mark.parametrize("kind", ["detr", "deformable_detr_two_stage", "rt_detr"])
@torch.no_grad()
def test_all_queries_contain_the_best_boxes(kind: str) -> None:
    detector = small_detector(kind).eval()
    images = torch.rand(2, 3, 64, 96)
    out, found = AllQueries(detector)(images), detector(list(images))
    assert out.shape == (2, 20, 4 + CLASSES)
    for one, rows in zip(found, out, strict=True):
        torch.testing.assert_close(one["scores"][0], rows[:, 4:].max())
