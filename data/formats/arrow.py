"""Data sets of Hugging Face saved on disk, and Parquet files, through the library `datasets`.

Both are memory-mapped as Arrow files: rows can be read in any order and are shared by all processes of a machine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from data.formats.series import check_series, find_files
from data.images import StoredImage, UnreadableImage, read_file
from data.listing import cache_folder
from data.sources import (
    SPLITS,
    Dataset,
    ImageSource,
    Request,
    check_no_decimals,
    compose,
    join_classes,
    relabel,
    to_matrix,
)
from data.wording import shorten

SAVED_LAYOUT = "DATA_PATH is a folder that save_to_disk of a DatasetDict with train and validation wrote"
PARQUET_LAYOUT = (
    "the layout is DATA_PATH/train.parquet and DATA_PATH/val.parquet, or DATA_PATH/train-*.parquet, "
    "DATA_PATH/data/train-*.parquet, with a column of images (their bytes) and one of labels"
)
_IMAGES = ("image", "img", "jpg", "png")
_LABELS = ("label", "labels", "fine_label", "class", "cls", "target")


@dataclass(frozen=True)
class Origin:
    """The files, or the folder, of a table, for messages.

    Attributes:
        paths: where its rows are, in order.
        ends: number of rows up to the end of each path.
    """

    paths: Sequence[Path]
    ends: Sequence[int]

    def __str__(self) -> str:
        return f"{self.paths[0]} to {self.paths[-1].name}" if len(self.paths) > 1 else str(self.paths[0])

    def row(self, index: int) -> str:
        """Return file and row in it, from 0 on, of a row of the table."""
        place = bisect_right(self.ends, index)
        return f"{self.paths[place]}, row {index - (self.ends[place - 1] if place else 0)}"


def open_saved(request: Request) -> Dataset:
    """Open a data set saved to disk by `datasets`.

    Raises:
        ValueError: the folder is something else, a split or column is missing, or classes differ.
    """
    datasets = _library()
    root = request.existing_root(SAVED_LAYOUT)
    try:
        saved = datasets.load_from_disk(str(root))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"data path {root} cannot be opened: {' '.join(str(error).split())}; {SAVED_LAYOUT}") from None
    except IndexError:  # raised by `datasets`, without a message
        raise ValueError(f"data path {root} has a split without rows; add images to it, or leave it out") from None
    if not isinstance(saved, datasets.DatasetDict):
        raise ValueError(f"data path {root} is one data set without splits; {SAVED_LAYOUT}")
    tables, where = {}, {}
    for split in ("train", "val"):
        found = request.choose_split(split, saved)
        if found:
            tables[split], where[split] = saved[found], Origin([root / found], [len(saved[found])])
        elif split in request.needs:
            wanted = request.split_names(split)[0]
            raise ValueError(
                f"no split {wanted!r} in data path {root}: it contains {shorten(list(saved))}; {SAVED_LAYOUT}"
            )
    return _join(tables, request, where, SAVED_LAYOUT)


def open_parquet(request: Request) -> Dataset:
    """Open Parquet files; `datasets` converts them once to Arrow files in the user's cache.

    Raises:
        ValueError: files are missing or damaged, a column is missing, or classes differ.
    """
    datasets = _library()
    root = request.existing_root(PARQUET_LAYOUT)
    tables, where = {}, {}
    for split in ("train", "val"):
        files = _parquet_files(request, split, root)
        if not files and split in request.needs:
            there = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
            raise ValueError(
                f"no file '{split}.parquet' in data path {root}: it contains {shorten(there) or 'nothing'}; "
                f"{PARQUET_LAYOUT}"
            )
        if files:
            check_series(files)
            where[split] = _rows_of(files)
            try:
                tables[split] = datasets.Dataset.from_parquet(
                    [str(path) for path in files], cache_dir=str(cache_folder() / "parquet")
                )
            except Exception as error:  # pyarrow and datasets wrap each other's exceptions
                cause = error.__cause__ or error
                raise ValueError(f"{where[split]} cannot be read: {' '.join(str(cause).split())}") from None
    return _join(tables, request, where, PARQUET_LAYOUT)


def _rows_of(files: Sequence[Path]) -> Origin:
    """Return Parquet files with the numbers of their rows.

    Raises:
        ValueError: one cannot be read.
    """
    import pyarrow as pa
    from pyarrow import parquet

    rows = []
    for file in files:
        try:
            rows.append(parquet.read_metadata(file).num_rows)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    return Origin(files, list(accumulate(rows)))


class ArrowSource(ImageSource):
    """Images of a table of `datasets`.

    Args:
        table: the table, whose images are not decoded.
        column: the column of images.
        origin: where its rows are from.
        labels: classes of the rows.
        exif: whether to apply the EXIF orientation.
    """

    def __init__(self, table: Any, column: str, origin: Origin, labels: np.ndarray, *, exif: bool = False) -> None:
        self._table = table.select_columns(column).with_format("arrow")
        self._origin = origin
        self._exif = exif
        self.labels = labels

    def get(self, index: int) -> StoredImage:
        """Return the bytes of an image.

        Raises:
            UnreadableImage: the row has no image, or its file cannot be read.
        """
        value = self._table[index].column(0)[0].as_py()
        name = self._origin.row(index)
        if isinstance(value, dict):
            path, value = value["path"], value["bytes"]
            value = read_file(path) if value is None and path else value
        if value is None:
            raise UnreadableImage(f"cannot read image {name!r}: the row has no image", name)
        return StoredImage(value, name, exif=self._exif)


def _library() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise ValueError("this DATA.DATASET needs the package datasets: pip install datasets") from None
    datasets.disable_progress_bars()
    return datasets


def _parquet_files(request: Request, split: str, root: Path) -> list[Path]:
    given = getattr(request, split)
    patterns = [given] if given else []
    for name in () if given else SPLITS[split]:
        patterns += [f"{name}.parquet", f"{name}-*.parquet", f"{name}/*.parquet", f"data/{name}-*.parquet"]
    return next((files for pattern in patterns if (files := find_files(root, pattern))), [])


def _join(tables: dict[str, Any], request: Request, where: dict[str, Origin], layout: str) -> Dataset:
    """Return the data set of the tables of its splits."""
    labels, names = {}, {}
    for split, table in tables.items():
        if split == "train" or split in request.needs:
            labels[split], names[split] = _labels(table, request, where[split])
    check_no_decimals(names, where)
    classes, lookups = join_classes(names, where, layout)
    sources = {}
    for split in request.needs:
        column = _column(tables[split], request.image_column, _IMAGES, "DATA.IMAGE_COLUMN", where[split])
        _check_images(tables[split], column, where[split])
        known = labels[split]
        if request.multi_label:
            known = to_matrix([lookups[split][row] for row in known], len(classes))
        else:
            known = relabel(known, lookups[split])
        table = _undecoded(tables[split], column)
        sources[split] = ArrowSource(table, column, where[split], known, exif=request.exif)
    return Dataset(classes=classes, train=sources.get("train"), held_out=sources.get("val"))


def _undecoded(table: Any, column: str) -> Any:
    """Return the table with undecoded images; columns of plain bytes are unchanged."""
    from datasets import Image

    return table.cast_column(column, Image(decode=False)) if isinstance(table.features[column], Image) else table


def _check_images(table: Any, column: str, where: Origin) -> None:
    """Check that a column holds the bytes of images.

    Raises:
        ValueError: it holds something else, such as paths.
    """
    import pyarrow as pa

    kind = table.data.schema.field(column).type
    is_image = pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}
    if not (is_image or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        holds = "text, such as paths" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else f"{kind}"
        raise ValueError(
            f"{where}: column {column} holds {holds}, not the bytes of images; choose another by DATA.IMAGE_COLUMN, or "
            "list the paths of files in a table for DATA.DATASET csv"
        )


def _column(table: Any, given: str, usual: Sequence[str], option: str, where: Origin) -> str:
    names = [given] if given else usual
    found = next((name for name in names if name in table.column_names), None)
    if found is None:
        raise ValueError(
            f"{where} has no column {' or '.join(names)}: its columns are {shorten(table.column_names)}; name the one "
            f"to use by --opts {option}"
        )
    return found


def _labels(table: Any, request: Request, where: Origin) -> tuple[Any, list[str]]:
    """Return the labels of all rows, as lists for multi-label data, and the class names."""
    column = _column(table, request.label_column, _LABELS, "DATA.LABEL_COLUMN", where)
    feature = table.features[column]
    stored = table.with_format("arrow")[:].column(column)
    values, several = stored.to_pylist(), hasattr(stored.type, "value_field")  # which all types of lists have
    if several != request.multi_label:
        raise ValueError(
            f"{where}: column {column} holds {'lists of labels' if several else 'one label a row'}; set "
            f"DATA.MULTI_LABEL {several}, or choose another column by DATA.LABEL_COLUMN"
        )
    if several:
        values = [[] if row is None else row for row in values]
    named = getattr(feature, "feature", feature)
    flat = [value for row in values for value in row] if several else values
    classes = list(named.names) if getattr(named, "names", None) else None
    wrong = {value for value in set(flat) if value is None or (classes and not 0 <= value < len(classes))}
    if wrong:
        row = next(i for i, row in enumerate(values) if wrong.intersection(row if several else [row]))
        raise ValueError(f"{where.row(row)}: label {values[row]} is out of range; images for training need labels")
    if classes is None and not flat:
        raise ValueError(f"{where}: no image has a label in column {column}; choose another by DATA.LABEL_COLUMN")
    if classes is None and all(isinstance(value, int) for value in flat):
        if min(flat) < 0 or max(flat) >= max(1000, len(values)):
            wrong = min(flat) if min(flat) < 0 else max(flat)
            row = next(i for i, row in enumerate(values) if wrong in (row if several else [row]))
            raise ValueError(f"{where.row(row)}: label {wrong} is out of range; labels count from 0")
        classes = [str(number) for number in range(max(flat) + 1)]
    elif classes is None:
        names = {value: compose(str(value)) for value in set(flat)}
        classes = sorted(set(names.values()))
        labels = {name: label for label, name in enumerate(classes)}
        place = {value: labels[name] for value, name in names.items()}
        values = [[place[value] for value in row] for row in values] if several else [place[value] for value in values]
    return (values if several else np.array(values, dtype=np.int32)), classes
