"""Fused GPU kernels, written in Triton and registered as operators, so that each is one node in a graph.

These modules import Triton, which comes with PyTorch on Linux; they are imported when a kernel is called.
Every kernel sums in a fixed order, without atomics: results are reproducible bit for bit. None of them synchronises
with the host, so they can be captured in CUDA graphs.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ..forms import is_transformed

TYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_HEAD = 128  # values per head
NEEDS = f"needs a GPU, heads of at most {LARGEST_HEAD} values and at most float32"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INSTALLED = importlib.util.find_spec("triton") is not None


def suits(x: Tensor) -> bool:
    """Return whether the kernels run where a tensor of any shape is: on a GPU, or under Triton's interpreter.

    They have only a first derivative, which the transforms of `torch.func` do not support.
    """
    return _INSTALLED and x.dtype in TYPES and (x.is_cuda or INTERPRETED) and not is_transformed()


def suits_heads(x: Tensor) -> bool:
    """Return whether the kernels support the heads of ``[..., heads, d]``."""
    return suits(x) and x.shape[-1] <= LARGEST_HEAD
