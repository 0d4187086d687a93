from __future__ import annotations

import pytest
import torch

from models.ops.grids import query_grid, reference_points

DOUBLE = {"dtype": torch.float64, "device": torch.device("cpu")}


def axes(grid: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return the y and the x coordinates of a grid, after checking that it is the product of both."""
    y, x = grid[:, 0, 0], grid[0, :, 1]
    assert torch.equal(grid, torch.cartesian_prod(y, x).reshape(len(y), len(x), 2))
    return y.tolist(), x.tolist()


def test_dat_plus_plus() -> None:
    y, x = axes(reference_points((3, 2), coordinates="dat++", **DOUBLE))
    assert y == pytest.approx([-0.5, 0.5, 1.5])
    assert x == pytest.approx([0.0, 2.0])
    y, x = axes(query_grid((3, 2), coordinates="dat++", **DOUBLE))
    assert y == pytest.approx([-1, 0, 1])
    assert x == pytest.approx([-1, 1])


def test_cvpr22() -> None:
    for grid in (reference_points, query_grid):
        y, x = axes(grid((4, 2), coordinates="cvpr22", **DOUBLE))
        assert y == pytest.approx([-0.75, -0.25, 0.25, 0.75])
        assert x == pytest.approx([-0.5, 0.5])


@pytest.mark.parametrize("coordinates", ["dat++", "cvpr22"])
@pytest.mark.parametrize("grid", [reference_points, query_grid])
def test_axes_of_length_one_have_the_coordinate_zero(grid: object, coordinates: str) -> None:
    y, x = axes(grid((1, 1), coordinates=coordinates, **DOUBLE))
    assert y == x == [0.0]
