"""The classes of a data set among those of some weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

from models.weights import IMAGENET_1K, NEW_ROW, read_class_map


def labels_of(classes: Sequence[str], known: Any, number: int, class_map: str) -> tuple[list[int], str]:
    """Return the label that weights have for each class, and how it was found; no labels where that is not known.

    Args:
        classes: names by label of the data set.
        known: names by label of the weights; anything else where they do not tell.
        number: of classes of the weights.
        class_map: file with the label of each class, a line each; empty where there is none.

    Raises:
        ValueError: the class map does not fit.
    """
    if class_map:
        labels = read_class_map(Path(class_map), there=number, here=len(classes))
        if NEW_ROW in labels:
            name = classes[labels.index(NEW_ROW)]
            raise ValueError(f"class map {class_map} has no class of the weights for {name}; leave its images out")
        return labels, f"by {class_map}"
    if isinstance(known, list) and len(known) == number:
        return _find(classes, known), "by name"
    if all(name.isdecimal() and int(name) < number for name in classes):
        return [int(name) for name in classes], "as the numbers that they are"
    subset = "imagenet-1k" if number == IMAGENET_1K else infer_imagenet_subset({"num_classes": number})
    return (_find(classes, ImageNetInfo(subset).label_names()), "by WordNet id") if subset else ([], "")


def _find(classes: Sequence[str], names: Sequence[str]) -> list[int]:
    places = {name: label for label, name in enumerate(names)}
    return [places[name] for name in classes] if places.keys() >= set(classes) else []
