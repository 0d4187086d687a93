"""Helpers shared by the kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Return ``a @ b`` in float32. Under Triton's interpreter, which misreads bfloat16, the factors are cast first."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def move_closer(place, length):
    """Return positions in cells of an axis, of which those far outside are moved closer to it; NaN is kept."""
    place = tl.where(place < -2.0, -2.0, place)
    return tl.where(place > length + 1.0, length + 1.0, place)


@triton.jit
def as_index(place):
    """Return whole numbers as integers; -2, outside of every axis, for NaN, whose conversion is undefined."""
    return tl.where(place == place, place, -2.0).to(tl.int32)


def launch(kernel, programs: int, *arguments, **options) -> None:
    """Run a kernel on the device of its first argument, which is a tensor.

    Triton would use the current device, which need not be the device of the tensors, and compile a kernel anew for
    integers that are 1 or multiples of 16, unless they are in its ``do_not_specialize``: there the kernels list the
    sizes that change from batch to batch, in ``SIZES``.
    """
    with torch.cuda.device_of(arguments[0]):
        # Products and sums are fused into one instruction, whatever Triton's default is.
        kernel[(programs,)](*arguments, enable_fp_fusion=True, **options)


def head_blocks(q: Tensor) -> dict[str, int | str]:
    """Return kernel parameters for the heads of ``[..., heads, d]``: size, padded size and precision of products.

    Products of float32 use TF32 only if PyTorch's own do: `torch.backends.cuda.matmul.fp32_precision`.
    """
    width = max(16, triton.next_power_of_2(q.shape[-1]))  # 16 is the smallest side of tl.dot
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return {"HEAD": q.shape[-1], "WIDTH": width, "PRECISION": precision}
