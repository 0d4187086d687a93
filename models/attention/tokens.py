"""Self-attention of the Vision Transformer: the base class with projections and an optional window, and softmax."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.locality import Window, window_mask
from ..ops.products import dot_product_attention


class TokenAttention(nn.Module):
    """Self-attention of the prefix tokens and the patches of a grid, row by row.

    Parameter names are those of timm's attention, so that weights of its Vision Transformers load.

    Args:
        dim: channels.
        heads: attention heads; divides ``dim``.
        grid: number of rows and columns of patches.
        prefix: number of tokens before the patches.
        attn_drop: probability of dropping an attention weight.
        proj_drop: dropout rate of the output.

    Attributes:
        window: window of a patch, or None for the whole grid.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        grid: tuple[int, int],
        prefix: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.grid, self.prefix = heads, grid, prefix
        self.attn_drop = attn_drop
        self.window: Window | None = None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def set_epoch(self, epoch: int) -> None:
        """Prepare for an epoch, counted from 0; does nothing here."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens ``[B, N, C]`` to the same shape.

        Raises:
            ValueError: timm's blocks pass a mask, which only timm's own attention supports.
        """
        check_unmasked(attn_mask, is_causal=is_causal)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
        x = self.attend(q, k, v).to(v.dtype)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map queries, keys and values ``[B, heads, N, d]`` to ``[B, heads, N, d]``."""
        raise NotImplementedError

    def mask(self, like: Tensor) -> Tensor | None:
        """Return a mask of the keys visible to each query, bool ``[N, N]``, or None if all keys are visible."""
        if self.window is None:
            return None
        return window_mask(self.grid, self.prefix, self.window, device=like.device)


def check_unmasked(attn_mask: Tensor | None, *, is_causal: bool) -> None:
    """Raise a ValueError if a mask of any shape is given."""
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask and is_causal are not supported; leave them out")


class SoftmaxAttention(TokenAttention):
    """Scaled dot-product attention, as in the Vision Transformer (arXiv 2010.11929)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.attn_drop if self.training else 0.0
        return dot_product_attention(q, k, v, self.mask(q), dropout=dropout)
