"""The increase of peak memory by an action."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import peak_increase


def test_the_peak_of_memory() -> None:
    assert peak_increase(lambda: torch.ones(1 << 23), torch.device("cpu")) == pytest.approx(32, abs=4)
