"""Windows around patches: sums over windows equal sums with a mask."""

from __future__ import annotations

import pytest
import torch

from models.ops.locality import Window, range_sum, window_mask, window_sum


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_sums_of_every_range(length: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, length, 3, dtype=torch.float64)
    difference = torch.arange(length)[:, None] - torch.arange(length)
    for low in range(-length - 1, length + 2):
        for high in range(low, length + 2):
            near = ((difference >= low) & (difference <= high)).double()
            torch.testing.assert_close(range_sum(x, low, high, 1), torch.einsum("ij,bjc->bic", near, x))


@pytest.mark.parametrize("kind", ["sequence", "box"])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6)], ids=str)
def test_window_sums_equal_sums_with_a_mask(grid: tuple[int, int], kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, grid[0] * grid[1], 3, dtype=torch.float64)
    for reach in range(8):
        mask = window_mask(grid, 0, Window(kind, reach)).double()
        sums = window_sum(x, grid, Window(kind, reach), 1)
        torch.testing.assert_close(sums, torch.einsum("ij,bjc->bic", mask, x))


def test_window_masks() -> None:
    box = window_mask((3, 4), 1, Window("box", 1))
    assert box[0].all()
    assert box[:, 0].all()
    assert box[1, 1:].tolist() == [True, True, False, False, True, True, *[False] * 6]
    band = window_mask((3, 4), 0, Window("sequence", 1))
    assert band[4].tolist() == [False, False, False, True, True, True, *[False] * 6]  # row 0, column 3 precedes it
    assert window_mask((3, 4), 0, Window("box", 3)).all()


def test_small_numbers_next_to_large_ones_keep_their_precision() -> None:
    """A difference of running sums would lose the small numbers."""
    x = torch.ones(1, 64)
    x[0, 0] = 1e9
    torch.testing.assert_close(range_sum(x, -1, 1, 1)[0, 2:-1], torch.full((61,), 3.0), rtol=0, atol=0)
