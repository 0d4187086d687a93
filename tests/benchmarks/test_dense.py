"""The benchmark of dense networks: photographs of the sizes asked for, and a row of numbers for each run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import dense
from data.detection.coco import open_coco
from data.sources import Request
from tests.data.detection.samples import write_coco
from tests.runs import ROOT
from tests.training.test_detection import BACKBONE


def test_samples_have_the_size_and_the_objects(tmp_path: Path) -> None:
    dataset = open_coco(Request(path=str(write_coco(tmp_path / "data")), needs=("train",)))
    dense.write_samples(dataset, tmp_path, (64, 80))
    written = open_coco(Request(path=str(tmp_path)))
    assert (len(written.train), len(written.held_out), written.classes) == (2, 1, ["dog", "cat"])
    before, after = dataset.train.objects(0), written.train.objects(0)
    order = np.argsort(-before.areas)
    assert after.labels.tolist() == before.labels[order].tolist()
    assert np.abs(after.boxes - 2 * before.boxes[order]).max() <= 1
    assert written.train.get(0).decode().size == (80, 64)


@pytest.mark.slow
def test_a_run_gives_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "tiny.yaml"
    model = {"DAT": BACKBONE, "DETECTOR": {"ARGS": {"channels": 16}}}
    config.write_text(yaml.safe_dump({"BASE": str(ROOT / "configs/detection/digits_retinanet.yaml"), "MODEL": model}))
    data = write_coco(tmp_path / "data")
    monkeypatch.setattr(sys, "argv", ["dense", str(data), "--cfg", str(config), "--sizes", "64x96"])
    dense.main()
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")]
    assert cells[1:3] == ["tiny", "64x96"]
    assert len(cells[3].split(", ")) == 2
    assert 0 <= float(cells[4]) <= 1
    assert 0.1 < float(cells[5]) < 4
