"""Scaled dot-product attention: plain operations can be differentiated any number of times."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradgradcheck

from models.ops.products import dot_product_attention


@pytest.mark.parametrize("kind", ["none", "added", "mask"])
def test_second_derivatives_of_plain_operations(kind: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 3, dtype=torch.float64, requires_grad=True) for length in (4, 5, 5))
    bias = {"none": None, "added": torch.randn(4, 5, dtype=torch.float64), "mask": torch.eye(4, 5) == 0}[kind]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dot_product_attention(q, k, v, bias, plain=True)

    torch.testing.assert_close(attend(q, k, v), dot_product_attention(q, k, v, bias))
    assert gradgradcheck(attend, (q, k, v))
