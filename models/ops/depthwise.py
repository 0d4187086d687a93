"""Depthwise convolutions with a skip connection, and the MLP around one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import gpu
from .caching import cached_tensors
from .cpu.onednn import depthwise_gelu, product
from .forms import check_form, suits_cpu_forms
from .precision import autocast_disabled, cast_for_matmul, widen

FORMS = ("auto", "reference", "by_hand", "triton")
CACHED = 1 << 20  # hidden values processed at a time: 4 MiB, which stay in the CPU cache


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
            return _convolve(widen(x), _with_skip(widen(weight)), widen(bias)).to(x.dtype)
    return x + _convolve(x, weight, bias)


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
    if form == "by_hand":
        with cast_for_matmul(x, weight1, bias1, weight2, bias2) as (x, weight1, bias1, weight2, bias2):
            arguments = x, weight1, bias1, _with_skip(widen(kernel)), widen(bias), weight2, bias2
            keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments)
            return _ConvMLP.apply(*arguments, keep)
    hidden = F.dropout(F.linear(x, weight1, bias1), dropout)
    if form == "triton":
        return F.linear(_on_gpu(hidden, kernel, bias, gelu=True), weight2, bias2)
    hidden = hidden.permute(0, 3, 1, 2)
    hidden = F.gelu(hidden + _convolve(hidden, kernel, bias))
    return F.linear(hidden.permute(0, 2, 3, 1), weight2, bias2)


def choose_form(x: Tensor, *, dropout: float = 0.0) -> str:
    """Return the form that `conv_mlp` uses for ``auto``."""
    if x.is_cuda and gpu.suits(x):
        return "triton"
    return "by_hand" if not dropout and suits_cpu_forms(x) else "reference"


def _on_gpu(x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool) -> Tensor:
    from .gpu.depthwise import depthwise_residual

    return depthwise_residual(x.contiguous(), weight.contiguous(), bias.contiguous(), gelu)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


def _with_skip(weight: Tensor) -> Tensor:
    """Return the kernel of ``x + conv(x)``."""
    return weight + _skip(weight.shape[-1], weight.dtype, weight.device)


@cached_tensors
def _skip(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the identity kernel ``[1, 1, size, size]``."""
    return F.pad(torch.ones(1, 1, 1, 1, dtype=dtype, device=device), (size // 2,) * 4)


class _ConvMLP(torch.autograd.Function):
    """The form ``by_hand``: a few images at a time, so that the hidden values stay in the CPU cache.

    The kernel includes the skip connection: ``z = conv(h)`` and ``y = linear2(gelu(z))``. The backward pass saves ``h``
    and recomputes ``z`` and ``gelu(z)``, which is cheap.

    The convolution runs in at least float32, where oneDNN fuses GELU best; the linear layers may have lower precision.
    """

    @staticmethod
    def forward(ctx, x, weight1, bias1, kernel, bias, weight2, bias2, keep):  # noqa: ANN001
        images = max(1, CACHED // (x.shape[1:3].numel() * len(weight1)))
        kept, results = [], []
        for part in x.split(images):
            hidden = product(part, weight1, bias1)
            if keep:
                kept.append(hidden)
            hidden = hidden.to(kernel.dtype).permute(0, 3, 1, 2)
            activated = depthwise_gelu(hidden, kernel, bias).permute(0, 2, 3, 1).to(x.dtype)
            results.append(product(activated, weight2, bias2))
        if keep:
            ctx.save_for_backward(x, weight1, kernel, bias, weight2, *kept)
        return results[0] if len(results) == 1 else torch.cat(results)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad):  # noqa: ANN001
        x, weight1, kernel, bias, weight2, *kept = ctx.saved_tensors
        images, grad = len(kept[0]), grad.contiguous()
        dx = x.new_empty(x.shape)
        dbias1, dkernel, dbias = (torch.zeros_like(tensor) for tensor in (bias, kernel, bias))
        dweight1 = dweight2 = None
        parts = (tensor.split(images) for tensor in (x, dx, grad))
        for hidden, part, dpart, dout in zip(kept, *parts, strict=True):
            hidden = hidden.to(kernel.dtype)
            z = _convolve_last(hidden, kernel, bias)
            dout = dout.flatten(0, 2)
            dweight2 = _add_product(dweight2, dout.t(), F.gelu(z).flatten(0, 2).to(x.dtype))
            dz = torch.ops.aten.gelu_backward(product(dout, weight2.t()).view(z.shape).to(z.dtype), z)
            dhidden, to_kernel, to_bias = _convolve_backward(dz, hidden, kernel)
            dkernel += to_kernel
            dbias += to_bias
            dhidden = dhidden.flatten(0, 2)
            dbias1 += dhidden.sum(0)
            dhidden = dhidden.to(x.dtype)
            dweight1 = _add_product(dweight1, dhidden.t(), part.flatten(0, 2))
            dpart.copy_(product(dhidden, weight1.t()).view(dpart.shape))
        return dx, dweight1, dbias1, dkernel, dbias, dweight2, grad.sum((0, 1, 2)), None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return ``total + a b`` in at least float32, where a total of None stands for zero."""
    if total is None:
        return widen(a @ b)
    return total.addmm_(a, b) if a.dtype == total.dtype else total.add_(a @ b)


def _convolve_last(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _convolve(x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)


def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias of `_convolve_last`."""
    channels, padding = len(weight), weight.shape[-1] // 2
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, [channels],
        [1, 1], [padding, padding], [1, 1], False, [0, 0], channels, [True, True, True],
    )  # fmt: skip
    return dx.permute(0, 2, 3, 1), dweight, dbias
