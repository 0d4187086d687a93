"""A run that is killed in mid-epoch ends as one on class folders that nothing happened to, whatever the format."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.data.formats.writers import WRITERS
from tests.launched import Trial, Uninterrupted, first_difference

pytestmark = pytest.mark.xdist_group("resume")


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("csv", "tar", "huggingface")]


@pytest.mark.parametrize("kind", ["shards", "parquet", *SLOW])
def test_a_kill_in_mid_epoch_changes_nothing(kind: str, tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    expected, _ = uninterrupted.of(1)
    photos = Trial(tmp_path / "folders", 1, 0).images
    name, write = WRITERS[kind]
    data = {"DATASET": name, "DATA_PATH": str(write(photos, tmp_path / kind)), "BATCH_SIZE": 12, "NUM_WORKERS": 0}
    trial = Trial(tmp_path / "trial", 1, 0, DATA=data)
    job = trial.start(XDG_CACHE_HOME=str(tmp_path / "cache"))
    job.wait_until(lambda: trial.rows() >= 1)
    job.signal(signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL]
    assert first_difference(expected, trial.finish()) is None
