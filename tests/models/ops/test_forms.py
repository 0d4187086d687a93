"""The environment variable that restricts every operation to PyTorch's own kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from models.ops import deformable, depthwise, forms, linear, multi_scale, neighborhood, sampling


def choices(device: str) -> dict[str, str]:
    """Return the form that each operation selects on a device."""
    with FakeTensorMode():
        q, x = torch.empty(2, 7, 7, 4, 16, device=device), torch.empty(2, 64, 128, device=device)
        weight = torch.empty(128, 128, device=device)
        return {
            "deformable": deformable.choose_form(q.flatten(1, 2), native=True),
            "neighborhood": neighborhood.choose_form(q),
            "depthwise": depthwise.choose_form(x),
            "linear": linear.choose_form(x, weight, None),
            "multi-scale": multi_scale.choose_form(q.flatten(1, 2)),
            "sampling": sampling.choose_form(q.flatten(3)),
        }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plain_operations_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = choices(device)
    monkeypatch.setattr(forms, "PLAIN", True)
    plain = choices(device)
    assert plain == dict.fromkeys(plain, "reference") | {"neighborhood": "tiles"}
    if device == "cuda":
        assert usual == dict.fromkeys(plain, "triton") | {"linear": "reference", "multi-scale": "op"}


@pytest.mark.parametrize(("value", "plain"), [("1", True), ("0", False), ("", False)])
def test_plain_operations_are_selected_by_the_environment(value: str, plain: bool) -> None:
    code = "from models.ops import forms; raise SystemExit(forms.PLAIN)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "DAT_PLAIN": value}, check=False)
    assert done.returncode == plain
