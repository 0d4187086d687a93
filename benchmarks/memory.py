"""Memory saved by autograd, and peak memory of an action."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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


def peak_increase(action: Callable[[], object], device: torch.device) -> float:
    """Return the increase of peak memory by an action in MiB: allocated memory on a GPU, else resident memory (Linux).

    A process should measure one action only, as memory freed by others would be used again: see `peak_in_new_process`.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    x = torch.ones(512, 512, requires_grad=True)
    torch.nn.functional.linear(x, x).sum().backward()  # loads the libraries of the first product
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    action()
    return _status("VmHWM") - before


def peak_in_new_process(module: str, *words: str) -> float:
    """Return the MiB that the benchmark ``module`` prints for its flag ``--peak``, run with the flags of this process.

    Args:
        module: name of the module.
        words: values of the flag: what to measure.
    """
    command = [sys.executable, "-m", module, *sys.argv[1:], "--peak", *words]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _status(name: str) -> float:
    """Return one of the kernel's memory figures of this process, in MiB."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 2**10
