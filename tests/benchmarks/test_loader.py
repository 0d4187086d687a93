"""The benchmark of the loader prints its table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import loader
from tests.data.samples import write_folder


def test_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "data", {"train/cat": 5, "train/dog": 4})
    (tmp_path / "small.yaml").write_text("DATA: {IMG_SIZE: 32, BATCH_SIZE: 2}\n")
    argv = ["loader", "--cfg", str(tmp_path / "small.yaml"), "--data-path", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", [*argv, "--workers", "0", "1", "--images", "6", "--runs", "2"])
    loader.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [row[0] for row in rows] == ["0", "1"]
    for _, ours, slowest, plain, _, ratio in rows:
        assert float(ours) > 0
        assert 0 < int(slowest.rstrip("%")) <= 100
        assert float(ratio) == pytest.approx(float(ours) / float(plain), rel=0.01)


def test_wrong_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.yaml").write_text("DATA: {IMG_SIZE: 32}\n")
    monkeypatch.setattr(sys, "argv", ["loader", "--cfg", str(tmp_path / "small.yaml"), "--data-path", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: no folder 'train' in data path"):
        loader.main()
