"""Checks whether a fused operation may replace the calls of modules.

Hooks, adapters, pruning, weight normalisation, quantization and operation counters take effect when a module is called.
A fused operation reads the parameters of modules instead. It is used only if the difference cannot be observed: if the
modules are PyTorch's own, with ordinary parameters and nothing attached.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as _torch_module

from .ops.forms import is_transformed

_LAYERS = (nn.Conv2d, nn.Linear, nn.Sequential, nn.Dropout)  # parametrized layers have other classes
_TENSORS = (nn.Parameter, Tensor, FakeTensor)  # quantized and distributed parameters have other classes


def may_fuse(*layers: nn.Module) -> bool:
    """Return whether using the parameters of layers is equivalent to calling the layers."""
    watched = (
        _torch_module._global_forward_pre_hooks
        or _torch_module._global_forward_hooks
        or _torch_module._global_backward_pre_hooks
        or _torch_module._global_backward_hooks
    )
    return not watched and not is_transformed() and all(_is_plain(layer) for layer in layers)


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) not in _LAYERS or "forward" in layer.__dict__:
        return False
    if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks:
        return False
    return all(parameter is None or type(parameter) in _TENSORS for parameter in layer._parameters.values())


def have_biases(*layers: nn.Module) -> bool:
    """Return whether every layer has a bias."""
    return all(getattr(layer, "bias", None) is not None for layer in layers)


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Return whether a layer is a 1x1 convolution with stride 1, without padding and groups."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Return whether a layer is a depthwise convolution with a bias that keeps the size of the map."""
    return (
        type(conv) is nn.Conv2d
        and conv.padding == (conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.bias is not None
    )
