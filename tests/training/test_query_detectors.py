"""Detectors with queries in the trainer: exact resuming after a kill in mid-epoch."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.formats import digit_scenes
from models.detection.transformers_kinds import KINDS
from tests.launched import whole_and_killed
from tests.models.detection.small import small_arguments

pytestmark = pytest.mark.xdist_group("dense")


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
        "MODEL": {"DETECTOR": {"NAME": name, "ARGS": small_arguments(name)}},
        "TRAIN": {"EPOCHS": 1, "WARMUP_EPOCHS": 0},
        **{"PRINT_FREQ": 1, "SAVE_EVERY_UPDATES": 1},
    }
    whole_and_killed(tmp_path, 1, rows=2, prepare=few_scenes, **sections)
