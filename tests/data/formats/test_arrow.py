"""Data sets of Hugging Face and Parquet files: columns, labels and error messages."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from pyarrow import parquet

from data.formats.arrow import open_parquet, open_saved
from data.images import UnreadableImage
from data.sources import Request
from tests.data.samples import photograph


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def table(tmp_path: Path, labels: list, label: object, *, image: str = "image", column: str = "label") -> Dataset:
    photograph().save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    features = Features({image: Image() if image == "image" else Value("binary"), column: label})
    rows = [{"bytes": content, "path": None} if image == "image" else content for _ in labels]
    return Dataset.from_dict({image: rows, column: labels}, features=features)


def save(tmp_path: Path, train: Dataset, val: Dataset) -> Path:
    DatasetDict({"train": train, "test": val}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_labels_as_text_and_plain_bytes(tmp_path: Path) -> None:
    table(tmp_path, ["dog", "cat"], Value("string"), image="jpg").to_parquet(tmp_path / "train.parquet")
    table(tmp_path, ["dog"], Value("string"), image="jpg").to_parquet(tmp_path / "val.parquet")
    dataset = open_parquet(Request(path=str(tmp_path)))
    assert dataset.classes == ["cat", "dog"]
    assert (dataset.train.label(0), dataset.held_out.label(0)) == (1, 1)
    assert dataset.train.read(0).size == (48, 36)


def test_several_labels(tmp_path: Path) -> None:
    label = List(ClassLabel(names=["a", "b", "c"]))
    root = save(tmp_path, table(tmp_path, [[0, 2], []], label), table(tmp_path, [[1]], label))
    dataset = open_saved(Request(path=str(root), multi_label=True))
    assert np.array_equal(dataset.train.labels, [[1, 0, 1], [0, 0, 0]])
    assert dataset.held_out.label(0).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match=r"column label holds lists of labels; set DATA.MULTI_LABEL True"):
        open_saved(Request(path=str(root)))


def test_splits_without_images_or_labels(tmp_path: Path) -> None:
    numbers, several = Value("int64"), List(Value("int64"))
    root = save(tmp_path, table(tmp_path, [0, 1], numbers), table(tmp_path, [], numbers))
    with pytest.raises(ValueError, match=r"data path .*saved has a split without rows; add images to it, or leave"):
        open_saved(Request(path=str(root)))
    table(tmp_path, [[], []], several).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet: no image has a label in column label; choose another"):
        open_parquet(Request(path=str(tmp_path), needs=("train",), multi_label=True))


def test_absolute_path_of_a_split(tmp_path: Path) -> None:
    table(tmp_path, [0, 1], Value("int64")).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "root").mkdir()
    request = Request(path=str(tmp_path / "root"), needs=("train",), train=str(tmp_path / "*.parquet"))
    assert len(open_parquet(request).train) == 2


def test_columns_by_name(tmp_path: Path) -> None:
    numbers = Value("int64")
    root = save(tmp_path, table(tmp_path, [1, 0], numbers, column="kind"), table(tmp_path, [0], numbers, column="kind"))
    assert open_saved(Request(path=str(root), label_column="kind")).classes == ["0", "1"]
    with pytest.raises(ValueError, match=r"has no column label or .*: its columns are image, kind; .*LABEL_COLUMN"):
        open_saved(Request(path=str(root)))
    with pytest.raises(ValueError, match=r"has no column photo: .*DATA.IMAGE_COLUMN"):
        open_saved(Request(path=str(root), label_column="kind", image_column="photo"))


@pytest.mark.parametrize(
    ("train", "val", "label", "says"),
    [
        ([0, -1], [0], ClassLabel(names=["a", "b"]), "row 1: label -1 is out of range"),
        ([0, -1], [0], Value("int64"), "row 1: label -1 is out of range"),
        ([0, 5000], [0], Value("int64"), "row 1: label 5000 is out of range"),
        ([0, None], [0], Value("int64"), "row 1: label None is out of range"),
        ([0.0, 1.0], [0.0], Value("float32"), "train: label 0.0 is a whole number with decimals; write it as 0"),
        ([0, 1], [3], Value("int64"), "has classes that .* does not have: 2, 3"),
        (["a", "b"], ["B"], Value("string"), r"has classes that .* does not have: B \(train has b\)"),
    ],
)
def test_wrong_labels(tmp_path: Path, train: list, val: list, label: object, says: str) -> None:
    root = save(tmp_path, table(tmp_path, train, label), table(tmp_path, val, label))
    with pytest.raises(ValueError, match=says):
        open_saved(Request(path=str(root)))


def test_names_in_two_forms_of_unicode_are_one_class(tmp_path: Path) -> None:
    train = table(tmp_path, ["\u00e4", "a\u0308", "dog"], Value("string"))
    dataset = open_saved(Request(path=str(save(tmp_path, train, table(tmp_path, ["a\u0308"], Value("string"))))))
    assert dataset.classes == ["dog", "\u00e4"]
    assert [dataset.train.label(index) for index in range(3)] == [1, 1, 0]


def test_number_beyond_the_names(tmp_path: Path) -> None:
    """The library rejects it when writing, but not when reading."""
    labels = table(tmp_path, [0, 1], ClassLabel(names=["a", "b"]))
    labels.info.features["label"] = ClassLabel(names=["a"])
    labels.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet, row 1: label 1 is out of range"):
        open_parquet(Request(path=str(tmp_path), needs=("train",)))


def test_messages_name_the_file_and_the_row_in_it(tmp_path: Path) -> None:
    rows = table(tmp_path, [0, 1, 0, 1, 0], Value("int64"), image="jpg")
    rows = rows.map(lambda row, index: {"jpg": b"no image" if index == 3 else row["jpg"]}, with_indices=True)
    ends = (0, 2, 2, 5)
    for number, (first, stop) in enumerate(pairwise(ends)):
        rows.select(range(first, stop)).to_parquet(tmp_path / f"train-{number:05}-of-00003.parquet")
    request = Request(path=str(tmp_path), needs=("train",))
    images = open_parquet(request).train
    names = [f"{tmp_path}/train-{number:05}-of-00003.parquet, row" for number in range(3)]
    assert [images.get(index).name for index in range(5)] == [
        f"{names[0]} 0",
        f"{names[0]} 1",
        f"{names[2]} 0",
        f"{names[2]} 1",
        f"{names[2]} 2",
    ]
    with pytest.raises(UnreadableImage, match=f"cannot read image '{names[2]} 1': cannot identify"):
        images.read(3)
    labels = table(tmp_path, [0, -1], Value("int64"), image="jpg")
    labels.to_parquet(tmp_path / "train-00001-of-00003.parquet")
    with pytest.raises(ValueError, match=f"^{names[1]} 1: label -1 is out of range"):
        open_parquet(request)
    (tmp_path / "train-00002-of-00003.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"train-00002-of-00003\.parquet cannot be read: "):
        open_parquet(request)


@pytest.mark.parametrize(
    ("values", "holds"), [(["a.jpg", "b.jpg"], "text, such as paths"), ([[1], [2]], r"list<\w+: int64>")]
)
def test_column_without_images(tmp_path: Path, values: list, holds: str) -> None:
    rows = Dataset.from_dict({"image": values, "label": [0, 1]})
    rows.to_parquet(tmp_path / "train.parquet")
    says = rf"^{tmp_path}/train\.parquet: column image holds {holds}, not the bytes of images; choose another by DATA"
    with pytest.raises(ValueError, match=says):
        open_parquet(Request(path=str(tmp_path), needs=("train",)))


def test_missing_shard(tmp_path: Path) -> None:
    table(tmp_path, [0, 1], Value("int64")).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    with pytest.raises(ValueError, match=r"shard 1 missing next to .*train-00000-of-00002\.parquet; copy"):
        open_parquet(Request(path=str(tmp_path), needs=("train",)))


def test_missing_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data path .*nowhere does not exist; DATA_PATH is a folder"):
        open_saved(Request(path=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data path .*empty cannot be opened: .*; DATA_PATH is a folder"):
        open_saved(Request(path=str(tmp_path / "empty")))
    table(tmp_path, [0, 1], Value("int64")).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="is one data set without splits"):
        open_saved(Request(path=str(tmp_path / "one")))
    DatasetDict({"train": table(tmp_path, [0, 1], Value("int64"))}).save_to_disk(tmp_path / "half")
    with pytest.raises(ValueError, match=r"no split 'val' in data path .*half: it contains train"):
        open_saved(Request(path=str(tmp_path / "half")))
    with pytest.raises(
        ValueError, match=r"no file 'train\.parquet' in data path .*half: it contains dataset_dict\.json"
    ):
        open_parquet(Request(path=str(tmp_path / "half")))
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read: "):
        open_parquet(Request(path=str(tmp_path), needs=("train",)))


def test_rows_without_a_list_of_labels_have_none(tmp_path: Path) -> None:
    table(tmp_path, [None, [1, 0], []], List(Value("int64"))).to_parquet(tmp_path / "train.parquet")
    request = Request(path=str(tmp_path), needs=("train",), multi_label=True)
    assert np.array_equal(open_parquet(request).train.labels, [[0, 0], [1, 1], [0, 0]])
    with pytest.raises(ValueError, match=r"column label holds lists of labels; set DATA.MULTI_LABEL True"):
        open_parquet(replace(request, multi_label=False))


@pytest.mark.parametrize("image", [{"bytes": None, "path": None}, {"bytes": None, "path": ""}, None])
def test_row_without_an_image(tmp_path: Path, image: dict | None) -> None:
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
    rows = pa.Table.from_pylist([{"image": image, "label": 0}, {"image": None, "label": 0}], schema)
    parquet.write_table(rows, tmp_path / "train.parquet")
    images = open_parquet(Request(path=str(tmp_path), needs=("train",))).train
    with pytest.raises(UnreadableImage, match=r"cannot read image '.*train\.parquet, row 0': the row has no image"):
        images.get(0)
