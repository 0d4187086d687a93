"""The classes of images in one folder, from the lists published with ImageNet's validation images."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from data.sources import read_lines
from data.wording import counted

KAGGLE = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_validation_ground_truth.txt"
PAIRS = "val.txt"
# Names the classes of the numbers in the development kit.
META = "meta.mat"


def read_ground_truth(folder: Path) -> dict[str, str]:
    """Return the class of each image in `folder` by the name of its file; empty if there is no list.

    Three lists are supported, in the folder, next to it or in a parent: `LOC_val_solution.csv` of Kaggle (image, then
    the synset and boxes), `ILSVRC2012_validation_ground_truth.txt` of the development kit together with `meta.mat` (a
    number for each image in order), and `val.txt` with a file name and a class on each line.

    Raises:
        ValueError: the list does not match the images.
    """
    readers = {KAGGLE: _kaggle, DEVKIT: _devkit, PAIRS: _pairs}
    lists = find_lists(folder)
    return _match(folder, lists[0], readers[lists[0].name](lists[0], folder)) if lists else {}


def find_lists(folder: Path) -> list[Path]:
    """Return the list of the classes of the images in `folder` and the file it refers to; empty if there is none."""
    paths = (place / name for name in (KAGGLE, DEVKIT, PAIRS) for place in _places(folder))
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        return []
    meta = path.with_name(META)
    return [path, meta] if path.name == DEVKIT and meta.is_file() else [path]


def _places(folder: Path) -> Iterator[Path]:
    for above in (folder, *list(folder.absolute().parents)[:4]):
        yield from (above, above / "data", above / "ILSVRC2012_devkit_t12" / "data")


def _match(folder: Path, path: Path, classes: dict[str, str]) -> dict[str, str]:
    """Check that list and folder name the same images."""
    there = {name for name in _names(folder) if not name.startswith(".")} - {KAGGLE, DEVKIT, PAIRS, META}
    missing, unlisted = sorted(classes.keys() - there), sorted(there - classes.keys())
    if missing or unlisted:
        what = (
            f"lacks {counted(len(missing), 'image')} of it"
            if missing
            else f"holds {counted(len(unlisted), 'file')} not in it"
        )
        raise ValueError(f"{path} does not match {folder}, which {what}, such as {(missing or unlisted)[0]}")
    return classes


def _kaggle(path: Path, folder: Path) -> dict[str, str]:
    ending = _ending(folder)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    if not all(len(row) == 2 and row[1].split() for row in rows):
        raise ValueError(f"{path} must have an image and its classes on each line, after a header line")
    return {f"{image}{ending}": boxes.split()[0] for image, boxes in rows}


def _devkit(path: Path, folder: Path) -> dict[str, str]:
    from scipy.io import loadmat

    meta = path.with_name(META)
    if not meta.is_file():
        raise ValueError(f"{path} needs meta.mat of the same development kit next to it, which names its classes")
    synsets = {str(row[0]): str(row[1]) for row in loadmat(meta, squeeze_me=True)["synsets"]}
    numbers = path.read_text(encoding="ascii").split()
    images = sorted(name for name in _names(folder) if name.startswith("ILSVRC2012_val_"))
    if len(numbers) != len(images):
        raise ValueError(f"{path} lists {counted(len(numbers), 'image')}, but {folder} holds {len(images)}")
    unknown = next((number for number in numbers if number not in synsets), None)
    if unknown is not None:
        raise ValueError(f"{path}: {unknown} is not a class in {meta}")
    return {image: synsets[number] for image, number in zip(images, numbers, strict=True)}


def _pairs(path: Path, folder: Path) -> dict[str, str]:  # noqa: ARG001
    rows = [line.split() for line in read_lines(path)]
    wrong = next((row for row in rows if len(row) != 2), None)
    if wrong:
        raise ValueError(f"{path} must have a file name and its class on each line, not {' '.join(wrong)!r}")
    return {Path(name).name: label for name, label in rows}


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def _ending(folder: Path) -> str:
    return next((Path(name).suffix for name in _names(folder) if name.startswith("ILSVRC2012_val_")), ".JPEG")
