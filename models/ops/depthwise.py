"""Depthwise convolutions with a skip connection, and the MLP around one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gpu
from .caching import cached_tensors
from .cpu.conv_mlp import ConvMLP, convolve
from .cpu.operators import conv_mlp as conv_mlp_operator
from .forms import check_form, is_compiled_for_inference, suits_cpu_forms
from .precision import autocast_disabled, cast_for_matmul, matmul_dtype, widen

FORMS = ("auto", "reference", "by_hand", "triton")


def depthwise_residual(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``x + conv(x)`` of a depthwise convolution that keeps the size of the map.

    On a GPU this is one kernel. On a CPU it is one convolution with 1 added to the centre weight, in at least float32:
    in lower precision the sum would lose small weights.

    Args:
        x: map ``[B, C, H, W]``.
        weight: ``[C, 1, k, k]``, k odd.
        bias: ``[C]``.

    Returns:
        ``[B, C, H, W]``.
    """
    if x.is_cuda and gpu.suits(x):
        return _on_gpu(x.permute(0, 2, 3, 1), weight, bias, gelu=False).permute(0, 3, 1, 2)
    if suits_cpu_forms(x):
        with autocast_disabled("cpu"):
            return convolve(widen(x), _with_skip(widen(weight)), widen(bias)).to(x.dtype)
    return x + convolve(x, weight, bias)


def conv_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    kernel: Tensor,
    bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    dropout: float = 0.0,
    form: str = "auto",
) -> Tensor:
    """Return ``linear2(gelu(h + conv(h)))`` with ``h = linear1(x)`` (DAT++, arXiv 2309.01430, section 4.2).

    Args:
        x: ``[B, H, W, C]``.
        weight1: weight of the first linear layer, ``[hidden, C]``.
        bias1: bias of the first linear layer, ``[hidden]``.
        kernel: weight of the depthwise convolution, ``[hidden, 1, k, k]``, k odd.
        bias: bias of the depthwise convolution, ``[hidden]``.
        weight2: weight of the second linear layer, ``[C, hidden]``.
        bias2: bias of the second linear layer, ``[C]``.
        dropout: dropout rate of ``h``.
        form: ``reference`` is PyTorch's own operations. ``by_hand`` processes a few images at a time and saves only
            ``h`` for the backward pass; it has no dropout. ``triton`` runs one GPU kernel between the two layers.
            ``auto`` uses `choose_form`.

    Returns:
        ``[B, H, W, C]``.

    Raises:
        ValueError: the form is unknown or does not support the arguments.
    """
    check_form(form, FORMS, "the convolutional MLP")
    if form == "by_hand" and dropout:
        raise ValueError("form 'by_hand' of the convolutional MLP has no dropout; choose auto or reference")
    if form == "triton" and not gpu.suits(x):
        raise ValueError(
            "form 'triton' of the convolutional MLP needs a GPU and at most float32; choose auto or reference"
        )
    if form == "auto":
        form = choose_form(x, dropout=dropout)
    if form == "by_hand" and is_compiled_for_inference(x):
        cast = [tensor.to(matmul_dtype(tensor)) for tensor in (x, weight1, bias1, weight2, bias2)]
        return conv_mlp_operator(*cast[:3], _with_skip(widen(kernel)), widen(bias), *cast[3:])
    if form == "by_hand":
        with cast_for_matmul(x, weight1, bias1, weight2, bias2) as (x, weight1, bias1, weight2, bias2):
            arguments = x, weight1, bias1, _with_skip(widen(kernel)), widen(bias), weight2, bias2
            keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments)
            return ConvMLP.apply(*arguments, keep)
    hidden = F.dropout(F.linear(x, weight1, bias1), dropout)
    if form == "triton":
        return F.linear(_on_gpu(hidden, kernel, bias, gelu=True), weight2, bias2)
    hidden = hidden.permute(0, 3, 1, 2)
    hidden = F.gelu(hidden + convolve(hidden, kernel, bias))
    return F.linear(hidden.permute(0, 2, 3, 1), weight2, bias2)


def choose_form(x: Tensor, *, dropout: float = 0.0) -> str:
    """Return the form that `conv_mlp` uses for ``auto``."""
    if x.is_cuda and gpu.suits(x):
        return "triton"
    return "by_hand" if not dropout and (suits_cpu_forms(x) or is_compiled_for_inference(x)) else "reference"


def _on_gpu(x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool) -> Tensor:
    from .gpu.depthwise import depthwise_residual

    return depthwise_residual(x.contiguous(), weight.contiguous(), bias.contiguous(), gelu)


def _with_skip(weight: Tensor) -> Tensor:
    """Return the kernel of ``x + conv(x)``."""
    return weight + _skip(weight.shape[-1], weight.dtype, weight.device)


@cached_tensors
def _skip(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the identity kernel ``[1, 1, size, size]``."""
    return F.pad(torch.ones(1, 1, 1, 1, dtype=dtype, device=device), (size // 2,) * 4)
