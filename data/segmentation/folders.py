"""Folders of images and masks with the same file names: ADE20K and custom data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.formats.folders import image_extensions, is_system_file
from data.images import StoredImage, read_file
from data.segmentation.sources import Labels, MaskedDataset, MaskedSource, read_mask
from data.sources import SPLITS, Request, compose, read_class_list, read_lines
from data.wording import counted, shorten

LAYOUT = (
    "the layout is DATA_PATH/images/{train,val}/*.jpg, DATA_PATH/masks/{train,val}/*.png (or annotations/) and "
    "DATA_PATH/classes.txt"
)
ADE20K_LAYOUT = "the layout is DATA_PATH/images/{training,validation}/*.jpg and DATA_PATH/annotations/..., as published"
# Part of ADE20K: a table whose last column has the class names.
_ADE20K_NAMES = "objectInfo150.txt"


def open_ade20k(request: Request, labels: Labels) -> MaskedDataset:
    """Open ADE20K's scene parsing benchmark of 150 classes, with label 0 for unlabelled pixels.

    Raises:
        ValueError: a folder is missing, or an image has no mask.
    """
    root = request.existing_root(ADE20K_LAYOUT)
    names = root / _ADE20K_NAMES
    if names.is_file():
        classes = [row.split("\t")[-1].split(",")[0].strip() for row in read_lines(names)[1:]]
    else:
        classes = read_class_list(root) or [str(number) for number in range(1, 151)]
    reduced = Labels(mapping=labels.mapping, reduce_zero=True, ignored=labels.ignored)
    return _open(request, root, classes, reduced, ADE20K_LAYOUT)


def open_masks(request: Request, labels: Labels) -> MaskedDataset:
    """Open folders of images and masks with the classes in `classes.txt`, one per line.

    Raises:
        ValueError: a folder or the list of classes is missing, or an image has no mask.
    """
    root = request.existing_root(LAYOUT)
    classes = read_class_list(root)
    if not 0 < len(classes) <= 255:
        raise ValueError(f"{root / 'classes.txt'} has {len(classes)} classes; write 1 to 255, one per line, in order")
    return _open(request, root, classes, labels, LAYOUT)


def _open(request: Request, root: Path, classes: list[str], labels: Labels, layout: str) -> MaskedDataset:
    sources, warnings = {}, []
    for split in request.needs:
        names = [getattr(request, split)] if getattr(request, split) else SPLITS[split]
        images = _first(root, ("images",), names, layout)
        masks = _first(root, ("masks", "annotations"), names, layout)
        pairs, spare = _pairs(images, masks)
        sources[split] = FolderSource(pairs, labels.table(), len(classes), exif=request.exif)
        if spare:
            warnings.append(f"{counted(len(spare), 'mask')} without an image in {masks}: {shorten(spare, 3)}")
    return MaskedDataset(
        classes=classes, train=sources.get("train"), held_out=sources.get("val"), format_warnings=warnings
    )


def _first(root: Path, kinds: Sequence[str], names: Sequence[str], layout: str) -> Path:
    folders = [root / kind / name for kind in kinds for name in names]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        raise ValueError(f"data path {root} has no folder {kinds[0]}/{names[0]}; {layout}")
    return found


def _pairs(images: Path, masks: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Return image and mask of each name in two folders, in order, and the names of masks without an image."""
    found = _by_stem(images, image_extensions())
    wanted = _by_stem(masks, {".png"})
    if not found:
        raise ValueError(f"no images in {images}; add some, or set another split with DATA.TRAIN and DATA.VAL")
    bare = sorted(found.keys() - wanted.keys())
    if bare:
        raise ValueError(
            f"{len(bare)} of {counted(len(found), 'image')} in {images} without a mask in {masks}: {shorten(bare, 3)}; "
            f"add masks named as the image, ending in .png, or remove the images"
        )
    return [(found[stem], wanted[stem]) for stem in sorted(found)], sorted(wanted.keys() - found.keys())


def _by_stem(folder: Path, allowed: frozenset[str] | set[str]) -> dict[str, str]:
    """Return the files by relative path without extension; raises ValueError if two of them are equal."""
    found: dict[str, str] = {}
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        if file.suffix.lower() not in allowed or is_system_file(name):
            continue
        other = found.setdefault(compose(str(name.with_suffix(""))), str(file))
        if other != str(file):
            first, second = sorted((other, str(file)))
            raise ValueError(f"{first} and {second} have the same name but for the extension; rename or remove one")
    return found


class FolderSource(MaskedSource):
    """Image files and their masks.

    Args:
        pairs: paths of images and masks.
        table: class by value of the masks.
        classes: their number.
        exif: whether to apply the EXIF orientation; masks are not rotated.
    """

    def __init__(self, pairs: list[tuple[str, str]], table: np.ndarray, classes: int, *, exif: bool) -> None:
        self._pairs = pairs
        self._table = table
        self._classes = classes
        self._exif = exif

    def __len__(self) -> int:
        return len(self._pairs)

    def get(self, index: int) -> StoredImage:
        path = self._pairs[index][0]
        return StoredImage(read_file(path), path, exif=self._exif)

    def mask(self, index: int) -> np.ndarray:
        return read_mask(self._pairs[index][1], self._table, self._classes)
