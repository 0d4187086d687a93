"""Layers shared by every stage.

Maps between modules are logical ``[B, C, H, W]`` tensors in channels-last memory, so that ``permute(0, 2, 3, 1)`` is a
contiguous view whose last axis holds the channels. Norms and 1x1 convolutions work on that view.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .ops.depthwise import conv_mlp, depthwise_residual
from .ops.linear import linear


def as_pair(size: int | Sequence[int]) -> tuple[int, ...]:
    """Return ``(height, width)`` of a size that is one number where both are the same."""
    return (size, size) if isinstance(size, int) else tuple(size)


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
        self.weight = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None]


class Linear(nn.Linear):
    """A linear layer on the last axis of ``[..., in]``.

    Attributes:
        form: form of the operation, see `models.ops.linear`.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.form = "auto"

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, form=self.form)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, weight ``[out, in, 1, 1]``, applied as a linear map to the last axis of ``[..., in]``.

    Attributes:
        form: form of the operation, see `models.ops.linear`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)
        self.form = "auto"

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.flatten(1), self.bias, form=self.form)


class LocalPerceptionUnit(nn.Conv2d):
    """A depthwise 3x3 convolution with a residual, on a map ``[B, C, H, W]`` (CMT, arXiv 2107.06263)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_residual(x, self.weight, self.bias)


class DropPath(nn.Module):
    """Adds a residual branch, which stochastic depth drops from a whole sample with a probability (arXiv 1603.09382).

    Args:
        rate: the probability; what is not dropped counts ``1 / (1 - rate)`` times.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return ``x`` plus what is left of ``branch``, ``[B, C, H, W]`` all."""
        if not self.training or self.rate == 0.0:
            return x + branch
        keep = 1.0 - self.rate
        return torch.addcmul(x, branch, branch.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class MLP(nn.Module):
    """Two linear layers over the channels of a map ``[B, C, H, W]``."""

    def __init__(self, dim: int, *, expansion: int, drop: float) -> None:
        super().__init__()
        self.chunk = nn.Sequential(
            OrderedDict(
                linear1=Linear(dim, dim * expansion),
                act=nn.GELU(),
                drop1=nn.Dropout(drop),
                linear2=Linear(dim * expansion, dim),
                drop2=nn.Dropout(drop),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.chunk(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvMLP(nn.Module):
    """An MLP with a depthwise 3x3 convolution and its skip between the two layers (DAT++, section 4.2).

    Attributes:
        form: form of the operation, see `models.ops.depthwise`.
    """

    def __init__(self, dim: int, *, expansion: int, drop: float) -> None:
        super().__init__()
        self.form = "auto"
        hidden = dim * expansion
        self.linear1 = nn.Sequential(PointwiseConv(dim, hidden))
        self.drop1 = nn.Dropout(drop)
        self.linear2 = nn.Sequential(PointwiseConv(hidden, dim))
        self.drop2 = nn.Dropout(drop)
        self.dwc = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linear1[0], self.linear2[0]
        x = conv_mlp(
            x.permute(0, 2, 3, 1),
            first.weight.flatten(1),
            first.bias,
            self.dwc.weight,
            self.dwc.bias,
            second.weight.flatten(1),
            second.bias,
            dropout=self.drop1.p if self.training else 0.0,
            form=self.form,
        )
        return self.drop2(x).permute(0, 3, 1, 2)
