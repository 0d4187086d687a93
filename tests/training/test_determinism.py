"""Runs with the same seed are equal, for any number of processes with the same batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launched import HELD_OUT_IMAGES, UPDATES, Trial
from tests.runs import read_metrics


def train(folder: Path, processes: int, workers: int, *flags: str | int) -> Trial:
    """Return an epoch of training that logged every update."""
    trial = Trial(folder, processes, workers, TRAIN={"EPOCHS": 1}, PRINT_FREQ=1)
    job = trial.start(*flags)
    assert job.wait() == [0] * processes, job.console()
    return trial


def test_two_runs_with_one_seed_are_equal(tmp_path: Path) -> None:
    runs = [
        train(tmp_path / str(workers), 1, workers, "--deterministic", "--seed", 3, "--opts", "AUG.CUTMIX", 1)
        for workers in (0, 2)
    ]
    first, second = ((run.folder / "metrics.jsonl").read_text(encoding="utf-8") for run in runs)
    assert first == second
    other = train(tmp_path / "other", 1, 0, "--deterministic", "--seed", 4, "--opts", "AUG.CUTMIX", 1)
    assert read_metrics(other.folder, "train")[0]["loss"] != read_metrics(runs[0].folder, "train")[0]["loss"]


def test_processes_that_share_the_images_follow_the_same_curve(tmp_path: Path) -> None:
    still = ("--opts", "AUG.MIXUP", 0, "AUG.REPROB", 0, "MODEL.DAT.drop_path_rate", 0)
    one, two = (train(tmp_path / str(processes), processes, 0, *still) for processes in (1, 2))
    losses = [[row["loss"] for row in read_metrics(run.folder, "train")] for run in (one, two)]
    assert len(losses[0]) == 2 * UPDATES
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    accuracies = [read_metrics(run.folder, "eval")[0]["top1"] for run in (one, two)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=100 / HELD_OUT_IMAGES)  # an image on the edge
