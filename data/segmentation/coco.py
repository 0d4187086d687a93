"""Class maps from the objects of data sets in the layout of COCO: background, and the classes of the objects."""

from __future__ import annotations

import numpy as np

from data.detection.annotated import UNKNOWN
from data.detection.coco import open_coco as open_objects
from data.detection.sources import DetectionSource
from data.images import StoredImage
from data.segmentation.sources import IGNORED, Labels, MaskedDataset, MaskedSource
from data.sources import Request
from data.wording import shorten


def open_coco(request: Request, labels: Labels) -> MaskedDataset:
    """Open a data set in the layout of COCO; class 0 is the background, the others follow the ids of the categories.

    Raises:
        ValueError: as for detection, or objects have only boxes, or there are too many classes for a mask, or `labels`
            are mapped.
    """
    labels.check_unmapped("annotations in the format of COCO")
    objects = open_objects(request, pixels=True)
    if not objects.masks:
        raise ValueError(
            f"data path {request.path}: some objects have only a box, such as {shorten(objects.without_masks)}; TASK "
            f"segmentation needs the outline of each (the key segmentation of its annotation)"
        )
    if len(objects.classes) > 254:
        raise ValueError(
            f"data path {request.path} has {len(objects.classes)} classes; a mask supports 254 and background"
        )
    return MaskedDataset(
        classes=["background", *objects.classes],
        train=ObjectSource(objects.train) if objects.train else None,
        held_out=ObjectSource(objects.held_out) if objects.held_out else None,
        format_warnings=objects.format_warnings,
    )


class ObjectSource(MaskedSource):
    """Images whose pixels have the class of the smallest object over them, crowds included; 0 if there is none.

    Pixels of invalid annotations, whose class or shape is not known, are `IGNORED`.

    Args:
        objects: the images, whose objects include invalid ones with the label `UNKNOWN`.
    """

    def __init__(self, objects: DetectionSource) -> None:
        self._objects = objects

    def __len__(self) -> int:
        return len(self._objects)

    def get(self, index: int) -> StoredImage:
        return self._objects.get(index)

    def mask(self, index: int) -> np.ndarray:
        size, objects = self._objects.size(index), self._objects.objects(index)
        found = np.zeros(size, dtype=np.uint8)
        outlines = objects.decoded(size)
        classes = np.where(objects.labels == UNKNOWN, IGNORED, objects.labels + 1)
        for number in np.argsort(-objects.areas, kind="stable"):  # small ones are drawn over large ones
            found[outlines[number] > 0] = classes[number]
        return found
