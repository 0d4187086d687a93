"""Semantic segmentation: the segmenters by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..backbone import DATBackbone, TimmBackbone
from .fpn import SemanticFPN
from .parts import IGNORED, Segmenter
from .upernet import UperNet

__all__ = ["IGNORED", "SEGMENTERS", "Segmenter"]


def _mask2former(backbone: DATBackbone | TimmBackbone, **options: Any) -> Segmenter:
    from .mask2former import Mask2Former  # importing transformers takes seconds

    return Mask2Former(backbone, **options)


# Arguments: a backbone with four feature maps, the keyword `num_classes`, and options as keywords.
SEGMENTERS: Mapping[str, Callable[..., Segmenter]] = {
    "fpn": SemanticFPN,
    "upernet": UperNet,
    "mask2former": _mask2former,
}
