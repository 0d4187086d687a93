"""The GPU benchmark, as far as it can be tested without a GPU."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, launches
from tests.models.small import build_small
from tests.runs import call


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("flags", [[], ["--check"]])
def test_missing_gpu_is_reported(flags: list[str]) -> None:
    status, _, err = call(gpu.main, *flags)
    assert status == 2
    assert err.startswith("gpu.py: PyTorch sees no GPU here")


def test_make_checks_for_a_gpu_before_the_tests_of_the_kernels() -> None:
    """Without one, pytest would collect none of them and fail."""
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^bench-gpu:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    modules = re.findall(r"python -m (.*)", recipe)
    assert modules == ["benchmarks.gpu --check", "pytest tests/models/ops/gpu", "benchmarks.gpu"]


def test_tables_are_written_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = []

    def table(made: dict, size: int, batch: int, device: torch.device, runs: int) -> list[str]:
        assert torch.backends.cudnn.benchmark
        if batch == 4:
            raise RuntimeError
        return [f"{size} {batch}"]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(gpu, "environment", lambda device, threads: "a GPU")
    monkeypatch.setattr(gpu, "networks", lambda size, device: built.append(size))
    monkeypatch.setattr(gpu, "table", table)
    file = tmp_path / "gpu.md"
    with pytest.raises(RuntimeError):
        call(gpu.main, "--sizes", 224, "--batch-sizes", 1, 2, 4, "--output", file)
    assert file.read_text(encoding="utf-8").splitlines()[3:] == ["", "224 1", "", "224 2"]
    assert built == [224]


def test_plain_operations_are_those_of_a_gpu_without_kernels() -> None:
    """Neither kernels, nor the form of neighborhood attention that gathers windows and has a softmax of its own."""
    kernels = {"neighborhood_attention", "deformable_attention", "depthwise_residual", "sample"}
    network = build_small("ND", use_lpus=True, use_dwc_mlps=True)
    fast, _ = launches.count(deepcopy(network), (1, 3, 64, 64))
    with torch.backends.cudnn.flags(enabled=False):  # its grid sampler does not support fake tensors
        plain, _ = launches.count(gpu.WithoutKernels(network), (1, 3, 64, 64))
    assert kernels <= fast.kernels.keys()
    assert not kernels & plain.kernels.keys()
    assert plain.kernels["_softmax"] == 0


def test_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with what asks the device replaced."""
    monkeypatch.setattr(gpu, "peak_memory", lambda action, network, device: 2.0)
    made = {"fast": build_small("ND"), "plain": gpu.WithoutKernels(build_small("ND"))}
    lines = gpu.table(made, 64, 2, torch.device("cpu"), runs=1)
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        [f"| {name}", task] for task in ("inference", "training") for name in ("fast", "plain")
    ]


def test_failures_are_shown_in_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def infer(network: object, images: torch.Tensor, amp: str) -> None:
        raise torch.OutOfMemoryError

    def train(network: torch.nn.Module, images: torch.Tensor, amp: str) -> None:
        network(images).sum().backward()
        raise TypeError("a | b\nc")

    monkeypatch.setattr(gpu, "infer", infer)
    monkeypatch.setattr(gpu, "train", train)
    network = build_small("ND")
    lines = gpu.table({"large": network}, 64, 1, torch.device("cpu"), runs=1)
    assert lines[2:] == [
        "| large | inference | out of memory | | |",
        "| large | training | TypeError: a \\| b | | |",
    ]
    assert all(parameter.grad is None for parameter in network.parameters())
