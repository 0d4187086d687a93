"""Find the first module with a non-finite output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def first_nonfinite(network: nn.Module, forward: Callable[[], torch.Tensor]) -> str:
    """Run `forward` once and report where non-finite numbers appear first.

    Args:
        network: the modules to watch.
        forward: runs `network` on a batch and returns the loss. Compiled blocks run in eager mode.

    Returns:
        A sentence naming the innermost module with a non-finite output and its class; or what else is not finite.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and not all(tensor.isfinite().all() for tensor in _tensors(output)):
                found.append(f"the output of {name} ({type(module).__name__}) is the first that is not finite")

        return note

    handles = [module.register_forward_hook(watch(name)) for name, module in network.named_modules() if name]
    try:
        with torch.compiler.set_stance("force_eager"):
            loss = forward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    if not loss.isfinite():
        return "every module's output is finite, the loss is not"
    return "every module's output and the loss are finite, a gradient is not"


def _tensors(output: Any) -> Iterable[torch.Tensor]:
    outputs = output if isinstance(output, (tuple, list)) else [output]
    return (tensor for tensor in outputs if isinstance(tensor, torch.Tensor) and tensor.is_floating_point())
