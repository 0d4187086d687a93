"""What the choice between the forms of an operation depends on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import checkpoint


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

    Under autocast and in a compiled graph the plain ones do better: the precision of each product and the fusion of
    elementwise steps are then decided elsewhere. Counters of operations do not know oneDNN's.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or needs_plain_operations():
        return False
    return not torch.is_autocast_enabled("cpu") and not torch._C._len_torch_dispatch_stack()


def is_checkpointed() -> bool:
    """Return whether an outer checkpoint makes anew what is computed here, so that making it anew here is in vain."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == checkpoint.__name__
