"""Detectors of transformers on this project's backbones."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers.loss.loss_for_object_detection import ImageLoss

from models.backbone import TimmBackbone
from models.detection.detector import pad_images
from models.detection.set_prediction import AllQueries, image_mask, padded_sizes, relative_targets
from models.detection.transformers_detectors import TransformersDetector
from models.detection.transformers_kinds import KINDS, WITHOUT_EFFECT
from tests.models.detection.small import CLASSES, small_arguments, small_backbone, two_images
from tests.models.small import without_gradient


def small_detector(kind: str, **arguments: Any) -> TransformersDetector:
    torch.manual_seed(0)
    maps = range(4 - KINDS[kind].maps, 4)
    chosen = {name: value for name, value in {**small_arguments(kind), **arguments}.items() if value is not None}
    return TransformersDetector(kind, small_backbone(*maps), num_classes=CLASSES, **chosen)


def box_layers(detector: TransformersDetector) -> dict[str, nn.Linear]:
    """Return the last layers of the box heads by name."""
    named = detector.detector.named_modules()
    return {name: module for name, module in named if re.search(r"bbox.*layers\.2$", name)}


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
    if "ce" in losses:
        losses["ce"] = losses["ce"] / {"detr": 1, "dab_detr": 1}.get(kind, 2)
    torch.testing.assert_close(sum(losses.values()), detector.detector(batch.tensors, **mask, labels=labels).loss)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_have_xaviers_scale(kind: str) -> None:
    for name, module in small_detector(kind).detector.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
        elif isinstance(module, nn.Linear) and module.weight.any() and name != "bbox_predictor.layers.2":
            outputs, inputs = module.weight.shape
            assert module.weight.abs().max() > 0.8 * (6 / (inputs + outputs)) ** 0.5, name  # Xavier's bound


@pytest.mark.parametrize("kind", KINDS)
def test_initial_boxes_are_those_of_the_authors(kind: str) -> None:
    layers = box_layers(small_detector(kind))
    for name, layer in layers.items():
        first = kind.startswith("deformable_detr") and (kind == "deformable_detr" or ".0." in f".{name}")
        small = first and kind != "deformable_detr_two_stage"
        assert bool(layer.weight.any()) == (kind == "detr"), name
        if kind != "detr":
            size = -2.0 if small else 0.0
            assert layer.bias[:4].tolist() == [0.0, 0.0, size, size], name
    assert layers


def test_two_stages_do_not_start_with_small_boxes_however_they_are_chosen() -> None:
    detector = small_detector("deformable_detr_refined", two_stage=True, two_stage_num_proposals=20, num_queries=None)
    assert not any(layer.bias.any() for layer in box_layers(detector).values())


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_a_prediction_makes_the_loss_nan(kind: str) -> None:
    # An error would stop this rank while the others wait for it; a loss that is not finite skips the update on all.
    detector = small_detector(kind)
    for layer in box_layers(detector).values():
        nn.init.constant_(layer.bias, torch.nan)
    losses = detector(*two_images())
    assert sum(losses.values()).isnan()


def test_an_infinite_logit_makes_the_loss_infinite_or_nan() -> None:
    detector = small_detector("deformable_detr")
    nn.init.constant_(detector.detector.class_embed[0].bias, torch.inf)
    assert not sum(detector(*two_images()).values()).isfinite()


@pytest.mark.parametrize("kind", ["detr", "deformable_detr"])
def test_outputs_in_half_precision_have_the_loss_of_float32(kind: str) -> None:
    detector = small_detector(kind, auxiliary_loss=False)
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}]
    logits = torch.full((1, 20, CLASSES + detector.kind.background), -5.0)
    logits[..., CLASSES:] = 5.0
    logits[0, 7, 1] = 20.0  # certain: its probability is 1 in float16
    boxes = torch.full((1, 20, 4), 0.5)
    expected, found = (
        detector.detector.loss_function(x, labels, x.device, y, detector.config)[1]
        for x, y in ((logits, boxes), (logits.half(), boxes.half()))
    )
    assert expected["loss_ce"] < 0.1
    torch.testing.assert_close(found, expected)


def test_the_loss_is_computed_without_autocast() -> None:
    detector, enabled = small_detector("deformable_detr_two_stage"), []
    loss = detector.detector.loss_function
    hook = ImageLoss.forward
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(
            ImageLoss,
            "forward",
            lambda self, outputs, targets: (
                enabled.append((torch.is_autocast_enabled("cpu"), outputs["logits"].dtype))
                or hook(self, outputs, targets)
            ),
        )
        detector(*two_images())
    assert loss is detector.detector.loss_function
    assert enabled == [(False, torch.float32)] * 2


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_autocast_does_not_round_boxes(kind: str) -> None:
    # The queries of two stages are all pixels, as rounding changes which ones are the best. From column 128 on, the
    # centre of a pixel is not representable in bfloat16.
    queries = "two_stage_num_proposals" if kind.endswith("two_stage") else "num_queries"
    detector = small_detector(kind, **{queries: 1000}).eval()
    for layer in box_layers(detector).values():
        nn.init.zeros_(layer.weight)
        layer.bias.copy_(torch.linspace(-0.3, 0.4, len(layer.bias)))
    images = torch.rand(1, 3, 32, 1280)
    inside = torch.ones(1, 32, 1280, dtype=torch.bool)
    exact = detector.predict(images, inside)[1]
    with torch.autocast("cpu", torch.bfloat16):
        boxes = detector.predict(images, inside)[1]
    assert boxes.dtype == torch.float32
    exact, boxes = (torch.tensor(sorted(x[0].tolist())) for x in (exact, boxes))
    torch.testing.assert_close(boxes, exact, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_copy_computes_boxes_with_its_own_weights() -> None:
    detector = small_detector("d_fine").eval()
    images = list(torch.rand(2, 3, 64, 64))
    expected = detector(images)[0]["boxes"]
    copied = copy.deepcopy(detector)
    for layer in box_layers(copied).values():
        nn.init.constant_(layer.bias, 1.0)
    assert torch.equal(detector(images)[0]["boxes"], expected)
    assert not torch.allclose(copied(images)[0]["boxes"], expected, atol=1.0)


@pytest.mark.parametrize("kind", ["deformable_detr_two_stage", "rt_detr", "d_fine"])
@pytest.mark.parametrize("training", [True, False])
def test_small_images_have_fewer_queries(kind: str, training: bool) -> None:
    option, pixels = ("two_stage_num_proposals", 22) if kind.endswith("two_stage") else ("num_queries", 21)
    detector = small_detector(kind, **{option: 30}).train(training)
    images = list(torch.rand(2, 3, 30, 32))
    if training:
        targets = [{"boxes": torch.tensor([[4.0, 5.0, 25.0, 28.0]]), "labels": torch.tensor([2])}] * 2
        losses = detector(images, targets)
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        assert without_gradient(detector) == []
    else:
        assert [len(one["boxes"]) for one in detector(images)] == [pixels * CLASSES] * 2
    assert [len(one["boxes"]) for one in detector.eval()(list(torch.rand(2, 3, 64, 64)))] == [30 * CLASSES] * 2


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
        ({"num_querys": 5}, "detr does not take the argument 'num_querys'; did you mean num_queries"),
        ({"decoder_layers": 1}, "decoder_layers = 1 of detr is not allowed; give at least 2"),
        ({"d_model": "wide"}, "detr: .*d_model"),
    ],
)
def test_wrong_arguments_are_rejected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformersDetector("detr", small_backbone(3), num_classes=CLASSES, **arguments)


@pytest.mark.parametrize("name", ["num_feature_levels", "feat_strides", "backbone_config"])
def test_arguments_that_follow_from_the_backbone_are_rejected(name: str) -> None:
    with pytest.raises(ValueError, match=f"rt_detr does not take the argument '{name}'"):
        small_detector("rt_detr", **{name: 1})


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_without_effect_are_refused(kind: str) -> None:
    names = set(type(small_detector(kind).config).__annotations__)
    refused = {*WITHOUT_EFFECT, *KINDS[kind].without_effect}
    if "two_stage" in names:
        refused.add("num_queries" if kind.endswith("two_stage") else "two_stage_num_proposals")
    assert len(refused & names) > 5
    for name in refused & names:
        with pytest.raises(ValueError, match=f"does not take the argument '{name}'"):
            small_detector(kind, **{name: 1})


def test_the_weight_of_the_class_loss_is_that_of_the_config() -> None:
    images, targets = two_images()
    for kind, default in (("conditional_detr", 2), ("dab_detr", 1)):
        plain, larger = (small_detector(kind, cls_loss_coefficient=weight) for weight in (None, 3 * default))
        torch.manual_seed(1)
        expected = plain(images, targets)
        torch.manual_seed(1)
        torch.testing.assert_close(larger(images, targets)["ce"], 3 * expected["ce"])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("deformable")])
def test_deformable_detr_matches_with_the_class_cost_of_the_authors(kind: str) -> None:
    assert small_detector(kind).config.class_cost == 2


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("detr", "num_queries", 0),
        ("rt_detr", "num_queries", 0),
        ("deformable_detr", "num_feature_levels", 2),
        ("deformable_detr_two_stage", "two_stage_num_proposals", 0),
    ],
)
def test_numbers_that_give_no_detector_are_refused(kind: str, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} of {kind} = {value} must be at least"):
        small_detector(kind, **{name: value})


@pytest.mark.parametrize("kind", ["detr", "deformable_detr_two_stage", "rt_detr"])
@torch.no_grad()
def test_all_queries_contain_the_best_boxes(kind: str) -> None:
    detector = small_detector(kind).eval()
    images = torch.rand(2, 3, 64, 96)
    out, found = AllQueries(detector)(images), detector(list(images))
    assert out.shape == (2, 20, 4 + CLASSES)
    for one, rows in zip(found, out, strict=True):
        torch.testing.assert_close(one["scores"][0], rows[:, 4:].max())
