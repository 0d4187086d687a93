"""The kernels of deformable attention equal the plain form, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.ops.deformable import deformable_attention
from models.ops.gpu import deformable as kernels

NAMES = ("output", "q", "k", "v", "positions", "table")
# Error relative to the largest value; in low precision, weights and outputs are rounded.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def inputs(
    size: tuple[int, int],
    native: tuple[int, int],
    *,
    images: int = 2,
    keys: int = 9,
    heads: int = 2,
    groups: int = 1,
    head_dim: int = 16,
    reach: float = 0.99,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Return queries, keys, values, positions in ``[-reach, reach]`` and a table."""
    torch.manual_seed(0)
    q = torch.randn(images, size[0] * size[1], heads, head_dim, dtype=dtype)
    k, v = torch.randn(2, images, keys, heads, head_dim, dtype=dtype)
    positions = (torch.rand(images, groups, keys, 2) * 2 - 1) * reach
    table = torch.randn(heads, 2 * native[0] - 1, 2 * native[1] - 1)
    return [tensor.requires_grad_() for tensor in (q, k, v, positions, table)]


def with_gradients(form: str, tensors: list[Tensor], size: tuple[int, int], coordinates: str) -> list[Tensor]:
    out = deformable_attention(*tensors, map_size=size, coordinates=coordinates, scale=0.3, form=form)
    ramp = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
    return [out, *torch.autograd.grad((out * ramp).sum(), tensors)]


def assert_same(tensors: list[Tensor], size: tuple[int, int], coordinates: str = "dat++") -> None:
    exact = with_gradients("reference", [x.detach().double().requires_grad_() for x in tensors], size, coordinates)
    tolerance = TOLERANCE[tensors[0].dtype]
    for name, fast, plain in zip(NAMES, with_gradients("triton", tensors, size, coordinates), exact, strict=True):
        error = (fast.double() - plain).abs().max() / plain.abs().max().clamp(min=0.1)
        assert error < tolerance, f"{name}: {error:.2g}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    assert_same(inputs((5, 7), (5, 7), dtype=dtype), (5, 7))


@pytest.mark.parametrize(
    ("size", "native", "keys"),
    [((1, 1), (1, 1), 1), ((9, 8), (9, 8), 18), ((3, 4), (7, 5), 4), ((6, 9), (3, 2), 4)],
    ids=str,
)
def test_sizes(size: tuple[int, int], native: tuple[int, int], keys: int) -> None:
    """One pixel; several blocks of queries and keys; maps smaller and larger than the native size."""
    assert_same(inputs(size, native, keys=keys), size)


@pytest.mark.parametrize(("groups", "coordinates"), [(2, "dat++"), (4, "cvpr22")])
def test_groups_and_positions_beyond_the_map(groups: int, coordinates: str) -> None:
    assert_same(inputs((4, 5), (4, 5), heads=4, groups=groups, reach=3.0), (4, 5), coordinates)


@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_head_dimensions(head_dim: int) -> None:
    assert_same(inputs((4, 9), (4, 9), keys=2, head_dim=head_dim, heads=1), (4, 9))


def test_tables_of_several_tiles_and_images_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TILE", 16)
    monkeypatch.setattr(kernels, "PROGRAMS", 8)  # 4 tiles of 2 heads: one part
    assert_same(inputs((9, 10), (9, 10), keys=4, images=3), (9, 10))


def test_one_image_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 blocks of queries in 3 parts, for each of 2 heads."""
    programs, launch = {}, kernels.launch

    def count(kernel: object, number: int, *arguments: object, **options: object) -> None:
        programs[kernel] = number
        launch(kernel, number, *arguments, **options)

    monkeypatch.setattr(kernels, "launch", count)
    monkeypatch.setattr(kernels, "PROGRAMS", 6)
    assert_same(inputs((17, 18), (17, 18), keys=2, images=1), (17, 18))
    assert programs[kernels._backward_table] == 6


def test_empty_batch() -> None:
    tensors = inputs((4, 5), (4, 5), images=0)
    out, *gradients = with_gradients("triton", tensors, (4, 5), "dat++")
    assert out.shape == (0, 20, 2, 16)
    assert not gradients[-1].any()


@pytest.mark.slow
def test_the_operator_passes_opcheck() -> None:
    """PyTorch's own check of schema, fake results and gradients."""
    tensors = [*inputs((3, 4), (3, 4)), [3, 4], [1.0, -1.0, 2 / 3, -1.0], 0.3]
    torch.library.opcheck(kernels.attention, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_operator_passes_opcheck(dtype: torch.dtype) -> None:
    tensors = [tensor.detach() for tensor in inputs((2, 3), (2, 3), images=1, keys=2, dtype=dtype)]
    numbers = [2, 3], [2.0, -1.0, 1.0, -1.0], 0.3
    out, sums = kernels.attention(*tensors, *numbers)
    arguments = torch.randn_like(out), *tensors, out, sums, *numbers
    torch.library.opcheck(kernels.attention_backward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_nan_stays_nan() -> None:
    tensors = [tensor.detach() for tensor in inputs((2, 3), (2, 3), groups=2, keys=2)]
    tensors[3][0, 1, 0, 1] = float("nan")
    out = deformable_attention(*tensors, map_size=(2, 3), coordinates="dat++", scale=0.3, form="triton")
    assert out[0, :, 1].isnan().all()
    assert out[0, :, 0].isfinite().all()
    assert out[1].isfinite().all()


def test_results_are_deterministic() -> None:
    tensors = inputs((3, 7), (3, 7))
    for one, other in zip(*(with_gradients("triton", tensors, (3, 7), "dat++") for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [16, 20, 32, 48, 64])
@pytest.mark.parametrize(
    ("size", "native", "keys"),
    [((14, 14), (14, 14), 49), ((23, 17), (14, 14), 70), ((7, 7), (7, 7), 49), ((40, 34), (40, 34), 20)],
    ids=str,
)
def test_shapes_of_networks(
    size: tuple[int, int], native: tuple[int, int], keys: int, head_dim: int, dtype: torch.dtype
) -> None:
    assert_same(inputs(size, native, keys=keys, head_dim=head_dim, heads=4, groups=2, dtype=dtype), size)
