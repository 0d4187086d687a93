"""Match the classes of a data set with those of weights, by name, number, WordNet id or a class map."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

IMAGENET_1K = 1000
NEW_ROW = -1  # the weights do not have the class


def find_labels(classes: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the index of each class in `names`, or [] if one is missing."""
    labels = {name: label for label, name in enumerate(names)}
    return [labels[name] for name in classes] if labels.keys() >= set(classes) else []


def rows_by_name(classes: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the index of each class in ``names``, or [] if the rows cannot be selected by name.

    If both have the same number of classes, a class that ``names`` lacks is `NEW_ROW`: the row at its label belongs to
    another class. If ``names`` lacks all of them, they are taken for other names of the same classes.
    """
    if len(classes) != len(names):
        return find_labels(classes, names)
    labels = {name: label for label, name in enumerate(names)}
    return [labels.get(name, NEW_ROW) for name in classes] if labels.keys() & set(classes) else []


def as_numbers(classes: Sequence[str], limit: int) -> list[int]:
    """Return class names as numbers, or [] unless all are whole numbers below ``limit``."""
    return [int(name) for name in classes] if all(name.isdecimal() and int(name) < limit for name in classes) else []


def synsets(num_classes: int) -> list[str]:
    """Return the WordNet ids, by label, of the ImageNet set with this number of classes, or [] if there is none."""
    subset = "imagenet-1k" if num_classes == IMAGENET_1K else infer_imagenet_subset({"num_classes": num_classes})
    return ImageNetInfo(subset).label_names() if subset else []


def imagenet_rows(subset: str) -> list[int]:
    """Return the index in a larger set of each class of ImageNet-1K, or `NEW_ROW` if its synset is missing there."""
    indices = {synset: index for index, synset in enumerate(ImageNetInfo(subset).label_names())}
    return [indices.get(synset, NEW_ROW) for synset in synsets(IMAGENET_1K)]


def read_class_map(path: Path, *, num_classes: int, classes: Sequence[str], names: Sequence[str] = ()) -> list[int]:
    """Read the mapping from the classes of a data set to those of the weights.

    Args:
        path: text file with one line per class. A line holds either only the counterpart in the weights, in the order
            of the classes, or the class and, after a tab, a comma or a space, its counterpart, in any order. A file of
            the second kind may contain further classes. A counterpart is an index from 0, a name, or -1 for none.
        num_classes: number of classes of the weights.
        classes: class names of the data set.
        names: class names of the weights; if unknown, the WordNet ids of the ImageNet set with ``num_classes``.

    Returns:
        The index in the weights of each class, `NEW_ROW` for none.

    Raises:
        ValueError: the file cannot be read, or does not fit the classes.
    """
    try:
        text = unicodedata.normalize("NFC", path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"class map {path} cannot be read: {error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"class map {path} is not UTF-8 text; save it as UTF-8") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    known = {name: label for label, name in enumerate(names or synsets(num_classes))}
    pairs = [(number, *_split(line)) for number, line in lines]
    if all(name for _, name, _ in pairs) and not all(line in known for _, line in lines):
        lines = _in_order(pairs, classes, path)
    elif len(lines) != len(classes):
        raise ValueError(
            f"class map {path} must have one line per class, {len(classes)}, but has {len(lines)}; give one index for "
            "each class"
        )
    labels = []
    for number, label in lines:
        is_index = re.fullmatch(r"-1|[0-9]+", label) and int(label) < num_classes
        if not is_index and label not in known:
            raise ValueError(
                f"class map {path}, line {number}: {label!r} is not a class of the weights; give 0 to "
                f"{num_classes - 1}, or -1"
            )
        labels.append(int(label) if is_index else known[label])
    return labels


def _split(line: str) -> tuple[str, str]:
    """Return a class and its counterpart; the class is empty on a line of one word."""
    separator = next((mark for mark in "\t," if mark in line), None)  # None: spaces
    name, *label = (part.strip() for part in line.rsplit(separator, 1))
    return (name, label[0]) if label else ("", name)


def _in_order(pairs: Sequence[tuple[int, str, str]], classes: Sequence[str], path: Path) -> list[tuple[int, str]]:
    """Return line number and counterpart of each class, from the line numbers, classes and counterparts of a file."""
    lines: dict[str, tuple[int, str]] = {}
    for number, name, label in pairs:
        if lines.setdefault(name, (number, label))[1] != label:
            raise ValueError(f"class map {path}, line {number}: {name} already has another line; keep one of them")
    missing = [name for name in classes if name not in lines]
    if missing:
        raise ValueError(
            f"class map {path} has no line for {missing[0]}; give each class one, with -1 where the weights have none"
        )
    return [lines[name] for name in classes]
