"""What depends on sizes alone is made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch._guards import detect_fake_mode

T = TypeVar("T")

KINDS = 128  # sets of arguments that are kept for a function; the oldest is made again


def made_once(make: Callable[..., T]) -> Callable[..., T]:
    """Keep the tensors that a function makes from sizes, types and a device, for every set of its arguments.

    What is made in inference mode serves training too. A compiled graph makes its own, which the compiler folds into
    constants; tensors without values (`FakeTensorMode`) are kept no longer than their mode.
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
