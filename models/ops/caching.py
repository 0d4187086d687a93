"""Cache for tensors that depend only on sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

T = TypeVar("T")

MAX_ENTRIES = 128  # cached results per function; the least recently used one is evicted


def cached_tensors(function: Callable[..., T], *, entries: int = MAX_ENTRIES) -> Callable[..., T]:
    """Cache the tensors that a function computes from sizes, dtypes and a device.

    They are created outside inference mode, so that training can use them, too. A compiled graph calls the function
    itself, and the compiler folds the result into a constant. Fake tensors are cached as long as their
    `FakeTensorMode` exists.
    """

    @functools.wraps(function)
    def compute(*args, **kwargs) -> T:
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    new_cache = functools.lru_cache(maxsize=entries)
    cache = new_cache(compute)

    @functools.wraps(function)
    def look_up(*args, **kwargs) -> T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        mode = detect_fake_mode() if torch._C._len_torch_dispatch_stack() else None
        if mode is None:
            return cache(*args, **kwargs)
        # In an attribute of the mode: fake tensors refer to their mode, so a cache of ours would keep it alive.
        caches = vars(mode).setdefault("_cached_tensors", {})
        if compute not in caches:
            caches[compute] = new_cache(compute)
        return caches[compute](*args, **kwargs)

    look_up.cache_clear = cache.cache_clear
    return look_up


def under_modes(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of any shape that was made without dispatch modes on a device, for use under the active ones.

    Under `FakeTensorMode` that is a fake copy. A graph that is being compiled or exported holds the tensor itself.
    """
    mode = detect_fake_mode() if torch._C._len_torch_dispatch_stack() and not torch.compiler.is_compiling() else None
    return (x if mode is None else mode.from_tensor(x)).to(device)
