"""The depthwise convolution of a ConvNeXt block (arXiv 2201.03545), letter X."""

from __future__ import annotations

from torch import nn

from ..options import StageOptions, odd
from .letters import Mixer, register
from .window import WINDOW_SIZES


def _build(stage: StageOptions) -> nn.Conv2d:
    dim, size = stage["dims"], stage["window_sizes"]
    return nn.Conv2d(dim, dim, kernel_size=size, padding=size // 2, groups=dim)


register(
    "X",
    Mixer(
        build=_build,
        options={"window_sizes": WINDOW_SIZES},
        check=lambda stage: stage.require("window_sizes", odd()),
        single_residual=True,
    ),
)
