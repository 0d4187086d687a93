"""The CPU forms as custom operators, for graphs that are compiled for inference.

The compiler's own code for these operations is slower on the CPUs measured, see `benchmarks`. The operators have no
derivatives. Arguments are those of the functions of the same names in `models.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..forms import operator
from ..precision import autocast_disabled
from . import deformable
from .conv_mlp import ConvMLP
from .neighborhood import TiledAttention
from .onednn import product


@torch.library.custom_op(operator("cpu_linear"), mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x weight^T + bias``, for ``x [..., in]`` and ``weight [out, in]``."""
    return product(x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op(operator("cpu_conv_mlp"), mutates_args=())
def conv_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, kernel: Tensor, bias: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """Return the MLP of ``x [B, H, W, C]`` around a depthwise convolution; ``kernel`` includes the skip connection."""
    with autocast_disabled("cpu"):
        return ConvMLP.forward(None, x, weight1, bias1, kernel, bias, weight2, bias2, False)


@conv_mlp.register_fake
def _(x: Tensor, *weights: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weights[-1]))


@torch.library.custom_op(operator("cpu_neighborhood"), mutates_args=())
def neighborhood_attention(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, scale: float) -> Tensor:
    """Attend to the neighborhood of every query; ``q``, ``k`` and ``v`` are ``[B, H, W, heads, d]``."""
    with autocast_disabled("cpu"):
        return TiledAttention.forward(None, q, k, v, rpb, scale, False)


@neighborhood_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, scale: float) -> Tensor:  # noqa: ARG001
    return q.new_empty(q.shape)


@torch.library.custom_op(operator("cpu_deformable"), mutates_args=())
def deformable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    map_size: list[int],
    coordinates: str,
    scale: float,
    form: str,
) -> Tensor:
    """Attend from ``q [B, H*W, heads, d]`` to sampled keys; ``form`` is ``crops`` or ``separable``."""
    options = {"map_size": tuple(map_size), "coordinates": coordinates, "scale": scale, "form": form}
    return deformable.attention(q, k, v, positions, table, **options).contiguous()


@deformable_attention.register_fake
def _(q: Tensor, *arguments: object) -> Tensor:  # noqa: ARG001
    return q.new_empty(q.shape)
