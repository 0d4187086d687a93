"""Spatial-reduction attention of the Pyramid Vision Transformer (arXiv 2102.12122), letter P."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from ..layers import LayerNorm, pad_small, pointwise
from ..ops.products import dot_product_attention
from ..options import StageOption, StageOptions, at_least, check_divisible, rate
from .letters import Mixer, register

OPTIONS = {
    "sr_ratios": StageOption((8, 4, 2, 1), "Factor by which P reduces the map of its keys per axis.", each=at_least(1))
}


class PyramidAttention(nn.Module):
    """Global attention whose keys and values come from a map reduced by a strided convolution.

    Args:
        dim: channels C.
        heads: attention heads; divides ``dim``.
        sr_ratio: factor by which the map is reduced on each axis.
        attn_drop: probability of dropping an attention weight.
        proj_drop: dropout rate of the output.

    Raises:
        ValueError: an argument is not allowed or contradicts another.
    """

    def __init__(self, dim: int, *, heads: int, sr_ratio: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        check_divisible("dim", dim, "heads", heads)
        rate().require("attn_drop", attn_drop)
        OPTIONS["sr_ratios"].each.require("sr_ratio", sr_ratio)
        self.heads = heads
        self.sr_ratio = sr_ratio
        self.attn_drop = attn_drop
        self.q = nn.Conv2d(dim, dim, kernel_size=1)
        self.kv = nn.Conv2d(dim, 2 * dim, kernel_size=1)
        self.proj = nn.Conv2d(dim, dim, kernel_size=1)
        self.proj_drop = nn.Dropout(proj_drop)
        self.proj_ds = nn.Identity()
        if sr_ratio > 1:
            self.proj_ds = nn.Sequential(nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio), LayerNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        height = x.shape[-2]
        q = rearrange(pointwise(self.q, x), "b (heads d) h w -> b heads (h w) d", heads=self.heads)
        kv = pointwise(self.kv, self.proj_ds(pad_small(x, self.sr_ratio)))
        k, v = rearrange(kv, "b (two heads d) h w -> two b heads (h w) d", two=2, heads=self.heads)
        x = dot_product_attention(q, k, v, dropout=self.attn_drop if self.training else 0.0)
        x = rearrange(x, "b heads (h w) d -> b h w (heads d)", h=height)
        return self.proj_drop(pointwise(self.proj, x.permute(0, 3, 1, 2)))


def _build(stage: StageOptions) -> PyramidAttention:
    return PyramidAttention(
        stage["dims"],
        heads=stage["heads"],
        sr_ratio=stage["sr_ratios"],
        attn_drop=stage["attn_drop_rate"],
        proj_drop=stage["drop_rate"],
    )


register("P", Mixer(build=_build, options=OPTIONS, check=lambda stage: stage.divides("heads", "dims")))
