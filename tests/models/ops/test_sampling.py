"""Sampling a map: all forms agree."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.ops.sampling import choose_form, sample


@pytest.mark.parametrize("reach", [1.0, 1.6])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", [(5, 8), (1, 4), (1, 1)], ids=str)
def test_forms_agree(size: tuple[int, int], groups: int, reach: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, *size, 6, dtype=torch.float64, requires_grad=True)
    positions = ((torch.rand(2, groups, 7, 2, dtype=torch.float64) * 2 - 1) * reach).requires_grad_()
    results = []
    for form in ("rows", "reference"):
        samples = sample(x, positions, form=form)
        ramp = torch.linspace(-1, 2, samples.numel(), dtype=torch.float64).view_as(samples)
        results.append([samples, *torch.autograd.grad((samples * ramp).sum(), (x, positions))])
    for rows, plain in zip(*results, strict=True):
        torch.testing.assert_close(rows, plain)


@pytest.mark.parametrize("form", ["rows", "reference"])
def test_a_batch_without_images_gives_no_samples(form: str) -> None:
    x, positions = torch.zeros(0, 4, 5, 6, requires_grad=True), torch.zeros(0, 3, 7, 2, requires_grad=True)
    samples = sample(x, positions, form=form)
    samples.sum().backward()
    assert samples.shape == (0, 7, 6)
    assert (x.grad.shape, positions.grad.shape) == (x.shape, positions.shape)


def test_positions_keep_their_precision() -> None:
    x = torch.arange(256.0).view(1, 1, 256, 1)
    positions = torch.tensor([[[[0.0, 0.3]]]])
    expected = 1.3 / 2 * 255
    assert sample(x.bfloat16(), positions).item() == pytest.approx(expected, rel=2**-8)


def test_the_form_depends_on_device_and_batch() -> None:
    x = torch.zeros(2, 4, 4, 2)
    assert choose_form(x) == "rows"
    assert choose_form(x[:1]) == "reference"
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert choose_form(x.to("cuda")) == choose_form(x.to("cuda").bfloat16()) == "triton"
        assert choose_form(x.to("cuda").double()) == "reference"


def test_triton_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="form 'triton' of sampling needs a GPU and at most float32; choose auto"):
        sample(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 2), form="triton")


def test_unknown_forms_are_rejected() -> None:
    with pytest.raises(ValueError, match="form 'nearest' of sampling is unknown; choose one of auto"):
        sample(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 2), form="nearest")
