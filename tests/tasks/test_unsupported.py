"""Options without effect in a task are refused, unless they are at their default or turned off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from config import load_config
from tasks import build_task
from tests.runs import write_config
from utils import World


@pytest.mark.parametrize(
    ("task", "key", "value"),
    [
        ("detection", "AUG.COLOR_JITTER", "0.3"),
        ("segmentation", "AUG.AUTO_AUGMENT", "3a"),
        ("detection", "AUG.CROP", "padded"),
        ("segmentation", "TEST.CROP_RATIO", "0.9"),
        ("segmentation", "MODEL.LABEL_SMOOTHING", "0.2"),
        ("detection", "SEGMENTATION.SCALE", "[1.0, 1.0]"),
        ("detection", "MODEL.SEGMENTER.NAME", "upernet"),
        ("segmentation", "DETECTION.LONG_SIDE", "100"),
        ("segmentation", "MODEL.DETECTOR.ARGS", "{channels: 8}"),
        ("segmentation", "MODEL.CLASS_MAP", "map.txt"),
    ],
)
def test_other_values_are_refused(tmp_path: Path, task: str, key: str, value: str) -> None:
    config = load_config(write_config(tmp_path, TASK=task, DATA={"DATASET": "digit_scenes"}), [key, value])
    with pytest.raises(ValueError, match=rf"{key}.* is not supported by .*TASK {task}; (leave|remove)"):
        build_task(config, World(0, 1, 0, torch.device("cpu")), training=False)
