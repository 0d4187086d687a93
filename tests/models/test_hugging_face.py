"""Backbones for transformers: building, saving, loading and the maps that they return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoBackbone,
    AutoConfig,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    TimmBackboneConfig,
)

from models import hugging_face
from models.dat import DAT
from models.weights import adapt
from tests.models.small import SMALL, without_gradient

TINY = {**SMALL, "stage_spec": ["N", "S", "D", "D"], "use_dwc_mlps": [True] * 4, "use_lpus": [True] * 4}


def config(options: dict[str, Any] = TINY, **arguments: object) -> hugging_face.DATConfig:
    return hugging_face.DATConfig(options=options, **arguments)


def detector_config(options: dict[str, Any]) -> DeformableDetrConfig:
    layers = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    return DeformableDetrConfig(
        backbone_config=config(options, out_features=["stage2", "stage3", "stage4"]),
        d_model=32,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        **layers,
    )


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


@pytest.fixture
def uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the memory of entries that a file lacks hold NaN, where transformers makes it: in `torch.empty_like`."""
    empty_like = torch.empty_like

    def filled(*arguments: Any, **options: Any) -> Tensor:
        tensor = empty_like(*arguments, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(-1)

    monkeypatch.setattr(torch, "empty_like", filled)


def check_initialised(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that tensors have values like others that were drawn with other random numbers."""
    assert tensors
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or expected[name].unique().numel() <= 2:  # indices, masks, constants, one-hot
            assert torch.equal(tensor, expected[name]), name
        else:
            assert tensor.isfinite().all(), name
            assert 0.1 < tensor.abs().max() / expected[name].abs().max() < 10, name


@pytest.mark.usefixtures("uninitialised_memory")
def test_entries_that_a_file_lacks_are_initialised(tmp_path: Path) -> None:
    options = {**TINY, "depths": [1, 2, 3, 2], "stage_spec": ["N", "LS", "EQP", "DX"]}
    scaled = {**options, "layer_scale_values": [0.1] * 4, "fixed_pes": [False] * 3 + [True]}
    hugging_face.DATBackbone(config({**options, "use_lpus": [False] * 4}, out_indices=[0])).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    larger = config(scaled, out_indices=[0, 1, 2, 3])
    state = hugging_face.DATBackbone.from_pretrained(tmp_path, config=larger).state_dict()
    assert all(torch.equal(state[name], value) for name, value in saved.items())
    new = {name: value for name, value in state.items() if name not in saved}
    assert {"backbone.stages.0.layer_scales.0.weight", "backbone.stages.0.local_perception_units.0.bias"} <= new.keys()
    check_initialised(new, hugging_face.DATBackbone(larger).state_dict())


@pytest.mark.usefixtures("uninitialised_memory")
def test_tables_and_masks_of_another_size_are_initialised(tmp_path: Path) -> None:
    hugging_face.DATBackbone(config()).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    larger = config({**TINY, "img_size": 128})
    model = hugging_face.DATBackbone.from_pretrained(tmp_path, config=larger, ignore_mismatched_sizes=True)
    state = model.state_dict()
    new = {name: value for name, value in state.items() if value.shape != saved[name].shape}
    assert {name.rpartition(".")[2] for name in new} == {"attn_mask", "rpe_table"}
    check_initialised(new, hugging_face.DATBackbone(larger).state_dict())
    assert all(torch.equal(state[name], saved[name]) for name in state if name not in new)


@pytest.mark.usefixtures("uninitialised_memory")
def test_the_backbone_of_a_detector_is_initialised_and_recomputes_activations(tmp_path: Path) -> None:
    options = {**TINY, "stage_spec": ["E", "S", "D", "D"], "heads": [2, 2, 4, 8]}
    trained = DeformableDetrForObjectDetection(detector_config(options))
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter)
    trained.save_pretrained(tmp_path)
    saved = trained.state_dict()
    larger = detector_config({**options, "img_size": 128})
    model = DeformableDetrForObjectDetection.from_pretrained(tmp_path, config=larger, ignore_mismatched_sizes=True)
    state = model.state_dict()
    new = {name: value for name, value in state.items() if value.shape != saved[name].shape}
    assert {name.rpartition(".")[2] for name in new} == {"attn_mask", "rpe_table"}
    check_initialised(new, DeformableDetrForObjectDetection(larger).state_dict())
    assert all(torch.equal(state[name], value) for name, value in saved.items() if name not in new)

    model.activation_checkpointing_enable()
    stages = [module for module in model.modules() if hasattr(module, "use_checkpoint")]
    assert [stage.use_checkpoint for stage in stages] == [True] * 4


def test_transformers_switches_the_recomputation_of_activations() -> None:
    model = AutoBackbone.from_config(config())
    assert not model.gradient_checkpointing
    model.activation_checkpointing_enable()
    assert model.gradient_checkpointing
    assert all(stage.use_checkpoint for stage in model.backbone.stages)
    model.activation_checkpointing_disable()
    assert not any(stage.use_checkpoint for stage in model.backbone.stages)


def test_the_returned_maps_may_be_changed_to_others_with_a_norm() -> None:
    model, images = AutoBackbone.from_config(config(out_features=["stage2", "stage3"])), torch.rand(1, 3, 64, 64)
    expected = model(images).feature_maps[0]
    model.out_features = ["stage2"]
    output = model(images, output_hidden_states=True)
    assert torch.equal(output.feature_maps[0], expected)
    assert (len(output.feature_maps), model.channels, len(output.hidden_states)) == (1, [16], 2)
    for absent in (["stage1", "stage2"], ["stage4"]):
        model.out_features = absent
        with pytest.raises(ValueError, match=r"out_indices = .* must be among those .* built with, \[1, 2\]"):
            model(images)
    assert len(AutoBackbone.from_config(config(out_indices=[-3, -1]))(images).feature_maps) == 2


def test_a_resized_backbone_is_saved_with_its_size(tmp_path: Path) -> None:
    model, images = AutoBackbone.from_config(config()).eval(), torch.rand(1, 3, 128, 96)
    model.set_input_size((128, 96))
    model.save_pretrained(tmp_path)
    again = hugging_face.DATBackbone.from_pretrained(tmp_path).eval()
    assert again.config.options["img_size"] == [128, 96]
    with torch.no_grad():
        assert torch.equal(again(images).feature_maps[0], model(images).feature_maps[0])
    with pytest.raises(ValueError, match="img_size = 16 leaves no pixel"):
        model.set_input_size(16)
    assert model.config.options["img_size"] == [128, 96]
