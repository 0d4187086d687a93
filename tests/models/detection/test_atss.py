"""The losses of the ATSS head."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from models import ranks
from models.detection.atss import ATSSHead


def test_losses_are_divided_by_means_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head, maps = ATSSHead(16, 3), [torch.rand(1, 16, 16, 16), torch.rand(1, 16, 8, 8)]
    target = {"boxes": torch.tensor([[10.0, 10.0, 70.0, 74.0]]), "labels": torch.tensor([1])}
    alone, _ = head(maps, [8, 16], [target])
    monkeypatch.setattr(ranks, "mean_over_ranks", Mock(side_effect=lambda numbers: 4 * numbers.float()))
    among_others, _ = head(maps, [8, 16], [target])
    assert {name: 4 * loss.item() for name, loss in among_others.items()} == pytest.approx(
        {name: loss.item() for name, loss in alone.items()}
    )


def test_without_objects_the_numbers_are_exchanged_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    monkeypatch.setattr(ranks, "mean_over_ranks", lambda numbers: shapes.append(numbers.shape) or numbers.float())
    head, maps = ATSSHead(16, 3), [torch.rand(1, 16, 8, 8)]
    for boxes in (torch.tensor([[0.0, 0.0, 60.0, 60.0]]), torch.zeros(0, 4)):
        losses, _ = head(maps, [8], [{"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.long)}])
        assert all(loss.isfinite() for loss in losses.values())
    assert len(shapes) == 2
    assert shapes[0] == shapes[1]
