"""The kernels of bilinear sampling equal the plain form, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.ops.gpu import sampling as kernels
from models.ops.sampling import sample

NAMES = ("samples", "map", "positions")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative to the largest value


def inputs(
    shape: tuple[int, ...],
    *,
    groups: int = 1,
    samples: int = 5,
    reach: float = 0.99,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    torch.manual_seed(0)
    positions = (torch.rand(shape[0], groups, samples, 2) * 2 - 1) * reach
    return [torch.randn(shape, dtype=dtype).requires_grad_(), positions.requires_grad_()]


def assert_same(tensors: list[Tensor]) -> None:
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    results = []
    for form, arguments in (("triton", tensors), ("reference", exact)):
        out = sample(*arguments, form=form)
        ramp = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
        results.append((out, *torch.autograd.grad((out * ramp).sum(), arguments)))
    for name, fast, plain in zip(NAMES, *results, strict=True):
        error = (fast.double() - plain).abs().max() / plain.abs().max().clamp(min=0.1)
        assert error < TOLERANCE[tensors[0].dtype], f"{name}: {error:.2g}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    assert_same(inputs((2, 5, 6, 8), groups=2, dtype=dtype))


# One pixel; partial blocks of pixels, samples and channels; several blocks of each.
@pytest.mark.parametrize(
    ("shape", "samples"), [((1, 1, 1, 4), 1), ((1, 4, 7, 20), 17), ((2, 9, 8, 140), 3), ((1, 1, 5, 6), 4)], ids=str
)
@pytest.mark.parametrize("reach", [0.99, 3.0])
def test_sizes_and_positions_beyond_the_map(shape: tuple[int, ...], samples: int, reach: float) -> None:
    assert_same(inputs(shape, groups=2, samples=samples, reach=reach))


def test_empty_batch() -> None:
    x, positions = inputs((0, 3, 4, 6))
    assert sample(x, positions, form="triton").shape == (0, 5, 6)


def test_the_operator_passes_opcheck() -> None:
    torch.library.opcheck(kernels.sample, inputs((1, 3, 4, 6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_operator_passes_opcheck(dtype: torch.dtype) -> None:
    x, positions = (tensor.detach() for tensor in inputs((1, 3, 4, 6), groups=2, dtype=dtype))
    arguments = torch.randn(1, 5, 6, dtype=dtype), x, positions
    torch.library.opcheck(kernels.sample_backward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_nan_stays_nan() -> None:
    x, positions = (tensor.detach() for tensor in inputs((1, 3, 4, 6), groups=2))
    positions[0, 0, 1, 0], positions[0, 1, 3, 1] = float("nan"), float("nan")
    out = sample(x, positions, form="triton")
    torch.testing.assert_close(out, sample(x, positions, form="rows"), equal_nan=True)
    assert out[0, 1, :3].isnan().all()
    assert out[0, 3, 3:].isnan().all()
    assert out.isnan().sum() == 6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [(14, 14), (23, 17), (28, 28)], ids=str)
def test_shapes_of_networks(size: tuple[int, int], groups: int, dtype: torch.dtype) -> None:
    assert_same(inputs((2, *size, 64 * groups), groups=groups, samples=49, dtype=dtype))
