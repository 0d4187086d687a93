"""The GPU benchmark, as far as it can be tested without a GPU."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import gpu
from tests.models.small import build_small


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert capsys.readouterr().err.startswith("gpu.py: PyTorch sees no GPU here")


def test_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with what asks the device replaced."""
    monkeypatch.setattr(gpu, "peak_memory", lambda action, network, device: 2.0)
    plain = gpu.with_plain_operations(build_small("ND"))
    assert {module.form for module in plain.modules() if hasattr(module, "form")} == {"reference"}
    lines = gpu.table({"fast": build_small("ND"), "plain": plain}, 64, 2, torch.device("cpu"), runs=1)
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        [f"| {name}", task] for task in ("inference", "training") for name in ("fast", "plain")
    ]


def test_mismatches_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def infer(network: object, images: torch.Tensor, amp: str) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "infer", infer)
    monkeypatch.setattr(gpu, "train", infer)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    lines = gpu.table({"large": build_small("ND")}, 64, 1, torch.device("cpu"), runs=1)
    assert lines[2:] == ["| large | inference | out of memory | | |", "| large | training | out of memory | | |"]
