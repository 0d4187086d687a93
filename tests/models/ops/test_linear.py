"""Linear layers: every form is the same function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.ops import onednn
from models.ops.linear import choose_form, linear
from models.ops.onednn import depthwise_gelu, product, suits

needs_onednn = pytest.mark.skipif(not suits(torch.zeros(1)), reason="PyTorch without oneDNN, or not on x86")


def inputs(*leading: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in ((*leading, 7), (5, 7), (5,))]


def with_gradients(form: str, tensors: list[Tensor]) -> list[Tensor]:
    out = linear(*tensors, form=form)
    ramp = torch.linspace(-1, 2, out.numel()).view_as(out)
    return [out, *torch.autograd.grad((out * ramp).sum(), tensors)]


@pytest.mark.parametrize("leading", [(3,), (2, 3, 4), (1, 1, 1), (0, 2)])
def test_forms_agree(leading: tuple[int, ...]) -> None:
    tensors = inputs(*leading)
    for fast, plain in zip(with_gradients("onednn", tensors), with_gradients("reference", tensors), strict=True):
        torch.testing.assert_close(fast, plain)


def test_forms_agree_in_any_layout() -> None:
    x, weight, bias = inputs(2, 3, 4)
    tensors = [x.detach().permute(1, 2, 0, 3).requires_grad_(), weight.detach().t().clone().t().requires_grad_(), bias]
    for fast, plain in zip(with_gradients("onednn", tensors), with_gradients("reference", tensors), strict=True):
        torch.testing.assert_close(fast, plain)


def test_without_bias_and_with_frozen_weights() -> None:
    x, weight, _ = inputs(3)
    weight.requires_grad_(False)
    out = linear(x, weight, None, form="onednn")
    torch.testing.assert_close(out, x @ weight.t())
    (to_x,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(to_x, weight.sum(0).expand(3, 7))


def test_second_derivatives_and_function_transforms() -> None:
    tensors = inputs(4)

    def loss(form: str, *tensors: Tensor) -> Tensor:
        return linear(*tensors, form=form).square().mean()

    for form in ("onednn", "reference"):
        assert torch.autograd.gradgradcheck(
            lambda *tensors, form=form: linear(*tensors, form=form), [tensor.double() for tensor in tensors]
        )
    per_row = [
        torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0, None, None))(form, *tensors)
        for form in ("onednn", "reference")
    ]
    torch.testing.assert_close(*per_row)


@needs_onednn
def test_the_choice_of_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert choose_form(x) == "onednn"
    assert choose_form(x.double()) == choose_form(x.bfloat16()) == choose_form(x.to("meta")) == "reference"
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_form(x) == "reference"
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert choose_form(x) == "reference"
    monkeypatch.setattr(onednn, "_BUILT_IN", False)
    assert choose_form(x) == "reference"


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(
        ValueError, match="form 'mkl' of a linear layer is unknown; choose one of auto, reference, onednn"
    ):
        linear(*inputs(1), form="mkl")


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_both_libraries_compute_the_same(kernel_size: int) -> None:
    """What oneDNN is not taken for goes the plain way."""
    x, weight, bias = (tensor.detach() for tensor in inputs(2, 3))
    torch.testing.assert_close(product(x, weight, bias), product(x.double(), weight.double(), bias.double()).float())
    maps = torch.randn(2, 6, 7, 8).contiguous(memory_format=torch.channels_last)
    kernel, bias = torch.randn(6, 1, kernel_size, kernel_size), torch.randn(6)
    fast = depthwise_gelu(maps, kernel, bias)
    torch.testing.assert_close(fast, depthwise_gelu(maps.double(), kernel.double(), bias.double()).float())
    assert fast.is_contiguous(memory_format=torch.channels_last)
