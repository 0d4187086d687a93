"""Changes to the losses of transformers' detectors: float32, and no errors for numbers that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def guarded_loss(loss: Callable[..., Any], *given: Any, **named: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Return what ``loss``, a loss function of transformers' detectors, returns for the given arguments in float32.

    In float16, a probability can be 1, and the matcher then gives an infinite cost to the most certain query. NaN in a
    box is an error in transformers, which would stop this rank while the others wait for it. Here, NaN is replaced, and
    if any argument is not finite, all losses are NaN, so that all ranks skip the update.
    """
    tensors = [x for x in (*given, *named.values()) if _is_float(x)]
    with torch.autocast(tensors[0].device.type, enabled=False):
        total, terms, auxiliary = loss(*map(_finite, given), **{name: _finite(x) for name, x in named.items()})
    zero = sum(0.0 * x.detach().float().sum() for x in tensors)  # NaN if an argument is not finite
    return total + zero, {name: term + zero for name, term in terms.items()}, auxiliary


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _finite(x: Any) -> Any:
    """Return floats in float32 with a value that is valid for logits and boxes in place of NaN, all else unchanged."""
    return x.float().nan_to_num(0.5) if _is_float(x) else x
