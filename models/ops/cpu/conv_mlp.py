"""The MLP around a depthwise convolution for CPUs, a few images at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import widen
from .onednn import depthwise_gelu, product

CACHED = 1 << 20  # hidden values processed at a time: 4 MiB, which stay in the CPU cache


class ConvMLP(torch.autograd.Function):
    """`models.ops.depthwise.conv_mlp`, a few images at a time, so that the hidden values stay in the CPU cache.

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


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the depthwise convolution, of the same size, of a map ``[B, C, H, W]`` with ``[C, 1, k, k]``, k odd."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


def _convolve_last(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return convolve(x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)


def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias of `_convolve_last`."""
    channels, padding = len(weight), weight.shape[-1] // 2
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, [channels],
        [1, 1], [padding, padding], [1, 1], False, [0, 0], channels, [True, True, True],
    )  # fmt: skip
    return dx.permute(0, 2, 3, 1), dweight, dbias
