"""The kernels of multi-scale deformable attention equal the plain form, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.ops.gpu import multi_scale as kernels
from models.ops.multi_scale import _op_backward_fake, _op_fake
from tests.models.ops.test_multi_scale import random_arguments, with_gradients


def run(arguments: tuple) -> list[Tensor]:
    value, shapes, starts, locations, weights = arguments
    shapes, starts = torch.tensor(shapes), torch.tensor(starts)
    out = kernels.forward(shapes, starts, value, locations, weights)
    ramp = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *kernels.backward(shapes, starts, ramp, value, locations, weights)]


@pytest.mark.parametrize(("seed", "reach"), [(1, 5.0), (11, 0.4)])
def test_kernels_equal_the_plain_form(seed: int, reach: float) -> None:
    arguments = random_arguments(seed, reach=reach)
    torch.testing.assert_close(run(arguments), with_gradients(arguments, form="reference"))


def test_many_samples_in_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SAMPLES", 2)
    arguments = random_arguments(6)
    torch.testing.assert_close(run(arguments), with_gradients(arguments, form="reference"))


def test_precision() -> None:
    arguments = random_arguments(2, dtype=torch.float32)
    arguments = (arguments[0].bfloat16(), *arguments[1:])
    results = run(arguments)
    assert [x.dtype for x in results] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(results, with_gradients(arguments, form="reference"), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(run(arguments), results, rtol=0, atol=0)


def test_fake_results_look_like_those_of_the_kernels() -> None:
    value, shapes, starts, locations, weights = random_arguments(4, dtype=torch.float32)
    value = value.bfloat16().transpose(1, 2).contiguous().transpose(1, 2)
    locations = locations.transpose(0, 1).contiguous().transpose(0, 1)
    results = run((value, shapes, starts, locations, weights))
    fake_gradients = _op_backward_fake(results[0], value, None, None, locations, weights)
    fakes = _op_fake(value, None, None, locations), *fake_gradients
    for result, fake in zip(results, fakes, strict=True):
        assert (result.shape, result.stride(), result.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_nan_and_infinite_locations() -> None:
    value, shapes, starts, locations, weights = random_arguments(1)
    locations[0, 0], locations[:, 1] = float("nan"), float("inf")
    out = kernels.forward(torch.tensor(shapes), torch.tensor(starts), value, locations, weights)
    assert out[0, 0].isnan().all()
    assert not out[:, 1].any()
    assert out[:, 2:].isfinite().all()


@pytest.mark.parametrize("empty", ["batch", "queries"])
def test_empty_input(empty: str) -> None:
    value, shapes, starts, locations, weights = random_arguments(2)
    if empty == "batch":
        value, locations, weights = value[:0], locations[:0], weights[:0]
    else:
        locations, weights = locations[:, :0], weights[:, :0]
    results = run((value, shapes, starts, locations, weights))
    assert results[0].numel() == 0
    assert [x.shape for x in results[1:]] == [x.shape for x in (value, locations, weights)]
    assert not any(x.any() for x in results)
