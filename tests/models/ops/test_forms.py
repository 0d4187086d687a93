"""The environment variable that restricts every operation to PyTorch's own kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode

from models.ops import deformable, depthwise, forms, linear, multi_scale, neighborhood, sampling


def choices(device: str) -> dict[str, str]:
    """Return the form that each operation selects on a device."""
    # A GPU is only pretended. Tensors of a CPU are real: its forms are not used under a mode such as this.
    with FakeTensorMode() if device == "cuda" else nullcontext():
        q, x = torch.empty(2, 7, 7, 4, 16, device=device), torch.empty(2, 64, 128, device=device)
        weight = torch.empty(128, 128, device=device)
        return {
            "deformable": deformable.choose_form(q.flatten(1, 2), native=True),
            "neighborhood": neighborhood.choose_form(q),
            "depthwise": depthwise.choose_form(x),
            "multi-scale": multi_scale.choose_form(q.flatten(1, 2)),
            "sampling": sampling.choose_form(q.flatten(3)),
            "linear": linear.choose_form(x, weight, None),
        }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plain_operations_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = choices(device)
    monkeypatch.setattr(forms, "PLAIN", True)
    plain = choices(device)
    assert plain == dict.fromkeys(plain, "reference") | {"neighborhood": "tiles"}
    assert [name for name in plain if usual[name] == plain[name]] in ([], ["linear"])  # a GPU has no form of its own


def test_plain_operations_alone_in_a_graph_for_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        assert forms.is_compiled_for_inference(torch.empty(1))
        monkeypatch.setattr(forms, "PLAIN", True)
        assert not forms.is_compiled_for_inference(torch.empty(1))


@pytest.mark.parametrize(("value", "plain"), [("1", True), ("0", False), ("", False)])
def test_plain_operations_are_selected_by_the_environment(value: str, plain: bool) -> None:
    code = "from models.ops import forms; raise SystemExit(forms.PLAIN)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "DAT_PLAIN": value}, check=False)
    assert done.returncode == plain
