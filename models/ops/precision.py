"""Precision of operations: at least float32 where rounding matters, and the dtype that autocast asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for lower precision, and the same dtype otherwise."""
    return torch.promote_types(dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """Return a tensor of any shape in at least float32."""
    return x.to(at_least_float32(x.dtype))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a tensor of any shape enters a matrix product; autocast does not touch float64."""
    if _autocasts(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


@contextmanager
def cast_for_matmul(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Yield tensors of any shape in their `matmul_dtype`, with autocast disabled inside the block."""
    cast = [tensor.to(matmul_dtype(tensor)) for tensor in tensors]
    with autocast_disabled(tensors[0].device.type):
        yield cast


def autocast_disabled(device: str) -> AbstractContextManager:
    """Return a context without autocast on a device type.

    Entering `torch.autocast` costs as much as a small operation, so this does nothing if autocast is off.
    """
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


def _autocasts(device: str) -> bool:
    """Return whether autocast is on for a device type; for some, such as meta, PyTorch has none and raises an error."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
