"""Buckets of relative positions."""

from __future__ import annotations

import pytest
import torch

from models.ops.relative_positions import Buckets, table_index


def test_buckets_grow_with_the_distance() -> None:
    buckets = Buckets(span=4, farthest=32)
    assert [buckets.of(d) for d in range(5)] == [0, 1, 2, 3, 4]
    assert [buckets.of(d) for d in (5, 8, 9, 16, 17, 32, 100)] == [5, 5, 6, 6, 7, 7, 7]
    assert all(buckets.of(-d) == -buckets.of(d) for d in range(50))
    assert Buckets(span=1, farthest=9).last == 1
    assert Buckets(span=8, farthest=3).rows == 17**2 + 3


@pytest.mark.parametrize("span", [1, 2, 3])
@pytest.mark.parametrize("grid", [(5, 7), (1, 4), (9, 2)], ids=str)
def test_relations_reproduce_the_table_index(grid: tuple[int, int], span: int) -> None:
    buckets = Buckets(span, max(grid) - 1)
    index = table_index(span, max(grid) - 1, grid, 2, torch.device("cpu"))
    assert (index[:2, 2:] == buckets.rows - 3).all()
    assert (index[2:, :2] == buckets.rows - 2).all()
    assert (index[:2, :2] == buckets.rows - 1).all()
    patches = index[2:, 2:]
    token = torch.arange(len(patches))
    places = torch.stack((token // grid[1], token % grid[1]))
    displacement = places[:, :, None] - places[:, None]
    rebuilt = torch.full_like(patches, -1)
    for relation in buckets.relations(grid):
        low, high = (torch.tensor(ends)[:, None, None] for ends in (relation.low, relation.high))
        within = ((displacement >= low) & (displacement <= high)).all(0)
        assert (rebuilt[within] == -1).all()
        rebuilt[within] = relation.index
        assert (patches.t()[within] == relation.opposite).all()
    assert torch.equal(rebuilt, patches)
