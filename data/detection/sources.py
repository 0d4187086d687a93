"""Detection data sets, independent of their format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle

from data.images import StoredImage

_SOME = 16  # images in which objects are counted


@dataclass(frozen=True, kw_only=True)
class Objects:
    """The objects of an image.

    Attributes:
        boxes: `[n, 4]`, float32: x1, y1, x2, y2 in pixels.
        labels: `[n]`, int64, counted from 0.
        areas: `[n]`, float64, in pixels, by which COCO separates small and large objects.
        crowd: `[n]`, bool: groups of objects, not used for training; evaluation ignores detections in them.
        masks: one per object, run-length encoded as in COCO; None if the data set has only boxes.
    """

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    masks: Sequence[dict[str, Any]] | None = None

    def decoded(self, size: tuple[int, int]) -> np.ndarray:
        """Return the masks as `[n, height, width]`, uint8, of an image of this size."""
        if not self.masks:
            return np.zeros((0, *size), dtype=np.uint8)
        return np.ascontiguousarray(rle.decode(list(self.masks)).transpose(2, 0, 1))


class DetectionSource(ABC):
    """Stored images, and the objects in them."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def get(self, index: int) -> StoredImage:
        """Return a stored image; raises `UnreadableImage`."""

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """Return height and width of an image in pixels, as recorded in the data set."""

    @abstractmethod
    def objects(self, index: int) -> Objects:
        """Return the objects in an image."""

    def many(self) -> int:
        """Return a large number of learned objects in an image: the largest in a few images."""
        some = np.linspace(0, len(self) - 1, _SOME).astype(int).tolist()
        return max(int((~self.objects(index).crowd).sum()) for index in some)


@dataclass(frozen=True, kw_only=True)
class DetectionDataset:
    """A data set of detection.

    Attributes:
        classes: names by label.
        masks: whether all its objects have masks.
        without_masks: the first objects without one, for messages, in formats that have masks.
        train: training images; None if not requested.
        held_out: held-out images; None if not requested.
        format_warnings: warnings from the format.
    """

    classes: list[str]
    masks: bool
    without_masks: Sequence[str] = ()
    train: DetectionSource | None = None
    held_out: DetectionSource | None = None
    format_warnings: Sequence[str] = ()
