"""Segmenters in the trainer: exact resuming after a kill in mid-epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.segmentation.samples import write_masks
from tests.launched import outcome, whole_and_killed
from tests.models.test_segmentation import ARGS
from tests.runs import read_metrics

pytestmark = pytest.mark.xdist_group("dense")


def sections(head: str, data: Path, processes: int) -> dict[str, Any]:
    return {
        "TASK": "segmentation",
        "DATA": {
            **{"DATASET": "masks", "DATA_PATH": str(data), "IMG_SIZE": 32},
            **{"BATCH_SIZE": 4 // processes, "NUM_WORKERS": 0},
        },
        "MODEL": {"SEGMENTER": {"NAME": head, "ARGS": ARGS[head]}},
        "TRAIN": {"EPOCHS": 2, "WARMUP_EPOCHS": 0, "EMA": {"ENABLED": head == "fpn"}},
        "PRINT_FREQ": 1,
        "SAVE_EVERY_UPDATES": 1,
    }


@pytest.mark.parametrize(
    ("head", "processes"), [("fpn", 1), ("upernet", 2), pytest.param("mask2former", 1, marks=pytest.mark.slow)]
)
def test_a_killed_segmenter_ends_as_one_that_was_not(tmp_path: Path, head: str, processes: int) -> None:
    options = sections(head, write_masks(tmp_path / "data", val=3), processes)
    trial = whole_and_killed(tmp_path, processes, rows=2, **options)
    (last,) = read_metrics(trial.folder, "eval")[-1:]
    assert 0 <= last["miou"] <= last["accuracy"] <= 1
    assert {path.name for path in trial.folder.iterdir()} >= {"best.pth", "last.pth", "samples.png"}
    assert outcome(trial.folder)["last.pth"]["classes"] == ["sky", "sea", "sand"]
