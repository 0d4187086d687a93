"""The faults that check_data finds, on images with known ones."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image

from data.build import open_dataset
from tests.data.samples import photograph, small_config, write_folder
from tests.runs import call
from tools import check_data


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "photos", {"train/cat": 3, "train/dog": 5, "val/cat": 2, "val/dog": 1})


def run(root: Path, *words: str) -> tuple[int, str]:
    status, said, _ = call(check_data.main, "--workers", "1", "--data-path", root, *words)
    return status, said.replace(str(root), "ROOT")


def test_data_set_without_problems(root: Path) -> None:
    status, said = run(root)
    assert status == 0
    assert "train: 8 images, 0 unreadable\nclasses: 2, of 3 (cat) to 5 (dog) images, median 4\n" in said
    assert "width x height: 48 x 36 at least, 48 x 36 at most, 48 x 36 on average\n" in said
    assert said.endswith("verdict: no problems found\n")


def test_faults(root: Path) -> None:
    (root / "train/dog/4.jpg").write_text("no image")
    shutil.copy(root / "train/cat/0.jpg", root / "val/cat/again.jpg")
    with Image.open(root / "train/dog/0.jpg") as image:
        image.save(root / "train/dog/same pixels.png")
    photograph(50, 31, 40).save(root / "train/cat/tiny.jpg")
    photograph(51, 200, 40).save(root / "train/cat/wide.jpg")
    (root / "train/cat/photo.heic").write_text("no image")
    status, said = run(root)
    assert status == 1
    for line in (
        "train: 11 images, 1 unreadable\n  cannot read image 'ROOT/train/dog/4.jpg': cannot identify image file\n",
        "1 image is tiny, a side below 32 pixels\n  ROOT/train/cat/tiny.jpg (31 x 40)\n",
        "1 image is oddly shaped, one side 4 times the other or more\n  ROOT/train/cat/wide.jpg (200 x 40)\n",
        "1 image is in both train and val\n  ROOT/train/cat/0.jpg = ROOT/val/cat/again.jpg\n",
        "1 image occurs more than once in train\n  ROOT/train/dog/0.jpg = ROOT/train/dog/same pixels.png\n",
        "note: 1 file skipped in ROOT/train, with extensions that Pillow does not read: 1 .heic\n",
        "verdict: 1 unreadable image in train; 1 image is in training and validation, so results are too good\n",
    ):
        assert line in said


def test_mean_and_deviation(tmp_path: Path) -> None:
    for name, colours in (("black", (0, 0, 0)), ("red", (255, 0, 51))):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), colours).save(tmp_path / "train" / name / "0.png")
    status, said = run(tmp_path, "--parts", "train")
    assert status == 0
    assert "classes: 2, of 1 image each\n" in said
    assert "mean [0.5 0.  0.1], deviation [0.5 0.  0.1] (of 1)" in said


def test_wrong_data_set(tmp_path: Path) -> None:
    status, _, said = call(check_data.main, "--data-path", tmp_path / "gone")
    assert status == 2  # 1 is for faults of the images
    assert said.startswith("check_data.py: cannot read folder ")
    assert "gone: No such file or directory" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--show", -1), "--show must be at least 0, not -1"),
        (("--workers", 0), "--workers must be at least 1, not 0"),
        (("--workers", -2), "--workers must be at least 1, not -2"),
    ],
)
def test_numbers_that_are_too_small(root: Path, words: tuple[str, int], says: str) -> None:
    assert call(check_data.main, "--data-path", root, *words) == (2, "", f"check_data.py: {says}\n")


def test_a_killed_worker_is_reported(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(open_dataset(small_config(root)).train)
    monkeypatch.setattr(kind, "get", lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # as for lack of memory
    status, _, said = call(check_data.main, "--data-path", root, "--workers", 2)
    assert status == 2
    assert said == "check_data.py: a worker was killed; fewer --workers need less memory\n"


def test_images_are_read_once_and_the_source_is_not_sent_with_them(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the source was pickled")

    dataset, here = open_dataset(small_config(root)), []
    kind = type(dataset.train)
    get = kind.get
    monkeypatch.setattr(kind, "get", lambda self, index: here.append(index) or get(self, index))
    monkeypatch.setattr(kind, "__reduce_ex__", refuse)
    assert check_data.check(dataset, ("train", "val"), workers=1, show=3) == []
    assert here == []  # they are read in the worker
    assert "train: 8 images, 0 unreadable" in capsys.readouterr().out
