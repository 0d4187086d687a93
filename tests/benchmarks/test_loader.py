"""The benchmark of the loader prints its tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import loader
from tests.data.formats.writers import write_tar
from tests.data.samples import write_folder


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    photos = write_folder(tmp_path / "data", {"train/cat": 5, "train/dog": 4, "val/cat": 1})
    argv = ["loader", "--data-path", str(photos), "--also", f"tar:{write_tar(photos, tmp_path / 'tars')}"]
    monkeypatch.setattr(sys, "argv", [*argv, "--size", "32", "--batch-size", "2", "--images", "6", "--runs", "2"])
    loader.main()
    said = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("|")]
    rates = [row for row in rows if row[0] in ("recipe", "light")]
    names = ["timm, folder", "timm, folder, prefetcher", "imagenet", "tar"]
    assert [row[:2] for row in rates] == [[kind, name] for kind in ("recipe", "light") for name in names]
    for kind in ("recipe", "light"):
        chosen = [row for row in rates if row[0] == kind]
        base = max(float(row[2]) for row in chosen[:2])
        for row in chosen:
            assert float(row[4]) == pytest.approx(float(row[2]) / base, abs=0.01)
            assert 0 < int(row[3].rstrip("%")) <= 100
    assert [row[0] for row in rows[-2:]] == ["Pillow", "simplejpeg"]


def test_synthetic_listing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["loader", "--listing", "5000"])
    loader.main()
    assert "5000 images: 0.00 GiB, mapped once by all processes" in capsys.readouterr().out


def test_wrong_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["loader.py", "--data-path", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        loader.main()
    assert capsys.readouterr().err.startswith("loader.py: no folder 'train' in data path")
