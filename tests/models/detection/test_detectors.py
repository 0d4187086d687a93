"""Detectors from torchvision: losses and gradients in training, detections in evaluation."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from models import ranks
from models.backbone import DATBackbone, TimmBackbone
from models.detection import DETECTORS, Detector
from models.weights import adapt
from optimizer import parameter_groups
from tests.models.detection.small import small_arguments, small_backbone
from tests.models.small import SMALL, without_gradient

REGIONS = {"channels": 16, "hidden": 16, "samples": 16, "proposals": 20, "detection": {"score_thresh": 0.0}}
TINY = {
    "retinanet": {"channels": 16, "anchor_scale": 2.0, "score_threshold": 0.0},
    "mask_rcnn": REGIONS,
    "cascade": REGIONS,
}
OURS = [pytest.param(name, id=name) for name in TINY]
TARGETS = [
    {
        "boxes": torch.tensor([[4.0, 5, 30, 40], [20, 20, 40, 60]]),
        "labels": torch.tensor([0, 2]),
        "masks": torch.ones(2, 64, 48, dtype=torch.uint8),
    },
    {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.long),
        "masks": torch.zeros(0, 60, 64, dtype=torch.uint8),
    },
]


def build(name: str, *, timm: bool = False) -> Detector:
    kind = DETECTORS[name]
    torch.manual_seed(0)
    if timm:
        backbone = TimmBackbone("resnet18", out_indices=range(-kind.maps, 0))
    else:
        options = {**SMALL, "stage_spec": ["N", "N", "D", "D"]}
        backbone = DATBackbone(**options, out_indices=range(4 - kind.maps, 4))
    return kind.build(backbone, num_classes=3, **TINY[name])


def build_any(name: str, classes: int = 3, **backbone: int) -> Detector:
    kind, arguments = DETECTORS[name], TINY[name] if name in TINY else small_arguments(name)
    torch.manual_seed(0)
    return kind.build(small_backbone(*range(4 - kind.maps, 4), **backbone), num_classes=classes, **arguments)


def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 64, 48, generator=generator), torch.randn(3, 60, 64, generator=generator)]


@pytest.mark.parametrize("name", OURS)
def test_losses_are_finite_and_train_every_parameter(name: str) -> None:
    detector = build(name)
    losses = detector(images(), TARGETS)
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert without_gradient(detector) == []


@pytest.mark.parametrize("name", DETECTORS)
def test_ranks_with_and_without_objects_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise ranks would wait for each other: for a collective, for a gradient, or for a loss to be averaged.
    detector, losses, means = build_any(name), [], []
    for targets in (TARGETS, TARGETS[1:] * 2):
        means.append(Mock(side_effect=torch.Tensor.float))
        monkeypatch.setattr(ranks, "mean_over_ranks", means[-1])
        detector.zero_grad()
        losses.append(detector(images(), targets))
        assert all(loss.isfinite() for loss in losses[-1].values())
        sum(losses[-1].values()).backward()
        assert without_gradient(detector) == []
    assert list(losses[0]) == list(losses[1])
    assert means[0].call_count == means[1].call_count


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("timm", [False, True], ids=["dat", "resnet18"])
def test_detections_lie_in_their_image_and_are_sorted(name: str, timm: bool) -> None:
    detector = build(name, timm=timm).eval()
    with torch.inference_mode():
        found = detector(images())
    for image, one in zip(images(), found, strict=True):
        assert len(one["boxes"]) == len(one["labels"]) == len(one["scores"]) > 0
        assert (one["scores"].diff() <= 0).all()
        assert set(one["labels"].tolist()) <= {0, 1, 2}
        assert (one["boxes"].amin(0) >= 0).all()
        assert (one["boxes"].amax(0)[2:] <= torch.tensor(image.shape[:0:-1])).all()
        assert ("masks" in one) == DETECTORS[name].masks


@pytest.mark.parametrize("name", DETECTORS)
def test_images_are_padded_so_that_the_coarsest_map_covers_them(name: str) -> None:
    detector, maps = build_any(name, patch_size=8, use_conv_patches=False), []
    detector.backbone.register_forward_hook(lambda _module, _images, found: maps.extend(found))
    target = {**TARGETS[0], "masks": torch.ones(2, 96, 96, dtype=torch.uint8)}
    losses = detector([torch.rand(3, 96, 96)] * 2, [target] * 2)
    assert all(loss.isfinite() for loss in losses.values())
    assert detector.backbone.strides[-1] == 64
    assert maps[-1].shape[-2:] == (2, 2)


@pytest.mark.parametrize("name", DETECTORS)
def test_weights_of_other_classes_do_not_set_what_depends_on_them(name: str) -> None:
    detector, more = build_any(name), build_any(name, classes=5)
    own, given = detector.state_dict(), {key: x + 1 for key, x in more.state_dict().items()}
    sized = {key for key, x in given.items() if x.shape != own[key].shape}
    assert sized
    as_many = {key: x + 1 for key, x in own.items()}
    for weights, known in ((given, []), (as_many, ["cat", "ant", "dog"])):
        state, report = adapt(weights, detector, classes=["ant", "cat", "dog"], names=known)
        assert set(report.of_other_classes) == sized
        assert all(torch.equal(state[key], own[key]) for key in sized)
        assert all(torch.equal(state[key], weights[key]) for key in report.loaded)
        assert all(key in "\n".join(report.lines()) for key in sized)
        detector.load_state_dict(state)
    for known in ([], ["ant", "cat", "dog"]):
        state, report = adapt(as_many, detector, classes=["ant", "cat", "dog"], names=known)
        assert not report.of_other_classes
        assert all(torch.equal(state[key], as_many[key]) for key in sized)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_built_on_the_meta_device_equals_the_one_whose_weights_it_loads(name: str) -> None:
    detector = build_any(name).eval()
    with torch.device("meta"):
        other = build_any(name).eval()
    other.load_state_dict(detector.state_dict(), assign=True)
    with torch.inference_mode():
        torch.testing.assert_close(other(images()), detector(images()))


def test_weights_of_a_detector_on_more_maps_start_another() -> None:
    weights, target = build_any("mask_rcnn").state_dict(), build_any("retinanet")
    state, report = adapt(weights, target)
    assert torch.equal(state["backbone.norms.1.norm.weight"], weights["backbone.norms.1.norm.weight"])
    assert "backbone.norms.0.norm.weight" in report.left_out
    assert set(report.new) == {name for name in state if not name.startswith("backbone.")}


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_check_the_number_of_maps_and_need_targets_in_training(name: str) -> None:
    kind, arguments = DETECTORS[name], TINY[name] if name in TINY else small_arguments(name)
    more = range(4) if kind.maps < 4 else range(1, 4)
    with pytest.raises(ValueError, match=f"uses {kind.maps} feature map.*; the backbone gives those of strides"):
        kind.build(small_backbone(*more), num_classes=3, **arguments)
    detector = build_any(name)
    assert detector.maps == kind.maps
    with pytest.raises(ValueError, match="a detector in training mode needs targets"):
        detector(images())


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("retinanet", "anchor_scale", 0.0),
        ("retinanet", "score_threshold", 1.5),
        ("retinanet", "nms_threshold", -0.1),
        ("retinanet", "channels", 0),
        ("retinanet", "detections", 0),
        ("retinanet", "norm_groups", 5),
        ("mask_rcnn", "proposals", 0),
        ("cascade", "anchor_scale", -8.0),
        ("dino", "num_feature_levels", 2),
        ("dino", "decoder_layers", 0),
        ("dino", "num_queries", 0),
        ("dino", "denoising", -1),
        ("dino", "label_noise", 2.5),
        ("dino", "box_noise", -1.0),
        ("dino", "decoder_attention_heads", 5),
        ("co_detr", "positive_queries", 0),
    ],
)
def test_values_out_of_range_are_refused(name: str, argument: str, value: float) -> None:
    kind = DETECTORS[name]
    arguments = {**(TINY[name] if name in TINY else small_arguments(name)), argument: value}
    with pytest.raises(ValueError, match=f"{argument} = {value}"):
        kind.build(small_backbone(*range(4 - kind.maps, 4)), num_classes=3, **arguments)


@torch.no_grad()
def test_a_cascade_without_proposals_detects_nothing() -> None:
    detector = build("cascade").eval()
    maps = detector.neck(detector.backbone(torch.rand(1, 3, 64, 64)))
    (found,), _ = detector.roi_heads(maps, [torch.zeros(0, 4)], [(64, 64)])
    assert found["boxes"].shape == (0, 4)
    assert found["masks"].shape == (0, 1, 28, 28)


def test_layers_of_a_detector_are_those_of_its_backbone_below_its_head() -> None:
    detector = build("retinanet")
    groups = parameter_groups(detector, weight_decay=0.1, layer_decay=0.5)
    scale = {id(x): group["lr_scale"] for group in groups for x in group["params"]}
    scales = {name: scale[id(x)] for name, x in detector.named_parameters()}
    assert all(scales[name] == 1 for name in scales if not name.startswith("backbone."))
    classifier = parameter_groups(detector.backbone, weight_decay=0.1, layer_decay=0.5)
    own = {id(x): group["lr_scale"] for group in classifier for x in group["params"]}
    assert all(scales[f"backbone.{name}"] == own[id(x)] for name, x in detector.backbone.named_parameters())
    with pytest.raises(ValueError, match=r"TRAIN.LAYER_DECAY: TimmBackbone does not define its layers"):
        parameter_groups(build("retinanet", timm=True), weight_decay=0.1, layer_decay=0.5)


def test_classes_taken_for_new_names_are_reported() -> None:
    detector = build_any("retinanet")
    weights = detector.state_dict()
    report = adapt(weights, detector, classes=["ant", "bee", "cat"], names=["x", "y", "z"])[1]
    says = "classes taken for new names of those of the weights: x -> ant, y -> bee, z -> cat"
    assert says in report.lines()
    for names in ([], ["ant", "bee", "cat"], ["x", "y", "z", "ant"]):
        assert not adapt(weights, detector, classes=["ant", "bee", "cat"], names=names)[1].renamed
