"""Helpers shared by the kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Return ``a @ b`` in float32; Triton's interpreter would interpret the bits of bfloat16 as integers."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


def head_blocks(q: Tensor) -> dict[str, int | str]:
    """Return kernel parameters for the heads of ``[..., heads, d]``: padded size and precision of products.

    Products of float32 are exact unless PyTorch is set to lower precision.
    """
    width = max(16, triton.next_power_of_2(q.shape[-1]))  # minimum size of a product
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return {"HEAD": q.shape[-1], "WIDTH": width, "PRECISION": precision}
