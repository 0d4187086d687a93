"""Match the classes of a data set with those of weights."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.sources import compose
from data.wording import shorten, with_similar
from models.class_names import NEW_ROW, as_numbers, find_labels, read_class_map, synsets


def labels_of(classes: Sequence[str], known: Sequence[str], number: int, class_map: str) -> tuple[list[int], str]:
    """Return the label of each class in the weights, and how they were matched; no labels if they are unknown.

    Args:
        classes: names by label of the data set.
        known: names by label of the weights; empty if unknown.
        number: number of classes of the weights.
        class_map: see `models.class_names.read_class_map`; empty if there is none.

    Raises:
        ValueError: the class map does not match, a class is unknown, two classes share a label, or numeric class names
            are not valid labels.
    """
    labels, how = _find(classes, [compose(name) for name in known], number, class_map)
    if class_map and NEW_ROW in labels:
        name = classes[labels.index(NEW_ROW)]
        raise ValueError(f"class map {class_map} has no class of the weights for {name}; leave its images out")
    if len(set(labels)) < len(labels):
        ((twice, _),) = Counter(labels).most_common(1)
        names = [name for name, label in zip(classes, labels, strict=True) if label == twice]
        raise ValueError(f"classes {shorten(names)} share label {twice} of the weights {how}; merge their images")
    return labels, how


def _find(classes: Sequence[str], known: Sequence[str], number: int, class_map: str) -> tuple[list[int], str]:
    if class_map:
        return read_class_map(Path(class_map), num_classes=number, classes=classes, names=known), f"by {class_map}"
    if known:
        labels = find_labels(classes, known)
        unknown = [name for name in classes if name not in set(known)]
        # If the numbers of classes agree and no name does, the classes are assumed to be renamed; the log warns of it.
        if not labels and (len(classes) != number or len(unknown) < len(classes)):
            named = shorten(with_similar(unknown, known, "the weights have"))
            raise ValueError(
                f"the weights have no class {named}, but {describe_labels(known)}: give a MODEL.CLASS_MAP, leave the "
                f"images out, or fine-tune with --pretrained"
            )
        return labels, "by name"
    if labels := as_numbers(classes, number):
        return labels, "by their numbers"
    if all(name.isdecimal() for name in classes) and list(classes) != sorted(classes, key=int):
        raise ValueError(
            f"the classes are numbers up to {max(map(int, classes))}, and the weights have {number} classes without "
            f"names: give DATA.CLASS_ORDER number if their order is that of the labels, otherwise a MODEL.CLASS_MAP"
        )
    return find_labels([_without_words(name) for name in classes], synsets(number)), "by WordNet id"


def _without_words(name: str) -> str:
    """Return the WordNet id at the beginning of a name such as n02085620-Chihuahua; other names unchanged."""
    found = re.match(r"n\d{8}(?=[-_. ])", name)
    return found[0] if found else name


def describe_labels(classes: Sequence[str], labels: Sequence[int] | None = None) -> str:
    """Return the first labels and the last one with their classes; by default, labels are positions."""
    pairs = [f"{label} = {name}" for label, name in zip(labels or range(len(classes)), classes, strict=False)]
    return ", ".join(pairs if len(pairs) < 5 else [*pairs[:3], "...", pairs[-1]])


def order_warning(classes: Sequence[str]) -> str:
    """Return a warning if the numbers within class names are in another order than that of the labels; else empty."""
    if list(classes) == sorted(classes, key=_by_numbers):
        return ""
    return (
        f"the weights do not name their classes, and those of the images are sorted as text ({', '.join(classes[:3])}, "
        "...), not by the numbers in their names; if the labels follow the numbers, give a MODEL.CLASS_MAP"
    )


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts the numbers within names as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


def read_label_sets(path: Path, files: Sequence[str], number: int) -> np.ndarray:
    """Read the correct labels of each image, as for ReaL (arXiv 2006.07159).

    Args:
        path: JSON file, a list with a list of labels for each image. The number at the end of an image's name, counted
            from 1, is its position: ILSVRC2012_val_00000003.JPEG has the third list.
        files: names of the images.
        number: number of classes of the weights.

    Returns:
        `[images, number]` of 0 and 1.

    Raises:
        ValueError: the file cannot be read, or does not match the images or the classes.
    """
    try:
        sets = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"labels {path} cannot be read: {error}") from None
    if not isinstance(sets, list) or not all(isinstance(labels, list) for labels in sets):
        raise ValueError(f"labels {path} must be a list with a list of labels for each image")
    rows = np.zeros((len(files), number), dtype=np.uint8)
    for row, name in zip(rows, files, strict=True):
        place = re.search(r"(\d+)(\.\w+)?$", name)
        if not place or not 1 <= int(place[1]) <= len(sets):
            raise ValueError(f"labels {path} are for images numbered 1 to {len(sets)}; {name!r} is not one of them")
        labels = sets[int(place[1]) - 1]
        if not all(isinstance(label, int) and 0 <= label < number for label in labels):
            raise ValueError(
                f"labels {path}: {labels} of image {place[1]} are not labels of the weights, 0 to {number - 1}"
            )
        row[labels] = 1
    return rows
