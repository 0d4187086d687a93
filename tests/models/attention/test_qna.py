"""Attention with learned queries compared with a loop over pixels, and extreme scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.attention import QueryAndAttend


def attend_by_loops(module: QueryAndAttend, x: Tensor) -> Tensor:
    """Return the module's output on ``[B, C, H, W]``, one pixel, query and head at a time."""
    activate = {"exp": torch.exp, "sigmoid": torch.sigmoid, "linear": lambda s: s}[module.activation]
    batch, channels, height, width = x.shape
    heads, size, radius = module.heads, module.kernel_size, module.kernel_size // 2
    head_dim = channels // heads
    keys = torch.einsum("bchw,oc->bhwo", x, module.proj_k.weight)
    values = torch.einsum("bchw,oc->bhwo", x, module.proj_v.weight)
    mixed = torch.zeros(batch, height, width, channels, dtype=x.dtype)
    for b in range(batch):
        for y in range(height):
            for column in range(width):
                for query in range(module.num_queries):
                    for head in range(heads):
                        part = slice(head * head_dim, (head + 1) * head_dim)
                        index = query * heads + head
                        numerator, denominator = 0.0, 0.0
                        for dy in range(-radius, radius + 1):
                            for dx in range(-radius, radius + 1):
                                if not (0 <= y + dy < height and 0 <= column + dx < width):
                                    continue
                                cell = (dy + radius) * size + dx + radius
                                key = keys[b, y + dy, column + dx, part]
                                weight = activate(key @ module.q_param[query, part] * head_dim**-0.5)
                                weight = weight * activate(module.rpb_table[cell, index])
                                scaled = weight * module.attn_scale[0, 0, cell, index]
                                numerator = numerator + scaled * values[b, y + dy, column + dx, part]
                                denominator = denominator + weight
                        mixed[b, y, column, part] += numerator / denominator
    return torch.einsum("bhwc,oc->bohw", mixed, module.proj_out.weight[:, :, 0, 0])


@pytest.mark.parametrize("activation", ["exp", "sigmoid", "linear"])
@pytest.mark.parametrize(("kernel_size", "size"), [(3, (5, 4)), (5, (3, 6)), (3, (1, 1))])
@torch.no_grad()
def test_equals_a_loop_over_positions(activation: str, kernel_size: int, size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    module = QueryAndAttend(8, heads=2, num_queries=3, kernel_size=kernel_size, activation=activation).double()
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    torch.testing.assert_close(module(x), attend_by_loops(module, x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("activation", ["exp", "sigmoid"])
def test_large_scores_stay_finite(activation: str) -> None:
    torch.manual_seed(1)
    module = QueryAndAttend(8, heads=2, num_queries=2, kernel_size=3, activation=activation)
    x = (1e3 * torch.randn(2, 8, 6, 6)).requires_grad_()
    y = module(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


def test_linear_scores_of_an_empty_map_do_not_divide_by_zero() -> None:
    module = QueryAndAttend(8, heads=2, num_queries=2, kernel_size=3, activation="linear")
    x = torch.zeros(1, 8, 4, 4, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
