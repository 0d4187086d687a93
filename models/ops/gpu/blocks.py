"""What the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Return ``a @ b`` in float32; Triton's interpreter would take the bits of bfloat16 for whole numbers."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)
