"""The layout of an image folder, and one clear line for each way to get it wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data.formats.folders import open_folders
from data.images import UnreadableImage
from data.sources import Dataset, Request
from tests.data.samples import photograph, write_folder

GOOD = {"train/cat": 2, "train/dog": 3, "val/cat": 1, "val/dog": 1}
LAYOUT = "the layout is DATA_PATH/train/<class>/*.jpg and DATA_PATH/val/<class>/*.jpg"


def opened(root: Path, *splits: str) -> Dataset:
    """Open a folder, both of its parts where none is named."""
    return open_folders(Request(path=str(root), needs=splits or ("train", "val")))


def refusal(root: Path, *splits: str) -> str:
    """Return the one line that a folder is refused with, its root written as ROOT."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        opened(root, *splits)
    return str(caught.value).replace(str(root), "ROOT")


def test_classes_are_the_sorted_folders_of_train(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/dog": 1, "train/cat": 1, "train/Ant": 1, "val/dog": 1})
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "notes.txt").write_text("no class")
    assert opened(tmp_path).classes == ["Ant", "cat", "dog"]
    assert opened(tmp_path, "val").classes == ["Ant", "cat", "dog"]


def test_classes_without_train_are_those_of_val(tmp_path: Path) -> None:
    write_folder(tmp_path, {"val/dog": 1, "val/cat": 1})
    assert opened(tmp_path, "val").classes == ["cat", "dog"]
    (tmp_path / "train").mkdir()
    assert opened(tmp_path, "val").classes == ["cat", "dog"]


def test_missing_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone") == f"cannot read folder ROOT: No such file or directory; {LAYOUT}"


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refusal(tmp_path / "file") == f"cannot read folder ROOT: Not a directory; {LAYOUT}"


def test_empty_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"no folder 'train' in data path ROOT: it holds no folders; {LAYOUT}"


def test_no_train(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"n{number}/x": 0 for number in range(8)})
    there = "it holds n0, n1, n2, n3, n4 and 3 more"
    assert refusal(tmp_path) == f"no folder 'train' in data path ROOT: {there}; {LAYOUT}"


def test_no_val(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/cat": 1, "test/cat": 1})
    expected = f"no folder 'val' in data path ROOT: it holds test, train; {LAYOUT}"
    assert refusal(tmp_path) == refusal(tmp_path, "val") == expected


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_class_folders(tmp_path: Path, split: str) -> None:
    write_folder(tmp_path, {name: count for name, count in GOOD.items() if not name.startswith(split)})
    (tmp_path / split).mkdir()
    photograph().save(tmp_path / split / "0.jpg")
    assert refusal(tmp_path) == f"no class folders in ROOT/{split}; {LAYOUT}"


@pytest.mark.parametrize("split", ["train", "val"])
def test_class_without_images(tmp_path: Path, split: str) -> None:
    write_folder(tmp_path, {**GOOD, f"{split}/cat": 0})
    (tmp_path / split / "cat" / "readme.txt").write_text("no image")
    (tmp_path / split / "cat" / "._0.jpg").write_text("left behind by macOS")
    assert refusal(tmp_path).startswith(
        f"no images in ROOT/{split}/cat; add some or remove the folder (images end in .jpg"
    )


def test_many_classes_without_images(tmp_path: Path) -> None:
    write_folder(tmp_path, {**GOOD, **{f"train/empty{number}": 0 for number in range(7)}})
    assert "ROOT/train/empty3, ROOT/train/empty4 and 2 more; add some" in refusal(tmp_path)


def test_classes_of_val_that_train_has_not(tmp_path: Path) -> None:
    write_folder(tmp_path, {**GOOD, **{f"val/new{number}": 1 for number in range(6)}})
    expected = f"ROOT/val has classes that ROOT/train has not: new0, new1, new2, new3, new4 and 1 more; {LAYOUT}"
    assert refusal(tmp_path) == refusal(tmp_path, "val") == expected


@pytest.mark.parametrize("unreadable", ["", "/val", "/val/dog"])
def test_unreadable_folder(tmp_path: Path, unreadable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, GOOD)
    scandir = os.scandir

    def refuse(path: str | Path) -> object:  # the superuser, as whom containers run tests, may read anything
        if str(path) == f"{tmp_path}{unreadable}":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert refusal(tmp_path) == f"cannot read folder ROOT{unreadable}: Permission denied; {LAYOUT}"


def test_class_that_is_a_link_to_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path, GOOD)
    (tmp_path / "train" / "emu").symlink_to(tmp_path / "gone")
    assert refusal(tmp_path) == "ROOT/train/emu is a link to nothing; repair or remove it"


def test_every_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, {**GOOD, "train/cat/more": 1})
    scanned: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(str(path)) or scandir(path))
    opened(tmp_path)
    folders = ["", "/train", "/train/cat", "/train/cat/more", "/train/dog", "/val", "/val/cat", "/val/dog"]
    assert sorted(scanned) == [f"{tmp_path}{folder}" for folder in folders]
    scanned.clear()
    opened(tmp_path, "val")  # names its classes after train, but needs none of its images
    assert f"{tmp_path}/train/cat" not in scanned


def test_images_and_labels(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/cat": 2, "train/dog": 1, "train/dog/puppies": 2, "val/dog": 1})
    (tmp_path / "linked").mkdir()
    photograph().save(tmp_path / "linked" / "0.PNG")
    (tmp_path / "train" / "emu").symlink_to(tmp_path / "linked")
    (tmp_path / "train" / "dog" / "siblings").symlink_to(tmp_path / "linked")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")  # unreadable, but not overlooked
    images = opened(tmp_path, "train").train
    assert opened(tmp_path, "train").classes == ["cat", "dog", "emu"]
    assert [images.label(index) for index in range(len(images))] == [0, 0, 0, 1, 1, 1, 1, 2]
    assert images.read(0).tobytes() != images.read(1).tobytes()
    assert images.read(7).tobytes() == photograph().tobytes()
    assert opened(tmp_path).held_out.label(0) == 1


def test_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    names = ["d", "a", "e", "b", "c", "f"]  # most file systems list these by age or by hash
    for folder in ("m", "k", "n", "l"):
        (tmp_path / "train" / "cat" / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / "train" / "cat" / folder / f"{name}.jpg").write_text("")
    images = opened(tmp_path, "train").train
    read = []
    for index in range(len(images)):
        with pytest.raises(UnreadableImage) as caught:
            images.read(index)
        read.append(os.path.relpath(caught.value.path, tmp_path / "train" / "cat"))
    assert read == [f"{folder}/{name}.jpg" for folder in "klmn" for name in sorted(names)]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/cat": 1})
    (tmp_path / "train" / "cat" / "0.jpg").rename(
        os.fsdecode(bytes(tmp_path / "train" / "cat") + b"/\xff \xc3\xa4.jpg")
    )
    assert opened(tmp_path, "train").train.read(0).size == (48, 36)
