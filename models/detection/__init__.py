"""Object detection: the detectors by name, all with the interface `detector.Detector`."""

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
    """An entry of `DETECTORS`, selected by `MODEL.DETECTOR.NAME`.

    Attributes:
        build: builds it from a backbone, the keyword ``num_classes`` (without background), and its own options.
        maps: number of feature maps that it uses, the coarsest of the backbone.
        masks: whether it predicts masks; the data set must then have masks.
    """

    build: Callable[..., Detector]
    maps: int = Detector.maps
    masks: bool = False


# Importing transformers takes seconds, so detectors that need it are imported when they are built.
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
    "retinanet": DetectorKind(RetinaNet, maps=RetinaNet.maps),
    "mask_rcnn": DetectorKind(MaskRCNN, masks=True),
    "cascade": DetectorKind(CascadeMaskRCNN, masks=True),
    **{kind: DetectorKind(partial(_of_transformers, kind), maps=KINDS[kind].maps) for kind in KINDS},
    # As Deformable DETR, on which they are built.
    "dino": DetectorKind(_dino, maps=KINDS["deformable_detr"].maps),
    "co_detr": DetectorKind(_co_detr, maps=KINDS["deformable_detr"].maps),
}
