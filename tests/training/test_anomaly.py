"""The first module with a non-finite output is named, not those that follow or contain it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.anomaly import first_nonfinite


def network() -> nn.Sequential:
    """Return two blocks of two layers."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)) for _ in range(2)))


def report(model: nn.Module, *, scale: float = 1.0) -> str:
    return first_nonfinite(model, lambda: (model(torch.ones(2, 3)) * scale).sum())


@pytest.mark.parametrize("name", ["0.0", "0.1", "1.0", "1.1"])
def test_the_first_module_is_named(name: str) -> None:
    model = network()
    with torch.no_grad():
        model.get_submodule(name).bias.fill_(torch.inf)
    kind = type(model.get_submodule(name)).__name__
    assert report(model) == f"the output of {name} ({kind}) is the first that is not finite"
    assert not any(module._forward_hooks for module in model.modules())


def test_nonfinite_loss_and_gradient_are_told_apart() -> None:
    assert report(network(), scale=torch.nan) == "every module's output is finite, the loss is not"
    assert report(network()) == "every module's output and the loss are finite, a gradient is not"


def test_compiled_blocks_are_inspected_too() -> None:
    model = network()
    for block in model:
        block.compile(backend="eager")
    model(torch.ones(2, 3))
    with torch.no_grad():
        model[1][0].bias.fill_(torch.nan)
    assert "output of 1.0 (Linear)" in report(model)
