"""Window attention compared with a loop over pixels, for any map size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.attention import WindowAttention


def attend_by_loops(module: WindowAttention, x: Tensor) -> Tensor:
    """Return the module's output on ``[1, C, H, W]``, where each pixel attends to the pixels of its own window."""
    window, shift, heads = module.window_size, module.shift, module.heads
    height, width = x.shape[-2:]
    qkv = module.proj_qkv(x[0].permute(1, 2, 0)).unflatten(-1, (3, heads, -1))
    table = module.relative_position_bias_table

    def side(position: int, length: int) -> tuple[int, int]:
        """Return the window of a coordinate after the roll, and whether the roll wrapped it around."""
        rolled = (position - shift) % (math.ceil(length / window) * window)
        return rolled // window, position < shift

    cells = [(y, column) for y in range(height) for column in range(width)]
    home = {cell: (side(cell[0], height), side(cell[1], width)) for cell in cells}
    out = torch.zeros(height, width, heads, qkv.shape[-1], dtype=x.dtype)
    for y, column in cells:
        keys = [cell for cell in cells if home[cell] == home[y, column]]
        for head in range(heads):
            q = qkv[y, column, 0, head]
            logits = torch.stack(
                [
                    q @ qkv[ky, kx, 1, head] * len(q) ** -0.5
                    + table[(y - ky + window - 1) * (2 * window - 1) + column - kx + window - 1, head]
                    for ky, kx in keys
                ]
            )
            out[y, column, head] = logits.softmax(0) @ torch.stack([qkv[ky, kx, 2, head] for ky, kx in keys])
    return module.proj_out(out.flatten(2)).permute(2, 0, 1)[None]


@pytest.mark.parametrize("shifted", [False, True], ids=["L", "S"])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (5, 7), (3, 2), (1, 1), (9, 4)], ids=str)
@pytest.mark.parametrize("window", [3, 4])
@torch.no_grad()
def test_equals_a_loop_over_pixels(shifted: bool, size: tuple[int, int], window: int) -> None:
    torch.manual_seed(0)
    module = WindowAttention(8, heads=2, window_size=window, map_size=8, shifted=shifted).double()
    module.relative_position_bias_table.normal_()
    x = torch.randn(1, 8, *size, dtype=torch.float64)
    torch.testing.assert_close(module(x), attend_by_loops(module, x))


def test_mask_of_the_native_map_is_stored_and_used() -> None:
    module = WindowAttention(8, heads=2, window_size=4, map_size=8, shifted=True)
    assert module.attn_mask.shape == (4, 16, 16)
    assert set(module.attn_mask.unique().tolist()) == {-100.0, 0.0}
    x = torch.randn(1, 8, 8, 8)
    before = module(x)
    module.attn_mask.zero_()
    assert not torch.allclose(before, module(x))
