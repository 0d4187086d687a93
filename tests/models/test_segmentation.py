"""Segmenters: shapes, parameter names, losses, and batch norms over processes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from config import load_config
from models.backbone import DATBackbone, TimmBackbone
from models.build import build_model
from models.segmentation import IGNORED, SEGMENTERS, Segmenter
from models.segmentation.parts import BatchNorm, cross_entropy
from models.weights import adapt
from tests.launched import run_in_processes
from tests.models.small import SMALL, without_gradient
from tests.runs import ROOT
from training.weight_sets import count_classes, pick_weights

WB = ("weight", "bias")
SMALL_QUERIES = {
    **{"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "dim_feedforward": 32, "train_num_points": 32},
    **{"encoder_feedforward_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 6},
}
ARGS: dict[str, dict[str, Any]] = {
    "fpn": {"channels": 8, "pyramid_channels": 8},
    "upernet": {"channels": 8, "auxiliary_channels": 8},
    "mask2former": SMALL_QUERIES,
}


def small_backbone() -> DATBackbone:
    return DATBackbone(**SMALL, stage_spec=list("NNDD"))


def small(name: str, classes: int = 3, **options: Any) -> Segmenter:
    torch.manual_seed(0)
    return SEGMENTERS[name](small_backbone(), num_classes=classes, **{**ARGS[name], **options})


@pytest.mark.parametrize("name", SEGMENTERS)
def test_any_image_size_gives_logits_and_all_gradients(name: str) -> None:
    model = small(name)
    images, labels = torch.rand(2, 3, 50, 70), torch.randint(3, (2, 50, 70))
    labels[0] = IGNORED
    losses = model(images, labels)
    sum(losses.values()).backward()
    assert without_gradient(model) == []
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    with torch.inference_mode():
        assert model.eval()(images).shape == (2, 3, 50, 70)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters_run_on_timm_backbones(name: str) -> None:
    backbone = TimmBackbone("test_resnet", out_indices=(-4, -3, -2, -1))
    model = SEGMENTERS[name](backbone, num_classes=3, **ARGS[name]).eval()
    assert model(torch.rand(1, 3, 64, 32)).shape == (1, 3, 64, 32)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_the_number_of_classes_is_a_keyword_as_for_detectors(name: str) -> None:
    with pytest.raises(TypeError, match="positional"):
        SEGMENTERS[name](small_backbone(), 3, **ARGS[name])


def test_backbones_with_other_strides_are_rejected() -> None:
    backbone = DATBackbone(**SMALL, stage_spec=list("NNDD"), out_indices=(1, 3))
    with pytest.raises(ValueError, match=r"needs maps of four strides.*; the backbone gives 8, 32"):
        SEGMENTERS["fpn"](backbone, num_classes=3)


def test_parameter_names_are_those_of_published_weights() -> None:
    names = {"fpn": small("fpn").state_dict(), "upernet": small("upernet").state_dict()}
    pyramid = {f"neck.{kind}_convs.{i}.conv.{part}" for kind in ("lateral", "fpn") for i in range(4) for part in WB}
    assert pyramid <= names["fpn"].keys()
    assert {f"decode_head.scale_heads.3.{i}.bn.running_mean" for i in (0, 2, 4)} <= names["fpn"].keys()
    assert "decode_head.scale_heads.0.1.conv.weight" not in names["fpn"]
    assert {f"decode_head.psp_modules.{i}.1.conv.weight" for i in range(4)} <= names["upernet"].keys()
    parts = ("bottleneck", "fpn_bottleneck", "lateral_convs.2", "fpn_convs.2")
    assert {f"decode_head.{part}.conv.weight" for part in parts} <= names["upernet"].keys()
    assert {f"auxiliary_head.{part}.weight" for part in ("convs.0.conv", "conv_seg")} <= names["upernet"].keys()


@pytest.mark.parametrize("name", ["fpn", "upernet"])
def test_all_entries_of_mmsegmentation_files_load(name: str) -> None:
    theirs = {key: torch.rand_like(x) if x.is_floating_point() else x for key, x in small(name).state_dict().items()}
    heads = {"fpn": {"neck", "decode_head"}, "upernet": {"decode_head", "auxiliary_head"}}[name]
    assert {key.partition(".")[0] for key in theirs} == {"backbone"} | heads
    file = {"meta": {"iter": 160000, "CLASSES": ["wall", "sky", "tree"]}, "state_dict": theirs}
    segmenter = small(name)
    state, report = adapt(pick_weights(file, "file.pth", segmenter).weights, segmenter)
    assert not report.new
    assert not report.left_out
    assert set(report.loaded) == theirs.keys()
    assert all(torch.equal(state[key], x) for key, x in theirs.items())


@pytest.mark.parametrize(
    ("name", "layers", "buffers"),
    [
        ("fpn", ["decode_head.conv_seg"], set()),
        ("upernet", ["decode_head.conv_seg", "auxiliary_head.conv_seg"], set()),
        ("mask2former", ["decode_head.class_predictor"], {"decode_head.criterion.empty_weight"}),
    ],
)
def test_fine_tuning_for_other_classes_resets_the_classifiers(name: str, layers: list[str], buffers: set[str]) -> None:
    segmenter = small(name, 5)
    own = segmenter.state_dict()
    state, report = adapt(small(name, 3).state_dict(), segmenter)
    new = {f"{layer}.{part}" for layer in layers for part in WB}
    assert {*report.reinitialised, *report.of_other_classes} == new
    assert set(report.left_out) == new | buffers
    assert len(report.loaded) + len(new | buffers) == len(state)
    assert all(torch.equal(state[entry], own[entry]) for entry in new | buffers)
    segmenter.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "layer"), [("upernet", "auxiliary_head.conv_seg"), ("mask2former", "decode_head.class_predictor")]
)
def test_rows_that_cannot_be_selected_by_name_are_new_for_other_classes(name: str, layer: str) -> None:
    given = {key: torch.rand_like(x) if x.is_floating_point() else x for key, x in small(name).state_dict().items()}
    segmenter, new = small(name), [f"{layer}.{part}" for part in WB]
    own = segmenter.state_dict()
    for classes in (["tree", "sky", "wall"], ["wall", "sky", "road"]):
        state, report = adapt(given, segmenter, classes=classes, names=["wall", "sky", "tree"])
        assert report.of_other_classes == new
        assert all(torch.equal(state[entry], own[entry]) for entry in new)
        assert any(line.startswith("newly initialised, as the weights are of other classes") for line in report.lines())
    state, _ = adapt(given, segmenter, classes=["wall", "sky", "tree"], names=["wall", "sky", "tree"])
    assert all(torch.equal(state[entry], given[entry]) for entry in new)


def test_mask2former_keeps_its_classifier_for_the_same_number_of_classes() -> None:
    given = small("mask2former", 3).state_dict()
    head = "decode_head.class_predictor.weight"
    given[head] = torch.rand_like(given[head])
    segmenter = small("mask2former", 3)
    state, report = adapt(given, segmenter)
    assert len(report.loaded) == len(state)
    assert torch.equal(state[head], given[head])
    # The last row is "no object": it must not be taken for a class.
    assert count_classes(given, segmenter) in (0, 3)


# The configs of 80,000 updates have the networks of those of 40,000.
CONFIGS = [path for path in sorted((ROOT / "configs" / "segmentation").glob("*.yaml")) if "_80k" not in path.stem]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains_every_parameter(path: Path) -> None:
    config = load_config(path)
    config.MODEL.DAT.dims = [4 * heads for heads in config.MODEL.DAT.heads]
    config.MODEL.DAT.dim_stem = config.MODEL.DAT.dims[0]
    config.MODEL.SEGMENTER.ARGS.update(ARGS[config.MODEL.SEGMENTER.NAME])
    torch.manual_seed(0)
    model = build_model(config)
    losses = model(torch.rand(2, 3, 64, 64), torch.randint(11, (2, 64, 64)))
    sum(losses.values()).backward()
    assert without_gradient(model) == []


def test_the_loss_is_the_mean_over_all_pixels_with_zero_for_ignored_ones() -> None:
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    labels[0, :2] = IGNORED
    each = F.cross_entropy(logits, labels.where(labels != IGNORED, 0), reduction="none")
    torch.testing.assert_close(cross_entropy(logits, labels), (each * (labels != IGNORED)).sum() / 32)


def test_wrong_options_are_named() -> None:
    with pytest.raises(TypeError, match="chanels"):
        small("fpn", chanels=8)
    with pytest.raises(
        ValueError, match="mask2former does not take the argument 'num_querys'; did you mean num_queries"
    ):
        small("mask2former", num_querys=8)
    with pytest.raises(ValueError, match="mask2former does not take the argument 'ignore_value'"):
        small("mask2former", ignore_value=0)
    with pytest.raises(ValueError, match=r"mask2former: .*'hidden_dim'"):
        small("mask2former", hidden_dim="wide")


def norm_batch(norm: nn.BatchNorm2d, part: slice) -> dict[str, torch.Tensor]:
    """Return the outputs, gradients and statistics of a step on a part of a batch."""
    torch.manual_seed(1)
    x, wanted = torch.randn(4, 2, 3, 3, requires_grad=True), torch.randn(4, 2, 3, 3)
    y = norm(x[part])
    (y * wanted[part]).sum().backward()
    grads = {"x": x.grad[part], "weight": norm.weight.grad, "bias": norm.bias.grad}
    return {"y": y.detach(), **grads, "mean": norm.running_mean, "var": norm.running_var}


def norm_in_process(rank: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(norm_batch(BatchNorm(2), slice(2 * rank, 2 * rank + 2)), folder / str(rank))
    dist.destroy_process_group()


@pytest.mark.xdist_group("serial")
def test_batch_norm_statistics_cover_all_processes(tmp_path: Path) -> None:
    run_in_processes(norm_in_process, 2, tmp_path)
    parts = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    whole = norm_batch(nn.BatchNorm2d(2), slice(None))
    for name in ("y", "x"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name])
    for name in WB:
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name])
    for name in ("mean", "var"):
        torch.testing.assert_close(parts[0][name], whole[name])
        assert torch.equal(parts[0][name], parts[1][name])


def test_embeddings_of_queries_and_levels_do_not_decay() -> None:
    model = small("mask2former")
    names = {name for name in model.no_weight_decay() if name.startswith("decode_head.")}
    parts = ("transformer.queries_embedder.", "transformer.queries_features.", "level_embed")
    assert names == {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
    assert len(names) == 4


@pytest.mark.parametrize("name", ["use_auxiliary_loss", "init_std", "init_xavier_std", "ignore_value"])
def test_arguments_of_mask2former_without_effect_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"mask2former does not take the argument '{name}'"):
        small("mask2former", **{name: 1})


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("fpn", "channels", 0),
        ("fpn", "dropout", 1.0),
        ("upernet", "pools", 3),
        ("upernet", "pools", []),
        ("upernet", "pools", [1, 0]),
        ("upernet", "auxiliary_weight", -1.0),
        ("mask2former", "num_queries", 0),
    ],
)
def test_values_out_of_range_are_refused(name: str, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(argument) + ".* = " + re.escape(repr(value)) + " must be"):
        small(name, **{argument: value})


def test_a_class_map_needs_a_classifier(tmp_path: Path) -> None:
    model = small("mask2former")
    with pytest.raises(ValueError, match="Mask2Former has no classifier to apply a class map to"):
        adapt(model.state_dict(), model, class_map=tmp_path / "map.txt")
