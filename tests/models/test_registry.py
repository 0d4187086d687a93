"""The registered models do what timm's own tests require of a model."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config, resolve_model_data_config
from timm.models import get_model_input_config, group_parameters, save_for_hf
from yacs.config import CfgNode

from config import load_config
from data.transforms import eval_transform
from examples import fine_tune
from models.dat import DAT
from models.registry import CONFIGS, ENTRYPOINTS, model_options
from optimizer import parameter_groups
from tests.models.small import SMALL, without_gradient
from tools.complexity import PUBLISHED

ROOT = Path(__file__).resolve().parents[2]
NAMES = list(CONFIGS)
LARGE = ("small", "base")
# Options that make a registered model small; `timm.create_model` accepts options of DAT.
ON = [True] * 4
TINY = {**SMALL, "num_classes": 1000, "stage_spec": ["N", "N", "D", "D"], "use_dwc_mlps": ON, "use_lpus": ON}
LINEAR = "stages.3.mlps.0.linear1.0.weight"


def rgb(height: int = 64, width: int = 64, *, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, height, width)


def test_registered_names_match_the_published_configs() -> None:
    files = [*(ROOT / "configs").glob("dat_*.yaml"), *(ROOT / "configs" / "cvpr22").glob("*.yaml")]
    assert set(CONFIGS.values()) == {path.relative_to(ROOT / "configs").as_posix() for path in files}
    assert set(NAMES) <= set(timm.list_models(module="registry", include_tags=True))
    for name in NAMES:
        config = load_config(ROOT / "configs" / CONFIGS[name])
        assert model_options(name).items() <= config.MODEL.DAT.items(), name
        default = timm.get_pretrained_cfg(name)
        assert default.input_size == (3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE), name
        assert default.crop_pct == (config.TEST.CROP_RATIO if config.TEST.CROP else 1.0), name


def test_the_documentation_lists_every_published_model() -> None:
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    for name, config in CONFIGS.items():
        published = PUBLISHED[load_config(ROOT / "configs" / config).MODEL.NAME]
        (row,) = (line for line in page.splitlines() if f"| `{name}` |" in line)
        assert f"](../configs/{config})" in row
        assert f"| {published.parameters:.2f} M |" in row
        assert published.macs is None or f"| {published.macs} G |" in row


def test_options_of_a_model_may_be_changed() -> None:
    model_options("dat_tiny")["dims"][0] = 96
    assert model_options("dat_tiny")["dims"][0] == 64


def test_timm_preprocesses_images_like_the_trainer() -> None:
    y, x = np.mgrid[:300, :200]
    image = Image.fromarray(np.stack((y * 255 // 300, x * 255 // 200, (x + y) % 256), axis=-1).astype(np.uint8))
    for name in ("dat_tiny.in1k", "dat_base.in1k_384"):
        config = load_config(ROOT / "configs" / CONFIGS[name])
        crop = {"crop": config.TEST.CROP, "crop_ratio": config.TEST.CROP_RATIO, "resize": config.TEST.RESIZE}
        ours = eval_transform(config.image_size, interpolation=config.DATA.INTERPOLATION, **crop)(image)
        cfg = timm.get_pretrained_cfg(name).to_dict()
        theirs = create_transform(**resolve_data_config(pretrained_cfg=cfg), is_training=False)(image)
        assert theirs.shape == ours.shape
        assert (theirs - ours).abs().mean() < 0.01  # one grey level is 0.017


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_forward_and_what_the_default_config_says(name: str) -> None:
    model = timm.create_model(name).eval()
    default, images = model.default_cfg, rgb()
    assert {f"{default['classifier']}.weight", f"{default['first_conv']}.weight"} <= model.state_dict().keys()
    assert default["pool_size"] == tuple(side // 32 for side in default["input_size"][1:])

    features = model.forward_features(images)
    logits = model(images)
    assert features.shape == (1, model.num_features, 2, 2)
    assert logits.shape == (1, 1000)
    assert logits.isfinite().all()
    assert torch.equal(model.forward_head(features), logits)

    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, model.head_hidden_size)
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(images), features)
    model.reset_classifier(7, "max")
    assert model(images).shape == (1, 7)
    assert model.get_classifier().out_features == model.num_classes == 7


@pytest.mark.parametrize("name", NAMES)
def test_backward_gives_every_parameter_a_gradient(name: str) -> None:
    model = timm.create_model(name, num_classes=42)
    logits = model(rgb(batch=2))
    assert logits.shape == (2, 42)
    logits.mean().backward()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert without_gradient(model) == []


@pytest.mark.parametrize("name", NAMES)
def test_features_of_images_of_odd_size(name: str) -> None:
    model = timm.create_model(name, features_only=True)
    info = model.feature_info
    assert info.reduction() == [4, 8, 16, 32]
    maps = model(rgb(70, 107))
    assert [x.shape[1] for x in maps] == info.channels()
    for x, stride in zip(maps, info.reduction(), strict=True):
        assert all(
            out in (side // stride, -(-side // stride)) for side, out in zip((70, 107), x.shape[2:], strict=True)
        )
    sum(x.mean() for x in maps).backward()
    assert without_gradient(model) == []


def test_stages_after_the_last_feature_are_not_built() -> None:
    model = timm.create_model("dat_tiny", features_only=True, out_indices=(-3, 0), **TINY)
    assert model.feature_info.channels() == [16, 8]
    maps = model(rgb())
    assert [x.shape[1:] for x in maps] == [(16, 8, 8), (8, 16, 16)]
    assert not any("stages.2" in name or "cls_" in name for name in model.state_dict())
    sum(x.mean() for x in maps).backward()
    assert without_gradient(model) == []


def test_models_are_created_on_the_given_device_in_the_given_dtype() -> None:
    model = timm.create_model("dat_tiny", device="meta", dtype=torch.bfloat16, **TINY)
    assert {(parameter.device.type, parameter.dtype) for parameter in model.parameters()} == {("meta", torch.bfloat16)}


@torch.no_grad()
def test_intermediates_are_the_outputs_of_the_stages() -> None:
    model, images = timm.create_model("dat_tiny", **TINY).eval(), rgb()
    features, maps = model.forward_intermediates(images)
    assert torch.equal(features, model.forward_features(images))
    assert [x.shape[1] for x in maps] == SMALL["dims"]
    for indices, expected in ((2, [2, 3]), ([-1, 0], [3, 0]), ((1,), [1])):
        some = model.forward_intermediates(images, indices, intermediates_only=True)
        assert all(torch.equal(x, maps[i]) for x, i in zip(some, expected, strict=True))
    early, some = model.forward_intermediates(images, [0, 1], stop_early=True)
    assert early is some[-1]
    assert torch.equal(early, maps[1])
    normed = model.forward_intermediates(images, norm=True, intermediates_only=True)
    assert torch.equal(normed[-1], features)
    assert torch.equal(normed[-2], maps[-2])
    with pytest.raises(ValueError, match="output_fmt = 'NLC' must be NCHW"):
        model.forward_intermediates(images, output_fmt="NLC")

    assert model.prune_intermediate_layers([0, -2]) == [0, 2]
    assert model.num_features == model.head_hidden_size == 32
    pruned, kept = model.forward_intermediates(images, [0, 2])
    assert torch.equal(kept[0], maps[0])
    assert torch.equal(kept[1], maps[2])
    assert torch.equal(model(images), pruned)


def test_impossible_pooling_is_rejected() -> None:
    with pytest.raises(ValueError, match="global_pool = '' leaves a map, which num_classes = 5 cannot classify"):
        DAT(**{**TINY, "num_classes": 5, "global_pool": ""})
    model = DAT(**TINY)
    with pytest.raises(ValueError, match="global_pool = 'mean' must be one of avg, max, avgmax, ''"):
        model.reset_classifier(5, "mean")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if any(size in n for size in LARGE) else ()) for n in NAMES]
)
def test_the_fine_tuning_example_of_timm_runs(name: str, tmp_path: Path) -> None:
    again = fine_tune.main(name, str(tmp_path), size=64)
    assert again.num_classes == again.get_classifier().out_features == 3
    assert again.default_cfg["tag"] == name.partition(".")[2]
    data = resolve_model_data_config(again)
    assert data["input_size"] == timm.get_pretrained_cfg(name).input_size
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5)
    assert other.get_classifier().out_features == 5


def test_published_files_load_for_other_classes_channels_and_sizes(tmp_path: Path) -> None:
    weights = DAT(**TINY).state_dict()
    published = {"model": weights, "config": CfgNode({"MODEL": {"TYPE": "dat"}}), "epoch": 299}
    torch.save(published, tmp_path / "published.pth")
    load = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "published.pth")}}

    model = timm.create_model("dat_tiny.in1k", **load, **TINY)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    other = timm.create_model("dat_tiny", **load, **{**TINY, "num_classes": 5, "img_size": 96}, in_chans=1)
    state = other.state_dict()
    assert torch.equal(state[LINEAR], weights[LINEAR])
    assert state["stages.3.attns.0.rpe_table"].shape == (8, 5, 5)
    assert torch.allclose(state["patch_proj.0.weight"], weights["patch_proj.0.weight"].sum(1, keepdim=True))
    features = timm.create_model("dat_tiny", features_only=True, **load, **TINY).state_dict()
    assert torch.equal(features[f"model.{LINEAR}"], weights[LINEAR])


def test_fine_tuned_files_keep_their_head_for_equal_classes_only(tmp_path: Path) -> None:
    weights = DAT(**{**TINY, "num_classes": 5}).state_dict()
    torch.save({"format": 1, "model": weights}, tmp_path / "best.pth")
    load = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "best.pth")}}
    model = timm.create_model("dat_tiny", **load, **{**TINY, "num_classes": 5})
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for classes in (0, 7, 1000):
        other = timm.create_model("dat_tiny", **load, **{**TINY, "num_classes": classes})
        assert other.num_classes == classes
        assert torch.equal(other.state_dict()[LINEAR], weights[LINEAR])


@pytest.mark.parametrize("classes", [5, 1000])
def test_files_without_all_entries_are_rejected(classes: int, tmp_path: Path) -> None:
    weights = DAT(**TINY).state_dict()
    path = tmp_path / "damaged.pth"
    load = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    for damaged in (
        {"model": OrderedDict(list(weights.items())[:-3])},
        {"model": {}},
        {"state_dict": {f"backbone.{name}": value for name, value in weights.items()}},
    ):
        torch.save(damaged, path)
        with pytest.raises(ValueError, match=r"the pretrained file lacks \d+ of \d+ entries of the network, such as"):
            timm.create_model("dat_tiny", **load, **{**TINY, "num_classes": classes})


def test_names_without_a_file_cannot_be_pretrained() -> None:
    with pytest.raises(ValueError, match=r'downloaded by name; give their file as pretrained_cfg_overlay=\{"f'):
        timm.create_model("dat_tiny", pretrained=True)


@pytest.mark.parametrize("classes", [-3, 3.0, "10"])
def test_numbers_of_classes_are_checked(classes: int) -> None:
    with pytest.raises(ValueError, match=r"num_classes = .* must be"):
        DAT(**TINY).reset_classifier(classes)


def test_checkpoints_of_the_trainer_load_by_path(tmp_path: Path) -> None:
    weights = DAT(**TINY).state_dict()
    torch.save({"format": 1, "model": weights, "ema": None, "epoch": 3, "config": "MODEL: {}"}, tmp_path / "best.pth")
    model = timm.create_model("dat_small", checkpoint_path=str(tmp_path / "best.pth"), **TINY)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("letter", ["D", "S"])
def test_set_input_size_resizes_tables_and_is_saved(letter: str, tmp_path: Path) -> None:
    options = {**TINY, "stage_spec": [letter] * 4, "window_sizes": [4, 4, 2, 2]}
    model = timm.create_model("dat_tiny", **options).eval()
    model.set_input_size((64, 128))
    expected = DAT(**{**options, "img_size": [64, 128]})
    assert {n: p.shape for n, p in model.state_dict().items()} == {n: p.shape for n, p in expected.state_dict().items()}
    assert all(torch.equal(value, expected.get_buffer(name)) for name, value in model.named_buffers())
    assert get_model_input_config(model)["input_size"] == (3, 64, 128)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        images = rgb(64, 128)
        assert torch.equal(again(images), model(images))
    with pytest.raises(ValueError, match="img_size = 16 leaves no pixel for the last stage; choose at least 32"):
        model.set_input_size(16)


@pytest.mark.parametrize(
    ("name", "linear"), [("dat_tiny", "linear1.0.bias"), ("dat_cvpr22_tiny", "chunk.linear1.bias")]
)
def test_layers_are_grouped_from_the_stem_to_the_head(name: str, linear: str) -> None:
    model = timm.create_model(name, layer_scale_values=[0.1] * 4)
    blocks = sum(len(stage.attns) for stage in model.stages)
    fine = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(fine.values()) == set(range(blocks + 2))
    assert fine["patch_proj.0.weight"] == 0
    assert fine["down_projs.0.0.weight"] == fine["stages.1.layer_norms.0.norm.bias"] == 3
    second = [f"stages.2.{part}" for part in ("attns.1.proj_out.bias", "layer_norms.3.norm.bias")]
    assert {fine[part] for part in (*second, "stages.2.layer_scales.2.weight")} == {
        fine["stages.2.mlps.0." + linear] + 1
    }
    assert fine["cls_norm.norm.weight"] == fine["cls_head.bias"] == blocks + 1
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert set(coarse.values()) == set(range(6))
    assert coarse["down_projs.2.0.weight"] == coarse["stages.3.attns.1.proj_out.weight"] == 4

    scales = [group["lr_scale"] for group in parameter_groups(model, weight_decay=0.05, layer_decay=0.5)]
    assert max(scales) == 1
    assert min(scales) == 0.5 ** (blocks + 1)


def test_torch_hub_has_all_architectures() -> None:
    assert ENTRYPOINTS.keys() == {name.partition(".")[0] for name in NAMES}
    assert "configs/dat_base.yaml or configs/dat_base_384.yaml" in ENTRYPOINTS["dat_base"].__doc__
    model = torch.hub.load(str(ROOT), "dat_plus", source="local", num_classes=3)
    assert isinstance(model, DAT)
    assert model.num_classes == 3
