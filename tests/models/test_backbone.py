"""Backbones for dense prediction: strides, channels, parameter names and weights."""

from __future__ import annotations

import pytest
import torch

from models.backbone import DATBackbone, TimmBackbone
from models.dat import DAT
from models.weights import adapt
from tests.models.small import SMALL, without_gradient

OPTIONS = {**SMALL, "stage_spec": ["N", "N", "D", "D"]}


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_maps_have_the_reported_strides_and_channels(size: tuple[int, int]) -> None:
    fine = DATBackbone(**{**OPTIONS, "patch_size": 2})
    for backbone in (DATBackbone(**OPTIONS), fine, TimmBackbone("resnet18", out_indices=(1, 2, 3, 4))):
        maps = backbone.eval()(torch.rand(1, 3, *size))
        assert [m.shape[1] for m in maps] == backbone.channels
        assert [tuple(m.shape[-2:]) for m in maps] == [tuple(s // stride for s in size) for stride in backbone.strides]


def test_parameter_names_are_those_of_the_classifier_plus_norms() -> None:
    classifier, backbone = DAT(**OPTIONS).state_dict(), DATBackbone(**OPTIONS).state_dict()
    shared = {name for name in classifier if not name.startswith("cls_")}
    assert backbone.keys() - shared == {f"norms.{i}.norm.{kind}" for i in range(4) for kind in ("weight", "bias")}
    assert shared <= backbone.keys()


def test_backbones_with_fewer_maps_train_all_their_parameters() -> None:
    backbone = DATBackbone(**OPTIONS, out_indices=(1, 3))
    maps = backbone(torch.rand(2, 3, 64, 64))
    assert [m.shape[1] for m in maps] == backbone.channels
    torch.stack([m.square().sum() for m in maps]).sum().backward()
    assert without_gradient(backbone) == []


def test_unknown_stages_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"out_indices = \[4\] must name"):
        DATBackbone(**OPTIONS, out_indices=(4,))
    assert DATBackbone(**OPTIONS, out_indices=(-1, -3)).out_indices == (1, 3)


def test_stages_after_the_last_map_are_neither_built_nor_loaded() -> None:
    backbone, weights = DATBackbone(**OPTIONS, out_indices=(1,)), DAT(**OPTIONS).state_dict()
    assert not any(name.startswith(("stages.2.", "down_projs.1.")) for name in backbone.state_dict())
    state, report = adapt(weights, backbone)
    assert set(report.new) == {"norms.1.norm.weight", "norms.1.norm.bias"}
    assert all(torch.equal(state[name], weights[name]) for name in state.keys() - set(report.new))
