"""Dense models: the interface of their backbone, and weights of classifiers and other dense models."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from models.backbone import DATBackbone, TimmBackbone
from models.contract import input_convs, no_weight_decay, position_tables
from models.dat import DAT
from models.dense import DenseModel
from models.weights import adapt
from tests.models.small import SMALL

OPTIONS = {**SMALL, "stage_spec": ["N", "N", "D", "D"]}


class Headed(DenseModel):
    def __init__(self, backbone: DATBackbone | TimmBackbone, head: str = "head") -> None:
        super().__init__(backbone)
        self.add_module(head, nn.Conv2d(backbone.channels[-1], 2, 1))


def test_dense_models_expose_the_interface_of_their_backbone() -> None:
    model = Headed(DATBackbone(**OPTIONS))
    names = dict(model.named_parameters())
    assert position_tables(model).keys() | no_weight_decay(model) <= names.keys()
    assert position_tables(model)
    assert no_weight_decay(model)
    assert input_convs(model) == {"backbone.patch_proj.0"}


@pytest.mark.parametrize("kind", ["dat", "timm", "dense"])
def test_the_report_covers_all_entries(kind: str) -> None:
    if kind == "timm":
        model, weights = (
            Headed(TimmBackbone("resnet18", out_indices=(-3, -2, -1))),
            timm.create_model("resnet18").state_dict(),
        )
        unused = {"fc.weight", "fc.bias"}
    else:
        model = Headed(DATBackbone(**OPTIONS))
        other = DAT(**OPTIONS) if kind == "dat" else Headed(DATBackbone(**OPTIONS), "other")
        weights = other.state_dict()
        unused = {name for name in weights if name.startswith(("cls_", "other."))}
        assert unused
    state, report = adapt(weights, model)
    model.load_state_dict(state)
    assert set(report.left_out) == unused
    new = {name for name in state if name.startswith("head.") or (kind == "dat" and ".norms." in name)}
    assert set(report.new) == new
    assert len(report.loaded) + len(new) == report.entries
    prefix = {"dat": "backbone.", "timm": "backbone.body.model.", "dense": ""}[kind]
    for name in weights.keys() - unused:
        assert torch.equal(state[f"{prefix}{name}"], weights[name])


def test_weights_of_another_architecture_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"another architecture: .*backbone\."):
        adapt(
            DAT(**OPTIONS).state_dict(),
            Headed(DATBackbone(**{**OPTIONS, "dims": [16, 32, 64, 128]})),
        )
