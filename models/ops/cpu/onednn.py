"""oneDNN in eager mode, through the operators that PyTorch provides for its compiler.

On x86, eager PyTorch computes float32 matrix products with MKL, and an activation after a convolution in a separate
pass. Both were slower on the CPUs measured, see `benchmarks`. In bfloat16, the overhead of `F.linear` exceeds the time
of the product. Where these operators do not apply, the functions use plain PyTorch. None of them is differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BUILT_IN = (
    hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
)
_BFLOAT16 = _BUILT_IN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def suits(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    """Return whether oneDNN supports a dtype and tensors of any shape; a tensor may be None."""
    if not (supports(dtype) and torch._C._get_mkldnn_enabled()):
        return False
    return all(x is None or _is_plain(x) for x in tensors)


def supports(dtype: torch.dtype) -> bool:
    """Return whether this PyTorch has the operators for a dtype on this CPU."""
    return _BUILT_IN and (dtype == torch.float32 or (dtype == torch.bfloat16 and _BFLOAT16))


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.is_cpu and x.layout == torch.strided and not x.is_nested


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x weight^T + bias`` for ``x [..., in]`` and ``weight [out, in]``."""
    return multiply(x, weight, bias) if suits(x.dtype, x, weight, bias) else F.linear(x, weight, bias)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `product` of tensors that oneDNN supports, see `suits`."""
    bias = None if bias is None else bias.contiguous()  # the operator ignores strides
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``gelu(conv(x))`` of a depthwise convolution that keeps the size, for ``x [B, C, H, W]``."""
    groups, padding = len(weight), [weight.shape[-1] // 2] * 2
    if suits(x.dtype, x, weight, bias):
        return torch.ops.mkldnn._convolution_pointwise.default(
            x, weight, bias.contiguous(), padding, [1, 1], [1, 1], groups, "gelu", [], "none"
        )
    return torch.ops.aten.gelu_(F.conv2d(x, weight, bias, padding=padding, groups=groups))
