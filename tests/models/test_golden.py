"""Outputs, gradients and parameter names equal those of the published implementation."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import QueryAndAttend
from models.dat import DAT
from tests import golden

# All tests of a case run in one process, which builds its networks once.
CASES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in golden.CASES]
CHEAP_CASES = ["cvpr22_mini", "mini_d_logcpb", "mini_ls", "mini_mixed", "mini_nd"]


@functools.lru_cache(maxsize=2)  # one case in float64 and float32; all cases would take two gigabytes
def build(name: str, dtype: torch.dtype = torch.float64) -> DAT:
    """Return the model of a case with its weights, in evaluation mode."""
    description, _ = golden.load("cases", name)
    coordinates = "cvpr22" if name.startswith("cvpr22") else "dat++"
    return golden.fill(DAT(**description["kwargs"], coordinates=coordinates).to(dtype).eval())


def images(name: str) -> Tensor:
    description, _ = golden.load("cases", name)
    return golden.image_batch(name, description["input"])


def assert_close(actual: Tensor, expected: np.ndarray, tolerance: float) -> None:
    """Assert that errors are at most ``tolerance`` times the largest expected value."""
    error = np.abs(actual.detach().double().numpy() - expected).max()
    assert error <= tolerance * np.abs(expected).max(), f"{error:.3g} against {np.abs(expected).max():.3g}"


@pytest.mark.parametrize("name", CASES)
def test_state_dict_has_the_published_names_and_shapes(name: str) -> None:
    description, _ = golden.load("cases", name)
    model = build(name)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert list(shapes.items()) == list(description["state_dict"].items())
    assert sum(parameter.numel() for parameter in model.parameters()) == description["num_parameters"]


@pytest.mark.parametrize("name", CASES)
def test_float64_values_and_gradients(name: str) -> None:
    description, arrays = golden.load("cases", name)
    model = build(name)
    model.zero_grad()
    x = images(name).requires_grad_()

    features, maps = model.forward_intermediates(x)
    logits = model.forward_head(features)
    loss = F.cross_entropy(logits, golden.labels(*logits.shape))
    loss.backward()

    assert_close(logits, arrays["logits"], 1e-6)
    assert_close(loss, arrays["loss"], 1e-6)
    assert_close(x.grad.norm(), arrays["input_grad_norm"], 1e-5)
    for i, stage_output in enumerate(maps):
        assert list(stage_output.shape) == arrays[f"stage{i}_shape"].tolist()
        assert_close(stage_output.square().mean().sqrt(), arrays[f"stage{i}_rms"], 1e-6)
        picked = torch.linspace(0, stage_output.numel() - 1, 64).long()
        assert_close(stage_output.flatten()[picked], arrays[f"stage{i}_samples"], 1e-6)
    norms = {key: None if p.grad is None else p.grad.norm().item() for key, p in model.named_parameters()}
    # The bias of a key projection cancels in the softmax: its gradient is rounding noise of 1e-17.
    assert norms == {
        key: None if norm is None else pytest.approx(norm, rel=1e-5, abs=1e-12)
        for key, norm in description["grad_norm"].items()
    }


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_forward_equals_the_published_logits_in_float32(name: str) -> None:
    _, arrays = golden.load("cases", name)
    assert_close(build(name, torch.float32)(images(name).float()), arrays["logits"], 1e-4)


@pytest.mark.parametrize("name", CHEAP_CASES)
def test_bfloat16_autocast_stays_near(name: str) -> None:
    """bfloat16 has 8 binary digits: logits are within 3 % of the largest one, the norm of the gradient within 3 %."""
    _, arrays = golden.load("cases", name)
    model = build(name, torch.float32)
    x = images(name).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    loss = F.cross_entropy(logits.float(), golden.labels(*logits.shape))
    loss.backward()
    assert_close(logits, arrays["logits"], 3e-2)
    assert_close(x.grad.norm(), arrays["input_grad_norm"], 3e-2)


@pytest.mark.parametrize("name", golden.MODULES)
def test_learned_queries_equal_the_published_module(name: str) -> None:
    description, arrays = golden.load("modules", name)
    kwargs = description["kwargs"]
    module = QueryAndAttend(
        kwargs["channels"],
        heads=kwargs["heads"],
        num_queries=kwargs["nq"],
        kernel_size=kwargs["ksize"],
        activation=kwargs["activation"],
    )
    golden.fill(module.double().eval())
    assert {key: list(value.shape) for key, value in module.state_dict().items()} == description["state_dict"]
    x = golden.image_batch(name, description["input"]).requires_grad_()
    output = module(x)
    output.square().mean().backward()
    assert_close(output, arrays["output"], 1e-6)
    assert_close(x.grad, arrays["input_grad"], 1e-5)
    norms = {key: parameter.grad.norm().item() for key, parameter in module.named_parameters()}
    assert norms == pytest.approx(description["grad_norm_of_mean_square"], rel=1e-5)
