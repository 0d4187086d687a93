"""The benchmark of the loader prints its tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import loader
from tests.data.formats.writers import write_tar
from tests.data.samples import write_folder
from tests.runs import call, printed_by


def test_tables(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "data", {"train/cat": 5, "train/dog": 4, "val/cat": 1})
    words = ("--data-path", photos, "--also", f"tar:{write_tar(photos, tmp_path / 'tars')}")
    said = printed_by(loader.main, *words, "--size", 32, "--batch-size", 2, "--images", 6, "--runs", 2)
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


def test_synthetic_listing() -> None:
    said = printed_by(loader.main, "--listing", 5000)
    assert "5000 images: 0.00 GiB, mapped once by all processes" in said


def test_wrong_folder(tmp_path: Path) -> None:
    status, _, err = call(loader.main, "--data-path", tmp_path)
    assert status == 2
    assert err.startswith("loader.py: no folder 'train' in data path")
