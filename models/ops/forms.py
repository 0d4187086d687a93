"""Conditions that decide which form of an operation can run."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import checkpoint

from .precision import matmul_dtype

PLAIN = os.environ.get("DAT_PLAIN") == "1"  # every operation consists of PyTorch's own, on a CPU and on a GPU
CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # of the CPU forms


def operator(name: str) -> str:
    """Return the qualified name of a custom operator, in the namespace ``dat`` of the installed package.

    In a clone, where the package is called ``models``, the namespace is ``dat_clone``: if both are imported, the second
    registration of a name would remove the first operator.
    """
    return f"{'dat' if __name__.startswith('dat.') else 'dat_clone'}::{name}"


def check_form(form: str, known: Sequence[str], operation: str) -> None:
    """Raise a ValueError if an operation does not have a form."""
    if form not in known:
        raise ValueError(f"form {form!r} of {operation} is unknown; choose one of {', '.join(known)}")


def is_captured() -> bool:
    """Return whether operations are being recorded: compiled, exported or traced."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_transformed() -> bool:
    """Return whether a transform of `torch.func` or forward-mode differentiation is active.

    These differentiate in ways that functions with a custom backward do not support.
    """
    if torch.compiler.is_compiling():  # the compiler handles transforms itself
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def needs_plain_operations() -> bool:
    """Return whether only PyTorch's own operations can be used."""
    return PLAIN or is_captured() or is_transformed()


def suits_cpu_forms(x: Tensor) -> bool:
    """Return whether the forms written for CPU caches, with a custom backward, can process a tensor of any shape.

    They are not used in a compiled graph, except as custom operators, see `is_compiled_for_inference`, nor under
    dispatch modes such as operation counters, which do not know oneDNN's operators.
    """
    if x.device.type != "cpu" or needs_plain_operations() or torch._C._len_torch_dispatch_stack():
        return False
    return matmul_dtype(x) in CPU_DTYPES


def is_compiled_for_inference(x: Tensor) -> bool:
    """Return whether a graph without derivatives is being compiled for a CPU, given a tensor of any shape.

    It contains the CPU forms as custom operators. Exported graphs do not: they must run without this package.
    """
    if PLAIN or not torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.is_grad_enabled():
        return False
    return x.device.type == "cpu" and matmul_dtype(x) in CPU_DTYPES


def is_checkpointed() -> bool:
    """Return whether this code runs inside an activation checkpoint, which recomputes it anyway."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == checkpoint.__name__
