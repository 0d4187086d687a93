"""Fused GPU kernels in Triton, each behind a custom operator, so that an operation is one node in a graph.

The modules import Triton, which comes with PyTorch on Linux, so they are imported only when a kernel is called. The
kernels sum in a fixed order, without atomics, so results are reproducible bit for bit. They do not synchronise with the
host, so they can be captured in CUDA graphs.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from .. import forms

TYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_HEAD = 128  # values per head
NEEDS = f"needs a GPU, heads of at most {LARGEST_HEAD} values and at most float32"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INSTALLED = importlib.util.find_spec("triton") is not None


def has_triton(x: Tensor) -> bool:
    """Return whether the kernels can process a tensor of any shape where it is: on an NVIDIA GPU, or interpreted.

    On GPUs of AMD, which PyTorch also calls ``cuda``, Triton lacks the precision "tf32x3".
    """
    return _INSTALLED and not forms.PLAIN and (INTERPRETED or (x.is_cuda and torch.version.hip is None))


def suits(x: Tensor) -> bool:
    """Return whether the kernels can process a tensor of any shape.

    They have only first derivatives, in reverse mode, so they are not used under transforms of `torch.func`.
    """
    return x.dtype in TYPES and has_triton(x) and not forms.is_transformed()


def suits_heads(x: Tensor) -> bool:
    """Return whether the kernels support the heads of ``[..., heads, d]``."""
    return suits(x) and x.shape[-1] <= LARGEST_HEAD
