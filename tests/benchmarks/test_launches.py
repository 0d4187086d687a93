"""The number of kernels and bytes, counted on fake tensors."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import nn

from benchmarks import launches
from tests.benchmarks.test_models import SMALL, rows
from tests.runs import call, printed_by

MAP = 2 * 8 * 4 * 4 * 4  # bytes of a map of 2 x 8 x 4 x 4 values


class Block(nn.Module):
    """A convolution, a GELU and a sum over everything but the images, with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return (x + nn.functional.gelu(x)).flatten(1).sum(1, keepdim=True)


def test_count_agrees_with_a_count_by_hand() -> None:
    forward, backward = launches.count(Block(), (2, 8, 4, 4))
    weight, sums = 8 * 8 * 4, 2 * 4
    assert forward.kernels == {"convolution": 1, "gelu": 1, "add": 1, "sum": 1}
    assert forward.bytes == {"convolution": 2 * MAP + weight, "gelu": 2 * MAP, "add": 3 * MAP, "sum": MAP + sums}
    # The gradient of the sum is broadcast: four bytes an image. That of the skip meets the GELU's.
    assert backward.bytes["gelu_backward"] == sums + 2 * MAP
    assert backward.bytes["add"] == 2 * MAP + sums
    assert backward.kernels["convolution_backward"] == 1


def test_stochastic_depth_is_off() -> None:
    forward, _ = launches.count(timm.create_model("test_vit", drop_path_rate=0.5), (1, 3, 160, 160))
    assert "bernoulli_" not in forward.kernels


def test_tables(tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    words = ("--cfg", config, "--timm", "test_vit", "--img-size", 160, "--batch-size", 2, "--operations", 2)
    table = rows(printed_by(launches.main, *words))
    assert [row[:2] for row in table[:4]] == [
        [name, task] for name in ("test_vit", "small") for task in ("forward", "backward")
    ]
    assert len(table) == 4 + 4 * 2


def test_missing_network_is_an_error() -> None:
    said = "launches.py: nothing to count; give networks with --cfg and --timm\n"
    assert call(launches.main, "--img-size", 64) == (2, "", said)
