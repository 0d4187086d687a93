"""The benchmark of multi-scale attention compares two layers with the same output."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import multi_scale


@pytest.mark.parametrize("queries", [None, 5])
def test_both_layers_compute_the_same(monkeypatch: pytest.MonkeyPatch, queries: int | None) -> None:
    monkeypatch.setattr(multi_scale, "LEVELS", [(4, 5), (2, 3), (1, 1)])
    args = argparse.Namespace(batch_size=2, queries=queries)
    runs = [multi_scale._layer(name, args, torch.device("cpu"))[0] for name in multi_scale.LAYERS]
    theirs, ours = (run() for run in runs)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
