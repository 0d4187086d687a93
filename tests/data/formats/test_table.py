"""Tables of paths and labels, and error messages that name the line."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.formats.table import open_table
from data.sources import Dataset, Request
from tests.data.samples import write_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path, {"images": 6})


def opened(root: Path, train: str, val: str = "images/5.jpg,cat\n", *, multi_label: bool = False) -> Dataset:
    (root / "train.csv").write_text(train)
    (root / "val.csv").write_text(val)
    return open_table(Request(path=str(root), multi_label=multi_label))


def labels(dataset: Dataset) -> list[int]:
    return [dataset.train.label(index) for index in range(len(dataset.train))]


def test_names_and_numbers(root: Path) -> None:
    dataset = opened(root, "images/0.jpg,dog\nimages/1.jpg,cat\n\nimages/2.jpg, dog \n")
    assert (dataset.classes, labels(dataset)) == (["cat", "dog"], [1, 0, 1])
    dataset = opened(root, "images/0.jpg,10\nimages/1.jpg,2\n", "images/5.jpg,0\n")
    assert (dataset.classes, labels(dataset)) == ([str(number) for number in range(11)], [10, 2])


def test_a_list_of_classes(root: Path) -> None:
    (root / "classes.txt").write_text("emu\ncat\ndog\n")
    dataset = opened(root, "images/0.jpg,2\nimages/1.jpg,emu\n")
    assert (dataset.classes, labels(dataset)) == (["emu", "cat", "dog"], [2, 0])


def test_a_list_of_classes_in_other_encodings(root: Path) -> None:
    (root / "classes.txt").write_text("cat\ndog\nübrig\n", encoding="utf-8-sig")  # as written on Windows
    assert opened(root, "images/0.jpg,dog\n").classes == ["cat", "dog", "übrig"]
    (root / "classes.txt").write_text("cat\ndog\nübrig\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"classes\.txt is not UTF-8 text; save it as UTF-8"):
        opened(root, "images/0.jpg,dog\n")


def test_numbers_with_leading_zeros_are_names(root: Path) -> None:
    dataset = opened(root, "images/0.jpg,01\nimages/1.jpg,00\n", "images/5.jpg,01\n")
    assert (dataset.classes, dataset.train.labels.tolist()) == (["00", "01"], [1, 0])


def test_decimal_numbers_are_names(root: Path) -> None:
    dataset = opened(root, "images/0.jpg,1.0\nimages/1.jpg,0.5\n", "images/5.jpg,1.0\n")
    assert (dataset.classes, labels(dataset)) == (["0.5", "1.0"], [1, 0])


def test_several_labels(root: Path) -> None:
    dataset = opened(root, "path,labels\nimages/0.jpg,dog; cat\nimages/1.jpg,\nimages/2.jpg,emu\n", multi_label=True)
    assert dataset.classes == ["cat", "dog", "emu"]
    assert np.array_equal(dataset.train.labels, [[1, 1, 0], [0, 0, 0], [0, 0, 1]])
    assert dataset.held_out.label(0).tolist() == [1, 0, 0]
    assert dataset.counts(dataset.train) == [1, 1, 1]


@pytest.mark.parametrize(
    ("train", "val", "listed", "says"),
    [
        ("images/0.jpg\n", "", "", "ROOT/train.csv, line 1: a path and a label are expected, not ['images/0.jpg']; "),
        ("", "", "", "ROOT/train.csv has no images; the layout is "),
        (
            "images/0.jpg,cat\nimages/9.jpg,cat\nimages/8.jpg,cat\n",
            "images/5.jpg,cat\n",
            "",
            "ROOT/train.csv, line 2: there is no file ROOT/images/9.jpg, nor those of 1 more line; paths are relative",
        ),
        (
            "other/0.jpg,cat\n",
            "images/5.jpg,cat\n",
            "",
            "ROOT/train.csv, line 1: there is no file ROOT/other/0.jpg; paths are relative to the table",
        ),
        (
            "images/0.jpg,0\nimages/1.jpg,3\n",
            "images/5.jpg,0\n",
            "a\nb\nc\n",
            "ROOT/train.csv, line 2: label '3' is out of range; classes.txt has 3 classes, labels are",
        ),
        (
            "images/0.jpg,0\n",
            "images/5.jpg,-1\n",
            "a\n",
            "ROOT/val.csv, line 1: label '-1' is out of range; classes.txt has 1 class",
        ),
        ("images/0.jpg,-1\n", "images/5.jpg,0\n", "", "ROOT/train.csv, line 1: label -1 is out of range; labels count"),
        (
            "images/0.jpg,5000\n",
            "images/5.jpg,0\n",
            "",
            "ROOT/train.csv, line 1: label 5000 is out of range; labels",
        ),
        (
            "images/0.jpg,cat\nimages/1.jpg,\n",
            "images/5.jpg,cat\n",
            "",
            "ROOT/train.csv, line 2: the label is empty; give",
        ),
        (
            "images/0.jpg,0\nimages/1.jpg,10.0\n",
            "images/5.jpg,0\n",
            "",
            "ROOT/train.csv: label 10.0 is a whole number with decimals; write it as 10",
        ),
        ("images,cat\n", "images/5.jpg,cat\n", "", "ROOT/train.csv, line 1: there is no file ROOT/images; paths are"),
        ("i\0m\0a\0,\0c\0", "images/5.jpg,cat\n", "", "table ROOT/train.csv is not UTF-8 text; convert it"),
        (
            "images/0.jpg,cat\n",
            "images/5.jpg,cow\n",
            "",
            "ROOT/val.csv has classes that ROOT/train.csv does not have: cow; ",
        ),
        ("images/0.jpg,0\n", "images/5.jpg,1\n", "", "ROOT/val.csv has classes that ROOT/train.csv does not have: 1; "),
        ("images/0.jpg,0\n", "images/5.jpg,0\n", "a\na\n", "ROOT/classes.txt names a twice; give each class once"),
    ],
)
def test_wrong_tables(root: Path, train: str, val: str, listed: str, says: str) -> None:
    if listed:
        (root / "classes.txt").write_text(listed)
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        opened(root, train, val)
    assert str(caught.value).replace(str(root), "ROOT").startswith(says)


def test_missing_tables(root: Path) -> None:
    with pytest.raises(ValueError, match=r"^no file 'train\.csv' in data path .*: it contains images; the layout is "):
        open_table(Request(path=str(root)))
    with pytest.raises(ValueError, match=r"^table .*all\.csv does not exist; "):
        open_table(Request(path=str(root), train="all.csv", val="all.csv"))
    with pytest.raises(ValueError, match=r"^cannot read folder .*gone: No such file or directory; "):
        open_table(Request(path=str(root / "gone")))


def write_splits(root: Path, *splits: str) -> Request:
    """Write one table, with the split and the class of each image, and return a request for it."""
    rows = [f"images/{number}.jpg,{split},{split}\n" for number, split in enumerate(splits)]
    (root / "all.csv").write_text("path,label,split\n" + "".join(rows))
    return Request(path=str(root / "all.csv"), needs=("train",))


def test_split_column_without_rows(root: Path) -> None:
    request = replace(write_splits(root, "train", "dev"), needs=("train", "val"))
    says = r"all.csv has no images whose split is val or validation or valid or test, only train, dev; the layout is"
    with pytest.raises(ValueError, match=says):
        open_table(request)


def test_one_name_in_the_split_column_is_used(root: Path) -> None:
    """The first of the usual names that occurs, or the one that is given; others are other splits."""
    request = write_splits(root, "train", "test", "training", "validation", "dev")
    for chosen, names in (
        ({}, ["train"]),
        ({"train": "training"}, ["training"]),
        ({"train": "dev"}, ["dev"]),
        ({"train": "train"}, ["train"]),
    ):
        assert open_table(replace(request, **chosen)).classes == names
    held_out = open_table(replace(request, needs=("val",), train="validation")).held_out
    assert [held_out.file_name(index) for index in range(len(held_out))] == ["3.jpg"]
    held_out = open_table(replace(request, needs=("val",), val="test", train="test")).held_out
    assert [held_out.file_name(index) for index in range(len(held_out))] == ["1.jpg"]
    with pytest.raises(ValueError, match=r"whose split is eval, only train, test, training, validation, dev; the"):
        open_table(replace(request, train="eval"))
    (root / "all.csv").write_text("path,label\nimages/0.jpg,cat\n")
    with pytest.raises(ValueError, match=r"all.csv has no column split for DATA\.TRAIN train; add the column, or"):
        open_table(replace(request, train="train"))


def test_number_that_is_both_a_name_and_a_position(root: Path) -> None:
    (root / "classes.txt").write_text("0\n1\n10\n2\n07\n")
    assert labels(opened(root, "images/0.jpg,10\nimages/1.jpg,4\nimages/2.jpg,07\n", "images/5.jpg,1\n")) == [2, 4, 4]
    says = (
        r"train\.csv, line 2: label '2' is the name of a class and the position of another one in classes\.txt, '10'; "
        "rename the classes"
    )
    with pytest.raises(ValueError, match=says):
        opened(root, "images/0.jpg,1\nimages/1.jpg,2\n", "images/5.jpg,0\n")


def test_names_in_two_forms_of_unicode_are_one_class(root: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "K\u00e4se") for form in ("NFC", "NFD"))
    written = f"images/0.jpg,{apart}\nimages/1.jpg,{composed}\nimages/2.jpg,dog\n"
    dataset = opened(root, written, f"images/5.jpg,{apart}\n")
    assert (dataset.classes, labels(dataset), dataset.held_out.label(0)) == ([composed, "dog"], [0, 0, 1], 0)
    (root / "classes.txt").write_text(f"dog\n{apart}\n", encoding="utf-8")
    dataset = opened(root, written, f"images/5.jpg,{composed}\n")
    assert (dataset.classes, labels(dataset), dataset.held_out.label(0)) == (["dog", composed], [1, 1, 0], 1)


def test_missing_file_in_another_form_of_unicode(root: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "K\u00e4se.jpg") for form in ("NFC", "NFD"))
    (root / "images" / "0.jpg").rename(root / "images" / apart)
    says = rf"line 1: there is no file .*/{composed}; {composed} is there in another Unicode normalisation, convert one"
    with pytest.raises(ValueError, match=says):
        opened(root, f"images/{composed},cat\n", "images/5.jpg,cat\n")


@pytest.mark.parametrize("header", ["", "path,label\n"])
def test_one_table_without_a_split_column_is_not_used_for_both_splits(root: Path, header: str) -> None:
    (root / "all.csv").write_text(f"{header}images/0.jpg,cat\nimages/1.jpg,dog\n")
    request = Request(path=str(root / "all.csv"))
    with pytest.raises(ValueError, match=r"\Atable .*all\.csv has no column split, .*; add the column, [^\n]+\Z"):
        open_table(request)
    assert len(open_table(replace(request, needs=("val",))).held_out) == 2
