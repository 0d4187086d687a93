"""The benchmarks of networks and operations print their tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import attention, model, sizes
from benchmarks.memory import kept_for_backward
from benchmarks.timing import spread, take_turns
from config import load_config
from models.attention import deformable as deformable_layer
from models.build import build_model
from models.ops.cpu import deformable as deformable_operation
from tests.runs import call, printed_by
from tools.complexity import count_macs

SMALL = """
DATA: {IMG_SIZE: 64}
MODEL:
  DAT: {img_size: 64, dim_stem: 8, dims: [8, 16, 32, 64], depths: [1, 1, 1, 1], stage_spec: [[N], [D], [N], [D]],
        heads: [1, 2, 4, 8], groups: [1, 1, 2, 4], strides: [8, 4, 2, 1], use_dwc_mlps: [true, true, true, true]}
"""


@pytest.fixture(autouse=True)
def _keep_threads() -> None:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return str(path)


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables' rows, without heads."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [line for line in lines if any(cell.lstrip("+").rstrip("%").replace(".", "").isdigit() for cell in line)]


def test_model(config: str) -> None:
    words = ("--cfg", config, "--timm", "test_vit", "--img-size", 160)
    table = rows(printed_by(model.main, *words, "--batch-size", 1, 2, "--runs", 1, "--amp", "bf16"))
    assert [row[:5] for row in table] == [
        ["1", batch, "bf16", task, "eager"] for batch in "12" for task in ("inference", "training")
    ]
    for *_, base, ours, ratio in table:
        base, ours = (float(cell.split()[0]) for cell in (base, ours))
        assert float(ratio) == pytest.approx(ours / base, rel=0.2)


def test_floor_counts_the_products_of_the_reference_form(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_mac_rate", lambda *_: 1e6)
    inference, training = rows(printed_by(model.main, "--cfg", config, "--batch-size", 1, "--runs", 1))
    macs = count_macs(build_model(load_config(config)), (64, 64))
    assert [int(inference[5]), int(training[5])] == [round(macs / 1e3), round(3 * macs / 1e3)]


def test_model_benchmark_without_a_network_is_an_error() -> None:
    said = "model.py: nothing to measure; give networks with --cfg and --timm\n"
    assert call(model.main, "--img-size", 64) == (2, "", said)


def test_sizes_of_a_missing_config_are_an_error() -> None:
    status, _, err = call(sizes.main, "--cfg", "absent.yaml")
    assert status == 2
    assert re.fullmatch(r"sizes\.py: .*absent\.yaml.*\n", err)


def test_sizes(config: str, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    table = rows(printed_by(sizes.main, "--cfg", config, "--sizes", 32, 64, "--runs", 1, "--plot", plot))
    assert [row[1] for row in table] == ["32", "64"] * 2
    assert [row[3] for row in table[::2]] == ["1.000"] * 2
    assert plot.stat().st_size > 5000


@pytest.mark.parametrize(
    ("flags", "columns"), [(["--batch-size", "1", "--runs", "1"], 11), (["--batch-size", "16", "--memory"], 8)]
)
def test_attention(flags: list[str], columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformable_layer, "RECOMPUTE_FROM", 1 << 15)  # as for 128 images instead of 16
    monkeypatch.setattr(deformable_operation, "SAVED", 1 << 19)
    operations = ("neighborhood", "deformable", "mlp", "linear", "layer")
    words = ("--models", "T", "--sizes", 224, *flags, "--operations", *operations)
    table = rows(printed_by(attention.main, *words))
    assert len(table) == 19  # five operations in four stages, but no neighborhood attention in the last
    assert {len(row) for row in table} == {columns}
    chosen = {row[3]: row[4] for row in table}
    assert chosen["neighborhood attention"] == "tiles_by_hand"
    assert chosen["deformable attention"] == chosen["deformable layer"] == "crops"
    if "--memory" in flags:
        share = {"deformable attention": 0.15, "deformable layer": 0.4}  # the crops of the table are a part of it
        assert all(float(row[7]) <= share[row[3]] for row in table if row[3] in share)


def test_functions_take_turns() -> None:
    calls = []
    seconds = take_turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=2, device=torch.device("cpu")
    )
    assert calls == ["a", "b"] * 3
    assert [len(runs) for runs in seconds.values()] == [2, 2]
    assert spread([2.0, 3.0, 8.0]) == "50%"


def test_saved_tensors_are_counted_once() -> None:
    x = torch.randn(8, requires_grad=True)
    assert kept_for_backward(lambda x: x * 2, [x]) == 0
    assert kept_for_backward(lambda x: x.exp(), [x]) == 32
    assert kept_for_backward(lambda x: (y := x.exp()) * y, [x]) == 32
