"""The benchmark of dense networks: photographs of the given sizes, and a table row for each run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import dense
from data.detection.coco import open_coco
from data.sources import Request
from tests.data.detection.samples import write_coco
from tests.launched import wait_until
from tests.runs import ROOT, TINY, call, printed_by
from tests.training.test_interruption import LINUX


def test_samples_have_the_size_and_the_objects(tmp_path: Path) -> None:
    dataset = open_coco(Request(path=str(write_coco(tmp_path / "data")), needs=("train",)))
    dense.write_samples(dataset, tmp_path, (64, 80), train=2)
    written = open_coco(Request(path=str(tmp_path)))
    assert (len(written.train), len(written.held_out), written.classes) == (2, 1, ["dog", "cat"])
    before, after = dataset.train.objects(0), written.train.objects(0)
    order = np.argsort(-before.areas)
    assert after.labels.tolist() == before.labels[order].tolist()
    assert np.abs(after.boxes - 2 * before.boxes[order]).max() <= 1
    assert written.train.get(0).decode().size == (80, 64)


def arguments(folder: Path) -> list[str]:
    """Write a data set and a config into a folder, and return the command line that measures it."""
    config = folder / "tiny.yaml"
    model = {"DAT": TINY["MODEL"]["DAT"], "DETECTOR": {"ARGS": {"channels": 16}}}
    config.write_text(yaml.safe_dump({"BASE": str(ROOT / "configs/detection/digits_retinanet.yaml"), "MODEL": model}))
    return [str(write_coco(folder / "data")), "--cfg", str(config), "--sizes", "64x96"]


def test_a_missing_data_set_is_an_error(tmp_path: Path) -> None:
    status, _, err = call(dense.main, tmp_path / "absent", "--cfg", "tiny.yaml")
    assert status == 2
    assert err.startswith("dense.py: ")


@pytest.mark.slow
def test_a_run_gives_a_row(tmp_path: Path) -> None:
    cells = [cell.strip() for cell in printed_by(dense.main, *arguments(tmp_path)).splitlines()[-1].split("|")]
    assert cells[1:3] == ["tiny", "64x96"]
    assert len(cells[3].split(", ")) == 2
    assert 0 <= float(cells[4]) <= 1
    assert 0.1 < float(cells[5]) < 4


@LINUX
@pytest.mark.slow
def test_a_run_ends_with_the_benchmark_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.dense", *arguments(tmp_path)]
    benchmark = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{benchmark.pid}/task/{benchmark.pid}/children")
    wait_until(lambda: children.read_text() != "")
    run = Path("/proc", children.read_text().strip(), "stat")
    benchmark.kill()
    benchmark.wait()
    wait_until(lambda: not run.exists() or run.read_text().split()[2] == "Z", 20)
