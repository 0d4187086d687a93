"""Scenes of handwritten digits with the class of each pixel: background, and the digits from 0 to 9."""

from __future__ import annotations

import numpy as np

from data.formats.digit_scenes import DigitScenes
from data.images import StoredImage
from data.segmentation.coco import open_coco
from data.segmentation.sources import Labels, MaskedDataset, MaskedSource
from data.sources import Request


def open_scenes(request: Request, labels: Labels) -> MaskedDataset:
    """Open the digit scenes, or the data set in the layout of COCO at a given path.

    Raises:
        ValueError: splits are named, or labels mapped; or see `open_coco`.
    """
    if request.path:
        return open_coco(request, labels)
    request.refuse_split_names("digit_scenes without a path")
    labels.check_unmapped("digit_scenes")
    return MaskedDataset(
        classes=["background", *DigitScenes.classes],
        train=SceneSource(train=True, scenes=request.scenes) if "train" in request.needs else None,
        held_out=SceneSource(train=False, scenes=request.scenes) if "val" in request.needs else None,
    )


class SceneSource(MaskedSource):
    """The training scenes, or the held-out ones."""

    def __init__(self, *, train: bool, scenes: int) -> None:
        self._scenes = DigitScenes(train=train, scenes=scenes)

    def __len__(self) -> int:
        return len(self._scenes)

    def get(self, index: int) -> StoredImage:
        return StoredImage(self._scenes[index].pixels, f"scene {index}")

    def mask(self, index: int) -> np.ndarray:
        return self._scenes[index].class_map
