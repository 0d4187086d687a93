"""The trainer does not depend on classes: another task trains and resumes exactly after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from config import default_config
from tasks import TASKS, build_task
from tests.launched import outcome, whole_and_killed
from tests.runs import read_metrics
from tests.training.regression import Regression, register
from utils import World

pytestmark = pytest.mark.xdist_group("serial")

SECTIONS = {
    "TASK": "regression",
    "DATA": {"BATCH_SIZE": 4, "NUM_WORKERS": 0},
    "TRAIN": {"EPOCHS": 3, "WARMUP_EPOCHS": 1, "ACCUMULATION_STEPS": 2, "EMA": {"ENABLED": True}},
    "PRINT_FREQ": 3,
    "SAVE_EVERY_UPDATES": 2,
}


def test_new_task_decides_which_options_it_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "regression", Regression)
    config, world = default_config(), World(0, 1, 0, torch.device("cpu"))
    config.TASK, config.DATA.CACHE = "regression", True
    assert isinstance(build_task(config, world, training=True), Regression)
    monkeypatch.setattr(Regression, "unsupported", {"DATA.CACHE": ()})
    with pytest.raises(ValueError, match=r"^DATA\.CACHE is not supported by TASK regression; leave it at False"):
        build_task(config, world, training=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_another_task_trains_and_resumes_after_a_kill(tmp_path: Path, processes: int) -> None:
    trial = whole_and_killed(tmp_path, processes, prepare=register, **SECTIONS)
    errors = [row["rmse"] for row in read_metrics(trial.folder, "eval_ema")]
    assert outcome(trial.folder)["best.pth"]["best_accuracy"] == -min(errors)
    losses = read_metrics(trial.folder, "train")[-1]
    assert losses["loss"] == pytest.approx(losses["sum"] + losses["largest"], rel=1e-5)
    assert "Best error: " in (tmp_path / "killed" / "console.txt").read_text(encoding="utf-8")
