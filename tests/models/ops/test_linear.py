"""Linear layers: all forms agree."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from models.layers import linear as apply_linear
from models.layers import pointwise
from models.ops import linear as linear_module
from models.ops.cpu import onednn
from models.ops.cpu.onednn import depthwise_gelu, product, suits
from models.ops.depthwise import conv_mlp
from models.ops.linear import choose_form, linear

pytestmark = pytest.mark.skipif(not suits(torch.float32), reason="PyTorch without oneDNN, or not on x86")


class Quantized(Tensor):
    """A stand-in for tensor subclasses that implement their own products."""


def inputs(*leading: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in ((*leading, 7), (5, 7), (5,))]


def with_gradients(form: str, tensors: list[Tensor]) -> list[Tensor]:
    out = linear(*tensors, form=form)
    ramp = torch.linspace(-1, 2, out.numel()).view_as(out)
    return [out, *torch.autograd.grad((out * ramp).sum(), tensors)]


def loss(form: str) -> Callable[..., Tensor]:
    return lambda *tensors: linear(*tensors, form=form).square().sum()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3, 4), (1, 1, 1), (0, 2)])
def test_forms_agree(leading: tuple[int, ...]) -> None:
    tensors = inputs(*leading)
    for fast, plain in zip(with_gradients("onednn", tensors), with_gradients("reference", tensors), strict=True):
        torch.testing.assert_close(fast, plain)


def test_forms_agree_in_any_layout() -> None:
    x, weight, bias = (tensor.detach() for tensor in inputs(2, 3, 4))
    tensors = [x.permute(1, 2, 0, 3), weight.t().clone().t(), bias.repeat_interleave(2)[::2]]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    for fast, plain in zip(with_gradients("onednn", tensors), with_gradients("reference", tensors), strict=True):
        torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize("trained", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_inputs_are_not_saved_for_frozen_weights(trained: tuple[int, int, int]) -> None:
    kept, gradients = [], []
    for form in ("onednn", "reference"):
        tensors = [tensor.detach().requires_grad_(bool(flag)) for tensor, flag in zip(inputs(3), trained, strict=True)]
        x = tensors[0] * 1
        alive = weakref.ref(x)
        out = linear(x, *tensors[1:], form=form)
        del x
        kept.append(alive() is not None)
        gradients.append(
            torch.autograd.grad(out.square().sum(), [tensor for tensor in tensors if tensor.requires_grad])
        )
    assert kept == [bool(trained[1])] * 2
    torch.testing.assert_close(*gradients)


def test_second_derivatives_agree() -> None:
    fast, plain = (torch.autograd.functional.hessian(loss(form), tuple(inputs(4))) for form in ("onednn", "reference"))
    torch.testing.assert_close(fast, plain)
    assert plain[0][1].any()


@pytest.mark.parametrize("derivative", [torch.func.grad, torch.func.jacfwd, torch.func.hessian])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_use_the_plain_form(derivative: Callable[..., Callable[..., tuple[Tensor, ...]]]) -> None:
    expected, result = (derivative(loss(form), argnums=(0, 1, 2))(*inputs(4)) for form in ("reference", "auto"))
    torch.testing.assert_close(result, expected)
    with pytest.raises(ValueError, match=r"form 'onednn' .* supports no transforms of torch.func; choose auto or"):
        derivative(loss("onednn"), argnums=(0, 1, 2))(*inputs(4))


def test_the_form_depends_on_device_dtype_and_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = inputs(3)
    assert choose_form(x, weight, bias) == choose_form(x, weight, None) == "onednn"
    for other, form in ((torch.float64, "reference"), (torch.bfloat16, "onednn")):
        assert choose_form(x.to(other), weight.to(other), bias.to(other)) == form
        assert choose_form(x, weight.to(other), bias) == choose_form(x, weight, bias.to(other)) == "reference"
    assert choose_form(x, weight.as_subclass(Quantized), bias) == "reference"
    assert choose_form(x, weight.to("meta"), bias) == choose_form(x.to_sparse(), weight, bias) == "reference"
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_form(x, weight, bias) == choose_form(x.bfloat16(), weight, bias) == "onednn"
    with torch.autocast("cpu", torch.float16):
        assert choose_form(x, weight, bias) == "reference"
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert choose_form(x, weight, bias) == "reference"
    monkeypatch.setattr(onednn, "_BUILT_IN", False)
    assert choose_form(x, weight, bias) == "reference"


@pytest.mark.parametrize(
    ("apply", "layer", "shape"),
    [
        (apply_linear, nn.Linear(7, 5), (2, 3, 7)),
        (apply_linear, nn.Linear(7, 5, bias=False), (2, 3, 7)),
        (pointwise, nn.Conv2d(7, 5, 1), (2, 7, 3, 3)),
    ],
)
def test_layers_are_fused_unless_something_is_attached(
    apply: Callable[..., Tensor], layer: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(linear_module, "multiply", lambda *tensors: calls.append(tensors) or product(*tensors))
    x = torch.randn(*shape)
    with torch.inference_mode():
        fast = apply(layer, x)
    assert len(calls) == 1
    layer.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(apply(layer, x), fast)
    assert len(calls) == 1


def test_autocast_equals_that_of_pytorch() -> None:
    tensors = inputs(4)
    with torch.autocast("cpu", torch.bfloat16):
        fast, plain = (with_gradients(form, tensors) for form in ("onednn", "reference"))
    assert fast[0].dtype == plain[0].dtype == torch.bfloat16
    torch.testing.assert_close(fast, plain)


def test_wrong_shapes_are_named_by_pytorch() -> None:
    x, weight, bias = inputs(3)
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(3x6 and 7x5\)"):
        linear(x[:, :6], weight, bias)


def test_forms_reject_what_they_do_not_support() -> None:
    x, weight, bias = inputs(1)
    with pytest.raises(
        ValueError, match="form 'mkl' of a linear layer is unknown; choose one of auto, reference, onednn"
    ):
        linear(x, weight, bias, form="mkl")
    with pytest.raises(
        ValueError, match="form 'onednn' of a linear layer needs matching shapes, float32 or bfloat16 and an x86"
    ):
        linear(x.double(), weight.double(), bias.double(), form="onednn")


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_both_libraries_compute_the_same(kernel_size: int) -> None:
    """The functions use oneDNN for float32 and plain PyTorch for float64."""
    x, weight, bias = (tensor.detach() for tensor in inputs(2, 3))
    torch.testing.assert_close(product(x, weight, bias), product(x.double(), weight.double(), bias.double()).float())
    maps = torch.randn(2, 6, 7, 8).contiguous(memory_format=torch.channels_last)
    kernel, bias = torch.randn(6, 1, kernel_size, kernel_size), torch.randn(12)[::2]
    fast = depthwise_gelu(maps, kernel, bias)
    torch.testing.assert_close(fast, depthwise_gelu(maps.double(), kernel.double(), bias.double()).float())
    assert fast.is_contiguous(memory_format=torch.channels_last)


def test_the_convolutional_mlp_by_onednn_equals_the_plain_form() -> None:
    torch.manual_seed(0)
    shapes = (5, 6, 7, 8), (16, 8), (16,), (16, 1, 3, 3), (16,), (8, 16), (8,)
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    results = []
    for form in ("by_hand", "reference"):
        out = conv_mlp(*tensors, form=form)
        results.append([out, *torch.autograd.grad(out.square().mean(), tensors)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
