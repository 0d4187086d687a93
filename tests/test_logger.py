"""The log of a run and the programs that record it, each in its current release and without a network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from config import default_config
from logger import RunLog, check_writers


@pytest.mark.parametrize("option", ["TENSORBOARD", "WANDB"])
def test_a_missing_package_is_named(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = default_config()
    check_writers(config)
    config[option] = True
    with pytest.raises(ValueError, match=f"{option} needs the package {option.lower()}: pip install {option.lower()}"):
        check_writers(config)


def test_weights_and_biases_records_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = default_config()
    config.WANDB = True
    for _ in range(2):  # a continued run stays one run
        log = RunLog(tmp_path, config, is_main=True)
        log.metrics("train", epoch=1, update=1, loss=1.0)
        log.close()
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    identity = (tmp_path / "wandb_id.txt").read_text(encoding="utf-8")
    assert len(runs) >= 1
    assert {run.name.rpartition("-")[2] for run in runs} == {identity}
