"""Layers shared by all stages.

Maps between modules have the shape ``[B, C, H, W]`` and channels-last memory, so that ``permute(0, 2, 3, 1)`` is a
contiguous view whose last axis holds the channels. Norms and 1x1 convolutions work on that view.

Linear layers and convolutions are PyTorch's own. `linear`, `pointwise` and `residual_depthwise` call them or, if the
difference cannot be observed (see `models.fusing`), use a faster operation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fusing import have_biases, is_depthwise, is_pointwise, may_fuse
from .ops.depthwise import conv_mlp, depthwise_residual
from .ops.forms import suits_cpu_forms
from .ops.linear import linear as multiply
from .ops.precision import autocast_disabled, widen


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Return a size as ``(height, width)``; a single number stands for both."""
    return (int(size), int(size)) if isinstance(size, Integral) else tuple(size)


def check_map(x: Tensor, channels: int) -> None:
    """Raise a ValueError unless ``x`` is a map ``[B, C, H, W]`` of ``channels`` channels C, and H and W are not 0."""
    if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
        raise ValueError(f"an input of shape {list(x.shape)} does not fit; give [batch, {channels}, height, width]")


def pad_small(x: Tensor, smallest: int) -> Tensor:
    """Zero-pad a map ``[B, C, H, W]`` on the right and bottom to at least ``smallest`` pixels on each side."""
    height, width = x.shape[-2:]
    if min(height, width) >= smallest:  # F.pad would copy the map even without padding
        return x
    return F.pad(x, (0, max(smallest - width, 0), 0, max(smallest - height, 0)))


class LayerNorm(nn.Module):
    """Layer norm over the channels of a map ``[B, C, H, W]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    """One learned factor per channel of a map ``[B, C, H, W]`` (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all factors to their initial value."""
        nn.init.constant_(self.weight, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None]


class Float32Linear(nn.Linear):
    """A linear layer on coordinates ``[..., in]``, computed in at least float32 even under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with autocast_disabled(x.device.type):
            x = widen(x)
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Float32Conv2d(nn.Conv2d):
    """A convolution from a map ``[B, C, H, W]`` to coordinates, computed in at least float32 even under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with autocast_disabled(x.device.type):
            x = widen(x)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return self._conv_forward(x, self.weight.to(x.dtype), bias)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer to the last axis of ``[..., in]``; a linear layer by the faster product, if possible."""
    if type(layer) is nn.Linear and x.is_cpu and may_fuse(layer):
        return multiply(x, layer.weight, layer.bias)
    return layer(x)


def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 1x1 convolution to a map ``[B, C, H, W]``, if possible as a matrix product over the channels."""
    if is_pointwise(conv) and may_fuse(conv):
        return multiply(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)
    return conv(x)


def residual_depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return ``x + conv(x)`` for a map ``[B, C, H, W]``: a local perception unit (CMT, arXiv 2107.06263)."""
    if is_depthwise(conv) and may_fuse(conv):
        return depthwise_residual(x, conv.weight, conv.bias)
    return x + conv(x)


class Residual(nn.Module):
    """Adds a residual branch with stochastic depth per sample (arXiv 1603.09382).

    Args:
        rate: drop probability; kept branches are scaled by ``1 / (1 - rate)``.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return ``x`` plus ``branch`` after stochastic depth, all ``[B, C, H, W]``."""
        if not self.training or self.rate == 0.0:
            return x + branch
        keep = 1.0 - self.rate
        return torch.addcmul(x, branch, branch.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep))

    def extra_repr(self) -> str:
        """Return the rate for the printed representation."""
        return f"rate={self.rate:.3f}"


class MLP(nn.Module):
    """Two linear layers over the channels of a map ``[B, C, H, W]``."""

    def __init__(self, dim: int, *, expansion: int, drop: float) -> None:
        super().__init__()
        self.chunk = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(dim, dim * expansion),
                act=nn.GELU(),
                drop1=nn.Dropout(drop),
                linear2=nn.Linear(dim * expansion, dim),
                drop2=nn.Dropout(drop),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # [B, H, W, C]
        if suits_cpu_forms(x) and may_fuse(self.chunk):
            for layer in self.chunk:
                x = linear(layer, x)
        else:
            x = self.chunk(x)
        return x.permute(0, 3, 1, 2)


class ConvMLP(nn.Module):
    """An MLP with a depthwise 3x3 convolution and a skip connection between its layers (DAT++, section 4.2).

    Maps ``[B, dim, H, W]`` to ``[B, dim, H, W]``.

    Attributes:
        form: form of the operation, see `models.ops.depthwise`; not used if something is attached to a layer.
    """

    def __init__(self, dim: int, *, expansion: int, drop: float) -> None:
        super().__init__()
        self.form = "auto"
        hidden = dim * expansion
        self.linear1 = nn.Sequential(nn.Conv2d(dim, hidden, kernel_size=1))
        self.drop1 = nn.Dropout(drop)
        self.linear2 = nn.Sequential(nn.Conv2d(hidden, dim, kernel_size=1))
        self.drop2 = nn.Dropout(drop)
        self.dwc = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        if not self._may_fuse():
            x = self.drop1(self.linear1(x))
            return self.drop2(self.linear2(F.gelu(x + self.dwc(x))))
        first, second = self.linear1[0], self.linear2[0]
        x = conv_mlp(
            x.permute(0, 2, 3, 1),
            first.weight.flatten(1),
            first.bias,
            self.dwc.weight,
            self.dwc.bias,
            second.weight.flatten(1),
            second.bias,
            dropout=self.drop1.p if self.drop1.training else 0.0,
            form=self.form,
        )
        return self.drop2(x.permute(0, 3, 1, 2))

    def _may_fuse(self) -> bool:
        if any(type(layers) is not nn.Sequential or len(layers) != 1 for layers in (self.linear1, self.linear2)):
            return False
        first, second = self.linear1[0], self.linear2[0]
        as_made = is_pointwise(first) and is_depthwise(self.dwc) and is_pointwise(second) and have_biases(first, second)
        return as_made and may_fuse(self.linear1, first, self.drop1, self.dwc, self.linear2, second)
