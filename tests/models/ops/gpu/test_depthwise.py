"""The kernels of the depthwise convolution with a skip connection equal the plain form, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.depthwise import conv_mlp
from models.ops.gpu import depthwise as kernels

NAMES = ("output", "x", "weight", "bias")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative to the largest value


def inputs(shape: tuple[int, ...], size: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], 1, size, size), torch.randn(shape[-1])
    return [tensor.requires_grad_() for tensor in tensors]


def plain(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    x = x.permute(0, 3, 1, 2)
    x = x + F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return (F.gelu(x) if gelu else x).permute(0, 2, 3, 1)


def assert_same(tensors: list[Tensor], gelu: bool) -> None:
    fast = kernels.depthwise_residual(*tensors, gelu)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    slow = plain(*exact, gelu)
    ramp = torch.linspace(-1, 2, slow.numel(), dtype=torch.float64).view_as(slow)
    fast = fast, *torch.autograd.grad((fast * ramp).sum(), tensors)
    slow = slow, *torch.autograd.grad((slow * ramp).sum(), exact)
    for name, one, other in zip(NAMES, fast, slow, strict=True):
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error < TOLERANCE[tensors[0].dtype], f"{name}: {error:.2g}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    assert_same(inputs((2, 4, 5, 8), dtype=dtype), gelu=True)


# One pixel; several blocks of channels; maps smaller than the kernel; a 1x1 kernel.
@pytest.mark.parametrize(
    ("shape", "size"), [((1, 1, 1, 3), 3), ((1, 2, 9, 70), 3), ((2, 2, 3, 5), 5), ((1, 3, 4, 6), 1)], ids=str
)
@pytest.mark.parametrize("gelu", [True, False])
def test_sizes(shape: tuple[int, ...], size: int, gelu: bool) -> None:
    assert_same(inputs(shape, size), gelu)


def test_empty_batch() -> None:
    x, weight, bias = inputs((0, 3, 4, 6))
    kernels.depthwise_residual(x, weight, bias, True).sum().backward()
    assert not weight.grad.any()


def test_the_operator_passes_opcheck() -> None:
    torch.library.opcheck(kernels.depthwise_residual, (*inputs((1, 2, 3, 4)), True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_operator_passes_opcheck(dtype: torch.dtype) -> None:
    tensors = [tensor.detach().to(dtype) for tensor in inputs((1, 2, 3, 4))]
    arguments = torch.randn_like(tensors[0]), *tensors, True
    torch.library.opcheck(kernels.depthwise_residual_backward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_convolutional_mlp_equals_the_plain_form() -> None:
    torch.manual_seed(0)
    arguments = [torch.randn(*shape) for shape in ((2, 3, 4, 6), (10, 6), (10,), (10, 1, 3, 3), (10,), (6, 10), (6,))]
    torch.testing.assert_close(conv_mlp(*arguments, form="triton"), conv_mlp(*arguments, form="reference"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "size"), [((2, 14, 14, 96), 3), ((1, 23, 17, 80), 3), ((2, 7, 9, 128), 7)], ids=str)
def test_shapes_of_networks(shape: tuple[int, ...], size: int, dtype: torch.dtype) -> None:
    assert_same(inputs(shape, size, dtype), gelu=True)
