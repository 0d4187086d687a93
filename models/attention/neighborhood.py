"""Neighborhood attention (arXiv 2204.07143), the letter N."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.neighborhood import neighborhood_attention


class NeighborhoodAttention(nn.Module):
    """Every pixel attends to the ``kernel_size`` squared window around it, moved inwards at the border.

    A map smaller than the window is zero-padded on the right and bottom; the padding then takes part, as published.

    Attributes:
        form: form of the operation, see `models.ops.neighborhood`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kernel_size: int,
        use_rpb: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kernel_size = kernel_size
        self.scale = (dim // heads) ** -0.5
        self.attn_drop = attn_drop
        self.form = "auto"
        self.rpb = None
        if use_rpb:
            self.rpb = nn.Parameter(torch.empty(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        bottom, right = max(self.kernel_size - height, 0), max(self.kernel_size - width, 0)
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, right, 0, bottom))  # [B, H, W, C]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(3)  # [B, H, W, heads, d]
        x = neighborhood_attention(
            q,
            k,
            v,
            self.rpb,
            kernel_size=self.kernel_size,
            scale=self.scale,
            dropout=self.attn_drop if self.training else 0.0,
            form=self.form,
        )
        x = x[:, :height, :width].flatten(-2)
        return self.proj_drop(self.proj(x)).permute(0, 3, 1, 2)
