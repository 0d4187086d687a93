"""The kernels of neighborhood attention equal the plain form, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.ops.gpu import neighborhood as kernels
from models.ops.neighborhood import neighborhood_attention

NAMES = ("output", "q", "k", "v", "table")
# Error relative to the largest value; in low precision, weights and outputs are rounded.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", 1)


def inputs(
    size: tuple[int, int],
    kernel_size: int,
    *,
    images: int = 1,
    heads: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Return queries, keys and values as views of one tensor, as a layer computes them, and a table."""
    torch.manual_seed(0)
    q, k, v = torch.randn(images, *size, 3, heads, head_dim, dtype=dtype).unbind(3)
    table = torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1)
    return [tensor.requires_grad_() for tensor in (q, k, v, table)]


def with_gradients(form: str, tensors: list[Tensor], kernel_size: int) -> list[Tensor]:
    table = tensors[3] if len(tensors) > 3 else None
    out = neighborhood_attention(*tensors[:3], table, kernel_size=kernel_size, scale=0.3, form=form)
    ramp = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
    return [out, *torch.autograd.grad((out * ramp).sum(), tensors)]


def assert_same(tensors: list[Tensor], kernel_size: int) -> None:
    exact = with_gradients("reference", [x.detach().double().requires_grad_() for x in tensors], kernel_size)
    tolerance = TOLERANCE[tensors[0].dtype]
    for name, fast, plain in zip(NAMES, with_gradients("triton", tensors, kernel_size), exact, strict=False):
        error = (fast.double() - plain).abs().max() / plain.abs().max().clamp(min=0.1)
        assert error < tolerance, f"{name}: {error:.2g}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    assert_same(inputs((5, 6), 3, dtype=dtype), 3)


# One window; several tiles, the last ragged; a map of one row and one of one pixel.
@pytest.mark.parametrize(
    ("size", "kernel_size"),
    [((5, 5), 5), ((9, 18), 3), ((1, 9), 1), ((1, 1), 1), pytest.param((10, 7), 7, marks=pytest.mark.slow)],
    ids=str,
)
def test_sizes(size: tuple[int, int], kernel_size: int) -> None:
    assert_same(inputs(size, kernel_size), kernel_size)


@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_head_dimensions(head_dim: int) -> None:
    assert_same(inputs((4, 4), 3, head_dim=head_dim), 3)


def test_without_a_position_bias() -> None:
    assert_same(inputs((5, 6), 3)[:3], 3)


def test_images_in_parts_and_maps_with_different_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", 100)  # 25 cells of 2 heads: two parts
    q, k, v, table = inputs((4, 5), 3, images=3, heads=2)
    assert_same([q.detach().contiguous().requires_grad_(), k, v, table], 3)


def test_empty_batch() -> None:
    out, *gradients = with_gradients("triton", inputs((4, 5), 3, images=0), 3)
    assert out.shape == (0, 4, 5, 1, 16)
    assert not gradients[-1].any()


def test_the_operator_passes_opcheck() -> None:
    """PyTorch's own check of schema, fake results and gradients."""
    torch.library.opcheck(kernels.attention, [*inputs((3, 4), 3), 3, 0.3])


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_operator_passes_opcheck(dtype: torch.dtype, table: bool) -> None:
    *maps, rpb = (tensor.detach() for tensor in inputs((3, 3), 3, dtype=dtype))
    arguments = *maps, rpb if table else None, 3, 0.3
    out, sums = kernels.attention(*arguments)
    arguments = torch.randn_like(out), *arguments[:4], out, sums, *arguments[4:]
    torch.library.opcheck(kernels.attention_backward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_results_are_deterministic() -> None:
    tensors = inputs((3, 4), 3, images=2)
    for one, other in zip(*(with_gradients("triton", tensors, 3) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [16, 20, 32, 48, 64])
@pytest.mark.parametrize(("size", "kernel_size"), [((14, 14), 7), ((23, 17), 7), ((20, 31), 5)], ids=str)
def test_shapes_of_networks(size: tuple[int, int], kernel_size: int, head_dim: int, dtype: torch.dtype) -> None:
    assert_same(inputs(size, kernel_size, images=2, heads=2, head_dim=head_dim, dtype=dtype), kernel_size)
