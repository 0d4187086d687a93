"""Depthwise convolutions with a skip connection: all forms agree."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models.ops.cpu import conv_mlp as cpu
from models.ops.cpu.onednn import product
from models.ops.depthwise import choose_form, conv_mlp, depthwise_residual


def inputs(batch: int = 5, kernel_size: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (batch, 6, 7, 8), (16, 8), (16,), (16, 1, kernel_size, kernel_size), (16,), (8, 16), (8,)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def with_gradients(form: str, tensors: list[Tensor]) -> list[Tensor]:
    out = conv_mlp(*tensors, form=form)
    ramp = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * ramp).sum(), tensors)]


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("images", [1, 2, 8])
def test_forms_of_the_mlp_agree(images: int, kernel_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CACHED", images * 6 * 7 * 16)
    tensors = inputs(kernel_size=kernel_size)
    for fast, plain in zip(with_gradients("by_hand", tensors), with_gradients("reference", tensors), strict=True):
        torch.testing.assert_close(fast, plain)


def test_mlp_under_autocast_is_as_exact_as_the_plain_one() -> None:
    tensors = inputs()
    exact = with_gradients("reference", tensors)
    narrow = [tensor.detach().float().requires_grad_() for tensor in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_form(narrow[0]) == "by_hand"
        fast, plain = (with_gradients(form, narrow) for form in ("by_hand", "reference"))
    for one, other, truth in zip(fast, plain, exact, strict=True):
        assert one.dtype == other.dtype
        assert (one - truth).norm() < 1.2 * (other - truth).norm() < 0.02 * truth.norm()


def test_mlp_of_a_map_in_any_layout() -> None:
    tensors = inputs()
    channels_first = tensors[0].detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(conv_mlp(channels_first, *tensors[1:]), conv_mlp(*tensors))


@pytest.mark.parametrize("grad", [True, False])
def test_the_mlp_saves_nothing_without_gradients(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CACHED", 1)
    hidden, alive = [], []

    def recorded(*arguments: Tensor) -> Tensor:
        out = product(*arguments)
        if out.shape[-1] == 16:
            hidden.append(weakref.ref(out))
            alive.append(sum(tensor() is not None for tensor in hidden))
        return out

    tensors = inputs()
    with torch.set_grad_enabled(grad):
        expected = conv_mlp(*tensors, form="reference")
        monkeypatch.setattr(cpu, "product", recorded)
        torch.testing.assert_close(conv_mlp(*tensors), expected)
    assert len(alive) == 5  # one per image
    # Without gradients, an image's values are freed at the latest after those of the next one are computed.
    assert max(alive) == 5 if grad else max(alive) <= 2


def test_gpus_use_triton() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.zeros(1, 2, 2, 8).to("cuda")
        assert choose_form(x) == choose_form(x, dropout=0.1) == choose_form(x.half()) == "triton"
        assert choose_form(x.double()) == "reference"
    with pytest.raises(ValueError, match="form 'triton' of the convolutional MLP needs a GPU and at most float32"):
        conv_mlp(*inputs(), form="triton")


def test_mlp_by_hand_has_no_dropout() -> None:
    with pytest.raises(ValueError, match="form 'by_hand' of the convolutional MLP has no dropout; choose auto or ref"):
        conv_mlp(*inputs(), dropout=0.1, form="by_hand")


def test_dropout_of_the_mlp_falls_back() -> None:
    out = conv_mlp(*inputs(), dropout=1.0)
    *_, kernel_bias, weight2, bias2 = inputs()
    torch.testing.assert_close(out, F.linear(F.gelu(kernel_bias), weight2, bias2).expand_as(out))


def test_the_form_depends_on_device_dtype_and_dropout() -> None:
    x = torch.zeros(1)
    assert choose_form(x) == choose_form(x.bfloat16()) == "by_hand"
    assert choose_form(x, dropout=0.1) == choose_form(x.half()) == "reference"


def test_unknown_forms_are_rejected() -> None:
    with pytest.raises(ValueError, match="form 'fused' of the convolutional MLP is unknown; choose one of auto"):
        conv_mlp(*inputs(), form="fused")


def test_residual_is_one_convolution() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64)
    folded, plain = depthwise_residual(x, weight, bias), x + F.conv2d(x, weight, bias, padding=1, groups=4)
    torch.testing.assert_close(folded, plain)
    for one, other in zip(
        torch.autograd.grad(folded.square().sum(), (x, weight)),
        torch.autograd.grad(plain.square().sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_residual_keeps_small_weights_in_low_precision() -> None:
    """1 + 0.001 rounds to 1 in bfloat16; the convolution must see 0.001."""
    x = torch.ones(1, 1, 1, 1)
    weight = torch.zeros(1, 1, 3, 3)
    weight[..., 1, 1] = 0.001
    with torch.autocast("cpu", torch.bfloat16):
        out = depthwise_residual(x, weight, torch.zeros(1))
    assert out.item() == pytest.approx(1.001, abs=1e-5)
