"""Segmenters in the trainer: exact resuming after a kill in mid-epoch."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.data.segmentation.samples import write_masks
from tests.launched import Trial, first_difference, outcome
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
        "MODEL": {"NAME": "tiny", "SEGMENTER": {"NAME": head, "ARGS": ARGS[head]}, "DAT": TINY},
        "TRAIN": {"EPOCHS": 2, "WARMUP_EPOCHS": 0, "EMA": {"ENABLED": head == "fpn"}},
        "PRINT_FREQ": 1,
        "SAVE_EVERY_UPDATES": 1,
    }


TINY = {
    **{"dim_stem": 8, "dims": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "stage_spec": ["N", "D", "D", "D"]},
    **{"heads": [1, 2, 2, 2], "groups": [1, 1, 1, 1]},
}


@pytest.mark.parametrize(
    ("head", "processes"), [("fpn", 1), ("upernet", 2), pytest.param("mask2former", 1, marks=pytest.mark.slow)]
)
def test_a_killed_segmenter_ends_as_one_that_was_not(tmp_path: Path, head: str, processes: int) -> None:
    data, left = write_masks(tmp_path / "data", val=3), []
    for name in ("whole", "killed"):
        trial = Trial(tmp_path / name, processes, 0, **sections(head, data, processes))
        if name == "killed":
            job = trial.start()
            job.wait_until(lambda trial=trial: trial.rows() >= 2)  # after the first mid-epoch checkpoint
            job.signal(signal.SIGKILL)
            job.wait()
        left.append(trial.finish())
    assert re.search("continuing from .*, update [1-9]", (tmp_path / "killed" / "console.txt").read_text())
    assert first_difference(*left) is None
    (last,) = read_metrics(trial.folder, "eval")[-1:]
    assert 0 <= last["miou"] <= last["accuracy"] <= 1
    assert {path.name for path in trial.folder.iterdir()} >= {"best.pth", "last.pth", "samples.png"}
    assert outcome(trial.folder)["last.pth"]["classes"] == ["sky", "sea", "sand"]
