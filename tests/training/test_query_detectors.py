"""Detectors with queries in the trainer: exact resuming after a kill in mid-epoch."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from data.formats import digit_scenes
from models.detection.transformers_kinds import KINDS
from tests.launched import Trial, first_difference, outcome
from tests.models.detection.small import small_arguments

pytestmark = pytest.mark.xdist_group("dense")

BACKBONE = {
    **{"dim_stem": 8, "dims": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "stage_spec": ["N", "D", "D", "D"]},
    **{"heads": [1, 2, 2, 2], "groups": [1, 1, 1, 1], "strides": [4, 2, 1, 1], "ksizes": [5, 3, 3, 3]},
}


def few_scenes() -> None:
    digit_scenes.HELD_OUT = 2


@pytest.mark.parametrize(
    "name", ["dino", *(pytest.param(name, marks=pytest.mark.slow) for name in ("co_detr", *KINDS))]
)
def test_a_killed_detector_ends_as_one_that_was_not(tmp_path: Path, name: str) -> None:
    sections = {
        "TASK": "detection",
        "DATA": {"DATASET": "digit_scenes", "SCENES": 8, "IMG_SIZE": 128, "BATCH_SIZE": 4, "NUM_WORKERS": 0},
        "DETECTION": {"SHORT_SIDES": [112, 128], "LONG_SIDE": 128, "CROP_SIDES": [], "TEST_SHORT_SIDE": 128},
        "MODEL": {"NAME": "tiny", "DETECTOR": {"NAME": name, "ARGS": small_arguments(name)}, "DAT": BACKBONE},
        "TRAIN": {"EPOCHS": 1, "WARMUP_EPOCHS": 0},
        **{"PRINT_FREQ": 1, "SAVE_EVERY_UPDATES": 1},
    }
    left = []
    for run in ("whole", "killed"):
        trial = Trial(tmp_path / run, 1, 0, **sections)
        if run == "killed":
            job = trial.start(prepare=few_scenes)
            job.wait_until(lambda trial=trial: trial.rows() >= 2)  # after the first mid-epoch checkpoint
            job.signal(signal.SIGKILL)
            job.wait()
        job = trial.start(prepare=few_scenes)
        assert job.wait() == [0], job.console()
        left.append(outcome(trial.folder))
    assert re.search("continuing from .*, update [1-9]", (tmp_path / "killed" / "console.txt").read_text())
    assert first_difference(*left) is None
