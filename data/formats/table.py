"""Tables of paths and labels: root/train.csv and root/val.csv, or one table with a column for the split."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.formats.folders import FileSource
from data.formats.labels import ClassList
from data.listing import Listing
from data.sources import (
    Dataset,
    Request,
    check_no_decimals,
    classes_of,
    compose,
    join_classes,
    other_form,
    read_class_list,
    split_labels,
    to_matrix,
)
from data.wording import counted, shorten

LAYOUT = (
    "the layout is DATA_PATH/train.csv and DATA_PATH/val.csv (or .tsv) with the path of an image and its label on each "
    "line, paths relative to the table; classes.txt beside them may name the classes"
)

_PATHS = ("path", "image", "file", "filename", "file_name", "image_path", "filepath")
_LABELS = ("label", "labels", "class", "target", "classes")
_ENDINGS = (".csv", ".tsv")


@dataclass(frozen=True)
class Row:
    """One image of a table: its line number, path and labels as written."""

    line: int
    path: str
    labels: tuple[str, ...]


def open_table(request: Request) -> Dataset:
    """Open a data set of tables; every file in them must exist.

    Raises:
        ValueError: a table is missing or malformed, one for both splits has no column `split`, a file does not exist,
            or a label is out of range.
    """
    root = request.root(LAYOUT)
    tables = dict.fromkeys(request.needs, root) if root.is_file() else _tables(request, root)
    # In a folder, the options of the splits name tables; in one table, they name values of its column.
    inside = request if root.is_file() else replace(request, train="", val="")
    rows = {split: _read_split(path, split, inside) for split, path in tables.items()}
    if root.is_file() and len(tables) > 1 and _split_names(root) is None:
        raise ValueError(
            f"table {root} has no column split, so that the same images would be used for training and validation; "
            "add the column, with train or val on each line, or give a folder with train.csv and val.csv"
        )
    for split, path in tables.items():
        _check_files(path, rows[split])
    listed = ClassList(read_class_list(next(iter(tables.values())).parent))
    if listed.names:
        classes = listed.names
        named = {split: [_listed_label(tables[split], row, listed) for row in rows[split]] for split in rows}
    else:
        names = {split: _names(path, rows[split]) for split, path in tables.items()}
        if "train" not in names and (train := root if root.is_file() else _table(request, "train", root)):
            names["train"] = _names(train, _read_split(train, "train", inside))
        where = {"train": "train"} | tables
        check_no_decimals(names, where)
        classes, _ = join_classes(names, where, LAYOUT)
        place = {name: label for label, name in enumerate(classes)}
        named = {split: [tuple(place[name] for name in row.labels) for row in rows[split]] for split in rows}
    sources = {
        split: _source(
            tables[split], rows[split], named[split], len(classes) if request.multi_label else 0, request.exif
        )
        for split in rows
    }
    return Dataset(classes=classes, train=sources.get("train"), held_out=sources.get("val"))


def _read_split(path: Path, split: str, request: Request) -> list[Row]:
    """Return the rows of a table that belong to a split: all, if it has no column of splits.

    Raises:
        ValueError: the table cannot be read, or has no rows for the split.
    """
    found, given = _split_names(path), getattr(request, split)
    if found is None and given:
        raise ValueError(f"{path} has no column split for DATA.{split.upper()} {given}; add the column, or remove that")
    name = request.choose_split(split, found) if found else None
    if found and name is None:
        wanted = " or ".join(request.split_names(split))
        raise ValueError(f"{path} has no images whose split is {wanted}, only {shorten(found)}; {LAYOUT}")
    rows = read_rows(path, name, multi_label=request.multi_label)
    if not rows:
        raise ValueError(f"{path} has no images; {LAYOUT}")
    return rows


def read_rows(path: Path, split: str | None, *, multi_label: bool) -> list[Row]:
    """Return the rows of a table, or those with a value in its column `split`.

    A header line is recognised by a column of paths (`path`, `image`, `file`, ...); columns may then be in any order,
    with additional ones. Without a header there are two columns.

    Raises:
        ValueError: the table cannot be read.
    """
    rows = []
    columns = (0, 1, None)
    for line, cells in _lines(path):
        if line == 1 and (titles := _columns(cells)):
            columns = titles
            continue
        if len(cells) <= max(index for index in columns if index is not None) or (columns[2] is None and not cells[0]):
            raise ValueError(f"{path}, line {line}: a path and a label are expected, not {cells!r}; {LAYOUT}")
        if split is None or cells[columns[2]].strip() == split:
            text = compose(cells[columns[1]].strip())
            if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):  # bytes that are not UTF-8
                raise ValueError(f"{path}, line {line}: label {text!r} is not UTF-8 text; save the table as UTF-8")
            labels = split_labels(text) if multi_label else (text,)
            rows.append(Row(line, cells[columns[0]].strip(), labels))
    return rows


def _tables(request: Request, root: Path) -> dict[str, Path]:
    found = {split: _table(request, split, root) for split in request.needs}
    for split, path in found.items():
        if path is None:
            held = shorten(sorted(entry.name for entry in root.iterdir())) if root.is_dir() else "nothing"
            raise ValueError(f"no file '{split}.csv' in data path {root}: it contains {held}; {LAYOUT}")
        if not path.is_file():
            raise ValueError(f"table {path} does not exist; {LAYOUT}")
    return found


def _table(request: Request, split: str, root: Path) -> Path | None:
    try:
        there = [entry.name for entry in root.iterdir()]
    except OSError as error:
        raise ValueError(f"cannot read folder {error.filename}: {error.strerror}; {LAYOUT}") from None
    return next(filter(None, (request.find_split(split, root, there, ending) for ending in _ENDINGS)), None)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            for line, cells in enumerate(csv.reader(_text(path, file), delimiter=delimiter), 1):
                if cells:
                    yield line, cells
    except (OSError, csv.Error) as error:
        raise ValueError(f"table {path} cannot be read: {error}; {LAYOUT}") from None


def _text(path: Path, file: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a table; another encoding shows by its zeros, of which only some versions of csv complain."""
    for text in file:
        if "\0" in text:
            raise ValueError(f"table {path} is not UTF-8 text; convert it")
        yield text


def _split_names(path: Path) -> list[str] | None:
    """Return the values of the column `split` in the order of the table; None if it has no such column."""
    lines = _lines(path)
    line, titles = next(lines, (0, []))
    columns = _columns(titles) if line == 1 else None
    if columns is None or columns[2] is None:
        return None
    return list(dict.fromkeys(cells[columns[2]].strip() for _, cells in lines if len(cells) > columns[2]))


def _columns(cells: Sequence[str]) -> tuple[int, int, int | None] | None:
    """Return the columns of path, label and split in a header line, or None if it is not a header."""
    titles = [cell.strip().casefold() for cell in cells]
    path = next((titles.index(name) for name in _PATHS if name in titles), None)
    label = next((titles.index(name) for name in _LABELS if name in titles), None)
    if path is None or label is None:
        return None
    return path, label, titles.index("split") if "split" in titles else None


def _names(path: Path, rows: Sequence[Row]) -> list[str]:
    """Return the classes of a table without a list of them."""

    def locate(label: str) -> str:
        return f"{path}, line {next(row.line for row in rows if label in row.labels)}"

    return classes_of((name for row in rows for name in row.labels), max(1000, len(rows)), locate)


def _listed_label(path: Path, row: Row, listed: ClassList) -> tuple[int, ...]:
    """Return the labels of a row as indices into the list of classes."""
    try:
        return tuple(map(listed.label, row.labels))
    except ValueError as error:
        raise ValueError(f"{path}, line {row.line}: {error}") from None


def _check_files(path: Path, rows: Sequence[Row]) -> None:
    """Check that the files exist, folder by folder, which is faster than file by file."""
    known: dict[str, set[str]] = {}
    missing = []
    for row in rows:
        folder, name = os.path.split(row.path)
        if folder not in known:
            try:
                entries = os.scandir(path.parent / folder)
                known[folder] = {entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)}
            except OSError:
                known[folder] = set()
        if name not in known[folder]:
            missing.append(row)
    if missing:
        first = path.parent / missing[0].path
        raise ValueError(
            f"{path}, line {missing[0].line}: there is no file {first}"
            + (f", nor those of {counted(len(missing) - 1, 'more line')}" if len(missing) > 1 else "")
            + (other_form(first) or "; paths are relative to the table")
        )


def _source(path: Path, rows: Sequence[Row], labels: Sequence[tuple[int, ...]], width: int, exif: bool) -> FileSource:
    listing = Listing.of(((os.fsencode(row.path),) for row in rows), {}, {})
    if width:
        return FileSource(path.parent, listing, to_matrix(labels, width), exif=exif)
    return FileSource(path.parent, listing, np.array([label for (label,) in labels], dtype=np.int32), exif=exif)
