"""Memory saved by autograd, and peak GPU memory of a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def kept_for_backward(function: Callable[..., Tensor], arguments: list[Tensor]) -> int:
    """Return the bytes saved by autograd in a call of a function beyond its arguments; shared memory counts once."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function(*arguments)
    own = {tensor.untyped_storage().data_ptr() for tensor in arguments}
    del out
    return sum(size for pointer, size in kept.items() if pointer not in own)


def peak_memory(action: Callable[[], object], network: nn.Module, device: torch.device) -> float:
    """Return the peak GPU memory of an action in MiB, without the memory of other tensors."""
    network.zero_grad()
    own = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    others = torch.cuda.memory_allocated(device) - own
    torch.cuda.reset_peak_memory_stats(device)
    action()
    return (torch.cuda.max_memory_allocated(device) - others) / 2**20
