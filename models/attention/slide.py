"""Slide attention (Slide-Transformer, arXiv 2304.04237), letter E."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..fusing import have_biases, may_fuse
from ..layers import linear
from ..options import StageOptions, check_divisible
from .letters import Mixer, register

KERNEL_SIZE = 3
SHIFTS = KERNEL_SIZE**2
REDUCTION = 4


class SlideAttention(nn.Module):
    """Every pixel attends to its 3 x 3 neighbours, which depthwise convolutions shift to the pixel.

    Attention runs on a quarter of the channels. Each of the nine shifts is the sum of a fixed one-hot convolution
    (``dep_conv``, of which only the bias is trained) and a trained one (``dep_conv1``). Keys and values share them.

    Args:
        dim: channels C.
        heads: attention heads; four times this number divides ``dim``.
        attn_drop: probability of dropping an attention weight.
        proj_drop: dropout rate of the output.

    Raises:
        ValueError: an argument is not allowed or contradicts another.
    """

    def __init__(self, dim: int, *, heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        check_divisible("dim", dim, f"{REDUCTION} * heads", REDUCTION * heads)
        reduced = dim // REDUCTION
        head_dim = reduced // heads
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.empty(1, heads, 1, SHIFTS, 1, 1))
        self.qkv = nn.Linear(dim, 3 * reduced)
        self.proj = nn.Linear(reduced, dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dep_conv = self._shift_conv(head_dim)
        self.dep_conv1 = self._shift_conv(head_dim)
        self.dep_conv.weight.requires_grad_(False)
        self.reset_parameters()

    @staticmethod
    def _shift_conv(head_dim: int) -> nn.Conv2d:
        return nn.Conv2d(head_dim, SHIFTS * head_dim, KERNEL_SIZE, padding=KERNEL_SIZE // 2, groups=head_dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the position table and the fixed shifts; layers initialise themselves."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        one_hot = torch.eye(SHIFTS).reshape(SHIFTS, 1, KERNEL_SIZE, KERNEL_SIZE)
        self.dep_conv.weight.copy_(one_hot.repeat(self.dep_conv.in_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        qkv = linear(self.qkv, x.permute(0, 2, 3, 1))
        qkv = rearrange(qkv, "b h w (heads three c) -> three b heads h w c", heads=self.heads, three=3)
        q = qkv[0].unsqueeze(-2) * self.scale  # [B, heads, H, W, 1, c]
        shifts = self._shifted(rearrange(qkv[1:], "two b heads h w c -> (two b heads) c h w"))
        shifts = shifts.unflatten(0, (2, -1, self.heads))
        k, v = rearrange(shifts, "two b heads (c nine) h w -> two b heads h w c nine", nine=SHIFTS)
        k = k + self.relative_position_bias_table.reshape(self.heads, 1, 1, 1, SHIFTS)
        weights = self.attn_drop((q @ k).softmax(dim=-1))  # [B, heads, H, W, 1, 9]
        x = (weights.to(v.dtype) @ v.transpose(-2, -1)).squeeze(-2)
        x = rearrange(x, "b heads h w c -> b h w (heads c)")
        return self.proj_drop(linear(self.proj, x)).permute(0, 3, 1, 2)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters exempt from weight decay in the published recipe."""
        return {"relative_position_bias_table"}

    def _shifted(self, x: Tensor) -> Tensor:
        """Return maps ``[N, c, H, W]`` at the nine shifts, ``[N, c * 9, H, W]``."""
        convs = self.dep_conv, self.dep_conv1
        if not (may_fuse(*convs) and have_biases(*convs)):
            return self.dep_conv(x) + self.dep_conv1(x)
        weight = self.dep_conv.weight + self.dep_conv1.weight
        bias = self.dep_conv.bias + self.dep_conv1.bias
        return F.conv2d(x, weight, bias, padding=KERNEL_SIZE // 2, groups=x.shape[1])


def _build(stage: StageOptions) -> SlideAttention:
    return SlideAttention(
        stage["dims"], heads=stage["heads"], attn_drop=stage["attn_drop_rate"], proj_drop=stage["drop_rate"]
    )


register("E", Mixer(build=_build, check=lambda stage: stage.divides("heads", "dims", factor=REDUCTION)))
