"""oneDNN where it beats what PyTorch takes in eager mode: float32 on x86, through the operators of PyTorch's compiler.

Eager products of float32 go to MKL, which takes 3 to 15 % more time, and a convolution's activation goes over the map
again. Where these operators do not apply, the functions do the same in plain PyTorch. None of them has a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BUILT_IN = (
    hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
)


def suits(x: Tensor) -> bool:
    """Return whether oneDNN is taken for ``x``."""
    return _BUILT_IN and x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.enabled


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x weight^T + bias`` for ``x [..., in]`` and ``weight [out, in]``."""
    if suits(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``gelu(conv(x))`` of a depthwise convolution that keeps the size, for ``x [B, C, H, W]``."""
    groups, padding = len(weight), [weight.shape[-1] // 2] * 2
    if suits(x):
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, padding, [1, 1], [1, 1], groups, "gelu", [], "none"
        )
    return torch.ops.aten.gelu_(F.conv2d(x, weight, bias, padding=padding, groups=groups))
