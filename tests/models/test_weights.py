"""Adapting weights to networks of other sizes, classes and channels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn

from models.dat import DAT
from models.weights import adapt, mismatches
from tests.models.small import SMALL, build_small


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the weights of a network, as a file would hold them."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def load_adapted(source: nn.Module, target: nn.Module, class_map: Path | None = None) -> list[str]:
    """Load the weights of one network strictly into another, run it, and return the lines of the report."""
    state, report = adapt(weights_of(source), target, class_map=class_map)
    target.load_state_dict(state)
    assert target.eval()(torch.randn(1, 3, 64, 64)).isfinite().all()
    return report.lines()


def test_weights_of_the_same_network_load_unchanged() -> None:
    source, target = build_small("LSND"), build_small("LSND")
    images = torch.randn(2, 3, 64, 64)
    entries = len(target.state_dict())
    assert load_adapted(source, target) == [f"loaded unchanged: {entries} of {entries} entries"]
    torch.testing.assert_close(target(images), source.eval()(images), rtol=0, atol=0)


def test_adapt_does_not_modify_its_arguments() -> None:
    source, target = build_small("LSD"), build_small("LSD", img_size=128, window_sizes=4, num_classes=3)
    weights, own = weights_of(source), weights_of(target)
    adapt(weights, target)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in weights.items())
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in own.items())


def test_the_head_is_new_for_another_number_of_classes() -> None:
    source, target = build_small("N"), build_small("N", num_classes=3)
    own = weights_of(target)
    lines = load_adapted(source, target)
    for name in ("cls_head.weight", "cls_head.bias"):
        assert torch.equal(target.state_dict()[name], own[name])
    assert torch.equal(target.cls_norm.norm.weight, source.cls_norm.norm.weight)
    assert "newly initialised (number of classes: 10 in the weights, 3 here): cls_head.weight, cls_head.bias" in lines
    assert sum("cls_head.weight" in line for line in lines) == 1


def test_sampled_tables_keep_their_values_when_resized() -> None:
    """The corners stay aligned, so every third cell of the larger table is a cell of the smaller one."""
    source, target = build_small("D"), build_small("D", img_size=128)
    lines = load_adapted(source, target)
    before, after = source.stages[3].attns[0].rpe_table, target.stages[3].attns[0].rpe_table
    assert (before.shape, after.shape) == ((8, 3, 3), (8, 7, 7))
    torch.testing.assert_close(after[:, ::3, ::3], before)
    assert "tables resized from (8, 3, 3) to (8, 7, 7): stages.3.attns.0.rpe_table" in lines


@pytest.mark.parametrize(
    ("letter", "leaf", "option", "windows", "sides"),
    [
        ("L", "relative_position_bias_table", "window_sizes", (2, 5), (3, 9)),
        ("S", "relative_position_bias_table", "window_sizes", (2, 5), (3, 9)),
        ("N", "rpb", "nat_ksizes", (3, 13), (5, 25)),
        ("Q", "rpb_table", "ksize_qnas", (3, 9), (3, 9)),
        ("Q", "attn_scale", "ksize_qnas", (3, 9), (3, 9)),
    ],
)
def test_window_tables_keep_their_values_at_the_centres_when_resized(
    letter: str, leaf: str, option: str, windows: tuple[int, int], sides: tuple[int, int]
) -> None:
    """A cell is divided into several cells per axis, of which the middle one has its value."""
    networks = [build_small(letter, **{option: window}) for window in windows]
    before, after = (getattr(network.stages[2].attns[0], leaf) for network in networks)
    nn.init.normal_(before)
    load_adapted(*networks)
    if letter != "N":  # [cells, heads] -> [heads, rows, columns]
        before, after = (
            table.reshape(side, side, -1).permute(2, 0, 1) for table, side in zip((before, after), sides, strict=True)
        )
    factor = sides[1] // sides[0]
    torch.testing.assert_close(after[:, factor // 2 :: factor, factor // 2 :: factor], before)


def test_fixed_tables_are_resized_over_queries_and_keys() -> None:
    source, target = build_small("D", fixed_pes=True), build_small("D", fixed_pes=True, img_size=192)
    load_adapted(source, target)
    before = source.stages[1].attns[0].rpe_table.reshape(2, 8, 8, 2, 2)
    after = target.stages[1].attns[0].rpe_table.reshape(2, 24, 24, 6, 6)
    torch.testing.assert_close(after[:, 1::3, 1::3, 1::3, 1::3], before)


def test_fixed_tables_of_a_rectangle_are_resized_from_it() -> None:
    model = build_small("D", fixed_pes=True, img_size=[128, 32])  # 32 x 8 pixels are as many as 16 x 16
    before = model.stages[0].attns[0].rpe_table.detach().reshape(1, 32, 8, 4, 1)
    model.set_input_size([384, 96])
    after = model.stages[0].attns[0].rpe_table.reshape(1, 96, 24, 12, 3)
    torch.testing.assert_close(after[:, 1::3, 1::3, 1::3, 1::3], before)


def test_index_and_mask_buffers_are_the_models_own() -> None:
    source, target = build_small("LS"), build_small("LS", window_sizes=4)
    own = weights_of(target)
    lines = load_adapted(source, target)
    for leaf in ("relative_position_index", "attn_mask"):
        assert torch.equal(target.state_dict()[f"stages.0.attns.1.{leaf}"], own[f"stages.0.attns.1.{leaf}"])
        assert any(line.startswith("left out") and f"stages.0.attns.1.{leaf}" in line for line in lines)


def test_networks_without_tables_load_at_any_size() -> None:
    letters = "NPEDX"
    source, target = (build_small(letters, log_cpb=True, img_size=size) for size in (64, 128))
    assert len(load_adapted(source, target)) == 1


def test_rows_of_an_imagenet_22k_head_are_selected_by_synset() -> None:
    large = ImageNetInfo("imagenet-22k").label_names()
    source, target = build_small("N", num_classes=21841), build_small("N", num_classes=1000)
    own = weights_of(target)
    lines = load_adapted(source, target)
    for row, synset in enumerate(ImageNetInfo("imagenet-1k").label_names()):
        for name in ("cls_head.weight", "cls_head.bias"):
            there = source.state_dict()[name][large.index(synset)] if synset in large else own[name][row]
            assert torch.equal(target.state_dict()[name][row], there), synset
    # ImageNet-22K has no teddy bear, n04399382.
    assert any("999 of 1000 classes out of 21841" in line and "class 850" in line for line in lines)


def test_a_class_map_selects_the_rows_of_the_head(tmp_path: Path) -> None:
    class_map = tmp_path / "map.txt"
    class_map.write_text("7\n-1\n0\n")
    source, target = build_small("N"), build_small("N", num_classes=3)
    own = weights_of(target)
    lines = load_adapted(source, target, class_map)
    assert torch.equal(target.cls_head.weight[[0, 2]], source.cls_head.weight[[7, 0]])
    assert torch.equal(target.cls_head.bias[[0, 2]], source.cls_head.bias[[7, 0]])
    assert torch.equal(target.cls_head.weight[1], own["cls_head.weight"][1])
    assert any("2 of 3 classes out of 10" in line and "newly initialised: class 1" in line for line in lines)


@pytest.mark.parametrize(
    ("letters", "options", "message"),
    [
        ("D", {}, "stages.0.attns.0.conv_offset.0.bias is not in this model"),
        ("NN", {}, "stages.0.attns.1.proj.bias is not in this model"),
        ("N", {"use_lpus": True}, "stages.0.local_perception_units.0.bias is not in this model"),
        ("N", {"nat_rpb": False}, "stages.0.attns.0.rpb is missing"),
        ("N", {"heads": 4}, "stages.0.attns.0.rpb is (4, 13, 13) instead of (1, 13, 13)"),
    ],
)
def test_weights_of_another_architecture_are_rejected(letters: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"another architecture: .*{re.escape(message)}"):
        adapt(weights_of(build_small(letters, **options)), build_small("N"))


def test_the_first_four_differences_are_described() -> None:
    own = {"a": torch.zeros(2), "b": torch.zeros(3, 1), "c": torch.zeros(1)}
    assert mismatches(own, own) == ""
    assert mismatches({"b": torch.ones(3), "c": own["c"], "x": torch.zeros(1)}, own) == (
        "a is missing; b is (3,) instead of (3, 1); x is not in this model"
    )
    assert mismatches(dict.fromkeys("pqrs", own["a"]), own) == (
        "a is missing; b is missing; c is missing; p is not in this model; and 3 more"
    )


def test_weights_of_another_width_are_rejected() -> None:
    wide = DAT(**{**SMALL, "stage_spec": ["N"] * 4, "dims": [8, 16, 32, 128]})
    with pytest.raises(ValueError, match=re.escape("cls_head.weight is (10, 128) instead of (10, 64)")):
        adapt(weights_of(wide), build_small("N"))


def test_incomplete_heads_are_rejected() -> None:
    model = build_small("N")
    weights = weights_of(model)
    del weights["cls_head.bias"]
    with pytest.raises(ValueError, match=r"cls_head\.bias is missing"):
        adapt(weights, model)


def test_fixed_tables_do_not_load_as_sampled_tables() -> None:
    with pytest.raises(ValueError, match="rpe_table"):
        adapt(weights_of(build_small("D", fixed_pes=True)), build_small("D"))


@pytest.mark.parametrize("in_chans", [1, 4, 6])
def test_weights_of_colour_images_are_adapted_to_other_channels(in_chans: int) -> None:
    source, target = build_small("N"), build_small("N", in_chans=in_chans)
    state, report = adapt(weights_of(source), target)
    target.load_state_dict(state)
    assert f"adapted from 3 to {in_chans} image channels: patch_proj.0.weight" in report.lines()
    before, after = source.patch_proj[0].weight, target.patch_proj[0].weight
    expected = before.sum(1, keepdim=True) if in_chans == 1 else before.repeat(1, 2, 1, 1)[:, :in_chans] * 3 / in_chans
    torch.testing.assert_close(after, expected)
    if in_chans != 4:  # grey images give the same logits with any number of channels
        grey = torch.randn(2, 1, 64, 64)
        logits = target(grey.expand(-1, in_chans, -1, -1))
        torch.testing.assert_close(logits, source(grey.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-4)


def test_tables_of_a_square_become_those_of_a_rectangle() -> None:
    source, target = build_small("D"), build_small("D", img_size=[64, 128])
    load_adapted(source, target)
    before, after = source.stages[3].attns[0].rpe_table, target.stages[3].attns[0].rpe_table
    assert after.shape == (8, 3, 7)
    torch.testing.assert_close(after[:, :, ::3], before)


def test_headless_networks_do_not_load_the_head() -> None:
    lines = load_adapted(build_small("N"), build_small("N", num_classes=0))
    assert "left out of the weights: cls_head.bias, cls_head.weight" in lines


def test_timm_weights_fit_other_classes_and_channels() -> None:
    source, target = timm.create_model("test_resnet"), timm.create_model("test_resnet", num_classes=7, in_chans=1)
    state, report = adapt(weights_of(source), target)
    target.load_state_dict(state)
    assert report.reinitialised == ["fc.weight", "fc.bias"]
    assert torch.equal(target.conv1[0].weight, source.conv1[0].weight.sum(1, keepdim=True))


def test_a_class_unknown_to_the_weights_gets_a_new_row() -> None:
    source, target = build_small("N", num_classes=3), build_small("N", num_classes=3)
    state, _ = adapt(weights_of(source), target, classes=["ant", "cat", "emu"], names=["cat", "emu", "owl"])
    rows = state["cls_head.weight"]
    assert torch.equal(rows[1:], source.cls_head.weight[:2])
    assert torch.equal(rows[0], target.cls_head.weight[0])
    state, _ = adapt(weights_of(source), target, classes=["ameise", "katze", "uhu"], names=["ant", "cat", "owl"])
    assert torch.equal(state["cls_head.weight"], source.cls_head.weight)


@pytest.mark.parametrize(
    ("classes", "names", "rows"),
    [
        (["0", "10", "11", "1", *map(str, range(2, 10))], [], [0, 10, 11, 1, *range(2, 10)]),  # by number
        (["cat", "ant"], ["ant", "bee", "cat", *"abcdefghi"], [2, 0]),  # by name
        (["\u00e4", "ant"], ["ant", "a\u0308", *"bcdefghijk"], [1, 0]),  # by name, in two forms of Unicode
        ([*"abcdefghijkl"], [], list(range(12))),  # no names: unchanged
    ],
)
def test_rows_of_the_head_follow_the_classes(classes: list[str], names: list[str], rows: list[int]) -> None:
    source, target = build_small("N", num_classes=12), build_small("N", num_classes=len(classes))
    state, _ = adapt(weights_of(source), target, classes=classes, names=names)
    assert torch.equal(state["cls_head.weight"], source.cls_head.weight[rows])
