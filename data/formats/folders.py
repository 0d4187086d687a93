"""Images sorted into folders: root/train/<class>/* and root/val/<class>/*."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image

from data.images import read_image
from data.sources import Dataset, ImageSource, Request, shorten

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
LAYOUT = "the layout is DATA_PATH/train/<class>/*.jpg and DATA_PATH/val/<class>/*.jpg"


def open_folders(request: Request) -> Dataset:
    """Open a data set of class folders; every folder that is needed is listed once.

    Where there is a folder `train`, its folders are the classes, needed or not, so that labels mean the same in
    training and evaluation.

    Raises:
        ValueError: for a folder that is missing, empty or unreadable, a class without images, or a class of `val` that
            `train` does not have.
    """
    root = request.root(LAYOUT)
    found = sorted(entry.name for entry in _entries(root) if entry.is_dir())
    listed = {}
    for split in request.needs:
        if split not in found:
            there = f"it holds {shorten(found)}" if found else "it holds no folders"
            raise ValueError(f"no folder {split!r} in data path {root}: {there}; {LAYOUT}")
        listed[split] = _list_classes(root / split)
    names = list(listed.get("train") or (class_folders(root / "train") if "train" in found else ()))
    classes = names or list(listed["val"])
    unknown = [name for name in listed.get("val", ()) if name not in set(classes)]
    if unknown:
        raise ValueError(f"{root / 'val'} has classes that {root / 'train'} has not: {shorten(unknown)}; {LAYOUT}")
    sources = {split: ImageFolder(listing, classes) for split, listing in listed.items()}
    return Dataset(classes=classes, train=sources.get("train"), held_out=sources.get("val"))


class ImageFolder(ImageSource):
    """The images of class folders; a label is the place of the folder's name in `classes`.

    Paths are kept in one block of memory and not as Python strings: workers share it with the process they were forked
    from, whereas every string they looked at would be copied.

    Args:
        listing: the paths of the images of every class.
        classes: names by label.
    """

    def __init__(self, listing: dict[str, list[str]], classes: Sequence[str]) -> None:
        labels = {name: label for label, name in enumerate(classes)}
        self._paths = np.array([os.fsencode(path) for paths in listing.values() for path in paths], dtype=np.bytes_)
        counts = [len(paths) for paths in listing.values()]
        self.labels = np.repeat(np.array([labels[name] for name in listing], dtype=np.int64), counts)

    def read(self, index: int) -> Image.Image:
        """Return an image as RGB; raises `UnreadableImage`."""
        return read_image(os.fsdecode(self._paths[index]))


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in `folder`, but for hidden ones."""
    entries = [entry for entry in _entries(folder) if not entry.name.startswith(".")]
    dangling = [entry.path for entry in entries if entry.is_symlink() and not Path(entry.path).exists()]
    if dangling:
        raise ValueError(f"{shorten(dangling)} is a link to nothing; repair or remove it")
    return sorted(entry.name for entry in entries if entry.is_dir())


def _list_classes(folder: Path) -> dict[str, list[str]]:
    """Return the paths of the images of every class folder in `folder`."""
    listing = {name: list(_images(folder / name)) for name in class_folders(folder)}
    if not listing:
        raise ValueError(f"no class folders in {folder}; {LAYOUT}")
    empty = [str(folder / name) for name, paths in listing.items() if not paths]
    if empty:
        raise ValueError(
            f"no images in {shorten(empty)}; add some or remove the folder (images end in {' '.join(EXTENSIONS)})"
        )
    return listing


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
