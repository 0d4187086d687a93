"""Counted parameters and MACs equal the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import load_config
from models.attention import NeighborhoodAttention, PyramidAttention, WindowAttention
from models.build import build_model
from models.detection import DETECTORS, Detector
from tests.models.detection.small import small_arguments, small_backbone
from tests.models.detection.test_detectors import REGIONS, TINY
from tests.runs import call
from tools.complexity import PUBLISHED, count_macs, count_parameters, main, with_plain_operations

CONFIGS = Path(__file__).parents[2] / "configs"
ENTRIES = {
    "dat_tiny": 589,
    "dat_small": 589,
    "dat_base": 589,
    "dat_base_384": 589,
    "dat_p": 481,
    "cvpr22_dat_tiny": 219,
    "cvpr22_dat_small": 435,
    "cvpr22_dat_base": 435,
    "cvpr22_dat_base_384": 435,
}


def config_path(name: str) -> Path:
    return CONFIGS / f"{name.replace('cvpr22_', 'cvpr22/')}.yaml"


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_state_dict_entries(name: str) -> None:
    config = load_config(config_path(name))
    assert name == config.MODEL.NAME
    with torch.device("meta"):
        model = build_model(config)
    assert round(count_parameters(model) / 1e6, 2) == PUBLISHED[name].parameters
    assert len(model.state_dict()) == ENTRIES[name]


@pytest.mark.parametrize("name", ["dat_tiny", "cvpr22_dat_tiny"])
def test_macs_are_within_two_percent(name: str) -> None:
    config = load_config(config_path(name))
    macs = count_macs(build_model(config), (config.DATA.IMG_SIZE, config.DATA.IMG_SIZE))
    assert macs / 1e9 == pytest.approx(PUBLISHED[name].macs, rel=0.02)


def test_attention_products_count_whatever_form_runs() -> None:
    """Projections of 3 channels, 4 x 9 products a pixel, and 2 x 3 products for every key a query attends to."""
    projections = 4 * 9
    assert count_macs(NeighborhoodAttention(3, heads=1, kernel_size=7), (16, 9)) == 144 * (projections + 49 * 6)
    window = WindowAttention(3, heads=1, window_size=4, map_size=8, shifted=True)
    assert count_macs(window, (8, 8)) == 64 * (projections + 16 * 6)
    assert count_macs(PyramidAttention(3, heads=1, sr_ratio=1), (5, 5)) == 25 * (projections + 25 * 6)


def build_detector(name: str, **arguments: Any) -> Detector:
    kind = DETECTORS[name]
    return kind.build(small_backbone(*range(4 - kind.maps, 4)), num_classes=3, **arguments)


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade"])
def test_heads_count_for_as_many_regions_as_are_kept(name: str) -> None:
    """Each region costs two layers, the logits of 3 classes and the background, and boxes: one, or one a class."""
    few, more = (build_detector(name, **{**REGIONS, "proposals": proposals}) for proposals in (20, 50))
    boxes, stages = (4, 3) if name == "cascade" else (16, 1)
    a_region = 16 * 7**2 * 16 + 16 * 16 + 16 * (4 + boxes)
    assert count_macs(more, (64, 96)) - count_macs(few, (64, 96)) == stages * 30 * a_region


@pytest.mark.parametrize("name", ["retinanet", "dino", "d_fine"])
def test_a_detector_counts_what_it_computes(name: str) -> None:
    detector = build_detector(name, **(TINY[name] if name == "retinanet" else small_arguments(name)))
    with_plain_operations(detector.eval().requires_grad_(False))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        detector(torch.rand(1, 3, 64, 96))
    assert count_macs(detector, (64, 96)) == counter.get_total_flops() // 2 > 1e6


def test_table() -> None:
    _, out, _ = call(main, CONFIGS / "digits.yaml", "--size", 32, 48)
    line = out.splitlines()[1].split()
    assert line[:2] == ["digits", "32x48"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["missing.yaml"], "missing.yaml"), ([str(CONFIGS / "digits.yaml"), "--size", "1", "2", "3"], "--size 1 2 3")],
)
def test_wrong_input(arguments: list[str], message: str) -> None:
    status, _, said = call(main, *arguments)
    assert status == 2
    assert said.startswith("complexity.py: ")
    assert message in said
    assert said.count("\n") == 1
