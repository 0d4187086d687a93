"""Slide attention (Slide-Transformer, arXiv 2304.04237), the letter E."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Linear
from ..options import StageOptions
from .letters import Mixer, register

KERNEL_SIZE = 3
SHIFTS = KERNEL_SIZE**2
REDUCTION = 4


class SlideAttention(nn.Module):
    """Attention to the 3 x 3 neighbours, which depthwise convolutions bring to every pixel.

    The channels are reduced four-fold. Keys and values at the nine shifts are the sum of a fixed one-hot convolution
    (``dep_conv``, only its bias is trained) and a trained one (``dep_conv1``), shared by keys and values.
    """

    def __init__(self, dim: int, *, heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        reduced = dim // REDUCTION
        head_dim = reduced // heads
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.empty(1, heads, 1, SHIFTS, 1, 1))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = Linear(dim, 3 * reduced)
        self.proj = Linear(reduced, dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dep_conv = self._shift_conv(head_dim)
        self.dep_conv1 = self._shift_conv(head_dim)
        one_hot = torch.eye(SHIFTS).reshape(SHIFTS, 1, KERNEL_SIZE, KERNEL_SIZE)
        self.dep_conv.weight = nn.Parameter(one_hot.repeat(head_dim, 1, 1, 1), requires_grad=False)

    @staticmethod
    def _shift_conv(head_dim: int) -> nn.Conv2d:
        return nn.Conv2d(head_dim, SHIFTS * head_dim, KERNEL_SIZE, padding=KERNEL_SIZE // 2, groups=head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        qkv = self.qkv(x.permute(0, 2, 3, 1)).unflatten(-1, (self.heads, 3, -1)).permute(4, 0, 3, 1, 2, 5)
        q, kv = qkv[0].unsqueeze(-2) * self.scale, qkv[1:]  # [B, heads, H, W, 1, c], [2, B, heads, H, W, c]
        k, v = self._shifted(kv.flatten(0, 2).permute(0, 3, 1, 2)).unflatten(0, kv.shape[:3]).unbind(0)
        k = k + self.relative_position_bias_table.reshape(self.heads, 1, 1, 1, SHIFTS)
        weights = self.attn_drop((q @ k).softmax(dim=-1))  # [B, heads, H, W, 1, 9]
        x = (weights.to(v.dtype) @ v.transpose(-2, -1)).squeeze(-2)  # [B, heads, H, W, c]
        x = x.permute(0, 2, 3, 1, 4).flatten(3)
        return self.proj_drop(self.proj(x)).permute(0, 3, 1, 2)

    def _shifted(self, x: Tensor) -> Tensor:
        """Return the nine shifts of maps ``[N, c, H, W]`` as ``[N, H, W, c, 9]``; both convolutions run as one."""
        weight = self.dep_conv.weight + self.dep_conv1.weight
        bias = self.dep_conv.bias + self.dep_conv1.bias
        x = F.conv2d(x, weight, bias, padding=KERNEL_SIZE // 2, groups=x.shape[1])
        return x.permute(0, 2, 3, 1).unflatten(-1, (-1, SHIFTS))


def _build(stage: StageOptions) -> SlideAttention:
    return SlideAttention(
        stage["dims"], heads=stage["heads"], attn_drop=stage["attn_drop_rate"], proj_drop=stage["drop_rate"]
    )


register("E", Mixer(build=_build, check=lambda stage: stage.divides("heads", "dims", factor=REDUCTION)))
