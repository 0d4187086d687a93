"""Tensors that depend only on sizes are computed once."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models.ops.caching import cached_tensors


@cached_tensors
def steps(length: int, *, device: torch.device) -> Tensor:
    return torch.arange(length, device=device)


CPU = torch.device("cpu")


def test_results_are_cached_by_arguments() -> None:
    assert steps(5, device=CPU) is steps(5, device=CPU)
    assert steps(6, device=CPU).shape == (6,)


def test_tensors_cached_in_inference_mode_can_be_used_in_training() -> None:
    steps.cache_clear()
    with torch.inference_mode():
        cached = steps(5, device=CPU)
    assert cached is steps(5, device=CPU)
    assert not cached.is_inference()


def test_fake_tensors_are_cached_by_mode() -> None:
    steps.cache_clear()
    with FakeTensorMode() as mode:
        fake = steps(5, device=CPU)
        assert fake is steps(5, device=CPU)
        assert fake.fake_mode is mode
    assert type(steps(5, device=CPU)) is Tensor


def test_cached_fake_tensors_do_not_keep_their_mode() -> None:
    with FakeTensorMode() as mode:
        steps(5, device=CPU)
    alive = weakref.ref(mode)
    del mode
    gc.collect()
    assert alive() is None


def test_a_compiled_graph_does_not_use_the_cache() -> None:
    steps.cache_clear()

    def add(x: Tensor) -> Tensor:
        return x + steps(5, device=x.device)

    x = torch.randn(5)
    torch.testing.assert_close(torch.compile(add, fullgraph=True, backend="eager")(x), add(x))
