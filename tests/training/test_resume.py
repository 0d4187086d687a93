"""A run killed at any moment and started again by the same command ends like an uninterrupted one."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from config import load_config
from tests.launched import Job, Trial, Uninterrupted, first_difference
from tests.runs import ROOT
from training.resume import find_resumed

pytestmark = pytest.mark.xdist_group("resume")

SETTINGS = [(1, 0), (1, 2), (2, 0), (2, 2)]  # processes, workers of each


def kill(trial: Trial, job: Job, moment: str, seconds: float, draw: random.Random) -> None:
    """Kill one process of a job, or all, at a random moment of its `seconds`, or within a random one of its saves."""
    if moment == "any":
        time.sleep(draw.uniform(0, seconds))
    else:
        staged = [trial.folder / name for name in ("last.tmp", "beside.tmp", "metrics.jsonl.tmp")]
        for _ in range(draw.randint(1, 15)):
            job.wait_until(lambda: not any(path.exists() for path in staged))
            job.wait_until(lambda: any(path.exists() for path in staged))
        time.sleep(draw.uniform(0, 0.002))
    job.signal(signal.SIGKILL, *draw.choice([(), (0,), (len(job.ranks) - 1,)]))


def survives(
    folder: Path,
    uninterrupted: Uninterrupted,
    setting: tuple[int, int],
    moment: str,
    draw: random.Random,
    kills: int = 1,
) -> bool:
    """Run, kill and continue at least this number of times; print the difference, and return whether there is none."""
    expected, seconds = uninterrupted.of(setting[0])
    trial = Trial(folder / f"trial-{draw.random()}", *setting)
    killed = 0
    while killed < kills or draw.random() < 0.3:
        job = trial.start()
        kill(trial, job, moment, seconds, draw)
        statuses = job.wait()
        if statuses == [0] * len(statuses):  # ended before it could be killed
            shutil.rmtree(trial.folder)
            continue
        assert -signal.SIGKILL in statuses, job.console()
        assert set(statuses) <= {-signal.SIGKILL, 75, 0}, job.console()
        killed += 1
    difference = first_difference(expected, trial.finish())
    if difference:
        print(f"{setting} killed {killed} times ({moment}): {difference}")
    return not difference


@pytest.mark.parametrize(
    ("setting", "moment"),
    [
        pytest.param((1, 2), "any", id="workers"),
        pytest.param((1, 0), "save", id="save"),
        pytest.param((2, 0), "any", id="two", marks=pytest.mark.slow),  # the toy task is killed on two by default
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(
    uninterrupted: Uninterrupted, tmp_path: Path, setting: tuple[int, int], moment: str
) -> None:
    draw = random.Random(f"{setting} {moment}")
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        assert survives(folder, uninterrupted, setting, moment, draw, kills=2)
        if re.search(r": epoch \d, update [1-9]", next(folder.glob("*/console.txt")).read_text()):
            return
    pytest.fail("no job was killed in the middle of an epoch")


@pytest.mark.parametrize(
    ("env", "accepted"),
    [
        ({}, False),
        ({"DAT_LAUNCHED": "1000"}, False),
        ({"DAT_RESTART_COUNT": "1"}, True),
        ({"DAT_RESTART_COUNT": "1", "DAT_LAUNCHED": "1999.5"}, True),
        ({"DAT_RESTART_COUNT": "1", "DAT_LAUNCHED": "2000.5"}, False),
        ({"SLURM_RESTART_COUNT": "2", "DAT_LAUNCHED": "1999"}, True),
        ({"SLURM_RESTART_COUNT": "2", "DAT_LAUNCHED": "2001"}, False),
    ],
)
@pytest.mark.parametrize("automatic", [True, False])
def test_a_restart_does_not_continue_a_run_that_ended_before_the_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], accepted: bool, automatic: bool
) -> None:
    for name in ("DAT_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "DAT_LAUNCHED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    options = ["OUTPUT", str(tmp_path), "TRAIN.AUTO_RESUME", automatic]
    config = load_config(ROOT / "configs" / "digits.yaml", options)
    last = config.run_folder / "last.pth"
    last.parent.mkdir(parents=True)
    torch.save({"model": {}}, last)
    os.utime(last, (2000, 2000))
    if accepted or automatic:
        with pytest.raises(ValueError, match=r"last\.pth has no training state"):
            find_resumed(config, None, training_images=1)
    else:
        assert find_resumed(config, None, training_images=1) is None


@pytest.mark.slow
def test_fifty_of_fifty_killed_runs_end_as_one_that_was_not(
    uninterrupted: Uninterrupted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = itertools.islice(itertools.cycle(itertools.product(("any", "save"), SETTINGS)), 50)
    draws = [random.Random(number) for number in range(50)]
    kept = [
        survives(tmp_path, uninterrupted, setting, moment, draw)
        for (moment, setting), draw in zip(cases, draws, strict=True)
    ]
    with capsys.disabled():
        print(f"\n{sum(kept)} of {len(kept)} killed runs ended bit-identical to the uninterrupted run")
    assert all(kept)
