"""Constructors of the attentions reject arguments with which they would compute something else, or fail later."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from models.attention import (
    DeformableAttention,
    NeighborhoodAttention,
    PyramidAttention,
    QueryAndAttend,
    SlideAttention,
    WindowAttention,
)

D = partial(DeformableAttention, 16, **{"heads": 4, "groups": 2, "map_size": 8, "stride": 2, "kernel_size": 3})
N = partial(NeighborhoodAttention, 16, **{"heads": 4, "kernel_size": 3})
P = partial(PyramidAttention, 16, **{"heads": 4, "sr_ratio": 2})
Q = partial(QueryAndAttend, 16, **{"heads": 4, "num_queries": 2, "kernel_size": 3})
E = partial(SlideAttention, 16, **{"heads": 4})
L = partial(WindowAttention, 16, **{"heads": 4, "window_size": 4, "map_size": 8, "shifted": False})


@pytest.mark.parametrize(
    ("build", "argument", "message"),
    [
        (D, {"position_bias": "tabel"}, "position_bias = 'tabel' must be one of table, log_cpb, fixed, dwc, none"),
        (D, {"coordinates": "dat+"}, r"coordinates = 'dat\+' must be one of dat\+\+, cvpr22"),
        (D, {"heads": 3}, "dim = 16 is not divisible by heads = 3; change one of them"),
        (D, {"groups": 3}, "heads = 4 is not divisible by groups = 3"),
        (D, {"groups": 0}, "groups = 0 must be at least 1"),
        (D, {"stride": 0}, "stride = 0 must be a whole number, at least 1"),
        (D, {"kernel_size": 0}, "kernel_size = 0 must be a whole number, at least 1"),
        (D, {"stride": 2.0}, "stride = 2.0 must be a whole number"),
        (D, {"map_size": (8, 0)}, "map_size = 0 must be a whole number, at least 1"),
        (D, {"attn_drop": 1.5}, "attn_drop = 1.5 must be a number in"),
        (N, {"kernel_size": (3, 3)}, r"kernel_size = \(3, 3\) must be a whole number, at least 1"),
        (N, {"attn_drop": 1}, "attn_drop = 1 must be a number in"),
        (P, {"attn_drop": 1}, "attn_drop = 1 must be a number in"),
        (L, {"attn_drop": 1}, "attn_drop = 1 must be a number in"),
        (N, {"heads": 3}, "dim = 16 is not divisible by heads = 3"),
        (N, {"kernel_size": 4}, "kernel_size = 4 must be odd"),
        (P, {"heads": 3}, "dim = 16 is not divisible by heads = 3"),
        (P, {"sr_ratio": 0}, "sr_ratio = 0 must be at least 1"),
        (Q, {"heads": 3}, "dim = 16 is not divisible by heads = 3"),
        (Q, {"num_queries": 0}, "num_queries = 0 must be at least 1"),
        (Q, {"kernel_size": 4}, "kernel_size = 4 must be odd"),
        (Q, {"activation": "sigmiod"}, "activation = 'sigmiod' must be one of exp, sigmoid, linear"),
        (E, {"heads": 3}, r"dim = 16 is not divisible by 4 \* heads = 12"),
        (L, {"heads": 3}, "dim = 16 is not divisible by heads = 3"),
        (L, {"window_size": 0}, "window_size = 0 must be at least 1"),
    ],
    ids=str,
)
def test_arguments_that_are_not_allowed_are_rejected(build: Any, argument: dict[str, Any], message: str) -> None:
    assert isinstance(build(), nn.Module)
    with pytest.raises(ValueError, match=message):
        build(**argument)


@pytest.mark.parametrize("module", [D(), N(), D().inspect], ids=["D", "N", "inspect"])
@pytest.mark.parametrize("shape", [(2, 64, 16), (2, 8, 8, 16), (2, 8, 8, 8), (2, 16, 8, 0)], ids=str)
def test_inputs_that_are_no_map_of_the_channels_are_rejected(module: Any, shape: tuple[int, ...]) -> None:
    message = rf"an input of shape {re.escape(str(list(shape)))} does not fit; give \[batch, 16, height, width\]"
    with pytest.raises(ValueError, match=message):
        module(torch.zeros(shape))
