"""Object detection: the detectors by name. What a detector takes and returns stands in `detector.Detector`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .cascade import CascadeMaskRCNN
from .detector import Detector
from .mask_rcnn import MaskRCNN
from .retinanet import RetinaNet

__all__ = ["DETECTORS", "Detector", "DetectorKind"]


@dataclass(frozen=True)
class DetectorKind:
    """A detector that `MODEL.DETECTOR.NAME` can name.

    Attributes:
        build: makes it of a backbone, the keyword `num_classes` (of objects alone), and options of its own.
        maps: how many maps of the backbone it takes, the coarsest ones.
        masks: whether it learns masks and finds them.
    """

    build: Callable[..., Detector]
    maps: int = 4
    masks: bool = False


DETECTORS: Mapping[str, DetectorKind] = {
    "retinanet": DetectorKind(RetinaNet, maps=3),
    "mask_rcnn": DetectorKind(MaskRCNN, masks=True),
    "cascade": DetectorKind(CascadeMaskRCNN, masks=True),
}
