"""Neighborhood attention (arXiv 2204.07143), letter N."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..layers import check_map, linear, pad_small
from ..ops.forms import needs_plain_operations
from ..ops.neighborhood import neighborhood_attention
from ..options import Option, StageOption, StageOptions, check_divisible, odd, positive_count, rate
from ..tables import Resize, by_cells
from .letters import Mixer, register

OPTIONS = {
    "nat_ksizes": StageOption((3, 3, 3, 3), "Window size of N.", each=odd()),
    "nat_rpb": Option(True, "N has a table of relative position biases."),
}


class NeighborhoodAttention(nn.Module):
    """Every pixel attends to the square window around it, which is moved inwards at the border.

    A map smaller than the window is zero-padded on the right and bottom, and the padding is attended to, as in the
    published code. Without a position bias, a GPU uses NATTEN if it is installed.

    Args:
        dim: channels C.
        heads: attention heads; divides ``dim``.
        kernel_size: side of the window in pixels, odd.
        use_rpb: whether there is a table of relative position biases.
        attn_drop: probability of dropping an attention weight.
        proj_drop: dropout rate of the output.

    Attributes:
        form: form of the operation, see `models.ops.neighborhood`; or ``natten``.

    Raises:
        ValueError: an argument is not allowed or contradicts another.
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
        check_divisible("dim", dim, "heads", heads)
        positive_count().require("kernel_size", kernel_size)
        OPTIONS["nat_ksizes"].each.require("kernel_size", kernel_size)
        rate().require("attn_drop", attn_drop)
        self.dim = dim
        self.heads = heads
        self.kernel_size = kernel_size
        self.scale = (dim // heads) ** -0.5
        self.attn_drop = attn_drop
        self.form = "auto"
        self.rpb = None
        if use_rpb:
            self.rpb = nn.Parameter(torch.empty(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.reset_parameters()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        """Initialise the position table; layers initialise themselves."""
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        check_map(x, self.dim)
        height, width = x.shape[-2:]
        x = pad_small(x, self.kernel_size).permute(0, 2, 3, 1)  # [B, H, W, C]
        q, k, v = linear(self.qkv, x).unflatten(-1, (3, self.heads, -1)).unbind(3)  # [B, H, W, heads, d]
        dropout = self.attn_drop if self.training else 0.0
        if self._uses_natten(q, dropout):
            x = natten_attention()(q, k, v, self.kernel_size, scale=self.scale)
        else:
            x = neighborhood_attention(
                q, k, v, self.rpb, kernel_size=self.kernel_size, scale=self.scale, dropout=dropout, form=self.form
            )
        x = x[:, :height, :width].flatten(-2)
        return self.proj_drop(linear(self.proj, x)).permute(0, 3, 1, 2)

    def position_tables(self) -> dict[str, Resize]:
        """Return the resize function of each position table, by name."""
        return {} if self.rpb is None else {"rpb": by_cells}

    def _uses_natten(self, q: Tensor, dropout: float) -> bool:
        """Return whether to use NATTEN, which supports neither a position bias nor dropout."""
        possible = self.rpb is None and not dropout and natten_attention() is not None
        if self.form == "natten" and not possible:
            raise ValueError("form 'natten' needs NATTEN installed, nat_rpb: false and attn_drop_rate: 0")
        return possible and (self.form == "natten" or (self.form == "auto" and suits_natten(q, self.kernel_size)))


@functools.cache
def natten_attention() -> Callable[..., Tensor] | None:
    """Return NATTEN's function of queries, keys and values ``[B, H, W, heads, d]``, or None if it is not installed."""
    try:
        from natten import na2d
    except ImportError:
        return None
    return na2d


def suits_natten(q: Tensor, kernel_size: int) -> bool:
    """Return whether NATTEN's kernels can process queries ``[B, H, W, heads, d]`` on a GPU."""
    if not q.is_cuda or kernel_size == 1 or needs_plain_operations():
        return False
    from natten.backends import get_compatible_backends

    return bool(get_compatible_backends(q, q, q, torch_compile=False))


def _build(stage: StageOptions) -> NeighborhoodAttention:
    return NeighborhoodAttention(
        stage["dims"],
        heads=stage["heads"],
        kernel_size=stage["nat_ksizes"],
        use_rpb=stage["nat_rpb"],
        attn_drop=stage["attn_drop_rate"],
        proj_drop=stage["drop_rate"],
    )


register("N", Mixer(build=_build, options=OPTIONS, check=lambda stage: stage.divides("heads", "dims")))
