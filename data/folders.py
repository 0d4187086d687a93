"""Images sorted into folders: root/train/<class>/* and root/val/<class>/*."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image

from data.images import read_image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
LAYOUT = "the layout is DATA_PATH/train/<class>/*.jpg and DATA_PATH/val/<class>/*.jpg"


class ImageFolder:
    """The images below `folder`, one folder for each class; a label is the place of the folder's name in `classes`.

    Paths are kept in one block of memory and not as Python strings: workers share it with the process they were forked
    from, whereas every string they looked at would be copied.

    Raises:
        ValueError: for a folder that cannot be read.
    """

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        labels = {name: label for label, name in enumerate(classes)}
        listed = [(path, labels[name]) for name in class_folders(folder) for path in _images(folder / name)]
        self._paths = np.array([os.fsencode(path) for path, _ in listed], dtype=np.bytes_)
        self._labels = np.array([label for _, label in listed], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def label(self, index: int) -> int:
        """Return the class of an image."""
        return int(self._labels[index])

    def read(self, index: int) -> Image.Image:
        """Return an image as RGB; raises `UnreadableImage`."""
        return read_image(os.fsdecode(self._paths[index]))


def find_classes(root: Path, splits: Sequence[str]) -> list[str]:
    """Check the layout of a data set and return the names of its classes, sorted.

    Names are looked at, files are not opened.

    Args:
        root: holds the folders of the splits.
        splits: those that are needed, of "train" and "val". Where "train" is there, its folders are the classes, needed
            or not, so that labels mean the same in training and evaluation.

    Raises:
        ValueError: for a folder that is missing, empty or unreadable, a class without images, or a class of "val" that
            "train" does not have.
    """
    found = sorted(entry.name for entry in _entries(root) if entry.is_dir())
    for split in splits:
        if split not in found:
            there = f"it holds {_shorten(found)}" if found else "it holds no folders"
            raise ValueError(f"no folder {split!r} in data path {root}: {there}; {LAYOUT}")
        names = class_folders(root / split)
        if not names:
            raise ValueError(f"no class folders in {root / split}; {LAYOUT}")
        empty = [name for name in names if next(_images(root / split / name), None) is None]
        if empty:
            raise ValueError(
                f"no images in {_shorten([str(root / split / name) for name in empty])}; add some or remove the folder "
                f"(images end in {' '.join(EXTENSIONS)})"
            )
    classes = class_folders(root / "train") if "train" in found else []
    if classes and "val" in splits:
        unknown = [name for name in class_folders(root / "val") if name not in set(classes)]
        if unknown:
            raise ValueError(f"{root / 'val'} has classes that {root / 'train'} has not: {_shorten(unknown)}; {LAYOUT}")
    return classes or class_folders(root / splits[0])


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in `folder`, but for hidden ones."""
    entries = [entry for entry in _entries(folder) if not entry.name.startswith(".")]
    dangling = [entry.path for entry in entries if entry.is_symlink() and not Path(entry.path).exists()]
    if dangling:
        raise ValueError(f"{_shorten(dangling)} is a link to nothing; repair or remove it")
    return sorted(entry.name for entry in entries if entry.is_dir())


def _images(folder: Path) -> Iterator[str]:
    """Yield the paths of the images in `folder` and the folders below it, sorted folder by folder."""
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield f"{parent}/{name}"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    raise ValueError(f"cannot read folder {error.filename}: {error.strerror}; {LAYOUT}") from None


def _shorten(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
