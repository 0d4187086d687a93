"""A configuration of rectangular images from training to every tool that reads its checkpoint."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest

from benchmarks import model
from tests.launched import run_forked
from tests.runs import ROOT, printed_by, read_metrics, write_config
from tests.tools.samples import write_photograph
from tools import compare, complexity, export, predict, visualize

HEIGHT, WIDTH = 32, 64


@pytest.mark.slow
def test_a_rectangle_is_trained_evaluated_and_read_by_the_tools(tmp_path: Path) -> None:
    data = {"IMG_SIZE": [HEIGHT, WIDTH], "BATCH_SIZE": 512, "NUM_WORKERS": 0}  # two updates
    config = write_config(tmp_path, DATA=data, TRAIN={"EPOCHS": 1, "WARMUP_EPOCHS": 0})
    common = ("--cfg", config, "--output", tmp_path)
    assert "2 updates of 512 images" in run_forked(*common, "--check")
    run_forked(*common)
    folder = tmp_path / "tiny" / "default"
    score = read_metrics(folder, "eval")[-1]["top1"]
    assert f"test images: {score:.1f}%" in run_forked(*common, "--eval", "--resume", folder / "best.pth")
    assert f"at {HEIGHT}x{WIDTH}" in run_forked(*common, "--throughput")

    photograph, checkpoint = write_photograph(tmp_path / "photo.png"), ("--checkpoint", folder / "best.pth")
    assert "photo.png: " in printed_by(predict.main, photograph, *checkpoint)
    printed_by(visualize.main, photograph, *checkpoint, "--output", tmp_path / "drawn")
    assert (tmp_path / "drawn" / "index.html").is_file()
    printed_by(export.main, *checkpoint, "--output", tmp_path)
    (images,) = onnxruntime.InferenceSession(tmp_path / "tiny.onnx").get_inputs()
    assert images.shape[1:] == [3, HEIGHT, WIDTH]


def test_costs_of_rectangles(tmp_path: Path) -> None:
    config = write_config(tmp_path, DATA={"IMG_SIZE": [HEIGHT, WIDTH]})
    assert f"{HEIGHT}x{WIDTH}" in printed_by(complexity.main, config)
    assert f"{HEIGHT}x{WIDTH}" in printed_by(model.main, "--cfg", config, "--runs", 1, "--batch-size", 1)
    square, wide = (
        compare.measure(compare.Variant(str(ROOT / "configs" / "digits.yaml"), options, tmp_path), batch=1, runs=1)
        for options in ([], ["DATA.IMG_SIZE", "[32, 64]"])
    )
    assert wide.macs > 1.9 * square.macs
