"""Seeding and restoring the global generators."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from data.generators import preserve_generators, seed_generators


def numbers() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002


def test_numbers_depend_on_the_seed_alone() -> None:
    drawn = []
    for entropy in ((0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1, 2)):
        seed_generators(*entropy)
        drawn.append(numbers())
    assert drawn[0] == drawn[3]
    for generator in range(3):
        assert len({row[generator] for row in drawn}) == 3


def test_generators_are_restored() -> None:
    seed_generators(7)
    expected = [numbers(), numbers()]
    seed_generators(7)
    assert numbers() == expected[0]
    with preserve_generators():
        seed_generators(8)
        numbers()
    assert numbers() == expected[1]


def test_generators_are_restored_after_an_error() -> None:
    seed_generators(7)
    expected = numbers()
    seed_generators(7)
    with pytest.raises(ZeroDivisionError), preserve_generators():
        _ = numbers()[0] / 0
    assert numbers() == expected
