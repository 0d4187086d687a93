"""Sums over the predictions of a classifier."""

from __future__ import annotations

import numpy as np

from training.report.held_out import HeldOutPredictions


def predictions(target: list[int], predicted: list[int], truth: list[float]) -> HeldOutPredictions:
    confidence = np.linspace(0.5, 0.9, len(target), dtype=np.float32)
    numbers = [np.array(column) for column in (range(len(target)), target, predicted)]
    return HeldOutPredictions(["ant", "bee", "cat", "dog"], *numbers, confidence, np.array(truth, np.float32))


def test_sums_of_predictions() -> None:
    found = predictions([0, 0, 1, 1, 1, 3], [0, 1, 1, 0, 0, 3], [0.9, 0.2, 0.8, 0.3, 0.1, 0.9])
    assert found.accuracy() == 0.5
    assert found.matrix().tolist() == [[1, 1, 0, 0], [2, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(found.accuracy_by_class(), [1 / 2, 1 / 3, np.nan, 1])
    assert found.confusions() == [(1, 0, 2), (0, 1, 1)]
    assert found.worst(2) == [4, 1]


def test_without_mistakes() -> None:
    found = predictions([0, 3], [0, 3], [0.9, 0.9])
    assert found.confusions() == found.worst(5) == []
