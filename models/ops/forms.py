"""What the choice between the forms of an operation depends on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import checkpoint


def operator(name: str) -> str:
    """Return the qualified name of a custom operator: its namespace is the package, ``dat``.

    A clone, whose package is ``models``, uses ``dat_clone``: to register a name twice in a process removes the first
    operator.
    """
    return f"{'dat' if __name__.startswith('dat.') else 'dat_clone'}::{name}"


def is_captured() -> bool:
    """Return whether operations are being recorded: compiled, exported or traced."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_transformed() -> bool:
    """Return whether `torch.func` or forward-mode differentiation follows what is computed.

    They need operations with every kind of derivative, which those with a backward of their own do not have.
    """
    if torch.compiler.is_compiling():  # which sees to transforms itself
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def needs_plain_operations() -> bool:
    """Return whether only operations of PyTorch itself will do."""
    return is_captured() or is_transformed()


def runs_by_hand(x: Tensor) -> bool:
    """Return whether forms with a backward of their own, written for the caches of a CPU, suit where ``x`` is used.

    The tensor may have any shape. In a compiled graph the plain ones do better: the fusion of elementwise steps is then
    decided elsewhere. Counters of operations do not know oneDNN's.
    """
    if x.device.type != "cpu" or needs_plain_operations() or torch._C._len_torch_dispatch_stack():
        return False
    return product_dtype(x) in (torch.float32, torch.float64, torch.bfloat16)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which a tensor of any shape enters products: the autocast's, which leaves float64 alone."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


@contextmanager
def products_of(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Give tensors of any shape in their `product_dtype`, for operations that decide their precision themselves."""
    cast = [tensor.to(product_dtype(tensor)) for tensor in tensors]
    with without_autocast(tensors[0].device.type):
        yield cast


def without_autocast(device: str) -> AbstractContextManager:
    """Return a context in which operations work in the types of their arguments.

    Leaving the autocast costs as much as a small operation, so that it is left only where it is on.
    """
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def is_checkpointed() -> bool:
    """Return whether an outer checkpoint recomputes this code, so that recomputing here gains nothing."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == checkpoint.__name__
