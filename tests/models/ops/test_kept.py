"""Tensors that depend on sizes alone are made once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models.ops.kept import made_once


@made_once
def steps(length: int, *, device: torch.device) -> Tensor:
    return torch.arange(length, device=device)


CPU = torch.device("cpu")


def test_every_set_of_arguments_is_made_once() -> None:
    assert steps(5, device=CPU) is steps(5, device=CPU)
    assert steps(6, device=CPU).shape == (6,)


def test_what_inference_makes_serves_training() -> None:
    steps.forget()
    with torch.inference_mode():
        made = steps(5, device=CPU)
    assert made is steps(5, device=CPU)
    assert not made.is_inference()


def test_tensors_without_values_stay_with_their_mode() -> None:
    steps.forget()
    with FakeTensorMode() as mode:
        made = steps(5, device=CPU)
        assert made is steps(5, device=CPU)
        assert made.fake_mode is mode
    assert type(steps(5, device=CPU)) is Tensor


def test_a_compiled_graph_makes_its_own() -> None:
    steps.forget()

    def add(x: Tensor) -> Tensor:
        return x + steps(5, device=x.device)

    x = torch.randn(5)
    torch.testing.assert_close(torch.compile(add, fullgraph=True, backend="eager")(x), add(x))
