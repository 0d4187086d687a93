"""Data sets, independent of their format."""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data.images import StoredImage
from data.wording import counted, shorten, with_similar

if TYPE_CHECKING:
    from data.formats.stream import ImageStream

# Usual names of the splits of a data set; the first that exists is used.
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}

# Separates the labels of a multi-label image.
SEPARATOR = ";"


class ImageSource(ABC):
    """Stored, labelled images.

    Attributes:
        labels: class of every image, `[n]`, integers; `[n, classes]` of 0 and 1 for multi-label data.
        warnings: warnings for the log.
    """

    labels: np.ndarray
    warnings: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int | np.ndarray:
        """Return the class of an image, or `[classes]` of 0 and 1."""
        label = self.labels[index]
        return label if self.labels.ndim == 2 else int(label)

    def read(self, index: int) -> Image.Image:
        """Return an image as RGB.

        Raises:
            UnreadableImage: it cannot be read or decoded.
        """
        return self.get(index).decode()

    def file_name(self, index: int) -> str:  # noqa: ARG002
        """Return the file name of an image, without opening it; empty if it has none."""
        return ""

    def relabelled(self, lookup: np.ndarray) -> ImageSource:
        """Return the same images with `lookup[label]` as the label of each."""
        return self.with_labels(self.labels[:, np.argsort(lookup)] if self.labels.ndim == 2 else lookup[self.labels])

    def with_labels(self, labels: np.ndarray) -> ImageSource:
        """Return the same images with other labels."""
        other = copy(self)
        other.labels = labels
        return other

    @abstractmethod
    def get(self, index: int) -> StoredImage:
        """Return a stored image.

        Raises:
            UnreadableImage: it cannot be read.
        """


class ArraySource(ImageSource):
    """Images in memory.

    Args:
        images: pixels, `[n, height, width]` or `[n, height, width, 3]`, uint8.
        labels: classes, `[n]`.
        name: name of an image in messages, followed by its index.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, name: str) -> None:
        self._images = images
        self._name = name
        self.labels = labels

    def get(self, index: int) -> StoredImage:
        """Return the pixels of an image."""
        return StoredImage(self._images[index], f"{self._name} {index}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The data options of a run, passed to a format.

    Attributes:
        path: location of the data set; empty if none was given.
        path_by_variable: the location given by the environment; used by formats that need one if `path` is empty.
        needs: the splits to open, of "train" and "val".
        train: name or path of the training split; empty for the usual names.
        val: likewise for the held-out split.
        exif: whether to apply the EXIF orientation.
        multi_label: whether an image may have several labels, or none.
        image_column: for tables with named columns; empty for the usual names.
        label_column: likewise.
        download: whether a format may download its data set.
        scenes: number of training scenes, for data sets that are drawn; 0 for others.
        stream_images: number of images of "train" and "val" in a stream; 0 if unknown.
    """

    path: str = ""
    path_by_variable: str = ""
    needs: Sequence[str] = ("train", "val")
    train: str = ""
    val: str = ""
    exif: bool = False
    multi_label: bool = False
    image_column: str = ""
    label_column: str = ""
    download: bool = False
    scenes: int = 0
    stream_images: Mapping[str, int] = field(default_factory=dict)

    def refuse_split_names(self, data: str) -> None:
        """Raise a ValueError if a split is named; ``data`` has two fixed ones."""
        if self.train or self.val:
            raise ValueError(f"{data} has fixed splits; remove DATA.TRAIN and DATA.VAL")

    def root(self, layout: str) -> Path:
        """Return the folder of the data set.

        Args:
            layout: expected layout, for the message.

        Raises:
            ValueError: no path was given, or it names an unknown user.
        """
        path = self.path or self.path_by_variable
        if not path:
            raise ValueError(f"no data set given; pass --data-path FOLDER or set the variable DATA_PATH; {layout}")
        try:
            return Path(path).expanduser()
        except RuntimeError:
            raise ValueError(f"data path {path}: there is no such user; give the full path") from None

    def existing_root(self, layout: str) -> Path:
        """Return the folder or file of the data set, as `root`.

        Raises:
            ValueError: no path was given, or it does not exist or cannot be read.
        """
        root = self.root(layout)
        try:
            root.stat()
        except FileNotFoundError:
            raise ValueError(f"data path {root} does not exist; {layout}") from None
        except OSError as error:
            raise ValueError(f"data path {root} cannot be read: {error.strerror}; {layout}") from None
        return root

    def split_names(self, split: str) -> Sequence[str]:
        """Return the names that a split may have: the given one, or the usual ones."""
        given = getattr(self, split)
        return (given,) if given else SPLITS[split]

    def choose_split(self, split: str, names: Container[str]) -> str | None:
        """Return the name of a split among those of a data set; None if it is not one of them."""
        return next((name for name in self.split_names(split) if name in names), None)

    def find_split(self, split: str, root: Path, names: Sequence[str], extension: str = "") -> Path | None:
        """Return the path of a split; None if it has no option and no usual name.

        Args:
            split: "train" or "val".
            root: the folder of the data set.
            names: names of its contents.
            extension: extension of the usual names.
        """
        given = getattr(self, split)
        if given:
            return root / Path(given).expanduser()
        found = next((name + extension for name in SPLITS[split] if name + extension in names), None)
        return root / found if found else None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set with its classes.

    Attributes:
        classes: names by label.
        train: training images; None if not requested.
        held_out: held-out images; None if not requested. The labels of a stream are unknown.
        format_warnings: warnings from the format.
    """

    classes: list[str]
    train: ImageSource | ImageStream | None = None
    held_out: ImageSource | ImageStream | None = None
    format_warnings: Sequence[str] = ()

    def counts(self, source: ImageSource) -> list[int]:
        """Return the number of images of each class in a split."""
        if source.labels.ndim == 2:
            return source.labels.sum(0, dtype=np.int64).tolist()
        return np.bincount(source.labels, minlength=len(self.classes)).tolist()

    def warnings(self) -> list[str]:
        """Return warnings about the data set, one line each."""
        found = list(self.format_warnings)
        if len(self.classes) == 1 and not self.has_several_labels():
            found.append(f"the data set has only one class, {self.classes[0]}")
        folded: dict[str, str] = {}
        for name in self.classes:
            if (other := folded.setdefault(name.casefold(), name)) != name:
                found.append(f"classes {other} and {name} differ only in case")
        if self.is_numbered() and list(self.classes) != sorted(self.classes, key=int):
            found.append(
                f"the classes are numbers, but labels follow their order as text ({', '.join(self.classes[:3])}, ...), "
                f"as in torchvision; DATA.CLASS_ORDER number sorts them as numbers"
            )
        for source, kind in ((self.train, "training"), (self.held_out, "validation")):
            counts = self.counts(source) if isinstance(source, ImageSource) else []
            absent = [name for name, count in zip(self.classes, counts, strict=False) if not count]
            if absent:
                found.append(
                    f"{len(absent)} of {counted(len(self.classes), 'class', 'classes')} without {kind} images: "
                    f"{shorten(absent, 3)}"
                )
        return found

    def has_several_labels(self) -> bool:
        """Return whether an image may have several labels, or none; False for streams."""
        return any(isinstance(one, ImageSource) and one.labels.ndim == 2 for one in (self.train, self.held_out))

    def is_numbered(self) -> bool:
        """Return whether every class is a whole number."""
        return all(name.isdecimal() for name in self.classes)

    def by_number(self) -> Dataset:
        """Return the data set with its numbered classes in the order of the numbers.

        Raises:
            ValueError: they are not all numbers.
        """
        if not self.is_numbered():
            raise ValueError(
                f"the classes are not all numbers, such as {next(n for n in self.classes if not n.isdecimal())}; "
                f"leave DATA.CLASS_ORDER at name"
            )
        order = sorted(range(len(self.classes)), key=lambda label: int(self.classes[label]))
        place = np.empty(len(order), dtype=np.int32)
        place[order] = np.arange(len(order))
        sources = {
            name: source and source.relabelled(place)
            for name, source in (("train", self.train), ("held_out", self.held_out))
        }
        return replace(self, classes=[self.classes[label] for label in order], **sources)

    def check_splits(self) -> None:
        """Check that the splits are not swapped.

        Raises:
            ValueError: there are more held-out than training images.
        """
        if self.train is not None and self.held_out is not None and len(self.held_out) > len(self.train):
            raise ValueError(
                f"there are {len(self.held_out)} validation images and only {len(self.train)} for training: the splits "
                f"seem swapped; exchange them, or set DATA.ALLOW_LARGER_VAL True if this is intended"
            )


def classes_of(labels: Iterable[str], limit: int, locate: Callable[[str], str]) -> list[str]:
    """Return the classes of a data set: the sorted label names, or the whole numbers from 0 to the largest label.

    Args:
        labels: the text of each label.
        limit: maximum number of classes, if the labels are numbers.
        locate: returns where a label occurs, for messages.

    Raises:
        ValueError: a label is empty, or a number that is negative or too large.
    """
    names = set(labels)
    if "" in names:
        raise ValueError(f"{locate('')}: the label is empty; give the image a class, or leave it out")
    if not names or not all(re.fullmatch("-?(0|[1-9][0-9]*)", name) for name in names):
        return sorted(names)
    numbers = sorted(map(int, names))
    wrong = numbers[0] if numbers[0] < 0 else numbers[-1]
    if not 0 <= wrong < limit:
        raise ValueError(
            f"{locate(str(wrong))}: label {wrong} is out of range; labels count from 0; for other labels, list the "
            "classes in classes.txt"
        )
    return [str(number) for number in range(numbers[-1] + 1)]


def check_no_decimals(names: Mapping[str, Sequence[str]], where: Mapping[str, object]) -> None:
    """Check that classes are not whole numbers with decimals, as pandas writes integers of a column with gaps.

    They would be sorted as text: 0.0, 1.0, 10.0, 2.0.

    Args:
        names: the classes of "train" and "val"; those of "train" are checked if known.
        where: paths of the splits, for messages.

    Raises:
        ValueError: all classes are whole numbers, and some have decimals.
    """
    split = "train" if "train" in names else "val"
    decimals = [name for name in names[split] if "." in name]
    if decimals and all(re.fullmatch(r"-?[0-9]+(\.0*)?", name) for name in names[split]):
        whole = decimals[0].partition(".")[0]
        raise ValueError(f"{where[split]}: label {decimals[0]} is a whole number with decimals; write it as {whole}")


def join_classes(
    names: Mapping[str, Sequence[str]], where: Mapping[str, object], layout: str
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Merge the class names of the splits; return the classes and, for each split, the label of each of its names.

    Names that differ only in Unicode normalisation are equal, as file systems and archives change it.

    Args:
        names: the classes of "train" and "val"; those of "train" are used if known.
        where: paths of the splits, for messages.
        layout: expected layout, for messages.

    Raises:
        ValueError: "val" has classes that "train" does not have, or two names of a split are equal.
    """
    composed = {split: [compose(name) for name in known] for split, known in names.items()}
    for split, known in composed.items():
        if len(set(known)) < len(known):
            twice = sorted({name for name in known if known.count(name) > 1})
            raise ValueError(
                f"{where[split]} has two classes each for {shorten(twice)}, whose names differ only in Unicode "
                f"normalisation; merge them"
            )
    classes = composed["train"] if "train" in composed else composed["val"]
    labels = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in composed.get("val", ()) if name not in labels]
    if unknown:
        raise ValueError(
            f"{where['val']} has classes that {where['train']} does not have: "
            f"{shorten(with_similar(unknown, classes, 'train has'))}; {layout}"
        )
    return classes, {
        split: np.array([labels[name] for name in known], dtype=np.int32) for split, known in composed.items()
    }


def relabel(labels: np.ndarray, lookup: np.ndarray) -> np.ndarray:
    """Return `lookup[labels]`; the original array, which may be memory-mapped, if nothing changes."""
    return labels if np.array_equal(lookup, np.arange(len(lookup))) else lookup[labels]


def split_labels(text: str) -> tuple[str, ...]:
    """Return the labels of an image separated by semicolons; there may be none."""
    return tuple(filter(None, map(str.strip, text.split(SEPARATOR))))


def to_matrix(labels: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Return `[n, width]` of 0 and 1 for multi-label images."""
    matrix = np.zeros((len(labels), width), dtype=np.uint8)
    for row, places in zip(matrix, labels, strict=True):
        row[list(places)] = 1
    return matrix


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file without surrounding spaces; those that are empty are left out.

    Raises:
        ValueError: it is not UTF-8 text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors of Windows write a byte order mark
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    return [line.strip() for line in lines if line.strip()]


def compose(name: str) -> str:
    """Return a name in the Unicode normalisation NFC, in which names are compared; macOS writes another one."""
    return unicodedata.normalize("NFC", name)


def other_form(path: Path) -> str:
    """Return a hint if a missing file exists under the same name in another Unicode normalisation; else ""."""
    with suppress(OSError):  # a name that is too long, or a folder that cannot be read: there is no hint
        while not path.parent.is_dir() and path != path.parent:
            path = path.parent
        others = path.parent.iterdir() if path.parent.is_dir() and not path.exists() else ()
        if any(compose(other.name) == compose(path.name) for other in others):
            return f"; {path.name} is there in another Unicode normalisation, convert one of the names"
    return ""


def read_class_list(folder: Path) -> list[str]:
    """Return the classes in `classes.txt` of a folder, one per line; empty if there is no such file.

    Raises:
        ValueError: a class is listed twice, or the file is not UTF-8 text.
    """
    path = folder / "classes.txt"
    if not path.is_file():
        return []
    classes = [compose(name) for name in read_lines(path)]
    twice = sorted({name for name in classes if classes.count(name) > 1}) if len(set(classes)) < len(classes) else []
    if twice:
        raise ValueError(f"{path} names {shorten(twice)} twice; give each class once, in the order of the labels")
    return classes
