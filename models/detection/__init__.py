"""Object detection: the detectors by name. What a detector takes and returns stands in `detector.Detector`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from .cascade import CascadeMaskRCNN
from .detector import Detector
from .mask_rcnn import MaskRCNN
from .retinanet import RetinaNet
from .transformers_kinds import KINDS

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


# transformers takes seconds to import, so that its detectors are imported where they are built.
def _of_transformers(kind: str, backbone: nn.Module, **options: Any) -> Detector:
    from .transformers_detectors import TransformersDetector

    return TransformersDetector(kind, backbone, **options)


def _dino(backbone: nn.Module, **options: Any) -> Detector:
    from .dino import DINO

    return DINO(backbone, **options)


def _co_detr(backbone: nn.Module, **options: Any) -> Detector:
    from .co_detr import CoDETR

    return CoDETR(backbone, **options)


DETECTORS: Mapping[str, DetectorKind] = {
    "retinanet": DetectorKind(RetinaNet, maps=3),
    "mask_rcnn": DetectorKind(MaskRCNN, masks=True),
    "cascade": DetectorKind(CascadeMaskRCNN, masks=True),
    **{kind: DetectorKind(partial(_of_transformers, kind), maps=KINDS[kind].maps) for kind in KINDS},
    "dino": DetectorKind(_dino, maps=3),
    "co_detr": DetectorKind(_co_detr, maps=3),
}
