"""Backbones for transformers: building, saving, loading and the maps that they return."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoBackbone, AutoConfig, TimmBackboneConfig

from models import hugging_face
from models.dat import DAT
from models.weights import adapt
from tests.models.small import SMALL, without_gradient

TINY = {**SMALL, "stage_spec": ["N", "S", "D", "D"], "use_dwc_mlps": [True] * 4, "use_lpus": [True] * 4}


def config(**arguments: object) -> hugging_face.DATConfig:
    return hugging_face.DATConfig(options=TINY, **arguments)


def test_auto_classes_build_and_save_and_load_backbones_with_norms(tmp_path: Path) -> None:
    model = AutoBackbone.from_config(config(out_features=["stage2", "stage4"])).eval()
    assert isinstance(model, hugging_face.DATBackbone)
    assert model.channels == [16, 64]
    assert model.out_indices == [1, 3]
    for norm in (1, 3):
        torch.nn.init.normal_(model.backbone.norms[norm].norm.weight)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {"backbone.norms.1.norm.weight", "backbone.patch_proj.0.weight"} <= saved.keys()

    again = hugging_face.DATBackbone.from_pretrained(tmp_path).eval()  # AutoBackbone does not load from folders
    assert AutoConfig.from_pretrained(tmp_path).options == again.config.options
    assert all(torch.equal(value, saved[name]) for name, value in again.state_dict().items())
    images = torch.rand(1, 3, 70, 107)
    with torch.no_grad():
        maps, expected = again(images).feature_maps, model(images).feature_maps
    assert all(torch.equal(x, y) for x, y in zip(maps, expected, strict=True))


def test_maps_have_norms_and_hidden_states_do_not() -> None:
    model = AutoBackbone.from_config(config(out_indices=[0, 2]))
    output = model(torch.rand(2, 3, 64, 64), output_hidden_states=True)
    assert [tuple(x.shape) for x in output.feature_maps] == [(2, 8, 16, 16), (2, 32, 4, 4)]
    assert [x.shape[1] for x in output.hidden_states] == [8, 16, 32]  # the fourth stage is not built
    assert torch.equal(model.backbone.norms[2](output.hidden_states[2]), output.feature_maps[1])
    assert model(torch.rand(1, 3, 64, 64), return_dict=False)[0][0].shape == (1, 8, 16, 16)
    sum(x.square().mean() for x in output.feature_maps).backward()
    assert without_gradient(model) == []


def test_initial_weights_equal_those_of_the_network() -> None:
    torch.manual_seed(0)
    expected = hugging_face.backbone.DATBackbone(**TINY).state_dict()
    torch.manual_seed(0)
    state = AutoBackbone.from_config(config(out_indices=[0, 1, 2, 3])).backbone.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_weights_of_a_classifier_load() -> None:
    weights = DAT(**TINY).state_dict()
    model = AutoBackbone.from_config(config(out_indices=[0, 1, 2, 3]))
    state, report = adapt(weights, model.backbone)
    model.backbone.load_state_dict(state)
    assert all(name.startswith("norms.") for name in report.new)
    assert torch.equal(model.backbone.patch_proj[0].weight, weights["patch_proj.0.weight"])


def test_architectures_are_the_published_names() -> None:
    full = hugging_face.DATConfig(architecture="dat_cvpr22_base.in1k_384")
    assert full.options["window_sizes"] == [12, 12, 12, 12]
    assert full.out_features == ["stage4"]
    assert full.hidden_size == 1024
    with pytest.raises(ValueError, match=r"there is no published model 'dat_tinny'; did you mean dat_tiny\?"):
        hugging_face.DATConfig(architecture="dat_tinny")


def test_transformers_timm_backbone_finds_the_names() -> None:
    model = AutoBackbone.from_config(TimmBackboneConfig(backbone="dat_tiny", out_indices=[1, 2, 3]))
    maps = model(torch.rand(1, 3, 64, 64)).feature_maps
    assert [x.shape[1] for x in maps] == model.channels == [128, 256, 512]


def test_the_config_may_ask_for_hidden_states() -> None:
    images = torch.rand(1, 3, 64, 64)
    assert AutoBackbone.from_config(config())(images).hidden_states is None
    model = AutoBackbone.from_config(config(output_hidden_states=True))
    assert len(model(images).hidden_states) == 4
    assert model(images, output_hidden_states=False).hidden_states is None
