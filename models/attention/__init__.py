"""The mixers of a stage, by the letter that names them in ``stage_spec``.

A mixer maps ``[B, C, H, W]`` to ``[B, C, H, W]``, nothing more.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..options import StageOptions
from .deformable import DeformableAttention
from .ms_deform_attn import MSDeformAttn
from .neighborhood import NeighborhoodAttention
from .pyramid import PyramidAttention
from .qna import QueryAndAttend
from .slide import SlideAttention
from .window import WindowAttention

__all__ = [
    "MIXERS",
    "DeformableAttention",
    "MSDeformAttn",
    "NeighborhoodAttention",
    "PyramidAttention",
    "QueryAndAttend",
    "SlideAttention",
    "WindowAttention",
]


def _window(options: StageOptions, *, shifted: bool) -> nn.Module:
    return WindowAttention(
        options.dim,
        heads=options.heads,
        window_size=options.window_size,
        map_size=options.map_size,
        shifted=shifted,
        attn_drop=options.attn_drop_rate,
        proj_drop=options.drop_rate,
    )


def _deformable(options: StageOptions) -> nn.Module:
    return DeformableAttention(
        options.dim,
        heads=options.heads,
        groups=options.groups,
        map_size=options.map_size,
        stride=options.stride,
        kernel_size=options.ksize,
        offset_range_factor=options.offset_range_factor,
        use_offsets=not options.no_off,
        position_bias=options.position_bias,
        coordinates=options.coordinates,
        attn_drop=options.attn_drop_rate,
        proj_drop=options.drop_rate,
    )


def _neighborhood(options: StageOptions) -> nn.Module:
    return NeighborhoodAttention(
        options.dim,
        heads=options.heads,
        kernel_size=options.nat_ksize,
        use_rpb=options.nat_rpb,
        attn_drop=options.attn_drop_rate,
        proj_drop=options.drop_rate,
    )


def _pyramid(options: StageOptions) -> nn.Module:
    return PyramidAttention(
        options.dim,
        heads=options.heads,
        sr_ratio=options.sr_ratio,
        attn_drop=options.attn_drop_rate,
        proj_drop=options.drop_rate,
    )


def _query_and_attend(options: StageOptions) -> nn.Module:
    return QueryAndAttend(
        options.dim,
        heads=options.heads_q,
        num_queries=options.nq,
        kernel_size=options.ksize_qna,
        activation=options.qna_activation,
        proj_drop=options.drop_rate,
    )


def _slide(options: StageOptions) -> nn.Module:
    return SlideAttention(
        options.dim, heads=options.heads, attn_drop=options.attn_drop_rate, proj_drop=options.drop_rate
    )


def _depthwise_conv(options: StageOptions) -> nn.Module:
    size = options.window_size
    return nn.Conv2d(options.dim, options.dim, kernel_size=size, padding=size // 2, groups=options.dim)


MIXERS: dict[str, Callable[[StageOptions], nn.Module]] = {
    "L": lambda options: _window(options, shifted=False),
    "S": lambda options: _window(options, shifted=True),
    "D": _deformable,
    "N": _neighborhood,
    "P": _pyramid,
    "Q": _query_and_attend,
    "E": _slide,
    "X": _depthwise_conv,
}
