"""Window and shifted-window attention (Swin, arXiv 2103.14030), letters L and S."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import as_pair, linear
from ..ops.products import dot_product_attention
from ..ops.window import merge, padding_mask, partition, relative_position_index, shift_mask
from ..options import StageOption, StageOptions, at_least, check_divisible, rate
from ..tables import Resize, square_along
from .letters import Mixer, register

WINDOW_SIZES = StageOption((7, 7, 7, 7), "Window size of L and S, kernel size of X.", each=at_least(1))


class WindowAttention(nn.Module):
    """Self-attention within square windows, which ``shifted`` moves by half a window.

    A map whose sides are not multiples of the window is padded on the right and bottom; padding is never attended to.

    Args:
        dim: channels C.
        heads: attention heads; divides ``dim``.
        window_size: side of the windows in pixels.
        map_size: native height and width of the map, for which the mask of shifted windows is stored.
        shifted: whether the windows are shifted.
        attn_drop: probability of dropping an attention weight.
        proj_drop: dropout rate of the output.

    Raises:
        ValueError: an argument is not allowed or contradicts another.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        window_size: int,
        map_size: int | tuple[int, int],
        shifted: bool,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_divisible("dim", dim, "heads", heads)
        rate().require("attn_drop", attn_drop)
        WINDOW_SIZES.each.require("window_size", window_size)
        self.heads = heads
        self.window_size = window_size
        self.shift = (window_size + 1) // 2 if shifted else 0  # rounded up, as in the published code
        self.attn_drop = attn_drop
        self.native_size = self._padded(as_pair(map_size))
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, heads))
        self.register_buffer("relative_position_index", torch.empty(window_size**2, window_size**2, dtype=torch.int64))
        self.reset_parameters()
        self.proj_qkv = nn.Linear(dim, 3 * dim)
        self.proj_out = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        """Initialise the position table, its index and the mask; layers initialise themselves."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.01)
        self.relative_position_index.copy_(relative_position_index(self.window_size))
        self.set_map_size(self.native_size)

    def set_map_size(self, size: tuple[int, int]) -> None:
        """Recompute the mask of shifted windows for maps of another native height and width."""
        self.native_size = self._padded(size)
        if self.shift:
            device = self.relative_position_index.device
            self.register_buffer("attn_mask", shift_mask(self.native_size, self.window_size, self.shift, device))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        batch, _, height, width = x.shape
        size = self._padded((height, width))
        x = x.permute(0, 2, 3, 1)  # [B, H, W, C]
        if size != (height, width):  # F.pad would copy the map even without padding
            x = F.pad(x, (0, 0, 0, size[1] - width, 0, size[0] - height))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        qkv = linear(self.proj_qkv, partition(x, self.window_size)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B * windows, heads, w*w, d]
        dropout = self.attn_drop if self.training else 0.0
        bias = self._bias((height, width), size, batch, q.dtype)
        x = dot_product_attention(q, k, v, bias, dropout=dropout)
        x = self.proj_drop(linear(self.proj_out, x.transpose(1, 2).flatten(2)))
        x = merge(x, self.window_size, size)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, :height, :width].permute(0, 3, 1, 2)

    def position_tables(self) -> dict[str, Resize]:
        """Return the resize function of each position table, by name."""
        return {"relative_position_bias_table": square_along(0)}

    def no_weight_decay(self) -> set[str]:
        """Return the parameters exempt from weight decay in the published recipe."""
        return {"relative_position_bias_table"}

    def _padded(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = (-(-length // self.window_size) * self.window_size for length in size)
        return height, width

    def _bias(self, size: tuple[int, int], padded: tuple[int, int], batch: int, dtype: torch.dtype) -> Tensor:
        """Return the sum of position bias and masks, ``[1, heads, w*w, w*w]`` or ``[B * windows, heads, w*w, w*w]``."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        masks = []
        if self.shift and padded == self.native_size:
            masks.append(self.attn_mask)
        elif self.shift:
            masks.append(shift_mask(padded, self.window_size, self.shift, bias.device))
        if size != padded:
            masks.append(padding_mask(size, padded, self.window_size, self.shift, bias.device))
        if masks:
            bias = (bias + sum(masks)[:, None]).repeat(batch, 1, 1, 1)
        return bias.to(dtype)


def _build(stage: StageOptions, *, shifted: bool) -> WindowAttention:
    return WindowAttention(
        stage["dims"],
        heads=stage["heads"],
        window_size=stage["window_sizes"],
        map_size=stage.map_size,
        shifted=shifted,
        attn_drop=stage["attn_drop_rate"],
        proj_drop=stage["drop_rate"],
    )


for _letter in "LS":
    register(
        _letter,
        Mixer(
            build=partial(_build, shifted=_letter == "S"),
            options={"window_sizes": WINDOW_SIZES},
            check=lambda stage: stage.divides("heads", "dims"),
        ),
    )
