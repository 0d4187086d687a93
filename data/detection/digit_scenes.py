"""Digit scenes as a detection data set."""

from __future__ import annotations

import numpy as np
from faster_coco_eval.core import mask as rle

from data.detection.coco import open_coco
from data.detection.sources import DetectionDataset, DetectionSource, Objects
from data.formats.digit_scenes import SIDE, DigitScenes
from data.images import StoredImage
from data.sources import Request


def open_digit_scenes(request: Request) -> DetectionDataset:
    """Open the digit scenes, or the data set in the layout of COCO at a given path.

    Raises:
        ValueError: splits are named; or see `open_coco`.
    """
    if request.path:
        return open_coco(request)
    request.refuse_split_names("digit_scenes without a path")
    return DetectionDataset(
        classes=DigitScenes.classes,
        masks=True,
        train=_Scenes(train=True, scenes=request.scenes) if "train" in request.needs else None,
        held_out=_Scenes(train=False, scenes=request.scenes) if "val" in request.needs else None,
    )


class _Scenes(DetectionSource):
    def __init__(self, *, train: bool, scenes: int) -> None:
        self._scenes = DigitScenes(train=train, scenes=scenes)

    def __len__(self) -> int:
        return len(self._scenes)

    def get(self, index: int) -> StoredImage:
        return StoredImage(self._scenes[index].pixels, f"digit scene {index}")

    def size(self, index: int) -> tuple[int, int]:  # noqa: ARG002 - all are of one size
        return SIDE, SIDE

    def objects(self, index: int) -> Objects:
        scene = self._scenes[index]
        return Objects(
            boxes=scene.boxes,
            labels=scene.labels,
            areas=scene.masks.sum((1, 2), dtype=np.float64),
            crowd=np.zeros(len(scene.labels), dtype=bool),
            masks=rle.encode(np.asfortranarray(scene.masks.transpose(1, 2, 0), dtype=np.uint8)),
        )
