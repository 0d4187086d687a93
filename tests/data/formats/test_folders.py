"""The layout of class folders, and an error message for each wrong layout."""

from __future__ import annotations

import os
import shutil
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data.formats.folders import list_images, open_folders
from data.images import UnreadableImage
from data.sources import Dataset, Request
from tests.data.samples import photograph, write_folder

GOOD = {"train/cat": 2, "train/dog": 3, "val/cat": 1, "val/dog": 1}
LAYOUT = "the layout is DATA_PATH/train/<class>/*.jpg and DATA_PATH/val/<class>/*.jpg"


def opened(root: Path, *splits: str) -> Dataset:
    """Open a folder, by default both splits."""
    return open_folders(Request(path=str(root), needs=splits or ("train", "val")))


def refusal(root: Path, *splits: str) -> str:
    """Return the one-line error message for a folder, with its root replaced by ROOT."""
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
    assert refusal(tmp_path) == f"no folder 'train' in data path ROOT: it contains no folders; {LAYOUT}"


def test_no_train(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"n{number}/x": 0 for number in range(8)})
    there = "it contains n0, n1, n2, n3, n4 and 3 more"
    assert refusal(tmp_path) == f"no folder 'train' in data path ROOT: {there}; {LAYOUT}"


def test_no_val(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/cat": 1, "more/cat": 1})
    expected = f"no folder 'val' in data path ROOT: it contains more, train; {LAYOUT}"
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
        f"no images in ROOT/{split}/cat; add some or remove the folder (they contain 1 .txt; images end in .jpg"
    )


def test_many_classes_without_images(tmp_path: Path) -> None:
    write_folder(tmp_path, {**GOOD, **{f"train/empty{number}": 0 for number in range(7)}})
    assert "ROOT/train/empty3, ROOT/train/empty4 and 2 more; add some" in refusal(tmp_path)


def test_classes_of_val_that_train_does_not_have(tmp_path: Path) -> None:
    write_folder(tmp_path, {**GOOD, **{f"val/new{number}": 1 for number in range(6)}})
    expected = f"ROOT/val has classes that ROOT/train does not have: new0, new1, new2, new3, new4 and 1 more; {LAYOUT}"
    assert refusal(tmp_path) == refusal(tmp_path, "val") == expected


@pytest.mark.parametrize("unreadable", ["", "/val", "/val/dog"])
def test_unreadable_folder(tmp_path: Path, unreadable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, GOOD)
    scandir = os.scandir

    def refuse(path: str | Path) -> object:  # root, as in containers, can read every file
        if str(path) == f"{tmp_path}{unreadable}":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert refusal(tmp_path) == f"cannot read folder ROOT{unreadable}: Permission denied; {LAYOUT}"


def test_class_that_is_a_broken_link(tmp_path: Path) -> None:
    write_folder(tmp_path, GOOD)
    (tmp_path / "train" / "emu").symlink_to(tmp_path / "gone")
    assert refusal(tmp_path) == "ROOT/train/emu is a broken link; repair or remove it"


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


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/cat": 1})
    (tmp_path / "train" / "cat" / "0.jpg").rename(
        os.fsdecode(bytes(tmp_path / "train" / "cat") + b"/\xff \xc3\xa4.jpg")
    )
    assert opened(tmp_path, "train").train.read(0).size == (48, 36)


def test_every_ending_that_pillow_opens_is_an_image(tmp_path: Path) -> None:
    write_folder(tmp_path, GOOD)
    for ending in ("jfif", "jpe", "JPG", "tga", "apng", "avif", "jp2", "dib", "pcx", "sgi"):
        image = photograph()
        image.save(tmp_path / "train" / "cat" / f"more.{ending}")
    images = opened(tmp_path).train
    assert len(images) == 2 + 3 + 10
    assert all(images.read(index).size == (48, 36) for index in range(len(images)))


def test_files_that_are_skipped_are_counted(tmp_path: Path) -> None:
    write_folder(tmp_path, GOOD)
    for name in ("a.HEIC", "b.heic", "notes.txt", "README", ".DS_Store"):
        (tmp_path / "train" / "cat" / name).write_text("no image")
    assert opened(tmp_path).warnings() == [
        f"4 files skipped in {tmp_path}/train, with extensions that Pillow does not read: 2 .heic, 1 .txt, 1 without "
        "extension"
    ]


def test_folders_of_network_storage_are_not_classes(tmp_path: Path) -> None:
    write_folder(tmp_path, {**GOOD, "train/#recycle": 1, "train/@Recycle": 0, "val/@eaDir": 1})
    assert len(opened(tmp_path).classes) == len({name.partition("/")[2] for name in GOOD})


def test_class_with_only_skipped_files(tmp_path: Path) -> None:
    write_folder(tmp_path, {**GOOD, "train/emu": 0})
    (tmp_path / "train" / "emu" / "a.heic").write_text("no image")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("of another class")
    assert "no images in ROOT/train/emu; add some or remove the folder (they contain 1 .heic; " in refusal(tmp_path)


@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", ".ipynb_checkpoints", ".AppleDouble"])
def test_folders_of_operating_systems_are_ignored(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, GOOD)
    for folder in (tmp_path / name, tmp_path / "train" / name, tmp_path / "train" / "cat" / name):
        folder.mkdir()
        (folder / "._0.jpg").write_text("no image")
        (folder / "0.txt").write_text("no image")
        (folder / "0.jpg").write_text("part of an image, a preview or a copy")
    dataset = opened(tmp_path)
    assert dataset.classes == ["cat", "dog"]
    assert dataset.warnings() == []
    assert len(dataset.train) == 5


def test_names_in_two_forms_of_unicode_are_one_class(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "K\u00e4se") for form in ("NFC", "NFD"))
    write_folder(tmp_path, {f"train/{apart}": 1, "train/dog": 1, f"val/{composed}": 1})
    dataset = opened(tmp_path)
    assert dataset.classes == [composed, "dog"]
    assert dataset.held_out.label(0) == 0
    assert dataset.held_out.read(0).size == (48, 36)
    write_folder(tmp_path / "twice", {f"train/{apart}": 1, f"train/{composed}": 1, f"val/{composed}": 1})
    assert "train has two classes each for K\u00e4se, whose names differ only in Unicode" in refusal(tmp_path / "twice")


def test_names_that_differ_in_case(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/dog": 1, "train/Dog": 1, "val/dog": 1, "val/Dog": 1})
    assert opened(tmp_path).warnings() == ["classes Dog and dog differ only in case"]
    shutil.rmtree(tmp_path / "train" / "Dog")
    assert "val has classes that ROOT/train does not have: Dog (train has dog); " in refusal(tmp_path)


def test_numeric_folders(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"{split}/{name}": 1 for split in ("train", "val") for name in ("0", "2", "10", "1")})
    dataset = opened(tmp_path)
    assert dataset.classes == ["0", "1", "10", "2"]  # as torchvision sorts them
    assert "the classes are numbers, but labels follow their order as text (0, 1, 10, ...)" in dataset.warnings()[0]
    ordered = dataset.by_number()
    assert ordered.classes == ["0", "1", "2", "10"]
    assert ordered.warnings() == []
    for source, other in ((dataset.train, ordered.train), (dataset.held_out, ordered.held_out)):
        for index in range(4):
            assert dataset.classes[source.label(index)] == ordered.classes[other.label(index)]
    write_folder(tmp_path / "padded", {f"{split}/{name}": 1 for split in ("train", "val") for name in ("00", "01")})
    assert opened(tmp_path / "padded").warnings() == []


def test_usual_names_of_the_held_out_split(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/cat": 2, "test/cat": 1})
    assert len(opened(tmp_path).held_out) == 1
    write_folder(tmp_path, {"validation/cat": 2})
    assert len(opened(tmp_path).held_out) == 2
    request = Request(path=str(tmp_path), train="train", val=str(tmp_path / "test"))
    assert len(open_folders(request).held_out) == 1


def test_all_classes_at_the_root_and_a_part_of_them_elsewhere(tmp_path: Path) -> None:
    write_folder(tmp_path, {"22k/n1": 2, "22k/n2": 2, "22k/n3": 1, "1k/val/n1": 1, "1k/val/n3": 1})
    dataset = open_folders(Request(path=str(tmp_path / "22k"), train=".", val="../1k/val"))
    assert dataset.classes == ["n1", "n2", "n3"]
    assert [dataset.held_out.label(index) for index in range(2)] == [0, 2]


def test_one_class(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/cat": 2, "val/cat": 1})
    assert opened(tmp_path).warnings() == ["the data set has only one class, cat"]


def test_long_lists_are_kept_until_a_folder_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("data.formats.folders.SHARED_FROM", 3)
    root = write_folder(tmp_path / "photos", {**GOOD, "train/cat/more": 1})
    for folder, *_ in os.walk(root):
        os.utime(folder, ns=(0, time.time_ns() - 10**10))
    first = opened(root)
    assert len(list((tmp_path / "cache" / "dat").iterdir())) == 1  # val is short
    with monkeypatch.context() as patch:
        patch.setattr(os, "walk", lambda *_, **__: iter(()) if "train" in str(_[0]) else pytest.fail("listed again"))
        patch.setattr("data.formats.folders._scan", lambda folder: pytest.fail(f"listed {folder} again"))
        again = opened(root, "train")
    assert [again.train.get(i).name for i in range(6)] == [first.train.get(i).name for i in range(6)]
    assert again.classes == first.classes
    photograph().save(root / "train" / "cat" / "more" / "another.jpg")
    assert len(opened(root).train) == 7


def test_long_lists_need_no_writable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("data.formats.folders.SHARED_FROM", 3)
    assert len(opened(write_folder(tmp_path / "photos", GOOD)).train) == 5


@pytest.mark.parametrize("changed", ["content", "place"])
def test_a_kept_list_of_images_in_one_folder_follows_its_list_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("data.formats.folders.SHARED_FROM", 3)
    names = [f"ILSVRC2012_val_0000000{number}.JPEG" for number in (1, 2, 3)]
    root = truth(tmp_path / "photos", "", "val.txt", "".join(f"{name} n01\n" for name in names))
    for path in (root / "val", root / "val.txt"):
        os.utime(path, ns=(0, time.time_ns() - 10**11))
    for _ in range(2):
        assert opened(root, "val").held_out.labels.tolist() == [0, 0, 0]
    with monkeypatch.context() as patch:
        patch.setattr("data.formats.folders._scan", lambda folder: pytest.fail(f"listed {folder} again"))
        list_images(root / "val")
    if changed == "content":
        (root / "val.txt").write_text("".join(f"{name} n02\n" for name in names))
        os.utime(root / "val.txt", ns=(0, time.time_ns() - 10**10))
    else:  # an earlier place has precedence
        (root / "LOC_val_solution.csv").write_text(
            "ImageId,PredictionString\n" + "".join(f"{n[:-5]},n02 1\n" for n in names)
        )
    assert opened(root, "val").held_out.labels.tolist() == [1, 1, 1]


def truth(tmp_path: Path, where: str, name: str, content: str) -> Path:
    """Write photos whose held-out ones lie in one folder, and the list of their classes."""
    write_folder(tmp_path, {"train/n01": 2, "train/n02": 1, "train/n03": 1, "val": 0})
    for number in (1, 2, 3):
        photograph(number).save(tmp_path / "val" / f"ILSVRC2012_val_{number:08}.JPEG", "JPEG")
    (tmp_path / where).mkdir(exist_ok=True, parents=True)
    (tmp_path / where / name).write_text(content)
    return tmp_path


KAGGLE = (
    "ImageId,PredictionString\nILSVRC2012_val_00000002,n01 1 2 3 4\nILSVRC2012_val_00000001,n03 1 2 3 4 n03 5 6 7 8\n"
    "ILSVRC2012_val_00000003,n03 9 9 9 9\n"
)


@pytest.mark.parametrize(
    ("where", "name", "content"),
    [
        ("", "LOC_val_solution.csv", KAGGLE),
        (
            "val",
            "val.txt",
            "".join(f"ILSVRC2012_val_0000000{i}.JPEG {label}\n" for i, label in ((1, 2), (2, 0), (3, 2))),
        ),
        (
            "",
            "val.txt",
            "".join(f"val/ILSVRC2012_val_0000000{i}.JPEG {name}\n" for i, name in ((1, "n03"), (2, "n01"), (3, "n03"))),
        ),
        ("ILSVRC2012_devkit_t12/data", "ILSVRC2012_validation_ground_truth.txt", "7\n9\n7\n"),
        ("val", "ILSVRC2012_validation_ground_truth.txt", "7\n9\n7\n"),
    ],
)
def test_validation_images_in_one_folder(tmp_path: Path, where: str, name: str, content: str) -> None:
    root = truth(tmp_path, where, name, content)
    if name.startswith("ILSVRC"):
        synsets = np.array([(7, "n03", "x"), (9, "n01", "y")], dtype=[("ID", "i4"), ("WNID", "O"), ("words", "O")])
        savemat(root / where / "meta.mat", {"synsets": synsets})
    for needs in (("train", "val"), ("val",)):
        dataset = opened(root, *needs)
        assert dataset.classes == ["n01", "n02", "n03"]
        assert [dataset.held_out.label(index) for index in range(3)] == [2, 0, 2]
        assert dataset.held_out.get(1).name.endswith("_00000002.JPEG")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("LOC_val_solution.csv", KAGGLE[:61], "does not match ROOT/val, which holds 2 files not in it, such as"),
        ("val.txt", "a.JPEG n01\n", "ROOT/val.txt does not match ROOT/val, which lacks 1 image of it, such as a.JPEG"),
        ("val.txt", "a.JPEG\n", "ROOT/val.txt must have a file name and its class on each line, not 'a.JPEG'"),
        (
            "val.txt",
            "".join(f"ILSVRC2012_val_0000000{number}.JPEG {number}\n" for number in (1, 2, 3)),
            "the list of classes for ROOT/val has class 3, of 3 from 0 on",
        ),
        ("ILSVRC2012_validation_ground_truth.txt", "1 2 3", "needs meta.mat of the same development kit next to it"),
    ],
)
def test_lists_of_classes_that_do_not_match(tmp_path: Path, name: str, content: str, says: str) -> None:
    truth(tmp_path, "", name, content)
    assert says in refusal(tmp_path)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation(tmp_path: Path, orientation: int) -> None:
    write_folder(tmp_path, GOOD)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph().save(tmp_path / "train/cat/0.jpg", exif=exif)
    assert opened(tmp_path).train.read(0).size == (48, 36)
    turned = open_folders(Request(path=str(tmp_path), exif=True)).train.read(0)
    assert turned.size == ((36, 48) if orientation > 4 else (48, 36))


def test_link_to_a_parent_folder_is_not_followed(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train/cat/near": 2, "elsewhere": 3})
    (root / "train/cat/near/loop").symlink_to(root / "train/cat")
    (root / "train/cat/linked").symlink_to(root / "elsewhere")
    assert len(list_images(root / "train")) == 5


def test_links_that_lead_to_each_other_are_followed_once(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train/cat": 1, "train/dog": 1})
    (root / "train/cat/dogs").symlink_to(root / "train/dog")
    (root / "train/dog/cats").symlink_to(root / "train/cat")
    listing = list_images(root / "train")
    assert [listing.name(index) for index in range(len(listing))] == [
        *(b"cat/0.jpg", b"cat/dogs/0.jpg"),
        *(b"dog/0.jpg", b"dog/cats/0.jpg"),
    ]


def test_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_folder(tmp_path, {"cat": 1, "dog/more": 1}))
    images = open_folders(Request(path=".", needs=("train",), train=".")).train
    assert [images.read(index).size for index in range(2)] == 2 * [(48, 36)]
    assert [images.file_name(index) for index in range(2)] == ["0.jpg", "0.jpg"]
    assert [list_images(Path()).name(index) for index in range(2)] == [b"cat/0.jpg", b"dog/more/0.jpg"]
