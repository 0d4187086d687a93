"""Cache for tensors that depend only on sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch._guards import detect_fake_mode

T = TypeVar("T")

KINDS = 128  # cached results per function; the oldest is evicted


def made_once(make: Callable[..., T]) -> Callable[..., T]:
    """Cache the tensors that a function computes from sizes, types and a device, for every set of arguments.

    Results computed in inference mode can be used in training, too. A compiled graph computes its own, which the
    compiler folds into constants; tensors without values (`FakeTensorMode`) are kept only as long as their mode.
    """

    @functools.wraps(make)
    def make_normal(*args, **kwargs) -> T:
        with torch.inference_mode(False):
            return make(*args, **kwargs)

    keep = functools.lru_cache(maxsize=KINDS)
    kept, pretended = keep(make_normal), WeakKeyDictionary()

    @functools.wraps(make)
    def kept_or_made(*args, **kwargs) -> T:
        if torch.compiler.is_compiling():
            return make(*args, **kwargs)
        mode = detect_fake_mode() if torch._C._len_torch_dispatch_stack() else None
        if mode is None:
            return kept(*args, **kwargs)
        if mode not in pretended:
            pretended[mode] = keep(make_normal)
        return pretended[mode](*args, **kwargs)

    kept_or_made.forget = kept.cache_clear
    return kept_or_made
