"""Detectors in the trainer: exact resuming after a kill in mid-epoch, and evaluation on several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.detection.samples import write_coco
from tests.launched import run_forked, whole_and_killed
from tests.models.detection.test_detectors import TINY
from tests.runs import read_metrics

pytestmark = pytest.mark.xdist_group("dense")


def sections(name: str, data: Path, processes: int) -> dict[str, Any]:
    return {
        "TASK": "detection",
        "DATA": {
            **{"DATASET": "coco", "DATA_PATH": str(data), "IMG_SIZE": 64},
            **{"BATCH_SIZE": 4 // processes, "NUM_WORKERS": 0},
        },
        "MODEL": {"DETECTOR": {"NAME": name, "ARGS": TINY[name]}},
        "DETECTION": {"SHORT_SIDES": [48, 64], "LONG_SIDE": 80, "CROP_SIDES": [48], "CROP": [32, 48]}
        | {"TEST_SHORT_SIDE": 48},
        "TRAIN": {"EPOCHS": 2, "WARMUP_EPOCHS": 0, "EMA": {"ENABLED": name == "retinanet"}},
        "AUG": {"HFLIP": 0.5},
        "PRINT_FREQ": 1,
        "SAVE_EVERY_UPDATES": 1,
    }


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn", pytest.param("cascade", marks=pytest.mark.slow)])
def test_a_killed_detector_ends_as_one_that_was_not(tmp_path: Path, name: str) -> None:
    processes = 2 if name == "mask_rcnn" else 1
    trial = whole_and_killed(tmp_path, processes, rows=2, **sections(name, write_coco(tmp_path / "data"), processes))
    assert (trial.folder / "samples.png").is_file()
    if name == "mask_rcnn":
        found = read_metrics(trial.folder, "eval")[-1]
        words = (*trial.words, "--eval", "--resume", trial.folder / "last.pth")
        lines = {line for n in (1, 3) for line in run_forked(*words, processes=n).splitlines() if " * AP" in line}
        assert len(lines) == 2  # of boxes and of masks, the same from one process and from three
        assert any(f" * AP {found['AP']:.3f} AP50 {found['AP50']:.3f}" in line for line in lines)
